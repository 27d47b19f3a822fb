"""bench/ingredients.py: its arms are what they are called, and its table what the records say."""

import json
import os
import subprocess
import sys
import types

import pytest

import ingredients
import train_gpt as golf


def config(settings):
    """The Config of an arm's run."""
    return golf.load_config(ingredients.proxy() | settings)[0]


def test_one_arm_is_golfs_network_and_another_the_submissions():
    chosen, old = (config(ingredients.arms()[name].settings) for name in ("golf", "old"))
    assert {name: getattr(old, name) for name in golf.SHARED} == golf.SHARED
    assert all(getattr(chosen, n) == getattr(golf.Config, n) for n in golf.SHARED)


@pytest.mark.parametrize("name", ingredients.INGREDIENTS)
def test_an_ingredient_is_in_one_arm_and_out_of_the_other(name):
    arms, own = ingredients.arms(), ingredients.INGREDIENTS[name]
    left_out = name == ingredients.LEFT_OUT
    minus = arms["golf" if left_out else f"minus_{name}"].settings
    plus, whole = arms[f"plus_{name}"].settings, arms["whole"].settings
    assert plus == own and not own.keys() & minus.keys() and own | minus == whole
    assert config(plus) != config({}) and config(minus) != config(whole)
    if not left_out:
        less, golfs = arms[f"golf_minus_{name}"], arms["golf"].settings
        assert less.base == "golf" and less.settings == {k: golfs[k] for k in golfs if k not in own}


def test_every_arm_is_compared_with_an_arm():
    arms = ingredients.arms()
    assert [name for name, arm in arms.items() if arm.base not in arms] == ["old"]


@pytest.mark.parametrize("width", [32, 64, 512])
def test_the_proxy_is_the_full_size_in_proportion(width):
    base = ingredients.proxy(width, 77)
    cfg, full = golf.load_config(base)[0], golf.replace(golf.Config(), **golf.SHARED)
    assert (cfg.num_layers, cfg.model_dim, cfg.iterations) == (11, width, 77)
    for name in ("bigram_vocab_size", "bigram_dim", "ve_dim"):
        assert getattr(cfg, name) / width == getattr(full, name) / full.model_dim, name
    size = ingredients.budget_bytes(base) - golf.code_bytes()
    wide = golf.GPT(golf.replace(cfg, mlp_mult=4.0), None)
    assert 8 * size == pytest.approx(3.9 * sum(p.numel() for p in wide.parameters()), abs=8)


def test_a_run_that_was_killed_is_made_again_under_its_name(tmp_path, monkeypatch):
    """Its files would give the new run's another one; a finished run stays."""
    (tmp_path / "old-1.txt").write_text("step 3 of 1200")
    (tmp_path / "old-13.txt").write_text("another")
    started = []

    def run(command, env, **_):
        started.append((env["RUN_ID"], sorted(path.name for path in tmp_path.iterdir())))
        (tmp_path / f"{env['RUN_ID']}.json").write_text("{}")
        return types.SimpleNamespace(stdout=b"", stderr=b"final")

    monkeypatch.setattr(ingredients.subprocess, "run", run)
    assert ingredients.train("old", 1, {}, tmp_path, ingredients.proxy()) == "old-1: final"
    assert ingredients.train("old", 1, {}, tmp_path, ingredients.proxy()) == "old-1: kept"
    assert started == [("old-1", ["old-13.txt"])]


def test_the_table_is_of_the_seeds_that_both_have(tmp_path, capsys):
    def record(name, before, after):
        found = {
            "validation": [{"val_bpb": 9.0}, {"val_bpb": before}],
            "result": [{"val_bpb": 9.0}, {"val_bpb": after}],
            "trained": [{"train_seconds": 60.0, "steps": 1200}],
            "model": [{"parameters": 145392}],
            "artifact": [{"artifact_bytes": 81850}],
        }
        (tmp_path / f"{name}.json").write_text(json.dumps(found))

    record("old-1", 2.10, 2.12)
    record("old-2", 2.11, 2.13)
    record("plus_loop-1", 2.08, 2.09)
    record("plus_loop-2", 2.09, 2.11)
    record("plus_loop-3", 2.00, 2.01)
    record("plus_lanes-2", 2.10, 2.1180)
    (tmp_path / "plus_loop-1.submission.json").write_text("{}")
    ingredients.report(tmp_path)
    *lines, last = capsys.readouterr().out.splitlines()
    old, loop, lanes = ([cell.strip() for cell in line.split("|")][1:-1] for line in lines[2:])
    sizes = ["2", "145,392", "81,850"]
    assert old == ["old", *sizes, "2.1050", "2.1250", "0.0200", "0.0100", "", "", "", ""]
    assert loop[:2] == ["plus_loop", "3"]
    assert loop[8:] == ["old", "-0.0250", "-0.0300 -0.0200", "better"]
    assert lanes[8:] == ["old", "-0.0120", "-0.0120", "nothing shown"]
    assert last.endswith(" 0.0071")  # 0.005 to either side, one degree of freedom


def test_what_does_not_exist_is_refused(monkeypatch, capsys):
    for words, told in (("--only odl --report", "no odl; arms are old,"), ("", "--data: a folder")):
        monkeypatch.setattr(sys, "argv", ["ingredients.py", *words.split()])
        with pytest.raises(SystemExit):
            ingredients.main()
        assert told in capsys.readouterr().err


def test_the_deviation_is_pooled():
    own = [[0.1, 0.3, 0.5], [0.2, 0.4], [0.7], []]
    squares = 0.04 + 0.0 + 0.04 + 0.01 + 0.01
    assert ingredients.deviation(own) == pytest.approx((squares / 3) ** 0.5)


def test_without_a_second_seed_nothing_is_shown():
    pooled = ingredients.deviation([[], [-0.3], [0.2]])
    assert [ingredients.verdict(own, pooled) for own in ([], [-0.3])] == ["", "nothing shown"]
    assert ingredients.verdict([0.01, 0.02], 0.005) == "worse"
    assert ingredients.verdict([0.01], 0.005) == "nothing shown"


@pytest.mark.slow  # starts a process
def test_a_trainings_time_is_that_of_its_steps_with_and_without_the_loop():
    small = {"MODEL_DIM": "32", "NUM_HEADS": "4", "NUM_KV_HEADS": "2", "ROPE_DIMS": "4"}
    command = [sys.executable, ingredients.__file__, "--step-times", "--only", "old,plus_loop"]
    done = subprocess.run(
        [*command, "--seconds", "0"],
        env=os.environ | small | {"TRAIN_SEQ_LEN": "64", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    old, loop = (line.split("|")[1:-1] for line in done.stdout.splitlines()[-2:])
    plain, once, looped = (float(cell) for cell in (old[1], *loop[1:3]))
    assert not old[2].strip() and float(old[3]) == 1 and looped > once
    # Milliseconds are rounded to whole ones; the loop is on for 65 % of a training.
    expected = (0.35 * once + 0.65 * looped) / plain
    assert float(loop[3]) == pytest.approx(expected, abs=2 / plain)
