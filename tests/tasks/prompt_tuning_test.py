"""Prompts of learned vectors: they are read as tokens are, alone they train, and outputs are those of the task."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.errors import UserError
from research.generation.decoding import Decoding
from research.models import bert, gpt
from research.models.encoder_decoder import EncoderDecoder
from research.optimizer import make_optimizer
from research.step import init_state, train_step
from research.tasks.adapters import flat
from research.tasks.causal_lm import CausalLM
from research.tasks.classification import Classification
from research.tasks.masked_lm import MaskedLM
from research.tasks.prompt_tuning import Prompted, PromptTuning, check_no_prompt
from research.tasks.seq2seq import Seq2Seq

SIZES = {"vocab_size": 50, "hidden_size": 16, "num_layers": 2, "num_heads": 2, "intermediate_size": 32}
STILL = {"dropout": 0.0, "attention_dropout": 0.0, "initializer_range": 0.2}
ENCODER = bert.Encoder(**SIZES, **STILL, max_positions=16)
DECODER = gpt.Decoder(**SIZES, **STILL, max_positions=24)
BOTH = EncoderDecoder(**SIZES, **STILL)
CLASSIFICATION = Classification(bert.SequenceClassifier(ENCODER, num_outputs=3, head_dropout=0.0))
TEXT = {
    "input_ids": np.arange(32, dtype=np.int32).reshape(4, 8),
    "attention_mask": np.array([[1] * 8, [1] * 5 + [0] * 3] * 2, np.int32),
}
MASK = {"mask": np.ones(4, np.float32)}
TARGETS = {"targets": TEXT["input_ids"][:, ::-1].copy(), "target_mask": TEXT["attention_mask"].astype(np.float32)}
CASES = {
    "classification": (CLASSIFICATION, TEXT | MASK | {"label": np.arange(4, dtype=np.int32) % 3}),
    "causal_lm": (CausalLM(DECODER, decoding=Decoding(max_new_tokens=6)), TEXT | MASK | TARGETS),
    "seq2seq": (
        Seq2Seq(BOTH, decoding=Decoding(max_new_tokens=6)),
        TEXT | MASK | TARGETS | {"decoder_input_ids": TEXT["input_ids"]},
    ),
}
RNG = jax.random.key(0)
LENGTH = 3


def spec(batch):
    return {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in batch.items()}


@pytest.fixture(params=CASES)
def case(request):
    """Returns a task, a batch, the task with a prompt, and its parameters."""
    task, batch = CASES[request.param]
    prompted = PromptTuning(task, length=LENGTH)
    return task, batch, prompted, jax.jit(lambda: prompted.init(RNG, spec(batch)))()


def test_vectors_that_are_embeddings_are_read_as_their_tokens(case):
    task, batch, prompted, params = case
    table = next(x for name, x in flat(params["base"]).items() if name.endswith("word/embedding"))
    ids = np.array([7, 3, 9], np.int32)
    params = {**params, "prompt": jax.tree.map(lambda x: table[ids], params["prompt"])}
    first = np.repeat(ids[None], 4, axis=0)
    longer = dict(batch, input_ids=np.concatenate([first, batch["input_ids"]], 1))
    longer["attention_mask"] = np.concatenate([np.ones_like(first), batch["attention_mask"]], 1)
    if isinstance(task, CausalLM):
        longer |= {
            name: np.concatenate([np.zeros(first.shape, batch[name].dtype), batch[name]], 1)
            for name in ("targets", "target_mask")
        }
    wanted, _ = task.loss(params["base"], longer, RNG)
    for found in (prompted.loss(params, batch, RNG)[0], prompted.metrics(params, batch)["loss"]):
        np.testing.assert_allclose(found.total, wanted.total, rtol=1e-5)
        np.testing.assert_allclose(found.count, wanted.count)
    questions = {name: x for name, x in longer.items() if name in ("input_ids", "attention_mask", "mask")}
    asked = {name: batch[name] for name in questions}
    wanted = task.predict(params["base"], questions, RNG)
    found = prompted.task.predict(prompted.merge(params), asked, RNG)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), found, wanted)


def test_the_vectors_alone_train(case):
    _, batch, prompted, _ = case
    optimizer = make_optimizer(10, 1e-1, freeze=("^base/",))
    before = jax.jit(lambda: init_state(prompted, optimizer, spec(batch), 0))()
    step, after, losses = jax.jit(lambda state: train_step(prompted, optimizer, state, batch)), before, []
    for _ in range(5):
        after, metrics = step(after)
        losses.append(float(metrics["loss"].total / metrics["loss"].count))
    assert losses[-1] < losses[0]
    assert jax.tree.all(jax.tree.map(np.array_equal, before.params["base"], after.params["base"]))
    (vectors,) = jax.tree.leaves(after.params["prompt"])
    assert vectors.shape == (LENGTH, 16)
    assert sum(x.nbytes for x in jax.tree.leaves(after.opt_state)) == 2 * vectors.nbytes + 8  # two moments, two counts


def test_the_vectors_begin_as_embeddings_that_were_read():
    prompted = PromptTuning(CLASSIFICATION, length=LENGTH, whole=("^head_",))
    batch = CASES["classification"][1]
    read = jax.tree.map(lambda x: x + 1, jax.jit(lambda: CLASSIFICATION.init(RNG, spec(batch)))())
    shapes = jax.eval_shape(lambda: prompted.init(RNG, spec(batch)))
    loaded = {**shapes, **prompted.divide(read)}
    loaded = jax.tree.map(lambda x: None if isinstance(x, jax.ShapeDtypeStruct) else x, loaded)
    optimizer = make_optimizer(10, 1e-2, freeze=("^base/",))
    params = init_state(prompted, optimizer, spec(batch), 0, loaded).params
    table = read["encoder"]["embeddings"]["word"]["embedding"]
    for vector in params["prompt"]["encoder"]["embeddings"]["word"]["prompt"]:
        assert (np.asarray(table) == np.asarray(vector)).all(axis=1).any()


def test_all_else_is_the_tasks():
    prompted = PromptTuning(CLASSIFICATION).task
    assert isinstance(prompted, Prompted)
    assert prompted.objective == "softmax"
    assert prompted.model is CLASSIFICATION.model
    with pytest.raises(AttributeError):
        _ = prompted.tokenizer


def test_wrong_prompts_are_one_line():
    batch = CASES["causal_lm"][1]
    with pytest.raises(UserError, match="length: 0 is less than 1"):
        PromptTuning(CLASSIFICATION, length=0)
    with pytest.raises(UserError, match="a MaskedLM takes no prompt; Classification, CausalLM, Seq2Seq do"):
        PromptTuning(MaskedLM(bert.MaskedLM(ENCODER)))
    with pytest.raises(UserError, match="more than the 16 tokens that the model takes"):
        jax.eval_shape(lambda: PromptTuning(CLASSIFICATION, 20).init(RNG, spec(CASES["classification"][1])))
    with pytest.raises(UserError, match=r"'words' finds 0 parameters instead of one of .*word/embedding"):
        jax.eval_shape(lambda: PromptTuning(CLASSIFICATION, 2, "words").init(RNG, spec(CASES["classification"][1])))
    packed = spec(batch | {"positions": jnp.zeros((4, 8), jnp.int32)})
    with pytest.raises(UserError, match=r"config\.data\.pack: a prompt comes before one text a row"):
        jax.eval_shape(lambda: PromptTuning(CASES["causal_lm"][0], 2).init(RNG, packed))
    with pytest.raises(UserError, match="--harness: it takes a model alone"):
        check_no_prompt(PromptTuning(CLASSIFICATION).task, "--harness")
