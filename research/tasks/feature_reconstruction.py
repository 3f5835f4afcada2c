"""Reconstruction of features some of which matter more than others (Elhage 2022)."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from research.errors import UserError
from research.metrics import Mean
from research.models.feature_autoencoder import FeatureAutoencoder
from research.task import Batch, Params, Spec
from research.tasks import tokens


@dataclasses.dataclass(frozen=True)
class FeatureReconstruction:
    """An autoencoder of "features" float32 [B, F], and its squared error, weighted by importance.

    Elhage 2022 ("Toy Models of Superposition", section "Demonstrating superposition"): the error of feature i, from 0,
    counts `importance` ** i times.

    Attributes:
      model: the Linen module.
      importance: in (0, 1]; at 1 all features matter alike.
    """

    model: FeatureAutoencoder
    importance: float = 0.7

    def __post_init__(self):
        if not 0 < self.importance <= 1:
            raise UserError(f"config.task.importance: {self.importance} must lie in (0, 1]")

    def init(self, rng: jax.Array, spec: Spec) -> Params:
        """Return new float32 parameters; raise UserError if the features are missing."""
        tokens.check(spec, ("features",))
        return tokens.init(self.model, rng, spec, ("features",))

    def loss(self, params: Params, batch: Batch, rng: jax.Array) -> tuple[Mean, dict[str, Mean]]:
        """Return the mean weighted squared error of a feature; nothing is drawn."""
        return self.metrics(params, batch)["loss"], {}

    def metrics(self, params: Params, batch: Batch) -> dict[str, Mean]:
        """Return "loss"."""
        errors_BxF = jnp.square(self._reconstruct(params, batch) - batch["features"])
        weights_F = self.importance ** jnp.arange(errors_BxF.shape[1], dtype=jnp.float32)
        counted_BxF = jnp.broadcast_to(batch["mask"][:, None], errors_BxF.shape)
        return {"loss": Mean.of(errors_BxF * weights_F, counted_BxF)}

    def predict(self, params: Params, batch: Batch, rng: jax.Array) -> dict[str, jax.Array]:
        """Return the "reconstruction" float32 [B, F]."""
        return {"reconstruction": self._reconstruct(params, batch)}

    def describe(self, output: dict[str, np.ndarray]) -> dict[str, Any]:
        """Return one vector's reconstruction as a list."""
        return {"reconstruction": output["reconstruction"].tolist()}

    def _reconstruct(self, params: Params, batch: Batch) -> jax.Array:
        return jnp.asarray(self.model.apply({"params": params}, batch["features"]))
