"""Bad input through the command line: one line on stderr, a non-zero exit, no traceback."""

import pytest


def check(done, *words):
    """One line, with these words; nothing under a final name."""
    lines = [x for x in done.stderr.splitlines() if x.startswith("error: ")]
    assert done.returncode != 0 and len(lines) == 1, done.stderr
    assert "Traceback" not in done.stderr and "final " not in done.stdout
    for word in words:
        assert word in lines[0]


@pytest.mark.parametrize("variables, words", [
    (dict(MODEL_DIMM="3"), ["MODEL_DIMM", "MODEL_DIM?"]),
    (dict(NUM_HEADS="5"), ["MODEL_DIM=32", "NUM_HEADS"]),
    (dict(TEXT_FILES="nowhere/*.txt"), ["nowhere/*.txt", "matches no file"]),
    (dict(TEXT_FILES="", SCALE="full", DATA_PATH="nowhere"), ["nowhere", "hf download",
                                                              "TEXT_FILES"]),
    (dict(TRAIN_BATCH_TOKENS="64000000"), ["training tokens", "TRAIN_BATCH_TOKENS"]),
    (dict(VAL_TOKENS="10"), ["10 validation targets", "EVAL_SEQ_LEN=64"]),
    (dict(LOGS_PATH="/proc/no"), ["/proc/no"]),
    (dict(LOAD_ARTIFACT="nowhere.ptz"), ["nowhere.ptz", "No such file"]),
    (dict(DEVICE="cuda"), ["DEVICE=cuda", "DEVICE=cpu"]),
    (dict(MATRIX_LR="1e30", SCALAR_LR="1e30", GRAD_CLIP_NORM="0"),
     ["the loss is not finite", "last finite loss", "MATRIX_LR"]),
])
def test_one_line_that_helps(job, variables, words):
    check(job(**variables), *words)


def test_on_several_ranks_only_the_first_speaks(job):
    done = job(2, TRAIN_BATCH_TOKENS="64")
    lines = [x for x in done.stderr.splitlines() if x.startswith("error: ")]
    assert done.returncode != 0 and len(lines) == 1
    assert "do not divide among 2 ranks" in lines[0]


def test_an_artifact_of_another_vocabulary(job, trained, text_folder):
    done = job(LOAD_ARTIFACT=str(trained.logs / "golf-demo-1337.int6.ptz"),
               TEXT_FILES=f"{text_folder}/email*.txt")
    check(done, "artifact", "another vocabulary")


def test_a_damaged_artifact(job, trained, tmp_path):
    blob = bytearray((trained.logs / "golf-demo-1337.int6.ptz").read_bytes())
    blob[len(blob) // 2] ^= 4
    (tmp_path / "bad.ptz").write_bytes(blob)
    check(job(LOAD_ARTIFACT=str(tmp_path / "bad.ptz")), "artifact", "damaged", "SHA-256")
