"""The toy model of superposition: more features than dimensions (Elhage 2022, "Toy Models of Superposition").

Shape letters: B batch, F features, H hidden dimensions.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from research.models.layers import activation


class FeatureAutoencoder(nn.Module):
    """x' = activation(W^T W x + b), section "Demonstrating superposition": the same W packs features and unpacks them.

    Attributes:
      hidden_size: H.
      activation: "relu" for the ReLU output model, "linear" for the linear model.
    """

    hidden_size: int
    activation: str = "relu"

    @nn.compact
    def __call__(self, features_BxF: jax.Array) -> jax.Array:
        """Map features float32 [B, F] to their reconstruction [B, F]."""
        features = features_BxF.shape[-1]
        kernel_FxH = self.param("kernel", nn.initializers.xavier_normal(), (features, self.hidden_size), jnp.float32)
        bias_F = self.param("bias", nn.initializers.zeros, (features,), jnp.float32)
        return activation(self.activation)(features_BxF @ kernel_FxH @ kernel_FxH.T + bias_F)
