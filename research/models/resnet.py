"""Residual networks (He 2015) as backbones: from an image to a map of features.

Shape letters: B batch, H rows and W columns of pixels, h and w of a map, C channels.
"""

import functools
import math
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from research.errors import UserError, nearest

BLOCKS = ("basic", "bottleneck")
NORMS = ("frozen", "group")


class FrozenBatchNorm(nn.Module):
    """Batch normalisation (Ioffe 2015) whose statistics, scale and bias are those of a published network.

    No gradient reaches them. So that weight decay leaves them alone too, name them in `freeze` of the optimizer:
    r"backbone/.*norm".
    """

    epsilon: float = 1e-5

    @nn.compact
    def __call__(self, x_BxhxwxC: jax.Array, mask_Bxhxw: jax.Array | None = None) -> jax.Array:
        """Map [B, h, w, C] to [B, h, w, C]; a mask changes nothing, as the statistics are fixed."""
        zeros, ones, shape = nn.initializers.zeros, nn.initializers.ones, (x_BxhxwxC.shape[-1],)
        inits = {"scale": ones, "bias": zeros, "mean": zeros, "variance": ones}
        fixed = {name: jax.lax.stop_gradient(self.param(name, init, shape)) for name, init in inits.items()}
        factor_C = fixed["scale"] * jax.lax.rsqrt(fixed["variance"] + self.epsilon)
        offset_C = fixed["bias"] - fixed["mean"] * factor_C
        return x_BxhxwxC * factor_C.astype(x_BxhxwxC.dtype) + offset_C.astype(x_BxhxwxC.dtype)


class GroupNorm(nn.Module):
    """Group normalisation (Wu 2018) over what is not padding, which it sets to 0.

    Attributes:
      num_groups: groups of channels, at most; a divisor of the channels is taken.
      epsilon: added to the variance.
    """

    num_groups: int = 32
    epsilon: float = 1e-5

    @nn.compact
    def __call__(self, x_BxhxwxC: jax.Array, mask_Bxhxw: jax.Array | None = None) -> jax.Array:
        """Map [B, h, w, C] to [B, h, w, C]; `mask_Bxhxw` is 0 at padding."""
        batch, _, _, channels = x_BxhxwxC.shape
        scale_C = self.param("scale", nn.initializers.ones, (channels,))
        bias_C = self.param("bias", nn.initializers.zeros, (channels,))
        groups = math.gcd(self.num_groups, channels)
        x = x_BxhxwxC.astype(jnp.float32)
        weights_Bxhxwx1 = jnp.ones((batch, *x.shape[1:3], 1))
        if mask_Bxhxw is not None:
            weights_Bxhxwx1 = mask_Bxhxw[..., None].astype(jnp.float32)
        count_Bx1x1 = weights_Bxhxwx1.sum((1, 2))[..., None] * (channels // groups)

        def mean(values: jax.Array) -> jax.Array:
            sums_BxC = (values * weights_Bxhxwx1).sum((1, 2))
            sums_BxGx1 = sums_BxC.reshape(batch, groups, -1).sum(-1, keepdims=True)
            means_BxGx1 = sums_BxGx1 / jnp.maximum(count_Bx1x1, 1)
            return jnp.broadcast_to(means_BxGx1, (batch, groups, channels // groups)).reshape(batch, 1, 1, channels)

        centre = mean(x)
        variance = jnp.maximum(mean(jnp.square(x)) - jnp.square(centre), 0.0)
        factor = jax.lax.rsqrt(variance + self.epsilon) * scale_C
        y = x * factor + (bias_C - centre * factor)
        return (y if mask_Bxhxw is None else y * weights_Bxhxwx1).astype(x_BxhxwxC.dtype)


class Residual(nn.Module):
    """A residual block, basic or with a bottleneck of a quarter of the width (He 2015, figure 5).

    A bottleneck strides in its 3 x 3 convolution ("v1.5").

    Attributes:
      width: channels of the result.
      bottleneck: which of the two.
      stride: of the block.
      dilations: of its first 3 x 3 convolution, and of a second one.
      norm: makes a norm.
    """

    width: int
    bottleneck: bool
    stride: int
    dilations: tuple[int, int]
    norm: Callable[..., nn.Module]

    @nn.compact
    def __call__(self, x: jax.Array, pixel_mask_BxHxW: jax.Array | None) -> jax.Array:
        """Map [B, h, w, C] to [B, h / stride, w / stride, width]."""
        first, second = self.dilations
        parts = [(self.width, 3, self.stride, first), (self.width, 3, 1, second)]
        if self.bottleneck:
            inner = self.width // 4
            parts = [(inner, 1, 1, 1), (inner, 3, self.stride, first), (self.width, 1, 1, 1)]
        y = x
        for i, (width, kernel, stride, dilation) in enumerate(parts, start=1):
            y = y if i == 1 else jax.nn.relu(y)
            y = _convolution(width, kernel, stride, dilation, f"conv{i}", y.dtype)(y)
            y = self.norm(name=f"norm{i}")(y, shrink(pixel_mask_BxHxW, y.shape[1:3]))
        if self.stride != 1 or x.shape[-1] != self.width:
            x = _convolution(self.width, 1, self.stride, 1, "shortcut_conv", y.dtype)(x)
            x = self.norm(name="shortcut_norm")(x, shrink(pixel_mask_BxHxW, x.shape[1:3]))
        return jax.nn.relu(x + y)


class ResNet(nn.Module):
    """A residual network without its head; the defaults are those of ResNet-50.

    What goes in is shrunk by `stem_stride`, by 2 where there is a `stem_pool`, and by 2 at every stage but the first.
    It computes in the dtype of the image.

    Attributes:
      depths: blocks of each stage.
      widths: channels of each stage.
      block: "basic" (ResNet-18 and 34) or "bottleneck".
      stem_width: channels of the first convolution.
      stem_kernel: its size.
      stem_stride: its stride.
      stem_pool: whether maxima of 3 x 3 follow, at a stride of 2.
      dilation: let the last stage dilate its kernels where it would stride (DETR's DC5).
      num_channels: of the image.
      norm: "frozen" batch norm, for published weights, or "group" norm, to train from scratch; the latter's result
        does not depend on how much padding surrounds an image, if that is 0.
      norm_groups: of group norm, at most.
    """

    depths: tuple[int, ...] = (3, 4, 6, 3)
    widths: tuple[int, ...] = (256, 512, 1024, 2048)
    block: str = "bottleneck"
    stem_width: int = 64
    stem_kernel: int = 7
    stem_stride: int = 2
    stem_pool: bool = True
    dilation: bool = False
    num_channels: int = 3
    norm: str = "frozen"
    norm_groups: int = 32

    @nn.compact
    def __call__(self, image_BxHxWxC: jax.Array, pixel_mask_BxHxW: jax.Array | None = None) -> jax.Array:
        """Map images [B, H, W, num_channels], with a mask that is 0 at padding, to a map [B, h, w, widths[-1]]."""
        self._check(image_BxHxWxC.shape)
        mask = functools.partial(shrink, pixel_mask_BxHxW)
        frozen = self.norm == "frozen"
        norm = functools.partial(FrozenBatchNorm) if frozen else functools.partial(GroupNorm, self.norm_groups)
        x = _convolution(self.stem_width, self.stem_kernel, self.stem_stride, 1, "stem_conv", image_BxHxWxC.dtype)(
            image_BxHxWxC
        )
        x = jax.nn.relu(norm(name="stem_norm")(x, mask(x.shape[1:3])))
        if self.stem_pool:
            x = nn.max_pool(x, (3, 3), (2, 2), [(1, 1), (1, 1)])
            if not frozen and (inside := mask(x.shape[1:3])) is not None:  # as a window may reach over the edge
                x *= inside[..., None].astype(x.dtype)
        for stage, (depth, width) in enumerate(zip(self.depths, self.widths), start=1):
            dilated = self.dilation and stage == len(self.depths)
            for i in range(depth):
                first = i == 0
                x = Residual(
                    width,
                    self.block == "bottleneck",
                    stride=2 if first and stage > 1 and not dilated else 1,
                    dilations=(2 if dilated and not first else 1, 2 if dilated else 1),
                    norm=norm,
                    name=f"stage{stage}_block{i}",
                )(x, pixel_mask_BxHxW)
        return x

    def _check(self, shape: tuple[int, ...]) -> None:
        for field, kinds in (("block", BLOCKS), ("norm", NORMS)):
            if getattr(self, field) not in kinds:
                raise UserError(f"{field}: unknown '{getattr(self, field)}'{nearest(getattr(self, field), kinds)}")
        if len(self.depths) != len(self.widths) or not self.depths:
            raise UserError(f"depths: {len(self.depths)} stages, but {len(self.widths)} widths")
        if shape[-1] != self.num_channels:
            raise UserError(f"images of {shape[-1]} channels; the backbone's num_channels is {self.num_channels}")


def shrink(mask_BxHxW: jax.Array | None, shape: tuple[int, ...]) -> jax.Array | None:
    """Return a mask at another number of rows and columns, the nearest pixel's (as PyTorch has it); None for None."""
    if mask_BxHxW is None:
        return None
    rows, columns = (
        (np.arange(new) * (np.float32(old) / np.float32(new))).astype(np.int32)
        for old, new in zip(mask_BxHxW.shape[1:], shape)
    )
    return mask_BxHxW[:, rows][:, :, columns]


def _convolution(width: int, kernel: int, stride: int, dilation: int, name: str, dtype: jnp.dtype) -> nn.Conv:
    """A convolution without a bias, padded so that the size shrinks by the stride and by no more."""
    around = max(kernel - stride + 1, 0) // 2 * dilation
    return nn.Conv(
        width,
        (kernel, kernel),
        (stride, stride),
        [(around, around)] * 2,
        kernel_dilation=dilation,
        use_bias=False,
        dtype=dtype,
        kernel_init=nn.initializers.variance_scaling(2.0, "fan_out", "normal"),
        name=name,
    )
