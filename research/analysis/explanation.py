"""All that is computed to explain one number of a model's outputs: attributions, attention, the residual stream.

Shape letters: L layers, H heads, T and S tokens, patches or queries, P parts of the number, D width.
"""

import dataclasses
import functools
from collections.abc import Callable, Collection, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from research.analysis import attention_flow, attribution, inspection
from research.errors import UserError
from research.task import Batch, Params, Question

BEST = 5  # tokens that the logit lens names
SQUARES = 12  # along the longer side of an image that is not cut into patches
IMAGE, QUERIES = "image", "queries"
PIXELS, LENGTH = 2**20, 4096  # what variants that are computed at once hold together, of an image's or a text's


@dataclasses.dataclass(frozen=True)
class Explanation:
    """What was found; attributions of tokens are [T], without padding, those of images [height, width].

    Attributes:
      question: what was asked.
      output: the number that is explained.
      outputs: float64 [P]: its parts.
      baseline: the number where every token is the blank one, and every image grey.
      points: on the path of integrated gradients.
      square: the side in pixels of the squares of an image that are hidden in turn: a patch's where there are patches.
      ids: {feature: int [T]}: the tokens of each text.
      attributions: {method: {feature: float64}}, by "gradient_x_input", "integrated_gradients" and "occlusion".
      parts: {feature: float64 [P, T]}: gradient x input of every part; empty where there is but one.
      attention: {path: float32 [L, H, T, S]} between tokens, and [L, H, S] from the question's position to an image.
      rollout: {path: float64 [S]}: the attention rollout of the question's position after the last layer.
      norms: {path: float64 [L + 1, T]}: lengths of the residual stream's vectors, before the first block, after each.
      lens_ids: int [L + 1, T, 5], the tokens that the logit lens reads, likeliest first; None where it does not apply.
      lens_log: float64, their log-likelihoods.
    """

    question: Question
    output: float
    outputs: np.ndarray
    baseline: float
    points: int
    square: int
    ids: Mapping[str, np.ndarray]
    attributions: Mapping[str, Mapping[str, np.ndarray]]
    parts: Mapping[str, np.ndarray]
    attention: Mapping[str, np.ndarray]
    rollout: Mapping[str, np.ndarray]
    norms: Mapping[str, np.ndarray]
    lens_ids: np.ndarray | None
    lens_log: np.ndarray | None

    def arrays(self) -> dict[str, np.ndarray]:
        """Return all numbers by names that say what they are: "attention/encoder/layers/attention"."""
        named: dict[str, Any] = {"output": np.array(self.output), "outputs": self.outputs}
        named["baseline_output"] = np.array(self.baseline)
        for method, features in self.attributions.items():
            named |= {f"{method}/{feature}": values for feature, values in features.items()}
        groups = {"ids": self.ids, "gradient_x_input_of_parts": self.parts, "attention": self.attention}
        groups |= {"attention_rollout": self.rollout, "residual_norms": self.norms}
        named |= {f"{group}/{name}": value for group, values in groups.items() for name, value in values.items()}
        if self.lens_ids is not None and self.lens_log is not None:
            named |= {"logit_lens/tokens": self.lens_ids, "logit_lens/log_likelihoods": self.lens_log}
        return named


class Explainer:
    """Explains questions about one model; programs are compiled once for each shape and kind of question."""

    def __init__(self, model: nn.Module, params: Params, blank: int = 0, kept: Collection[int] = ()):
        """Initialise.

        Args:
          model: the module.
          params: of the model.
          blank: the token that hides others.
          kept: tokens that are not hidden, such as those that begin and end a text.
        """
        self.model, self.params, self.blank, self.kept = model, params, blank, sorted(kept)
        jit = functools.partial(jax.jit, static_argnums=0)
        self._score, self._words = jit(self._traced_score), jit(self._traced_words)
        self._gradients, self._variants = jit(self._traced_gradients), jit(self._traced_variants)
        self._inside, self._lens = jit(self._traced_inside), jit(self._traced_lens)

    def explain(self, question: Question) -> Explanation:
        """Return all that can be found; raise UserError where nothing of the input can be attributed to."""
        question = dataclasses.replace(question, batch={n: jnp.asarray(x) for n, x in question.batch.items()})
        real = {name: real_tokens(question.batch, name) for name in question.batch if name.endswith("input_ids")}
        x, baseline = self._ends(question)
        outputs = np.asarray(self._score(*self._asked(question), x), np.float64)[0]
        start = float(np.asarray(self._score(*self._asked(question), baseline), np.float64).sum())
        attributions, points = self._attributions(question, x, baseline, float(outputs.sum()) - start)
        attributions["occlusion"] = self._occlusion(question, x)
        parts = self._parts(question, x) if len(outputs) > 1 else {}
        attention, streams = jax.device_get(self._inside(*self._asked(question)))
        ids, log = self._read_lens(question, streams)
        return Explanation(
            question=question,
            output=float(outputs.sum()),
            outputs=outputs,
            baseline=start,
            points=points,
            square=self._square(question.batch),
            ids={name: np.asarray(question.batch[name])[0][real[name]] for name in x if name in real},
            attributions={
                method: {name: value[real[name]] if name in real else value for name, value in features.items()}
                for method, features in attributions.items()
            },
            parts={name: value[:, real[name]] for name, value in parts.items() if name in real},
            attention=_shown_attention(question, attention, real),
            rollout=_rollout(question, attention, real),
            norms={path: _norms(question, path, stream, real) for path, stream in streams.items()},
            lens_ids=ids,
            lens_log=log,
        )

    def _asked(self, question: Question) -> tuple[Any, ...]:
        """Return what the programs are called with first: what they are compiled for, and the operands."""
        static = (question.score, question.inputs, question.vocabulary)
        return static, self.params, question.batch, question.choice

    def _ends(self, question: Question) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
        """Return what is attributed to, [1, ...] each, and the baseline: embeddings of tokens, pixels of images."""
        found = self._words(*self._asked(question))
        x = {name: found[name] for name in question.inputs if name in found}
        hidden = {name: self._blanked(question.batch, name) for name in x}
        static, params, batch, choice = self._asked(question)
        baseline = dict(self._words(static, params, {**batch, **hidden}, choice))
        if IMAGE in question.inputs and IMAGE in question.batch:
            x[IMAGE] = question.batch[IMAGE].astype(jnp.float32)
            baseline[IMAGE] = jnp.zeros_like(x[IMAGE])
        if not x:
            kind = type(self.model).__name__
            raise UserError(f"config.task.model: a {kind} reads no image, and looks its tokens up in no table of words")
        return x, baseline

    def _blanked(self, batch: Batch, name: str) -> jax.Array:
        """Return a feature's tokens with the blank one at all places but those that are kept."""
        return jnp.where(jnp.asarray(self._hideable(batch, name))[None], self.blank, batch[name])

    def _hideable(self, batch: Batch, name: str) -> np.ndarray:
        """Return which tokens may be hidden, bool [T]; all real ones of a text that is special tokens alone."""
        real_T = real_tokens(batch, name)
        chosen_T = real_T & ~np.isin(np.asarray(batch[name])[0], self.kept)
        return chosen_T if chosen_T.any() else real_T

    def _attributions(
        self, question: Question, x: Batch, baseline: Batch, difference: float
    ) -> tuple[dict[str, dict[str, np.ndarray]], int]:
        """Return those of gradient x input and integrated gradients, summed over widths and channels."""
        ends = [{name: np.asarray(value[0], np.float64) for name, value in end.items()} for end in (x, baseline)]
        ones = np.ones(max(len(question.parts), 1), np.float32)

        def gradients(points: Mapping[str, np.ndarray]) -> Mapping[str, np.ndarray]:
            return jax.device_get(self._gradients(*self._asked(question), points, ones))

        here = {name: value[0] for name, value in gradients(_repeated(x)).items()}
        product = attribution.gradient_x_input(here, ends[0])
        integrated, points = attribution.integrated_gradients(gradients, ends[0], ends[1], difference)
        found = {"gradient_x_input": product, "integrated_gradients": integrated}
        summed = {
            method: {name: value.sum(axis=-1) for name, value in features.items()} for method, features in found.items()
        }
        return summed, points

    def _parts(self, question: Question, x: Batch) -> dict[str, np.ndarray]:
        """Return {feature: [P, T]}: gradient x input of each part of the number."""
        one, rows = {name: value[:1] for name, value in x.items()}, []
        for weights_P in np.eye(len(question.parts), dtype=np.float32):
            found = jax.device_get(self._gradients(*self._asked(question), one, weights_P))
            rows.append({name: (found[name][0] * np.asarray(value[0])).sum(axis=-1) for name, value in x.items()})
        return {name: np.stack([row[name] for row in rows]).astype(np.float64) for name in x}

    def _occlusion(self, question: Question, x: Batch) -> dict[str, np.ndarray]:
        """Return by how much the number falls where a token is the blank one, or a square of an image is grey."""
        found = {}
        for name in x:
            whole = np.asarray(question.batch[name])[0]

            def score(variants: np.ndarray, name: str = name) -> np.ndarray:
                return np.asarray(self._variants(*self._asked(question), {name: jnp.asarray(variants)}))

            if name == IMAGE:
                places: list[Any] = list(attribution.windows(whole.shape[:2], self._square(question.batch)))
            else:
                places = np.flatnonzero(self._hideable(question.batch, name)).tolist()
            values = np.zeros(whole.shape[:2] if name == IMAGE else whole.shape, np.float64)
            variants = np.repeat(whole[None], len(places), axis=0)
            for variant, place in zip(variants, places):
                variant[place] = 0 if name == IMAGE else self.blank
            for place, fall in zip(places, attribution.occlusion(score, whole, variants)):
                values[place] = fall
            found[name] = values
        return found

    def _square(self, batch: Batch) -> int:
        """Return the side of the squares that are hidden; 0 where there is no image."""
        if IMAGE not in batch:
            return 0
        encoder = getattr(self.model, "encoder", None) or getattr(self.model, "image", None)
        return getattr(encoder, "patch_size", None) or -(-max(batch[IMAGE].shape[1:3]) // SQUARES)

    def _read_lens(self, question: Question, streams: Mapping[str, Any]) -> tuple[Any, Any]:
        if question.vocabulary is None or question.vocabulary not in streams:
            return None, None
        stream = streams[question.vocabulary]
        ids, log = jax.device_get(self._lens(*self._asked(question), stream))
        real_T = real_tokens(question.batch, sides(question, question.vocabulary)[0])
        return ids[:, 0, real_T], log[:, 0, real_T].astype(np.float64)

    def _traced_score(self, static: Any, params: Params, batch: Batch, choice: Any, x: Batch) -> jax.Array:
        embedded = {name: value for name, value in x.items() if name != IMAGE}
        batch = {**batch, **{name: x[name] for name in x if name == IMAGE}}
        return inspection.scores(self.model, params, _question(static, batch, choice), batch, embedded)

    def _traced_words(self, static: Any, params: Params, batch: Batch, choice: Any) -> dict[str, jax.Array]:
        return inspection.words(self.model, params, _question(static, batch, choice), batch)

    def _traced_gradients(
        self, static: Any, params: Params, batch: Batch, choice: Any, points: Batch, weights_P: jax.Array
    ) -> dict[str, jax.Array]:
        def total(x: Batch) -> jax.Array:  # examples do not see each other, so that its gradient is that of each
            scores_NxP = self._traced_score(static, params, _for_each(batch, x), choice, x)
            return (scores_NxP * weights_P).sum()

        return _in_parts(jax.grad(total), points)

    def _traced_variants(self, static: Any, params: Params, batch: Batch, choice: Any, variants: Batch) -> jax.Array:
        def numbers(changed: Batch) -> jax.Array:
            many = {**_for_each(batch, changed), **changed}
            return inspection.scores(self.model, params, _question(static, many, choice), many, {}).sum(axis=-1)

        return _in_parts(numbers, variants)

    def _traced_inside(self, static: Any, params: Params, batch: Batch, choice: Any) -> Any:
        return inspection.look_inside(self.model, params, _question(static, batch, choice), batch)

    def _traced_lens(self, static: Any, params: Params, batch: Batch, choice: Any, stream: jax.Array) -> Any:
        return inspection.lens(self.model, params, _question(static, batch, choice), batch, stream, BEST)


def _question(static: Any, batch: Batch, choice: Any) -> Question:
    score, inputs, vocabulary = static
    return Question("", batch, inputs, score, choice, vocabulary=vocabulary)


def _repeated(x: Batch) -> dict[str, np.ndarray]:
    """Return what integrated gradients are computed with: as many points as there, so that one program serves both."""
    return {name: np.repeat(np.asarray(value), attribution.NODES, axis=0) for name, value in x.items()}


def _for_each(batch: Batch, variants: Batch) -> dict[str, jax.Array]:
    """Return the features of an example, [1, ...], for each of [N, ...] variants."""
    count = len(next(iter(variants.values())))
    return {name: jnp.broadcast_to(value, (count, *value.shape[1:])) for name, value in batch.items()}


def _in_parts(function: Callable[[Batch], Any], variants: Batch) -> Any:
    """Apply a function of variants [N, ...] to as many at once as fit into memory, by their pixels and tokens."""
    count = most = len(next(iter(variants.values())))
    for name, value in variants.items():
        size = value.shape[1] * value.shape[2] if name == IMAGE else value.shape[1]
        while most > 1 and most * size > (PIXELS if name == IMAGE else LENGTH):
            most //= 2
    if most == count:
        return function(variants)
    parts = {name: value.reshape(count // most, most, *value.shape[1:]) for name, value in variants.items()}
    return jax.tree.map(lambda x: x.reshape(count, *x.shape[2:]), jax.lax.map(function, parts))


def real_tokens(batch: Batch, name: str) -> np.ndarray:
    """Return which tokens of a feature are no padding, bool [T]."""
    mask = batch.get(name.replace("input_ids", "attention_mask"))
    return np.ones(batch[name].shape[1], bool) if mask is None else np.asarray(mask)[0] != 0


def sides(question: Question, path: str) -> tuple[str, str]:
    """Return whose tokens the rows and the columns of attention weights at a path are: a feature, or "queries"."""
    texts = [name for name in question.inputs if name.endswith("input_ids") and name in question.batch]
    source = IMAGE if path.startswith("image") or not texts else texts[0]
    rows = source
    if path.startswith("decoder"):
        rows = "decoder_input_ids" if "decoder_input_ids" in texts else QUERIES if source == IMAGE else source
    return rows, source if path.endswith("cross_attention") else rows


def _position(question: Question, path: str, attention: Mapping[str, Any]) -> int | None:
    """Return the question's position where it is one of the stack at a path: of the decoder's where there is one."""
    decoded = any(name.startswith("decoder") for name in attention)
    return question.position if path.startswith("decoder") or not decoded else None


def _shown_attention(
    question: Question, attention: Mapping[str, np.ndarray], real: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """Return the weights between real tokens, and of images' places those that the question's position gives."""
    shown = {}
    for path, weights in attention.items():
        rows, columns = sides(question, path)
        weights_LxHxTxS = weights[:, 0]
        if columns == IMAGE:
            position = _position(question, path, attention)
            shown[path] = weights_LxHxTxS.mean(axis=2) if position is None else weights_LxHxTxS[:, :, position]
            continue
        if rows in real:
            weights_LxHxTxS = weights_LxHxTxS[:, :, real[rows]]
        shown[path] = weights_LxHxTxS[..., real[columns]] if columns in real else weights_LxHxTxS
    return shown


def _rollout(
    question: Question, attention: Mapping[str, np.ndarray], real: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """Return the rollout of stacks whose tokens attend to each other and are those of an input."""
    found = {}
    decoded = any(name.startswith("decoder") for name in attention)
    for path, weights in attention.items():
        rows, columns = sides(question, path)
        if rows != columns or rows == QUERIES or (rows == IMAGE and decoded) or weights.shape[-1] != weights.shape[-2]:
            continue
        rolled_TxT = attention_flow.rollout(weights[:, 0])[-1]
        row = attention_flow.row(rolled_TxT, _position(question, path, attention), real.get(rows))
        found[path] = row[real[rows]] if rows in real else row
    return found


def _norms(question: Question, path: str, stream: np.ndarray, real: Mapping[str, np.ndarray]) -> np.ndarray:
    norms_LxT = np.linalg.norm(stream[:, 0].astype(np.float64), axis=-1)
    rows, _ = sides(question, path + "/attention")
    return norms_LxT[:, real[rows]] if rows in real else norms_LxT
