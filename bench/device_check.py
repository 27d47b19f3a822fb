"""Does what a run needs work on this machine? A line of each part, in half a minute.

    python bench/device_check.py

Settings are train_gpt.py's: DEVICE=cpu SCALE=demo checks a laptop. Parts without which no run at
full size could end are needed: if one fails, the exit status is 1, and the others still run as far
as they can. The last two parts are the device's ceilings, with which a run's figures are compared.
"""

import importlib.metadata
import os
import sys
import time
import traceback
from collections.abc import Callable
from typing import NamedTuple

PACKAGES = ("numpy", "sentencepiece", "safetensors", "zstandard", "constriction", "matplotlib")
SIDE = 8192  # rows and columns of the matrices whose product is timed
COPIED_BYTES = 2**32
FEW_BYTES = 2**26  # of a CPU


class Place:
    """Where the parts run: train_gpt as `golf`, its Config and Run, made by the parts before."""

    def __init__(self):
        self.golf = self.cfg = self.run = None

    def seconds(self, work: Callable, times: int) -> float:
        """Seconds of one call, the mean of so many after two that are not counted."""
        for _ in range(2):
            work()
        began = self.run.sync()
        for _ in range(times):
            work()
        return (self.run.sync() - began) / times


def torch_part(place: Place) -> str:
    """PyTorch, its build and the accelerator that it finds."""
    import torch

    accelerator = torch.accelerator.current_accelerator(check_available=True)
    return f"{torch.__version__}, accelerator {accelerator}, {os.cpu_count()} cores"


def packages_part(place: Place) -> str:
    """Versions of the packages; train_gpt.py loads."""
    from common import golf

    place.golf = golf
    return ", ".join(f"{name} {importlib.metadata.version(name)}" for name in PACKAGES)


def device_part(place: Place) -> str:
    """The device that a run takes; its process group is made."""
    golf = place.golf
    place.cfg, _ = golf.load_config(os.environ)
    place.run = golf.Run(place.cfg)
    device = place.run.device
    (number,) = place.run.of_ranks(1.0)
    if number != [1.0]:
        raise ValueError(f"the only rank gathers {number} and not its own number")
    if device.type == "cpu" and place.cfg.scale == "full":
        raise ValueError("no accelerator for SCALE=full")
    if device.type != "cuda":
        return str(device)
    import torch

    free, total = torch.cuda.mem_get_info()
    return f"{torch.cuda.get_device_name()}, {free} of {total} bytes free"


def compiler_part(place: Place) -> str:
    """A small function, compiled as scoring is and as training is."""
    import torch

    golf, cfg, run = place.golf, place.cfg, place.run
    if not golf.compiles(cfg, run):
        return "not used"
    x = torch.ones(8, 8, device=run.device, requires_grad=True)
    scored = golf.compiled(lambda t: (2 * t).sum(), cfg, run, golf.DETERMINISTIC)(x.detach())
    golf.compiled(lambda t: (t * t).sum(), cfg, run)(x).backward()
    if float(scored) != 128 or float(x.grad.sum()) != 128:
        raise ValueError(f"{float(scored)} and {float(x.grad.sum())} in place of 128")
    return "forward and backward"


def attention_part(place: Place) -> str:
    """The back end of attention that works, after those that do not."""
    return place.golf.choose_attention(place.cfg, place.run)[0]


def solver_part(place: Place) -> str:
    """Inverse and Cholesky factor of a batch in float64, as GPTQ takes them."""
    import torch

    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(2, 512, 256, generator=generator).to(place.run.device)
    factor = place.golf.gptq_factor(rows.mT @ rows).cpu()
    if not bool(torch.isfinite(factor).all()):
        raise ValueError("not finite")
    return "float64 factors are finite"


def product_part(place: Place) -> str:
    """Arithmetic of a large bfloat16 product, a small float32 one on a CPU."""
    import torch

    on_cpu = place.run.device.type == "cpu"
    side, dtype = (512, torch.float32) if on_cpu else (SIDE, torch.bfloat16)
    a, b = (torch.randn(side, side, device=place.run.device, dtype=dtype) for _ in range(2))
    return f"{2 * side**3 / place.seconds(lambda: a @ b, 10) / 1e12:.3g} TFLOP/s"


def copy_part(place: Place) -> str:
    """Bytes read and written by a large copy on the device."""
    import torch

    size = FEW_BYTES if place.run.device.type == "cpu" else COPIED_BYTES
    source = torch.zeros(size, dtype=torch.uint8, device=place.run.device)
    target = torch.empty_like(source)
    return f"{2 * size / place.seconds(lambda: target.copy_(source), 5) / 1e12:.3g} TB/s"


class Part(NamedTuple):
    """A line: its name, what makes its text, whether no run could end without it."""

    name: str
    work: Callable[[Place], str]
    needed: bool = True


PARTS = (
    Part("torch", torch_part),
    Part("packages", packages_part),
    Part("device", device_part),
    Part("compiler", compiler_part),
    Part("attention", attention_part),
    Part("solver", solver_part),
    Part("product", product_part, needed=False),
    Part("copy", copy_part, needed=False),
)


def main() -> int:
    """The exit status."""
    place, failed = Place(), []
    for part in PARTS:
        began = time.perf_counter()
        try:
            text = part.work(place)
        except Exception as error:  # whatever it is, the other parts are worth a line
            traceback.print_exc()
            text = f"FAILED, {type(error).__name__}: {' '.join(str(error).split())}"
            failed += [part.name] * part.needed
        print(f"check {part.name}: {text} ({time.perf_counter() - began:.1f} s)", flush=True)
        if failed and not place.run:  # nothing that the other parts could be tried with
            break
    if place.run:
        place.golf.dist.destroy_process_group()
    if failed:
        print(f"error: {', '.join(failed)} failed, without which no run ends", flush=True)
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
