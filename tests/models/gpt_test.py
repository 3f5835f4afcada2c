"""Decoders: what must not change their logits, and what must."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import FrozenDict

from research.errors import UserError
from research.generation.decoding import unstack
from research.models import blocks
from research.models.gpt import Decoder

SIZES = {
    "vocab_size": 23,
    "hidden_size": 12,
    "num_layers": 2,
    "num_heads": 4,
    "intermediate_size": 20,
    "max_positions": 16,
}
LLAMA = SIZES | {
    "num_kv_heads": 2,
    "head_width": 6,
    "positions": "rotary",
    "norm": "rms",
    "gated": True,
    "activation": "silu",
    "attention_bias": False,
    "out_bias": False,
    "mlp_bias": False,
    "tie_embeddings": False,
}
MODELS = {
    "gpt2": Decoder(**SIZES),
    "llama": Decoder(**LLAMA),
    "windowed": Decoder(
        **LLAMA | {"norms": "after", "query_key_norm": True, "query_key_norm_whole": True, "rope_share": 2 / 3},
        sliding_window=3,
    ),
    "alternating": Decoder(
        **LLAMA
        | {"norms": "around", "rope_scaling": FrozenDict(rope_type="linear", factor=2.0), "rope_local_theta": 10.0},
        sliding_window=3,
        local_layers=(True, False),
        attention_softcap=2.0,
        logits_softcap=3.0,
        query_scale=5.0,
    ),
}


def tokens(*shape, seed=0):
    return np.random.default_rng(seed).integers(1, 23, shape).astype(np.int32)


@pytest.fixture(params=MODELS)
def model(request):
    return MODELS[request.param]


@functools.cache
def random_params(name):
    """Returns parameters of a model, norms' scales around one, others around zero."""
    shapes = jax.eval_shape(lambda key: MODELS[name].init(key, tokens(1, 4))["params"], jax.random.key(0))
    rng = np.random.default_rng(0)

    def draw(path, leaf):
        return jnp.asarray(("'scale'" in str(path)) + 0.4 * rng.normal(size=leaf.shape), jnp.float32)

    return jax.tree_util.tree_map_with_path(draw, shapes)


def params_of(model):
    return random_params(next(name for name, other in MODELS.items() if other == model))


@functools.partial(jax.jit, static_argnums=0)
def logits(model, params, ids, mask=None, positions=None):
    return model.apply({"params": params}, ids, mask, positions)


def assert_close(one, other, tolerance=2e-5):
    np.testing.assert_allclose(one, other, atol=tolerance * np.abs(other).max(), rtol=0)


def test_a_later_token_changes_no_earlier_logit(model):
    ids = tokens(2, 8)
    changed = ids.copy()
    changed[:, 5] = ids[:, 5] % 22 + 1
    before, after = logits(model, params_of(model), ids), logits(model, params_of(model), changed)
    assert before.shape == (2, 8, 23)
    assert before.dtype == jnp.float32
    np.testing.assert_array_equal(before[:, :5], after[:, :5])
    assert (np.abs(before[:, 5:] - after[:, 5:]).max((0, 2)) > 1e-3).all()


def test_packed_documents_equal_unpacked_ones(model):
    ids = tokens(6, 8)
    alone = np.concatenate([logits(model, params_of(model), pair) for pair in np.split(ids, 3)])
    rows = (((0, 4), (1, 5), (2, 2)), ((3, 3), (4, 6), (5, 1)))  # documents and their lengths; the rest is padding
    packed, numbers, positions = (np.zeros((2, 12), np.int32) for _ in range(3))
    for i, documents in enumerate(rows):
        start = 0
        for number, (document, length) in enumerate(documents):
            place = slice(start, start + length)
            packed[i, place], numbers[i, place], positions[i, place] = ids[document, :length], number + 1, range(length)
            start += length
    got = logits(model, params_of(model), packed, numbers, positions)
    for i, documents in enumerate(rows):
        for number, (document, length) in enumerate(documents):
            # A document alone is the beginning of its row: what stands after it is not seen.
            assert_close(got[i][numbers[i] == number + 1], alone[document, :length])
    assert np.isfinite(got).all()


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(model, side):
    ids, pad = tokens(2, 8), 4
    width = ((0, 0), (pad, 0)) if side == "left" else ((0, 0), (0, pad))
    real = slice(pad, None) if side == "left" else slice(0, 8)
    got = logits(model, params_of(model), np.pad(ids, width), np.pad(np.ones_like(ids), width))
    assert_close(got[:, real], logits(model, params_of(model), ids))
    assert np.isfinite(got).all()


@functools.partial(jax.jit, static_argnums=0)
def step(model, params, cache, ids, mask):
    variables = {"params": params} | ({"cache": cache} if cache else {})
    hidden, changed = model.apply(variables, ids, mask, method="hidden", mutable=["cache"])
    return model.apply({"params": params}, hidden[:, -1], method="logits"), changed["cache"]


def test_the_cache_gives_what_recomputation_gives_token_for_token(model):
    prompt, total = tokens(2, 4), 12
    mask = np.ones((2, total), np.int32)
    prompt[1, :2] = mask[1, :2] = 0  # the second prompt is two tokens shorter
    params, ids = params_of(model), prompt
    scores, cache = step(model, params, None, prompt, mask)
    assert jax.tree.leaves(cache["layers"])[0].shape[2] == total
    for length in range(4, total):
        # Recomputed in one shape: what stands after the last token is not seen.
        again = logits(model, params, np.pad(ids, ((0, 0), (0, total - length))), mask)[:, length - 1]
        assert_close(scores, again)
        following = np.asarray(scores).argmax(-1).astype(np.int32)[:, None]
        np.testing.assert_array_equal(following[:, 0], again.argmax(-1))
        ids = np.concatenate([ids, following], axis=1)
        scores, cache = step(model, params, cache, following, mask)
    assert len(np.unique(ids[:, 4:])) > 2


def test_several_tokens_at_once_continue_a_cache(model):
    ids, mask, params = tokens(2, 12), np.ones((2, 12), np.int32), params_of(model)
    want = logits(model, params, ids, mask)
    _, cache = step(model, params, None, ids[:, :4], mask)
    for start in (4, 8):
        scores, cache = step(model, params, cache, ids[:, start : start + 4], mask)
        assert_close(scores, want[:, start + 3])


def test_grouped_heads_equal_repeated_heads():
    model, params = MODELS["llama"], params_of(MODELS["llama"])
    attention = dict(params["layers"]["attention"])
    for name in ("key", "value"):
        kernel = attention[name]["kernel"].reshape(2, 12, 2, 6)
        attention[name] = {"kernel": jnp.repeat(kernel, 2, axis=2).reshape(2, 12, 24)}
    repeated = params | {"layers": params["layers"] | {"attention": attention}}
    assert_close(logits(model.clone(num_kv_heads=4), repeated, tokens(2, 8)), logits(model, params, tokens(2, 8)))


def test_a_window_hides_what_lies_before_it():
    # In one layer token 7 sees tokens 5 to 7, in two layers tokens 3 to 7.
    model, ids = MODELS["windowed"], tokens(2, 8)
    want = logits(model, params_of(model), ids)[0, 7]
    for position, seen in ((2, False), (3, True), (5, True)):
        changed = ids.copy()
        changed[0, position] = ids[0, position] % 22 + 1
        same = np.array_equal(logits(model, params_of(model), changed)[0, 7], want)
        assert same != seen
    wide = model.clone(sliding_window=8)
    assert_close(
        logits(wide, params_of(model), ids), logits(model.clone(sliding_window=None), params_of(model), ids), 0.0
    )


def test_rotary_positions_count_by_their_differences_only():
    params, ids = params_of(MODELS["llama"]), tokens(2, 8)
    positions = np.broadcast_to(np.arange(8), (2, 8)).astype(np.int32)
    for scaling in (None, {"rope_type": "linear", "factor": 2.0}):
        model = MODELS["llama"].clone(rope_scaling=scaling)
        compiled = jax.jit(lambda positions, model=model: model.apply({"params": params}, ids, None, positions))
        want = compiled(positions)
        assert_close(compiled(positions + 37), want)
        assert np.abs(compiled(positions * 2) - want).max() > 1e-2 * np.abs(want).max()
        if scaling:
            assert_close(compiled(positions * 2), logits(MODELS["llama"], params, ids))


def test_learned_positions_count_absolutely():
    model, params, ids = MODELS["gpt2"], params_of(MODELS["gpt2"]), tokens(2, 8)
    positions = np.broadcast_to(np.arange(8), (2, 8)).astype(np.int32)
    want = logits(model, params, ids)
    assert_close(logits(model, params, ids, None, positions), want, 0.0)
    assert np.abs(logits(model, params, ids, None, positions + 1) - want).max() > 1e-2
    assert np.isnan(logits(model, params, ids, None, positions + 9)).any()  # 16 is beyond the table: never a wrong row


def test_gradients_are_finite_and_reach_every_parameter(model):
    ids, targets = tokens(2, 8), tokens(2, 8, seed=1)
    mask = np.pad(np.ones((2, 6), np.int32), ((0, 0), (2, 0)))

    @jax.jit
    def gradient(params):
        def loss(params):
            chosen = jax.nn.log_softmax(model.apply({"params": params}, ids, mask))
            return -(jnp.take_along_axis(chosen, targets[..., None], axis=-1)[..., 0] * mask).sum()

        return jax.grad(loss)(params)

    for path, leaf in jax.tree_util.tree_leaves_with_path(gradient(params_of(model))):
        assert np.isfinite(leaf).all(), path
        # A bias of the keys shifts all scores of a query alike, which the softmax does not see.
        assert np.abs(leaf).max() > 1e-4 or "'key'" in str(path), path


def test_remat_unroll_and_dropout():
    model, ids = MODELS["llama"], tokens(2, 8)
    params = params_of(model)
    want = logits(model, params, ids)
    assert_close(logits(model.clone(remat="full", unroll=2, dropout=0.5, attention_dropout=0.5), params, ids), want)
    dropped = jax.jit(
        lambda key: model.clone(dropout=0.5).apply({"params": params}, ids, rngs={"dropout": jax.random.key(key)})
    )
    assert np.abs(dropped(0) - want).max() > 1e-2
    assert np.abs(dropped(0) - dropped(1)).max() > 1e-2


def test_bfloat16_is_near():
    model, ids = MODELS["llama"], tokens(2, 8)
    params = params_of(model)
    low = logits(model.clone(dtype="bfloat16"), params, ids)
    assert low.dtype == jnp.float32
    want = logits(model, params, ids)
    assert 0 < np.abs(low - want).max() < 0.2 * np.abs(want).max()


def test_embeddings_are_scaled():
    model, params, ids = MODELS["llama"], params_of(MODELS["llama"]), tokens(2, 8)
    scaled = params | {"word": {"embedding": 3.5 * params["word"]["embedding"]}}
    assert_close(logits(model.clone(embedding_scale=3.5), params, ids), logits(model, scaled, ids))


# On a GPU the layers of a stack stand side by side.
@pytest.mark.parametrize(("remat", "platform"), [("none", "cpu"), ("attention", "cpu"), ("full", "gpu")])
def test_layers_of_one_stack_differ_in_their_window(remat, platform, monkeypatch):
    monkeypatch.setattr(blocks, "platform", lambda: platform)
    ids, params, model = tokens(2, 8), params_of(MODELS["alternating"]), MODELS["alternating"].clone(remat=remat)

    def total(params):
        found = model.apply({"params": params}, ids)
        return (found**2).sum(), found

    def one_by_one(params):
        return total(unstack(params))

    gradients, got = jax.jit(jax.grad(total, has_aux=True))(params)
    expected, want = jax.jit(jax.grad(one_by_one, has_aux=True))(params)
    assert_close(got, want)
    jax.tree.map(functools.partial(assert_close, tolerance=1e-4), gradients, expected)
    for layers in ((False, True), (True, True), (False, False)):
        assert np.abs(logits(model.clone(local_layers=layers), params, ids) - want).max() > 1e-3


def test_logits_stay_below_their_cap():
    model, params = MODELS["alternating"], params_of(MODELS["alternating"])
    free = logits(model.clone(logits_softcap=None), params, tokens(2, 8))
    assert np.abs(free).max() > 3
    assert_close(logits(model, params, tokens(2, 8)), 3 * np.tanh(free / 3))


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_positions_that_depend_on_the_length_do_not_change_while_a_cache_fills(kind):
    factors = {"short_factor": (1.0, 1.5, 2.0), "long_factor": (2.0, 3.0, 4.0)} if kind == "longrope" else {}
    scaling = FrozenDict(rope_type=kind, factor=4.0, original_max_position_embeddings=6, **factors)
    model, params = MODELS["llama"].clone(rope_scaling=scaling), params_of(MODELS["llama"])
    ids, mask = tokens(2, 12), np.ones((2, 12), np.int32)
    want = logits(model, params, ids)
    scores, cache = step(model, params, None, ids[:, :4], mask)
    for place in range(4, 12):
        assert_close(scores, want[:, place - 1])
        scores, cache = step(model, params, cache, ids[:, place : place + 1], mask)
    short = logits(model, params, ids[:, :6])
    assert np.abs(short - want[:, :6]).max() > 1e-3
    numbers = np.pad(np.ones((2, 6), np.int32), ((0, 0), (0, 6)))
    assert_close(logits(model, params, ids, numbers)[:, :6], short)  # padding is no length


# Radford 2019, table 2, as the published files count them; Brown 2020, table 2.1, whose largest model is 174.6 billion;
# the Llamas as their cards say.
GPT3 = {"max_positions": 2048}
LLAMA_KIND = {key: value for key, value in LLAMA.items() if key not in SIZES} | {"num_kv_heads": None}
NAMED = {
    "GPT-2 small": ({}, 124_439_808),
    "GPT-2 medium": ({"hidden_size": 1024, "num_layers": 24, "num_heads": 16}, 354_823_168),
    "GPT-2 large": ({"hidden_size": 1280, "num_layers": 36, "num_heads": 20}, 774_030_080),
    "GPT-2 XL": ({"hidden_size": 1600, "num_layers": 48, "num_heads": 25}, 1_557_611_200),
    "GPT-3 175B": (GPT3 | {"hidden_size": 12288, "num_layers": 96, "num_heads": 96}, 174_600_000_000),
    "SmolLM2 135M": (
        LLAMA_KIND
        | {"vocab_size": 49152, "hidden_size": 576, "num_layers": 30, "num_heads": 9, "num_kv_heads": 3}
        | {"head_width": None, "intermediate_size": 1536, "tie_embeddings": True},
        134_515_008,
    ),
    "Llama 7B": (
        LLAMA_KIND
        | {"vocab_size": 32000, "hidden_size": 4096, "num_layers": 32, "num_heads": 32, "intermediate_size": 11008}
        | {"head_width": None},
        6_738_415_616,
    ),
}


@pytest.mark.parametrize("name", NAMED)
def test_named_sizes_have_the_published_number_of_parameters(name):
    fields, count = NAMED[name]
    if "intermediate_size" not in fields and "hidden_size" in fields:
        fields = fields | {"intermediate_size": 4 * fields["hidden_size"]}
    model = Decoder(**fields)
    shapes = jax.eval_shape(lambda key: model.init(key, np.zeros((1, 4), np.int32))["params"], jax.random.key(0))
    found = sum(leaf.size for leaf in jax.tree.leaves(shapes))
    assert found == count if "GPT-3" not in name else abs(found - count) < 5e7


def test_wrong_fields_are_named():
    for change, message in (
        ({"positions": "rotery"}, "unknown positions 'rotery'; did you mean 'rotary'"),
        ({"norm": "rsm"}, "unknown norm 'rsm'; did you mean 'rms'"),
        ({"num_heads": 5}, "hidden_size 12 is not a multiple of num_heads 5"),
        ({"norms": "arround"}, "unknown norms 'arround'; did you mean 'around'"),
        ({"local_layers": (True, False)}, "local_layers needs a sliding_window and a value for each of 2 layers"),
        ({"local_layers": (True,), "sliding_window": 3}, "value for each of 2 layers; it has 1"),
        (
            {"positions": "rotary", "head_width": 4, "rope_scaling": {"rope_type": "yarn", "factor": 2.0}},
            "rotary positions of rope_type 'yarn' need original_max_position_embeddings",
        ),
        ({"num_kv_heads": 3}, "num_heads 4 is not a multiple of num_kv_heads 3"),
        ({"positions": "rotary"}, "rotary positions need heads of an even width, not 3"),
        (
            {"positions": "rotary", "head_width": 4, "rope_scaling": {"rope_type": "yarm"}},
            "unknown rope_type 'yarm'; did you mean 'yarn'",
        ),
    ):
        model = Decoder(**SIZES | change)
        with pytest.raises(UserError, match=message):
            jax.eval_shape(lambda model=model: model.init(jax.random.key(0), tokens(1, 4)))
