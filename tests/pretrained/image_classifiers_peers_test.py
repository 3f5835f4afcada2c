"""Image classifiers against Transformers: logits, exported folders, other resolutions, and a published ONNX file."""

import jax
import numpy as np
import pytest

from research import assets
from research.configuration.variants import DINOV2_SMALL
from research.pretrained import huggingface

pytestmark = pytest.mark.peers

TOLERANCE = 5e-5  # of the largest output
SIZES = {
    "hidden_size": 36,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "image_size": 20,
    "patch_size": 5,
    "layer_norm_eps": 1e-3,
}
PLAIN = SIZES | {"intermediate_size": 52}
# Name -> Transformers' prefix and class, our kind, and keys of config.json.
CASES = {
    "vit": ("ViT", "ForImageClassification", "image_classifier", PLAIN),
    "vit, grey, no bias": (
        *("ViT", "ForImageClassification", "image_classifier"),
        PLAIN | {"num_channels": 1, "qkv_bias": False, "hidden_act": "gelu_new", "patch_size": 4},
    ),
    "deit": ("DeiT", "ForImageClassification", "image_classifier", PLAIN | {"hidden_act": "relu"}),
    "deit, distilled": ("DeiT", "ForImageClassificationWithTeacher", "distilled_image_classifier", PLAIN),
    "dinov2": ("Dinov2", "ForImageClassification", "image_classifier", SIZES | {"mlp_ratio": 3}),
    "dinov2, gated": (
        *("Dinov2", "ForImageClassification", "image_classifier"),
        SIZES | {"mlp_ratio": 2, "use_swiglu_ffn": True, "hidden_size": 42, "qkv_bias": False, "num_channels": 4},
    ),
}


def peer(case, head=None, **config):
    """Returns a Transformers model whose every parameter is far from its initial value."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    name, own_head, _, keys = CASES[case]
    torch.manual_seed(0)
    made = getattr(transformers, f"{name}Config")(**keys | {"num_labels": 5} | config)
    model = getattr(transformers, f"{name}{own_head if head is None else head}")(made).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def images(case, height=20, width=20, size=4):
    channels = CASES[case][3].get("num_channels", 3)
    return np.random.default_rng(0).normal(size=(size, height, width, channels)).astype(np.float32)


def their_outputs(model, array, name="logits"):
    torch = pytest.importorskip("torch")
    pixels = torch.tensor(array.transpose(0, 3, 1, 2))
    options = {} if model.config.model_type == "dinov2" else {"interpolate_pos_encoding": True}
    with torch.no_grad():
        return getattr(model(pixels, **options), name).numpy()


def our_outputs(model, params, array):
    return np.asarray(jax.jit(lambda params: model.apply({"params": params}, array))(params))


def load(path, case, **options):
    array = images(case, size=1)
    model = getattr(huggingface, CASES[case][2])(str(path), **options)
    shapes = jax.eval_shape(lambda key: model.init(key, array)["params"], jax.random.key(0))
    return model, *huggingface.load_params(str(path), model, shapes)


def assert_close(ours, theirs, what):
    error = np.abs(ours - theirs).max() / np.abs(theirs).max()
    print(f"{what}: {error:.2e} of the largest output")
    assert error < TOLERANCE


@pytest.mark.parametrize("case", CASES)
def test_logits_equal_at_any_resolution_and_exports_load(case, tmp_path):
    transformers = pytest.importorskip("transformers")
    reference = peer(case)
    reference.save_pretrained(tmp_path / "theirs")
    model, params, report = load(tmp_path / "theirs", case)
    assert report.new == ()
    patch = CASES[case][3]["patch_size"]
    # Patches of 5 are as many in the last as in the first.
    for shape in [(20, 20), (7 * patch, 3 * patch), (8 * patch, 2 * patch)]:
        array = images(case, *shape)
        assert_close(our_outputs(model, params, array), their_outputs(reference, array), f"{case} at {shape}")

    labels = [f"label {i}" for i in range(5)]
    folder = huggingface.save(tmp_path / "ours", model, params, labels=labels, max_shard_bytes=50_000)
    loaded, info = type(reference).from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    assert loaded.config.id2label == dict(enumerate(labels))
    auto = transformers.AutoConfig.from_pretrained(folder)
    assert auto.architectures == [type(reference).__name__]
    array = images(case)
    assert_close(our_outputs(model, params, array), their_outputs(loaded.eval(), array), f"{case}, exported")


@pytest.mark.parametrize("case", [case for case in CASES if case != "deit, distilled"])
def test_encoders_load_without_a_head(case, tmp_path):
    reference = peer(case, "Model")
    reference.save_pretrained(tmp_path, max_shard_size="60KB")
    model, params, report = load(tmp_path, case, num_outputs=2, unroll=2)
    assert report.new == ("head_output/bias", "head_output/kernel")
    array = images(case, 25, 20) if CASES[case][3]["patch_size"] == 5 else images(case)
    ours = our_outputs(model.encoder, params["encoder"], array)
    assert_close(ours, their_outputs(reference, array, "last_hidden_state"), f"{case}, encoder")


def test_the_class_head_of_a_distilled_checkpoint_is_another_one(tmp_path):
    peer("deit, distilled").save_pretrained(tmp_path)
    _, _, report = load(tmp_path, "deit")
    assert report.new == ("head_output/bias", "head_output/kernel")
    assert "cls_classifier.weight" in report.unused


@pytest.mark.parametrize("shape", [(224, 224), (56, 42)])
def test_the_published_onnx_encoder(shape, tmp_path):
    transformers = pytest.importorskip("transformers")
    model = huggingface.image_classifier(DINOV2_SMALL, num_outputs=3)
    array = images("dinov2", *shape, size=2)
    shapes = jax.eval_shape(lambda key: model.init(key, array)["params"], jax.random.key(0))
    params, report = huggingface.load_params(DINOV2_SMALL, model, shapes)
    assert report == huggingface.Report(("head_output/bias", "head_output/kernel"), ())
    features = our_outputs(model.encoder, params["encoder"], array)
    if shape == (224, 224):  # what the graph is fixed to
        assert_close(features, onnx_features(array), "the published encoder, run by onnxruntime")
    head = {name: np.zeros(leaf.shape, np.float32) for name, leaf in shapes["head_output"].items()}
    folder = huggingface.save(tmp_path / "export", model, params | {"head_output": head})
    loaded = transformers.AutoModel.from_pretrained(folder).eval()
    theirs = their_outputs(loaded, array, "last_hidden_state")
    assert_close(features, theirs, f"the published encoder, exported, at {shape}")


def onnx_features(array):
    """Returns what the published graph computes behind its encoder's last norm."""
    onnx, runtime = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
    graph = onnx.load(assets.resolve(DINOV2_SMALL))
    name = [node.output[0] for node in graph.graph.node if node.name.startswith("/backbone/layernorm/")][-1]
    graph.graph.output.append(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None))
    session = runtime.InferenceSession(graph.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run([name], {session.get_inputs()[0].name: array.transpose(0, 3, 1, 2)})[0]
