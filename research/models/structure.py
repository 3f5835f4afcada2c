"""What may attend to what.

Shape letters as in `layers`.
"""

import flax.struct
import jax
import jax.numpy as jnp


@flax.struct.dataclass
class Structure:
    """What may attend to what, without a mask of all pairs.

    Attributes:
      queries_BxT: document numbers of the queries, int; None where keys have none.
      keys_BxS: document numbers of the keys, 0 at padding: a query attends to the keys of its own number. A document's
        tokens stand side by side. None: one document and no padding.
      start: where the first query stands among the keys, int32; None where queries and keys begin together.
      causal: whether queries attend to no later key.
      window: queries attend to the last `window` keys only, their own included, and where they are not causal to as
        many from their own on; None for all.
      local: whether the window holds, bool []; None where it does. Blocks that share a program differ in this.
      packed: whether rows may hold several documents, or padding that comes first. Where they may not, kernels that
        know nothing but a row's length serve, and make rows that do NaN.
    """

    queries_BxT: jax.Array | None = None
    keys_BxS: jax.Array | None = None
    start: jax.Array | None = None
    local: jax.Array | None = None
    causal: bool = flax.struct.field(pytree_node=False, default=False)
    window: int | None = flax.struct.field(pytree_node=False, default=None)
    packed: bool = flax.struct.field(pytree_node=False, default=False)

    def mask(self, length: int, size: int) -> jax.Array | None:
        """Return which of `size` keys each of `length` queries may attend to, bool broadcastable to [B, H, T, S].

        None where all may attend to all.
        """
        mask: jax.Array | None = None
        start = 0 if self.start is None else self.start
        queries_Tx1, keys_1xS = start + jnp.arange(length)[:, None], jnp.arange(size)[None]
        if self.causal:
            mask = (keys_1xS <= queries_Tx1)[None, None]
        if self.window is not None:
            near = (keys_1xS > queries_Tx1 - self.window)[None, None]
            near = near if self.causal else near & (keys_1xS < queries_Tx1 + self.window)[None, None]
            near = near if self.local is None else near | ~jnp.asarray(self.local)
            mask = near if mask is None else mask & near
        if self.keys_BxS is not None and self.queries_BxT is not None:
            same_BxTxS = self.queries_BxT[:, :, None] == self.keys_BxS[:, None, :]
            known = (same_BxTxS & (self.keys_BxS != 0)[:, None, :])[:, None]
            mask = known if mask is None else known & mask
        return mask

    @classmethod
    def within(
        cls,
        numbers_BxS: jax.Array | None,
        length: int,
        *,
        causal: bool,
        index: jax.Array | None = None,
        window: int | None = None,
        packed: bool = False,
    ) -> "Structure":
        """Return the structure of a sequence that attends to itself, or to the cache that it is written to.

        Args:
          numbers_BxS: the keys' document numbers; None for one document without padding.
          length: T, how many of the keys are queries.
          causal: as above.
          index: where the first query stands in the cache; None where there is none.
          window: as above.
          packed: as above.
        """
        queries = numbers_BxS
        if numbers_BxS is not None and index is not None:
            queries = jax.lax.dynamic_slice_in_dim(numbers_BxS, index, length, 1)
        return cls(queries, numbers_BxS, index, causal=causal, window=window, packed=packed)


EVERYTHING = Structure()
