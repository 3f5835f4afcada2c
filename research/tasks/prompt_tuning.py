"""Prompt tuning (Lester 2021) around a task on text: the model stays as it is, and vectors before its inputs train.

To the model the vectors are tokens beyond its vocabulary, which come before every text.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from research.errors import UserError
from research.metrics import Mean
from research.models import layers
from research.task import Batch, Params, Spec, Task
from research.tasks.adapters import Adapter, flat, found, tree
from research.tasks.causal_lm import CausalLM
from research.tasks.classification import Classification
from research.tasks.seq2seq import Seq2Seq

PROMPT = "prompt"
TASKS = (Classification, CausalLM, Seq2Seq)
# What a batch has for the positions of the vectors, but for "input_ids". Of an encoder-decoder the targets are another
# text's, before which there is no prompt.
BESIDE = {"attention_mask": 1, "token_type_ids": 0}
BESIDE_TARGETS = {"targets": 0, "target_mask": 0, "target_bytes": 0}


@dataclasses.dataclass(frozen=True)
class PromptTuning(Adapter):
    """A task whose model reads a prompt of learned vectors before the embedded tokens of its text.

    They begin as embeddings of tokens drawn from the vocabulary (Lester 2021, section 3.2). The parameters are {"base":
    what is frozen, "whole": what trains as it is, "prompt": the vectors, beside the table of embeddings}. A model that
    reads its first position, as BERT's classifier does, reads the first vector's.

    Attributes:
      task: what is adapted: classification of text, a causal language model, or from text to text.
      length: how many vectors.
      table: a regular expression of the path of the embeddings of tokens.
      seed: of the tokens that the vectors begin as.
      whole: regular expressions of parameters that train as they are, such as those of a new head.
    """

    part: ClassVar[str] = "prompt"

    length: int = 20
    table: str = r"(^|/)word/embedding$"
    seed: int = 0

    def __post_init__(self):
        super().__post_init__()
        if self.length < 1:
            raise UserError(f"length: {self.length} is less than 1")
        if not isinstance(self.task, TASKS):
            names = ", ".join(kind.__name__ for kind in TASKS)
            raise UserError(f"task: a {type(self.task).__name__} takes no prompt; {names} do")
        object.__setattr__(self, "task", Prompted(self.task, self.length, self.table))

    def new(self, params: Mapping[str, jax.Array], rng: jax.Array) -> dict[str, jax.Array]:
        """Return the vectors [length, D]."""
        del rng  # they begin as what `start` makes of the embeddings that were read
        name = _table(self.table, params)
        return {_beside(name): self._drawn(params[name])}

    def start(self, params: Params) -> Params:
        """Return the parameters that training begins with: the vectors are embeddings of the table that was read."""
        arrays = flat(self.join(params))
        name = _table(self.table, arrays)
        return {**params, self.part: tree({_beside(name): self._drawn(arrays[name])})}

    def add(self, params: dict[str, jax.Array], own: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
        """Return the parameters with the vectors beside the table."""
        return {**params, **own}

    def intercept(self, call: Any, args: Any, kwargs: Any, context: nn.module.InterceptorContext) -> Any:
        """Leave it to the prompted task, which applies the vectors wherever it is asked."""
        return call(*args, **kwargs)

    def _drawn(self, table_VxD: jax.Array) -> jax.Array:
        return table_VxD[jax.random.randint(jax.random.key(self.seed), (self.length,), 0, table_VxD.shape[0])]


@dataclasses.dataclass(frozen=True)
class Prompted:
    """A task on text with learned vectors before it; its parameters are the task's, and the vectors beside the table.

    All else, such as `label_names`, is the task's.

    Attributes:
      task: the task.
      length: how many vectors.
      table: see `PromptTuning`.
    """

    task: Task
    length: int
    table: str

    def __getattr__(self, name: str) -> Any:
        if name == "task":  # asked for while it is copied, when there is none yet
            raise AttributeError(name)
        return getattr(self.task, name)

    def init(self, rng: jax.Array, spec: Spec) -> Params:
        """Return the task's new parameters, for texts that are longer by the vectors; raise UserError if too long."""
        longer = {
            name: jax.ShapeDtypeStruct((x.shape[0], x.shape[1] + self.length, *x.shape[2:]), x.dtype)
            if name in self._positions(spec)
            else x
            for name, x in spec.items()
        }
        return self.task.init(rng, longer)

    def loss(self, params: Params, batch: Batch, rng: jax.Array) -> tuple[Mean, dict[str, Mean]]:
        """Return the task's loss and metrics."""
        with nn.intercept_methods(_embed):
            return self.task.loss(params, self._longer(params, batch), rng)

    def metrics(self, params: Params, batch: Batch) -> dict[str, Mean]:
        """Return the task's metrics."""
        with nn.intercept_methods(_embed):
            return self.task.metrics(params, self._longer(params, batch))

    def predict(self, params: Params, batch: Batch, rng: jax.Array) -> dict[str, jax.Array]:
        """Return the task's outputs."""
        with nn.intercept_methods(_embed):
            return self.task.predict(params, self._longer(params, batch), rng)

    def describe(self, output: dict[str, np.ndarray]) -> dict[str, Any]:
        """Return one example's outputs as the task describes them."""
        return self.task.describe(output)

    def _positions(self, batch: Batch | Spec) -> dict[str, int]:
        """Return the features that grow, and what they have at the vectors."""
        if "input_ids" not in batch:
            raise UserError(f"config.task: a prompt comes before a text, and {', '.join(batch)} hold no 'input_ids'")
        if "positions" in batch:
            raise UserError("config.data.pack: a prompt comes before one text a row; leave it out, and 'positions'")
        of_targets = {} if isinstance(self.task, Seq2Seq) else BESIDE_TARGETS
        return {name: value for name, value in ({"input_ids": 0} | BESIDE | of_targets).items() if name in batch}

    def _longer(self, params: Params, batch: Batch) -> dict[str, jax.Array]:
        """Return the batch with the vectors' positions before the text, [B, length + T]."""
        arrays = flat(params)
        vocabulary = arrays[_table(self.table, arrays)].shape[0]
        longer = dict(batch)
        for name, value in self._positions(batch).items():
            first = jnp.full((batch[name].shape[0], self.length), value, batch[name].dtype)
            if name == "input_ids":
                first += vocabulary + jnp.arange(self.length, dtype=first.dtype)
            longer[name] = jnp.concatenate([first, batch[name]], axis=1)
        return longer


def check_no_prompt(task: Task, key: str) -> None:
    """Raise UserError, which names the key, where a model is to be used without its task and has a prompt there."""
    if isinstance(task, Prompted):
        raise UserError(f"{key}: it takes a model alone, and not the prompt before it; --mode=predict does")


def _embed(call: Any, args: Any, kwargs: Any, context: nn.module.InterceptorContext) -> Any:
    """Let the ids beyond a table that has vectors beside it stand for these."""
    module = context.module
    is_call = context.method_name == "__call__" and isinstance(module, layers.Embedding)
    if not is_call or not module.has_variable("params", PROMPT):
        return call(*args, **kwargs)
    (ids,) = args
    vectors: jax.Array = module.get_variable("params", PROMPT)
    number = ids - module.vocab_size
    tokens = call(jnp.minimum(ids, module.vocab_size - 1))
    # An id beyond the vectors too yields NaN, as one beyond the table does.
    learned = jnp.take(vectors, jnp.maximum(number, 0), axis=0, mode="fill").astype(tokens.dtype)
    return jnp.where((number >= 0)[..., None], learned, tokens)


def _table(pattern: str, params: Mapping[str, Any]) -> str:
    """Return the path of the table of embeddings, or raise UserError where there is none, or several."""
    names = found([pattern], params)
    if len(names) != 1:
        tables = ", ".join(name for name in params if name.endswith("embedding"))
        raise UserError(f"config.task.table: '{pattern}' finds {len(names)} parameters instead of one of {tables}")
    return names[0]


def _beside(name: str) -> str:
    return name.removesuffix("embedding") + PROMPT
