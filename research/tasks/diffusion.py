"""Diffusion and flow matching: images, or latents, out of noise, class by class."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from research.errors import UserError
from research.generation import diffusion
from research.generation.diffusion import Flow, Gaussian, Sampling, expand
from research.metrics import Mean
from research.models.dit import DiT
from research.task import Batch, Params, Spec
from research.tasks import keys, tokens

BOUND_WEIGHT = 1e-3  # lambda of Nichol 2021, equation 16


@dataclasses.dataclass(frozen=True)
class Diffusion:
    """A model that is told a noisy "image" float [B, H, W, C], the time and the "label" int [B].

    It learns what `process` has it say, by squared error. Where it learns the variance too, the variational bound, in
    bits a number, is added with weight 0.001, and does not teach it anything else (L_hybrid of Nichol 2021).

    Attributes:
      model: the Linen module.
      process: how noise is mixed in, and what the model says of it.
      label_dropout: the share of labels that are taken away in training, so that guidance has what it departs from.
      sampling: how images are drawn.
      label_names: the classes' names, for display; taken from the training data where they are left out.
    """

    model: DiT
    process: Gaussian | Flow = dataclasses.field(default_factory=Gaussian)
    label_dropout: float = 0.1
    sampling: Sampling = dataclasses.field(default_factory=Sampling)
    label_names: tuple[str, ...] = ()

    def __post_init__(self):
        if not 0 <= self.label_dropout < 1:
            raise UserError(f"config.task.label_dropout: {self.label_dropout} must lie in [0, 1)")
        if self.model.learned_variance and isinstance(self.process, Flow):
            raise UserError("config.task.model.learned_variance: a flow has no variance; set it to False")
        if self.label_names and len(self.label_names) != self.model.num_classes:
            names, classes = len(self.label_names), self.model.num_classes
            raise UserError(f"config.task.model.num_classes: {classes} classes for {names} labels {self.label_names}")
        self.check(self.sampling)

    def check(self, sampling: Sampling) -> None:
        """Raise UserError unless images can be drawn so."""
        self.process.grid(sampling)
        if sampling.guidance != 1 and not self.label_dropout:
            raise UserError("sampling.guidance: the model is not trained without labels; see label_dropout")

    def init(self, rng: jax.Array, spec: Spec) -> Params:
        """Return new float32 parameters; raise UserError if there are no images and classes that fit the model."""
        tokens.check(spec, ("image", "label"))
        if not jnp.issubdtype(spec["label"].dtype, jnp.integer) or spec["label"].ndim != 1:
            raise UserError(f"config.data: labels must be class numbers, integers [B], not {spec['label'].dtype}")
        image = jnp.zeros((1, *spec["image"].shape[1:]), jnp.float32)
        return self.model.init(rng, image, jnp.zeros(1), jnp.zeros(1, jnp.int32))["params"]

    def loss(self, params: Params, batch: Batch, rng: jax.Array) -> tuple[Mean, dict[str, Mean]]:
        """Return the loss at random times, and its parts where it has two: "squared_error" and "bound"."""
        size = batch["label"].shape
        sharing, noising, dropping, dropout = jax.random.split(rng, 4)
        shares_B, noise = jax.random.uniform(sharing, size), jax.random.normal(noising, batch["image"].shape)
        dropped_B = jax.random.bernoulli(dropping, self.label_dropout, size)
        label_B = jnp.where(dropped_B, self.model.num_classes, self._known(batch["label"]))
        parts = self._parts(params, batch["image"], label_B, shares_B, noise, {"dropout": dropout})
        means = {name: Mean.of(values, batch["mask"]) for name, values in parts.items()}
        return means.pop("loss"), means

    def metrics(self, params: Params, batch: Batch) -> dict[str, Mean]:
        """Return "loss", and its parts where it has two, with labels and without dropout.

        The time and the noise of an image are a function of its pixels, the same at every evaluation.
        """
        image = batch["image"]
        keys_B = keys.of_images(jax.random.key(0), image)
        shares_B = jax.vmap(lambda key: jax.random.uniform(jax.random.fold_in(key, 0)))(keys_B)
        noise = jax.vmap(lambda key: jax.random.normal(jax.random.fold_in(key, 1), image.shape[1:]))(keys_B)
        parts = self._parts(params, image, self._known(batch["label"]), shares_B, noise, {})
        return {name: Mean.of(values, batch["mask"]) for name, values in parts.items()}

    def predict(self, params: Params, batch: Batch, rng: jax.Array) -> dict[str, jax.Array]:
        """Return "image" float32 [B, H, W, C], drawn for the labels [B] of the batch, in the units of the data."""
        if "label" not in batch:
            raise UserError("--mode=predict: a diffusion run has nothing to predict; --mode=generate draws images")
        return {"image": self.draw(params, batch["label"], jax.random.split(rng, len(batch["label"])), self.sampling)}

    def describe(self, output: dict[str, np.ndarray]) -> dict[str, Any]:
        """Return the image's numbers."""
        return {"image": output["image"].tolist()}

    def draw(self, params: Params, label_B: jax.Array, keys_B: jax.Array, sampling: Sampling) -> jax.Array:
        """Return images [B, H, W, C] of classes, each a function of its own key."""
        none_B = jnp.full_like(label_B, self.model.num_classes)

        def predict(x: jax.Array, time_B: jax.Array) -> tuple[jax.Array, jax.Array | None]:
            if sampling.guidance == 1:
                return self._split(self._apply(params, x, time_B, label_B, {}))
            labels = jnp.concatenate([label_B, none_B])
            twice = jnp.concatenate([x, x]), jnp.concatenate([time_B, time_B])
            said, share = self._split(self._apply(params, *twice, labels, {}))
            with_label, without = jnp.split(said, 2)
            guided = without + sampling.guidance * (with_label - without)
            return guided, None if share is None else jnp.split(share, 2)[0]

        return diffusion.sample(self.process, predict, keys_B, self.model.shape, sampling)

    def _known(self, label_B: jax.Array) -> jax.Array:
        """Return the labels; one that no class has, and that would stand for none, makes the loss NaN."""
        known_B = (label_B >= 0) & (label_B < self.model.num_classes)
        return jnp.where(known_B, label_B, self.model.num_classes + 1)

    def _parts(
        self,
        params: Params,
        image: jax.Array,
        label_B: jax.Array,
        shares_B: jax.Array,
        noise: jax.Array,
        rngs: dict[str, jax.Array],
    ) -> dict[str, jax.Array]:
        """Return each example's loss [B], and its parts where it has two."""
        time_B = self.process.time(shares_B)
        signal_B, noise_B = self.process.at(time_B)
        at = expand(signal_B, image), expand(noise_B, image)
        mixture = at[0] * image + at[1] * noise
        said, share = self._split(self._apply(params, mixture, time_B, label_B, rngs))
        error_B = jnp.square(said - self.process.target(image, noise, at)).mean(axis=(1, 2, 3))
        if share is None or isinstance(self.process, Flow):
            return {"loss": error_B}
        seen, _ = self.process.pair(jax.lax.stop_gradient(said), mixture, at)
        bound_B = self.process.num_steps * diffusion.bound(self.process, image, mixture, time_B, seen, share)
        return {"loss": error_B + BOUND_WEIGHT * bound_B, "squared_error": error_B, "bound": bound_B}

    def _apply(
        self, params: Params, image: jax.Array, time_B: jax.Array, label_B: jax.Array, rngs: dict[str, jax.Array]
    ) -> jax.Array:
        return jnp.asarray(self.model.apply({"params": params}, image, time_B, label_B, rngs=rngs))

    def _split(self, output: jax.Array) -> tuple[jax.Array, jax.Array | None]:
        """Return what the model says, and the place of the learned variance between its bounds."""
        if not self.model.learned_variance:
            return output, None
        said, variance = jnp.split(output, 2, axis=-1)
        return said, (variance + 1) / 2
