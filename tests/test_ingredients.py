"""bench/ingredients.py: its arms are what they are called, and its table what the records say."""

import json
import types

import pytest

import ingredients
import train_gpt as golf


def config(settings):
    """The Config of an arm's run."""
    return golf.load_config(ingredients.PROXY | ingredients.OLD | settings)[0]


def test_one_arm_is_golfs_network_and_another_the_submissions():
    chosen, old = (config(ingredients.arms()[name]) for name in ("golf", "old"))
    assert {name: getattr(old, name) for name in golf.SHARED} == golf.SHARED
    assert all(getattr(chosen, n) == getattr(golf.Config, n) for n in golf.SHARED)


@pytest.mark.parametrize("name", ingredients.INGREDIENTS)
def test_an_ingredient_is_in_one_arm_and_out_of_the_other(name):
    arms, own = ingredients.arms(), ingredients.INGREDIENTS[name]
    minus = arms["golf" if name == ingredients.LEFT_OUT else f"minus_{name}"]
    plus, whole = arms[f"plus_{name}"], arms["whole"]
    assert plus == own and not own.keys() & minus.keys() and own | minus == whole
    assert config(plus) != config({}) and config(minus) != config(whole)


def test_the_budget_binds_by_the_widest_arm(tmp_path):
    size = ingredients.budget_bytes(tmp_path) - golf.code_bytes()
    model = golf.GPT(config(ingredients.INGREDIENTS["mlp4"]), None)
    assert 8 * size == pytest.approx(3.9 * sum(p.numel() for p in model.parameters()), abs=8)


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
    assert ingredients.train("old", 1, {}, tmp_path, tmp_path) == "old-1: final"
    assert ingredients.train("old", 1, {}, tmp_path, tmp_path) == "old-1: kept"
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
    (tmp_path / "plus_loop-1.submission.json").write_text("{}")
    ingredients.report(tmp_path)
    lines = capsys.readouterr().out.splitlines()
    old, plus = ([cell.strip() for cell in line.split("|")] for line in lines[2:])
    assert old[1:9] == ["old", "2", "145,392", "81,850", "2.1050", "2.1250", "0.0200", "0.0100"]
    assert plus[1:3] == ["plus_loop", "3"] and plus[9] == "-0.0250"
    assert plus[10] == "-0.0300 -0.0200" and plus[11] == "50"
