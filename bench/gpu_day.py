"""A GPU day in one command: everything that only a GPU can show, in stages of nine minutes at most.

    python bench/gpu_day.py --list                  each stage, and what is done already
    python bench/gpu_day.py --data FOLDER           all of them, on challenge shards
    python bench/gpu_day.py --data FOLDER --only a,f    stage a, and all that begin with f
    python bench/gpu_day.py --small                 the same commands at tiny size, on a CPU

FOLDER has *_train_*.bin and *_val_*.bin, as they are or as .bin.xz, and tokenizer.model. A stage
leaves <letter>.json (status, seconds, commands, figures, device, and the settings that the caller's
environment had), <letter>.log (all that its commands printed) and <letter>/ (their runs' files) in
--out. One that has finished with this train_gpt.py is skipped; one that fails says why in its JSON,
and the others still run. Exit status: 0; 1 if a stage failed; 2 for bad input.
"""

import argparse
import contextlib
import hashlib
import json
import lzma
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import safetensors
import sentencepiece
import torch

from common import golf

ROOT = Path(__file__).resolve().parent.parent
LIMIT_SECONDS = 540
LONG_TARGETS = 62_000_000  # about as many as FineWeb's validation shards have
SMALL_LONG_TARGETS = 8192
RUN = "train_gpt.py"

# What --small makes of every run of train_gpt.py: a network of seconds.
SMALL = {
    "SCALE": "demo",
    "DEVICE": "cpu",
    "COMPILE": "0",
    "PICTURE": "0",
    "RANKS": "1",
    "NUM_LAYERS": "4",
    "XSA_LAST_N": "4",
    "VE_LAYERS": "2,3",
    "MODEL_DIM": "32",
    "NUM_HEADS": "4",
    "NUM_KV_HEADS": "2",
    "ROPE_DIMS": "4",
    "BIGRAM_VOCAB_SIZE": "64",
    "BIGRAM_DIM": "8",
    "VE_DIM": "8",
    "VOCAB_SIZE": "512",
    "TRAIN_SEQ_LEN": "64",
    "TRAIN_BATCH_TOKENS": "1536",
    "WARMUP_STEPS": "1",
    "ITERATIONS": "6",
    "MAX_WALLCLOCK_SECONDS": "0",
    "GPTQ_SECONDS": "1",
    "VAL_TOKENS": "512",
    "EVAL_SEQ_LEN": "64",
    "EVAL_STRIDE": "16",
    "EVAL_BATCH_WINDOWS": "8",
    "NGRAM_BUCKETS": "1024",
    "MIXER_CHUNK_TOKENS": "64",
}


class DayError(Exception):
    """Bad input, or a stage that cannot run: one line for the user."""


class Command(NamedTuple):
    """A command of a stage; its run's files are in <stage>/<name>/.

    env and args may name {out} and {shard}, a training shard. small_env comes on top of SMALL;
    small_args stand in the place of args.
    """

    name: str
    script: str
    env: dict[str, str] = {}
    args: tuple[str, ...] = ()
    small_env: dict[str, str] = {}
    small_args: tuple[str, ...] | None = None


class Stage(NamedTuple):
    """What the GPU is asked.

    minutes: expected. read(folder, log) makes the figures; shown: those of the closing table, as
    "figure of.figure". needs: files of earlier stages. long: the validation stream is made to have
    LONG_TARGETS. discards: names of files that are too large to keep.
    """

    letter: str
    name: str
    shows: str
    minutes: float
    commands: tuple[Command, ...]
    read: Callable[[Path, str], dict]
    shown: tuple[str, ...] = ()
    needs: tuple[str, ...] = ()
    long: bool = False
    discards: str = ""


# --------------------------------------------------------------------------------------------------
# Figures, read from what the commands left; whatever is missing is left out
# --------------------------------------------------------------------------------------------------


def last(record: dict, kind: str) -> dict:
    """The last row of a kind, or {}."""
    return (record.get(kind) or [{}])[-1]


def without_nothing(values: dict) -> dict:
    """The entries that have a value."""
    return {key: value for key, value in values.items() if value not in (None, {}, [])}


def training_figures(record: dict) -> dict:
    """Figures of training and export of a run's record."""
    trained = last(record, "trained")
    steps, seconds = trained.get("steps"), trained.get("train_seconds")
    artifact = last(record, "artifact")
    return {
        "steps": steps,
        "step_ms": round(1000 * seconds / steps, 2) if steps else None,
        "train_seconds": seconds,
        "warmup_seconds": last(record, "warmup").get("seconds"),
        "recompiles": trained.get("recompiles"),
        "peak_memory_bytes": trained.get("peak_memory_bytes"),
        "calibration_seconds": last(record, "calibration").get("seconds"),
        "export_seconds": artifact.get("seconds"),
        "artifact_bytes": artifact.get("artifact_bytes"),
        "unquantized_bpb": last(record, "validation").get("val_bpb"),
    }


def evaluation_figures(record: dict) -> dict:
    """Figures of the evaluation and audit of a run's record; seconds of the headline are those of
    the whole evaluation under the clock, of another scoring those of its mixing."""
    rows = record.get("result", [])
    sliding = {r.get("scoring"): r for r in rows if r.get("stage", "").endswith("sliding")}
    bpb = {scoring: row.get("val_bpb") for scoring, row in sliding.items()}
    gain = None
    if {"neural", "calibrated"} <= bpb.keys():
        gain = bpb["neural"] - bpb["calibrated"]
    used = {row.get("name"): row.get("used") for row in record.get("budget", [])}
    roundtrip = [r.get("seconds") for r in rows if r.get("stage", "").endswith("roundtrip")]
    return {
        "targets": record.get("corpus", {}).get("val_targets"),
        "eval_seconds": used.get("eval_seconds"),
        "bpb": bpb,
        "mixer_gain_bpb": gain,
        "mass": {scoring: row.get("mass") for scoring, row in sliding.items()},
        "scoring_seconds": {scoring: row.get("seconds") for scoring, row in sliding.items()},
        "roundtrip_seconds": roundtrip[-1] if roundtrip else None,
        "audit": {
            row.get("name"): f"{row.get('verdict')} {row.get('seconds', 0):.1f} s"
            for row in record.get("audit", [])
        },
        "final": last(record, "final"),
    }


def pass_seconds(folder: Path) -> float | None:
    """Seconds of the neural pass that a run saved in its folder."""
    for path in folder.glob("neural-*.safetensors"):
        with safetensors.safe_open(path, "pt") as saved:
            return float(saved.get_tensor("seconds"))
    return None


def run_figures(folder: Path, log: str) -> dict:
    """{command: figures of its run} of every record below a stage's folder."""
    figures = {}
    for path in sorted(folder.glob("*/*.json")):
        if path.stem != path.parent.name:
            continue
        record = json.loads(path.read_text("utf-8"))
        model = last(record, "model")
        figures[path.stem] = without_nothing(
            {"attention": model.get("attention"), "compute": model.get("compute")}
            | training_figures(record)
            | {"neural_pass_seconds": pass_seconds(path.parent)}
            | evaluation_figures(record)
        )
    return figures


def versus_figures(folder: Path, log: str) -> dict:
    """Times, ratio and, of a GPU, MFU and memory that a bench printed of ours and plain."""
    figures: dict[str, dict] = {}
    name = ""
    for line in log.splitlines():
        time_line = re.match(r"(.+): ours ([\d.]+) ms, plain ([\d.]+) ms, ratio ([\d.]+)", line)
        side = re.match(r"  (ours|plain): .*MFU ([\d.]+%).* peak (\d+) bytes", line)
        if time_line:
            name = time_line[1].replace(" ", "_")
            values = map(float, time_line.groups()[1:])
            figures[name] = dict(zip(("ours_ms", "plain_ms", "ratio"), values, strict=True))
        elif side and name:
            figures[name] |= {f"{side[1]}_mfu": side[2], f"{side[1]}_peak_bytes": int(side[3])}
    return figures


def count_figures(folder: Path, log: str) -> dict:
    """{"device tokens mode": the other columns, by their heads} of bench/ngram_counts.py, and
    {"mixing tokens": seconds and memory} of columns and mixing."""
    figures: dict[str, dict] = {}
    heads: list[str] = []
    for line in log.splitlines():
        mixing = re.match(r"\s*([\d,]+)\s+([\d.]+)\s+([\d.]+)\s+([\d.]+)$", line)
        if mixing:
            values = map(float, mixing.groups()[1:])
            names = ("columns_seconds", "mixing_seconds", "gib")
            figures[f"mixing {mixing[1]}"] = dict(zip(names, values, strict=True))
        cells = re.split(r"\s{2,}", line.strip())
        if cells[:2] == ["device", "tokens"]:
            heads = cells
        elif heads and cells[0] in ("cpu", "cuda") and len(cells) == len(heads):
            figures[" ".join(cells[:3])] = dict(zip(heads[3:], cells[3:], strict=True))
    return figures


def method_figures(folder: Path, log: str) -> dict:
    """{"method, bytes": gap and KL, bits per byte} of bench/quantization.py."""
    figures = {}
    for line in log.splitlines():
        found = re.match(r"\s*(\S.*?)\s+([\d,]+)\s+(-?[\d.]+)\s+(-?[\d.]+)$", line)
        if found:
            gap, divergence = float(found[3]), float(found[4])
            figures[f"{found[1]}, {found[2]} bytes"] = {"gap": gap, "kl": divergence}
    return figures


# --------------------------------------------------------------------------------------------------
# The stages
# --------------------------------------------------------------------------------------------------

FULL = {"SCALE": "full"}
TIMED = {"SAVE_PASS": "1"}  # whose file says how long the neural pass took
PASSES = "neural-*.safetensors"
START = "{out}/a/golf/golf.int6.ptz"  # what stage a leaves
QUICK = ("--repeats", "1", "--seconds", "1")
SCORED_TARGETS = "8388608"  # most that stages f3 and f4 score


def trained(recipe: str, name: str = "", changes: dict[str, str] | None = None) -> Command:
    """Training and export, with as little evaluation as there may be; changes: of the recipe."""
    env = {"RECIPE": recipe, "MAX_WALLCLOCK_SECONDS": "400", "WARMUP_STEPS": "5"}
    env |= {"VAL_TOKENS": "131072", "EVAL_STRIDE": "1024", "AUDIT": "0"}
    return Command(
        name or recipe, RUN, FULL | env | (changes or {}), small_env={"EVAL_STRIDE": "64"}
    )


def of_shared_trunk(letter: str, name: str, shows: str, changes: dict[str, str]) -> Stage:
    """A training of the network that golf had before the field's ingredients, with changes."""
    shared = {key.upper(): str(value) for key, value in golf.SHARED.items()}
    figures = (f"{name}.steps", f"{name}.step_ms", f"{name}.unquantized_bpb")
    figures += (f"{name}.export_seconds",)
    command = trained("golf", name, shared | changes)
    return Stage(letter, f"train {name}", shows, 9, (command,), run_figures, figures)


def scored(recipe: str, stage: str) -> Command:
    """Every scoring of the artifact that a stage of training left."""
    artifact = f"{{out}}/{stage}/{recipe}/{recipe}.int6.ptz"
    env = {"RECIPE": recipe, "LOAD_ARTIFACT": artifact, "VAL_TOKENS": SCORED_TARGETS}
    return Command(recipe, RUN, FULL | TIMED | env | {"AUDIT": "1"}, small_env={"AUDIT": "0"})


def counted(name: str, args: tuple[str, ...], small_args: tuple[str, ...]) -> Command:
    """bench/ngram_counts.py on a training shard."""
    data = ("--repeats", "1", "--tokens", "{shard}")
    return Command(name, "bench/ngram_counts.py", {}, (*args, *data), {}, (*small_args, *data))


def against_plain(letter: str, name: str, what: str, minutes: int) -> Stage:
    """A stage of bench/<what>.py, which times ours against a plain implementation."""
    command = Command(
        name, f"bench/{what}.py", args=("--seconds", "30", "--profile"), small_args=QUICK
    )
    return Stage(
        letter,
        name,
        f"{what.replace('_', ' ')} against a plain one: time, memory, MFU, ten longest kernels",
        minutes,
        (command,),
        versus_figures,
        (f"{what}_full_cuda", f"{what}_demo_cpu"),
    )


def strided(stride: int) -> Command:
    """An evaluation of stage a's artifact at a stride."""
    env = {"LOAD_ARTIFACT": START, "EVAL_STRIDE": str(stride), "VAL_TOKENS": "524288"}
    small = {"EVAL_STRIDE": str(stride // 8)}
    return Command(f"stride{stride}", RUN, FULL | TIMED | env | {"AUDIT": "0"}, small_env=small)


STAGES = (
    Stage(
        "a",
        "start",
        "one rank, 60 s of training at full size, all scorings, strict audit",
        5,
        (
            Command(
                "golf",
                RUN,
                FULL
                | TIMED
                | {"MAX_WALLCLOCK_SECONDS": "60", "VAL_TOKENS": "524288", "AUDIT": "strict"},
            ),
        ),
        run_figures,
        ("golf.steps", "golf.step_ms", "golf.warmup_seconds", "golf.eval_seconds", "golf.bpb"),
        discards=PASSES,
    ),
    against_plain("b", "step", "training_step", 6),
    against_plain("c1", "pass", "neural_pass", 5),
    Stage(
        "c2",
        "strides",
        "evaluation of stage a's artifact at strides 64 to 512: seconds and scores",
        6,
        tuple(strided(stride) for stride in (64, 128, 256, 512)),
        run_figures,
        tuple(f"stride{stride}.eval_seconds" for stride in (64, 128, 256, 512)),
        (START,),
        discards=PASSES,
    ),
    Stage(
        "d1",
        "counting",
        "n-gram counts at 0.5 to 62 M tokens; the mixer's columns and mixing at 8 and 62 M",
        8,
        (
            counted(  # a GPU counts 62 M as well
                "counts",
                ("--sizes", "0.5", "2", "8", "--mixing"),
                ("--sizes", "0.02", "--window-tokens", "2000", "--mixing"),
            ),
            counted("mixing", ("--sizes", "--mixing", "8", "62"), ("--sizes", "--mixing", "0.02")),
        ),
        count_figures,
        ("cuda 62,000,000 exact", "mixing 62,000,000", "cpu 20,000 exact", "mixing 20,000"),
        (START,),
    ),
    Stage(
        "d2",
        "long stream",
        "62 M targets, stride 1,024: seconds of pass, mixing, masses and audit",
        8,
        (
            Command(
                "long",
                RUN,
                FULL
                | TIMED
                | {"LOAD_ARTIFACT": START, "EVAL_STRIDE": "1024", "AUDIT": "1"}
                | {"VAL_TOKENS": str(LONG_TARGETS)},
                small_env={
                    "EVAL_STRIDE": "64",
                    "VAL_TOKENS": str(SMALL_LONG_TARGETS),
                    "AUDIT": "0",
                },
            ),
        ),
        run_figures,
        (
            *("long.targets", "long.neural_pass_seconds", "long.eval_seconds"),
            *("long.scoring_seconds", "long.audit"),
        ),
        (START,),
        long=True,
        discards=PASSES,
    ),
    Stage(
        "f1",
        "train golf",
        "400 s of training at full size by our recipe, and its export",
        9,
        (trained("golf"),),
        run_figures,
        ("golf.steps", "golf.step_ms", "golf.unquantized_bpb", "golf.export_seconds"),
    ),
    Stage(
        "f2",
        "train pr1094",
        "the same for pr1094's recipe",
        9,
        (trained("pr1094"),),
        run_figures,
        ("pr1094.steps", "pr1094.step_ms", "pr1094.unquantized_bpb", "pr1094.export_seconds"),
    ),
    Stage(
        "f3",
        "score golf",
        "every scoring of f1's artifact with the audit; what the mixer gains",
        5,
        (scored("golf", "f1"),),
        run_figures,
        ("golf.bpb", "golf.mixer_gain_bpb", "golf.eval_seconds", "golf.audit"),
        ("{out}/f1/golf/golf.int6.ptz",),
    ),
    Stage(
        "f4",
        "score pr1094",
        "every scoring of f2's artifact with the audit; what the mixer gains",
        5,
        (scored("pr1094", "f2"),),
        run_figures,
        ("pr1094.bpb", "pr1094.mixer_gain_bpb", "pr1094.eval_seconds", "pr1094.audit"),
        ("{out}/f2/pr1094/pr1094.int6.ptz",),
    ),
    of_shared_trunk(
        "g1",
        "wide",
        "the submissions' network with an MLP of 4 times its width",
        {"MLP_MULT": "4.0"},
    ),
    of_shared_trunk("g2", "shared", "the submissions' network, with our data and export", {}),
    Stage(
        "e",
        "quantization",
        "gap and KL divergence of methods on f1's weights, and coders",
        9,
        (
            Command(
                "quantization",
                "bench/quantization.py",
                FULL | {"VAL_TOKENS": "524288"},
                ("{out}/f1/golf/golf.safetensors",),
                small_args=("{out}/f1/golf/golf.safetensors", "--kl-tokens", "512", "--bits"),
            ),
        ),
        method_figures,
        needs=("{out}/f1/golf/golf.safetensors",),
    ),
)


# --------------------------------------------------------------------------------------------------
# Data
# --------------------------------------------------------------------------------------------------


def unpacked(folder: Path, target: Path) -> Path:
    """The folder or, where it has .bin.xz files, `target` with all of its shards unpacked."""
    packed = sorted(folder.glob("*.bin.xz"))
    if not packed:
        return folder
    target.mkdir(parents=True, exist_ok=True)
    for path in [*packed, *folder.glob("*.bin")]:
        made = target / path.name.removesuffix(".xz")
        if made.exists():
            continue
        if path.suffix == ".bin":
            made.symlink_to(path)
            continue
        print(f"unpacking {path.name}", flush=True)
        part = made.with_suffix(".tmp")
        with lzma.open(path) as source, open(part, "wb") as out:
            shutil.copyfileobj(source, out)
        os.replace(part, made)
    return target


def data_environment(options) -> dict[str, str]:
    """Where train_gpt.py finds --data; {} without it: it looks where it always does."""
    if not options.data:
        return {}
    given = Path(options.data).resolve()
    folder = unpacked(given, options.out / "data")
    tokenizer = (
        Path(options.tokenizer).resolve() if options.tokenizer else given / "tokenizer.model"
    )
    for split in ("train", "val"):
        if not golf.find_shards(str(folder), split):
            raise DayError(f"--data {options.data}: no *_{split}_*.bin or .bin.xz there")
    if not tokenizer.is_file():
        raise DayError(f"{tokenizer}: no tokenizer there; --tokenizer names another")
    try:
        pieces = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer)).get_piece_size()
    except RuntimeError:
        raise DayError(f"{tokenizer}: not a SentencePiece model") from None
    env = {"DATA_PATH": str(folder), "TOKENIZER_PATH": str(tokenizer), "TEXT_FILES": ""}
    return env | {"VOCAB_SIZE": str(pieces)}


def start_corpus(out: Path) -> tuple[Path, str, int]:
    """(folder of the shards, tokenizer, pieces) that stage a ran on."""
    record = json.loads((out / "a/golf/golf.json").read_text("utf-8"))
    corpus = record["corpus"]
    folder = Path(corpus["source"])
    if not golf.find_shards(str(folder), "val"):  # made of text: beside the tokenizer
        folder = Path(corpus["tokenizer"]).parent
    return (
        folder.resolve(),
        str(Path(corpus["tokenizer"]).resolve()),
        record["config"]["vocab_size"],
    )


def long_environment(day) -> dict[str, str]:
    """A validation stream of LONG_TARGETS or more: stage a's, if it is as long as that, else its
    training tokens, over and over, as the only validation shard of a folder of its own, which is
    what --small always tries."""
    folder, tokenizer, pieces = start_corpus(day.out)
    targets = SMALL_LONG_TARGETS if day.small else LONG_TARGETS
    stream = golf.TokenStream(golf.find_shards(str(folder), "val"), pieces)
    if len(stream) <= targets or day.small:
        stream = golf.TokenStream(golf.find_shards(str(folder), "train"), pieces)
        folder = day.out / "d2" / "data"
        folder.mkdir(parents=True)
        golf.write_shard(folder / "long_val_000000.bin", stream.read(0, targets + 1))
    return {"DATA_PATH": str(folder), "TOKENIZER_PATH": tokenizer, "TEXT_FILES": ""}


# --------------------------------------------------------------------------------------------------
# Running
# --------------------------------------------------------------------------------------------------


def device_facts() -> dict:
    """Versions and the GPU, as torch knows them."""
    facts = {"torch": torch.__version__, "cuda": torch.version.cuda, "gpu": "none"}
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        facts |= {"gpu": properties.name, "gpu_memory_bytes": properties.total_memory}
        facts["gpus"] = torch.cuda.device_count()
        with contextlib.suppress(AttributeError, RuntimeError):
            facts["driver_cuda"] = torch._C._cuda_getDriverVersion()
    return facts


def last_line(text: str) -> str:
    """The line that says what went wrong: the last error line, else the last line."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("error: ")]
    return (errors or lines or ["no output"])[-1]


def run_process(command: list[str], env: dict[str, str], log: Path, seconds: float) -> int | None:
    """Exit status of a command whose whole output is appended to the log; None: it was killed with
    all its children after so many seconds."""
    with open(log, "ab") as out:
        process = subprocess.Popen(
            command, env=env, stdout=out, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            return process.wait(max(0.0, seconds))
        except subprocess.TimeoutExpired:
            return None
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


class Day:
    """The stages' files below `out`, and how a stage is run.

    code: SHA-256 of train_gpt.py. data: environment that says where the shards are.
    """

    def __init__(self, options):
        self.out, self.small = options.out, options.small
        self.limit = options.limit
        self.code = hashlib.sha256((ROOT / RUN).read_bytes()).hexdigest()
        self.data: dict[str, str] = {}

    def result(self, stage: Stage) -> dict | None:
        """What a stage's JSON says, if it is of this code and size."""
        try:
            result = json.loads((self.out / f"{stage.letter}.json").read_text("utf-8"))
        except (OSError, ValueError):
            return None
        same = result.get("code_sha256") == self.code and result.get("small") == self.small
        return result if same else None

    def environment(self, stage: Stage, command: Command) -> dict[str, str]:
        """The variables that a command is given on top of the caller's."""
        env = {name: value.format(out=self.out) for name, value in command.env.items()}
        if self.small:
            env |= SMALL | command.small_env
        env |= self.data
        env["LOGS_PATH"] = str(self.out / stage.letter / command.name)
        return env | ({"RUN_ID": command.name} if command.script == RUN else {})

    def arguments(self, command: Command) -> list[str]:
        """The command line."""
        args = command.args
        if self.small and command.small_args is not None:
            args = command.small_args
        shard = ""
        if "{shard}" in args:
            shard = golf.find_shards(str(start_corpus(self.out)[0]), "train")[0]
        filled = (arg.format(out=self.out, shard=shard) for arg in args)
        return [sys.executable, str(ROOT / command.script), *filled]

    def run_command(self, stage: Stage, command: Command, more: dict, seconds: float) -> dict:
        """Run one command; what the stage's JSON says of it, `error` if it failed."""
        env, line = self.environment(stage, command) | more, self.arguments(command)
        log = self.out / f"{stage.letter}.log"
        shown = [*(f"{key}={shlex.quote(value)}" for key, value in env.items()), shlex.join(line)]
        with open(log, "a", encoding="utf-8") as out:
            print("$", *shown, file=out)
        begin, size = time.perf_counter(), log.stat().st_size
        status = run_process(line, os.environ | env, log, seconds)
        taken = time.perf_counter() - begin
        result = {"name": command.name, "command": line, "environment": env}
        result |= {"seconds": round(taken, 1), "exit_status": status}
        if status is None:
            result["error"] = f"{command.name}: killed after {taken:.0f} s"
        elif status:
            result["error"] = last_line(log.read_bytes()[size:].decode("utf-8", "replace"))
        return result

    def work(self, stage: Stage, begin: float) -> list[dict]:
        """Run a stage's commands, also after one that failed; what is to be said of each."""
        for template in stage.needs:
            path = Path(template.format(out=self.out))
            if not path.exists():
                made_by = path.relative_to(self.out).parts[0]
                raise DayError(f"needs {path}, which stage {made_by} leaves")
        more = long_environment(self) if stage.long else {}
        return [
            self.run_command(stage, command, more, self.limit - (time.perf_counter() - begin))
            for command in stage.commands
        ]

    def run(self, stage: Stage) -> dict:
        """Run a stage; its result, which is its JSON."""
        log, folder = self.out / f"{stage.letter}.log", self.out / stage.letter
        shutil.rmtree(folder, ignore_errors=True)
        log.write_text("", "utf-8")
        begin, error = time.perf_counter(), ""
        commands: list[dict] = []
        figures: dict = {}
        try:
            commands = self.work(stage, begin)
            error = next((c["error"] for c in commands if "error" in c), "")
            figures = stage.read(folder, log.read_text("utf-8", errors="replace"))
        except Exception as failure:  # whatever it is, the next stages are worth running
            kind = "" if isinstance(failure, DayError) else f"{type(failure).__name__}: "
            error = error or f"{kind}{failure}"
        for path in folder.rglob(stage.discards or "-"):
            path.unlink()
        result = {
            "stage": stage.letter,
            "name": stage.name,
            "shows": stage.shows,
            "status": "failed" if error else "ok",
            "error": error,
            "small": self.small,
            "seconds": round(time.perf_counter() - begin, 1),
            "figures": figures,
            "commands": commands,
            "ambient": {k: v for k, v in os.environ.items() if k in golf.VARIABLES},
            "device": device_facts(),
            "code_sha256": self.code,
        }
        made = json.dumps(result, indent=1) + "\n"
        golf.write_atomic(self.out / f"{stage.letter}.json", made.encode())
        return result


# --------------------------------------------------------------------------------------------------
# The command line
# --------------------------------------------------------------------------------------------------


def show(value) -> str:
    """A figure, short."""
    if isinstance(value, dict):
        return "{" + " ".join(f"{key}:{show(v)}" for key, v in value.items()) + "}"
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def main_figures(stage: Stage, figures: dict) -> str:
    """The figures that a stage shows, as far as there are any."""
    words = []
    for name in stage.shown:
        value = figures
        for key in name.split("."):
            value = value.get(key) if isinstance(value, dict) else None
        if value is not None:
            words.append(f"{name}:{show(value)}")
    return "  ".join(words) or f"{len(figures)} figures"


def table(day: Day) -> list[str]:
    """A line of each stage that has a result: stage, status, seconds, main figures or error."""
    lines = []
    for stage in STAGES:
        result = day.result(stage)
        if result:
            text = result["error"] or main_figures(stage, result["figures"])
            name = f"{stage.letter} {stage.name}"
            lines.append(f"{name:16} {result['status']:7}{result['seconds']:>7.1f} s  {text}")
    return lines


def listing() -> list[str]:
    """A line of each stage."""
    lines = [f"{s.letter:3} {s.name:13} {s.minutes:>2} min  {s.shows}" for s in STAGES]
    return [*lines, f"together {sum(s.minutes for s in STAGES)} min"]


def chosen(only: str) -> list[Stage]:
    """The stages whose letters begin with one of --only's; all without it."""
    wanted = [part.strip() for part in only.split(",") if part.strip()]
    for part in wanted:
        if not any(stage.letter.startswith(part) for stage in STAGES):
            letters = ", ".join(stage.letter for stage in STAGES)
            raise DayError(f"--only {part}: no such stage; there are {letters}")
    return [s for s in STAGES if not wanted or s.letter.startswith(tuple(wanted))]


def arguments():
    """The command line's options."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--list", action="store_true", help="say what the stages are, run none")
    parser.add_argument("--only", default="", help="letters of stages, separated by ','")
    parser.add_argument("--force", action="store_true", help="repeat what has finished")
    parser.add_argument("--small", action="store_true", help="tiny sizes, on a CPU")
    parser.add_argument("--out", type=Path, default=Path("logs/gpu-day"), help="folder of results")
    parser.add_argument("--data", default="", help="folder of shards, .bin or .bin.xz")
    parser.add_argument("--tokenizer", default="", help="theirs; FOLDER/tokenizer.model")
    parser.add_argument("--limit", type=float, default=LIMIT_SECONDS, help="seconds of a stage")
    options = parser.parse_args()
    options.out = options.out.resolve()
    return options


def run_stages(day: Day, options) -> int:
    """Run what is asked for and not finished; the exit status."""
    stages, failed = chosen(options.only), []
    options.out.mkdir(parents=True, exist_ok=True)
    day.data = data_environment(options)
    for stage in stages:
        done = day.result(stage)
        if done and done["status"] == "ok" and not options.force:
            print(f"{stage.letter}: finished in {done['seconds']} s, skipped (--force repeats it)")
            continue
        print(f"{stage.letter}: {stage.name}, about {stage.minutes} min", flush=True)
        if day.run(stage)["status"] != "ok":
            failed.append(stage.letter)
    print("\n".join(table(day)))
    return 1 if failed else 0


def main() -> int:
    """The exit status."""
    options = arguments()
    day = Day(options)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # ends the running command as well
    try:
        if options.list:
            print("\n".join([*listing(), *table(day)]))
            return 0
        return run_stages(day, options)
    except (DayError, golf.RunError, OSError, lzma.LZMAError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
