"""Shared fixtures: a small corpus of real text, and runs through the real command line."""

import json
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

# Two busy-waiting threads a process are slower than one wherever the cores are shared.
os.environ["OMP_NUM_THREADS"] = "1"

import _pytest
import pytest
import torch
from hypothesis import settings

import forked
import train_gpt as golf

ROOT = Path(__file__).resolve().parent.parent
AT_IMPORT = {"OMP_NUM_THREADS", "PYTHONPATH"}  # variables that only a fresh Python heeds
# One folder of compiled graphs for all runs of all workers and suites, for this processor.
GRAPHS = Path(tempfile.gettempdir(), "train_gpt_tests", golf.kept_graphs().name)
COMPILED = {"TORCHINDUCTOR_CACHE_DIR": str(GRAPHS)}
os.environ |= COMPILED
# Under `nohup`, or in a shell's background, all runs would ignore the signals that tests send.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)

settings.register_profile("golf", derandomize=True, deadline=None, max_examples=40)
settings.load_profile("golf")

# A network of seconds: every mechanism is there, the sizes are not.
TINY = dict(
    SCALE="demo",
    NUM_LAYERS="5",
    MODEL_DIM="32",
    NUM_HEADS="4",
    NUM_KV_HEADS="2",
    ROPE_DIMS="4",
    TRAIN_SEQ_LEN="64",
    EVAL_SEQ_LEN="64",
    EVAL_STRIDE="16",
    TRAIN_BATCH_TOKENS="1536",
    VAL_TOKENS="4096",
    VOCAB_SIZE="512",
    BIGRAM_VOCAB_SIZE="64",
    BIGRAM_DIM="8",
    VE_DIM="8",
    EVAL_BATCH_WINDOWS="8",
    ITERATIONS="6",
    MAX_WALLCLOCK_SECONDS="0",
    NGRAM_BUCKETS="1024",
    MIXER_CHUNK_TOKENS="256",
    AUDIT="0",
    PICTURE="0",
    AUTHOR="a tester",
)

# As many blocks as the challenge's networks have, where what is tested lies between some of them.
ALL_LAYERS = {"NUM_LAYERS": str(golf.Config.num_layers)}
# The network of golf at full size, in place of the one that it shares with the submissions at demo
# scale: loops, lanes, gates and their optimizer.
FRONTIER = ALL_LAYERS | {name.upper(): str(getattr(golf.Config, name)) for name in golf.SHARED}
# The same with fewer visits, for what is compiled.
FEW_BLOCKS = FRONTIER | dict(
    NUM_LAYERS="3", LOOP_FIRST="1", LOOP_LAST="1", LOOP_PASSES="2", LANES_FROM="2"
)


def pytest_collection_modifyitems(items):
    """Mark as `fast` what starts no run: `pytest -m fast` is a first check of a change."""
    for item in items:
        starts_runs = "job" in item.fixturenames
        if not starts_runs and not item.get_closest_marker("slow"):
            item.add_marker(pytest.mark.fast)


@pytest.fixture(scope="session")
def text_folder(tmp_path_factory):
    """A folder with 35 text files: pytest's own sources, which are pinned. Those of Python differ
    from one of its releases to the next, and with them what is held out."""
    folder = tmp_path_factory.mktemp("text")
    for path in sorted(Path(_pytest.__file__).parent.glob("*.py"))[:35]:
        (folder / f"{path.stem}.txt").write_bytes(path.read_bytes())
    return folder


@pytest.fixture(scope="session")
def workplace(text_folder, tmp_path_factory):
    """A folder to run in, and the environment of a tiny run there."""
    folder = tmp_path_factory.mktemp("work")
    paths = dict(TEXT_FILES=f"{text_folder}/*.txt", PREPARED_PATH=str(folder / "data"))
    return folder, TINY | paths


@pytest.fixture(scope="session")
def job(workplace):
    """job(processes=1, **variables) -> CompletedProcess of a run, with `.record` and `.final`.

    processes: above 1 they are torchrun's. fresh: by a new Python, not by a fork (forked.py).
    """
    folder, base = workplace
    count = iter(range(10**6))

    def run(processes=1, wait=True, drop=(), fresh=False, **variables):
        logs = folder / f"logs{next(count)}"
        env = {k: v for k, v in (base | variables).items() if k not in drop}
        own = {"PATH": os.environ["PATH"], "LOGS_PATH": str(logs), "OMP_NUM_THREADS": "1"}
        env = own | COMPILED | env
        launch = [sys.executable]
        if processes > 1:
            launch += ["-m", "torch.distributed.run", "--standalone"]
            launch += [f"--nproc_per_node={processes}"]
        program = str(ROOT / "train_gpt.py")
        if processes == 1 and not (fresh or AT_IMPORT & variables.keys()):
            process = forked.ForkedRun(program, folder, env)
        else:
            process = subprocess.Popen(
                [*launch, program],
                cwd=folder,
                env=env,
                text=True,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
            )
        if not wait:
            return process
        out, err = process.communicate(timeout=900)  # compilation on slow, shared cores
        done = subprocess.CompletedProcess(launch, process.returncode, out, err)
        done.logs, records = logs, sorted(logs.glob("*[0-9].json")) if logs.exists() else []
        done.record = json.loads(records[0].read_text()) if records else None
        done.final = out.strip().splitlines()[-1] if out.strip() else ""
        return done

    return run


@pytest.fixture(scope="session")
def trained(job):
    """A finished tiny run of the default recipe, the one that is audited."""
    done = job(fresh=True, AUDIT="strict", PICTURE="1")
    assert done.returncode == 0, done.stderr
    return done


@pytest.fixture(scope="session", autouse=True)
def run(workplace, tmp_path_factory):
    """The only rank of a run in this process."""
    env = workplace[1] | dict(LOGS_PATH=str(tmp_path_factory.mktemp("logs")))
    cfg, _ = golf.load_config(env)
    own = golf.Run(cfg)
    own.open_log(cfg)
    return own


@pytest.fixture(scope="session")
def data(workplace, run):
    """(Config, Run, Data) of the tiny corpus, in this process."""
    cfg, _ = golf.load_config(workplace[1])
    return cfg, run, golf.load_data(cfg, run)


@pytest.fixture
def tiny_model():
    """tiny_model(**config values) -> (Config, initialized GPT) with every option's parameters
    away from their starting zeros, so that each of them matters."""

    def make(**values):
        cfg, _ = golf.load_config(TINY | ALL_LAYERS)
        cfg = golf.replace(cfg, **values)
        golf.check_config(cfg)
        model = golf.GPT(cfg, golf.sdpa_attention).initialize(cfg.seed)
        generator = torch.Generator().manual_seed(5)
        with torch.no_grad():
            for p in model.parameters():
                p.add_(0.1 * torch.randn(p.shape, generator=generator))
        return cfg, model

    return make
