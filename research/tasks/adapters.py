"""What the tasks share that train a few parameters beside a frozen model (`Adapts`): what is kept and how it is found.

Their parameters are {"base": what is frozen, "whole": what trains as it is, and a part of their own}. In training the
latter stand beside the model's, and an interceptor of the model's layers applies them, so that no model knows of them;
to evaluate, predict and export they are merged into the model's parameters, unless the base is kept in fewer bits.
"""

import contextlib
import dataclasses
import functools
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, ClassVar

import flax.linen as nn
import flax.traverse_util
import jax
import numpy as np

from research.errors import UserError, nearest
from research.metrics import Mean
from research.models import layers
from research.task import Batch, Params, Spec, Task
from research.tasks import packed


@dataclasses.dataclass(frozen=True)
class Adapter:
    """A task around another one, whose model is frozen; what is added to it is for its kinds to say.

    Attributes:
      task: what is adapted.
      whole: regular expressions of parameters that train as they are, such as those of a new head.
      base_format: what the kernels of the base's layers are kept in: "float32", "bfloat16", "int8" (a scale for each
        output; Dettmers 2022), or, in blocks of 64 inputs, "nf4" (Dettmers 2023), "fp4" or "int4". They are rounded as
        they are read, and what is evaluated and exported is the rounded base with what trained.
      part: where the kind's own parameters are.
    """

    part: ClassVar[str]

    task: Task
    whole: tuple[str, ...] = dataclasses.field(default=(), kw_only=True)
    base_format: str = dataclasses.field(default="float32", kw_only=True)

    def __post_init__(self):
        if self.base_format not in packed.FORMATS:
            known = nearest(self.base_format, packed.FORMATS)
            raise UserError(f"config.task.base_format: there is no '{self.base_format}'{known}")

    @property
    def model(self) -> nn.Module:
        """The wrapped task's module."""
        return self.task.model

    def init(self, rng: jax.Array, spec: Spec) -> Params:
        """Return new float32 parameters, with which the model computes what it does without them."""
        base_rng, rng = jax.random.split(rng)
        params = self.task.init(base_rng, spec)
        self._check("whole", self.whole, flat(params))
        return {**self.divide(params), self.part: tree(self.new(flat(params), rng))}

    def new(self, params: Mapping[str, jax.Array], rng: jax.Array) -> dict[str, jax.Array]:
        """Return {path: new parameter}, all beside those of the wrapped task's parameters; or raise UserError."""
        raise NotImplementedError

    def add(self, params: dict[str, jax.Array], own: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
        """Return {path: the wrapped task's parameter} with the kind's own parameters applied."""
        raise NotImplementedError

    def intercept(self, call: Any, args: Any, kwargs: Any, context: nn.module.InterceptorContext) -> Any:
        """Apply the kind's own parameters in a method of one of the model's modules, see `nn.intercept_methods`."""
        raise NotImplementedError

    def divide(self, params: Mapping[str, Any]) -> dict[str, Any]:
        """Return a tree like the wrapped task's parameters as its parts "base", packed, and "whole"."""
        leaves = flat(params)
        whole = set(found(self.whole, leaves))
        base = {name: x for name, x in leaves.items() if name not in whole}
        parts = {"base": packed.pack(base, self.base_format)}
        parts["whole"] = {name: leaves[name] for name in whole}
        return {name: tree(part) for name, part in parts.items() if part}

    def join(self, params: Mapping[str, Any]) -> Params:
        """Return the parts "base" and "whole" as a tree like the wrapped task's parameters."""
        return tree({**packed.unpack(flat(params["base"]), self.base_format), **flat(params.get("whole", {}))})

    @property
    def evaluated(self) -> Task:
        """The task that evaluates and predicts with what `merge` returns."""
        return self.task if self.base_format == "float32" else Beside(self)

    def merge(self, params: Params) -> Params:
        """Return the wrapped task's parameters with the kind's own applied; with a base in fewer bits, beside them."""
        return self.plain(params) if self.base_format == "float32" else self.beside(params)

    def plain(self, params: Params) -> Params:
        """Return the wrapped task's parameters in float32 with the kind's own applied."""
        return tree(self.add(flat(self.join(params)), flat(params[self.part])))

    def beside(self, params: Params) -> Params:
        """Return the wrapped task's parameters, as they are kept, and the kind's own, for layers that apply them."""
        return tree(flat(params["base"]) | flat(params.get("whole", {})) | flat(params[self.part]))

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """Let the model's layers apply what `beside` returns."""
        unpacked = functools.partial(packed.intercept, self.base_format)
        with nn.intercept_methods(unpacked), nn.intercept_methods(self.intercept):
            yield

    def loss(self, params: Params, batch: Batch, rng: jax.Array) -> tuple[Mean, dict[str, Mean]]:
        """Return the wrapped task's loss and metrics, with the kind's own parameters applied in its layers."""
        params = {**params, "base": jax.lax.stop_gradient(params["base"])}
        return Beside(self).loss(self.beside(params), batch, rng)

    def metrics(self, params: Params, batch: Batch) -> dict[str, Mean]:
        """Return the wrapped task's metrics of the merged parameters."""
        return self.evaluated.metrics(self.merge(params), batch)

    def predict(self, params: Params, batch: Batch, rng: jax.Array) -> dict[str, jax.Array]:
        """Return the wrapped task's outputs of the merged parameters."""
        return self.evaluated.predict(self.merge(params), batch, rng)

    def describe(self, output: dict[str, np.ndarray]) -> dict[str, Any]:
        """Return one example's outputs as the wrapped task describes them."""
        return self.task.describe(output)

    def kernels(self, key: str, patterns: Sequence[str], params: Mapping[str, Any]) -> list[str]:
        """Return the paths of the kernels that the patterns of `key` find.

        Raises:
          UserError: a pattern finds nothing, or something else than kernels of linear layers that stay as they are.
        """
        self._check(key, patterns, params)
        names = found(patterns, params)
        for name in names:
            dimensions = params[name].ndim - ("layers" in name.split("/"))
            if not name.endswith("kernel") or dimensions != 2:
                raise UserError(f"config.task.{key}: {name} is no kernel of a linear layer")
            if found(self.whole, [name]):
                raise UserError(f"config.task.whole: {name} is among the {key} too")
        return names

    def _check(self, key: str, patterns: Sequence[str], params: Mapping[str, Any]) -> None:
        for pattern in patterns:
            if not found([pattern], params):
                raise UserError(f"config.task.{key}: '{pattern}' finds no parameter{nearest(pattern, params)}")


@dataclasses.dataclass(frozen=True)
class Beside:
    """The task of an adapter, for parameters with the adapter's beside them; all else is the task's.

    Attributes:
      adapter: the adapter, whose base is never unpacked whole so.
    """

    adapter: Adapter

    def __getattr__(self, name: str) -> Any:
        if name == "adapter":  # asked for while it is copied, when there is none yet
            raise AttributeError(name)
        return getattr(self.adapter.task, name)

    def init(self, rng: jax.Array, spec: Spec) -> Params:
        """Return the task's new parameters, without the adapter's."""
        return self.adapter.task.init(rng, spec)

    def loss(self, params: Params, batch: Batch, rng: jax.Array) -> tuple[Mean, dict[str, Mean]]:
        """Return the task's loss and metrics."""
        with self.adapter.applied():
            return self.adapter.task.loss(params, batch, rng)

    def metrics(self, params: Params, batch: Batch) -> dict[str, Mean]:
        """Return the task's metrics."""
        with self.adapter.applied():
            return self.adapter.task.metrics(params, batch)

    def predict(self, params: Params, batch: Batch, rng: jax.Array) -> dict[str, jax.Array]:
        """Return the task's outputs."""
        with self.adapter.applied():
            return self.adapter.task.predict(params, batch, rng)

    def describe(self, output: dict[str, np.ndarray]) -> dict[str, Any]:
        """Return one example's outputs as the task describes them."""
        return self.adapter.task.describe(output)

    def precompute(self, params: Params, batch: Batch) -> dict[str, jax.Array]:
        """Return what the task computes ahead; it is asked where there is such a thing."""
        task: Any = self.adapter.task
        with self.adapter.applied():
            return task.precompute(params, batch)


def activated(outputs: jax.Array, activate: Sequence[Any]) -> jax.Array:
    """Return the outputs of a linear layer after its activation, if it has one."""
    return layers.in_float32(activate[0])(outputs) if activate else outputs


def found(patterns: Iterable[str], names: Iterable[str]) -> list[str]:
    """Return the names in which any of the regular expressions is found."""
    return [name for name in names if any(re.search(pattern, name) for pattern in patterns)]


def flat(params: Mapping[str, Any]) -> dict[str, Any]:
    """Return a tree as {path: leaf}."""
    return flax.traverse_util.flatten_dict(dict(params), sep="/")


def tree(leaves: Mapping[str, Any]) -> dict[str, Any]:
    """Return {path: leaf} as a tree."""
    return flax.traverse_util.unflatten_dict(dict(leaves), sep="/")
