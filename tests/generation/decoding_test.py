"""Generation: a cache that changes nothing, rows that do not know of each other, and Transformers' numbers."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.errors import UserError
from research.generation import decoding, sampling
from research.generation.beam_search import beam_search
from research.generation.decoding import Decoding
from research.generation.sampling import Stream, generate
from research.models.bert import Encoder, MaskedLM
from research.models.encoder_decoder import EncoderDecoder
from research.models.gpt import Decoder

TINY = {"vocab_size": 40, "hidden_size": 16, "num_layers": 2, "num_heads": 4, "intermediate_size": 32}
MODELS = {
    "gpt2": Decoder(**TINY, max_positions=32, initializer_range=0.5),
    "llama": Decoder(
        **TINY, num_kv_heads=2, positions="rotary", norm="rms", activation="silu", gated=True, initializer_range=0.5
    ),
    "window": Decoder(**TINY, positions="rotary", sliding_window=3, initializer_range=0.5),
    "marian": EncoderDecoder(**TINY, initializer_range=0.5, logits_bias=True),
    "t5": EncoderDecoder(
        **TINY,
        positions="relative",
        norm="rms",
        norm_first=True,
        use_bias=False,
        embedding_scale=1.0,
        tie_embeddings=False,
    ),
}
LENGTHS = (7, 4, 1, 6)


class Ids:
    """What generating needs to know of a tokenizer."""

    pad_id, eos_id, end_ids = 0, 5, (5,)


def ends(*ids, pad_id=0):
    """Returns what generating needs to know of a tokenizer with these end tokens."""
    ids = tuple(map(int, ids))
    return type("End", (), {"eos_id": ids[0] if ids else None, "end_ids": ids, "pad_id": pad_id})


@functools.cache
def made(name):
    """Returns a model and its parameters."""
    model, ids = MODELS[name], jnp.ones((1, 4), jnp.int32)
    return model, jax.jit(model.init)(jax.random.key(3), *[ids] * (1 + hasattr(model, "encode")))["params"]


def prompts(side="right"):
    rng = np.random.default_rng(0)
    ids, mask = np.zeros((len(LENGTHS), 7), np.int32), np.zeros((len(LENGTHS), 7), np.int32)
    for i, length in enumerate(LENGTHS):
        place = slice(0, length) if side == "right" else slice(7 - length, 7)
        ids[i, place], mask[i, place] = rng.integers(6, 40, length), 1
    return {"input_ids": ids, "attention_mask": mask}


@functools.cache
def compiled(name, settings, tokens=Ids):
    model, _ = made(name)
    return jax.jit(lambda params, batch, rng, rows: generate(model, params, batch, settings, tokens, rng, rows))


def generated(name, settings, batch, tokens=Ids, rng=None, rows=None):
    rows = jnp.arange(len(batch["input_ids"])) if rows is None else jnp.asarray(rows)
    rng = jax.random.key(0) if rng is None else rng
    return np.asarray(compiled(name, settings, tokens)(made(name)[1], batch, rng, rows))


@functools.cache
def applied(name):
    model = MODELS[name]
    return jax.jit(lambda params, *inputs: model.apply({"params": params}, *inputs))


def recomputed(name, prompt, count, start=0):
    """Returns the likeliest tokens, each found by reading everything before it again."""
    model, params = made(name)
    output = []
    for _ in range(count):
        read = [start, *output] if hasattr(model, "encode") else [*prompt, *output]
        filled = jnp.array([read + [1] * (16 - len(read))])  # what comes later changes nothing before it
        source = [jnp.array([[*prompt, *[1] * (8 - len(prompt))]])] if hasattr(model, "encode") else []
        mask = [jnp.array([[1] * len(prompt) + [0] * (8 - len(prompt))])] if source else []
        output.append(int(applied(name)(params, *source, filled, *mask)[0, len(read) - 1].argmax()))
        if output[-1] == Ids.eos_id:
            break
    return output + [Ids.pad_id] * (count - len(output))


@pytest.mark.parametrize("name", MODELS)
def test_a_cache_changes_nothing_and_a_batch_equals_its_rows(name):
    batch, settings = prompts(), Decoding(max_new_tokens=8)
    found = generated(name, settings, batch)
    for i, length in enumerate(LENGTHS):
        assert found[i].tolist() == recomputed(name, batch["input_ids"][i, :length].tolist(), 8)
    np.testing.assert_array_equal(found, generated(name, settings, prompts("left")))


BART = EncoderDecoder(
    **TINY, positions="learned", max_positions=7, embedding_norm=True, embedding_scale=1.0, initializer_range=0.5
)


@pytest.mark.parametrize("beams", [1, 2])
def test_an_encoder_decoder_with_learned_positions_ends_with_the_last_of_them(beams):
    ids = jnp.ones((1, 4), jnp.int32)
    params = jax.jit(BART.init)(jax.random.key(3), ids, ids)["params"]
    none = type("None", (Ids,), {"eos_id": None})
    settings = Decoding(max_new_tokens=10, num_beams=beams, decoder_start_id=2, forced_first_id=9)
    found = np.asarray(jax.jit(lambda params, batch: generate(BART, params, batch, settings, none))(params, prompts()))
    assert (found[:, 0] == 9).all()
    assert (found[:, 7:] == Ids.pad_id).all()
    if beams == 1:
        read = np.concatenate([np.full((4, 1), 2), found[:, :6]], axis=1)
        logits = jax.jit(BART.apply)({"params": params}, prompts()["input_ids"], read, prompts()["attention_mask"])
        np.testing.assert_array_equal(np.asarray(logits).argmax(-1)[:, 1:], found[:, 1:7])


def test_what_learned_positions_of_an_encoder_decoder_cannot_hold_is_refused():
    decoding.check_room(BART, 7, Decoding(max_new_tokens=7))
    with pytest.raises(UserError, match="the input has 8 tokens, but the model has 7 positions"):
        decoding.check_room(BART, 8, Decoding())
    with pytest.raises(UserError, match=r"config.decoding.max_new_tokens: 8 are too many, as the model has 7"):
        decoding.check_room(BART, 3, Decoding(max_new_tokens=8))


def test_an_end_token_is_followed_by_padding():
    batch, settings = prompts(), Decoding(max_new_tokens=8)
    free = generated("gpt2", settings, batch, None)
    end = ends(free[0, 3], pad_id=2)
    found = generated("gpt2", settings, batch, end)
    for row, expected in zip(found, free):
        place = expected.tolist().index(end.eos_id) if end.eos_id in expected else 7
        assert row.tolist() == expected[: place + 1].tolist() + [2] * (7 - place)


@pytest.mark.parametrize("beams", [1, 3])
def test_an_output_ends_with_any_of_several_end_tokens(beams):
    settings = Decoding(max_new_tokens=8, num_beams=beams)
    free = generated("gpt2", settings, prompts(), None)
    several = ends(39, free[0, 2], free[3, 4], pad_id=2)
    found = generated("gpt2", settings, prompts(), several)
    for row in found:
        place = next((i for i, token in enumerate(row) if token in several.end_ids), 7)
        assert (row[place + 1 :] == 2).all()
    assert any(row[-1] == 2 for row in found)
    stream = Stream(*made("gpt2"), Decoding(max_new_tokens=8), several)
    prompt = prompts()["input_ids"][0, : LENGTHS[0]].tolist()
    greedy = generated("gpt2", Decoding(max_new_tokens=8), prompts(), None)[0].tolist()
    assert list(stream(prompt, jax.random.key(0))) == list(
        itertools.takewhile(lambda token: token not in several.end_ids, greedy)
    )


def test_the_loop_ends_with_the_last_row():
    """The model is applied no more than it must be: a table that would yield NaN from some position on is not read."""
    batch, settings = prompts(), Decoding(max_new_tokens=8)
    free = generated("gpt2", settings, batch, None)
    end = ends(free[0, 1])
    model, params = made("gpt2")
    one = {name: value[:1] for name, value in batch.items()}
    calls = []
    counted = jax.jit(lambda p, b: generate(_Counted(model, calls), p, b, settings, end))
    np.testing.assert_array_equal(counted(params, one)[0, :2], free[0, :2])
    jax.effects_barrier()
    assert len(calls) == 2  # the prompt, and the first token; none after the end


class _Counted:
    def __init__(self, model, calls):
        self.model, self.calls = model, calls

    def apply(self, *arguments, method, **options):
        if method == "hidden":
            jax.debug.callback(lambda: self.calls.append(1))
        return self.model.apply(*arguments, method=method, **options)

    hidden = None


def test_layers_by_themselves_compute_what_stacked_ones_do():
    model, params = made("llama")
    ids = jnp.asarray(prompts()["input_ids"])
    alone = decoding.unstack(params)
    assert sorted(alone["layers"]) == ["0", "1"]
    np.testing.assert_allclose(
        model.apply({"params": params}, ids), model.apply({"params": alone}, ids), rtol=1e-5, atol=1e-5
    )
    assert decoding.unstack(alone) is alone


SAMPLING = Decoding(max_new_tokens=8, temperature=1.3, top_k=20, top_p=0.9, min_p=0.01, repetition_penalty=1.2)


def test_a_sample_depends_on_seed_and_row_only():
    batch = prompts()
    found = generated("llama", SAMPLING, batch)
    np.testing.assert_array_equal(found, generated("llama", SAMPLING, batch))
    assert (found != generated("llama", SAMPLING, batch, rng=jax.random.key(1))).any(axis=1).sum() >= 2
    order = np.array([2, 0, 3, 1])
    turned = generated("llama", SAMPLING, {k: v[order] for k, v in batch.items()}, rows=order)
    np.testing.assert_array_equal(turned, found[order])
    same = {name: np.repeat(value[:1], 4, axis=0) for name, value in batch.items()}
    assert len({tuple(row) for row in generated("llama", SAMPLING, same)}) > 1


@pytest.mark.parametrize("settings", [Decoding(max_new_tokens=8), SAMPLING], ids=["greedy", "sampled"])
@pytest.mark.parametrize("name", ["gpt2", "t5"])
def test_a_stream_gives_the_same_tokens(name, settings):
    batch = prompts()
    found = generated(name, settings, batch)
    stream = Stream(*made(name), settings, Ids)
    for i, length in enumerate(LENGTHS):
        tokens = list(stream(batch["input_ids"][i, :length].tolist(), jax.random.key(0), row=i))
        assert tokens == list(itertools.takewhile(lambda id: id != Ids.eos_id, found[i].tolist()))


def test_samples_follow_the_probabilities():
    logits = jnp.log(jnp.array([[0.5, 0.3, 0.15, 0.05]]))
    keys = jax.random.split(jax.random.key(0), 4000)
    warped = sampling.warp(logits, Decoding(temperature=1.0, top_p=0.9))
    drawn = np.bincount(jax.vmap(lambda key: jax.random.categorical(key, warped[0]))(keys), minlength=4) / 4000
    np.testing.assert_allclose(drawn, np.array([0.5, 0.3, 0.15, 0]) / 0.95, atol=0.03)


def softmax(x):
    exponentials = np.exp(x - x.max())
    return exponentials / exponentials.sum()


@pytest.mark.parametrize("p", [0.05, 0.3, 0.75, 0.99])
def test_top_p_keeps_the_fewest_tokens_with_that_mass(p):
    for row in np.random.default_rng(1).normal(scale=3, size=(8, 50)).astype(np.float32):
        kept = np.isfinite(np.asarray(sampling.keep_top_p(jnp.array([row]), p))[0])
        order = np.argsort(-row)
        assert kept[order].tolist() == sorted(kept[order].tolist(), reverse=True)
        mass, count = np.cumsum(softmax(row)[order]), kept.sum()
        assert mass[count - 1] >= p - 1e-6
        assert count == 1 or mass[count - 2] < p + 1e-6


def test_other_filters_are_what_they_say():
    rows = np.random.default_rng(2).normal(scale=2, size=(8, 30)).astype(np.float32)
    for k in (1, 7, 99):
        kept = np.isfinite(np.asarray(sampling.keep_top_k(jnp.array(rows), k)))
        np.testing.assert_array_equal(kept, rows >= np.sort(rows)[:, -min(k, 30)][:, None])
    for p in (0.1, 0.5, 1.0):
        shares = np.stack([softmax(row) for row in rows])
        kept = np.isfinite(np.asarray(sampling.keep_min_p(jnp.array(rows), p)))
        np.testing.assert_array_equal(kept, shares >= p * shares.max(axis=1, keepdims=True))
    seen = np.random.default_rng(3).random((8, 30)) < 0.5
    expected = np.where(seen, np.where(rows > 0, rows / 1.5, rows * 1.5), rows)
    np.testing.assert_allclose(decoding.penalise(jnp.array(rows), jnp.array(seen), 1.5), expected, rtol=1e-6)
    both = Decoding(temperature=0.5, top_k=5, top_p=0.8)
    expected = sampling.keep_top_p(sampling.keep_top_k(jnp.array(rows) / 0.5, 5), 0.8)
    np.testing.assert_array_equal(sampling.warp(jnp.array(rows), both), expected)


@pytest.mark.parametrize("name", ["gpt2", "marian"])
def test_a_penalty_knows_what_was_read(name):
    """A huge penalty forbids every token of the prompt, or the start token, and every one that was generated."""
    batch = prompts()
    found = generated(name, Decoding(max_new_tokens=8, repetition_penalty=1e6), batch, None)
    for row, ids, length in zip(found, batch["input_ids"], LENGTHS):
        assert len(set(row.tolist())) == 8
        assert not set(row.tolist()) & set(ids[:length].tolist() if name == "gpt2" else [0])


def sequences(vocabulary, length, end):
    """Yields every output there may be."""
    for tokens in itertools.product(range(vocabulary), repeat=length):
        place = tokens.index(end) if end in tokens else length - 1
        if all(id == 0 for id in tokens[place + 1 :]):
            yield tokens, place + 1


@pytest.mark.parametrize("penalty", [0.0, 2.0])
def test_beam_search_finds_the_best_of_all(penalty):
    """With more beams than there are outputs, and no early end, nothing is overlooked."""
    model = Decoder(5, 8, 1, 2, intermediate_size=16, max_positions=16, initializer_range=1.0)
    ids = jnp.array([[1, 3, 2], [4, 2, 2]])
    params = jax.jit(model.init)(jax.random.key(0), ids)["params"]
    tokens = ends(4)
    settings = Decoding(max_new_tokens=3, num_beams=64, length_penalty=penalty)
    found, scores = jax.jit(lambda p, ids: beam_search(model, p, {"input_ids": ids}, settings, tokens))(params, ids)
    every, apply = list(sequences(5, 3, 4)), jax.jit(model.apply)
    for row, best, score in zip(np.asarray(ids), np.asarray(found), np.asarray(scores)):
        whole = np.array([[*row, *output] for output, _ in every])
        logs = np.asarray(jax.nn.log_softmax(apply({"params": params}, jnp.array(whole))))
        sums = [
            sum(logs[i, 2 + t, output[t]] for t in range(length)) / length**penalty
            for i, (output, length) in enumerate(every)
        ]
        order = np.argsort(sums)[::-1]
        # The search ends when no running beam, at its present length, beats the finished ones.
        assert tuple(best[0]) == every[order[0]][0] or penalty > 0
        ranked = {every[i][0]: sums[i] for i in order}
        for output, value in zip(best[:5], score[:5]):
            assert ranked[tuple(output)] == pytest.approx(value, abs=1e-4)


@pytest.mark.parametrize("name", ["gpt2", "t5"])
def test_beams_of_a_batch_equal_those_of_its_rows(name):
    settings, batch = Decoding(max_new_tokens=6, num_beams=3), prompts()
    model, params = made(name)
    search = jax.jit(lambda params, batch: beam_search(model, params, batch, settings, Ids))
    found, scores = search(params, batch)
    assert (np.diff(scores, axis=1) <= 0).all()
    for i in range(len(LENGTHS)):
        alone, its = search(params, {name: np.repeat(value[i : i + 1], 4, axis=0) for name, value in batch.items()})
        np.testing.assert_array_equal(found[i], alone[0])
        np.testing.assert_allclose(scores[i], its[0], rtol=1e-5)


def test_early_stopping_ends_when_enough_have_finished():
    settings = Decoding(max_new_tokens=8, num_beams=2, length_penalty=3.0)
    model, params = made("marian")
    likelier = params["head_bias"].at[Ids.eos_id].set(4.0)

    def search(settings):
        apply = jax.jit(lambda params, batch: beam_search(model, params, batch, settings, Ids))
        return apply(params | {"head_bias": likelier}, prompts())

    (late, best), (early, first) = search(settings), search(dataclasses.replace(settings, early_stopping=True))
    assert (best >= first).all()
    assert (best > first).any()
    assert (late != Ids.pad_id).sum() > (early != Ids.pad_id).sum()


WRONG = {
    "max_new_tokens: 0 must be at least 1": {"max_new_tokens": 0},
    "temperature: -1.0 must be at least 0": {"temperature": -1.0},
    "top_p: 0.0 must lie in": {"top_p": 0.0, "temperature": 1.0},
    "min_p: 2.0 must lie in": {"min_p": 2.0, "temperature": 1.0},
    "repetition_penalty: 0.0 must be above 0": {"repetition_penalty": 0.0},
    "stop: an empty text": {"stop": ("a", "")},
    "temperature: beam search does not sample": {"temperature": 1.0, "num_beams": 2},
    "top_k: 5 needs a temperature above 0": {"top_k": 5},
    "length_penalty: 2.0 needs num_beams above 1": {"length_penalty": 2.0},
}


@pytest.mark.parametrize("message", WRONG)
def test_settings_that_are_wrong(message):
    with pytest.raises(UserError) as caught:
        Decoding(**WRONG[message])
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize("model", [Encoder(**TINY), MaskedLM(Encoder(**TINY))])
def test_models_that_cannot_generate(model):
    with pytest.raises(UserError, match=f"{type(model).__name__} cannot generate text; use a decoder"):
        decoding.check_model(model)


def test_models_that_can():
    for model in MODELS.values():
        decoding.check_model(model)


def test_room():
    model = MODELS["gpt2"]
    decoding.check_room(model, 24, Decoding(max_new_tokens=9))
    with pytest.raises(UserError, match=r"max_new_tokens: 10 .* a prompt of 24 tokens, .* 32 positions; set at most 9"):
        decoding.check_room(model, 24, Decoding(max_new_tokens=10))
    with pytest.raises(UserError, match="the prompt has 32 tokens, but the model has 32 positions"):
        decoding.check_room(model, 32, Decoding(max_new_tokens=1))
    decoding.check_room(MODELS["llama"], 10**6, Decoding())


@pytest.mark.parametrize("beams", [1, 3])
def test_an_output_ends_with_the_positions(beams):
    """What comes after them would be made of the table's NaN."""
    end, most = ends(pad_id=2), 32 + 1 - LENGTHS[0]
    found = generated("gpt2", Decoding(max_new_tokens=40, num_beams=beams), prompts(), end)
    short = generated("gpt2", Decoding(max_new_tokens=most, num_beams=beams), prompts(), end)
    np.testing.assert_array_equal(found[0, :most], short[0])
    for row, length in zip(found, LENGTHS):
        assert (row[32 + 1 - length :] == 2).all()


def test_padding_to_few_lengths():
    batch = decoding.pad([[7] * 3, [8] * 17], pad_id=2)
    assert batch["input_ids"].shape == (2, 32)
    assert batch["input_ids"][0].tolist() == [2] * 29 + [7] * 3
    assert batch["attention_mask"].sum(axis=1).tolist() == [3, 17]
    assert decoding.pad([[7]], pad_id=2)["input_ids"].shape == (1, 16)
