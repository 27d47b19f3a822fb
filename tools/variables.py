"""Variables that are no setting: those of the submissions without effect, and misspelled ones."""

import difflib
import fnmatch

import train_gpt as golf

# Variables of the submissions' scripts that change nothing here ("*": all that begin so).
WITHOUT_EFFECT = {
    "MUON_BETA2": "read by the submissions, used by none", "DTG_ENABLED": "off in every submission",
    "GATED_ATTENTION": "off in every submission", "COMPLEMENT_ALPHA": "0 in #1094",
    "NGRAM_ENT_THRESH": "read by #890, used nowhere", "DISTILL_*": "dead code in #806",
    "KG_LOSS_WEIGHT": "its code is absent from #1094", "PAID_PREFIX_*": "dead code in #806",
    "CONTROL_TENSOR_NAME_PATTERNS": "tensors are classed by what they are, not by names",
    "INT8_KEEP_FLOAT_FP32_NAME_PATTERNS": "tensors are classed by what they are, not by names",
    "TIE_EMBEDDINGS": "always tied", "EMBED_LR": "always tied: TIED_EMBED_LR",
    "QAT_ENABLED": "measured at equal bytes, no gain: GPTQ_SECONDS calibrates after training",
    "LATE_QAT_THRESHOLD": "measured at equal bytes, no gain: GPTQ_SECONDS calibrates after training",
    "TTT_*": "training on validation text is no part of this system"}


def check_names(names, known) -> list[str]:
    """Log lines on the names in use that are not `known`; RunError for one that nearly is: from 8
    letters one edit away, from 12 letters two."""
    notes = []
    for name in (n for n in names if n not in known):
        idle = [why for key, why in WITHOUT_EFFECT.items() if fnmatch.fnmatchcase(name, key)]
        notes += [f"variable {name} has no effect: {why}" for why in idle]
        edits = 0 if idle or len(name) < 8 else 1 if len(name) < 12 else 2
        similar = difflib.get_close_matches(name, known, 1, 1 - edits / len(name))
        if edits and similar and abs(len(similar[0]) - len(name)) <= edits:
            raise golf.RunError(f"unknown variable {name}: did you mean {similar[0]}?")
    return notes
