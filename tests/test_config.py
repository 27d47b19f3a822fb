"""Configuration: precedence, aliases, idle variables, and errors that help."""

import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import train_gpt as golf

# Every variable that one of the four submissions' scripts reads, with a value of theirs.
SUBMISSIONS = """
DATA_PATH=./data/datasets/fineweb10B_sp1024 TOKENIZER_PATH=./data/tokenizers/fineweb_1024_bpe.model
RUN_ID=seed1337 SEED=1337 VAL_BATCH_SIZE=524288 VAL_LOSS_EVERY=4000 TRAIN_LOG_EVERY=500
ITERATIONS=20000 WARMDOWN_ITERS=3500 WARMUP_STEPS=20 TRAIN_BATCH_TOKENS=786432 TRAIN_SEQ_LEN=2048
EVAL_SEQ_LEN=2048 MAX_WALLCLOCK_SECONDS=600.0 QK_GAIN_INIT=1.5 VOCAB_SIZE=1024 NUM_LAYERS=11
NUM_KV_HEADS=4 MODEL_DIM=512 NUM_HEADS=8 MLP_MULT=3.0 TIE_EMBEDDINGS=1 ROPE_BASE=10000.0
LOGIT_SOFTCAP=30.0 EMBED_LR=0.6 HEAD_LR=0.008 TIED_EMBED_LR=0.035 TIED_EMBED_INIT_STD=0.005
MATRIX_LR=0.025 SCALAR_LR=0.025 MUON_MOMENTUM=0.99 MUON_BACKEND_STEPS=5
MUON_MOMENTUM_WARMUP_START=0.92 MUON_MOMENTUM_WARMUP_STEPS=1500 BETA1=0.9 BETA2=0.95 ADAM_EPS=1e-8
GRAD_CLIP_NORM=0.3 EVAL_STRIDE=64 MTP_NUM_HEADS=2 MTP_LOSS_WEIGHT=0.1 MUON_BETA2=0.95 SWA_ENABLED=1
SWA_EVERY=50 MUON_WD=0.04 ADAM_WD=0.04 QAT_ENABLED=0 BIGRAM_VOCAB_SIZE=4096 BIGRAM_DIM=128
XSA_LAST_N=4 ROPE_DIMS=16 LN_SCALE=1 DTG_ENABLED=0 LATE_QAT_THRESHOLD=0.15 VE_ENABLED=1 VE_DIM=128
VE_LAYERS=9,10 VRL_ENABLED=1 CONTROL_TENSOR_NAME_PATTERNS=attn_scale,attn_scales
INT8_KEEP_FLOAT_FP32_NAME_PATTERNS=attn_scale NGRAM_ENABLED=1 NGRAM_ORDER=7 TTT_ENABLED=0
TTT_LR=0.002 TTT_EPOCHS=3 TTT_MOMENTUM=0.9 TTT_BATCH_SEQS=32 TTT_FREEZE_BLOCKS=2 NGRAM_CACHE=1
NGRAM_MIN_ORDER=2 NGRAM_MAX_ORDER=7 NGRAM_BUCKETS=4194304 NGRAM_MIN_COUNT=2 NGRAM_ENTROPY=1
NGRAM_ALPHA=0.40 NGRAM_ENT_BASE=0.05 NGRAM_ENT_RANGE=0.55 NGRAM_ENT_CENTER=4.0 NGRAM_ENT_SCALE=2.0
RELU_SLOPE=0.0 PAID_PREFIX_FILE= PAID_PREFIX_CODEC=lzma DISTILL_ENABLED=0 DISTILL_TEACHER_FRAC=0.65
DISTILL_ALPHA=0.5 DISTILL_TEMPERATURE=2.0 TTT_MODE=preeval NGRAM_ENT_THRESH=4.0 GATED_ATTENTION=0
VALUE_RESIDUAL=0 USE_NGRAM_MIXER=1 ALPHA_BASE=0.20 ALPHA_RANGE=0.55 ALPHA_CENTER=3.0
KG_LOSS_WEIGHT=0.1 COMPLEMENT_ALPHA=0
"""
SUBMISSION_VARIABLES = dict(entry.split("=", 1) for entry in SUBMISSIONS.split())
FIELDS = {f.name.upper(): f for f in golf.fields(golf.Config)}
KNOWN = {**FIELDS, **golf.ALIASES}
SIZES = dict(MODEL_DIM="512", NUM_HEADS="8", ROPE_DIMS="16")  # the challenge's, for heads to divide


@pytest.mark.parametrize("name", SUBMISSION_VARIABLES)
def test_every_variable_of_the_submissions_sets_a_field_or_is_logged_as_idle(name):
    value = SUBMISSION_VARIABLES[name]
    sizes = SIZES if name in SIZES else {}
    cfg, notes = golf.load_config(dict(SCALE="full") | sizes | {name: value})
    if name not in KNOWN:
        assert any(f"variable {name} has no effect: " in note for note in notes)
        return
    field = golf.ALIASES.get(name, name.lower())
    got = getattr(cfg, field)
    if str(got).strip("(),").replace(" ", "") != value:
        assert float(got[0] if isinstance(got, tuple) else got) == float(value)
    assert any(name in note for note in notes) == (name in golf.ALIASES)


def test_all_variables_of_a_submission_at_once():
    idle = [name for name in SUBMISSION_VARIABLES if name not in KNOWN]
    env = {n: v for n, v in SUBMISSION_VARIABLES.items() if n not in golf.ALIASES}
    _, notes = golf.load_config(env)
    assert [n.split()[1] for n in notes if "no effect" in n] == sorted(idle)


def test_precedence_environment_scale_recipe_default():
    """SCALE's own fields yield to the environment and win over the recipe."""
    cfg, _ = golf.load_config(dict(RECIPE="pr890", SCALE="demo", BIGRAM_DIM="8"))
    assert (cfg.bigram_vocab_size, cfg.bigram_dim) == (1024, 8)
    assert (cfg.mlp_mult, cfg.muon_wd) == (3.5, 0.04)
    cfg, _ = golf.load_config(dict(RECIPE="pr890", SCALE="full"))
    assert (cfg.num_kv_heads, cfg.eval_stride, cfg.model_dim) == (8, 32, 512)
    cfg, _ = golf.load_config(dict(RECIPE="pr890", SCALE="demo"))
    assert cfg.num_heads == cfg.num_kv_heads and cfg.model_dim < 512 and cfg.num_layers == 11
    cfg, _ = golf.load_config(dict(RECIPE="pr890", SCALE="demo", MODEL_DIM="64", MLP_MULT="2"))
    assert (cfg.model_dim, cfg.mlp_mult, cfg.matrix_bits) == (64, 2.0, 5)
    full, _ = golf.load_config(dict(RECIPE="pr806", SCALE="full"))
    demo, _ = golf.load_config(dict(RECIPE="pr806", SCALE="demo"))
    assert full.rope_dims == 64 and demo.rope_dims == demo.model_dim // demo.num_heads


def test_without_shards_the_scale_is_demo_and_says_why():
    cfg, notes = golf.load_config({})
    assert cfg.scale == "demo" and notes[0].startswith("scale demo: ")
    assert "train shards" in notes[0] and cfg.data_path in notes[0]


def test_aliases_set_their_field_and_are_logged():
    cfg, notes = golf.load_config(dict(NGRAM_ORDER="5", VRL_ENABLED="1", ALPHA_CENTER="2.5"))
    assert (cfg.ngram_max_order, cfg.value_residual, cfg.ngram_ent_center) == (5, True, (2.5,))
    assert any("NGRAM_ORDER sets NGRAM_MAX_ORDER" in note for note in notes)


@pytest.mark.parametrize(
    "env, words",
    [
        (dict(MATRIX_LR="fast"), ["MATRIX_LR='fast'", "a number"]),
        (dict(NUM_LAYERS="1"), ["NUM_LAYERS='1'", "from 2 to"]),
        (dict(NUM_LAYERS="3.5"), ["NUM_LAYERS='3.5'", "an integer"]),
        (dict(BETA1="1.5"), ["BETA1='1.5'", "from 0 to 0.99"]),
        (dict(MATRIX_LR="nan"), ["MATRIX_LR='nan'"]),
        (dict(VE_ENABLED="maybe"), ["VE_ENABLED='maybe'", "0 or 1"]),
        (dict(COMPRESSOR="brotli"), ["COMPRESSOR='brotli'", "ans", "zstd", "lzma"]),
        (dict(RECIPE="pr1"), ["RECIPE='pr1'", "pr1094"]),
        (dict(NUM_HEADS="3"), ["MODEL_DIM", "divisible", "NUM_HEADS 3"]),
        (dict(NUM_HEADS="8", NUM_KV_HEADS="3"), ["NUM_HEADS=8", "NUM_KV_HEADS 3"]),
        (dict(EVAL_STRIDE="512", EVAL_SEQ_LEN="256"), ["EVAL_STRIDE=512", "EVAL_SEQ_LEN"]),
        (dict(TRAIN_BATCH_TOKENS="1000"), ["TRAIN_BATCH_TOKENS=1000", "TRAIN_SEQ_LEN"]),
        (dict(VE_LAYERS="9,11"), ["VE_LAYERS", "NUM_LAYERS 11"]),
        (dict(NGRAM_ENT_CENTER="3,4"), ["NGRAM_ENT_CENTER"]),
        (dict(NGRAM_BUCKETS="1000"), ["NGRAM_BUCKETS=1000", "power of 2"]),
        (dict(NGRAM_ORDER="5", NGRAM_MAX_ORDER="6"), ["NGRAM_ORDER=5", "NGRAM_MAX_ORDER"]),
        (dict(ITERATIONS="0", MAX_WALLCLOCK_SECONDS="0"), ["ITERATIONS=0"]),
        (dict(ROPE_DIMS="5"), ["ROPE_DIMS=5", "even"]),
        (dict(ROPE_DIMS="512"), ["ROPE_DIMS=512", "at most"]),
        (dict(XSA_LAST_N="12"), ["XSA_LAST_N=12", "NUM_LAYERS 11"]),
        (dict(MICRO_BATCH_TOKENS="100"), ["MICRO_BATCH_TOKENS=100", "TRAIN_SEQ_LEN"]),
        (dict(NGRAM_MIN_ORDER="9"), ["NGRAM_MIN_ORDER=9", "NGRAM_MAX_ORDER"]),
        (dict(NGRAM_ENT_BASE="0.5"), ["NGRAM_ENT_BASE=0.5", "NGRAM_ENT_RANGE"]),
        (dict(BIGRAM_VOCAB_SIZE="1"), ["BIGRAM_VOCAB_SIZE=1"]),
        (dict(VE_LAYERS="9;10"), ["VE_LAYERS='9;10'", "numbers"]),
        (dict(RUN_ID="a/b"), ["RUN_ID=a/b"]),
        (dict(SCALE="demos"), ["SCALE='demos'", "full", "demo"]),
        (dict(MATRIX_BITS="9"), ["MATRIX_BITS='9'", "from 2 to 8"]),
        (dict(SEED="-1"), ["SEED='-1'", "from 0"]),
        (dict(SCALE="demo", NUM_HEADS="1", NUM_KV_HEADS="0"), ["NUM_KV_HEADS='0'", "from 1"]),
        (dict(NGRAM_ODER="5"), ["NGRAM_ODER", "NGRAM_ORDER?"]),
        (dict(MODEL_DIMM="64"), ["MODEL_DIMM", "MODEL_DIM?"]),
        (dict(TRAIN_BATCH_TOKNES="4096"), ["TRAIN_BATCH_TOKENS?"]),
        (dict(MAX_WALCLOCK_SECOND="9"), ["MAX_WALLCLOCK_SECONDS?"]),
    ],
)
def test_a_bad_variable_is_one_line_that_names_it(env, words):
    with pytest.raises(golf.RunError) as error:
        golf.load_config(env)
    assert "\n" not in str(error.value)
    for word in words:
        assert word in str(error.value)


@pytest.mark.parametrize(
    "env",
    [
        dict(VE_LAYERS="9,9"),
        dict(SEED=str(2**32)),
        dict(SEED=str(2**70)),
        dict(NGRAM_PRIMES=str(2**70)),
        dict(NGRAM_BUCKETS=str(2**40)),
        dict(NGRAM_ENT_CENTER="nan"),
    ],
    ids=str,
)
def test_a_value_that_no_run_could_use_is_refused(env):
    """Each of these, accepted, ends a run with a traceback or with a wrong number."""
    with pytest.raises(golf.RunError, match=next(iter(env))):
        golf.load_config(env)


def test_unrelated_variables_are_ignored():
    base, _ = golf.load_config({})
    env = dict(
        HOME="/",
        SEEDS="1",
        OMP_NUM_THREADS="2",
        NCCL_IB_DISABLE="1",
        ITERATIONZZZ="2",
        RANK="0",
        WORLD_SIZE="1",
        LOCAL_RANK="0",
        BETA3="1",
        PATH="/bin",
        SCALES="x",
    )
    assert golf.load_config(env)[0] == base


@given(
    st.sampled_from([n for n in KNOWN if len(n) > 8]),
    st.sampled_from(["delete", "swap", "add"]),
    st.integers(0, 7),
    st.sampled_from("AEZ_9"),
)
@settings(max_examples=150)
def test_one_slip_in_a_name_is_an_error(name, slip, at, letter):
    swapped = name[:at] + name[at + 1] + name[at] + name[at + 2 :]
    deleted, added = name[:at] + name[at + 1 :], name[:at] + letter + name[at:]
    typed = dict(delete=deleted, swap=swapped, add=added)[slip]
    if typed in KNOWN or typed in golf.FOREIGN_VARIABLES:
        return
    with pytest.raises(golf.RunError, match=f"^unknown variable {typed}: did you mean [A-Z_0-9]+"):
        golf.load_config({typed: "1"})


NAMES = st.sampled_from(sorted(KNOWN))
NUMBERS = ["0", "1", "2", "3", "7", "16", "64", "4096", "-1", "0.5", "1e9", "nan", "inf"]
VALUES = st.sampled_from([*NUMBERS, "x", "4,5", "demo", "full", "pr890"])


@pytest.mark.slow
@given(st.dictionaries(NAMES, VALUES, max_size=3), st.sampled_from(["demo", "full", "auto"]))
@settings(max_examples=1000)
def test_any_values_give_a_configuration_or_one_clear_error(env, scale):
    try:
        cfg, _ = golf.load_config(dict(SCALE=scale) | env)
    except golf.RunError as error:
        assert "\n" not in str(error)
    else:
        assert all(
            type(getattr(cfg, n.lower())).__name__ == f.type.split("[")[0]
            for n, f in FIELDS.items()
        )


@given(st.sampled_from(list(golf.RECIPES)), st.integers(1, 64), st.integers(1, 16))
@settings(max_examples=200)
def test_demo_sizes_follow_width_and_heads(recipe, head_dim, heads):
    """Only what the sizes make impossible is refused, and never with a crash."""
    env = dict(SCALE="demo", RECIPE=recipe, MODEL_DIM=str(head_dim * heads), NUM_HEADS=str(heads))
    try:
        cfg, _ = golf.load_config(env)
    except golf.RunError:
        assert heads % 2 or head_dim % 8 or head_dim * heads < 8
    else:
        assert cfg.num_heads % cfg.num_kv_heads == 0 and cfg.rope_dims <= head_dim


@pytest.mark.parametrize("recipe", golf.RECIPES)
def test_layers_follow_their_number(recipe):
    """NUM_LAYERS alone is enough; what is set beside it stays."""
    for count in range(2, 40):
        cfg, _ = golf.load_config(dict(RECIPE=recipe, SCALE="full", NUM_LAYERS=str(count)))
        walk = golf.block_visits(cfg, looping=True)
        assert {visit.layer for visit in walk} == set(range(count))
        assert (len(walk) > count) == (recipe == "golf")
        assert not cfg.ve_enabled or cfg.ve_layers == (count - 2, count - 1)
        assert cfg.xsa_last_n == round(golf.RECIPES[recipe].get("xsa_last_n", 11) * count / 11)
    full, _ = golf.load_config(dict(RECIPE=recipe, SCALE="full", NUM_LAYERS="11"))
    assert full == golf.load_config(dict(RECIPE=recipe, SCALE="full"))[0]
    env = dict(NUM_LAYERS="6", VE_LAYERS="1", XSA_LAST_N="2", SCALE="full", RECIPE=recipe)
    cfg, _ = golf.load_config(env)
    assert (cfg.ve_layers, cfg.xsa_last_n) == ((1,), 2)


def test_golf_at_demo_scale_has_the_shared_trunk():
    demo, _ = golf.load_config(dict(SCALE="demo"))
    assert {name: getattr(demo, name) for name in golf.SHARED} == golf.SHARED
    full, _ = golf.load_config(dict(SCALE="full"))
    same = {name for name, value in golf.SHARED.items() if getattr(full, name) == value}
    assert same == {"loop_first", "loop_last"}
    wide, _ = golf.load_config(dict(SCALE="demo", MLP_MULT="4", LOOP_PASSES="2"))
    assert (wide.mlp_mult, wide.loop_passes, wide.muon_wd) == (4.0, 2, 0.04)


@pytest.mark.parametrize("name, ours", [*golf.FAMILIAR.items(), ("num_layers", "NUM_LAYERS")])
def test_familiar_names_of_other_programs_are_answered(name, ours):
    """...by a line that names ours; they may be meant for another program, and end no run."""
    for variable in {name, name.lower()}:
        _, notes = golf.load_config({variable: "6"})
        (note,) = (note for note in notes if f"variable {variable} " in note)
    assert ours in note and all(n in KNOWN for n in ours.replace(",", "").split() if n.isupper())


def test_smoke_is_a_demo_in_small():
    cfg, notes = golf.load_config(dict(SMOKE="1"))
    assert cfg.scale == "demo" and "says nothing" in notes[0]
    assert {name: getattr(cfg, name) for name in golf.SMOKE} == golf.SMOKE
    assert cfg.num_layers == 11 and cfg.rope_dims <= cfg.model_dim // cfg.num_heads
    assert golf.load_config(dict(SMOKE="1", VAL_TOKENS="99", MODEL_DIM="32"))[0].val_tokens == 99
    assert cfg.run_id == "golf-smoke-1337"  # not the name of the run that counts


def test_all_bad_variables_are_told_at_once():
    wrong = dict(ITERATIONS="six", NUM_HEADS="x", NGRAM_ODER="3", VE_LAYERS="a", RANKS="1")
    with pytest.raises(golf.RunError) as error:
        golf.load_config(wrong | dict(MATRIX_LRR="1"))
    parts = str(error.value).split("; ")
    assert len(parts) == 5 and all(
        any(name in part for part in parts)
        for name in (
            "ITERATIONS='six'",
            "NUM_HEADS='x'",
            "VE_LAYERS='a'",
            "unknown variable MATRIX_LRR",
            "unknown variable NGRAM_ODER",
        )
    )


def test_all_contradictions_are_told_at_once():
    with pytest.raises(golf.RunError) as error:
        golf.load_config(dict(NUM_LAYERS="4", VE_LAYERS="9", XSA_LAST_N="8", EVAL_STRIDE="9999"))
    line = str(error.value)
    assert line.count("must be") == 3 and "\n" not in line
    assert all(name in line for name in ("VE_LAYERS", "XSA_LAST_N", "EVAL_STRIDE"))


@pytest.mark.parametrize("recipe", golf.RECIPES)
@pytest.mark.parametrize("scale", ["demo", "full"])
def test_every_recipe_resolves_at_both_scales(recipe, scale):
    cfg, _ = golf.load_config(dict(RECIPE=recipe, SCALE=scale))
    assert cfg.recipe == recipe and cfg.num_layers == 11
    assert (cfg.gptq_seconds == 0) == (recipe != "golf")  # theirs train for all their time
    assert golf.calibration_seconds(cfg) == (
        0 if recipe != "golf" else 10 if scale == "full" else 3
    )


def test_help_lists_every_variable_and_recipe():
    text = golf.help_text()
    for name in [*KNOWN, *golf.RECIPES, "DTG_ENABLED", "TTT_*"]:
        assert name in text, name
    assert all(f.metadata["meaning"] in text for f in FIELDS.values())


def test_variables_of_other_programs_end_no_run():
    foreign = dict(LOG_PATH="/var/log", DEBUG="*", SEED="abc", SCALE="2", DEVICE="/dev/sda")
    cfg, notes = golf.load_config(foreign)
    assert cfg == golf.load_config({})[0]
    for name in ("DEBUG", "SEED", "SCALE", "DEVICE"):
        assert any(f"variable {name}={foreign[name]!r}" in n and "ignored" in n for n in notes), (
            name
        )
    assert not any("LOG_PATH" in note for note in notes)


@pytest.mark.parametrize(
    "env", [dict(SCALE="ful"), dict(DEVICE="cuda:1"), dict(SEED="-1")], ids=str
)
def test_a_near_miss_of_a_shared_variable_is_an_error(env):
    with pytest.raises(golf.RunError, match=next(iter(env))):
        golf.load_config(env)


def test_the_scale_is_full_where_cuda_may_be_used_and_shards_are(monkeypatch, tmp_path):
    monkeypatch.setattr(golf, "accelerator", lambda: "cuda")
    golf.write_shard(tmp_path / "x_train_0.bin", golf.np.array([1, 2, 3]))
    env = dict(DATA_PATH=str(tmp_path))
    assert golf.load_config(env)[0].scale == "full"
    assert golf.load_config(env | dict(DEVICE="cpu"))[0].scale == "demo"
    assert golf.load_config(dict(DATA_PATH=f"{tmp_path}/none"))[0].scale == "demo"


@pytest.mark.parametrize("pieces", [1024, 4096, 8192])
def test_a_plain_run_finds_what_the_fetch_command_fetches(monkeypatch, tmp_path, pieces):
    """hf download --local-dir D puts the dataset's a/b/c at D/a/b/c."""
    command = golf.fetch_command(pieces).split("hf download ")[1].replace("'", "").split()
    assert command[0] == golf.PUBLIC_REPOSITORIES[pieces]
    folder = tmp_path / command[command.index("--local-dir") + 1]
    shards, tokenizers = command[command.index("--include") + 1 :]
    (folder / shards).parent.mkdir(parents=True)
    golf.write_shard(folder / shards.replace("*", "fineweb_val_000000.bin"), golf.np.array([1, 2]))
    monkeypatch.chdir(tmp_path)
    env = dict(SCALE="full") | (dict(VOCAB_SIZE=str(pieces)) if pieces != 1024 else {})
    cfg, _ = golf.load_config(env)
    assert golf.find_shards(cfg.data_path, "val")
    wanted = folder / tokenizers.replace("*", f"fineweb_{pieces}_bpe.model")
    assert golf.Path(cfg.tokenizer_path).absolute() == wanted
    given, _ = golf.load_config(dict(SCALE="full", DATA_PATH="mine"))
    assert (given.data_path, given.tokenizer_path) == ("mine", golf.Config.tokenizer_path)


@pytest.mark.slow
def test_help_may_be_cut_off():
    script = f"{sys.executable} {golf.__file__} --help | head -n 1"
    done = subprocess.run(script, shell=True, text=True, capture_output=True)
    assert done.stdout.startswith("Parameter Golf") and not done.stderr


@pytest.mark.slow
def test_importing_needs_nothing_of_unix():
    """Windows has no module resource; there the peak of memory is unknown, and nothing else."""
    code = (
        "import sys; sys.modules['resource'] = None; import train_gpt as golf, types, torch; "
        "run = types.SimpleNamespace(device=torch.device('cpu')); "
        "print(golf.Run.peak_memory_bytes(run))"
    )
    folder = golf.Path(golf.__file__).parent
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, text=True, capture_output=True)
    assert done.stdout == "0\n", done.stderr


def test_peak_memory_is_in_bytes_on_linux_and_macos(run, monkeypatch):
    monkeypatch.setattr(golf.sys, "platform", "linux")
    linux = run.peak_memory_bytes()
    monkeypatch.setattr(golf.sys, "platform", "darwin")
    assert linux > 100e6 and 1000 * run.peak_memory_bytes() < linux < 1100 * run.peak_memory_bytes()
