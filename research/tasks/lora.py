"""Low-rank adapters (Hu 2021) around any task: the base stays as it is, and small matrices beside its kernels train."""

import dataclasses
import math
import re
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np

from research.errors import UserError, nearest
from research.metrics import Mean
from research.models import layers
from research.task import Batch, Params, Spec, Task

DOWN, UP = "lora_a", "lora_b"


@dataclasses.dataclass(frozen=True)
class LoRA:
    """A task whose model gets, beside kernels W [in, out], matrices A [in, rank] and B [rank, out]: x W + s x A B.

    The parameters are {"base": what is frozen, "whole": what trains as it is, "lora": the matrices}. In training the
    product of x, A and B is added inside the model's linear layers, so that no gradient of the size of W is formed.

    Attributes:
      task: what is adapted.
      targets: regular expressions of paths of kernels, "layers/attention/(query|value)/kernel$"; all layers of a stack
        are adapted together.
      rank: the width of the matrices.
      alpha: the scale s is alpha / rank, or alpha / sqrt(rank) with `rslora`.
      rslora: see `alpha` (Kalajdzievski 2023).
      dropout: the share of the inputs of A that is zeroed in training.
      whole: regular expressions of parameters that train as they are, such as those of a new head.
    """

    task: Task
    targets: tuple[str, ...]
    rank: int = 8
    alpha: float = 16.0
    rslora: bool = False
    dropout: float = 0.0
    whole: tuple[str, ...] = ()

    def __post_init__(self):
        if self.rank < 1:
            raise UserError(f"rank: {self.rank} is less than 1")
        if not 0 <= self.dropout < 1:
            raise UserError(f"dropout: {self.dropout} must lie in [0, 1)")
        if not self.targets:
            raise UserError("targets: name at least one regular expression of kernels to adapt")

    @property
    def model(self) -> nn.Module:
        """The wrapped task's module."""
        return self.task.model

    @property
    def scale(self) -> float:
        """The factor of A B."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)

    def init(self, rng: jax.Array, spec: Spec) -> Params:
        """Return new parameters; A is uniform in 1 / sqrt(in) as in PEFT, B zero, which changes nothing."""
        base_rng, rng = jax.random.split(rng)
        params = self.task.init(base_rng, spec)
        flat = _flat(params)
        matrices: dict[str, jax.Array] = {}
        for number, name in enumerate(self._adapted(flat)):
            *stack, width, features = flat[name].shape
            bound, place = 1 / math.sqrt(width), name.removesuffix("kernel")
            key = jax.random.fold_in(rng, number)
            matrices[place + DOWN] = jax.random.uniform(key, (*stack, width, self.rank), minval=-bound, maxval=bound)
            matrices[place + UP] = jnp.zeros((*stack, self.rank, features))
        return {**self.divide(params), "lora": _tree(matrices)}

    def divide(self, params: Mapping[str, Any]) -> dict[str, Any]:
        """Return a tree like the wrapped task's parameters as its parts "base" and "whole"."""
        flat = _flat(params)
        whole = {name for name in flat if any(re.search(pattern, name) for pattern in self.whole)}
        parts = {"base": {name: x for name, x in flat.items() if name not in whole}}
        parts["whole"] = {name: flat[name] for name in whole}
        return {name: _tree(part) for name, part in parts.items() if part}

    def merge(self, params: Params) -> Params:
        """Return the wrapped task's parameters, with s A B added to the kernels."""
        flat = self._together(params)
        matrices = _flat(params["lora"])
        for name, down in matrices.items():
            if name.endswith(DOWN):
                place = name.removesuffix(DOWN)
                product = jnp.matmul(down, matrices[place + UP], precision="highest")
                flat[place + "kernel"] = flat[place + "kernel"] + self.scale * product
        return _tree(flat)

    def loss(self, params: Params, batch: Batch, rng: jax.Array) -> tuple[Mean, dict[str, Mean]]:
        """Return the wrapped task's loss and metrics, with the matrices beside its kernels."""
        fixed = {**params, "base": jax.lax.stop_gradient(params["base"])}
        beside = _tree(self._together(fixed) | _flat(params["lora"]))
        with nn.intercept_methods(self._add):
            return self.task.loss(beside, batch, rng)

    def metrics(self, params: Params, batch: Batch) -> dict[str, Mean]:
        """Return the wrapped task's metrics of the merged parameters."""
        return self.task.metrics(self.merge(params), batch)

    def predict(self, params: Params, batch: Batch, rng: jax.Array) -> dict[str, jax.Array]:
        """Return the wrapped task's outputs of the merged parameters."""
        return self.task.predict(self.merge(params), batch, rng)

    def describe(self, output: dict[str, np.ndarray]) -> dict[str, Any]:
        """Return one example's outputs as the wrapped task describes them."""
        return self.task.describe(output)

    def _add(self, call: Any, args: Any, kwargs: Any, context: nn.module.InterceptorContext) -> Any:
        """Add s x A B to the output of a linear layer that has the matrices, before its activation."""
        module = context.module
        is_call = context.method_name == "__call__" and isinstance(module, layers.Dense)
        if not is_call or not module.has_variable("params", DOWN):
            return call(*args, **kwargs)
        x, *activate = args
        outputs = call(x)
        if self.dropout and module.has_rng("dropout"):
            kept = jax.random.bernoulli(module.make_rng("dropout"), 1 - self.dropout, x.shape)
            x = jnp.where(kept, x / (1 - self.dropout), 0)
        down: jax.Array = module.get_variable("params", DOWN).astype(outputs.dtype)
        up: jax.Array = module.get_variable("params", UP).astype(outputs.dtype)
        outputs += (self.scale * (x.astype(outputs.dtype) @ down @ up)).astype(outputs.dtype)
        return layers.in_float32(activate[0])(outputs) if activate else outputs

    def _together(self, params: Params) -> dict[str, Any]:
        return {**_flat(params["base"]), **_flat(params.get("whole", {}))}

    def _adapted(self, flat: Mapping[str, Any]) -> list[str]:
        """Return the paths of the kernels to adapt, or raise UserError where they are none, or no linear layers'."""
        for pattern in (*self.targets, *self.whole):
            if not any(re.search(pattern, name) for name in flat):
                key = "targets" if pattern in self.targets else "whole"
                raise UserError(f"config.task.{key}: '{pattern}' finds no parameter{nearest(pattern, flat)}")
        found = [name for name in flat if any(re.search(pattern, name) for pattern in self.targets)]
        for name in found:
            dimensions = flat[name].ndim - ("layers" in name.split("/"))
            if not name.endswith("kernel") or dimensions != 2:
                raise UserError(f"config.task.targets: {name} is no kernel of a linear layer")
            if any(re.search(pattern, name) for pattern in self.whole):
                raise UserError(f"config.task.whole: {name} is among the targets too")
        return found


def _flat(tree: Mapping[str, Any]) -> dict[str, Any]:
    return flax.traverse_util.flatten_dict(dict(tree), sep="/")


def _tree(flat: Mapping[str, Any]) -> dict[str, Any]:
    return flax.traverse_util.unflatten_dict(dict(flat), sep="/")
