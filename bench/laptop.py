"""What does a laptop gain by its cores? Whole default runs in turn, one process against the choice.

    python bench/laptop.py [--runs 3] [--choices]

"one" is one process of all threads without compilation, which the default was before it chose;
"chosen" is what the program chooses by itself. Both train for the same seconds on the same text,
into a folder of this bench's, so that the first of the chosen runs compiles and the others find its
graphs. Prints each run's steps, scores and seconds by stage, then medians and their ratios.

--choices scores one artifact under every choice of processes and compilation, twice each, on
32,768 targets, and compares scores and bits.
"""

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ONE = {"RANKS": "1", "COMPILE": "0"}
CHOICES = {
    "one process, all threads": ONE,
    "a process a core": {"COMPILE": "0"},
    "one process, compiled": {"RANKS": "1", "COMPILE": "1"},
    "a process a core, compiled": {"COMPILE": "1"},
}
# What would choose for the program.
DECIDING = {"OMP_NUM_THREADS", "TORCHINDUCTOR_CACHE_DIR", "RANK", "WORLD_SIZE", "RANKS", "COMPILE"}
COLUMNS = ("steps", "neural", "val_bpb", "warmup", "train", "eval", "audit", "whole", "checks")


def run(folder: Path, name: str, settings: dict[str, str]) -> dict:
    """Figures of a whole run: steps, scores in bits per byte, seconds by stage, PASS lines."""
    own = {"LOGS_PATH": str(folder), "PREPARED_PATH": str(folder / "data"), "RUN_ID": name}
    env = {k: v for k, v in os.environ.items() if k not in DECIDING} | settings | own
    started = time.perf_counter()
    done = subprocess.run(
        [sys.executable, str(ROOT / "train_gpt.py")], env=env, text=True, capture_output=True
    )
    whole = time.perf_counter() - started
    if done.returncode:
        raise SystemExit(f"{name}: {done.stderr.strip() or done.stdout[-300:]}")
    record = json.loads((folder / f"{name}.json").read_text())
    trained = (record.get("trained") or [{"steps": 0, "train_seconds": 0.0}])[-1]
    rows = {row["scoring"]: row for row in record["result"]}
    return {
        "steps": trained["steps"],
        "neural": rows["neural"]["val_bpb"],
        "val_bpb": record["final"][-1]["val_bpb"],
        "warmup": sum(row["seconds"] for row in record.get("warmup", [])),
        "train": trained["train_seconds"],
        "eval": record["headline"][-1]["seconds"],
        "audit": sum(row["seconds"] for row in record["audit"]),
        "whole": whole,
        "checks": sum(row["verdict"] == "PASS" for row in record["audit"]),
        "said": re.search(r"computing with .*", done.stdout)[0],
    }


def show(name: str, figures: dict) -> None:
    """A line of a run's figures."""
    cells = [f"{k} {v:.8f}" if "bpb" in k else f"{k} {v:.4g}" for k, v in figures.items()]
    print(f"{name:28} " + "  ".join(cells), flush=True)


def compare(folder: Path, count: int) -> None:
    """Default runs in turn; medians and ratios."""
    found: dict[str, list[dict]] = {"one": [], "chosen": []}
    for number in range(count):
        for name, runs in found.items():
            figures = run(folder, f"{name}{number}", ONE if name == "one" else {})
            if not number:
                print(f"{name}: {figures['said']}")
            runs.append(figures)
            show(f"{name} {number}", {key: figures[key] for key in COLUMNS})
    for key in COLUMNS:
        one, chosen = (statistics.median(f[key] for f in runs) for runs in found.values())
        ratio = f"  ratio {chosen / one:.3f}" if one else ""
        print(f"median {key:8} one {one:.6g}  chosen {chosen:.6g}{ratio}")


def choices(folder: Path) -> None:
    """One artifact's score under every choice, twice: equal to 1e-6, and to the bit for one."""
    few = {"VAL_TOKENS": "32768"}
    run(folder, "made", few | {"MAX_WALLCLOCK_SECONDS": "30", "COMPILE": "0"})
    artifact = few | {"LOAD_ARTIFACT": str(folder / "made.int6.ptz")}
    scores = {}
    for name, settings in CHOICES.items():
        twice = [run(folder, f"{name} {i}".replace(",", ""), artifact | settings) for i in "ab"]
        scores[name] = twice[0]["val_bpb"]
        same = "same bits" if twice[0]["val_bpb"] == twice[1]["val_bpb"] else "OTHER BITS"
        show(name, {key: twice[0][key] for key in ("val_bpb", "eval", "audit", "checks")})
        print(f"{'':28} {same} the second time")
    spread = max(scores.values()) - min(scores.values())
    print(f"largest difference {spread:.2g} bits per byte: {'equal' if spread < 1e-6 else 'OTHER'}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=3, help="of each")
    parser.add_argument("--choices", action="store_true", help="one artifact under every choice")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if args.choices:
            choices(Path(folder))
        else:
            compare(Path(folder), args.runs)


if __name__ == "__main__":
    main()
