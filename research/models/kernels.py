"""Kernels for attention: cuDNN's on GPUs and splash attention on TPUs.

Shape letters as in `layers`. Operands are [B, T, H, K], [B, S, G, K] and [B, S, G, K]; `attention.attend` says what is
computed, and asks here first what a kernel cannot do.
"""

import functools
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu import splash_attention
from jax.sharding import PartitionSpec as P

if TYPE_CHECKING:
    from research.models.attention import Structure

LANES = 128  # of a TPU's vector registers
SPLASH_BLOCK = 512


def cudnn_obstacle(
    query: jax.Array, key: jax.Array, value: jax.Array, structure: "Structure", bias: jax.Array | None, on: str
) -> str | None:
    """Return why cuDNN cannot compute this, or None; `on` is the platform."""
    width, lengths = query.shape[-1], (query.shape[1], key.shape[1])
    reasons = {
        f"needs a GPU; this is compiled for a {on.upper()}": on != "gpu",
        f"computes in 16 bits, and dtype is {query.dtype}": query.dtype not in (jnp.bfloat16, jnp.float16),
        f"needs heads of a width that is a multiple of 8 up to 256, not {width}": width % 8 or width > 256,
        f"needs even lengths where there is a bias, not {lengths}": bias is not None and any(n % 2 for n in lengths),
        "has no window without causality": structure.window is not None and not structure.causal,
        "has no rows of several documents": structure.packed and structure.keys_BxS is not None,
    }
    return next((reason for reason, holds in reasons.items() if holds), None)


def cudnn(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    structure: "Structure",
    bias: jax.Array | None,
    scale: float,
) -> jax.Array:
    """Compute attention by cuDNN's flash attention."""
    lengths: tuple[jax.Array, ...] | tuple[None, None] = (None, None)
    if structure.keys_BxS is not None and structure.queries_BxT is not None:
        numbers = [structure.queries_BxT, structure.keys_BxS]
        lengths = tuple((x != 0).sum(axis=1, dtype=jnp.int32) for x in numbers)
        query = _refused(query, numbers)
    if bias is not None:
        bias = jnp.broadcast_to(bias, (*bias.shape[:2], query.shape[1], key.shape[1])).astype(query.dtype)
    return jax.nn.dot_product_attention(
        query,
        key,
        value,
        bias,
        scale=scale,
        is_causal=structure.causal,
        query_seq_lengths=lengths[0],
        key_value_seq_lengths=lengths[1],
        local_window_size=None if structure.window is None else (structure.window - 1, 0),
        implementation="cudnn",
    )


def _refused(query: jax.Array, numbers: list[jax.Array]) -> jax.Array:
    """Return the queries, NaN in rows that are not one document and padding after it: a length does not tell those."""
    right = jnp.ones(len(query), bool)
    for numbers_BxT in numbers:
        right &= ((numbers_BxT[:, 1:] == numbers_BxT[:, :-1]) | (numbers_BxT[:, 1:] == 0)).all(axis=1)
    return query * jnp.where(right, 1, jnp.nan).astype(query.dtype)[:, None, None, None]


def splash_obstacle(
    query: jax.Array, key: jax.Array, value: jax.Array, structure: "Structure", bias: jax.Array | None, on: str
) -> str | None:
    """Return why splash attention cannot compute this, or None; `on` is the platform."""
    lengths = (query.shape[1], key.shape[1])
    reasons = {
        f"needs a TPU; this is compiled for a {on.upper()}": on != "tpu",
        "has no bias": bias is not None,
        f"needs lengths of {LANES} or more, not {lengths}": min(lengths) < LANES,
        f"needs queries and keys of one length where it is causal, not {lengths}": structure.causal
        and lengths[0] != lengths[1],
        "has no window without causality": structure.window is not None and not structure.causal,
    }
    return next((reason for reason, holds in reasons.items() if holds), None)


def splash(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    structure: "Structure",
    bias: jax.Array | None,
    scale: float,
    interpret: bool = False,
) -> jax.Array:
    """Compute attention by splash attention, in blocks that skip what may not attend; each device its own share.

    Lengths are filled up to whole blocks with padding that nothing attends to.
    """
    del bias  # refused above
    length, size = query.shape[1], key.shape[1]
    numbers = [
        jnp.ones(x.shape[:2], jnp.int32) if given is None else given.astype(jnp.int32)
        for x, given in ((query, structure.queries_BxT), (key, structure.keys_BxS))
    ]
    filled = [_filled(x, 1) for x in (query * scale, key, value, *numbers)]
    whole = structure.keys_BxS is None and filled[1].shape[1] == size
    attend = functools.partial(_splash_part, structure.causal, structure.window, whole, interpret)
    mesh = jax.sharding.get_abstract_mesh()
    if not mesh.empty and mesh.size > 1 and not mesh.manual_axes:
        rows = mesh.shape["data"] * mesh.shape["fsdp"]
        batch = ("data", "fsdp") if query.shape[0] % rows == 0 else None
        ways = mesh.shape["model"]
        heads = "model" if query.shape[2] % ways == 0 and key.shape[2] % ways == 0 else None
        wide, narrow = P(batch, None, heads, None), P(batch, None)
        attend = jax.shard_map(attend, in_specs=(wide, wide, wide, narrow, narrow), out_specs=wide, check_vma=False)
    return attend(*filled)[:, :length]


def _filled(x: jax.Array, axis: int) -> jax.Array:
    """Fill an axis up with zeros: to a multiple of the vector registers, of whole blocks where there are several."""
    size = x.shape[axis]
    unit = SPLASH_BLOCK if size > SPLASH_BLOCK else LANES
    widths = [(0, -size % unit if i == axis else 0) for i in range(x.ndim)]
    return jnp.pad(x, widths)


def _splash_part(
    causal: bool,
    window: int | None,
    whole: bool,
    interpret: bool,
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    queries_BxT: jax.Array,
    keys_BxS: jax.Array,
) -> jax.Array:
    shape = (query.shape[1], key.shape[1])
    if window is not None:
        mask: splash_attention.Mask = splash_attention.LocalMask(shape, (window - 1, 0), 0)
    else:
        mask = splash_attention.CausalMask(shape) if causal else splash_attention.FullMask(shape)
    rows, columns = (min(SPLASH_BLOCK, n) for n in shape)
    kernel = splash_attention.make_splash_mha(
        splash_attention.MultiHeadMask([mask] * query.shape[2]),
        head_shards=1,
        q_seq_shards=1,
        interpret=interpret,
        block_sizes=splash_attention.BlockSizes(
            block_q=rows,
            block_kv=columns,
            block_q_dkv=rows,
            block_kv_dkv=columns,
            block_q_dq=rows,
            block_kv_dq=columns,
        ),
    )
    heads_first = [x.swapaxes(1, 2) for x in (query, key, value)]
    if whole:
        return jax.vmap(kernel)(*heads_first).swapaxes(1, 2)
    # A query of no document shares its number with padding alone, as everywhere.
    segments = splash_attention.SegmentIds(queries_BxT, keys_BxS)
    return jax.vmap(kernel)(*heads_first, segments).swapaxes(1, 2)
