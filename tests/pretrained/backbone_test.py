"""Published classifiers as backbones of detectors, against Transformers' ResNet."""

import re

import jax
import numpy as np
import pytest
import safetensors.numpy

from research.errors import UserError
from research.models.detr import Detr
from research.models.resnet import ResNet
from research.pretrained.backbone import load_backbone

pytestmark = pytest.mark.peers

IMAGE = np.random.default_rng(0).normal(size=(2, 70, 61, 3)).astype(np.float32)
SIZES = {"depths": (1, 2), "widths": (16, 24), "stem_width": 8}


def detector(block, **fields):
    sizes = {"num_queries": 4, "hidden_size": 8, "num_layers": 1, "num_heads": 2, "intermediate_size": 8}
    return Detr(ResNet(**SIZES | fields, block=block), 3, **sizes)


def classifier(block, folder):
    """Writes a classifier of Transformers, whose norms have statistics of their own, and returns it."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[16, 24], depths=[1, 2], layer_type=block, num_labels=3
    )
    model = transformers.ResNetForImageClassification(config).eval()
    for name, tensor in model.state_dict().items():
        if name.endswith(("normalization.weight", "running_var")):
            tensor.uniform_(0.8, 1.2)
        elif name.endswith(("normalization.bias", "running_mean")):
            tensor.normal_(0, 0.3)
    model.save_pretrained(folder)
    return model


def rewrite(folder, rename):
    """Gives the tensors in a folder other names."""
    tensors = safetensors.numpy.load_file(folder / "model.safetensors")
    safetensors.numpy.save_file({rename(name): x for name, x in tensors.items()}, folder / "model.safetensors")


def timms(name):
    """Returns the name that timm and torchvision give to a tensor of Transformers' ResNet."""
    kinds = {"convolution": "conv", "normalization": "bn"}
    name = re.sub(r"^resnet\.embedder\.embedder\.(\w+)", lambda m: f"{kinds[m[1]]}1", name)
    name = re.sub(r"^resnet\.encoder\.stages\.(\d)\.layers", lambda m: f"layer{int(m[1]) + 1}", name)
    name = re.sub(r"\.layer\.(\d)\.(\w+)", lambda m: f".{kinds[m[2]]}{int(m[1]) + 1}", name)
    name = re.sub(r"\.shortcut\.(\w+)", lambda m: f".downsample.{int(m[1] == 'normalization')}", name)
    return re.sub(r"^classifier\.1\.", "fc.", name)


def load(folder, model):
    shapes = jax.eval_shape(lambda key: model.init(key, IMAGE)["params"], jax.random.key(0))
    return load_backbone(str(folder), model, shapes)


@pytest.mark.parametrize("rename", [str, timms])
@pytest.mark.parametrize("block", ["basic", "bottleneck"])
def test_the_backbone_is_the_classifiers_and_all_else_is_new(block, rename, tmp_path):
    torch = pytest.importorskip("torch")
    reference, model = classifier(block, tmp_path), detector(block)
    rewrite(tmp_path, rename)
    params, report = load(tmp_path, model)
    assert not any(path.startswith("backbone/") for path in report.new)
    assert {"queries", "class_head/kernel", "projection/bias"} <= set(report.new)
    assert isinstance(params["queries"], jax.ShapeDtypeStruct)
    with torch.no_grad():
        theirs = reference.resnet(torch.tensor(IMAGE).permute(0, 3, 1, 2)).last_hidden_state
    theirs = theirs.permute(0, 2, 3, 1).numpy()
    ours = model.backbone.apply({"params": params["backbone"]}, IMAGE)
    assert np.abs(ours - theirs).max() < 5e-5 * np.abs(theirs).max()


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (detector("bottleneck"), r"layers\.0\.layer\.2\..* more are missing from"),
        (detector("basic", depths=(1, 1)), r"encoder\.stages\.1\.layers\.1\..* more are unknown in"),
        (detector("basic", depths=(2, 2)), r"encoder\.stages\.0\.layers\.1\..* more are missing from"),
        (detector("basic", stem_width=4), r"stem_conv/kernel of shape \(7, 7, 3, 8\), the model of \(7, 7, 3, 4\)"),
        (detector("basic", norm="group"), "only the backbone of a Detr with norm='frozen'"),
    ],
)
def test_another_network_is_refused(model, message, tmp_path):
    classifier("basic", tmp_path)
    with pytest.raises(UserError, match=message):
        load(tmp_path, model)
