"""DETR against Transformers: logits, boxes, exports, and checkpoints whose backbone has timm's names."""

import json

import jax
import numpy as np
import pytest

from research.errors import UserError
from research.pretrained import huggingface

pytestmark = pytest.mark.peers

TOLERANCE = 5e-5  # of the largest output
BACKBONE = {
    "model_type": "resnet",
    "embedding_size": 8,
    "hidden_sizes": [8, 12, 20],
    "depths": [1, 2, 1],
    "layer_type": "basic",
    "out_features": ["stage3"],
}
SIZES = {
    "d_model": 24,
    "encoder_layers": 2,
    "decoder_layers": 3,
    "encoder_attention_heads": 3,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 20,
    "decoder_ffn_dim": 28,
    "num_queries": 9,
    "num_labels": 5,
}
CONFIGS = {
    "basic": BACKBONE,
    "bottleneck": BACKBONE | {"layer_type": "bottleneck", "hidden_sizes": [16, 16, 24], "depths": [2, 1, 2]},
    "a stage, two channels": BACKBONE | {"hidden_sizes": [16], "depths": [2], "out_features": ["stage1"]},
}
CONFIGS["a stage, two channels"]["num_channels"] = 2


def randomise(model):
    """Moves every parameter, and the statistics of frozen norms, far from their initial values."""
    torch = pytest.importorskip("torch")
    torch.manual_seed(0)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if name.endswith("running_var") or (name.endswith("weight") and tensor.ndim == 1):
                tensor.uniform_(0.8, 1.2)
            elif tensor.ndim > 1:
                gain = 1.0 if "backbone" in name else 1.5  # neither explodes nor forgets the image
                fan_in = tensor.numel() / len(tensor)
                tensor.normal_(0, gain * fan_in**-0.5 if "query_position" not in name else 1.0)
            elif tensor.is_floating_point():
                tensor.normal_(0, 0.3)
    return model.eval()


def peer(backbone, **config):
    transformers = pytest.importorskip("transformers")
    chosen = transformers.DetrConfig(use_timm_backbone=False, backbone_config=backbone, **SIZES | config)
    return randomise(transformers.DetrForObjectDetection(chosen))


def batch(channels=3, size=(75, 60), seed=0):
    """Returns images of different sizes on one canvas, padded at the bottom and right."""
    rng = np.random.default_rng(seed)
    mask = np.zeros((4, *size), np.float32)
    for i, (height, width) in enumerate([size, (size[0], size[1] // 2), (33, size[1]), (41, 38)]):
        mask[i, :height, :width] = 1
    return (rng.normal(size=(4, *size, channels)) * mask[..., None]).astype(np.float32), mask


def their_outputs(model, image, mask):
    torch = pytest.importorskip("torch")
    with torch.no_grad():
        outputs = model(torch.tensor(image).permute(0, 3, 1, 2).contiguous(), pixel_mask=torch.tensor(mask).long())
    return outputs.logits.numpy(), outputs.pred_boxes.numpy()


def our_outputs(model, params, image, mask):
    logits, boxes = jax.jit(lambda params: model.apply({"params": params}, image, mask))(params)
    return np.asarray(logits[-1]), np.asarray(boxes[-1])


def load(path, image, **options):
    model = huggingface.detector(str(path), **options)
    shapes = jax.eval_shape(lambda key: model.init(key, image)["params"], jax.random.key(0))
    return model, *huggingface.load_params(str(path), model, shapes)


def assert_close(ours, theirs, what):
    for name, one, other in zip(("logits", "boxes"), ours, theirs, strict=True):
        error = np.abs(one - other).max() / np.abs(other).max()
        print(f"{what}: {name} {error:.2e} of the largest")
        assert error < TOLERANCE
        assert np.abs(other - other.mean((0, 1))).max() > 0.005  # they say something of the image


@pytest.mark.parametrize("activation", ["relu", "gelu", "silu"])
@pytest.mark.parametrize("name", CONFIGS)
def test_outputs_equal_and_exports_load(name, activation, tmp_path):
    transformers = pytest.importorskip("transformers")
    reference = peer(CONFIGS[name], activation_function=activation)
    reference.save_pretrained(tmp_path / "theirs")
    image, mask = batch(CONFIGS[name].get("num_channels", 3))
    model, params, report = load(tmp_path / "theirs", image)
    assert report == huggingface.Report((), ())
    theirs = their_outputs(reference, image, mask)
    assert_close(our_outputs(model, params, image, mask), theirs, f"{name} {activation}")

    labels = ["cat", "dog", "emu", "fox", "gnu"]
    folder = huggingface.save(tmp_path / "ours", model, params, labels=labels, max_shard_bytes=50_000)
    loaded, info = transformers.DetrForObjectDetection.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    assert loaded.config.id2label == dict(enumerate(labels))
    exported = their_outputs(loaded.eval(), image, mask)
    for one, other in zip(exported, theirs, strict=True):
        np.testing.assert_array_equal(one, other)


def test_the_mask_matters_to_both(tmp_path):
    reference = peer(BACKBONE)
    reference.save_pretrained(tmp_path)
    image, mask = batch()
    model, params, _ = load(tmp_path, image)
    whole = np.ones_like(mask)
    theirs = their_outputs(reference, image, whole)
    assert_close(our_outputs(model, params, image, whole), theirs, "without padding")
    assert np.abs(theirs[1] - their_outputs(reference, image, mask)[1])[1:].max() > 0.01


def test_a_head_of_other_classes_begins_anew_and_the_boxes_stay(tmp_path):
    peer(BACKBONE).save_pretrained(tmp_path)
    image, _ = batch()
    with pytest.raises(UserError, match=r"has 6 outputs .*, the model 3; new_head=True begins a new one"):
        load(tmp_path, image, num_outputs=2)
    model = huggingface.detector(str(tmp_path), num_outputs=2)
    shapes = jax.eval_shape(lambda key: model.init(key, image)["params"], jax.random.key(0))
    _, report = huggingface.load_params(str(tmp_path), model, shapes, new_head=True)
    assert report.new == ("class_head/bias", "class_head/kernel")


def timm_reference(name, **config):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("timm")
    sizes = SIZES | {"d_model": 16, "encoder_attention_heads": 2, "encoder_layers": 1, "decoder_layers": 1}
    return randomise(transformers.DetrForObjectDetection(transformers.DetrConfig(backbone=name, **sizes | config)))


@pytest.mark.parametrize(
    ("name", "dilation"), [("resnet18", False), ("resnet18", True), ("resnet50", False), ("resnet50", True)]
)
def test_backbones_of_timm(name, dilation, tmp_path):
    reference = timm_reference(name, dilation=dilation)
    reference.save_pretrained(tmp_path)
    image, mask = batch(size=(70, 67))
    model, params, report = load(tmp_path, image)
    assert report == huggingface.Report((), ())
    assert model.backbone.dilation == dilation
    assert_close(
        our_outputs(model, params, image, mask), their_outputs(reference, image, mask), f"{name} dilation={dilation}"
    )
    # An older config.json says the same in other words.
    config = json.loads((tmp_path / "config.json").read_text())
    older = {k: v for k, v in config.items() if k != "backbone_config"}
    older |= {"use_timm_backbone": True, "backbone": name, "dilation": dilation, "backbone_config": None}
    (tmp_path / "config.json").write_text(json.dumps(older))
    assert load(tmp_path, image)[0] == model
