"""DETR's folders, written and read here: round trips, timm's names, and what is refused."""

import functools
import json
import re

import flax.traverse_util
import jax
import numpy as np
import pytest
import safetensors.numpy

from research.errors import UserError
from research.models.detr import Detr
from research.models.resnet import ResNet
from research.pretrained import detr, huggingface

SIZES = {"num_queries": 5, "hidden_size": 8, "num_layers": 2, "num_heads": 2, "intermediate_size": 12}
MODELS = {
    "basic": Detr(ResNet((1, 2), (4, 8), "basic", stem_width=6, num_channels=2), 3, **SIZES),
    "bottleneck": Detr(ResNet((2, 1), (8, 8)), 2, **SIZES, num_decoder_layers=1, decoder_intermediate_size=10),
}


@functools.cache
def shapes(model):
    image = jax.ShapeDtypeStruct((1, 32, 32, model.backbone.num_channels), np.float32)
    return jax.eval_shape(lambda image: model.init(jax.random.key(0), image)["params"], image)


def random_params(model):
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(np.float32), shapes(model))


def load(path, **options):
    model = huggingface.detector(str(path), **options)
    return model, *huggingface.load_params(str(path), model, shapes(model))


@pytest.fixture(params=MODELS)
def model(request):
    return MODELS[request.param]


@pytest.fixture
def folder(model, tmp_path):
    return huggingface.save(tmp_path / "model", model, random_params(model))


def edit_config(folder, **changes):
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(config))


def edit_tensors(folder, change):
    tensors = change(safetensors.numpy.load_file(folder / "model.safetensors"))
    safetensors.numpy.save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def assert_equal(one, other):
    assert flat(one).keys() == flat(other).keys()
    jax.tree.map(np.testing.assert_array_equal, one, other)


def flat(tree):
    return flax.traverse_util.flatten_dict(tree, sep="/")


def test_save_then_load_gives_the_same_bits(model, folder, tmp_path):
    found, params, report = load(folder)
    assert report == huggingface.Report((), ())
    assert_equal(params, random_params(model))
    assert found.backbone == model.backbone
    again = huggingface.save(tmp_path / "again", found, params)
    for file in ("config.json", "model.safetensors"):
        assert (folder / file).read_bytes() == (again / file).read_bytes()


def timm_name(name):
    """Returns timm's name of a tensor: what its ResNet and torchvision's call the parts."""
    kind = {"convolution": "conv", "normalization": "bn"}
    name = re.sub(r"embedder\.embedder\.(\w+)", lambda m: f"{kind[m[1]]}1", name)
    name = re.sub(r"encoder\.stages\.(\d)\.layers", lambda m: f"layer{int(m[1]) + 1}", name)
    name = re.sub(r"layer\.(\d)\.(\w+)", lambda m: f"{kind[m[2]]}{int(m[1]) + 1}", name)
    return re.sub(r"shortcut\.(\w+)", lambda m: f"downsample.{int(m[1] == 'normalization')}", name)


@pytest.mark.parametrize("prefix", ["model.", ""])
def test_names_of_timm_are_read(prefix, model, folder):
    def rename(tensors):
        renamed = {timm_name(name).replace("model.", prefix, 1): array for name, array in tensors.items()}
        counts = f"{prefix}backbone.conv_encoder.model.bn1.num_batches_tracked"
        assert f"{prefix}backbone.conv_encoder.model.layer2.0.downsample.0.weight" in renamed or len(renamed) < 100
        return renamed | {counts: np.array(7)}

    edit_tensors(folder, rename)
    _, params, report = load(folder)
    assert_equal(params, random_params(model))
    assert report.unused == ("model.backbone.conv_encoder.model.embedder.embedder.normalization.num_batches_tracked",)


def config_of(**changes):
    return {"model_type": "detr", "id2label": {"0": "a", "1": "b"}} | changes


@pytest.mark.parametrize(
    ("changes", "depths", "block", "dilation"),
    [
        ({}, (3, 4, 6, 3), "bottleneck", False),
        ({"backbone": "resnet101", "dilation": True}, (3, 4, 23, 3), "bottleneck", True),
        ({"backbone": "resnet18.a1_in1k"}, (2, 2, 2, 2), "basic", False),
        ({"backbone_kwargs": {"output_stride": 16, "out_indices": [1, 2, 3, 4]}}, (3, 4, 6, 3), "bottleneck", True),
        (
            {"backbone_config": {"model_type": "timm_backbone", "backbone": "resnet34", "output_stride": 32}},
            (3, 4, 6, 3),
            "basic",
            False,
        ),
        ({"use_timm_backbone": False}, (3, 4, 6, 3), "bottleneck", False),
        ({"use_timm_backbone": False, "backbone_config": {"depths": [1, 1]}}, (1, 1), "bottleneck", False),
    ],
)
def test_backbones_that_config_json_may_name(changes, depths, block, dilation, tmp_path):
    if "backbone_config" in changes and "depths" in changes["backbone_config"]:
        changes["backbone_config"]["hidden_sizes"] = [8, 8]
    (tmp_path / "config.json").write_text(json.dumps(config_of(**changes)))
    model = huggingface.detector(str(tmp_path))
    assert model.num_outputs == 2
    assert (model.backbone.depths, model.backbone.block, model.backbone.dilation) == (depths, block, dilation)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"backbone": "resnet51"}, "unknown backbone 'resnet51'; did you mean 'resnet50'"),
        ({"backbone_config": {"model_type": "swin"}}, "backbone_config of model_type 'swin'"),
        ({"use_timm_backbone": False, "backbone": "microsoft/resnet-50"}, "without a backbone_config"),
        ({"backbone_kwargs": {"output_stride": 8}}, "output_stride 8, of which only 16 and 32"),
        ({"backbone_kwargs": {"out_indices": [1, 2]}}, r"out_indices \[1, 2\], which must end in 4"),
        (
            {"use_timm_backbone": False, "backbone_config": {"out_features": ["stage2"]}},
            r"out_features=\['stage2'\], which must end in 'stage4'",
        ),
        (
            {"use_timm_backbone": False, "backbone_config": {"downsample_in_bottleneck": True}},
            "downsample_in_bottleneck=True, of which only False is implemented",
        ),
        ({"position_embedding_type": "learned"}, "position_embedding_type='learned', of which only 'sine'"),
        ({"auxiliary_loss": True}, "auxiliary_loss=True, of which only False"),
    ],
)
def test_what_is_not_implemented_is_said(changes, message, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(config_of(**changes)))
    with pytest.raises(UserError, match=message):
        huggingface.detector(str(tmp_path))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"norm": "group"}, "needs norm='frozen', the model has 'group'"),
        ({"stem_kernel": 3}, "needs stem_kernel=7, the model has 3"),
        ({"dilation": True}, "needs dilation=False, the model has True"),
    ],
)
def test_models_that_have_no_form_there(fields, message, tmp_path):
    model = MODELS["basic"]
    other = model.clone(backbone=model.backbone.clone(**fields))
    with pytest.raises(UserError, match=message):
        huggingface.save(tmp_path / "model", other, random_params(other))


def test_a_block_too_many_or_too_few_is_no_match(tmp_path):
    folder = huggingface.save(tmp_path / "model", MODELS["basic"], random_params(MODELS["basic"]))
    prefix = "model.backbone.conv_encoder.model.encoder.stages.1.layers"
    edit_tensors(folder, lambda tensors: tensors | {f"{prefix}.2.layer.0.convolution.weight": np.zeros((8, 8, 3, 3))})
    with pytest.raises(UserError, match=rf"{prefix}.2.layer.0.convolution.weight unknown"):
        load(folder)
    edit_tensors(folder, lambda tensors: {n: x for n, x in tensors.items() if ".1.layers.1.layer.1." not in n})
    with pytest.raises(UserError, match=rf"{prefix}.1.layer.1.convolution.weight, .* missing"):
        load(folder)


def test_heads_may_be_absent_or_new(tmp_path):
    folder = huggingface.save(tmp_path / "model", MODELS["basic"], random_params(MODELS["basic"]))
    with pytest.raises(UserError, match=r"has 4 outputs .*, the model 8; new_head=True begins a new one"):
        load(folder, num_outputs=7)
    model = huggingface.detector(str(folder), num_outputs=7)
    _, report = huggingface.load_params(str(folder), model, shapes(model), new_head=True)
    assert report.new == ("class_head/bias", "class_head/kernel")  # those of the boxes stay
    edit_tensors(folder, lambda tensors: {name: x for name, x in tensors.items() if name.startswith("model.")})
    _, _, report = load(folder)
    assert {name.partition("/")[0] for name in report.new} == {"class_head", "box_head"}


def test_the_table_has_every_parameter_of_the_largest_network(tmp_path):
    block, depths, widths = detr._TIMM["resnet152"]
    paths = flat(shapes(Detr(ResNet(depths, widths, block), 91)))
    named = {path for tensor in detr.FAMILY.table(detr.FAMILY.kinds["detector"], paths) for path in tensor.ours}
    assert named == set(paths)
