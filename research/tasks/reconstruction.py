"""Masked reconstruction: predict the pixels of hidden patches (He 2021)."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from research.metrics import Mean
from research.models import vit
from research.models.mae import MaskedAutoencoder
from research.task import Batch, Params, Spec
from research.tasks import keys, tokens

EPSILON = 1e-6  # added to a patch's variance, as in the authors' code


@dataclasses.dataclass(frozen=True)
class Reconstruction:
    """A masked autoencoder of images, "image" float [B, H, W, C]; its error counts on hidden patches only.

    Training hides other patches at every step. Evaluation and prediction hide patches by a key and the image itself, so
    that an image's result depends on no batch.

    Attributes:
      model: the Linen module; its `normalize_targets` says what is predicted.
    """

    model: MaskedAutoencoder

    def init(self, rng: jax.Array, spec: Spec) -> Params:
        """Return new float32 parameters; raise UserError if images are missing, or cannot be cut or masked so."""
        tokens.check(spec, ("image",))
        image = jnp.zeros((1, *spec["image"].shape[1:]), jnp.float32)
        return self.model.init(rng, image, jnp.zeros((1, self._patches(image))))["params"]

    def loss(self, params: Params, batch: Batch, rng: jax.Array) -> tuple[Mean, dict[str, Mean]]:
        """Return the mean squared error over the numbers in hidden patches.

        Where targets are normalised, a prediction of 0 has an error of 1 (of less for patches of one colour).
        """
        masking, dropout = jax.random.split(rng)
        image = batch["image"]
        noise_BxN = jax.random.uniform(masking, (image.shape[0], self._patches(image)))
        errors_BxN, masked_BxN, _ = self._apply(params, image, noise_BxN, {"dropout": dropout})
        return _mean(errors_BxN, masked_BxN, batch), {}

    def metrics(self, params: Params, batch: Batch) -> dict[str, Mean]:
        """Return "loss", without dropout."""
        noise_BxN = self._noise(batch["image"], jax.random.key(0))
        errors_BxN, masked_BxN, _ = self._apply(params, batch["image"], noise_BxN, {})
        return {"loss": _mean(errors_BxN, masked_BxN, batch)}

    def predict(self, params: Params, batch: Batch, rng: jax.Array) -> dict[str, jax.Array]:
        """Hide patches and predict them.

        Args:
          params: of the model.
          batch: "image"; where it has "noise" [B, N], the patches of the least numbers are kept.
          rng: what is hidden otherwise.

        Returns:
          "reconstruction" [B, H, W, C], in the units of "image": the hidden patches as predicted, where targets are
          normalised with the mean and the deviation that they truly have, which the model is not asked for; the others
          as they are. "masked" bool [B, N]: which were hidden. "loss" [B].
        """
        image = batch["image"]
        noise_BxN = batch["noise"] if "noise" in batch else self._noise(image, rng)
        errors_BxN, masked_BxN, predictions_BxNxF = self._apply(params, image, noise_BxN, {})
        squares_BxNxF = vit.cut(image, self._patch_size)
        mean, deviation = self._statistics(squares_BxNxF)
        painted_BxNxF = jnp.where(masked_BxN[..., None], predictions_BxNxF * deviation + mean, squares_BxNxF)
        return {
            "reconstruction": vit.join(painted_BxNxF, image.shape[1:3], self._patch_size),
            "masked": masked_BxN,
            "loss": (errors_BxN * masked_BxN).sum(axis=1) / masked_BxN.sum(axis=1),
        }

    def describe(self, output: dict[str, np.ndarray]) -> dict[str, Any]:
        """Return one image's loss and the numbers of the patches that were hidden, counted row by row from 0."""
        return {"loss": float(output["loss"]), "masked": np.flatnonzero(output["masked"]).tolist()}

    @property
    def _patch_size(self) -> int:
        return self.model.encoder.patch_size

    def _patches(self, image_BxHxWxC: jax.Array) -> int:
        rows, columns = vit.grid(image_BxHxWxC.shape[1:3], self._patch_size)
        return rows * columns

    def _apply(
        self, params: Params, image: jax.Array, noise_BxN: jax.Array, rngs: dict[str, jax.Array]
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Return each patch's mean squared error [B, N], which patches are hidden [B, N], predictions [B, N, F]."""
        outputs = self.model.apply({"params": params}, image, noise_BxN, rngs=rngs)
        predictions_BxNxF, masked_BxN = map(jnp.asarray, outputs)
        squares_BxNxF = vit.cut(image, self._patch_size)
        mean, deviation = self._statistics(squares_BxNxF)
        errors_BxN = jnp.square(predictions_BxNxF - (squares_BxNxF - mean) / deviation).mean(axis=-1)
        return errors_BxN, masked_BxN, predictions_BxNxF

    def _statistics(self, squares_BxNxF: jax.Array) -> tuple[jax.Array | float, jax.Array | float]:
        """Return what targets are reduced and divided by, [B, N, 1] each."""
        if not self.model.normalize_targets:
            return 0.0, 1.0
        variance_BxNx1 = squares_BxNxF.var(axis=-1, ddof=1, keepdims=True)  # of a sample, as in the authors' code
        return squares_BxNxF.mean(axis=-1, keepdims=True), jnp.sqrt(variance_BxNx1 + EPSILON)

    def _noise(self, image_BxHxWxC: jax.Array, rng: jax.Array) -> jax.Array:
        """Return numbers [B, N] in [0, 1), those of each image a function of the key and its pixels."""
        keys_B = keys.of_images(rng, image_BxHxWxC)
        return jax.vmap(lambda key: jax.random.uniform(key, (self._patches(image_BxHxWxC),)))(keys_B)


def _mean(errors_BxN: jax.Array, masked_BxN: jax.Array, batch: Batch) -> Mean:
    return Mean.of(errors_BxN, masked_BxN * batch["mask"][:, None])
