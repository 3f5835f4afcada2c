"""A DINOv2 in an ONNX file as the exporter writes it: matrices transposed and without names of their own."""

import jax
import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from research.errors import UserError
from research.models import vit
from research.pretrained import huggingface
from research.pretrained import onnx as reader

HIDDEN, HEADS, LAYERS, SIZE, PATCH = 12, 3, 2, 15, 5
ENCODER = vit.Encoder(SIZE, PATCH, 3, HIDDEN, LAYERS, HEADS, 24, layer_norm_epsilon=1e-5, layer_scale=1.0)
PARTS = {"query": "attention.query", "key": "attention.key", "value": "attention.value", "out": "output.dense"}


@pytest.fixture(scope="module")
def params():
    model = vit.ImageClassifier(ENCODER, num_outputs=2, pooling="token_and_mean")
    shapes = jax.eval_shape(lambda key: model.init(key, np.zeros((1, SIZE, SIZE, 3)))["params"], jax.random.key(0))
    rng = np.random.default_rng(0)
    return model, jax.tree.map(lambda x: rng.normal(size=x.shape).astype(np.float32), shapes)


class Writer:
    """Gathers what an exported graph has."""

    def __init__(self):
        self.nodes, self.tensors = [], []

    def tensor(self, name, array):
        self.tensors.append(numpy_helper.from_array(np.ascontiguousarray(array), name))
        return name

    def constant(self, name, array):
        value = numpy_helper.from_array(np.asarray(array), name)
        self.nodes.append(helper.make_node("Constant", [], [name], value=value))
        return name

    def node(self, kind, module, inputs):
        name = f"/{'/'.join(module)}/{kind}"
        self.nodes.append(helper.make_node(kind, inputs, [f"{name}_output_{len(self.nodes)}"], name=name))
        return self.nodes[-1].output[0]

    def linear(self, module, kernel, bias):
        """The exporter names the bias, and numbers the matrix."""
        matrix = self.tensor(f"onnx::MatMul_{len(self.tensors)}", kernel)
        self.tensor(".".join([*module, "bias"]), bias)
        self.node("MatMul", module, ["x", matrix])


def write(path, params, heads=True, activation="Erf", fused_norm=False):
    writer, encoder = Writer(), params["encoder"]
    start = ["backbone", "embeddings"]
    patches = encoder["patches"]["kernel"].transpose(3, 2, 0, 1)
    writer.tensor("backbone.embeddings.patch_embeddings.projection.weight", patches)
    writer.tensor("backbone.embeddings.patch_embeddings.projection.bias", encoder["patches"]["bias"])
    writer.tensor("backbone.embeddings.cls_token", encoder["prefix"][None])
    first, rest = np.split(encoder["position"][None], [1], axis=1)
    writer.node("Reshape", start, [writer.tensor("onnx::Reshape_1", rest), "shape"])
    writer.node("Concat", start, [writer.tensor("onnx::Concat_2", first), "positions"])
    for layer in range(LAYERS):
        own = jax.tree.map(lambda x: x[layer], encoder["layers"])  # noqa: B023 (called at once)
        module = ["backbone", "encoder", f"layer.{layer}"]
        for number, part in ((1, "attention"), (2, "mlp")):
            norm = [*module, f"norm{number}"]
            for ours, theirs in (("scale", "weight"), ("bias", "bias")):
                writer.tensor(".".join([*norm, theirs]), own[f"{part}_norm"][ours])
            if fused_norm:
                writer.nodes.append(
                    helper.make_node("LayerNormalization", ["x"], ["y"], f"/{'/'.join(norm)}/Norm", epsilon=1e-5)
                )
            else:
                writer.node("Add", norm, ["x", writer.constant(f"epsilon_{layer}_{number}", np.float32(1e-5))])
            writer.tensor(".".join([*module, f"layer_scale{number}.lambda1"]), own[f"{part}_scale"])
        for ours, theirs in PARTS.items():
            linear = own["attention"][ours]
            writer.linear([*module, "attention", *theirs.split(".")], linear["kernel"], linear["bias"])
        width = writer.constant(f"width_{layer}", np.array([HIDDEN // HEADS]))
        shape = writer.node("Concat", [*module, "attention"], ["batch", width])
        if heads:
            writer.node("Reshape", [*module, "attention", "attention"], ["x", shape])
        for ours, theirs in (("up", "fc1"), ("down", "fc2")):
            writer.linear([*module, "mlp", theirs], own["mlp"][ours]["kernel"], own["mlp"][ours]["bias"])
        writer.node(activation, [*module, "mlp", "activation"], ["x"])
    # Equal to another tensor, so that it is stored once.
    writer.tensor("backbone.layernorm.weight", encoder["norm"]["scale"])
    shared = writer.tensor("shared", encoder["norm"]["bias"])
    writer.nodes.append(helper.make_node("Identity", [shared], ["backbone.layernorm.bias"]))
    writer.tensor("decoder.weight", np.zeros((3, 3), np.float32))
    graph = helper.make_graph(writer.nodes, "main", [], [], writer.tensors)
    onnx.save(helper.make_model(graph), path)


@pytest.mark.parametrize("fused_norm", [False, True])
def test_the_encoder_is_read_as_it_was_written(params, fused_norm, tmp_path):
    model, written = params
    path = tmp_path / "model.onnx"
    write(path, written, fused_norm=fused_norm)
    read = huggingface.image_classifier(str(path), num_outputs=2)
    assert read == model
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), written)
    loaded, report = huggingface.load_params(str(path), read, shapes)
    assert report == huggingface.Report(("head_output/bias", "head_output/kernel"), ())
    jax.tree.map(np.testing.assert_array_equal, loaded["encoder"], written["encoder"])


def test_the_user_must_say_how_many_outputs_a_new_head_has(params, tmp_path):
    write(tmp_path / "model.onnx", params[1])
    with pytest.raises(UserError, match="has no labels, so num_outputs must be given"):
        huggingface.image_classifier(str(tmp_path / "model.onnx"))


@pytest.mark.parametrize(
    ("options", "message"),
    [({"heads": False}, "does not say how wide the heads are"), ({"activation": "Relu"}, "an activation of Relu")],
)
def test_graphs_that_say_too_little_or_something_else(params, options, message, tmp_path):
    write(tmp_path / "model.onnx", params[1], **options)
    with pytest.raises(UserError, match=message):
        reader.config(tmp_path / "model.onnx")


def test_other_models_and_damaged_files(tmp_path):
    path = tmp_path / "model.onnx"
    onnx.save(helper.make_model(helper.make_graph([], "main", [], [])), path)
    with pytest.raises(UserError, match="holds no DINOv2 of Transformers"):
        reader.config(path)
    path.write_bytes(b"no graph at all")
    with pytest.raises(UserError, match="cannot be read"):
        reader.config(path)
