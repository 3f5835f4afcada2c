"""A published ResNet as the backbone that a detector begins with."""

import re
from typing import Any

import flax.linen as nn
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from research import assets
from research.errors import UserError
from research.models.detr import Detr
from research.pretrained import detr, weight_files
from research.pretrained.huggingface import Report

_PREFIX = "model.backbone.conv_encoder.model."  # what a detector's files put before the names
_LEFT = r"(fc|classifier\.1)\.(weight|bias)|.*\.num_batches_tracked"  # the classifier on top, and counters


def load_backbone(path: str, model: nn.Module, params_shape: Any) -> tuple[Any, Report]:
    """Read the weights of an image classifier into the backbone of a detector; all else begins anew.

    Args:
      path: a folder with a ResNet as Transformers writes it, hf://microsoft/resnet-50, or as timm and torchvision name
        its tensors, hf://timm/resnet50.tv_in1k; in any form that `assets.resolve` takes.
      model: the detector.
      params_shape: its parameters as a tree of `jax.ShapeDtypeStruct`.

    Returns:
      As `huggingface.load_params`: the tree with the backbone's arrays, and the report.

    Raises:
      UserError: the weights are not those of this backbone.
    """
    if not isinstance(model, Detr) or model.backbone.norm != "frozen":
        raise UserError("path: only the backbone of a Detr with norm='frozen' has published weights")
    stored = {
        detr.FAMILY.rename(_PREFIX + name.removeprefix("resnet.")): tensor
        for name, tensor in weight_files.read(assets.resolve(path)).items()
        if not re.fullmatch(_LEFT, name)
    }
    shapes = flatten_dict(params_shape, sep="/")
    table = [t for t in detr.FAMILY.table(detr.FAMILY.kinds["detector"], shapes) if t.ours[0].startswith("backbone/")]
    wrong = sorted({tensor.theirs for tensor in table} ^ set(stored))
    if wrong:
        where = "missing from" if wrong[0] not in stored else "unknown in"
        raise UserError(f"path: {wrong[0].removeprefix(_PREFIX)} and {len(wrong) - 1} more are {where} '{path}'")
    arrays = {}
    for tensor in table:
        (ours,), (array,) = tensor.ours, tensor.layout.to_ours(stored[tensor.theirs].read())
        if array.shape != shapes[ours].shape:
            raise UserError(f"path: '{path}' has a {ours} of shape {array.shape}, the model of {shapes[ours].shape}")
        arrays[ours] = np.asarray(array, np.float32)
    report = Report(tuple(sorted(shapes.keys() - arrays.keys())), ())
    return unflatten_dict(shapes | arrays, sep="/"), report
