"""What a run's record is turned into for people: a picture, and the challenge's submission.json.

    python tools/report.py logs/<run_id>.json     writes both anew from the record
"""

import collections
import io
import json
import sys
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import train_gpt as golf  # noqa: E402

PANELS = (("Training loss", "step", "nats per token"),
          ("Validation during training", "step", "bits per byte"),
          ("Score along the stream", "targets scored", "bits per byte"),
          ("Longest matching order", "order (0: none)", "% of targets; % of its hints right"))

def plot(record: dict) -> bytes:
    """Four panels as PNG, 1200 x 900: training, validation, running score, orders; b"" without
    matplotlib, so that nobody loses a score for a picture."""
    try:
        import matplotlib
    except ImportError:
        return b""
    matplotlib.use("Agg")
    from matplotlib import pyplot
    figure, axes = pyplot.subplots(2, 2, figsize=(12, 9), layout="constrained")
    (loss, validation), (curve, orders) = axes
    scale, train, checks = loss.twinx(), record["train"], record["validation"]
    steps = [r["step"] for r in train]
    loss.plot(steps, [r["train_loss"] for r in train], color="C0")
    scale.plot(steps, [r["lr_scale"] for r in train], color="C7", linestyle="--")
    scale.set(ylabel="lr scale (dashed)", ylim=(0, 1.05))
    validation.plot([r["step"] for r in checks], [r["val_bpb"] for r in checks], "o-")
    for row in record["curves"]:
        skip = len(row["bpb"]) // 50  # the first few targets are noise
        curve.plot(row["targets"][skip:], row["bpb"][skip:], label=row["scoring"])
    for row in record["matched_orders"]:
        count = np.array(row["count"])
        line = orders.plot(100 * count / sum(count), "o-", label=f"{row['scoring']}: targets")
        if "right" in row:
            right = np.pad(row["right"], (0, len(count) - len(row["right"])))
            orders.plot(100 * right / count.clip(1), "x:", label="right hints",
                        color=line[0].get_color())
    for axis, (title, x, y) in zip(axes.flat, PANELS):
        axis.set(title=title, xlabel=x, ylabel=y)
        axis.grid(alpha=0.3)
        if axis.get_legend_handles_labels()[0]:
            axis.legend()
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=100)
    pyplot.close(figure)
    return image.getvalue()

def pictured(evaluation) -> dict:
    """What the plot shows of an evaluation and its result lines do not."""
    return dict(curves=curves(evaluation), matched_orders=orders(evaluation))

def orders(evaluation) -> list[dict]:
    """Targets by longest matching order, and of the calibrated mixer those with a right hint."""
    e, out, end = evaluation, [], len(evaluation.data.val) - 1
    if "calibrated" in e.rows:
        inputs = e.mix_inputs(end)
        order = inputs.hint_key // (golf.SHARES * 3 * 2**len(golf.SHORT_ORDERS))
        out.append(dict(scoring="calibrated", count=order.bincount().tolist(),
                        right=order[inputs.is_hint].bincount().tolist()))
    for scoring, rule in e.rules.items():
        spans = e.neural.grid.spans if rule.cold else [(0, end)]
        order = torch.cat([golf.backoff_columns(
            rule.counted(e.neural.tokens, span, e.cfg), rule.match, e.cfg).order
            for span in spans if span[0] < span[1]])
        out.append(dict(scoring=scoring, count=order.long().bincount().tolist()))
    return out

def curves(evaluation) -> list[dict]:
    """The scores along the stream: bits per byte of the first k targets at 200 places."""
    byte_counts, out = evaluation.data.table.target_bytes(evaluation.data.val).numpy(), []
    for scoring, logp in evaluation.logp.items():
        at = np.linspace(1, len(logp), 200).astype(int) - 1
        bits = -logp.numpy().cumsum()[at] / np.log(2)
        out.append(dict(scoring=scoring, targets=(at + 1).tolist(),
                        bpb=(bits / byte_counts.cumsum()[at].clip(1)).tolist()))
    return out

def score_table(evaluation) -> list[str]:
    """The scorings, best first, below a unigram model of the same targets for comparison."""
    data, lines = evaluation.data, [f"{'scoring':20} {'val_bpb':>10} {'mass':>12}  normalized"]
    counts = np.bincount(data.val[1:].numpy())
    counts = counts[counts > 0]
    bits = float((counts * np.log2(counts.sum() / counts)).sum())
    for scoring, row in sorted(evaluation.rows.items(), key=lambda item: item[1]["val_bpb"]):
        mark = "  <- headline" if scoring == evaluation.headline else ""
        lines.append(f"{scoring:20} {row['val_bpb']:10.6f} {row['mass']:12.6g}  "
                     f"{row['normalized']}{mark}")
    unigram = bits / int(data.table.target_bytes(data.val).sum())
    return [*lines, f"{'(unigram, fitted)':20} {unigram:10.6f}"]

def submission(record: dict) -> bytes:
    """The run in the form of the challenge's submission.json."""
    facts, final, config = record["facts"], record["final"][-1], record["config"]
    trained, budgets = (record["trained"] or [{}])[-1], record["budget"]
    used = {row["name"]: row["used"] for row in budgets}
    gpu, world = facts["gpu"], facts["world_size"]
    hardware = f"{world}x {gpu}" if gpu != "none" else (
        f"{facts['cores']} CPU cores, {facts['machine']}")
    out = {key: config[key] for key in ("author", "github_id", "recipe", "scale", "seed")}
    out |= dict(name=config["run_id"]) | {key: final[key] for key in (
        "val_loss", "val_bpb", "scoring")}
    out |= dict(
        normalized=final["normalized"] == "yes", bytes_total=final["total_bytes"],
        bytes_code=facts["code_bytes"], steps=trained.get("steps"),
        train_seconds=trained.get("train_seconds"), eval_seconds=used["eval_seconds"],
        audit={row["name"]: row["verdict"] for row in record.get("audit", [])},
        hardware=hardware, torch=facts["torch"], corpus=record["corpus"],
        revision=facts["revision"])
    return json.dumps(out, indent=1).encode()

if __name__ == "__main__":
    for path in map(Path, sys.argv[1:]):
        run = collections.defaultdict(list, json.loads(path.read_text()))
        path.with_suffix(".png").write_bytes(plot(run))
        path.with_suffix(".submission.json").write_bytes(submission(run))
