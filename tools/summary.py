"""Several runs as one result: table of seeds, statistics, submission.json, records folder.

    python tools/summary.py logs/s*.json
        --baseline 1.1147[,1.1150,...]   one-sided t-test that the mean val_bpb is lower ...
        --margin 0.005                   ... by more than so many nats per token (the challenge's)
        --submission FILE                the challenge's submission.json over all seeds
        --record DIR                     the challenge's records folder, which runs from there
        --any-verdict                    these three of runs whose verdict is not VALID, and say so
        --untrained                      these three of runs that trained nothing, and say so
        --mixed                          the table alone, of runs that are not alike

Files that are no record of a finished run (`*.submission.json`) are skipped, each with a line on
stderr. Runs are seeds of one configuration, or they are refused: every setting but those of
MAY_DIFFER is the same, and so are code, machine and corpus. Bad input ends in an error, whose first
line says what to do, and exit status 2; nothing half-written is left.
"""

import argparse
import dataclasses
import hashlib
import importlib
import json
import math
import os
import shlex
import shutil
import statistics
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
# Settings that seeds of one configuration need not share. All others change a score, or may.
MAY_DIFFER = {
    *("seed", "run_id", "author", "github_id"),  # whose run it is
    # Where its files are: `corpus` says by hashes and sizes what was in them.
    *("logs_path", "data_path", "tokenizer_path", "text_files", "prepared_path"),
    *("load_weights", "load_artifact", "resume"),  # the stage it went on from
    # What it says and saves on the way, and how it ends; the table shows each run's audit.
    *("train_log_every", "val_loss_every", "checkpoint_seconds", "dist_timeout_seconds"),
    *("debug", "audit", "picture", "ranks"),  # world_size is of MACHINE
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
    "verdict",
)
NEEDED = {  # of a finished run's record; what else is read may be absent
    "config": ("recipe", "scale", "run_id", "author", "github_id"),
    "facts": ("revision", "code_sha256", "world_size", "gpu", "torch", "cores", "machine"),
    "corpus": ("vocabulary_sha256", "val_targets", "source"),
    "final": ("seed", "val_bpb", "val_loss", "scoring", "normalized", "total_bytes"),
}
# No part of the command that makes a run again: the name follows from the seed, and a training that
# was resumed is the same as one that was not.
NOT_IN_COMMAND = {"run_id", "resume"}
AUTHORS = {"AUTHOR": "author", "GITHUB_ID": "github_id"}
# openai/parameter-golf, README.md, "Submission Process", 1: new records "must beat the existing
# SOTA by at least 0.005 nats" and "show at `p < 0.01`" that they do. Nats a token, as val_loss is.
RECORD_NATS, RECORD_P = 0.005, 0.01
UNTRAINED = "**Not trained under a cap** in these runs: nothing shows how the networks were made."


class SummaryError(Exception):
    """Bad input: one line for the user."""


def needed_module(name: str):
    """The module, ours or a package's; SummaryError if it, or what it imports, is not installed."""
    if str(ROOT) not in sys.path:
        sys.path.insert(0, str(ROOT))
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise SummaryError(f"{error}: pip install -r {ROOT / 'requirements.txt'}") from None


def why_no_run(record) -> str:
    """Why what a JSON file holds is no finished run, "" if it is one."""
    if not isinstance(record, dict):
        return "not a run's record"
    if not all(isinstance(record.get(part), dict) for part in ("config", "facts")):
        return "not a run's record"
    return "" if record.get("final") else "an unfinished run, without a score"


def lacking(record: dict) -> list[str]:
    """Names, as part.key, of what a finished run's record has and this one has not."""
    final = record["final"]
    last = final[-1] if isinstance(final, list) else None
    parts = {part: record.get(part) for part in NEEDED} | {"final": last}
    known = {part: x if isinstance(x, dict) else {} for part, x in parts.items()}
    return [f"{x}.{key}" for x, keys in NEEDED.items() for key in keys if known[x].get(key) is None]


def read_run(path: Path) -> dict | None:
    """The record of a finished run, with its path. None, and a line on stderr, for other JSON;
    SummaryError for what is none, cannot be read, or is a record with gaps: a run that somebody
    counts on must not drop out of a mean unseen."""
    try:
        record = json.loads(path.read_text("utf-8"))
    except OSError as error:
        raise SummaryError(f"{path}: {error.strerror}") from None
    except ValueError:
        raise SummaryError(f"{path}: not JSON") from None
    reason = why_no_run(record)
    if reason:
        print(f"skipped {path}: {reason}", file=sys.stderr)
        return None
    missing = lacking(record)
    if missing:
        raise SummaryError(f"{path}: a run's record without {', '.join(missing)}; leave it out")
    return record | dict(path=path)


def read_runs(paths: list[str]) -> list[dict]:
    """The finished runs among the files; SummaryError if there is none."""
    runs = [run for run in map(read_run, map(Path, paths)) if run]
    if not runs:
        raise SummaryError("no finished run: give logs/<run_id>.json of runs with a final line")
    return runs


def compared(run: dict) -> dict:
    """{name: value} of what seeds of one configuration share; None: the run does not know it."""
    config, facts, corpus = run["config"], run["facts"], run["corpus"]
    shared = {key.upper(): config[key] for key in config.keys() - MAY_DIFFER}
    shared |= {key: facts.get(key) for key in MACHINE}
    shared |= {key: corpus.get(key) for key in CORPUS}
    shared |= {key: corpus.get(key) or None for key in CORPUS_IF_KNOWN}
    return shared | {"scoring": run["final"][-1]["scoring"]}


def differences(runs: list[dict]) -> dict[str, str]:
    """{name: which value in which runs} of whatever differs, though it is one configuration's."""
    shared = {run["path"]: compared(run) for run in runs}
    found = {}
    for name in sorted(set().union(*shared.values())):
        values: dict[str, list[str]] = {}
        for path, facts in shared.items():
            if facts.get(name) is not None or name not in CORPUS_IF_KNOWN:
                values.setdefault(str(facts.get(name, "not set")), []).append(str(path))
        if len(values) > 1:
            parts = (f"{value or 'empty'} in {', '.join(paths)}" for value, paths in values.items())
            found[name] = " and ".join(parts)
    return found


def check_alike(runs: list[dict]) -> None:
    """SummaryError if the runs are not one configuration under different seeds."""
    found = differences(runs)
    if found:
        verb = "differs" if len(found) == 1 else "differ"
        lines = (f"  {name} is {values}" for name, values in found.items())
        raise SummaryError(
            f"not one configuration: {', '.join(found)} {verb} "
            "(--mixed shows the table all the same)\n" + "\n".join(lines)
        )
    seeds = [run["final"][-1]["seed"] for run in runs]
    for run, seed in zip(runs, seeds, strict=True):
        if seeds.count(seed) > 1:
            raise SummaryError(f"{run['path']}: seed {seed} appears {seeds.count(seed)} times")


def audit_text(audit: list[dict]) -> str:
    """What the table shows of a run's audit."""
    failed = [check["name"] for check in audit if check["verdict"] != "PASS"]
    if failed:
        return ",".join(failed) + " FAIL"
    return "PASS" if audit else "none"


def verdict_text(run: dict) -> str:
    """The verdict in a line, as the run's log has it: VALID, or every fault with its figure."""
    if not run.get("verdict"):
        return "NO VERDICT (the run's train_gpt.py gave none)"
    faults = (f"{fault} ({figure})" for fault, figure in run["verdict"][-1].items())
    return "; ".join(faults) or "VALID"


def invalid(verdicts: dict) -> dict[str, list]:
    """{verdict: the keys that have it} of those that are not VALID. verdicts: {key: verdict}."""
    found: dict[str, list] = {}
    for key, text in verdicts.items():
        if text != "VALID":
            found.setdefault(text, []).append(key)
    return found


def verdict_of_all(rows: list[dict]) -> str:
    """VALID if every run is, else each other verdict with its seeds."""
    faults = invalid({r["seed"]: r["verdict"] for r in rows}).items()
    told = (f"{text} of seed {', '.join(map(str, seeds))}" for text, seeds in faults)
    return " and ".join(told) or "VALID"


def check_verdicts(runs: list[dict]) -> None:
    """SummaryError for runs that are not VALID. Whatever the fault, such a score is no record's:
    not proved, no length of a message, over a budget, of a training that nobody can repeat, or of
    a text so short that one document decides it."""
    faults = invalid({str(run["path"]): verdict_text(run) for run in runs})
    if faults:
        told = " and ".join(f"{text} in {', '.join(paths)}" for text, paths in faults.items())
        raise SummaryError(f"not VALID: {told} (--any-verdict goes on, and the files say so)")


def untrained(runs: list[dict]) -> list[str]:
    """Paths of runs that trained nothing, or under no cap: of a network that was loaded nobody
    knows the time, the text or the seed."""
    return [
        str(run["path"])
        for run in runs
        if not run.get("trained") or not run["config"].get("max_wallclock_seconds")
    ]


def check_trained(runs: list[dict]) -> None:
    """SummaryError for runs that did not train under a cap."""
    paths = untrained(runs)
    if paths:
        raise SummaryError(
            f"not trained under a cap in the run itself: {', '.join(paths)} (--untrained goes on, "
            "and the files say so)"
        )


def check_networks(runs: list[dict]) -> None:
    """SummaryError for one network under two seeds: its scores are no two samples."""
    networks: dict[str, str] = {}
    for run in runs:
        network, path = run.get("network_sha256"), str(run["path"])
        if network and networks.setdefault(network, path) != path:
            raise SummaryError(f"{path}: the same network as {networks[network]}, not another seed")


def warnings_of(runs: list[dict]) -> list[str]:
    """The runs' own warnings, each once: what would mislead who reads the score."""
    return [
        f"warning: {text}" for text in dict.fromkeys(w for r in runs for w in r.get("warnings", []))
    ]


def rounded(seconds: float | None) -> float | None:
    """Seconds to the millisecond; None stays."""
    return seconds if seconds is None else round(seconds, 3)


def row(run: dict) -> dict:
    """What the table shows of a run."""
    final, trained = run["final"][-1], (run.get("trained") or [{}])[-1]
    used = {budget["name"]: budget["used"] for budget in run.get("budget", [])}
    return dict(
        run_id=run["path"].stem,
        seed=final["seed"],
        val_bpb=final["val_bpb"],
        val_loss=final["val_loss"],
        scoring=final["scoring"],
        normalized=final["normalized"],
        audit=audit_text(run.get("audit", [])),
        steps=trained.get("steps"),
        train_seconds=rounded(trained.get("train_seconds")),
        eval_seconds=rounded(used.get("eval_seconds")),
        total_bytes=final["total_bytes"],
        verdict=verdict_text(run),
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


class Test(NamedTuple):
    """A one-sided t-test; small p: the mean is lower than the baseline's by more than the margin.

    name: of the test. n: number of scores, of ours and, of Welch's, of the baseline's. t, df:
    statistic and degrees of freedom. p: probability of a t so low if the gain is the margin.
    """

    name: str
    n: list[int]
    t: float
    df: float
    p: float


def t_tail(t: float, df: float) -> float:
    """P(T <= t) of Student's t with df > 0 degrees of freedom, by the incomplete beta function."""
    mpmath = needed_module("mpmath")
    tails = float(mpmath.betainc(df / 2, 0.5, 0, df / (df + t * t), regularized=True))
    return tails / 2 if t < 0 else 1 - tails / 2


def t_test(values: list[float], baseline: list[float], margin: float) -> Test:
    """Is the mean of `values` (n,) lower than that of `baseline` (m,) by more than `margin`?

    All are in one unit. m = 1: the baseline is taken as exact, a one-sample test; else Welch's,
    which lets the variances differ. SummaryError for n < 2 and for scores that do not vary.
    """
    n, m = len(values), len(baseline)
    if n < 2:
        raise SummaryError("--baseline needs at least two runs")
    own = statistics.variance(values) / n
    other = statistics.variance(baseline) / m if m > 1 else 0.0
    error = own + other
    if not error:
        raise SummaryError("--baseline: scores that do not vary have no t-test")
    gain = statistics.mean(baseline) - statistics.mean(values)
    t = (margin - gain) / math.sqrt(error)
    df = 1 / ((own / error) ** 2 / (n - 1) + (other / error) ** 2 / max(m - 1, 1))
    if m == 1:
        return Test("one-sided one-sample t-test", [n], t, n - 1, t_tail(t, n - 1))
    return Test("one-sided Welch t-test", [n, m], t, df, t_tail(t, df))


def parse_baseline(text: str) -> list[float]:
    """The val_bpb in --baseline, separated by commas; SummaryError if they are none."""
    try:
        values = [float(part) for part in text.split(",")]
    except ValueError:
        values = []
    if not values or not all(0 < x < math.inf for x in values):
        raise SummaryError(f"--baseline {text!r}: expected val_bpb, one or several with commas")
    return values


def compare(rows: list[dict], text: str, nats: float) -> tuple[str, dict]:
    """(what --baseline prints, the same as data for submission.json).

    text: the baseline, in bits per byte. nats: the margin, in nats per token, the unit of the
    challenge's rule. Bits per byte and nats per token of one text in one vocabulary have one ratio,
    ln 2 times its bytes a token; it is val_loss / val_bpb of these runs, and turns the margin into
    bits per byte, in which the test is made: t and p are the same in both.
    """
    if not 0 <= nats < math.inf:
        raise SummaryError(f"--margin {nats}: expected nats per token, 0 or more")
    bpb, baseline = [r["val_bpb"] for r in rows], parse_baseline(text)
    margin = nats * statistics.mean(bpb) / statistics.mean(r["val_loss"] for r in rows)
    test = t_test(bpb, baseline, margin)
    bar = f"the challenge asks for {RECORD_NATS:g} nats at p < {RECORD_P:g}"
    if nats == RECORD_NATS:
        bar = f"the challenge's p < {RECORD_P:g} is {'met' if test.p < RECORD_P else 'NOT met'}"
    line = (
        f"{test.name}, n = {' and '.join(map(str, test.n))}: is mean val_bpb "
        f"{statistics.mean(bpb):.6f} lower than {statistics.mean(baseline):.6f} by more than "
        f"{margin:.6f} ({nats:g} nats per token)? "
        f"t = {test.t:.4g}, df = {test.df:.4g}, p = {test.p:.3g}: {bar}"
    )
    return line, dict(
        test=test.name,
        n=test.n,
        baseline=baseline,
        margin_nats=nats,
        margin_bpb=margin,
        t_statistic=test.t,
        degrees_of_freedom=test.df,
        p_value=test.p,
    )


def known_programs() -> dict[str, bytes]:
    """{SHA-256: the program}: the train_gpt.py beside which this one is, and the same packed."""
    readable = (ROOT / "train_gpt.py").read_bytes()
    programs = (readable, needed_module("tools.pack").packed(readable))
    return {hashlib.sha256(program).hexdigest(): program for program in programs}


def variables(run: dict) -> dict[str, str]:
    """{variable: its text} with which train_gpt.py has the run's configuration: recipe, scale,
    seed, and what is not the default of these.

    train_gpt.py itself says what follows from what is set so far (SMOKE and NUM_LAYERS, say, set
    others), until nothing is missing. Of another train_gpt.py the defaults are not known: every
    setting then. Empty text is a value: a variable that is set to nothing.
    """
    golf = needed_module("train_gpt")
    wanted = {k.upper(): v for k, v in run["config"].items() if k not in NOT_IN_COMMAND}
    everything = {name: golf.text_of(value) for name, value in wanted.items()}
    if run["facts"]["code_sha256"] not in known_programs():
        return everything
    names, missing = set(), {"RECIPE", "SCALE", "SEED"}
    while missing:
        names |= missing
        chosen = {name: text for name, text in everything.items() if name in names}
        try:
            made = dataclasses.asdict(golf.load_config(chosen)[0])
        except golf.RunError:  # a part of the settings can contradict itself where all do not
            return everything
        made = {key.upper(): value for key, value in json.loads(json.dumps(made)).items()}
        missing = {name for name in wanted if made.get(name) != wanted[name]} - names
    return chosen


def commands(runs: list[dict], settings: list[dict[str, str]]) -> list[str]:
    """The shell's line that makes the runs again, with SEED=<seed>; one a run if more than the
    seed differs. settings: of each run, as variables() gives them."""
    size, launcher = (runs[0]["facts"].get(key) for key in ("world_size", "launcher"))
    program = "python train_gpt.py"
    if size > 1 and launcher != "itself":
        program = f"torchrun --standalone --nproc_per_node={size} train_gpt.py"

    def line(own):
        ranks = {"RANKS": str(size)} if launcher == "itself" else {}
        words = (f"{name}={value}" for name, value in (own | ranks).items())
        return " ".join([*words, program])

    quoted = [{name: shlex.quote(text) for name, text in own.items()} for own in settings]
    general = {line(own | {"SEED": "<seed>"}) for own in quoted}
    return list(general) if len(general) == 1 < len(runs) else [line(own) for own in quoted]


def submission(runs: list[dict], rows: list[dict], test: dict) -> dict:
    """The challenge's submission.json over all seeds."""
    config, facts = runs[0]["config"], runs[0]["facts"]
    bpb, loss = ([r[key] for r in rows] for key in ("val_bpb", "val_loss"))
    settings = [variables(run) for run in runs]
    shared = set.intersection(*(set(own.items()) for own in settings))
    out = {key: config[key] for key in ("author", "github_id", "recipe", "scale")}
    return out | dict(
        val_bpb=statistics.mean(bpb),
        val_loss=statistics.mean(loss),
        seeds=[{key: r[key] for key in SEED_KEYS} for r in rows],
        val_bpb_std=statistics.stdev(bpb) if len(bpb) > 1 else None,
        scoring=rows[0]["scoring"],
        normalized=all(r["normalized"] == "yes" for r in rows),
        verdict=verdict_of_all(rows),
        trained_under_cap=not untrained(runs),
        bytes_total=max(r["total_bytes"] for r in rows),
        bytes_code=facts.get("code_bytes"),
        world_size=facts["world_size"],
        gpu=facts["gpu"],
        torch=facts["torch"],
        corpus=runs[0]["corpus"],
        revision=facts["revision"],
        variables={name: text for name, text in settings[0].items() if (name, text) in shared},
        commands=commands(runs, settings),
        **test,
    )


def warn_of_authors(config: dict) -> None:
    """A line on stderr if submission.json will not say whose it is."""
    blank = [name for name, key in AUTHORS.items() if not config[key].strip()]
    if blank:
        print(
            f"warning: the runs had no {' or '.join(blank)}, so submission.json does not say whose "
            f"it is: add it by hand, and set {' and '.join(blank)} in the next runs",
            file=sys.stderr,
        )


def write_new(path: Path, text: str, force: bool) -> None:
    """Write under a temporary name, then rename; SummaryError if the file exists."""
    if path.exists() and not force:
        raise SummaryError(f"{path} exists; --force replaces it")
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, "utf-8")
    os.replace(temporary, path)


def make_record(folder: Path, runs: list[dict], text: str, result: dict) -> None:
    """README (its text), submission.json, logs of each seed, and the code that made them."""
    if folder.exists():
        raise SummaryError(f"{folder} exists; give a new folder")
    programs = known_programs()
    for run in runs:
        if run["facts"]["code_sha256"] not in programs:
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
        program = programs[runs[0]["facts"]["code_sha256"]]
        if program != (made / "train_gpt.py").read_bytes():  # the packed one made the runs
            os.replace(made / "train_gpt.py", made / "train_gpt_readable.py")
            (made / "train_gpt.py").write_bytes(program)
        for run in runs:
            seed = run["final"][-1]["seed"]
            shutil.copy(run["path"].with_suffix(".txt"), made / f"train_seed{seed}.log")
        (made / "submission.json").write_text(json.dumps(result, indent=1) + "\n", "utf-8")
        (made / "README.md").write_text(text, "utf-8")
        made.chmod(0o755)
        os.replace(made, folder)
    except OSError:
        shutil.rmtree(made, ignore_errors=True)
        raise


def readme(runs: list[dict], rows: list[dict], result: dict, tested: str) -> str:
    """The record's README: what was run, on what, and what came out. tested: what --baseline
    printed, or nothing."""
    config, facts, corpus = runs[0]["config"], runs[0]["facts"], runs[0]["corpus"]
    keys = list(rows[0])
    lines = ["| " + " | ".join(keys) + " |", "|" + "---|" * len(keys)]
    lines += ["| " + " | ".join(str(r[k]) for k in keys) + " |" for r in rows]
    hardware = f"{facts['world_size']}x {facts['gpu']}"
    if facts["gpu"] == "none":
        hardware = f"{facts['cores']} CPU cores, {facts['machine']}"
    valid = result["verdict"] == "VALID"
    seeds = ", ".join(str(r["seed"]) for r in rows)
    return "\n".join(
        [
            f"# {config['recipe']} ({config['scale']}), {len(rows)} seeds",
            "",
            f"Mean val_bpb {result['val_bpb']:.8f}, scored by "
            f"{rows[0]['scoring']} (normalized: {rows[0]['normalized']}).",
            "Verdict: VALID." if valid else f"**Not a valid score**: {result['verdict']}.",
            *([] if result["trained_under_cap"] else [UNTRAINED]),
            *([tested[0].upper() + tested[1:] + "."] if tested else []),
            *(f"{line[0].upper() + line[1:]}." for line in warnings_of(runs)),
            "",
            *lines,
            "",
            f"Run on {hardware}, torch {facts['torch']}, revision {facts['revision']};",
            f"validation: {corpus['val_targets']} targets of {corpus['source']}.",
            "",
            "    pip install -r requirements.txt",
            *(f"    {line}" for line in result["commands"]),
            "",
            f"Seeds: {seeds}. Every variable that is not the default of recipe and scale is set;",
            "paths are as the runs were given them.",
            "",
            "`train_seed<seed>.log` is each run's log: configuration, budgets, audit, score table.",
            "",
        ]
    )


def run(options) -> None:
    """Everything the options ask for."""
    runs = read_runs(options.runs)
    is_result = options.submission or options.record or options.baseline
    if not options.mixed:
        check_alike(runs)
    elif is_result:
        raise SummaryError("--mixed shows the table only")
    if is_result:
        check_networks(runs)
    if is_result and not options.any_verdict:
        check_verdicts(runs)
    if is_result and not options.untrained:
        check_trained(runs)
    rows = [row(r) for r in runs]
    tested, test = "", {}
    if options.baseline:
        tested, test = compare(rows, options.baseline, options.margin)
    print("\n".join(filter(None, [table(rows), *warnings_of(runs), tested])))
    if options.submission or options.record:
        warn_of_authors(runs[0]["config"])
        result = submission(runs, rows, test)
    if options.submission:
        write_new(Path(options.submission), json.dumps(result, indent=1) + "\n", options.force)
    if options.record:
        make_record(Path(options.record), runs, readme(runs, rows, result, tested), result)


def main() -> int:
    """The command line; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+", help="logs/<run_id>.json; what is no run is skipped")
    parser.add_argument("--baseline", default="", help="val_bpb to beat; one number or several")
    parser.add_argument(
        "--margin",
        type=float,
        default=RECORD_NATS,
        help="nats per token to beat it by (%(default)s)",
    )
    parser.add_argument("--submission", default="", help="file to write")
    parser.add_argument("--record", default="", help="folder to make")
    parser.add_argument("--any-verdict", action="store_true", help="take runs that are not VALID")
    parser.add_argument("--untrained", action="store_true", help="take runs without a training")
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
