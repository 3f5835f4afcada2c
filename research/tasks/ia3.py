"""(IA)^3 (Liu 2022) around any task: the base stays as it is, and vectors that multiply its activations train."""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from research.errors import UserError
from research.models import layers
from research.tasks.adapters import Adapter, activated

OUTPUTS, INPUTS = "ia3_outputs", "ia3_inputs"


@dataclasses.dataclass(frozen=True)
class IA3(Adapter):
    """A task whose model's linear layers have their outputs, or their inputs, multiplied by vectors that begin as ones.

    Liu 2022, section 3.3, multiplies keys, values and what the MLP's second layer takes. The parameters are {"base":
    what is frozen, "whole": what trains as it is, "ia3": the vectors}.

    Attributes:
      task: what is adapted.
      targets: regular expressions of paths of kernels whose layers' outputs are multiplied, with the bias in them,
        "layers/attention/(key|value)/kernel$"; all layers of a stack are adapted together.
      feedforward: of those whose layers' inputs are, "layers/mlp/down/kernel$".
      whole: regular expressions of parameters that train as they are, such as those of a new head.
    """

    part: ClassVar[str] = "ia3"

    targets: tuple[str, ...] = ()
    feedforward: tuple[str, ...] = ()

    def __post_init__(self):
        super().__post_init__()
        if not self.targets and not self.feedforward:
            raise UserError("targets, feedforward: name at least one regular expression of kernels to adapt")

    def new(self, params: Mapping[str, jax.Array], rng: jax.Array) -> dict[str, jax.Array]:
        """Return the vectors, which are ones."""
        del rng  # nothing is drawn
        targets, feedforward = (self.kernels(key, getattr(self, key), params) for key in ("targets", "feedforward"))
        if both := sorted(set(targets) & set(feedforward)):
            raise UserError(f"config.task.feedforward: {both[0]} is among the targets too")
        vectors = {}
        for name in (*targets, *feedforward):
            *stack, width, features = params[name].shape
            place, last = name.removesuffix("kernel"), name in targets
            vectors[place + (OUTPUTS if last else INPUTS)] = jnp.ones((*stack, features if last else width))
        return vectors

    def add(self, params: dict[str, jax.Array], own: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
        """Return the parameters with the kernels, and the biases of outputs, multiplied."""
        for name, vector in own.items():
            place = name.removesuffix(OUTPUTS).removesuffix(INPUTS)
            if name.endswith(INPUTS):
                params[place + "kernel"] = params[place + "kernel"] * vector[..., :, None]
                continue
            params[place + "kernel"] = params[place + "kernel"] * vector[..., None, :]
            if (bias := place + "bias") in params:
                params[bias] = params[bias] * vector
        return params

    def intercept(self, call: Any, args: Any, kwargs: Any, context: nn.module.InterceptorContext) -> Any:
        """Multiply the input or the output of a linear layer that has a vector, before its activation."""
        module = context.module
        if context.method_name != "__call__" or not isinstance(module, layers.Dense):
            return call(*args, **kwargs)
        x, *activate = args
        if module.has_variable("params", INPUTS):
            return call(_times(x, module.get_variable("params", INPUTS)), *activate)
        if not module.has_variable("params", OUTPUTS):
            return call(*args, **kwargs)
        outputs = _times(call(x), module.get_variable("params", OUTPUTS))
        return activated(outputs, activate)


def _times(x: jax.Array, vector: Any) -> jax.Array:
    return x * vector.astype(x.dtype)
