"""Kernels for attention: cuDNN's and `flash` on GPUs, splash attention on TPUs.

Shape letters as in `layers`. Operands are [B, T, H, K], [B, S, G, K] and [B, S, G, K]; `attention.attend` says what is
computed, and asks here first what a kernel cannot do.
"""

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu import splash_attention
from jax.sharding import PartitionSpec as P

from research.models.layers import words
from research.models.positions import by_distance
from research.sharding import device_kind

try:
    from research.models import flash as flash_kernel
except ImportError:  # JAX 0.12 announces that it will drop what this is written in
    flash_kernel = None  # type: ignore[assignment]

if TYPE_CHECKING:
    from research.models.attention import DropWeights
    from research.models.structure import Structure

LANES = 128  # of a TPU's vector registers
SPLASH_BLOCK = 512


def cudnn_obstacle(
    query: jax.Array, key: jax.Array, value: jax.Array, structure: "Structure", bias: jax.Array | None, on: str
) -> str | None:
    """Return why cuDNN cannot compute this, or None; `on` is the platform."""
    width = query.shape[-1]
    reasons = {
        f"needs a GPU; this is compiled for a {on.upper()}": on != "gpu",
        f"computes in 16 bits, and dtype is {query.dtype}": query.dtype not in (jnp.bfloat16, jnp.float16),
        f"needs heads of a width that is a multiple of 8 up to 256, not {width}": width % 8 or width > 256,
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
    dropout: None = None,
    softcap: None = None,
) -> jax.Array:
    """Compute attention by cuDNN's flash attention; odd lengths, which it has no backward pass for, are filled up."""
    del dropout, softcap  # refused before
    length, size = query.shape[1], key.shape[1]
    lengths: tuple[jax.Array, ...] | tuple[None, None] = (None, None)
    if structure.keys_BxS is not None and structure.queries_BxT is not None:
        numbers = [structure.queries_BxT, structure.keys_BxS]
        lengths = tuple((x != 0).sum(axis=1, dtype=jnp.int32) for x in numbers)
        query = _refused(query, numbers)
    elif length % 2 or size % 2:
        lengths = tuple(jnp.full(len(query), n, jnp.int32) for n in (length, size))
    if bias is not None:
        bias = _filled(_filled(by_distance(bias, length).astype(query.dtype)[None], 2, 2), 3, 2)
    query, key, value = (_filled(x, 1, 2) for x in (query, key, value))
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
    )[:, :length]


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
        f"needs a TPU v4 or later, not a {device_kind()}": device_kind().startswith(("TPU v2", "TPU v3")),
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
    bias: None,
    scale: float,
    dropout: None = None,
    softcap: float | None = None,
    interpret: bool = False,
) -> jax.Array:
    """Compute attention by splash attention, in blocks that skip what may not attend; each device its own share.

    Lengths are filled up to whole blocks with padding that nothing attends to.
    """
    del bias, dropout  # refused before
    length, size = query.shape[1], key.shape[1]
    operands = [query * scale, key, value, *_numbers(query, key, structure)]
    filled = [_filled(x, 1, SPLASH_BLOCK if x.shape[1] > SPLASH_BLOCK else LANES) for x in operands]
    whole = structure.keys_BxS is None and filled[1].shape[1] == size
    attend = functools.partial(_splash_part, structure.causal, structure.window, softcap, whole, interpret)
    return _on_each_device(attend, *filled)[:, :length]


def _numbers(query: jax.Array, key: jax.Array, structure: "Structure") -> list[jax.Array]:
    """Return the document numbers of queries and keys, int32, where there are none 1."""
    return [
        jnp.ones(x.shape[:2], jnp.int32) if given is None else given.astype(jnp.int32)
        for x, given in ((query, structure.queries_BxT), (key, structure.keys_BxS))
    ]


def _on_each_device(
    attend: Callable[..., jax.Array], query: jax.Array, key: jax.Array, *others: jax.Array
) -> jax.Array:
    """Call a kernel that compilers cannot split with each device's rows and heads.

    Args:
      attend: takes queries, keys and the `others`.
      query: [B, T, H, K].
      key: [B, S, G, K].
      *others: values [B, S, G, K], arrays [B, N] of rows, and arrays [1, H, N] of heads.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1 or mesh.manual_axes:
        return attend(query, key, *others)
    batch, heads = _axes(query, key)
    wide = P(batch, None, heads, None)
    kinds = {2: P(batch, None), 3: P(None, heads, None), 4: wide}
    specs = [kinds[x.ndim] for x in (query, key, *others)]
    return jax.shard_map(attend, in_specs=tuple(specs), out_specs=wide, check_vma=False)(query, key, *others)


def _axes(query: jax.Array, key: jax.Array) -> tuple[tuple[str, str] | None, str | None]:
    """Return the axes of the mesh over which rows and heads are split; None where they do not divide."""
    mesh = jax.sharding.get_abstract_mesh()
    rows, ways = mesh.shape["data"] * mesh.shape["fsdp"], mesh.shape["model"]
    return (
        ("data", "fsdp") if query.shape[0] % rows == 0 else None,
        "model" if query.shape[2] % ways == 0 and key.shape[2] % ways == 0 else None,
    )


def _filled(x: jax.Array, axis: int, unit: int) -> jax.Array:
    """Fill an axis up with zeros to a multiple of `unit`."""
    return jnp.pad(x, [(0, -n % unit if i == axis else 0) for i, n in enumerate(x.shape)])


def flash_obstacle(
    query: jax.Array, key: jax.Array, value: jax.Array, structure: "Structure", bias: jax.Array | None, on: str
) -> str | None:
    """Return why `flash` cannot compute this, or None; `on` is the platform."""
    width = query.shape[-1]
    reasons = {
        f"needs a GPU; this is compiled for a {on.upper()}": on != "gpu",
        f"needs Pallas for Triton, which JAX {jax.__version__} lacks": flash_kernel is None,
        f"computes in 16 bits, and dtype is {query.dtype}": query.dtype not in (jnp.bfloat16, jnp.float16),
        f"needs heads of a width of 16, 32, 64 or 128, not {width}": width not in (16, 32, 64, 128),
    }
    return next((reason for reason, holds in reasons.items() if holds), None)


def flash(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    structure: "Structure",
    bias: jax.Array | None,
    scale: float,
    dropout: "DropWeights | None",
    softcap: None = None,
    interpret: bool = False,
) -> jax.Array:
    """Compute attention by `flash.flash`; each device its own share, with the dropout of the whole."""
    del softcap  # refused before
    options = flash_kernel.Options(
        causal=structure.causal,
        window=structure.window,
        scale=scale,
        rate=dropout.rate if dropout else 0.0,
        biased=bias is not None,
        heads=query.shape[2],
        lengths=(query.shape[1], key.shape[1]),
        interpret=interpret,
    )
    mesh = jax.sharding.get_abstract_mesh()
    split = _axes(query, key) if not mesh.empty and mesh.size > 1 and not mesh.manual_axes else (None, None)
    first, second = words(dropout.key) if dropout else (jnp.uint32(0), jnp.uint32(0))

    def attend(query: jax.Array, key: jax.Array, value: jax.Array, *others: jax.Array) -> jax.Array:
        queries_BxT, keys_BxS, *biases = others
        shares = zip(split, (query.shape[0], query.shape[2]))
        begin = [jnp.uint32(jax.lax.axis_index(axes) * size if axes else 0) for axes, size in shares]
        seed = jnp.stack([first, second, *begin])
        of_heads = biases[0][0] if biases else None
        return flash_kernel.flash(query, key, value, queries_BxT, keys_BxS, seed, of_heads, options)

    biases = [] if bias is None else [bias[None]]
    return _on_each_device(attend, query, key, value, *_numbers(query, key, structure), *biases)


def _splash_part(
    causal: bool,
    window: int | None,
    softcap: float | None,
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
        attn_logits_soft_cap=softcap,
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
