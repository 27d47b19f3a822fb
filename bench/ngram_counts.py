"""How fast are n-gram counts? Sorting the stream against tables read and written by window.

    python bench/ngram_counts.py [--sizes 0.5 2 8] [--repeats 5] [--tokens stream.npy|.bin]
    python bench/ngram_counts.py --sizes --mixing 8 62 [--baseline REVISION] [--tokens ...]

Sizes are in millions of tokens. Without --tokens the stream is made here (`make_stream`). With a
GPU the same sizes and 62 M tokens run there too. The contender does what the public submissions
do: for every order two 2**22-bucket uint32 tables, read for a window of 32 targets and then
updated, window after window, with numpy; being linear it is timed on a slice. It yields the
longest match only, ours every column of every order.

--mixing times what the calibrated mixer does on such streams: its columns, then mixing, each size
in a process of its own, whose peak memory counts the tokens and the network's columns (made up
here). --baseline does the same with another revision's train_gpt.py in the same run, after a
comparison of the results.

    python bench/ngram_counts.py --sizes --mixing --launches --scans 62 [--tokens ...]

--launches counts the kernels that each of this takes on CUDA at 62 M tokens, on the CPU: a short
stream in as many blocks, chunks of mixing times their number. --scans times the audit's scans of a
stream, of one sampled target.
"""

import argparse
import collections
import hashlib
import importlib.util
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from common import first_targets, golf

ROOT = Path(__file__).resolve().parent.parent
MAX_ORDER, BUCKETS, WINDOW, MIN_COUNT, VOCAB = 10, 2**22, 32, 2, 1024
COMPARED = 300_000  # tokens at which two revisions' results are compared
FULL_TARGETS, CHUNK = 62_021_632, 8192  # the challenge's, and between updates of the mixer's tables
LAUNCH_SECONDS = 8e-6  # of a kernel
# Operations without a kernel, and those for whose result the host waits.
VIEWS = "slice select view t expand unsqueeze detach squeeze alias unbind transpose permute split"
VIEWS = {*VIEWS.split(), "empty", "empty_like", "as_strided", "_unsafe_view", "lift_fresh"}
WAITS = {"_local_scalar_dense", "nonzero", "bincount"}
PRIMES = np.array((36313, 27191, 51647, 81929, 131071, 174763, 233017), dtype=np.int64)


def make_stream(total, seed=0):
    """(total,) int32 tokens that repeat somewhat like text.

    A lexicon of 30,000 words of 1 to 6 Zipf-distributed tokens, and 200,000 stock phrases of 2 to
    9 Zipf-distributed words; the stream draws Zipf-distributed words (70 %) and phrases (30 %)
    independently. Words give the short repeats, phrases the long ones.
    """
    rng = np.random.default_rng(seed)

    def zipf(size, count, exponent):
        weights = np.cumsum(np.arange(1, count + 1, dtype=float) ** -exponent)
        return np.searchsorted(weights, rng.random(size) * weights[-1])

    def concatenate(items, pool):
        lengths = np.array([len(p) for p in pool])[items]
        flat, begins = np.concatenate(pool), np.cumsum([0] + [len(p) for p in pool])[items]
        steps = np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths)
        return flat[np.repeat(begins, lengths) + steps]

    words = [zipf(size, VOCAB - 2, 0.8) + 2 for size in rng.integers(1, 7, 30_000)]
    sizes = rng.integers(2, 10, 200_000)
    items = zipf(sizes.sum(), len(words), 1.0)
    ends = np.cumsum(np.array([len(word) for word in words])[items])[np.cumsum(sizes) - 1]
    phrases = np.split(concatenate(items, words), ends[:-1])
    draws = total // 3 + 100
    items = np.where(
        rng.random(draws) < 0.7,
        zipf(draws, len(words), 1.0),
        len(words) + zipf(draws, len(phrases), 0.8),
    )
    return concatenate(items, words + phrases)[:total].astype(np.int32)


def per_window(tokens):
    """Longest hashed match of every target, windows of 32 targets, table updates in between."""
    tokens, mask = tokens.astype(np.int64), BUCKETS - 1
    context_tables = np.zeros((MAX_ORDER + 1, BUCKETS), dtype=np.uint32)
    pair_tables = np.zeros_like(context_tables)
    best = np.zeros((len(tokens), 3), dtype=np.int64)  # order, context count, pair count
    for begin in range(1, len(tokens), WINDOW):
        targets = np.arange(begin, min(begin + WINDOW, len(tokens)))
        rows = {}
        for order in range(MAX_ORDER, 1, -1):
            at = targets[targets >= order - 1]
            key = np.zeros(len(at), dtype=np.int64)
            for k in range(order - 1):
                key ^= tokens[at - order + 1 + k] * PRIMES[k % 7]
            pair = (key ^ tokens[at] * PRIMES[(order - 1) % 7]) & mask
            rows[order] = key & mask, pair
            context_count = context_tables[order, rows[order][0]]
            found = (context_count >= MIN_COUNT) & (best[at, 0] == 0)
            best[at[found], 0] = order
            best[at[found], 1] = context_count[found]
            best[at[found], 2] = pair_tables[order, pair[found]]
        for order, (context, pair) in rows.items():
            np.add.at(context_tables[order], context, 1)
            np.add.at(pair_tables[order], pair, 1)
    return best


def seconds(work, repeats, device):
    """Median wall-clock seconds of `repeats` runs after one that is not counted."""
    times = []
    for _ in range(repeats + 1):
        begin = time.perf_counter()
        work()
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - begin)
    return statistics.median(times[1:])


def count_all(tokens, **options):
    """Our counts of every order, thrown away."""
    for _ in golf.count_ngrams(tokens, MAX_ORDER, **options):
        pass


def load_tokens(path):
    """.npy, or a challenge shard: 256 int32 of header, then uint16 tokens."""
    tokens = np.load(path) if path.endswith(".npy") else np.fromfile(path, np.uint16)[512:]
    return tokens.astype(np.int32)


def bench(tokens, mode, options, slow, repeats):
    """Time our counts of a stream; prints the table's line."""
    device = tokens.device.type
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    speed = len(tokens) / seconds(lambda: count_all(tokens, **options), repeats, device)
    peak = peak_bytes(device)
    print(
        f"{device:8}{len(tokens):12,}  {mode:18}{speed / 1e6:12.2f}"
        f"{speed / slow:14.1f}{peak / 1e9:8.2f}",
        flush=True,
    )


def peak_bytes(device):
    """Most memory so far: of the device, on the CPU of the process."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def clock(device):
    """Seconds, when all that the device was given is done."""
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def made_up_columns(size):
    """NeuralColumns of so many targets, of no network."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.rand(golf.NEURAL_ROWS, size, dtype=torch.float64, generator=generator)
    rows[0] *= -6.0
    rows[1] *= 7.0
    rows[2:].clamp_(min=1e-6).div_(golf.HINTS).log_()
    return golf.NeuralColumns(rows[0], rows[1], rows[2:])


def digest(tensor):
    """SHA-256 of a tensor's values, whatever integers hold them."""
    tensor = tensor.cpu() if tensor.is_floating_point() else tensor.cpu().long()
    return hashlib.sha256(tensor.contiguous().numpy().tobytes()).hexdigest()


def measure(folder, path):
    """Print, as JSON, seconds of naming hints (before the neural pass), of columns and of mixing by
    a folder's train_gpt.py, peak bytes, and digests of the results of short streams. path: .npy of
    the tokens, int32."""
    spec = importlib.util.spec_from_file_location("measured", f"{folder}/train_gpt.py")
    other = sys.modules["measured"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(other)
    if getattr(other, "HINTS", 0) != golf.HINTS:
        raise SystemExit(f"{folder}: its mixer has other hints; time it by its own bench")
    device, cfg = "cuda" if torch.cuda.is_available() else "cpu", other.Config()
    tokens = torch.from_numpy(np.load(path)).to(device)
    size = len(tokens) - 1
    with golf.threads(1):  # the same bits in every process
        neural = golf.NeuralColumns(*(column.to(device) for column in made_up_columns(size)))
    times = [clock(device)]
    hints = other.stream_hints(tokens, (0, size), cfg)
    times.append(clock(device))
    ngram = other.stream_columns(tokens, (0, size), cfg, hints)
    times.append(clock(device))
    logp, _ = other.mix(neural, ngram, ngram.hint_number(tokens[1:]), cfg.mixer_chunk_tokens)
    times.append(clock(device))
    naming, columns, mixing = np.diff(times).tolist()
    result = {"hints": naming, "columns": columns, "mixing": mixing, "bytes": peak_bytes(device)}
    if size < COMPARED:
        compared = {"hints": hints, "level_key": ngram.level_key, "hint_key": ngram.hint_key}
        compared |= {"ratios": torch.cat(ngram.ratios), "network": neural.rows(), "logp": logp}
        result["digests"] = {name: digest(tensor) for name, tensor in compared.items()}
    print(json.dumps(result))


def measured(folder, path):
    """What `measure` finds, in a process of its own."""
    command = [sys.executable, __file__, "--measure", folder, path]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise SystemExit(f"measuring {folder}: exit status {done.returncode}, see above")
    return json.loads(done.stdout.splitlines()[-1])


def check_out(revision, folder):
    """Put a revision's train_gpt.py, and the tools that it may import, into a folder."""
    paths = ["train_gpt.py", "tools"]
    archive = subprocess.run(
        ["git", "archive", revision, *paths], cwd=ROOT, stdout=subprocess.PIPE, check=True
    )
    subprocess.run(["tar", "-x", "-C", folder], input=archive.stdout, check=True)
    return folder


def mixing_line(size, ours, baseline):
    """Print the table's line of a size; the ratio is of columns and mixing together."""
    cells = []
    for found in filter(None, (ours, baseline)):
        seconds = "".join(f"{found[name]:9.1f}" for name in ("hints", "columns", "mixing"))
        cells.append(f"{seconds}{found['bytes'] / 2**30:7.2f}")
    if baseline:
        seconds = [found["columns"] + found["mixing"] for found in (baseline, ours)]
        cells.append(f"{seconds[0] / seconds[1]:7.2f}")
    print(f"{size:11,}" + "  ".join(cells), flush=True)


def compare(ours, baseline):
    """SystemExit unless both sides' digests {name: digest} are the same."""
    differing = [name for name in ours if ours[name] != baseline[name]]
    if differing:
        raise SystemExit(f"not the same {', '.join(differing)}: nothing to compare")


def bench_mixing(stream, sizes, revision):
    """Columns and mixing of the first tokens of a stream, against another revision if given."""
    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/tokens.npy"
        baseline = check_out(revision, folder) if revision else None
        if baseline:
            np.save(path, stream[:COMPARED])
            compare(measured(ROOT, path)["digests"], measured(baseline, path)["digests"])
        print(
            "hints, columns and mixing, s, and peak memory, GiB: ours"
            + f", {revision}" * bool(baseline)
        )
        names = f"{'hints':>9}{'columns':>9}{'mixing':>9}{'GiB':>7}"
        print(f"{'tokens':>11}{names}" + f"  {names}  {'ratio':>7}" * bool(baseline))
        for size in sizes:
            np.save(path, stream[: int(1e6 * size)])
            ours = measured(ROOT, path)
            mixing_line(int(1e6 * size), ours, measured(baseline, path) if baseline else None)


class Launches(TorchDispatchMode):
    """Counts operations by name while it is entered."""

    def __init__(self):
        super().__init__()
        self.count = collections.Counter()

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        self.count[operation.__name__.split(".")[0]] += 1
        return operation(*args, **(kwargs or {}))


def launch_line(name, work, times=1):
    """Print the table's line of some work that is done so many times; its result."""
    with Launches() as seen:
        result = work()
    kernels = times * sum(n for op, n in seen.count.items() if op not in VIEWS | WAITS)
    waits = times * sum(seen.count[op] for op in WAITS)
    kernels += waits
    print(f"{name:18}{kernels:12,.0f}{waits:9,.0f}{LAUNCH_SECONDS * kernels:9.1f}", flush=True)
    return result


def bench_launches(stream):
    """Kernels, and waits of the host for a result, of what comes beside the network on CUDA."""
    tokens = torch.from_numpy(stream[: COMPARED + 1])
    size = len(tokens) - 1
    mixed = min(size, 8 * CHUNK)
    blocks = -(-FULL_TARGETS // golf.BLOCK)
    golf.CPU_BLOCK = -(-size // blocks)
    cfg = golf.Config()
    rule = golf.backoff_rules(cfg)["backoff_hashed"]

    def hashed():
        return golf.backoff_columns(rule.counted(tokens, (0, size), cfg), rule.match, cfg)

    print(f"{'work':18}{'kernels':>12}{'waits':>9}{'s':>9}   (at {1e6 * LAUNCH_SECONDS:.0f} us)")
    hints = launch_line("hints", lambda: golf.stream_hints(tokens, (0, size), cfg))
    ngram = launch_line("columns", lambda: golf.stream_columns(tokens, (0, size), cfg, hints))
    inputs = first_targets(mixed, made_up_columns(size), ngram, ngram.hint_number(tokens[1:]))
    launch_line("mixing", lambda: golf.mix(*inputs, CHUNK), FULL_TARGETS / mixed)
    launch_line("a hashed rule", hashed)


def bench_scans(stream, sizes):
    """Seconds of the audit's scans for one target near the end of a stream."""
    cfg = golf.Config()
    rules = {"exact": (golf.EXACT, cfg.mixer_max_order)}
    rules["hashed"] = (golf.backoff_rules(cfg)["backoff_hashed"], cfg.ngram_max_order)
    for size in sizes:
        tokens = torch.from_numpy(stream[: int(1e6 * size)])
        for name, (rule, order) in rules.items():
            began = clock("cpu")
            collections.deque(golf.scan_ngrams(tokens, len(tokens) - 2, rule, order, cfg), 0)
            taken = clock("cpu") - began
            print(f"a scan of {len(tokens):,} tokens, {name}, orders to {order}: {taken:.2f} s")


def arguments():
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--sizes", type=float, nargs="*", default=[0.5, 2, 8])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--tokens")
    parser.add_argument("--window-tokens", type=int, default=200_000)
    parser.add_argument("--mixing", type=float, nargs="*", default=[8])
    parser.add_argument("--baseline", metavar="REVISION")
    parser.add_argument("--launches", action="store_true")
    parser.add_argument("--scans", type=float, nargs="*", default=[])
    parser.add_argument("--measure", nargs=2, help=argparse.SUPPRESS)
    return parser.parse_args()


def bench_counts(stream, sizes, args):
    """Counts of every mode on {device: sizes}, against tables updated by window."""
    sample = stream[: args.window_tokens]
    slow = len(sample) / seconds(lambda: per_window(sample), 1, "cpu")
    print(f"per-window numpy tables, {len(sample)} tokens: {slow / 1e6:.4f} M tokens/s")
    modes = {
        "exact": {},
        "hashed": {"buckets": BUCKETS},
        "hashed, windows": {"buckets": BUCKETS, "granularity": 64, "first": 2048},
    }
    print(f"{'device':8}{'tokens':>12}  {'mode':18}{'M tokens/s':>12}{'x per-window':>14}{'GB':>8}")
    for device in sizes:
        for size in sizes[device]:
            tokens = torch.from_numpy(stream[: int(size * 1e6)]).to(device)
            for mode, options in modes.items():
                bench(tokens, mode, options, slow, args.repeats)


def main():
    args = arguments()
    if args.measure:
        measure(*args.measure)
        return
    sizes = {"cpu": args.sizes}
    if torch.cuda.is_available() and args.sizes:
        sizes["cuda"] = [*args.sizes, 62.0]
    longest = int(1e6 * max([0.5, *sum(sizes.values(), []), *args.mixing, *args.scans]))
    stream = load_tokens(args.tokens) if args.tokens else make_stream(longest)
    if args.sizes:
        bench_counts(stream, sizes, args)
    if args.mixing:
        bench_mixing(stream, args.mixing, args.baseline)
    if args.scans:
        bench_scans(stream, args.scans)
    if args.launches:  # last: it changes the size of blocks
        bench_launches(stream)


if __name__ == "__main__":
    main()
