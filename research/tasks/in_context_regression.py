"""Learning functions in context: predict a function's value at a point from other points of it (Garg 2022)."""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from research.errors import UserError
from research.metrics import Mean
from research.task import Batch, Params, Spec
from research.tasks import tokens

FEATURES = ("inputs", "outputs")


@dataclasses.dataclass(frozen=True)
class InContextRegression:
    """A model of points -> predictions of the last of their values, and its squared error.

    The batch holds "inputs" float32 [B, N, D] and "outputs" float32 [B, N].

    Attributes:
      model: the Linen module, of inputs [B, N, D] and outputs [B, N] to predictions [B, P] of the last P outputs, each
        from the points before it and its own input: `models.in_context_decoder` (P = N), `models.linear_attention`
        (P = 1).
    """

    model: nn.Module

    def init(self, rng: jax.Array, spec: Spec) -> Params:
        """Return new float32 parameters; raise UserError if a feature is missing or there are too many points."""
        tokens.check(spec, FEATURES)
        most = getattr(self.model, "max_points", None)
        if most is not None and spec["inputs"].shape[1] > most:
            raise UserError(f"config.data: {spec['inputs'].shape[1]} points are more than max_points, {most}")
        return tokens.init(self.model, rng, spec, FEATURES)

    def loss(self, params: Params, batch: Batch, rng: jax.Array) -> tuple[Mean, dict[str, Mean]]:
        """Return the mean squared error of a prediction; nothing is drawn."""
        return self.metrics(params, batch)["loss"], {}

    def metrics(self, params: Params, batch: Batch) -> dict[str, Mean]:
        """Return "loss"."""
        predictions_BxP = self.predict(params, batch, jax.random.key(0))["predictions"]
        targets_BxP = batch["outputs"][:, -predictions_BxP.shape[1] :]
        counted_BxP = jnp.broadcast_to(batch["mask"][:, None], targets_BxP.shape)
        return {"loss": Mean.of(jnp.square(predictions_BxP - targets_BxP), counted_BxP)}

    def predict(self, params: Params, batch: Batch, rng: jax.Array) -> dict[str, jax.Array]:
        """Return the "predictions" float32 [B, P]."""
        inputs = [batch[name] for name in FEATURES]
        return {"predictions": jnp.asarray(self.model.apply({"params": params}, *inputs), jnp.float32)}

    def describe(self, output: dict[str, np.ndarray]) -> dict[str, Any]:
        """Return one function's predictions as a list."""
        return {"predictions": output["predictions"].tolist()}
