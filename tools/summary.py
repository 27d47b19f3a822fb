"""Several runs as one result: table of seeds, statistics, submission.json, records folder.

    python tools/summary.py logs/a.json logs/b.json logs/c.json
        --baseline 1.1147[,1.1150,...]   one-sided t-test that the mean val_bpb is lower (scipy)
        --margin 0.005                   ... by more than so much
        --submission FILE                the challenge's submission.json over all seeds
        --record DIR                     the challenge's records folder, which runs from there

Runs are seeds of one configuration, or they are refused: every setting but those of MAY_DIFFER is
the same, and so are code, machine and corpus. Bad input ends in one line and exit status 2;
nothing half-written is left.
"""

import argparse
import hashlib
import json
import os
import shutil
import statistics
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# Settings that seeds of one configuration need not share. All others change a score, or may.
MAY_DIFFER = {
    *("seed", "run_id", "author", "github_id"),  # whose run it is
    # Where its files are: `corpus` says by hashes and sizes what was in them.
    *("logs_path", "data_path", "tokenizer_path", "text_files", "prepared_path"),
    *("load_weights", "load_artifact", "resume", "resume_eval"),  # the stage it went on from
    # What it says and saves on the way, and how it ends; the table shows each run's audit.
    *("train_log_every", "val_loss_every", "checkpoint_seconds", "dist_timeout_seconds"),
    *("debug", "audit"),
}
MACHINE = ("code_sha256", "world_size", "gpu", "torch")  # of `facts`, always the same
CORPUS = ("vocabulary_sha256", "val_targets")  # of `corpus`, always the same
CORPUS_IF_KNOWN = ("sha256", "val_sha256", "train_tokens")  # the same where two runs know them
SHIPPED = ("train_gpt.py", "requirements.txt")
SEED_KEYS = (  # of the table's columns, those that submission.json gives for each seed
    "seed",
    "val_bpb",
    "val_loss",
    "steps",
    "train_seconds",
    "eval_seconds",
    "total_bytes",
    "audit",
)


class SummaryError(Exception):
    """Bad input: one line for the user."""


def read_run(path: Path) -> dict:
    """The record of a finished run, with its path; SummaryError for any other file."""
    try:
        record = json.loads(path.read_text("utf-8"))
        final, facts = record["final"][-1], record["facts"]
        needed = (
            final["val_bpb"],
            final["seed"],
            record["config"]["run_id"],
            facts["revision"],
            facts["code_sha256"],
            record["corpus"]["vocabulary_sha256"],
        )
        if None in needed:
            raise KeyError("a value is missing")
    except OSError as error:
        raise SummaryError(f"{path}: {error.strerror}") from None
    except ValueError:
        raise SummaryError(f"{path}: not JSON") from None
    except (KeyError, IndexError, TypeError):
        raise SummaryError(f"{path}: not the record of a finished run") from None
    return record | dict(path=path)


def compared(run: dict) -> dict:
    """{name: value} of what seeds of one configuration share; None: the run does not know it."""
    config, facts, corpus = run["config"], run["facts"], run["corpus"]
    shared = {key.upper(): config[key] for key in config.keys() - MAY_DIFFER}
    shared |= {key: facts.get(key) for key in MACHINE}
    shared |= {key: corpus.get(key) for key in CORPUS}
    shared |= {key: corpus.get(key) or None for key in CORPUS_IF_KNOWN}
    return shared | {"scoring": run["final"][-1]["scoring"]}


def difference(name: str, values: dict[str, list]) -> str:
    """Text of one thing that differs; values: {value as text: paths of the runs that have it}."""
    parts = (f"{value} in {', '.join(map(str, paths))}" for value, paths in values.items())
    return f"{name} is " + " and ".join(parts)


def differences(runs: list[dict]) -> list[str]:
    """Text of each thing that differs between runs which ought to be one configuration."""
    shared = {run["path"]: compared(run) for run in runs}
    found = []
    for name in sorted(set().union(*shared.values())):
        values: dict[str, list] = {}
        for path, facts in shared.items():
            if facts.get(name) is not None or name not in CORPUS_IF_KNOWN:
                values.setdefault(str(facts.get(name, "not set")), []).append(path)
        if len(values) > 1:
            found.append(difference(name, values))
    return found


def check_alike(runs: list[dict]) -> None:
    """SummaryError if the runs are not one configuration under different seeds."""
    found = differences(runs)
    if found:
        raise SummaryError(
            f"not one configuration: {'; '.join(found)} (--mixed shows the table all the same)"
        )
    seeds = [run["final"][-1]["seed"] for run in runs]
    for run, seed in zip(runs, seeds, strict=True):
        if seeds.count(seed) > 1:
            raise SummaryError(f"{run['path']}: seed {seed} appears {seeds.count(seed)} times")


def verdict(audit: list[dict]) -> str:
    """What the table shows of a run's audit."""
    failed = [check["name"] for check in audit if check["verdict"] != "PASS"]
    if failed:
        return ",".join(failed) + " FAIL"
    return "PASS" if audit else "none"


def row(run: dict) -> dict:
    """What the table shows of a run."""
    final, trained = run["final"][-1], (run.get("trained") or [{}])[-1]
    used = {budget["name"]: budget["used"] for budget in run["budget"]}
    return dict(
        run_id=run["path"].stem,
        seed=final["seed"],
        val_bpb=final["val_bpb"],
        val_loss=final["val_loss"],
        scoring=final["scoring"],
        normalized=final["normalized"],
        audit=verdict(run.get("audit", [])),
        steps=trained.get("steps"),
        train_seconds=used.get("train_seconds"),
        eval_seconds=used.get("eval_seconds"),
        total_bytes=final["total_bytes"],
    )


def table(rows: list[dict]) -> str:
    """Aligned text, and mean and sample standard deviation of the scores."""

    def show(key, value):
        return f"{value:.8f}" if key in ("val_bpb", "val_loss") else str(value)

    lines = [list(rows[0])] + [[show(k, v) for k, v in r.items()] for r in rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    text = []
    for line in lines:
        cells = (cell.ljust(width) for cell, width in zip(line, widths, strict=True))
        text.append("  ".join(cells).rstrip())
    for key in ("val_bpb", "val_loss"):
        values = [r[key] for r in rows]
        spread = f" std {statistics.stdev(values):.8f}" if len(values) > 1 else ""
        text.append(f"{key} mean {statistics.mean(values):.8f}{spread} over {len(values)} runs")
    return "\n".join([*text, f"largest total_bytes {max(r['total_bytes'] for r in rows)}"])


def p_value(values: list[float], baseline: list[float], margin: float) -> float:
    """One-sided p of "the mean is lower than the baseline by more than `margin`": a one-sample
    t-test against one number, Welch's against several. Small: it is."""
    try:
        from scipy import stats
    except ImportError:
        raise SummaryError("--baseline needs scipy: pip install -r requirements-dev.txt") from None
    if len(values) < 2:
        raise SummaryError("--baseline needs at least two runs")
    shifted = [x - margin for x in baseline]
    if len(shifted) == 1:
        return float(stats.ttest_1samp(values, shifted[0], alternative="less").pvalue)
    return float(stats.ttest_ind(values, shifted, equal_var=False, alternative="less").pvalue)


def submission(runs: list[dict], rows: list[dict], test: dict) -> dict:
    """The challenge's submission.json over all seeds."""
    config, facts = runs[0]["config"], runs[0]["facts"]
    bpb, loss = ([r[key] for r in rows] for key in ("val_bpb", "val_loss"))
    out = {key: config[key] for key in ("author", "github_id", "recipe", "scale")}
    return out | dict(
        val_bpb=statistics.mean(bpb),
        val_loss=statistics.mean(loss),
        seeds=[{key: r[key] for key in SEED_KEYS} for r in rows],
        val_bpb_std=statistics.stdev(bpb) if len(bpb) > 1 else None,
        scoring=rows[0]["scoring"],
        normalized=all(r["normalized"] == "yes" for r in rows),
        bytes_total=max(r["total_bytes"] for r in rows),
        bytes_code=facts.get("code_bytes"),
        world_size=facts["world_size"],
        gpu=facts["gpu"],
        torch=facts["torch"],
        corpus=runs[0]["corpus"],
        revision=facts["revision"],
        **test,
    )


def write_new(path: Path, text: str, force: bool) -> None:
    """Write under a temporary name, then rename; SummaryError if the file exists."""
    if path.exists() and not force:
        raise SummaryError(f"{path} exists; --force replaces it")
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, "utf-8")
    os.replace(temporary, path)


def make_record(folder: Path, runs: list[dict], rows: list[dict], result: dict) -> None:
    """README, submission.json, logs of each seed, and the code that made them."""
    if folder.exists():
        raise SummaryError(f"{folder} exists; give a new folder")
    code = hashlib.sha256((ROOT / "train_gpt.py").read_bytes()).hexdigest()
    for run in runs:
        if run["facts"]["code_sha256"] != code:
            raise SummaryError(
                f"{run['path']}: made by another train_gpt.py than {ROOT}'s; check "
                f"out revision {run['facts']['revision']}"
            )
        if not run["path"].with_suffix(".txt").exists():
            raise SummaryError(f"{run['path'].with_suffix('.txt')}: the run's log is missing")
    folder.parent.mkdir(parents=True, exist_ok=True)
    made = Path(tempfile.mkdtemp(prefix=folder.name, dir=folder.parent))
    try:
        for name in SHIPPED:
            shutil.copy(ROOT / name, made / name)
        for run, own in zip(runs, rows, strict=True):
            shutil.copy(run["path"].with_suffix(".txt"), made / f"train_seed{own['seed']}.log")
        (made / "submission.json").write_text(json.dumps(result, indent=1) + "\n", "utf-8")
        (made / "README.md").write_text(readme(runs, rows), "utf-8")
        made.chmod(0o755)
        os.replace(made, folder)
    except OSError:
        shutil.rmtree(made, ignore_errors=True)
        raise


def readme(runs: list[dict], rows: list[dict]) -> str:
    """The record's README: what was run, on what, and what came out."""
    config, facts, corpus = runs[0]["config"], runs[0]["facts"], runs[0]["corpus"]
    keys = list(rows[0])
    lines = ["| " + " | ".join(keys) + " |", "|" + "---|" * len(keys)]
    lines += ["| " + " | ".join(str(r[k]) for k in keys) + " |" for r in rows]
    hardware = f"{facts['world_size']}x {facts['gpu']}"
    if facts["gpu"] == "none":
        hardware = f"{facts['cores']} CPU cores, {facts['machine']}"
    return "\n".join(
        [
            f"# {config['recipe']} ({config['scale']}), {len(rows)} seeds",
            "",
            f"Mean val_bpb {statistics.mean(r['val_bpb'] for r in rows):.8f}, scored by "
            f"{rows[0]['scoring']} (normalized: {rows[0]['normalized']}).",
            "",
            *lines,
            "",
            f"Run on {hardware}, torch {facts['torch']}, revision {facts['revision']};",
            f"validation: {corpus['val_targets']} targets of {corpus['source']}.",
            "",
            "    pip install -r requirements.txt",
            f"    RECIPE={config['recipe']} SEED=<seed> torchrun --standalone "
            f"--nproc_per_node={facts['world_size']} train_gpt.py",
            "",
            "`train_seed<seed>.log` is each run's log: configuration, budgets, audit, score table.",
            "",
        ]
    )


def run(options) -> None:
    """Everything the options ask for."""
    runs = [read_run(Path(path)) for path in options.runs]
    if not options.mixed:
        check_alike(runs)
    elif options.submission or options.record or options.baseline:
        raise SummaryError("--mixed shows the table only")
    rows = [row(r) for r in runs]
    print(table(rows))
    test = {}
    if options.baseline:
        baseline = [float(x) for x in options.baseline.split(",")]
        p = p_value([r["val_bpb"] for r in rows], baseline, options.margin)
        test = dict(baseline=baseline, margin=options.margin, p_value=p)
        mean = statistics.mean(baseline)
        print(f"lower than {mean:.6f} by more than {options.margin}: p = {p:.3g}")
    result = submission(runs, rows, test)
    if options.submission:
        write_new(Path(options.submission), json.dumps(result, indent=1) + "\n", options.force)
    if options.record:
        make_record(Path(options.record), runs, rows, result)


def main() -> int:
    """The command line; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+", help="logs/<run_id>.json of finished runs")
    parser.add_argument("--baseline", default="", help="val_bpb to beat; one number or several")
    parser.add_argument("--margin", type=float, default=0.0, help="bits per byte to beat it by")
    parser.add_argument("--submission", default="", help="file to write")
    parser.add_argument("--record", default="", help="folder to make")
    parser.add_argument("--mixed", action="store_true", help="table of runs that are not alike")
    parser.add_argument("--force", action="store_true", help="replace an existing submission")
    try:
        run(parser.parse_args())
        return 0
    except (SummaryError, OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
