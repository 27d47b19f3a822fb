"""A quarter of an hour on one GPU: what only a GPU can show, in stages, the most valuable first.

    python3 bench/gpu_visit.py --data FOLDER --pack RESULTS --seconds 430 [--stages golf,plain]
    python3 bench/gpu_visit.py --data FOLDER --pack RESULTS --small     the same, tiny, on a CPU
    python3 bench/gpu_visit.py --rehearse FOLDER       would a visit work? See bench/rehearse.py

FOLDER of --data has *_train_*.bin and *_val_*.bin, as they are or as .bin.xz, and tokenizer.model.
--seconds is all the time there is, from $VISIT_STARTED (seconds since 1970) or from now. A stage is
skipped if less is left than its least time. It is ended, with all its children, when its most or
the visit is over. If `check` fails, the visit ends. The training of `golf` takes what its other
parts (--rest) leave. `plain` begins with `golf` and is ended when that has warmed up: until then
the GPU is idle, for `golf` compiles.

RESULTS has summary.txt, summary.json, logs.tar.gz and golf's artifact. All are written anew after
each stage, and when SIGTERM or Ctrl-C ends the visit. Exit status: 0; 1 if a stage failed; 2 if
`check` did, or for bad input; 128 and its number after a signal.
"""

import argparse
import io
import json
import lzma
import os
import platform
import shlex
import shutil
import signal
import subprocess
import sys
import tarfile
import threading
import time
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

import rehearse
import sentencepiece
import visit_figures as figures

ROOT = Path(__file__).resolve().parent.parent
RUN = "train_gpt.py"
GATE = "check"  # the stage without which no other is worth its time
MOST_BYTES = 16 * 2**20  # of a file of results
POLL_SECONDS = 0.1
GRACE_SECONDS = 5.0  # from SIGTERM to SIGKILL
LAST_GRACE_SECONDS = 1.0  # the same when a signal ends the visit
RESERVE_SECONDS = GRACE_SECONDS + 2.0  # in which the last stage is ended and packed
LEAST_TRAINING, MOST_TRAINING = 45.0, 300.0  # seconds of golf's
REST_SECONDS = 314.0  # golf's besides training: an estimate, half of it compilation
SMALL_LEAST, SMALL_REST = 5.0, 60.0

# What --small makes of every stage: a network of seconds.
SMALL = {
    "SCALE": "demo",
    "DEVICE": "cpu",
    "COMPILE": "0",
    "RANKS": "1",
    "MODEL_DIM": "32",
    "BIGRAM_VOCAB_SIZE": "64",
    "TRAIN_SEQ_LEN": "64",
    "TRAIN_BATCH_TOKENS": "1536",
    "ITERATIONS": "6",
    "GPTQ_SECONDS": "1",
    "VAL_TOKENS": "2048",
    "EVAL_SEQ_LEN": "64",
    "EVAL_STRIDE": "16",
    "EVAL_BATCH_WINDOWS": "8",
    "MIXER_CHUNK_TOKENS": "64",
}


class VisitError(Exception):
    """Bad input: one line for the user."""


class Stopped(Exception):
    """A signal ended the visit."""


class Stage(NamedTuple):
    """What the GPU is asked: a script, its arguments and variables.

    least: seconds without which it is not begun, besides golf's --rest. most: seconds that it may
    take. args and env may name {shard}, a training shard, and {train}, the seconds of training for
    which there is time. small_args: in place of args. beside: the stage with which it begins.
    read: makes the figures.
    """

    name: str
    least: float
    most: float
    script: str
    read: Callable[[list[figures.Line]], dict]
    args: tuple[str, ...] = ()
    env: dict[str, str] = {}
    small_args: tuple[str, ...] | None = None
    beside: str = ""

    def trains(self) -> bool:
        """Whether its training takes what time there is."""
        return "{train}" in self.env.values()


# Golf's network at the demo's scale, where it is the submissions' by default.
INGREDIENTS = {
    "LOOP_PASSES": "3",
    "LANES_FROM": "8",
    "ATTN_GATE": "1",
    "CONTENT_SMEAR": "1",
    "MLP_MULT": "4",
    "MUON_ROW_NORM": "1",
    "QK_GAIN_INIT": "5",
}
SMOKE = {
    "SMOKE": "1",
    "COMPILE": "0",
    "ITERATIONS": "20",
    "MAX_WALLCLOCK_SECONDS": "0",  # so that calibration has the time that it takes
    "AUDIT": "strict",
    "PICTURE": "0",
    "RUN_ID": "smoke",
}
GOLF = {
    "SCALE": "full",
    "TRAIN_BATCH_TOKENS": "196608",  # in so short a training steps are worth more than tokens
    "MAX_WALLCLOCK_SECONDS": "{train}",
    "WARMUP_STEPS": "2",
    "TRAIN_LOG_EVERY": "140",  # of 7,000: fifty lines
    "VAL_LOSS_EVERY": "0",
    "EVAL_STRIDE": "256",
    "AUDIT": "strict",
    "PICTURE": "0",
    "RUN_ID": "golf",
}
# Four layers compile in the time that golf's eleven leave, and nothing of the step is missing.
FEW_LAYERS = {
    "NUM_LAYERS": "4",
    "LOOP_PASSES": "1",
    "LANES_FROM": "2",
    "XSA_LAST_N": "4",
    "VE_LAYERS": "2,3",
}
STAGES = (
    Stage(
        "check",
        15,
        90,
        "bench/device_check.py",
        figures.check_figures,
        env={"SCALE": "full"},
    ),
    Stage("smoke", 20, 70, RUN, figures.run_figures, env=SMOKE | INGREDIENTS),
    Stage(
        "mixing",
        30,
        100,
        "bench/ngram_counts.py",
        figures.mixing_figures,
        ("--sizes", "--mixing", "8", "62", "--tokens", "{shard}"),
        small_args=("--sizes", "--mixing", "0.02", "--tokens", "{shard}"),
    ),
    Stage("golf", LEAST_TRAINING, 1e9, RUN, figures.run_figures, env=GOLF),
    Stage(
        "plain",
        40,
        150,
        "bench/training_step.py",
        figures.versus_figures,
        ("--scale", "full", "--repeats", "9", "--seconds", "15"),
        FEW_LAYERS,
        ("--scale", "demo", "--repeats", "1", "--seconds", "1"),
        "golf",
    ),
)


# --------------------------------------------------------------------------------------------------
# Data
# --------------------------------------------------------------------------------------------------


def find_data(folder: Path) -> dict[str, str]:
    """The variables that say where --data is, packed or not; VisitError if something is missing."""
    for split in ("train", "val"):
        if not [*folder.glob(f"*_{split}_*.bin"), *folder.glob(f"*_{split}_*.bin.xz")]:
            raise VisitError(f"--data {folder}: no *_{split}_*.bin or .bin.xz there")
    tokenizer = folder / "tokenizer.model"
    try:
        pieces = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer)).get_piece_size()
    except (OSError, RuntimeError):
        raise VisitError(f"{tokenizer}: no SentencePiece model there") from None
    env = {"DATA_PATH": str(folder), "TOKENIZER_PATH": str(tokenizer), "TEXT_FILES": ""}
    return env | {"VOCAB_SIZE": str(pieces)}


def unpacked(folder: Path, target: Path, look: Callable[[], None]) -> Path:
    """The folder or, where it has .bin.xz files, one below `target` with all of its shards
    unpacked, which may be there from before. look() is called again and again."""
    shards = sorted([*folder.glob("*.bin.xz"), *folder.glob("*.bin")])
    if all(path.suffix == ".bin" for path in shards):
        return folder
    known = ",".join(f"{path.name}:{path.stat().st_size}" for path in shards)
    made_in = target / f"{zlib.crc32(known.encode()):08x}"
    made_in.mkdir(parents=True, exist_ok=True)
    for path in shards:
        made = made_in / path.name.removesuffix(".xz")
        if made.exists():
            continue
        if path.suffix == ".bin":
            made.symlink_to(path)
            continue
        part = made.with_suffix(".tmp")
        with lzma.open(path) as source, open(part, "wb") as out:
            while block := source.read(1 << 20):
                out.write(block)
                look()
        os.replace(part, made)
    return made_in


# --------------------------------------------------------------------------------------------------
# Processes
# --------------------------------------------------------------------------------------------------


def signal_group(process: subprocess.Popen, number: int) -> None:
    """Send a signal to a process and its children, as far as there are any."""
    try:
        os.killpg(process.pid, number)
    except (ProcessLookupError, PermissionError):  # the latter: macOS, of a group that is ending
        return


class Running:
    """A stage that has begun: its process, in a group of its own, and the thread that puts the
    seconds before each line that it prints.

    why: it was ended, for this reason. seconds, once it is over: how long it took.
    """

    def __init__(self, stage: Stage, command: list[str], env: dict[str, str], folder: Path):
        self.stage, self.began, self.why, self.seconds = stage, time.time(), "", 0.0
        self.path = folder / "log"
        self.process = subprocess.Popen(
            command,
            cwd=folder,
            env=os.environ | env,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            encoding="utf-8",
            errors="replace",
            start_new_session=True,
        )
        self.copier = threading.Thread(target=self.copy, daemon=True)
        self.copier.start()

    def copy(self) -> None:
        """Write what the process prints to the log, line by line."""
        with open(self.path, "w", encoding="utf-8") as log:
            for line in self.process.stdout:
                print(
                    figures.stamped(time.time() - self.began, line.rstrip()), file=log, flush=True
                )

    def lines(self) -> list[figures.Line]:
        """What it has printed."""
        return figures.parse(self.path.read_text("utf-8")) if self.path.exists() else []

    def end(self, grace: float) -> None:
        """SIGTERM to all of its processes; after `grace` seconds SIGKILL to those that are left."""
        if self.process.poll() is None:
            signal_group(self.process, signal.SIGTERM)
        try:
            self.process.wait(grace)
        except subprocess.TimeoutExpired:
            signal_group(self.process, signal.SIGKILL)
            self.process.wait()
        self.close()

    def close(self) -> None:
        """After its end: no child outlives it, and its log is whole."""
        signal_group(self.process, signal.SIGKILL)
        self.seconds = time.time() - self.began
        self.copier.join(1.0)

    def status(self) -> str:
        """Of a stage that is over: ok, failed, or why it was ended."""
        return self.why or ("ok" if self.process.returncode == 0 else "failed")


class Visit:
    """The stages, the time that is left, and what came of each.

    results: {stage: what summary.json says of it}. data: variables that say where the shards are.
    """

    def __init__(self, options, stages: Iterable[Stage]):
        self.options, self.stages = options, {stage.name: stage for stage in stages}
        self.started = options.started
        self.end = self.started + options.seconds
        self.device = device_name(options.small)
        self.data: dict[str, str] = {}
        self.running: list[Running] = []
        self.over: list[Running] = []
        self.results: dict[str, dict] = {}
        self.signal = 0

    def left(self) -> float:
        """Seconds in which stages may run."""
        return self.end - RESERVE_SECONDS - time.time()

    def stop(self, number: int, frame) -> None:
        """Signal handler: the visit ends at the next look."""
        self.signal = number

    def take_data(self) -> None:
        """Have the shards unpacked."""
        if self.data or not self.options.data:
            return
        began, folder = time.time(), self.options.data
        found = find_data(folder)
        found["DATA_PATH"] = str(unpacked(folder, self.options.work / "data", self.look))
        self.data = found
        print(f"data: {time.time() - began:.1f} s", flush=True)

    # Beginning and ending stages

    def least(self, stage: Stage) -> float:
        """Seconds without which a stage is not begun."""
        if self.options.small:
            return SMALL_LEAST
        return stage.least + (self.options.rest if stage.trains() else 0.0)

    def training_seconds(self) -> int:
        """What is left for golf's training."""
        return round(min(MOST_TRAINING, max(LEAST_TRAINING, self.left() - self.options.rest)))

    def call(self, stage: Stage) -> tuple[list[str], dict[str, str]]:
        """(command, variables on top of the caller's) of a stage."""
        args, env = stage.args, stage.env
        if self.options.small:
            args = args if stage.small_args is None else stage.small_args
        shards = sorted(Path(self.data.get("DATA_PATH", "-")).glob("*_train_*.bin"))
        words = {"shard": shards[0] if shards else "", "train": self.training_seconds()}
        env = {name: value.format(**words) for name, value in env.items()}
        env |= SMALL if self.options.small else {}
        env |= self.data | {"LOGS_PATH": str(self.options.work / stage.name)}
        command = [sys.executable, str(ROOT / stage.script), *(a.format(**words) for a in args)]
        return command, env | {"PYTHONUNBUFFERED": "1"}

    def begin(self, name: str) -> bool:
        """Begin a stage, unless there is too little time; whether it was begun."""
        stage = self.stages[name]
        if self.left() < self.least(stage):
            self.results[name] = {"status": "skipped", "error": f"{self.left():.0f} s were left"}
            print(f"{name}: skipped, {self.left():.0f} s are left", flush=True)
            return False
        folder = self.options.work / name
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        command, env = self.call(stage)
        shown = [*(f"{key}={shlex.quote(value)}" for key, value in env.items())]
        shown = " ".join([*shown, shlex.join(command)])
        self.results[name] = {"status": "running", "command": shown}
        self.running.append(Running(stage, command, env, folder))
        return True

    def reason_to_end(self, running: Running) -> str:
        """Why a stage has to end now, or ""."""
        stage, taken = running.stage, time.time() - running.began
        if taken > stage.most or self.left() < 0:
            return f"killed after {taken:.0f} s"
        if self.options.small:  # nothing compiles: all of it is tried
            return ""
        for other in self.running:
            if stage.beside == other.stage.name and figures.rows(other.lines(), "warmup"):
                return f"ended: {stage.beside} has warmed up"
        return ""

    def finish(self, running: Running) -> None:
        """Take a stage that is over out of those that run; pack."""
        self.running.remove(running)
        self.over.append(running)
        self.note(running)
        result = self.results[running.stage.name]
        print(f"{running.stage.name}: {result['status']}, {result['seconds']} s", flush=True)
        self.pack()

    def note(self, running: Running) -> None:
        """What is to be said of a stage so far."""
        lines, over = running.lines(), running not in self.running
        result = self.results[running.stage.name]
        result["status"] = running.status() if over else "running"
        result["seconds"] = round(running.seconds if over else time.time() - running.began, 1)
        result["figures"] = running.stage.read(lines)
        if over and running.status() == "failed":
            result["error"] = figures.failure(lines)

    def look(self) -> None:
        """End what has to end, and take out what is over; Stopped if a signal came."""
        if self.signal:
            raise Stopped
        for running in [*self.running]:
            if running.process.poll() is not None:
                running.close()
                self.finish(running)
            elif why := self.reason_to_end(running):
                running.why = why
                running.end(GRACE_SECONDS)
                self.finish(running)

    def watch(self) -> None:
        """Until all that runs is over."""
        while self.running:
            self.look()
            time.sleep(POLL_SECONDS)

    def run(self, names: list[str]) -> int:
        """Every stage for which there is time; the exit status."""
        for name in names:
            if name in self.results:  # it ran beside another
                continue
            if name != GATE:
                self.take_data()
            if not self.begin(name):
                continue
            for other in names:
                if self.stages[other].beside == name and other not in self.results:
                    self.begin(other)
            self.take_data()  # while the check runs
            self.watch()
            if name == GATE and self.results[name]["status"] != "ok":
                return 2
        bad = ("failed", "killed")
        return int(any(result["status"].startswith(bad) for result in self.results.values()))

    def close(self) -> None:
        """End whatever still runs, then pack."""
        for running in self.running:
            signal_group(running.process, signal.SIGTERM)
        for running in [*self.running]:
            running.why = "ended with the visit"
            running.end(LAST_GRACE_SECONDS)
            self.running.remove(running)
            self.over.append(running)
        self.pack()

    # Results

    def summary(self) -> str:
        """A section a stage: its figures, each with the device's name, and lines of its log."""
        spent, whole = time.time() - self.started, self.options.seconds
        parts = [f"{self.device}: {spent:.0f} s of {whole:.0f}"]
        runs = {running.stage.name: running for running in [*self.over, *self.running]}
        for name, result in self.results.items():
            parts.append(f"\n== {name}: {result['status']} {result.get('seconds', '')}".rstrip())
            if "error" in result:
                parts.append(result["error"])
            for key, value in figures.flat(result.get("figures", {})):
                parts.append(f"{name}.{key} {value} ({self.device})")
            if name in runs:
                parts += figures.told(runs[name].lines(), result["status"] != "ok")
        return "\n".join(parts) + "\n"

    def logs(self) -> bytes:
        """A packed archive of the stages' logs and records, the smallest first, as many as fit."""
        folders = [self.options.work / name for name in self.results]
        files = [path for folder in folders for path in folder.glob("*") if path.is_file()]
        files = [path for path in files if path.suffix in ("", ".txt", ".json")]
        out, size = io.BytesIO(), 0
        with tarfile.open(fileobj=out, mode="w:gz") as archive:
            for path in sorted(files, key=lambda path: path.stat().st_size):
                size += path.stat().st_size + 2048
                if size < MOST_BYTES:
                    archive.add(path, f"{path.parent.name}/{path.name}")
        return out.getvalue()

    def pack(self) -> None:
        """Write what there is so far into --pack."""
        folder = self.options.pack
        folder.mkdir(parents=True, exist_ok=True)
        for running in [*self.over, *self.running]:
            self.note(running)
        facts = {"device": self.device, "small": self.options.small, "started": self.started}
        facts |= {"budget_seconds": self.options.seconds, "stages": self.results}
        write(folder / "summary.txt", self.summary().encode())
        write(folder / "summary.json", json.dumps(facts, indent=1).encode() + b"\n")
        write(folder / "logs.tar.gz", self.logs())
        for path in self.options.work.glob("golf/golf.*.ptz"):
            if "golf" in self.results and path.stat().st_size <= MOST_BYTES:
                write(folder / path.name, path.read_bytes())


def write(path: Path, content: bytes) -> None:
    """Replace a file by a whole one."""
    part = path.with_name(f"{path.name}.tmp")
    part.write_bytes(content)
    os.replace(part, path)


def device_name(small: bool) -> str:
    """What the figures were measured on, without PyTorch, whose import takes seconds."""
    if small:
        return f"CPU, {os.cpu_count()} cores, {platform.machine()}"
    command = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    try:
        asked = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return "unknown device"
    names = asked.stdout.splitlines() if asked.returncode == 0 else []
    return names[0].strip() if names else "unknown device"


# --------------------------------------------------------------------------------------------------
# The command line
# --------------------------------------------------------------------------------------------------


def chosen(wanted: str) -> list[str]:
    """The names in --stages."""
    names = [name.strip() for name in wanted.split(",") if name.strip()]
    known = [stage.name for stage in STAGES]
    for name in names:
        if name not in known:
            raise VisitError(f"--stages {name}: no such stage; there are {', '.join(known)}")
    return names


def start_time(given: str) -> float:
    """Seconds since 1970 at which the visit began."""
    try:
        return float(given) if given else time.time()
    except ValueError:
        raise VisitError(f"VISIT_STARTED={given!r}: not a number of seconds") from None


def arguments(argv: list[str] | None = None):
    """The command line's options."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, help="folder of shards, .bin or .bin.xz")
    parser.add_argument("--pack", type=Path, help="folder of results; WORK/packed")
    parser.add_argument("--seconds", type=float, default=540, help="all the time there is")
    parser.add_argument("--stages", default=",".join(stage.name for stage in STAGES))
    parser.add_argument("--rest", type=float, help="golf's seconds besides training, if known")
    parser.add_argument("--small", action="store_true", help="tiny sizes, on a CPU")
    parser.add_argument("--work", type=Path, default=ROOT / "logs/gpu-visit", help="kept files")
    parser.add_argument("--rehearse", type=Path, metavar="FOLDER", help="with wheels/ and data/")
    options = parser.parse_args(argv)
    options.work = options.work.resolve()
    options.pack = (options.pack or options.work / "packed").resolve()
    options.data = options.data and options.data.resolve()
    if options.rest is None:
        options.rest = SMALL_REST if options.small else REST_SECONDS
    return options


def visit(options) -> int:
    """The stages that are asked for; the exit status."""
    options.started, names = start_time(os.environ.get("VISIT_STARTED", "")), chosen(options.stages)
    if not options.data:
        raise VisitError("--data FOLDER, of shards and tokenizer.model, is needed")
    find_data(options.data)
    own = Visit(options, STAGES)
    for name in ("SIGINT", "SIGTERM", "SIGHUP"):
        signal.signal(getattr(signal, name), own.stop)
    try:
        status = own.run(names)
    except Stopped:
        status = 128 + own.signal
    finally:
        own.close()
    print(own.summary(), end="")
    return status


def main() -> int:
    """The exit status."""
    options = arguments()
    try:
        if options.rehearse:
            scripts = sorted({stage.script for stage in STAGES})
            return rehearse.rehearse(options.rehearse, scripts, chosen(options.stages))
        return visit(options)
    except (VisitError, rehearse.RehearsalError, OSError, lzma.LZMAError, EOFError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
