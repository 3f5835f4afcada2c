"""Low-rank adapters (Hu 2021) around any task: the base stays as it is, and small matrices beside its kernels train."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from research.errors import UserError
from research.models import layers
from research.task import Params
from research.tasks import packed
from research.tasks.adapters import Adapter, activated, flat, tree

DOWN, UP, MAGNITUDE = "lora_a", "lora_b", "lora_magnitude"


@dataclasses.dataclass(frozen=True)
class LoRA(Adapter):
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
      dora: take from W + s A B its columns' directions alone, and train magnitudes m [out] of them, which begin as
        those of W (Liu 2024, equation 5): m (W + s A B) / |W + s A B|.
      dropout: the share of the inputs of A that is zeroed in training.
      whole: regular expressions of parameters that train as they are, such as those of a new head.
    """

    part: ClassVar[str] = "lora"

    targets: tuple[str, ...]
    rank: int = 8
    alpha: float = 16.0
    rslora: bool = False
    dora: bool = False
    dropout: float = 0.0

    def __post_init__(self):
        super().__post_init__()
        if self.rank < 1:
            raise UserError(f"rank: {self.rank} is less than 1")
        if not 0 <= self.dropout < 1:
            raise UserError(f"dropout: {self.dropout} must lie in [0, 1)")
        if not self.targets:
            raise UserError("targets: name at least one regular expression of kernels to adapt")

    @property
    def scale(self) -> float:
        """The factor of A B."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)

    def new(self, params: Mapping[str, jax.Array], rng: jax.Array) -> dict[str, jax.Array]:
        """Return the matrices; A is uniform in 1 / sqrt(in) as in PEFT, B zero, which changes nothing."""
        matrices: dict[str, jax.Array] = {}
        for number, name in enumerate(self.kernels("targets", self.targets, params)):
            *stack, width, features = params[name].shape
            bound, place = 1 / math.sqrt(width), name.removesuffix("kernel")
            key = jax.random.fold_in(rng, number)
            matrices[place + DOWN] = jax.random.uniform(key, (*stack, width, self.rank), minval=-bound, maxval=bound)
            matrices[place + UP] = jnp.zeros((*stack, self.rank, features))
            if self.dora:
                matrices[place + MAGNITUDE] = magnitudes(params[name])
        return matrices

    def start(self, params: Params) -> Params:
        """Return the parameters that training begins with: the magnitudes are those of the kernels that were read."""
        kernels, own = flat(self.join(params)), flat(params[self.part])
        for name in own:
            if name.endswith(MAGNITUDE):
                own[name] = magnitudes(kernels[name.removesuffix(MAGNITUDE) + "kernel"])
        return {**params, self.part: tree(own)}

    def add(self, params: dict[str, jax.Array], own: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
        """Return the parameters with s A B added to the kernels, and these given their magnitudes."""
        for name, down in own.items():
            if name.endswith(DOWN):
                place = name.removesuffix(DOWN)
                kernel = params[place + "kernel"] + self._product(down, own[place + UP])
                if self.dora:
                    kernel *= _ratio(own[place + MAGNITUDE], magnitudes(kernel))[..., None, :]
                params[place + "kernel"] = kernel
        return params

    def intercept(self, call: Any, args: Any, kwargs: Any, context: nn.module.InterceptorContext) -> Any:
        """Add s x A B to the output of a linear layer that has the matrices, before its activation."""
        module = context.module
        is_call = context.method_name == "__call__" and isinstance(module, layers.Dense)
        if not is_call or not module.has_variable("params", DOWN):
            return call(*args, **kwargs)
        x, *activate = args
        outputs = call(x)
        if self.dropout and module.has_rng("dropout"):
            x = layers.drop(x, module.make_rng("dropout"), self.dropout, layers.flat_positions(x.shape))
        down: jax.Array = module.get_variable("params", DOWN)
        up: jax.Array = module.get_variable("params", UP)
        x_NxD = x.reshape(-1, x.shape[-1]).astype(outputs.dtype)  # 2-D products run faster on CPUs
        product = (x_NxD @ down.astype(outputs.dtype) @ up.astype(outputs.dtype)).reshape(outputs.shape)
        if self.dora:
            outputs = self._rescale(module, outputs, self.scale * product.astype(jnp.float32), down, up)
        else:
            outputs += (self.scale * product).astype(outputs.dtype)
        return activated(outputs, activate)

    def _rescale(
        self, module: nn.Module, outputs: jax.Array, product: jax.Array, down: jax.Array, up: jax.Array
    ) -> jax.Array:
        """Return x (W + s A B) m / |W + s A B| + bias of the outputs x W + bias and s x A B, in the outputs' dtype.

        The norm is a constant for the gradient (Liu 2024, section 4.3).
        """
        kernel = packed.kernel_of(module, self.base_format)
        norm = jax.lax.stop_gradient(magnitudes(kernel + self._product(down, up)))
        factor = _ratio(module.get_variable("params", MAGNITUDE), norm)
        bias: Any = module.get_variable("params", "bias") if module.has_variable("params", "bias") else 0.0
        # (outputs - bias) * factor + bias, which leaves the outputs as they are where the factor is 1.
        scaled = outputs.astype(jnp.float32) * factor + bias * (1 - factor)
        return (scaled + product * factor).astype(outputs.dtype)

    def _product(self, down: jax.Array, up: jax.Array) -> jax.Array:
        return self.scale * jnp.matmul(down, up, precision="highest")


def magnitudes(kernel: jax.Array) -> jax.Array:
    """Return the Euclidean norms [..., out] of the columns of kernels [..., in, out], one for each output."""
    return jnp.sqrt(jnp.square(kernel).sum(axis=-2))


def _ratio(magnitude: Any, norm: jax.Array) -> jax.Array:
    """Return what columns of these norms are multiplied by; 1 for those that are zero, which have no direction."""
    return jnp.where(norm > 0, magnitude / jnp.where(norm > 0, norm, 1.0), 1.0)
