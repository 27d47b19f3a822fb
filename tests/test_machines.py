"""Machines as people have them: each test takes something away that this one has."""

import dataclasses
import types

import pytest
import torch

import train_gpt as golf


@pytest.fixture
def without_constriction(tmp_path):
    """PYTHONPATH of a Python that has no package constriction, as on Linux on ARM."""
    (tmp_path / "constriction.py").write_text("raise ImportError('no wheel for this machine')\n")
    return str(tmp_path)


def test_without_constriction_one_line_says_what_works_and_that_works(job, without_constriction):
    own = dict(PYTHONPATH=without_constriction, NGRAM_ENABLED="0", ITERATIONS="1")
    for missing, told in [
        (dict(AUDIT="1"), "COMPRESSOR=lzma AUDIT=0 does without it"),
        (dict(AUDIT="0"), "COMPRESSOR=lzma does without it"),
        (dict(AUDIT="strict", COMPRESSOR="zstd"), "AUDIT=0 does without it"),
    ]:
        done = job(**own | missing)
        assert done.returncode == 2 and told in done.stderr, done.stderr
        assert len(done.stderr.splitlines()) == 1 and "constriction" in done.stderr
    done = job(**own | dict(AUDIT="0", COMPRESSOR="lzma"))
    assert done.returncode == 0 and done.final.startswith("final "), done.stderr


def test_without_constriction_an_artifact_of_ans_is_refused(data, trained, monkeypatch):
    blob = (trained.logs / "golf-demo-1337.int6.ptz").read_bytes()
    monkeypatch.setattr(golf, "constriction", None)
    vocabulary = trained.record["corpus"]["vocabulary_sha256"]
    cfg = golf.replace(data[0], load_artifact="x")
    with pytest.raises(golf.RunError, match="need the package constriction"):
        golf.unpack(blob, cfg, vocabulary)


@pytest.mark.parametrize(
    "mode, scale, ends", [("auto", "demo", 0), ("1", "demo", 2), ("auto", "full", 2)]
)
def test_a_gpu_without_a_c_compiler_is_found_before_the_data(data, monkeypatch, mode, scale, ends):
    cfg, run, _ = data
    cfg = golf.replace(cfg, compile=mode, scale=scale)
    monkeypatch.setattr(golf, "compiles", lambda cfg, run, pays=False: cfg.compile != "0")

    def failing(*_):
        raise RuntimeError("Failed to find C compiler. Please specify via CC\n\nSet TORCH_LOGS")

    monkeypatch.setattr(golf, "compiled", lambda *_: failing)
    if not ends:
        assert golf.try_compiler(cfg, run).compile == "0"
        return
    with pytest.raises(golf.RunError, match=r"cannot compile here \(Failed to find C.*COMPILE=0"):
        golf.try_compiler(cfg, run)


def test_a_compiler_that_works_changes_nothing(data):
    cfg, run, _ = data
    assert golf.try_compiler(golf.replace(cfg, compile="0"), run).compile == "0"
    cfg = golf.replace(cfg, compile="1")
    assert golf.try_compiler(cfg, run) is cfg


def test_options_that_an_older_torch_does_not_know_are_left_out(data, monkeypatch):
    cfg, run, _ = data
    used = {}
    monkeypatch.setattr(torch, "compile", lambda function, **values: used.update(values))
    golf.compiled(len, golf.replace(cfg, compile="1"), run, golf.DETERMINISTIC)
    assert used["options"] == golf.COMPILE_OPTIONS | golf.DETERMINISTIC
    monkeypatch.setattr(torch._inductor, "list_options", lambda: ["triton.mix_order_reduction"])
    golf.compiled(len, golf.replace(cfg, compile="1"), run, golf.DETERMINISTIC)
    assert used["options"] == golf.COMPILE_OPTIONS


@pytest.mark.parametrize("world_size, back_end", [(1, "gloo"), (2, None)])
def test_a_gpu_without_nccl_is_enough_for_one_rank(monkeypatch, world_size, back_end):
    """PyTorch for Windows, and builds without it."""
    asked = []
    monkeypatch.setattr(golf.dist, "init_process_group", lambda name, **_: asked.append(name))
    monkeypatch.setattr(golf.dist, "is_nccl_available", lambda: False)
    run = types.SimpleNamespace(world_size=world_size, rank=0, device=torch.device("cuda:0"))
    if back_end:
        golf.Run.join(run, golf.Config())
        assert asked == [back_end]
        return
    with pytest.raises(golf.RunError, match="has no NCCL.*run one process, or set DEVICE=cpu"):
        golf.Run.join(run, golf.Config())


def test_with_nccl_ranks_use_it(monkeypatch):
    asked = []
    monkeypatch.setattr(golf.dist, "init_process_group", lambda name, **_: asked.append(name))
    monkeypatch.setattr(golf.dist, "is_nccl_available", lambda: True)
    run = types.SimpleNamespace(world_size=8, rank=0, device=torch.device("cuda:0"))
    golf.Run.join(run, golf.Config())
    assert asked == ["cpu:gloo,cuda:nccl"]


@pytest.mark.parametrize("pieces, tokens, windows", [(1024, 98304, 128), (8192, 16384, 128)])
def test_the_logits_of_a_large_vocabulary_fit_into_a_small_gpu(pieces, tokens, windows):
    """In training, validation and scoring; what was asked for by name is taken as it is."""
    cfg = golf.replace(golf.Config(), vocab_size=pieces)
    assert golf.fit_micro_batch(cfg, 1) == tokens
    asked = golf.replace(cfg, micro_batch_tokens=65536)
    assert golf.fit_micro_batch(asked, 1) == 65536
    assert golf.Grid(10**6, cfg, 64, 1).batch_windows == windows
    for stride, batch in ((1024, 128), (cfg.eval_seq_len, 32)):
        grid = golf.Grid(10**6, cfg, stride, 1, batch)
        assert grid.batch_windows == min(batch, golf.MOST_LOGITS // stride // pieces)
        assert grid.batch_windows * grid.last * pieces <= golf.MOST_LOGITS


@pytest.mark.parametrize("cores, threads", [(2, 1), (16, 2), (64, 2)])
def test_on_many_cores_a_rank_takes_few(monkeypatch, cores, threads):
    """A small network's operations are too short to be shared by eight threads."""
    told = []
    launcher = golf.Launcher.__new__(golf.Launcher)
    launcher.cores, launcher.count, launcher.others = cores, min(8, cores), []
    monkeypatch.setattr(torch, "get_num_threads", lambda: cores)
    monkeypatch.setattr(torch, "set_num_threads", told.append)
    monkeypatch.setattr(golf.multiprocessing, "get_context", lambda _: FakeContext)
    monkeypatch.setattr(golf.threading, "Thread", lambda **_: types.SimpleNamespace(start=int))
    monkeypatch.setattr(golf.os, "environ", {})
    launcher.start()
    assert told == [threads] and golf.os.environ["OMP_NUM_THREADS"] == str(threads)
    launcher.others = []
    launcher.end()


class FakeContext:
    """Starts nobody."""

    @staticmethod
    def Process(**_):
        return types.SimpleNamespace(start=lambda: None, sentinel=0)


@pytest.mark.parametrize("found", ["cpu", "cuda", "mps", "xpu"])
def test_auto_takes_cuda_and_other_accelerators_only_by_name(monkeypatch, found):
    monkeypatch.setattr(golf, "accelerator", lambda: found)
    cfg = golf.Config()
    assert golf.device_type(cfg) == ("cuda" if found == "cuda" else "cpu")
    assert golf.device_type(golf.replace(cfg, device="cpu")) == "cpu"
    named = golf.replace(cfg, device=found)
    if found == "mps":  # no float64
        with pytest.raises(golf.RunError, match="float64.*DEVICE=cpu"):
            golf.device_type(named)
    else:
        assert golf.device_type(named) == found
    other = dataclasses.replace(cfg, device="cuda" if found != "cuda" else "xpu")
    with pytest.raises(golf.RunError, match="finds .* here; set DEVICE=cpu"):
        golf.device_type(other)
