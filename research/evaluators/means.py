"""A task's own metrics as means over a dataset."""

import dataclasses
import math
from collections.abc import Callable

from jax.sharding import Mesh

from research.data.dataset import Dataset
from research.evaluators import batches
from research.metrics import merge
from research.task import Params, Task


@dataclasses.dataclass(frozen=True)
class Means:
    """Evaluates `task.metrics` on every example of a dataset, each once.

    Attributes:
      task: the task to evaluate.
      mesh: the device mesh.
      data: the evaluation data.
      perplexity: whether to report exp(loss) too, for language models, whose loss is in nats per token.
    """

    task: Task
    mesh: Mesh
    data: Dataset
    perplexity: bool = False

    def __call__(self, params: Params, check: Callable[[], None] = lambda: None) -> dict[str, float]:
        """Return {metric: mean}."""
        sums = merge(batches.run(self.task.metrics, params, self.data, self.mesh, check))
        means = {name: float(mean.compute()) for name, mean in sums.items()}
        return means | ({"perplexity": math.exp(min(means["loss"], 700.0))} if self.perplexity else {})
