"""Figures, read from what the stages of bench/gpu_visit.py print.

A log's lines have the seconds since the stage began in front (`Line`). So a stage that was killed
has figures too, and what the program does not time can be read off.
"""

import re
from typing import NamedTuple

STAMP = re.compile(r"\s*(\d+\.\d\d)  (.*)")
PAIR = re.compile(r"(\w+):(\S+)")
ATTENTION = re.compile(r"model .*attention:(.+?) compute:")
LOOP_MARGIN = 0.03  # part of the training around the loop's start that counts on neither side
LOOP_FROM = 0.35  # golf's
# What of a log is worth a line of the summary, beside its figures.
TOLD = re.compile(
    r"(facts|computing|attention|model|warmup|expected|trained|calibration|artifact|headline)\b"
    r"|(result|audit \w+ (PASS|FAIL)|budget|verdict|final|warning|training_step)\b"
    r"|  (ours|plain|gradients|movement|averaged)\b|\s*[\d,]+ .*\d$|\w*[eE]rror\b"
)
STEPS_TOLD, LAST_TOLD, WIDEST = 8, 15, 300  # lines of steps, of a failure's end; characters


class Line(NamedTuple):
    """A printed line and the seconds after which it came."""

    seconds: float
    text: str


def stamped(seconds: float, text: str) -> str:
    """A log's line, without its end."""
    return f"{seconds:8.2f}  {text}"


def parse(log: str) -> list[Line]:
    """The lines of a log."""
    found = (STAMP.match(line) for line in log.splitlines())
    return [Line(float(m[1]), m[2]) for m in found if m]


def rows(lines: list[Line], kind: str) -> list[dict[str, str]]:
    """The key:value pairs of every line of train_gpt.py that begins with a word."""
    return [dict(PAIR.findall(text)) for _, text in lines if re.match(rf"{kind}\b", text)]


def last(lines: list[Line], kind: str) -> dict[str, str]:
    """Those of the last such line, or {}."""
    return (rows(lines, kind) or [{}])[-1]


def number(row: dict[str, str], key: str) -> float | int | None:
    """A row's value, without its unit ("ms"); None where there is none."""
    found = re.match(r"-?\d[\d.]*(e[-+]?\d+)?", row.get(key, ""))
    if not found:
        return None
    return int(found[0]) if found[0].lstrip("-").isdigit() else float(found[0])


def known(values: dict) -> dict:
    """The entries that have a value."""
    return {key: value for key, value in values.items() if value not in (None, "", {})}


def check_figures(lines: list[Line]) -> dict:
    """{part: what bench/device_check.py says of it}."""
    found = (re.match(r"check (\w+): (.*) \([\d.]+ s\)$", text) for _, text in lines)
    return {m[1]: m[2] for m in found if m}


def slope(points: list[tuple[float, float]]) -> float | None:
    """Milliseconds a step between the first and the last of (step, milliseconds)."""
    if len(points) < 2:
        return None
    (first, began), (final, ended) = points[0], points[-1]
    return round((ended - began) / (final - first), 2) if final > first else None


def step_figures(lines: list[Line]) -> dict:
    """Milliseconds a step before the loop is on and with it, of a training that its clock ends."""
    steps = [row for row in rows(lines, "step") if "train_loss" in row]
    points = [(int(row["step"].split("/")[0]), number(row, "train_time")) for row in steps[1:]]
    whole = number(last(lines, "expected"), "training_seconds")
    if not whole:
        return {}
    before, after = (1000 * whole * (LOOP_FROM + part) for part in (-LOOP_MARGIN, LOOP_MARGIN))
    return {
        "step_ms_before_loop": slope([(step, ms) for step, ms in points if ms <= before]),
        "step_ms_in_loop": slope([(step, ms) for step, ms in points if ms >= after]),
    }


def training_figures(lines: list[Line]) -> dict:
    """Of warm-up, training and export."""
    warmup, trained = last(lines, "warmup"), last(lines, "trained")
    steps, seconds = number(trained, "steps"), number(trained, "train_seconds")
    attention = [found[1] for _, text in lines if (found := ATTENTION.match(text))]
    calibration, artifact = last(lines, "calibration"), last(lines, "artifact artifact_bytes")
    validated = [row for row in rows(lines, "step") if "val_bpb" in row] or [{}]
    return {
        "attention": attention[-1] if attention else None,
        "compute": last(lines, "model").get("compute"),
        "warmup_seconds": number(warmup, "seconds"),
        "micro_batch_tokens": number(warmup, "micro_batch_tokens"),
        "steps": steps,
        "train_seconds": seconds,
        "step_ms": round(1000 * seconds / steps, 2) if steps and seconds else None,
        **step_figures(lines),
        "recompiles": number(trained, "recompiles"),
        "peak_memory_bytes": number(trained, "peak_memory_bytes"),
        "unquantized_bpb": number(validated[-1], "val_bpb"),
        "calibration_factors": calibration.get("factors"),
        "calibration_seconds": number(calibration, "seconds"),
        "export_seconds": number(artifact, "seconds"),
        "artifact_bytes": number(artifact, "artifact_bytes"),
    }


def window_seconds(lines: list[Line]) -> float | None:
    """Seconds of a window of the neural pass, without its first batch, which compiles."""
    found = ((at, re.match(r"eval \[(\d+)/", text)) for at, text in lines)
    marks = [(at, int(m[1])) for at, m in found if m]
    if len(marks) < 2 or marks[-1][1] == marks[0][1]:
        return None
    return (marks[-1][0] - marks[0][0]) / (marks[-1][1] - marks[0][1])


def evaluation_figures(lines: list[Line]) -> dict:
    """Of the evaluation and the audit; seconds are those of the whole evaluation on its clock."""
    results = rows(lines, "result")
    sliding = [row for row in results if row.get("stage", "").endswith("sliding")]
    roundtrip = [row for row in results if row.get("stage", "").endswith("roundtrip")] or [{}]
    bpb = {row["scoring"]: number(row, "val_bpb") for row in sliding}
    gain = None
    if bpb.get("neural") and bpb.get("calibrated"):
        gain = round(bpb["neural"] - bpb["calibrated"], 8)
    window = window_seconds(lines)
    audit = (re.match(r"audit (\w+) (PASS|FAIL)\b.*?([\d.]+)?$", t) for _, t in lines)
    verdict = next((text for _, text in lines if text.startswith("verdict ")), "")
    return {
        "targets": number(sliding[0], "tokens") if sliding else None,
        "eval_seconds": number(last(lines, "headline"), "seconds"),
        "window_ms": round(1000 * window, 3) if window else None,
        "roundtrip_bpb": number(roundtrip[-1], "val_bpb"),
        "bpb": bpb,
        "mixer_gain_bpb": gain,
        "mass": known({row["scoring"]: number(row, "mass") for row in sliding}),
        "audit": {m[1]: f"{m[2]} {m[3]} s" for m in audit if m},
        "verdict": verdict.removeprefix("verdict "),
    }


def run_figures(lines: list[Line]) -> dict:
    """Of a run of train_gpt.py, as far as it came."""
    figures = training_figures(lines) | evaluation_figures(lines)
    before, after = figures["unquantized_bpb"], figures["roundtrip_bpb"]
    if before and after:
        figures["quantization_gap_bpb"] = round(after - before, 8)
    if lines and figures["train_seconds"]:
        figures["rest_seconds"] = round(lines[-1].seconds - figures["train_seconds"], 1)
    return known(figures)


def versus_figures(lines: list[Line]) -> dict:
    """Times, ratio and, of a GPU, MFU and memory that a bench printed of ours and plain."""
    figures: dict[str, dict] = {}
    name = ""
    for _, text in lines:
        times = re.match(r"(.+): ours ([\d.]+) ms, plain ([\d.]+) ms, ratio ([\d.]+)", text)
        side = re.match(r"  (ours|plain): .*MFU ([\d.]+%).* peak (\d+) bytes", text)
        if times:
            name = times[1].replace(" ", "_")
            values = map(float, times.groups()[1:])
            figures[name] = dict(zip(("ours_ms", "plain_ms", "ratio"), values, strict=True))
        elif side and name:
            figures[name] |= {f"{side[1]}_mfu": side[2], f"{side[1]}_peak_bytes": int(side[3])}
    return figures


def mixing_figures(lines: list[Line]) -> dict:
    """{"tokens": seconds and memory} of hints, columns and mixing, of bench/ngram_counts.py."""
    figures = {}
    for _, text in lines:
        found = re.match(r"\s*([\d,]+)" + 4 * r"\s+([\d.]+)" + "$", text)
        if found:
            names = ("hints_seconds", "columns_seconds", "mixing_seconds", "gib")
            values = map(float, found.groups()[1:])
            figures[found[1]] = dict(zip(names, values, strict=True))
    return figures


def flat(figures: dict, before: str = "") -> list[tuple[str, object]]:
    """[("name.name", value)] of figures inside figures."""
    out: list[tuple[str, object]] = []
    for key, value in figures.items():
        name = f"{before}{key}"
        out += flat(value, f"{name}.") if isinstance(value, dict) else [(name, value)]
    return out


def told(lines: list[Line], failed: bool) -> list[str]:
    """The lines of a log that a summary quotes; of a stage that failed also the last ones."""
    texts = [text for _, text in lines]
    quoted = [text for text in texts if TOLD.match(text)]
    steps = [text for text in texts if text.startswith("step:")]
    quoted += steps[:: max(1, len(steps) // STEPS_TOLD)]
    if failed:
        quoted += ["...", *texts[-LAST_TOLD:]]
    return [text[:WIDEST] for text in quoted]


def failure(lines: list[Line]) -> str:
    """The line that says what went wrong: the last error, else the last line."""
    texts = [text.strip() for _, text in lines if text.strip()]
    errors = [text for text in texts if re.match(r"error: |\w*Error\b", text)]
    return (errors or texts or ["no output"])[-1][:WIDEST]
