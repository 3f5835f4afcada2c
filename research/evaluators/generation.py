"""Generated texts scored against references."""

import dataclasses
import functools
import logging
from collections.abc import Callable

import jax
import numpy as np
from jax.sharding import Mesh

from research.data.dataset import Dataset
from research.errors import UserError, nearest
from research.evaluators import batches, text_scores
from research.evaluators.numbered import numbered
from research.task import Batch, Params, Task

SHOWN = 3  # number of texts logged


@dataclasses.dataclass(frozen=True)
class Generation:
    """Generates a text for every example and scores the texts.

    Attributes:
      task: its `describe` gives "prediction", the text.
      mesh: the device mesh.
      data: the evaluation data; each example must make one row.
      scores: names from `text_scores.SCORES`.
      reference: the field of the reference text or texts.
      max_examples: the number of examples to generate for, from the first; None: all.
    """

    task: Task
    mesh: Mesh
    data: Dataset
    scores: tuple[str, ...] = ("bleu", "chrf")
    reference: str = "target"
    max_examples: int | None = None

    def __post_init__(self):
        for name in self.scores:
            if name not in text_scores.SCORES:
                raise UserError(f"scores: unknown score '{name}'{nearest(name, text_scores.SCORES)}")
        if self.max_examples is not None and self.max_examples < 1:
            raise UserError(f"max_examples: {self.max_examples} must be at least 1")

    def __call__(self, params: Params, check: Callable[[], None] = lambda: None) -> dict[str, float]:
        """Return {score: value}; log the first texts and sacreBLEU's signatures."""
        texts = self.predictions(params, check)
        for text, references in list(zip(texts, self.references))[:SHOWN]:
            logging.info("predicted: %s", text)
            logging.info("reference: %s", references[0])
        for name, signature in self.signatures.items():
            logging.info("sacreBLEU's signature of %s: %s", name, signature)
        return {name: text_scores.SCORES[name](texts, self.references) for name in self.scores}

    def predictions(self, params: Params, check: Callable[[], None] = lambda: None) -> list[str]:
        """Return the texts, in the order of the examples."""
        texts: dict[int, str] = {}
        for outputs, numbers, mask in batches.run(self._batch, params, self.dataset, self.mesh, check):
            for i in np.flatnonzero(mask):
                if int(numbers[i]) in texts:
                    raise UserError(
                        "data.ops: an example makes several rows, so it has no single prediction; use ops that make one"
                    )
                described = self.task.describe({name: value[i] for name, value in outputs.items()})
                texts[int(numbers[i])] = described["prediction"]
        return [text for _, text in sorted(texts.items())]

    @functools.cached_property
    def references(self) -> list[list[str]]:
        """Return the reference texts of each example, in order."""
        found = []
        for i in range(len(self.dataset.source)):
            example = self.dataset.source[i]
            if self.reference not in example:
                raise UserError(f"reference: examples have no '{self.reference}'{nearest(self.reference, example)}")
            value = example[self.reference]
            found.append([value] if isinstance(value, str) else [str(text) for text in value])
        return found

    @property
    def signatures(self) -> dict[str, str]:
        """Return {score: sacreBLEU's signature}, to be quoted with the scores that have one."""
        every = {name: text_scores.signature(name, self.references) for name in self.scores}
        return {name: signature for name, signature in every.items() if signature}

    @functools.cached_property
    def dataset(self) -> Dataset:
        """The data as it is read, each example with its number."""
        return numbered(self.data, count=self.max_examples)

    def _batch(self, params: Params, batch: Batch) -> tuple[dict[str, jax.Array], jax.Array, jax.Array]:
        key = jax.random.fold_in(jax.random.key(0), batch["example"][0])
        return self.task.predict(params, batch, key), batch["example"], batch["mask"]
