"""An accelerator that is not there: `pretend:0`, whose tensors hold CPU tensors, say that they are
elsewhere, and raise where CUDA's would, when one meets a tensor of the CPU.

Python finds it by `PYTHONPATH=tests/pretend`, PyTorch loads it as any back end that is installed
(entry point `torch.backends`), and `DEVICE=pretend python train_gpt.py` runs on it. Operations on
the device and waits for it are counted (`COUNTS`, `WAITS`).

It is made of PyTorch's own experimental back end in Python (`_setup_privateuseone_for_python_
backend`). What it cannot show: how fast a device is, what its kernels round, torch.compile.
"""

import collections
import contextlib

import torch
import torch.distributed as dist
from torch.utils import backend_registration
from torch.utils._pytree import tree_map

NAME = "pretend"
aten = torch.ops.aten
# Operations that may read from both sides: copies, and an index, which CUDA takes from the CPU.
BOTH_SIDES = {
    aten._to_copy.default,
    aten.copy_.default,
    aten.index.Tensor,
    aten.index_put_.default,
    aten.index_put.default,
    aten._index_put_impl_.default,
}
# The host waits for the device where the size or the value of a result is wanted.
SIZES_WANTED = {
    "aten.nonzero.default",
    "aten.masked_select.default",
    "aten._unique2.default",
    "aten.unique_consecutive.default",
    "aten.unique_dim.default",
    "aten.bincount.default",
    "aten.repeat_interleave.Tensor",
}
VIEWS = [
    "select",
    "slice",
    "view",
    "_unsafe_view",
    "unsqueeze",
    "squeeze",
    "expand",
    "permute",
    "transpose",
    "t",
    "alias",
    "detach",
    "as_strided",
    "split",
    "split_with_sizes",
    "unbind",
    "diagonal",
    "unfold",
    "chunk",
    "lift_fresh",
    "_reshape_alias",
    "empty",
    "empty_like",
    "new_empty",
    "empty_strided",
]  # they launch nothing
COUNTS: collections.Counter[str] = collections.Counter()  # operations that a device would launch
WAITS: collections.Counter[str] = collections.Counter()  # of the host for the device


class DeviceTensor(torch.Tensor):
    """A tensor on the device: `held` is its CPU tensor."""

    @staticmethod
    def __new__(cls, held: torch.Tensor, requires_grad: bool = False):
        made = torch.Tensor._make_wrapper_subclass(
            cls,
            held.size(),
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            layout=held.layout,
            device=f"{NAME}:0",
            requires_grad=requires_grad,
        )
        made.held = held
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl

    def __repr__(self) -> str:
        return f"DeviceTensor({self.held})"

    def tolist(self):
        WAITS["tolist"] += 1
        return self.held.tolist()

    def numpy(self, *, force: bool = False):
        raise TypeError(f"can't convert {NAME}:0 device type tensor to numpy")

    def __array__(self, dtype=None, copy=None):
        return self.numpy()

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        return run(function, args, kwargs or {})


def is_device(value) -> bool:
    """Whether an argument names this device."""
    return value is not None and torch.device(value).type == NAME


class Facts:
    """What is to be known of an operation."""

    def __init__(self, function):
        self.name = str(function)
        self.is_view = self.name.split(".")[1] in VIEWS
        self.meets_both = function in BOTH_SIDES or "c10d" in self.name
        self.waits = function is aten._local_scalar_dense.default or self.name in SIZES_WANTED


FACTS: dict = {}  # by operation


def facts_of(function) -> Facts:
    if function not in FACTS:
        FACTS[function] = Facts(function)
    return FACTS[function]


def check_sides(function, tensors: list[torch.Tensor], target) -> None:
    """RuntimeError if tensors of both sides meet. As on CUDA, one number of the CPU may."""
    if facts_of(function).meets_both:
        if function is aten.index.Tensor and not isinstance(target, DeviceTensor):
            raise RuntimeError(f"{function}: a CPU tensor is indexed by one of {NAME}:0")
        return
    for tensor in tensors:
        if not isinstance(tensor, DeviceTensor) and tensor.dim() > 0:
            shapes = [(type(t).__name__, tuple(t.shape)) for t in tensors]
            raise RuntimeError(
                f"Expected all tensors to be on the same device, {NAME}:0 and cpu: "
                f"{function} of {shapes}"
            )


def count(function, args, kwargs, to_cpu: bool) -> None:
    """Count an operation on the device, and a wait for it."""
    facts = facts_of(function)
    if not facts.is_view:
        COUNTS[facts.name] += 1
    masked = function is aten.index.Tensor and any(
        index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1]
    )
    if facts.waits or masked:
        WAITS[facts.name] += 1
    elif to_cpu and not kwargs.get("non_blocking"):
        WAITS["to the CPU"] += 1


def check_sizes(function, tensors: list[torch.Tensor]) -> None:
    """What has no kernel of its own may resize an empty result; its wrapper would not know."""
    for tensor in tensors:
        if isinstance(tensor, DeviceTensor) and tensor.size() != tensor.held.size():
            raise NotImplementedError(f"{function}: register it in pretend_device.FACTORIES")


def held(value, tensors: list[torch.Tensor]):
    """An argument with the CPU tensors that are held; all its tensors are appended to `tensors`."""
    if isinstance(value, torch.Tensor):
        tensors.append(value)
        return value.held if isinstance(value, DeviceTensor) else value
    if isinstance(value, (list, tuple)):
        return type(value)([held(part, tensors) for part in value])
    return value


def run(function, args, kwargs):
    """Run an operation on the tensors held; its results are on the device if it is."""
    tensors: list[torch.Tensor] = []
    inner_args = [held(value, tensors) for value in args]
    inner = {name: held(value, tensors) for name, value in kwargs.items()}
    touches = any(isinstance(a, DeviceTensor) for a in tensors)
    wanted = kwargs.get("device")
    on_device = is_device(wanted) if wanted is not None else touches
    if touches:
        check_sides(function, tensors, args[0] if args else None)
        count(function, args, kwargs, wanted is not None and not on_device)
    if wanted is not None:
        inner["device"] = torch.device("cpu")
    inner.pop("pin_memory", None)
    result = function(*inner_args, **inner)
    check_sizes(function, tensors)
    if function is aten._local_scalar_dense.default:
        return result
    known = {id(t.held): t for t in tensors if isinstance(t, DeviceTensor)}

    def wrapped(value):
        if isinstance(value, torch.Tensor):
            if id(value) in known:
                return known[id(value)]
            return DeviceTensor(value) if on_device else value
        return value

    return wrapped(result) if isinstance(result, torch.Tensor) else tree_map(wrapped, result)


def empty_strided(size, stride, dtype=None, layout=None, device=None, pin_memory=None):
    return DeviceTensor(torch.empty_strided(size, stride, dtype=dtype))


def empty(size, dtype=None, layout=None, device=None, pin_memory=None, memory_format=None):
    return DeviceTensor(torch.empty(size, dtype=dtype))


def copy_from(source, target, non_blocking=False):
    """Between the sides: to the device without a wait only from pinned memory, which is
    `non_blocking` here."""
    if isinstance(source, DeviceTensor) and not isinstance(target, DeviceTensor):
        WAITS["to the CPU"] += not non_blocking
    if isinstance(target, DeviceTensor) and not isinstance(source, DeviceTensor):
        WAITS["to the device"] += not non_blocking and source.numel() > 1
    COUNTS["copy"] += 1
    held = source.held if isinstance(source, DeviceTensor) else source
    (target.held if isinstance(target, DeviceTensor) else target).copy_(held)
    return target


def factory(name: str):
    """A kernel that makes its result on the CPU."""
    packet, overload = (name.split(".") + ["default"])[:2]
    function = getattr(getattr(aten, packet), overload)

    def made(*args, dtype=None, layout=None, device=None, pin_memory=None, **kwargs):
        COUNTS[str(function)] += 1
        return DeviceTensor(function(*args, dtype=dtype, **kwargs))

    return made


FACTORIES = ["arange", "arange.start", "arange.start_step", "randperm", "linspace", "eye"]


class Module:
    """What `torch.pretend` has, as `torch.cuda` does."""

    @staticmethod
    def is_initialized() -> bool:
        return True

    is_available = is_initialized

    @staticmethod
    def current_device() -> int:
        return 0

    @staticmethod
    def _is_in_bad_fork() -> bool:
        return False

    @staticmethod
    def manual_seed_all(seed: int) -> None:
        pass

    @staticmethod
    def device_count() -> int:
        return 1

    @staticmethod
    def get_amp_supported_dtype() -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16, torch.float32]


class Event:
    """What `torch.Event` is on the device: all before it is done at once."""

    def __init__(self, device=None):
        pass

    def record(self, stream=None) -> None:
        pass

    def synchronize(self) -> None:
        WAITS["event"] += 1


LIBRARIES = []  # what they register is gone with them


def load() -> None:
    """Make the device known to PyTorch."""
    torch.utils.rename_privateuse1_backend(NAME)
    backend_registration._setup_privateuseone_for_python_backend(NAME, backend_module=Module())
    library = torch.library.Library("aten", "IMPL")
    library.impl("empty_strided", empty_strided, "PrivateUse1")
    library.impl("empty.memory_format", empty, "PrivateUse1")
    library.impl("_copy_from", copy_from, "PrivateUse1")
    for name in FACTORIES:
        library.impl(name, factory(name), "PrivateUse1")
    others = torch.library.Library("_", "IMPL")
    others.fallback(lambda function, *args, **kwargs: run(function, args, kwargs), "PrivateUse1")
    LIBRARIES.extend((library, others))
    torch.Tensor.pin_memory = lambda tensor, device=None: tensor
    torch.Event = Event
    torch.accelerator.synchronize = synchronize
    torch.accelerator.memory_stats = lambda device=None: {}
    torch.accelerator.device_count = lambda: 8  # all are called 0: nothing else is asked of one
    if dist.is_available():
        dist.Backend.default_device_backend_map[NAME] = "gloo"


def synchronize(device=None) -> None:
    WAITS["synchronize"] += 1


@contextlib.contextmanager
def counted():
    """Counts of what runs inside: yields (operations, waits), counters."""
    operations, waits = COUNTS.copy(), WAITS.copy()
    found = (collections.Counter(), collections.Counter())
    yield found
    for own, now, before in zip(found, (COUNTS, WAITS), (operations, waits), strict=True):
        own.update(now - before)


load()
