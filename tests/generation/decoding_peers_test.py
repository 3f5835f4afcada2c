"""Outputs equal Transformers' on the same random weights."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.generation.beam_search import beam_search
from research.generation.decoding import Decoding
from research.generation.sampling import generate, warp
from research.models.encoder_decoder import EncoderDecoder
from research.models.gpt import Decoder
from research.pretrained import huggingface

pytestmark = pytest.mark.peers
torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

TINY = {"vocab_size": 40, "hidden_size": 16, "num_layers": 2, "num_heads": 4, "intermediate_size": 32}
LLAMA = {"positions": "rotary", "norm": "rms", "activation": "silu", "gated": True, "num_kv_heads": 2}
BARE = {"attention_bias": False, "out_bias": False, "mlp_bias": False}
BART = {"positions": "learned", "max_positions": 12, "embedding_norm": True, "initializer_range": 0.02}
T5 = {"positions": "relative", "norm": "rms", "norm_first": True, "use_bias": False, "embedding_scale": 1.0}
MODELS = {
    "gpt2": Decoder(**TINY, max_positions=64),
    "llama": Decoder(**TINY, **LLAMA, **BARE),
    "marian": EncoderDecoder(**TINY, logits_bias=True, embedding_scale=1.0),
    "bart": EncoderDecoder(**TINY, **BART, logits_bias=True, embedding_scale=1.0),
    "t5": EncoderDecoder(**TINY, **T5, logits_scale=0.25),
}
LENGTHS = (7, 4, 1, 6)
NEW = 10


PAD = 1


@dataclasses.dataclass
class Ids:
    """What generating needs to know of a tokenizer."""

    eos_id: int | None
    pad_id: int = PAD

    @property
    def end_ids(self):
        return () if self.eos_id is None else (self.eos_id,)


@pytest.fixture(scope="module", params=MODELS)
def pair(request, tmp_path_factory):
    """A model, parameters that make its outputs differ, an end that many of them reach, and Transformers' model."""
    model = MODELS[request.param]
    inputs = [np.zeros((1, 4), np.int32)] * (1 + hasattr(model, "encode"))
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), *inputs)["params"])
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda x: rng.normal(scale=0.5, size=x.shape).astype(np.float32), shapes)
    settings = Decoding(NEW, num_beams=4)
    free = jax.jit(lambda params, batch: beam_search(model, params, batch, settings, Ids(None))[0])(
        params, prompts(model)
    )
    ends = Ids(max(range(PAD + 1, 40), key=lambda id: (np.asarray(free)[..., 2:] == id).any(axis=-1).sum()))
    config = {"pad_token_id": PAD, "eos_token_id": ends.eos_id, "bos_token_id": PAD}
    config |= {"decoder_start_token_id": PAD, "forced_eos_token_id": None}
    folder = huggingface.save(tmp_path_factory.mktemp("model") / request.param, model, params, config=config)
    kind = "AutoModelForSeq2SeqLM" if hasattr(model, "encode") else "AutoModelForCausalLM"
    return model, params, ends, getattr(transformers, kind).from_pretrained(folder).eval()


def prompts(model):
    left = not hasattr(model, "encode")
    rng = np.random.default_rng(1)
    ids, mask = np.full((len(LENGTHS), 7), PAD, np.int32), np.zeros((len(LENGTHS), 7), np.int32)
    for i, length in enumerate(LENGTHS):
        place = slice(7 - length, 7) if left else slice(0, length)
        ids[i, place], mask[i, place] = rng.integers(6, 40, length), 1
    return {"input_ids": ids, "attention_mask": mask}


def theirs(model, batch, ends, **settings):
    """Returns their new tokens [rows, NEW], padded as ours are."""
    inputs = {name: torch.tensor(value, dtype=torch.long) for name, value in batch.items()}
    settings |= {"do_sample": False, "max_new_tokens": NEW, "pad_token_id": PAD, "eos_token_id": ends.eos_id}
    with torch.no_grad():
        found = model.generate(**inputs, **settings, return_dict_in_generate=True, output_scores=True)
    start = 1 if model.config.is_encoder_decoder else batch["input_ids"].shape[1]
    tokens = found.sequences[:, start:].numpy()
    return np.pad(tokens, [(0, 0), (0, NEW - tokens.shape[1])], constant_values=PAD), found


@pytest.mark.parametrize("penalty", [1.0, 1.3])
def test_the_likeliest_tokens(pair, penalty):
    model, params, ends, other = pair
    batch, settings = prompts(model), Decoding(NEW, repetition_penalty=penalty)
    found = jax.jit(lambda params, batch: generate(model, params, batch, settings, ends))(params, batch)
    np.testing.assert_array_equal(found, theirs(other, batch, ends, repetition_penalty=penalty)[0])


BEAMS = {
    "two": {"num_beams": 2},
    "five": {"num_beams": 5, "length_penalty": 0.0},
    "penalised": {"num_beams": 3, "length_penalty": 0.6, "repetition_penalty": 1.3},
    "long": {"num_beams": 4, "length_penalty": 2.0},
    "early": {"num_beams": 4, "length_penalty": 2.0, "early_stopping": True},
}


@pytest.mark.parametrize("case", BEAMS)
def test_beams(pair, case):
    model, params, ends, other = pair
    batch, options = prompts(model), BEAMS[case]
    settings = Decoding(NEW, **options)
    tokens, scores = jax.jit(lambda params, batch: beam_search(model, params, batch, settings, ends))(params, batch)
    expected, found = theirs(other, batch, ends, **options, num_return_sequences=options["num_beams"])
    assert (expected[:, -1] == PAD).any() or case == "long"  # some end early
    np.testing.assert_array_equal(tokens.reshape(-1, NEW), expected)
    np.testing.assert_allclose(scores.reshape(-1), found.sequences_scores, rtol=2e-4)


def test_filters():
    from transformers.generation import logits_process

    logits = np.random.default_rng(0).normal(scale=3, size=(16, 50)).astype(np.float32)
    for temperature, k, p, least in [(0.7, 0, 1.0, 0.0), (1.0, 7, 1.0, 0.0), (1.3, 0, 0.8, 0.0), (2.0, 9, 0.6, 0.3)]:
        expected = logits_process.TemperatureLogitsWarper(temperature)(None, torch.tensor(logits))
        if k:
            expected = logits_process.TopKLogitsWarper(k)(None, expected)
        if p < 1:
            expected = logits_process.TopPLogitsWarper(p)(None, expected)
        if least:
            expected = logits_process.MinPLogitsWarper(least)(None, expected)
        settings = Decoding(temperature=temperature, top_k=k, top_p=p, min_p=least)
        np.testing.assert_allclose(warp(jnp.array(logits), settings), expected, rtol=1e-6)
