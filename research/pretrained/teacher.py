"""Published weights for a task that has a teacher beside its model."""

from typing import Any

import flax.linen as nn

from research.errors import UserError
from research.pretrained import huggingface
from research.pretrained.huggingface import Report


def load_params(
    teacher: str, model: nn.Module, params_shape: Any, path: str = "", kind: str = "causal_lm"
) -> tuple[Any, Report]:
    """Read the weights of a teacher, and of the model that it teaches.

    `config.init = dict(call="research.pretrained.teacher.load_params", teacher="hf://ORG/NAME")`.

    Args:
      teacher: what `huggingface.load_params` reads under "teacher".
      model: the model that is taught.
      params_shape: the task's parameters as a tree of `jax.ShapeDtypeStruct`.
      path: what `huggingface.load_params` reads for the model; "" leaves all of it new.
      kind: what the teacher is, see `huggingface.load_model`.

    Returns:
      The tree as by `huggingface.load_params`.

    Raises:
      UserError: the task has no teacher, or weights do not fit.
    """
    own = {name: value for name, value in params_shape.items() if name != "teacher"}
    if len(own) == len(params_shape):
        raise UserError("config.init.teacher: the task has no teacher")
    taught = huggingface.load_model(teacher, kind)
    theirs, report = huggingface.open_params(teacher, taught, params_shape["teacher"])
    reports = [Report(tuple(f"teacher/{name}" for name in report.new), report.unused)]
    if path:
        own, report = huggingface.open_params(path, model, own)
        reports.append(report)
    new = sum((report.new for report in reports), () if path else tuple(own))
    return {**own, "teacher": theirs}, Report(new, sum((report.unused for report in reports), ()))
