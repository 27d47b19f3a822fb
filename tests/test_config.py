"""Configuration: precedence, aliases, idle variables, and errors that help."""

import pytest

import train_gpt as golf

# Every variable that one of the four submissions' scripts reads.
SUBMISSION_VARIABLES = """
DATA_PATH TOKENIZER_PATH RUN_ID SEED VAL_BATCH_SIZE VAL_LOSS_EVERY TRAIN_LOG_EVERY ITERATIONS
WARMDOWN_ITERS WARMUP_STEPS TRAIN_BATCH_TOKENS TRAIN_SEQ_LEN EVAL_SEQ_LEN MAX_WALLCLOCK_SECONDS
QK_GAIN_INIT VOCAB_SIZE NUM_LAYERS NUM_KV_HEADS MODEL_DIM NUM_HEADS MLP_MULT TIE_EMBEDDINGS
ROPE_BASE LOGIT_SOFTCAP EMBED_LR HEAD_LR TIED_EMBED_LR TIED_EMBED_INIT_STD MATRIX_LR SCALAR_LR
MUON_MOMENTUM MUON_BACKEND_STEPS MUON_MOMENTUM_WARMUP_START MUON_MOMENTUM_WARMUP_STEPS BETA1 BETA2
ADAM_EPS GRAD_CLIP_NORM EVAL_STRIDE MTP_NUM_HEADS MTP_LOSS_WEIGHT MUON_BETA2 SWA_ENABLED SWA_EVERY
MUON_WD ADAM_WD QAT_ENABLED BIGRAM_VOCAB_SIZE BIGRAM_DIM XSA_LAST_N ROPE_DIMS LN_SCALE DTG_ENABLED
LATE_QAT_THRESHOLD VE_ENABLED VE_DIM VE_LAYERS VRL_ENABLED CONTROL_TENSOR_NAME_PATTERNS
INT8_KEEP_FLOAT_FP32_NAME_PATTERNS NGRAM_ENABLED NGRAM_ORDER TTT_ENABLED TTT_LR TTT_EPOCHS
TTT_MOMENTUM TTT_BATCH_SEQS TTT_FREEZE_BLOCKS NGRAM_CACHE NGRAM_MIN_ORDER NGRAM_MAX_ORDER
NGRAM_BUCKETS NGRAM_MIN_COUNT NGRAM_ENTROPY NGRAM_ALPHA NGRAM_ENT_BASE NGRAM_ENT_RANGE
NGRAM_ENT_CENTER NGRAM_ENT_SCALE RELU_SLOPE PAID_PREFIX_FILE PAID_PREFIX_CODEC DISTILL_ENABLED
DISTILL_TEACHER_FRAC DISTILL_ALPHA DISTILL_TEMPERATURE TTT_MODE NGRAM_ENT_THRESH GATED_ATTENTION
VALUE_RESIDUAL USE_NGRAM_MIXER ALPHA_BASE ALPHA_RANGE ALPHA_CENTER KG_LOSS_WEIGHT COMPLEMENT_ALPHA
""".split()


def test_every_variable_of_the_submissions_is_a_field_an_alias_or_logged_as_idle():
    names = {f.name.upper() for f in golf.fields(golf.Config)} | set(golf.ALIASES)
    for name in SUBMISSION_VARIABLES:
        if name not in names:
            _, notes = golf.load_config({name: "1"})
            assert any(name in note and "no effect" in note for note in notes), name


def test_precedence_environment_scale_recipe_default():
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
    assert cfg.scale == "demo" and "train shards" in notes[0]


def test_aliases_set_their_field_and_are_logged():
    cfg, notes = golf.load_config(dict(NGRAM_ORDER="5", VRL_ENABLED="1", ALPHA_CENTER="2.5"))
    assert (cfg.ngram_max_order, cfg.value_residual, cfg.ngram_ent_center) == (5, True, (2.5,))
    assert any("NGRAM_ORDER sets NGRAM_MAX_ORDER" in note for note in notes)


@pytest.mark.parametrize("env, words", [
    (dict(MATRIX_LR="fast"), ["MATRIX_LR='fast'", "a number"]),
    (dict(NUM_LAYERS="1"), ["NUM_LAYERS=1", "at least 2"]),
    (dict(NUM_LAYERS="3.5"), ["NUM_LAYERS='3.5'", "an integer"]),
    (dict(BETA1="1.5"), ["BETA1=1.5", "at most 1"]),
    (dict(MATRIX_LR="nan"), ["MATRIX_LR=nan"]),
    (dict(VE_ENABLED="yes"), ["VE_ENABLED='yes'", "0 or 1"]),
    (dict(COMPRESSOR="brotli"), ["COMPRESSOR='brotli'", "ans", "zstd", "lzma"]),
    (dict(RECIPE="pr1"), ["RECIPE='pr1'", "pr1094"]),
    (dict(NUM_HEADS="3"), ["MODEL_DIM", "divisible", "NUM_HEADS 3"]),
    (dict(NUM_HEADS="8", NUM_KV_HEADS="3"), ["NUM_HEADS=8", "NUM_KV_HEADS 3"]),
    (dict(EVAL_STRIDE="512", EVAL_SEQ_LEN="256"), ["EVAL_STRIDE=512", "EVAL_SEQ_LEN 256"]),
    (dict(TRAIN_BATCH_TOKENS="1000"), ["TRAIN_BATCH_TOKENS=1000", "TRAIN_SEQ_LEN"]),
    (dict(VE_LAYERS="9,11"), ["VE_LAYERS", "NUM_LAYERS 11"]),
    (dict(NGRAM_ENT_CENTER="3,4"), ["NGRAM_ENT_CENTER"]),
    (dict(NGRAM_BUCKETS="1000"), ["NGRAM_BUCKETS=1000", "power of 2"]),
    (dict(NGRAM_ORDER="5", NGRAM_MAX_ORDER="6"), ["NGRAM_ORDER=5", "NGRAM_MAX_ORDER"]),
    (dict(ITERATIONS="0", MAX_WALLCLOCK_SECONDS="0"), ["ITERATIONS=0"]),
    (dict(NGRAM_ODER="5"), ["NGRAM_ODER", "NGRAM_ORDER?"]),
    (dict(MODEL_DIMM="64"), ["MODEL_DIMM", "MODEL_DIM?"]),
    (dict(TRAIN_BATCH_TOKNES="4096"), ["TRAIN_BATCH_TOKENS?"]),
    (dict(MAX_WALCLOCK_SECOND="9"), ["MAX_WALLCLOCK_SECONDS?"]),
])
def test_a_bad_variable_is_one_line_that_names_it(env, words):
    with pytest.raises(golf.RunError) as error:
        golf.load_config(env)
    assert "\n" not in str(error.value)
    for word in words:
        assert word in str(error.value)


def test_unrelated_variables_are_ignored():
    base, _ = golf.load_config({})
    env = dict(HOME="/", SEEDS="1", OMP_NUM_THREADS="2", NCCL_IB_DISABLE="1", ITERATIONZZZ="2")
    assert golf.load_config(env)[0] == base


@pytest.mark.parametrize("recipe", golf.RECIPES)
@pytest.mark.parametrize("scale", ["demo", "full"])
def test_every_recipe_resolves_at_both_scales(recipe, scale):
    cfg, _ = golf.load_config(dict(RECIPE=recipe, SCALE=scale))
    assert cfg.recipe == recipe and cfg.num_layers == 11


def test_help_lists_every_variable_and_recipe():
    text = golf.help_text()
    for name in [f.name.upper() for f in golf.fields(golf.Config)] + list(golf.RECIPES):
        assert name in text
