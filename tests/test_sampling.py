"""SAMPLE: text that goes on, drawn from the distributions by which it would be scored."""

import numpy as np
import pytest
import torch

import train_gpt as golf


def test_an_artifact_goes_on_from_a_prompt(job, trained):
    artifact = str(trained.logs / "golf-demo-1337.int6.ptz")
    more = dict(LOAD_ARTIFACT=artifact, SAMPLE="import os, ", EVAL_STRIDE="8")
    one = job(**more)
    assert one.returncode == 0, one.stderr
    network, mixer = one.stdout.split("sample of the ")[1:]
    assert network.startswith("network:\nimport os, ") and mixer.startswith("mixer:\nimport os, ")
    assert network.split(":\n")[1] != mixer.split(":\n")[1]
    assert "\nfinal " not in one.stdout
    assert [path.stem for path in one.logs.iterdir()] == ["golf-sample-1337"]
    again = job(**more, NGRAM_ENABLED="0").stdout.split("sample of the ")[1:]
    assert again == [network]  # the same seed, and no mixer
    with pytest.raises(golf.RunError, match="SAMPLE=x: must be empty without LOAD_ARTIFACT"):
        golf.load_config(dict(SAMPLE="x"))
    long = job(**more | dict(SAMPLE="word " * 20_000))
    assert long.returncode == 2 and "SAMPLE" in long.stderr


def test_a_sample_does_nothing_to_a_terminal():
    told = golf.printable("a\tb\n\x1b[2J\r\x07\x9bñ\u202e\ue000'\\\udce4")
    assert told == "a\\tb\\n\\x1b[2J\\r\\x07\\x9bñ\\u202e\\ue000'\\\\udce4"
    long = golf.printable("a" * 10**6)
    assert len(long) < 1.1 * golf.LONGEST_LINE and " 996000 characters " in long


def test_an_untrained_networks_sample_is_printable(monkeypatch, data, capsys):
    """Whatever the tokens are; its lines stay lines."""
    cfg, run, corpus = data
    tokens = torch.tensor(corpus.tokenizer.encode("x\n\x1b]0;title\x07 y\nverdict"))
    monkeypatch.setattr(golf, "continue_tokens", lambda *_: tokens)
    golf.sample(None, corpus, golf.replace(cfg, sample="x"), run)
    lines = capsys.readouterr().out.splitlines()
    assert all(line.isprintable() for line in lines)
    assert "\\x1b]0;title\\x07 y" in lines
    assert sum(line.startswith("sample of the ") for line in lines) == 2


@pytest.mark.slow
@pytest.mark.parametrize("scoring", ["neural", "calibrated"])
def test_tokens_are_drawn_from_the_scored_distribution(data, tiny_model, scoring):
    """Their mean log-probability is, on average, minus the entropy of what they are drawn from."""
    _, run, corpus = data
    cfg, model = tiny_model()
    own = golf.replace(cfg, scoring=scoring, eval_batch_windows=1, eval_stride=8)
    history, surprises = corpus.val[: 1 + 64 + 8], []
    for seed in range(30):
        tokens = golf.continue_tokens(model, history, own, run, np.random.default_rng(seed))
        assert len(tokens) == 8
        stream = torch.cat([history, tokens])
        end = len(stream) - 1
        places = golf.Places([], len(history) - 1, end, [(len(history) - 1, end)])
        evaluation = golf.evaluate_alone(model, stream, own, run, places)
        if scoring == "calibrated":
            evaluation.mixed_calibrated()
        windows = golf.CodedWindows(evaluation, places.coded, stream)
        windows.tokens[0].copy_(stream)
        logits = windows.logits()
        for target in range(len(history) - 1, end):
            logp = windows.predict(logits, 0, target)
            surprises.append(float(-logp[stream[target + 1]] + (logp.exp() * logp).sum()))
    mean, error = np.mean(surprises), np.std(surprises) / len(surprises) ** 0.5
    assert abs(mean) < 4 * error and error < 0.15, (mean, error)
