"""Encoder-decoders: who sees whom, positions, packing, the cache, and what initial values keep."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.errors import UserError
from research.models.encoder_decoder import EncoderDecoder
from research.models.positions import RelativeBias, by_distance, sinusoids

SIZES = {
    "vocab_size": 40,
    "hidden_size": 12,
    "num_layers": 2,
    "num_decoder_layers": 3,
    "num_heads": 3,
    "intermediate_size": 20,
}
T5 = {"positions": "relative", "norm": "rms", "norm_first": True, "use_bias": False, "embedding_scale": 1.0}
KINDS = {
    "transformer": {"logits_bias": True},
    "t5": {**T5, "head_width": 5, "logits_scale": 12**-0.5, "relative_buckets": 8, "relative_max_distance": 6},
    "t5 v1.1": {**T5, "activation": "gelu_new", "gated": True, "tie_embeddings": False},
}
RATES = ("dropout", "attention_dropout", "activation_dropout")


def make(kind, **options):
    return EncoderDecoder(**{**SIZES, **KINDS[kind], **options})


def random_params(model):
    """Returns parameters that are all far from zero, so that everything counts."""
    ids = np.zeros((1, 4), np.int32)
    shapes = jax.eval_shape(lambda key: model.init(key, ids, ids)["params"], jax.random.key(0))
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda leaf: rng.normal(scale=0.4, size=leaf.shape).astype(np.float32), shapes)


@functools.partial(jax.jit, static_argnums=0, static_argnames=("method", "mutable"))
def apply(model, params, *arguments, cache=None, **options):
    return model.apply({"params": params} | ({"cache": cache} if cache else {}), *arguments, **options)


def tokens(seed, length, size=3):
    return np.random.default_rng(seed).integers(1, SIZES["vocab_size"], (size, length)).astype(np.int32)


def assert_close(ours, theirs):
    np.testing.assert_allclose(ours, theirs, atol=2e-5 * float(np.abs(theirs).max()))


def pad(array, before, after):
    return np.pad(array, ((0, 0), (before, after)))


@pytest.fixture(params=["transformer", "t5"])
def kind(request):
    return request.param


# Who sees whom


def test_the_decoder_sees_no_later_token_and_all_of_the_source(kind):
    model, source, target = make(kind), tokens(0, 7), tokens(1, 6)
    params = random_params(model)
    before = np.asarray(apply(model, params, source, target))
    for t in (1, 5):
        other = target.copy()
        other[:, t] = other[:, t] % 39 + 1
        after = np.asarray(apply(model, params, source, other))
        np.testing.assert_array_equal(after[:, :t], before[:, :t])
        assert (np.abs(after - before)[:, t:].max(axis=-1) > 1e-4).all()
    for s in (0, 6):
        other = source.copy()
        other[:, s] = other[:, s] % 39 + 1
        assert (np.abs(np.asarray(apply(model, params, other, target)) - before).max(axis=-1) > 1e-4).all()


def test_padding_of_either_side_does_not_matter(kind):
    before, after = 2, 3
    model, source, target = make(kind), tokens(0, 7), tokens(1, 6)
    params = random_params(model)
    expected = apply(model, params, source, target)
    ones, decoder_ones = np.ones_like(source), np.ones_like(target)
    ours = apply(
        model,
        params,
        *(pad(ids, before, after) for ids in (source, target)),
        *(pad(mask, before, after) for mask in (ones, decoder_ones)),
    )
    assert_close(ours[:, before : before + 6], expected)


def test_no_mask_is_a_mask_of_ones(kind):
    model, source, target = make(kind), tokens(0, 7), tokens(1, 6)
    params = random_params(model)
    ours = apply(model, params, source, target, np.ones_like(source), np.ones_like(target))
    np.testing.assert_array_equal(ours, apply(model, params, source, target))


def test_packed_pairs_equal_pairs_by_themselves(kind):
    model = make(kind)
    params = random_params(model)
    sources, targets = (
        [tokens(10 * i + j, n, size=1) for j, n in enumerate(lengths)]
        for i, lengths in enumerate(([4, 6, 4], [5, 2, 5]))
    )

    def pack(pieces):
        rows = [np.concatenate([*pieces, np.zeros((1, 3), np.int32)], axis=1)]
        rows.append(
            np.concatenate([*(np.full_like(p, i + 1) for i, p in enumerate(pieces)), np.zeros((1, 3), np.int32)], 1)
        )
        rows.append(np.concatenate([*(np.arange(p.size)[None] for p in pieces), np.zeros((1, 3), int)], 1))
        return [row.astype(np.int32) for row in rows]

    (ids, numbers, places), (decoder_ids, decoder_numbers, decoder_places) = pack(sources), pack(targets)
    packed = apply(model, params, ids, decoder_ids, numbers, decoder_numbers, places, decoder_places)
    start = 0
    for source, target in zip(sources, targets):
        alone = apply(model, params, source, target)
        assert_close(packed[:, start : start + target.size], alone)
        start += target.size


# The cache


def test_the_cache_equals_recomputation(kind):
    model, source, target = make(kind), tokens(0, 7), tokens(1, 6)
    params = random_params(model)
    mask, decoder_mask = np.ones_like(source), np.ones((3, 9), np.int32)  # room for more than there are
    mask[1, 4:] = 0
    decoder_mask[2, :2] = 0  # a prompt that is padded at its beginning
    expected = apply(model, params, source, target, mask, decoder_mask[:, :6])
    encoded = apply(model, params, source, mask, method="encode")
    outputs, cache, start = [], None, 0
    for length in (3, 1, 1, 1):
        piece = target[:, start : start + length]
        hidden, state = apply(
            model, params, piece, encoded, mask, decoder_mask, cache=cache, method="decode", mutable="cache"
        )
        outputs.append(apply(model, params, hidden, method="logits"))
        cache, start = state["cache"], start + length
        encoded = encoded if start == length else jnp.zeros_like(encoded)  # its keys and values are kept
    ours = np.concatenate(outputs, axis=1)
    real = decoder_mask[:, :6] == 1
    assert_close(ours[real], np.asarray(expected)[real])


def test_what_is_kept_of_the_source_is_what_the_first_call_saw(kind):
    model, source, target = make(kind), tokens(0, 7), tokens(1, 6)
    params = random_params(model)
    encoded = apply(model, params, source, method="encode")
    room = np.ones((3, 6), np.int32)
    _, state = apply(model, params, target[:, :2], encoded, None, room, method="decode", mutable="cache")
    shapes = jax.tree.map(jnp.shape, state["cache"]["decoder"]["layers"])
    width = model.head_width or 4
    assert shapes["cross_attention"]["keys"] == (3, 3, 7, 3, width)
    assert shapes["attention"]["keys"] == (3, 3, 6, 3, width)
    assert int(state["cache"]["cache_index"]["index"]) == 2


# Positions


def bucket(distance, bidirectional, buckets, greatest):
    """Raffel 2019, section 2.1: exact up to half of the buckets, then logarithmic."""
    base = 0
    if bidirectional:
        buckets //= 2
        base = buckets if distance > 0 else 0
        distance = abs(distance)
    else:
        distance = max(-distance, 0)
    exact = buckets // 2
    if distance < exact:
        return base + distance
    return base + min(
        exact + int(math.log(distance / exact) / math.log(greatest / exact) * (buckets - exact)), buckets - 1
    )


@pytest.mark.parametrize("bidirectional", [True, False])
@pytest.mark.parametrize(("buckets", "greatest"), [(32, 128), (8, 6), (7, 100), (16, 64), (128, 100)])
def test_relative_buckets_follow_the_paper(bidirectional, buckets, greatest):
    module = RelativeBias(1, buckets, greatest, bidirectional)
    table = {"params": {"embedding": jnp.arange(buckets, dtype=jnp.float32)[:, None]}}
    ours = jax.jit(lambda: by_distance(module.apply(table, 150, 150), 150))()[0]
    expected = [[bucket(key - query, bidirectional, buckets, greatest) for key in range(150)] for query in range(150)]
    np.testing.assert_array_equal(ours, expected)
    later = jax.jit(lambda index: by_distance(module.apply(table, 3, 150, index), 3))(90)[0]
    np.testing.assert_array_equal(later, expected[90:93])


@pytest.mark.parametrize(("buckets", "greatest"), [(32, 8), (2, 128)])
def test_buckets_that_do_not_fit_are_named(buckets, greatest):
    with pytest.raises(UserError, match=f"{buckets} relative buckets do not fit a greatest distance of {greatest}"):
        RelativeBias(1, buckets, greatest).init(jax.random.key(0), 3, 3)


@pytest.mark.parametrize("width", [12, 13])
def test_sinusoids_are_vaswanis_with_the_sines_first(width):
    positions = np.array([[0, 1, 2, 500], [7, 7, 63, 1023]])
    ours = sinusoids(jnp.asarray(positions), width)
    angles = [[[p / 10000 ** (2 * (i // 2) / width) for i in range(width)] for p in row] for row in positions]
    expected = np.where(np.arange(width) % 2 == 0, np.sin(angles), np.cos(angles))
    expected = np.concatenate([expected[..., 0::2], expected[..., 1::2]], axis=-1)
    np.testing.assert_allclose(ours, expected, atol=2e-4)


def test_positions_count_what_is_no_padding_and_matter():
    model, source, target = make("transformer"), tokens(0, 7), tokens(1, 6)
    params = random_params(model)
    places = np.broadcast_to(np.arange(7), source.shape)
    default = apply(model, params, source, target)
    np.testing.assert_array_equal(apply(model, params, source, target, None, None, places), default)
    other = apply(model, params, source, target, None, None, places + 1)
    assert np.abs(np.asarray(other - default)).max() > 1e-3


# Initial values


@functools.partial(jax.jit, static_argnums=0)
def initial(model, source, target):
    """Returns new parameters with the encoder's states and the logits that they make."""
    params = jax.jit(model.init)(jax.random.key(0), source, target)
    return params["params"], model.apply(params, source, method="encode"), model.apply(params, source, target)


@pytest.mark.parametrize("kind", KINDS)
def test_initial_values_keep_the_variance_at_one(kind):
    model = make(kind, vocab_size=500, hidden_size=96, num_heads=4, head_width=24, intermediate_size=192)
    model = model.clone(logits_scale=96**-0.5 if kind == "t5" else 1.0)
    source, target = (np.random.default_rng(i).integers(0, 500, (8, 20)).astype(np.int32) for i in range(2))
    params, encoded, logits = initial(model, source, target)
    words = model.embedding_scale or math.sqrt(96)
    assert 0.95 < words * np.std(params["word"]["embedding"]) < 1.05
    assert 0.95 < np.std(encoded) < 1.05
    assert 0.8 < np.std(logits) < 1.2
    kernels = params["decoder"]["layers"]["attention"]
    spread = {name: np.std(kernels[name]["kernel"]) * math.sqrt(96) for name in ("query", "key")}
    assert 0.95 < spread["key"] < 1.05
    # Scores of T5 are not scaled, so that its queries are.
    assert 0.95 < spread["query"] * (1 if kind == "transformer" else math.sqrt(24)) < 1.05


def test_a_standard_deviation_may_be_given():
    model = make("t5", initializer_range=0.07, vocab_size=500)
    params = jax.jit(model.init)(jax.random.key(0), tokens(0, 3), tokens(1, 3))["params"]
    assert 0.065 < np.std(params["word"]["embedding"]) < 0.075
    assert 0.06 < np.std(params["encoder"]["layers"]["mlp"]["up"]["kernel"]) < 0.08
    assert 0.06 < np.std(params["encoder"]["layers"]["attention"]["query"]["kernel"]) < 0.08


# Sizes: (layers, width, F, heads, head width) -> parameters, of the published checkpoints.
SMALL = {"vocab_size": 32128, **T5}
PUBLISHED = {
    "t5-small": ((6, 512, 2048, 8, 64), {}, 60_506_624),
    "t5-base": ((12, 768, 3072, 12, 64), {}, 222_903_552),
    "t5-large": ((24, 1024, 4096, 16, 64), {}, 737_668_096),
    "t5-3b": ((24, 1024, 16384, 32, 128), {}, 2_851_598_336),
    "t5-11b": ((24, 1024, 65536, 128, 128), {}, 11_307_321_344),
    "t5-v1_1-small": ((8, 512, 1024, 6, 64), KINDS["t5 v1.1"], 76_961_152),
    "t5-v1_1-base": ((12, 768, 2048, 12, 64), KINDS["t5 v1.1"], 247_577_856),
    "t5-v1_1-large": ((24, 1024, 2816, 16, 64), KINDS["t5 v1.1"], 783_150_080),
    "t5-v1_1-xl": ((24, 2048, 5120, 32, 64), KINDS["t5 v1.1"], 2_849_757_184),
    "t5-v1_1-xxl": ((24, 4096, 10240, 64, 64), KINDS["t5 v1.1"], 11_135_332_352),
}


def count(model):
    ids = np.zeros((1, 4), np.int32)
    shapes = jax.eval_shape(lambda key: model.init(key, ids, ids)["params"], jax.random.key(0))
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes))


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_sizes_have_their_number_of_parameters(name):
    (num_layers, width, intermediate, heads, head_width), options, expected = PUBLISHED[name]
    sizes = {"num_layers": num_layers, "hidden_size": width, "intermediate_size": intermediate}
    assert (
        count(EncoderDecoder(**{**SMALL, **options, **sizes, "num_heads": heads, "head_width": head_width})) == expected
    )


@pytest.mark.parametrize(
    ("millions", "options"), [(65, {}), (213, {"hidden_size": 1024, "intermediate_size": 4096, "num_heads": 16})]
)
def test_vaswanis_sizes_have_about_their_number_of_parameters(millions, options):
    assert count(EncoderDecoder(**options)) == pytest.approx(1e6 * millions, rel=0.03)


# What must not change the result


@pytest.mark.parametrize("options", [{"unroll": 2}, {"remat": "full"}])
def test_unroll_and_remat_change_nothing(options):
    source, target = tokens(0, 7), tokens(1, 6)
    params = random_params(make("t5 v1.1"))
    assert_close(
        apply(make("t5 v1.1", **options), params, source, target), apply(make("t5 v1.1"), params, source, target)
    )


def test_bfloat16_is_finite_near_float32_and_ends_in_float32(kind):
    model, source, target = make(kind), tokens(0, 7), tokens(1, 6)
    params = jax.tree.map(lambda leaf: 0.5 * leaf, random_params(model))
    expected, ours = (apply(one, params, source, target) for one in (model, make(kind, dtype="bfloat16")))
    assert ours.dtype == jnp.float32
    assert np.abs(ours - expected).max() < 0.1 * np.abs(expected).max()


@pytest.mark.parametrize("rate", RATES)
def test_each_dropout_rate_is_used_and_only_with_a_key(rate):
    still = make("t5", **dict.fromkeys(RATES, 0.0))
    model, source, target, key = still.clone(**{rate: 0.5}), tokens(0, 7), tokens(1, 6), {"dropout": jax.random.key(0)}
    params = random_params(still)
    expected = apply(still, params, source, target, rngs=key)
    np.testing.assert_allclose(apply(model, params, source, target), expected, atol=1e-6)
    assert not np.allclose(apply(model, params, source, target, rngs=key), expected, atol=1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_parameters_are_named_and_stacked(kind):
    params = random_params(make(kind))
    assert (
        set(params)
        == {"word", "encoder", "decoder"}
        | {
            "transformer": {"head_bias"},
            "t5": set(),
            "t5 v1.1": {"head"},
        }[kind]
    )
    assert set(params["decoder"]) == ({"layers"} if kind == "transformer" else {"layers", "norm", "relative_bias"})
    blocks = {"attention", "attention_norm", "mlp", "mlp_norm"}
    assert set(params["encoder"]["layers"]) == blocks
    assert set(params["decoder"]["layers"]) == blocks | {"cross_attention", "cross_attention_norm"}
    assert {leaf.shape[0] for leaf in jax.tree.leaves(params["decoder"]["layers"])} == {3}
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(params))


def test_unknown_options_are_named():
    with pytest.raises(UserError, match="unknown positions 'relativ'; did you mean 'relative'"):
        random_params(make("t5", positions="relativ"))
    with pytest.raises(UserError, match="unknown norm 'rmsnorm'; did you mean 'rms'"):
        random_params(make("t5", norm="rmsnorm"))
