"""Random keys that are a function of an image, so that what is drawn for it depends on no batch."""

import jax
import jax.numpy as jnp


def of_images(rng: jax.Array, image: jax.Array) -> jax.Array:
    """Return a key for each image of [B, ...], made of a key and a hash of its pixels."""
    bits = jax.lax.bitcast_convert_type(image.astype(jnp.float32), jnp.uint32).reshape(image.shape[0], -1)
    odd = 2 * jnp.arange(bits.shape[1], dtype=jnp.uint32) + 1
    return jax.vmap(jax.random.fold_in, (None, 0))(rng, (bits * odd).sum(axis=1, dtype=jnp.uint32))
