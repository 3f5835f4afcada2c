"""Encoders of the BERT kind: what padding, positions, token types, dropout and precision may and may not change."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.models import bert

SIZES = {
    "vocab_size": 40,
    "hidden_size": 12,
    "num_layers": 2,
    "num_heads": 3,
    "intermediate_size": 20,
    "max_positions": 24,
}
PAD = 5
ENCODER_RATES, HEAD_RATES = ("dropout", "attention_dropout"), ("head_dropout", "head_input_dropout")
KINDS = {"bert": {}, "roberta": {"position_offset": PAD}, "distilbert": {"num_token_types": 0}}


def classifier(kind="bert", **options):
    return bert.SequenceClassifier(bert.Encoder(**{**SIZES, **KINDS[kind], **options}), num_outputs=3)


def random_params(model):
    """Returns parameters that are all far from zero, so that everything counts."""
    shapes = jax.eval_shape(lambda key: model.init(key, np.zeros((1, 4), np.int32))["params"], jax.random.key(0))
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda leaf: rng.normal(scale=0.4, size=leaf.shape).astype(np.float32), shapes)


@functools.partial(jax.jit, static_argnums=0)
def apply(model, params, *arguments, **options):
    """Applies a model compiled, as a scan that is not would be compiled again in every call."""
    return model.apply({"params": params}, *arguments, **options)


def tokens(seed=0, size=4, length=10):
    return np.random.default_rng(seed).integers(PAD + 1, SIZES["vocab_size"], (size, length)).astype(np.int32)


@pytest.mark.parametrize("kind", KINDS)
def test_padding_changes_nothing(kind):
    model, ids = classifier(kind), tokens()
    params = random_params(model)
    padded = np.pad(ids, ((0, 0), (0, 7)), constant_values=PAD)
    mask = np.pad(np.ones_like(ids), ((0, 0), (0, 7)))
    np.testing.assert_allclose(apply(model, params, padded, mask), apply(model, params, ids), atol=1e-5)
    encoder = params["encoder"]
    states = apply(model.encoder, encoder, padded, mask)
    np.testing.assert_allclose(states[:, :10], apply(model.encoder, encoder, ids), atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_a_masked_token_is_never_seen_and_an_unmasked_one_is(kind):
    model, ids = classifier(kind), tokens()
    params, mask, other = random_params(model), np.ones_like(ids), ids.copy()
    mask[:, 6] = 0
    other[:, 6] = other[:, 6] % 30 + PAD + 2
    assert (other[:, 6] != ids[:, 6]).all()
    np.testing.assert_array_equal(apply(model, params, ids, mask), apply(model, params, other, mask))
    difference = np.abs(np.asarray(apply(model, params, ids) - apply(model, params, other)))
    assert difference.max() > 1e-3


@pytest.mark.parametrize("kind", KINDS)
def test_no_mask_is_a_mask_of_ones_of_any_dtype(kind):
    model, ids = classifier(kind), tokens()
    params = random_params(model)
    for dtype in (bool, np.int32, np.float32):
        ones = np.ones(ids.shape, dtype)
        np.testing.assert_array_equal(apply(model, params, ids, ones), apply(model, params, ids))


@pytest.mark.parametrize("kind", KINDS)
def test_examples_do_not_see_one_another(kind):
    model, ids = classifier(kind), tokens()
    params = random_params(model)
    together = apply(model, params, ids)
    for row in range(4):
        np.testing.assert_allclose(apply(model, params, ids[row : row + 1])[0], together[row], atol=1e-5)


def test_positions_count_from_zero_and_matter():
    model, ids = classifier(), tokens()
    params = random_params(model)["encoder"]
    explicit = np.broadcast_to(np.arange(10), ids.shape)
    default = apply(model.encoder, params, ids)
    np.testing.assert_array_equal(apply(model.encoder, params, ids, positions_BxT=explicit), default)
    assert not np.allclose(apply(model.encoder, params, ids, positions_BxT=explicit + 1), default, atol=1e-3)


def test_roberta_counts_real_tokens_from_behind_the_padding_id():
    model = classifier("roberta")
    params = random_params(model)["encoder"]
    ids = np.array([[9, 8, 7, PAD, PAD], [PAD, 9, PAD, 8, 7]], np.int32)
    explicit = np.array([[0, 1, 2, -1, -1], [-1, 0, -1, 1, 2]], np.int32)
    expected = apply(model.encoder, params, ids, positions_BxT=explicit)
    np.testing.assert_array_equal(apply(model.encoder, params, ids), expected)


def test_a_text_longer_than_the_positions_is_nan_not_wrong():
    model = classifier()
    assert np.isnan(apply(model, random_params(model), tokens(length=25))).all()
    assert np.isfinite(apply(model, random_params(model), tokens(length=24))).all()


@pytest.mark.parametrize("kind", KINDS)
def test_token_types_are_zeros_unless_given(kind):
    model, ids = classifier(kind), tokens()
    params = random_params(model)
    default = apply(model, params, ids)
    np.testing.assert_array_equal(apply(model, params, ids, None, np.zeros_like(ids)), default)
    ones = apply(model, params, ids, None, np.ones_like(ids))
    assert np.allclose(ones, default, atol=1e-4) == (kind == "distilbert")


def test_parameters_are_named_and_stacked():
    params = random_params(classifier())
    assert set(params) == {"encoder", "head_dense", "head_output"}
    assert set(params["encoder"]["embeddings"]) == {"word", "position", "token_type", "norm"}
    assert set(params["encoder"]["layers"]) == {"attention", "attention_norm", "mlp", "mlp_norm"}
    assert params["encoder"]["layers"]["attention"]["query"]["kernel"].shape == (2, 12, 12)
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(params))


@pytest.mark.parametrize("options", [{"unroll": 2}, {"remat": "full"}])
def test_unroll_and_remat_change_nothing(options):
    plain, other, ids = classifier(), classifier(**options), tokens()
    params = random_params(plain)
    np.testing.assert_allclose(apply(other, params, ids), apply(plain, params, ids), atol=1e-5)


def test_bfloat16_is_finite_near_float32_and_ends_in_float32():
    model, half, ids = classifier(), classifier(dtype="bfloat16"), tokens()
    params, mask = random_params(model), np.ones_like(ids)
    mask[:, 7:] = 0
    expected, ours = apply(model, params, ids, mask), apply(half, params, ids, mask)
    assert ours.dtype == jnp.float32
    assert np.abs(ours - expected).max() < 0.1 * np.abs(expected).max()

    gradients = jax.jit(jax.grad(lambda params: half.apply({"params": params}, ids, mask).sum()))(params)
    assert all(leaf.dtype == jnp.float32 and np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradients))


def with_rates(**rates):
    encoder, head = ({name: rates.get(name, 0.0) for name in names} for names in (ENCODER_RATES, HEAD_RATES))
    return bert.SequenceClassifier(bert.Encoder(**SIZES, **encoder), 3, **head)


def test_the_last_dropout_leaves_the_mean_as_it_is():
    # It is the only one with nothing but a linear map behind it.
    model = with_rates(head_dropout=0.4)
    params, ids = random_params(model), tokens(size=1)
    keys = jax.random.split(jax.random.key(0), 4000)
    draw = jax.jit(jax.vmap(lambda key: model.apply({"params": params}, ids, rngs={"dropout": key})[0]))
    draws = np.asarray(draw(keys))
    spread = draws.std(axis=0) / np.sqrt(len(keys))
    assert (spread > 0).all()
    assert (np.abs(draws.mean(axis=0) - apply(model, params, ids)[0]) < 5 * spread).all()


@pytest.mark.parametrize("rate", [*ENCODER_RATES, *HEAD_RATES])
def test_each_dropout_rate_is_used_and_only_with_a_key(rate):
    model, ids, key = with_rates(**{rate: 0.5}), tokens(), {"dropout": jax.random.key(0)}
    params = random_params(model)
    still = apply(with_rates(), params, ids, rngs=key)
    np.testing.assert_allclose(apply(model, params, ids), still, atol=1e-6)
    assert not np.allclose(apply(model, params, ids, rngs=key), still, atol=1e-3)


# Other heads


def heads(**rates):
    encoder = bert.Encoder(**SIZES, dropout=0.0, attention_dropout=0.0)
    return {
        "masked_lm": bert.MaskedLM(encoder),
        "masked_lm, untied": bert.MaskedLM(encoder, "relu", tie_embeddings=False),
        "question_answerer": bert.QuestionAnswerer(encoder, **rates),
        "token_classifier": bert.TokenClassifier(encoder, 5, **rates),
    }


def normalise(x):
    return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-12)


@pytest.mark.parametrize("name", heads())
def test_other_heads_follow_their_formulas(name):
    model, ids = heads()[name], tokens(size=2)
    params, mask = random_params(model), np.ones_like(ids)
    mask[1, 6:] = 0
    states = np.asarray(apply(model.encoder, params["encoder"], ids, mask))
    if name.startswith("masked_lm"):
        dense, norm = params["head_dense"], params["head_norm"]
        hidden = states @ dense["kernel"] + dense["bias"]
        hidden = (
            np.maximum(hidden, 0) if name.endswith("untied") else np.asarray(jax.nn.gelu(hidden, approximate=False))
        )
        hidden = normalise(hidden) * norm["scale"] + norm["bias"]
        table = params["encoder"]["embeddings"]["word"]["embedding"].T
        expected = (
            hidden @ (params["head_output"]["kernel"] if name.endswith("untied") else table) + params["head_bias"]
        )
    else:
        expected = states @ params["head_output"]["kernel"] + params["head_output"]["bias"]
    ours = apply(model, params, ids, mask)
    assert ours.dtype == jnp.float32
    assert ours.shape == (2, 10, {"m": SIZES["vocab_size"], "q": 2, "t": 5}[name[0]])
    np.testing.assert_allclose(ours, expected, atol=2e-5 * np.abs(expected).max())


@functools.partial(jax.jit, static_argnums=0, static_argnames="method")
def call(model, params, *arguments, method):
    return model.apply({"params": params}, *arguments, method=method)


def test_a_masked_lm_scores_some_tokens_as_it_scores_all():
    model, ids = heads()["masked_lm"], tokens()
    params = random_params(model)
    hidden = call(model, params, ids, method="hidden")
    some = call(model, params, hidden[:, 2:4], method="logits")
    np.testing.assert_allclose(some, apply(model, params, ids)[:, 2:4], atol=1e-4)


def test_a_masked_lm_of_packed_documents_is_that_of_each_by_itself():
    model, first, second = heads()["masked_lm"], tokens(0, 2, 4), tokens(1, 2, 5)
    params = random_params(model)
    ids = np.concatenate([first, second, np.full((2, 3), PAD, np.int32)], axis=1)
    numbers = np.broadcast_to(np.repeat([1, 2, 0], [4, 5, 3]), ids.shape)
    positions = np.broadcast_to(np.concatenate([np.arange(4), np.arange(5), np.zeros(3, int)]), ids.shape)
    packed = apply(model, params, ids, numbers, None, positions)
    np.testing.assert_allclose(packed[:, :4], apply(model, params, first), atol=1e-4)
    np.testing.assert_allclose(packed[:, 4:9], apply(model, params, second), atol=1e-4)


@pytest.mark.parametrize("name", ["question_answerer", "token_classifier"])
def test_the_head_dropout_of_tokens_is_used_and_only_with_a_key(name):
    model, ids, key = heads(head_dropout=0.5)[name], tokens(), {"dropout": jax.random.key(0)}
    params = random_params(model)
    still = apply(heads(head_dropout=0.0)[name], params, ids, rngs=key)
    np.testing.assert_allclose(apply(model, params, ids), still, atol=1e-6)
    assert not np.allclose(apply(model, params, ids, rngs=key), still, atol=1e-3)


def test_a_question_answerer_drops_nothing_unless_it_is_told_to():
    assert heads()["question_answerer"].head_dropout == 0.0
    assert heads()["token_classifier"].head_dropout == 0.1


def test_positions_may_begin_as_sinusoids_as_large_as_the_others():
    encoder = bert.Encoder(**SIZES | {"hidden_size": 48}, initializer_range=0.1, sinusoidal_start=True)
    table = jax.jit(encoder.init)(jax.random.key(0), tokens())["params"]["embeddings"]["position"]["embedding"]
    np.testing.assert_allclose(np.square(table).mean(), 0.1**2, rtol=1e-5)
    products = np.asarray(table @ table.T)
    for distance in (0, 1, 5):  # they depend on the distance alone
        np.testing.assert_allclose(np.diagonal(products, distance), products[0, distance], rtol=1e-4)
