"""Which ingredients earn their place? Small networks that are full, trained by each in turn.

    python bench/ingredients.py --data FOLDER                  all arms, two seeds; hours
    python bench/ingredients.py --data FOLDER --only old,golf --seeds 1337
    python bench/ingredients.py --data FOLDER --width 64 --steps 2400 --only golf
    python bench/ingredients.py --report                       the table of what is there
    python bench/ingredients.py --step-times --only old,golf   a step's time at full width

FOLDER has *_train_*.bin and *_val_*.bin of the challenge's 1,024 pieces, and tokenizer.model. What
a network of 27 M parameters is after 5.5 billion tokens, one of 0.15 M is after some millions:
full. There capacity, depth and schedules count as they do at full size, which a run of two minutes
at demo size cannot show. Every arm is a whole run of train_gpt.py: the same steps on a full
schedule, the network alone, scored before and after export in the same bytes, which bind as 16 MB
do at full size (BITS a parameter of the widest arm).

"plus" arms add one ingredient to `old`, the network of the submissions with our exporter; `whole`
has them all, "minus" arms all but one, and `golf` is the one of these that was chosen, without
LEFT_OUT; "golf_minus" arms have one less than that, "golf_decay" arms another weight decay. Runs
are kept in --out and never repeated; an interrupted day goes on where it was.
"""

import argparse
import concurrent.futures
import functools
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

import torch

from common import FULL_TOKENS, golf, in_turn, random_text
from training_step import OurStep

ROOT = Path(__file__).resolve().parent.parent
BITS = 3.9  # a parameter of the widest arm; 32.7 M parameters in 16,000,000 bytes less code: 3.88
WIDTH, STEPS = 32, 1200  # two cores train two of them in nine minutes

# The text and the score of every run; `proxy` adds its sizes.
RUN = {
    "SCALE": "demo",
    "NUM_HEADS": "4",
    "NUM_KV_HEADS": "2",
    "TRAIN_BATCH_TOKENS": "4096",
    "MAX_WALLCLOCK_SECONDS": "0",
    "VAL_LOSS_EVERY": "0",
    "VAL_TOKENS": "524288",
    "EVAL_STRIDE": "256",
    "NGRAM_ENABLED": "0",
    "SCORING": "neural",
    "AUDIT": "0",
    "PICTURE": "0",
    "COMPILE": "1",
}
# The network and schedule before any ingredient: the submissions'.
OLD = {name.upper(): str(value) for name, value in golf.SHARED.items()}
INGREDIENTS = {
    "mlp4": {"MLP_MULT": "4"},
    "schedule": {
        "MATRIX_LR": "0.022",
        "MUON_WD": "0.09",
        "TIED_EMBED_LR": "0.03",
        "EMBED_WD": "0.085",
        "SCALAR_LR": "0.02",
        "ADAM_WD": "0.02",
        "SCHEDULE_STEPS": "5000",
        "EMA_DECAY": "0.9965",
    },
    "loop": {"LOOP_PASSES": "3"},
    "lanes": {"LANES_FROM": "8"},
    "attngate": {"ATTN_GATE": "1"},
    "smear": {"CONTENT_SMEAR": "1"},
    "momentum": {"MUON_MOMENTUM": "0.97"},
    "rownorm": {"MUON_ROW_NORM": "1", "QK_GAIN_INIT": "5"},
}
LEFT_OUT = "schedule"  # of golf: worse in the whole; alone nothing is shown
LAYER_BANKS = ("qo_bank", "kv_bank", "mlp_up_bank", "mlp_down_bank")
NOISE = 0.05  # of a matrix's root mean square
DECAYS = ("0.02", "0.065", "0.09")  # beside golf's 0.04: from half of it to what the field took to


def without(*names: str) -> dict[str, str]:
    """The settings of all ingredients but these."""
    kept = (own for name, own in INGREDIENTS.items() if name not in names)
    return {key: value for own in kept for key, value in own.items()}


class Arm(NamedTuple):
    """What is trained: the arm that it is compared with, and its settings beside those of `old`."""

    base: str
    settings: dict[str, str]


def arms() -> dict[str, Arm]:
    """Every arm, by name."""
    golfs = without(LEFT_OUT)
    chosen = [name for name in INGREDIENTS if name != LEFT_OUT]
    decays = {f"golf_decay_{d}": golfs | {"MUON_WD": d, "EMBED_WD": d} for d in DECAYS}
    return (
        {"old": Arm("", {}), "golf": Arm("old", golfs), "whole": Arm("old", without())}
        | {f"plus_{name}": Arm("old", own) for name, own in INGREDIENTS.items()}
        | {f"minus_{name}": Arm("whole", without(name)) for name in chosen}
        | {f"golf_minus_{name}": Arm("golf", without(LEFT_OUT, name)) for name in chosen}
        | {name: Arm("golf", settings) for name, settings in decays.items()}
    )


def proxy(width: int = WIDTH, steps: int = STEPS) -> dict[str, str]:
    """The settings of `old` at a width, everything in proportion to 11 x 512."""
    sizes = {
        "MODEL_DIM": width,
        "ROPE_DIMS": width // 8,
        "BIGRAM_VOCAB_SIZE": 4 * width,
        "BIGRAM_DIM": width // 4,
        "VE_DIM": width // 4,
        "ITERATIONS": steps,
    }
    return RUN | OLD | {name: str(size) for name, size in sizes.items()}


def budget_bytes(base: dict[str, str]) -> int:
    """Bytes of code and artifact: BITS a parameter of the widest arm."""
    model = golf.GPT(golf.load_config(base | INGREDIENTS["mlp4"])[0], None)
    parameters = sum(p.numel() for p in model.parameters())
    return golf.code_bytes() + round(BITS * parameters / 8)


def shards(data: Path) -> dict[str, str]:
    """The variables of a folder of shards."""
    return {"DATA_PATH": str(data), "TOKENIZER_PATH": str(data / "tokenizer.model")}


def train(name: str, seed: int, settings: dict[str, str], out: Path, base: dict[str, str]) -> str:
    """Run an arm, unless it is there; a line about it."""
    own = {"RUN_ID": f"{name}-{seed}", "SEED": str(seed), "LOGS_PATH": str(out)}
    if (out / f"{own['RUN_ID']}.json").exists():
        return f"{own['RUN_ID']}: kept"
    for path in out.glob(f"{own['RUN_ID']}.*"):  # of a run that was killed
        path.unlink()
    budget = {"ARTIFACT_BYTES": str(budget_bytes(base))}
    env = os.environ | base | settings | budget | own
    env["OMP_NUM_THREADS"] = "1"
    done = subprocess.run([sys.executable, "train_gpt.py"], cwd=ROOT, env=env, capture_output=True)
    said = (done.stdout + done.stderr).decode().strip().splitlines()
    return f"{own['RUN_ID']}: {said[-1] if said else f'ended with {done.returncode}'}"


def figures(path: Path) -> dict[str, float]:
    """Of a run's record: bpb before and after export, parameters, bytes of the artifact."""
    record = json.loads(path.read_text())
    return {
        "before": record["validation"][-1]["val_bpb"],
        "after": record["result"][-1]["val_bpb"],
        "parameters": record["model"][-1]["parameters"],
        "bytes": record["artifact"][-1]["artifact_bytes"],
    }


def runs_of(name: str, out: Path) -> dict[int, dict[str, float]]:
    """{seed: figures} of an arm's runs."""
    found = {}
    for path in sorted(out.glob(f"{name}-*.json")):
        seed = path.stem.removeprefix(f"{name}-")
        if seed.isdigit():
            found[int(seed)] = figures(path)
    return found


def differences(runs: dict, base: dict) -> list[float]:
    """After export, of the seeds that both have: the arm's bpb less the base's."""
    return [runs[seed]["after"] - base[seed]["after"] for seed in sorted(runs.keys() & base.keys())]


def deviation(paired: list[list[float]]) -> float:
    """Standard deviation of one seed's difference, pooled over arms; nan if none has two seeds."""
    freedom = sum(len(own) - 1 for own in paired if own)
    squares = sum((d - statistics.mean(own)) ** 2 for own in paired for d in own)
    return math.sqrt(squares / freedom) if freedom else math.nan


def verdict(own: list[float], pooled: float) -> str:
    """Of an arm's differences: whether their mean is beyond two standard errors."""
    if not own:
        return ""
    error = pooled / math.sqrt(len(own))
    if not abs(statistics.mean(own)) > 2 * error:
        return "nothing shown"
    return "better" if statistics.mean(own) < 0 else "worse"


def row(name: str, runs: dict, own: list[float], pooled: float) -> str:
    """A line of the table."""
    mean = {
        key: statistics.mean(r[key] for r in runs.values()) for key in next(iter(runs.values()))
    }
    spread = max(r["after"] for r in runs.values()) - min(r["after"] for r in runs.values())
    cells = (
        name,
        f"{len(runs)}",
        f"{mean['parameters']:,.0f}",
        f"{mean['bytes']:,.0f}",
        f"{mean['before']:.4f}",
        f"{mean['after']:.4f}",
        f"{mean['after'] - mean['before']:.4f}",
        f"{spread:.4f}",
        arms()[name].base,
        f"{statistics.mean(own):+.4f}" if own else "",
        " ".join(f"{d:+.4f}" for d in own),
        verdict(own, pooled),
    )
    return f"| {' | '.join(cells)} |"


def report(out: Path) -> None:
    """Print the table of the runs that are there."""
    runs = {name: runs_of(name, out) for name in arms()}
    own = {name: differences(runs[name], runs.get(arm.base, {})) for name, arm in arms().items()}
    pooled = deviation(list(own.values()))
    print("| arm | seeds | parameters | bytes | before export | after | gap | spread ", end="")
    print(f"| against | difference | each seed | verdict |\n|{12 * '---|'}")
    for name in filter(runs.get, runs):
        print(row(name, runs[name], own[name], pooled))
    if not math.isnan(pooled):
        print(f"Standard deviation of one seed's difference, pooled over arms: {pooled:.4f}")


@torch.no_grad()
def divergence(model, other, tokens) -> float:
    """KL divergence, nats per token, of a network's distributions to another's."""
    own, others = (m.logits(tokens).double().log_softmax(-1) for m in (model, other))
    return float((own.exp() * (own - others)).sum(-1).mean())


@torch.no_grad()
def harm(model, clean, tokens, layer: int, seed: int = 0) -> float:
    """`divergence` of `clean` to an equal network with NOISE in a layer's matrices."""
    generator, kept = torch.Generator().manual_seed(seed), {}
    for name in LAYER_BANKS:
        bank = getattr(model, name)
        kept[name] = bank.clone()
        for matrix in bank[layer :: model.cfg.num_layers]:
            noise = torch.randn(matrix.shape, generator=generator)
            matrix.add_(NOISE * matrix.square().mean().sqrt() * noise)
    found = divergence(clean, model, tokens)
    for name, bank in kept.items():
        getattr(model, name).copy_(bank)
    return found


def sensitivities(
    name: str, out: Path, base: dict[str, str]
) -> tuple[float, int, list[float], list[float]]:
    """Of the first seed of an arm: divergence of the network as trained to the one that is
    shipped, and on how many tokens; what NOISE in each layer's matrices does, and what the
    export's sensitivities, mean square gradients of training text, say that it does."""
    path = min(out.glob(f"{name}-*.safetensors"))
    own = {"LOGS_PATH": tempfile.mkdtemp(), "COMPILE": "0"}
    cfg, _ = golf.load_config(base | arms()[name].settings | own)
    run = golf.Run(cfg)
    model, clean = (golf.build_model(cfg, run, golf.read_tensors(path)) for _ in range(2))
    found = golf.load_data(cfg, run)
    blob = path.with_suffix(f".int{cfg.matrix_bits}.ptz").read_bytes()
    _, shipped = golf.load_network(blob, found, cfg, run)
    seen = golf.observe(model, found, cfg, run, math.inf, golf.CALIBRATION_SEQUENCES)
    torch.distributed.destroy_process_group()
    told = torch.zeros(cfg.num_layers)
    for bank in LAYER_BANKS:
        squares = getattr(model, bank).detach().square().mean((1, 2))
        told += (seen.rows[bank].sum(1) * squares).view(-1, cfg.num_layers).sum(0)
    tokens = found.val[: 32 * cfg.eval_seq_len].view(32, -1)
    harms = [harm(model, clean, tokens, i) for i in range(cfg.num_layers)]
    return divergence(clean, shipped, tokens), tokens.numel(), harms, told.tolist()


def shares(values: list[float]) -> str:
    """Each value over their mean."""
    return " ".join(f"{value / statistics.mean(values):.2f}" for value in values)


def show_sensitivities(args: argparse.Namespace, base: dict[str, str]) -> None:
    """Print `sensitivities` of the arms asked for."""
    for name in args.only:
        shipped, count, measured, told = sensitivities(name, args.out, base)
        print(f"{name}: as trained to as shipped {shipped:.4f} nats per token, of {count}")
        print(f"{name}, by layer: measured {shares(measured)}; told {shares(told)}")


def train_all(args: argparse.Namespace, base: dict[str, str]) -> None:
    """Run the arms asked for, some at a time, and print the table."""
    with concurrent.futures.ThreadPoolExecutor(args.workers) as pool:
        jobs = [
            pool.submit(train, name, seed, arms()[name].settings, args.out, base)
            for seed in args.seeds
            for name in args.only
        ]
        for job in jobs:
            print(job.result(), flush=True)
    report(args.out)


class SavesItsInputs(torch.autograd.Function):
    """What FlashAttention keeps for its backward pass: queries, keys, values and output."""

    @staticmethod
    def forward(ctx, q, k, v):
        y = torch.empty_like(q)
        ctx.save_for_backward(q, k, v, y)
        return y


def saved_bytes(cfg, looping: bool) -> int:
    """Bytes that a micro-batch's forward pass keeps for the backward pass, operation by operation,
    in bfloat16 on no device at all; a compiled graph keeps less. Parameters are not counted."""
    with torch.device("meta"):
        model = golf.GPT(cfg, lambda q, k, v, causal: SavesItsInputs.apply(q, k, v), torch.bfloat16)
        shape = (golf.MOST_MICRO_BATCH_TOKENS // cfg.train_seq_len, cfg.train_seq_len)
        tokens = torch.zeros(shape, dtype=torch.int64)
    own = {id(p.untyped_storage()) for p in model.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(x):
        storage = x.untyped_storage()
        if id(storage) not in own:
            kept[id(storage)] = storage
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        model(tokens, tokens, looping)
    return sum(storage.nbytes() for storage in kept.values())


def step_times(names: list[str], args: argparse.Namespace) -> None:
    """Print how long a step of each arm takes at full width, in turn, on random tokens; and a
    training of as many steps in that of the first arm, where the loop is on from LOOP_FROM on."""
    cuda = torch.cuda.is_available()
    own = {"SCALE": "full", "LOGS_PATH": tempfile.mkdtemp(), "DEVICE": "cuda" if cuda else "cpu"}
    own["TRAIN_BATCH_TOKENS"] = str(FULL_TOKENS if cuda else 2048)
    if not cuda:  # a core takes seconds for one sequence, and minutes to compile these graphs
        own |= {"COMPUTE": "float32", "COMPILE": "0"}
    configs = {
        name: golf.load_config(os.environ | OLD | arms()[name].settings | own)[0] for name in names
    }
    first, work = configs[names[0]], {}
    run = golf.Run(first)
    data = random_text(own["LOGS_PATH"], first)
    for name, cfg in configs.items():
        step = OurStep(golf.build_model(cfg, run), data, cfg, run)
        for looping in (False, True)[: 1 + (cfg.loop_passes > 1)]:
            work[name, looping] = functools.partial(step, looping)
    seconds, _, count = in_turn("steps", run, work, args)
    torch.distributed.destroy_process_group()
    print(f"{first.train_batch_tokens} tokens a step, {run.device}, median of {count}, in turn")
    print(f"| arm | ms a step | with the loop | a training, of {names[0]}'s |\n|{4 * '---|'}")
    for name, cfg in configs.items():
        before = seconds[name, False]
        after = seconds.get((name, True), before)
        mean = cfg.loop_from * before + (1 - cfg.loop_from) * after
        ratio = mean / seconds[names[0], False]
        looped = f"{1000 * after:.0f}" if (name, True) in seconds else ""
        print(f"| {name} | {1000 * before:.0f} | {looped} | {ratio:.3f} |")


def full_size() -> None:
    """Print what the networks are at full size, by arithmetic."""
    free = 8 * (golf.Config.artifact_bytes - golf.code_bytes())
    shared = golf.replace(golf.Config(), **golf.SHARED)
    networks = {
        "shared": shared,
        "shared, MLP_MULT=4": golf.replace(shared, mlp_mult=4.0),
        "golf": golf.Config(),
        "golf, 4,096 pieces": golf.replace(golf.Config(), vocab_size=4096),
        "golf, 8,192 pieces": golf.replace(golf.Config(), vocab_size=8192),
    }
    print("| network | parameters | bits a parameter | GiB kept for backward | with the loop |")
    print("|---|---|---|---|---|")
    for name, cfg in networks.items():
        with torch.device("meta"):
            count = sum(p.numel() for p in golf.GPT(cfg, None).parameters())
        kept = [f"{saved_bytes(cfg, looping) / 2**30:.1f}" for looping in (False, True)]
        print(f"| {name} | {count:,} | {free / count:.2f} | {kept[0]} | {kept[1]} |")


def arguments() -> argparse.Namespace:
    """The command line's; SystemExit for what does not exist."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, help="folder of shards and their tokenizer.model")
    parser.add_argument("--out", type=Path, help="of runs; default: logs/ingredients-<width>")
    parser.add_argument("--width", type=int, default=WIDTH, help="a multiple of 16")
    parser.add_argument("--steps", type=int, default=STEPS, help="of a training")
    parser.add_argument("--only", default=",".join(arms()), help="arms, by name, between commas")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1337, 42])
    parser.add_argument("--workers", type=int, default=2, help="runs at a time, a core each")
    parser.add_argument("--report", action="store_true", help="only print the table")
    parser.add_argument("--sensitivities", action="store_true", help="only of --only's, by layer")
    parser.add_argument("--step-times", action="store_true", help="only of --only's, full width")
    parser.add_argument("--repeats", type=int, default=9, help="of --step-times, at most")
    parser.add_argument("--seconds", type=float, default=300, help="of --step-times, about")
    parser.add_argument("--full-size", action="store_true", help="parameters, bits and memory")
    args = parser.parse_args()
    args.only = args.only.split(",")
    args.out = args.out or ROOT / f"logs/ingredients-{args.width}"
    for name in args.only:
        if name not in arms():
            parser.error(f"--only: there is no {name}; arms are {', '.join(arms())}")
    needs_text = not (args.report or args.step_times or args.full_size)
    if needs_text and not (args.data and (args.data / "tokenizer.model").exists()):
        parser.error("--data: a folder of shards with tokenizer.model is needed")
    return args


def main() -> None:
    """Run the arms that are asked for and print the table, or what else is asked for."""
    args = arguments()
    if args.full_size:
        full_size()
    elif args.step_times:
        step_times(args.only, args)
    elif args.report:
        report(args.out)
    else:
        base = proxy(args.width, args.steps) | shards(args.data)
        (show_sensitivities if args.sensitivities else train_all)(args, base)


if __name__ == "__main__":
    main()
