"""What explanations say of small models of every kind, against the models themselves."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.analysis.explanation import Explainer
from research.errors import UserError
from research.models import bert, detr, encoder_decoder, gpt, modernbert, resnet, vit
from research.models.layers import Embedding
from research.task import Question
from research.tasks import encoders, seq2seq, tokens
from research.tasks.causal_lm import CausalLM
from research.tasks.classification import Classification
from research.tasks.detection import Detection

BLANK, SPECIAL = 1, (0, 2)
IDS = np.array([[2, 5, 9, 7, 3, 4, 8, 0, 0]], np.int32)  # one special token, six others, padding
MASK = (IDS != 0).astype(np.int32)
WIDTHS = {"hidden_size": 16, "num_layers": 2, "num_heads": 2, "intermediate_size": 32}


@functools.cache
def decoder(**settings):
    model = gpt.Decoder(vocab_size=11, max_positions=16, initializer_range=0.3, **WIDTHS, **settings)
    return model, model.init(jax.random.key(0), IDS)["params"]


def next_token(model, params, position=None, token=None):
    batch = {"input_ids": IDS, "attention_mask": MASK}
    if position is None:
        (question,) = CausalLM(model).questions(params, batch, {}, "")
        return question
    choice = {"positions": np.array([position]), "tokens": np.array([token])}
    inputs = ("input_ids", "attention_mask", "positions")
    return Question("", batch, inputs, tokens.chosen_tokens, choice, position=position, vocabulary="layers")


@functools.cache
def explained_decoder():
    model, params = decoder()
    return Explainer(model, params, BLANK, SPECIAL).explain(next_token(model, params))


def log_likelihood(model, params, ids, position, token):
    return float(jax.nn.log_softmax(model.apply({"params": params}, ids, MASK))[0, position, token])


@pytest.mark.parametrize("settings", [{}, {"positions": "rotary", "norm": "rms", "gated": True}])
def test_integrated_gradients_sum_to_the_difference_of_real_outputs(settings):
    model, params = decoder(**settings)
    found = Explainer(model, params, BLANK, SPECIAL).explain(next_token(model, params, 6, 9))
    hidden = np.where(np.isin(IDS, SPECIAL), IDS, BLANK)
    difference = log_likelihood(model, params, IDS, 6, 9) - log_likelihood(model, params, hidden, 6, 9)
    assert found.output == pytest.approx(log_likelihood(model, params, IDS, 6, 9), abs=1e-5)
    total = found.attributions["integrated_gradients"]["input_ids"].sum()
    assert total == pytest.approx(difference, rel=0.011, abs=1e-5)


def test_nothing_of_a_later_token_matters_to_an_earlier_prediction():
    model, params = decoder()
    found = Explainer(model, params, BLANK, SPECIAL).explain(next_token(model, params, 3, 4))
    for method, features in found.attributions.items():
        values_T = features["input_ids"]
        assert (values_T[4:] == 0).all(), method
        assert (values_T[1:4] != 0).all(), method
    assert (found.rollout["layers/attention"][4:] == 0).all()
    assert found.rollout["layers/attention"].sum() == pytest.approx(1)


def test_occlusion_is_the_fall_of_the_hidden_inputs_own_output():
    model, params = decoder()
    found = explained_decoder()
    (chosen,) = found.question.choice["tokens"]
    for place in range(1, 7):
        hidden = IDS.copy()
        hidden[0, place] = BLANK
        fall = found.output - log_likelihood(model, params, hidden, 6, chosen)
        assert found.attributions["occlusion"]["input_ids"][place] == pytest.approx(fall, abs=1e-5)
    assert found.attributions["occlusion"]["input_ids"][0] == 0


def test_the_lens_reads_the_last_layer_as_the_model_does():
    model, params = decoder()
    found = explained_decoder()
    logits = jax.nn.log_softmax(model.apply({"params": params}, IDS, MASK))[0, :7]
    values, ids = jax.lax.top_k(logits, 5)
    assert found.lens_ids.shape == (3, 7, 5)
    np.testing.assert_array_equal(found.lens_ids[-1], ids)
    np.testing.assert_allclose(found.lens_log[-1], values, atol=1e-5)


def test_the_lens_reads_the_embedding_by_the_last_norm_and_the_table():
    _, params = decoder()
    embedded = params["word"]["embedding"][IDS[0, :7]] + params["position"]["embedding"][:7]
    normal = (embedded - embedded.mean(-1, keepdims=True)) / jnp.sqrt(embedded.var(-1, keepdims=True) + 1e-5)
    logits = jax.nn.log_softmax(normal @ params["word"]["embedding"].T)
    np.testing.assert_allclose(explained_decoder().lens_log[0], jax.lax.top_k(logits, 5)[0], atol=1e-4)
    norms = explained_decoder().norms["layers"]
    assert norms.shape == (3, 7)
    np.testing.assert_allclose(norms[0], np.linalg.norm(embedded, axis=-1), rtol=1e-5)


def test_attention_is_what_the_layers_give():
    weights = explained_decoder().attention["layers/attention"]
    assert weights.shape == (2, 2, 7, 7)
    np.testing.assert_allclose(weights.sum(axis=-1), 1, rtol=1e-5)
    assert (np.triu(weights, 1) == 0).all()


@pytest.mark.parametrize(
    "model",
    [
        bert.SequenceClassifier(bert.Encoder(11, **WIDTHS, max_positions=16, initializer_range=0.5), 3),
        bert.SequenceClassifier(bert.Encoder(11, **WIDTHS, max_positions=32, position_offset=0, num_token_types=0), 3),
        modernbert.SequenceClassifier(modernbert.Encoder(11, **WIDTHS), 3),
    ],
    ids=["bert", "roberta", "modernbert"],
)
def test_classifiers_of_texts(model):
    params = model.init(jax.random.key(1), IDS, MASK)["params"]
    task, batch = Classification(model, label_names=("x", "y", "z")), {"input_ids": IDS, "attention_mask": MASK}
    logits = model.apply({"params": params}, IDS, MASK)[0]
    (question,) = task.questions(params, batch, {"logits": np.asarray(logits)}, "y")
    found = Explainer(model, params, BLANK, SPECIAL).explain(question)
    assert found.output == pytest.approx(float(logits[1]), abs=1e-5)
    hidden = np.where(np.isin(IDS, SPECIAL), IDS, BLANK)
    difference = float(logits[1] - model.apply({"params": params}, hidden, MASK)[0, 1])
    assert found.attributions["integrated_gradients"]["input_ids"].sum() == pytest.approx(
        difference, rel=0.02, abs=1e-5
    )
    (rollout,) = found.rollout.values()
    assert rollout.shape == (7,)
    (norms,), (weights,) = found.norms.values(), found.attention.values()
    assert norms.shape == (3, 7)
    assert weights.shape == (2, 2, 7, 7)
    assert rollout.sum() == pytest.approx(1, abs=1e-6)
    with pytest.raises(UserError, match="--target: there is no class 'q'; there are: x, y, z"):
        task.questions(params, batch, {"logits": np.asarray(logits)}, "q")


def test_encoder_decoders_explain_each_token_that_is_written():
    model = encoder_decoder.EncoderDecoder(11, **WIDTHS, initializer_range=0.3, embedding_scale=1.0)
    params = model.init(jax.random.key(0), IDS, IDS)["params"]
    batch = {"input_ids": IDS, "attention_mask": MASK}
    (question,) = seq2seq.Seq2Seq(model).questions(params, batch, {"tokens": np.array([4, 6, 3])}, "")
    found = Explainer(model, params, BLANK, SPECIAL).explain(question)
    written = np.array([[0, 4, 6]])
    log = jax.nn.log_softmax(model.apply({"params": params}, IDS, written, MASK))[0]
    np.testing.assert_allclose(found.outputs, log[np.arange(3), np.array([4, 6, 3])], atol=1e-5)
    product = found.attributions["gradient_x_input"]
    for name, length in (("input_ids", 7), ("decoder_input_ids", 3)):
        assert found.parts[name].shape == (3, length)
        np.testing.assert_allclose(found.parts[name].sum(axis=0), product[name], atol=1e-5)
    assert (np.triu(found.parts["decoder_input_ids"], 1) == 0).all()
    assert found.attention["decoder/layers/cross_attention"].shape == (2, 2, 3, 7)
    assert list(found.ids) == ["input_ids", "decoder_input_ids"]
    np.testing.assert_allclose(found.lens_log[-1], jax.lax.top_k(log, 5)[0], atol=1e-5)


class Linear(nn.Module):
    """A model whose output is linear in the embeddings of its tokens and in the pixels of its image."""

    @nn.compact
    def __call__(self, image, input_ids):
        words = Embedding(11, 4, name="word")(input_ids)
        return nn.Dense(2, use_bias=False)(
            jnp.concatenate([words.reshape(len(words), -1), image.reshape(len(image), -1)], axis=1)
        )


def test_gradient_x_input_is_exact_where_a_model_is_linear():
    model, image = Linear(), np.random.default_rng(0).normal(size=(1, 2, 3, 1)).astype(np.float32)
    params = model.init(jax.random.key(0), image, IDS)["params"]
    question = Question("", {"image": image, "input_ids": IDS}, ("image", "input_ids"), encoders.output, 1)
    found = Explainer(model, params).explain(question)
    kernel = np.asarray(params["Dense_0"]["kernel"])[:, 1]
    words = np.asarray(params["word"]["embedding"])[IDS[0]]
    product = found.attributions["gradient_x_input"]
    np.testing.assert_allclose(product["input_ids"], (words * kernel[:36].reshape(9, 4)).sum(axis=1), rtol=1e-5)
    np.testing.assert_allclose(product["image"], image[0, ..., 0] * kernel[36:].reshape(2, 3), rtol=1e-5)
    assert product["input_ids"].sum() + product["image"].sum() == pytest.approx(found.output, rel=1e-5)
    assert found.attention == found.norms == found.rollout == {}


@pytest.mark.parametrize(("pooling", "position"), [("token", 0), ("mean", None)])
def test_vision_transformers(pooling, position):
    encoder = vit.Encoder(image_size=8, patch_size=4, num_channels=1, initializer_range=0.3, **WIDTHS)
    model = vit.ImageClassifier(encoder, 3, pooling)
    image = np.random.default_rng(0).normal(size=(1, 8, 8, 1)).astype(np.float32)
    params = model.init(jax.random.key(0), image)["params"]
    logits = model.apply({"params": params}, image)
    (question,) = Classification(model).questions(params, {"image": image}, {"logits": np.asarray(logits[0])}, "")
    assert question.position == position
    found = Explainer(model, params).explain(question)
    chosen = question.choice
    difference = float(logits[0, chosen] - model.apply({"params": params}, 0 * image)[0, chosen])
    assert found.attributions["integrated_gradients"]["image"].sum() == pytest.approx(difference, rel=0.02)
    hidden = image.copy()
    hidden[:, 4:, :4] = 0
    fall = float(logits[0, chosen] - model.apply({"params": params}, hidden)[0, chosen])
    np.testing.assert_allclose(found.attributions["occlusion"]["image"][4:, :4], fall, atol=1e-5)
    assert found.square == 4
    weights = found.attention["encoder/layers/attention"]
    assert weights.shape == (2, 2, 5)
    np.testing.assert_allclose(weights.sum(axis=-1), 1, rtol=1e-5)


class Convolutions(nn.Module):
    """A classifier without attention."""

    inputs = ("image",)

    @nn.compact
    def __call__(self, image):
        features = resnet.ResNet((1,), (8,), "basic", stem_width=4, norm="group", name="backbone")(image)
        return nn.Dense(2, name="head")(features.mean(axis=(1, 2)))


def test_models_without_attention_have_attributions_alone():
    model, image = Convolutions(), np.random.default_rng(0).normal(size=(1, 24, 24, 3)).astype(np.float32)
    params = model.init(jax.random.key(0), image)["params"]
    question = Question("", {"image": image}, ("image",), encoders.output, 0)
    found = Explainer(model, params).explain(question)
    assert found.attention == {}
    assert set(found.attributions) == {"gradient_x_input", "integrated_gradients", "occlusion"}


def test_detectors_explain_their_best_queries():
    backbone = resnet.ResNet((1,), (8,), "basic", stem_width=4, norm="group")
    sizes = WIDTHS | {"num_queries": 4}
    model = detr.Detr(backbone, 3, **sizes)
    image = np.random.default_rng(0).normal(size=(1, 32, 32, 3)).astype(np.float32)
    batch = {"image": image, "pixel_mask": np.ones((1, 32, 32), np.int32)}
    params = model.init(jax.random.key(0), *batch.values())["params"]
    task = Detection(model, threshold=0.0, label_names=("a", "b", "c"))
    output = {name: np.asarray(value)[0] for name, value in task.predict(params, batch, jax.random.key(0)).items()}
    questions = task.questions(params, batch, output, "")
    assert [question.position for question in questions] == np.argsort(-output["scores"], kind="stable")[:3].tolist()
    found = Explainer(model, params).explain(questions[0])
    logits = model.apply({"params": params}, *batch.values())[0][-1, 0]
    query, chosen = questions[0].position, questions[0].choice["class"]
    assert found.output == pytest.approx(float(logits[query, chosen]), abs=1e-5)
    assert found.attention["decoder/layers/cross_attention"].shape == (2, 2, 64)
    asked = task.questions(params, batch, output, "b")[0]
    assert asked.choice == {"query": int(np.argmax(jax.nn.softmax(logits)[:, 1])), "class": 1}


def test_a_model_without_tokens_or_images_is_refused():
    class Other(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(2)(x)

    model = Other()
    params = model.init(jax.random.key(0), np.ones((1, 3)))["params"]
    with pytest.raises(UserError, match="Other reads no image"):
        Explainer(model, params).explain(Question("", {"x": np.ones((1, 3))}, ("x",), encoders.output, 0))
