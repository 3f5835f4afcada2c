"""A causal language model of this project as EleutherAI's evaluation harness asks for one; needs the extra "evals".

Texts become tokens, and rows that are too long are cut, as in the harness' own Hugging Face backend (`lm_eval.models.
huggingface`), so that both say the same of the same weights. There is one difference: a token that the tokenizer puts
after every text, as [SEP] of BERT's frame, is left out, as it would part a context from what follows it.

Shape letters: B rows, T tokens of a row, N tokens of it that are scored, or new ones, D width, V vocabulary, S steps.
"""

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import normalize_gen_kwargs, postprocess_generated_text
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm

from research import sharding
from research.errors import UserError, nearest
from research.experiment import Experiment
from research.generation import decoding, sampling
from research.generation.decoding import Decoding
from research.generation.detokenizer import completion
from research.task import Batch, Params
from research.tasks import causal_lm, tokens
from research.tasks.cross_entropy import token_losses
from research.tasks.prompt_tuning import check_no_prompt

NEW_TOKENS = 256  # where a task does not say how many to generate; the harness' own default
STEPS = 16  # tokens that are generated between two looks for a stop text
LEAST = {"length": 16, "scored": 4}  # of the shapes of a batch
# What a task may say of generation: the fields of `Decoding` that are not the project's own.
SAMPLING = ("temperature", "top_k", "top_p", "min_p")
BEAMS = ("length_penalty", "early_stopping")
SETTINGS = (*SAMPLING, *BEAMS, "num_beams", "repetition_penalty")

Request = tuple[tuple[str, str] | None, list[int], list[int]]  # the texts, and the tokens of context and continuation


@dataclasses.dataclass
class Row:
    """Tokens that the model reads once.

    Attributes:
      ids: what it reads, at most as many as it has positions.
      places: of `ids`, the next token of which is scored.
      targets: those next tokens.
      parts: request -> the part of `targets` that is its continuation; several where they go on from the same tokens,
        as choices of one token do.
    """

    ids: tuple[int, ...]
    places: list[int] = dataclasses.field(default_factory=list)
    targets: list[int] = dataclasses.field(default_factory=list)
    parts: dict[int, slice] = dataclasses.field(default_factory=dict)

    def add(self, request: int, continuation: Sequence[int]) -> None:
        """Score one more continuation, whose last token comes after all of `ids`."""
        begin = len(self.targets)
        self.places += range(len(self.ids) - len(continuation), len(self.ids))
        self.targets += continuation
        self.parts[request] = slice(begin, len(self.targets))


class CausalModel(TemplateLM):
    """A decoder with its parameters, over the mesh of its experiment; see `lm_eval.api.model.LM`.

    Attributes:
      max_length: the positions that the model has, or was trained with.
    """

    def __init__(self, experiment: Experiment, params: Params):
        """Raise UserError unless the experiment has a decoder, and a tokenizer that ends texts."""
        super().__init__()
        self._task, self._tokenizer, self._mesh = experiment.plain_task, experiment.tokenizer, experiment.mesh
        self._model = self._task.model
        if hasattr(self._model, "encode") or not hasattr(self._model, "max_positions"):
            raise UserError(f"--harness: {type(self._model).__name__} is no causal language model, which it is for")
        check_no_prompt(self._task, "--harness")
        if self._tokenizer.eos_id is None:
            raise UserError("--harness: config.tokenizer has no token that ends a text")
        self.max_length = int(self._model.max_positions)
        framed = self._tokenizer.backend.encode("a")
        self._frame = framed.ids[: framed.special_tokens_mask.index(0)]  # what begins every text
        self._params, self._unstacked = params, decoding.unstack(params)
        self._key = jax.random.key(experiment.config.get("seed", 0))
        self._batch_size, self._ways = experiment.config.batch_size, self._mesh.shape["data"] * self._mesh.shape["fsdp"]
        self._score = jax.jit(sharding.over(self._mesh, self._token_scores))
        self._programs: dict[Decoding, tuple[Callable, Callable]] = {}

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text."""
        return self._tokenizer.eos_id

    @property
    def prefix_token_id(self) -> int:
        """The token that stands before a text without context."""
        return self.eot_token_id if self._tokenizer.bos_id is None else self._tokenizer.bos_id

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Return a text's tokens, after what the tokenizer begins every text with, unless the text does so itself."""
        if add_special_tokens is None:
            begins = self._tokenizer.decode([self.prefix_token_id], skip_special=False)
            add_special_tokens = not string.startswith(begins)
        ids = self._tokenizer.backend.encode(string, add_special_tokens=False).ids
        return [*self._frame, *ids] if add_special_tokens else ids

    # --- likelihoods ------------------------------------------------------------------------------

    def loglikelihood_rolling(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[float]:
        """Return the log-likelihood of whole texts, in nats, read in windows of as many tokens as there are positions.

        Each token is scored once; windows after the first share a token with the one before, but for the last, which is
        as long as the others.
        """
        windows: list[Request] = []
        owners: list[int] = []
        for owner, instance in enumerate(requests):
            (text,) = instance.args
            parts = get_rolling_token_windows(self.tok_encode(text), self.prefix_token_id, self.max_length, 1)
            windows += [(None, *make_disjoint_window(part)) for part in parts]
            owners += [owner] * (len(windows) - len(owners))
        totals = [0.0] * len(requests)
        for owner, (likelihood, _) in zip(owners, self._loglikelihood_tokens(windows, disable_tqdm=disable_tqdm)):
            totals[owner] += likelihood
        return totals

    def _loglikelihood_tokens(
        self, requests: Sequence[Request], disable_tqdm: bool = False, **_: Any
    ) -> list[tuple[float, bool]]:
        """Return of each continuation its log-likelihood, in nats, and whether each token of it is the likeliest."""
        answers: dict[int, tuple[float, bool]] = {}
        with tqdm(total=len(requests), desc="scoring", disable=disable_tqdm) as bar:
            for rows, batch in self._batches(self._rows(requests)):
                placed = sharding.place(batch, self._mesh)
                scores_BxN, greedy_BxN = jax.device_get(self._score(self._params, placed))
                for row, scores_N, greedy_N in zip(rows, scores_BxN, greedy_BxN):
                    for request, part in row.parts.items():
                        answers[request] = float(scores_N[part].sum()), bool(greedy_N[part].all())
                        bar.update()
        return [answers[request] for request in range(len(requests))]

    def _rows(self, requests: Sequence[Request]) -> list[Row]:
        """Return what the model is to read, each once; long rows lose their first tokens."""
        rows: dict[tuple[int, ...], Row] = {}
        for number, (_, context, continuation) in enumerate(requests):
            if len(continuation) > self.max_length:
                raise UserError(
                    f"--harness: a continuation has {len(continuation)} tokens, the model {self.max_length} positions"
                )
            ids = tuple([*context, *continuation][-(self.max_length + 1) :][:-1])
            rows.setdefault(ids, Row(ids)).add(number, continuation)
        return list(rows.values())

    def _batches(self, rows: Sequence[Row]) -> Iterator[tuple[Sequence[Row], dict[str, np.ndarray]]]:
        """Yield rows and their batch, the longest first: what does not fit is known at once."""
        size, pad_id = self._size(len(rows)), self._tokenizer.pad_id

        def shape(row: Row) -> tuple[int, int]:
            length = min(bucket(len(row.ids), LEAST["length"]), self.max_length)
            return length, bucket(len(row.targets), LEAST["scored"])

        for length, group in itertools.groupby(sorted(rows, key=shape, reverse=True), key=lambda row: shape(row)[0]):
            for part in chunks(list(group), size):
                scored = max(shape(row)[1] for row in part)
                batch = {name: np.zeros((size, length), np.int32) for name in ("input_ids", "attention_mask")}
                batch |= {name: np.zeros((size, scored), np.int32) for name in ("places", "targets")}
                batch["input_ids"][:] = pad_id
                for i in range(size):
                    row = part[i % len(part)]  # one shape, that divides over the devices
                    batch["input_ids"][i, : len(row.ids)], batch["attention_mask"][i, : len(row.ids)] = row.ids, 1
                    batch["places"][i, : len(row.places)] = row.places
                    batch["targets"][i, : len(row.targets)] = row.targets
                yield part, batch

    def _token_scores(self, params: Params, batch: Batch) -> tuple[jax.Array, jax.Array]:
        """Return the log-likelihoods float32 [B, N] of the targets, and whether they are the likeliest, bool [B, N]."""
        hidden_BxTxD = tokens.hidden(self._model, params, batch, causal_lm.INPUTS, {})
        hidden_BxNxD = jnp.take_along_axis(hidden_BxTxD, batch["places"][..., None], axis=1)
        block = tokens.block(self._model, params, hidden_BxNxD, getattr(self._task, "logits_chunk", None))

        def score(part: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
            hidden_BxD, targets_B = part
            logits_BxV = tokens.logits(self._model, params, hidden_BxD)
            return -token_losses(logits_BxV, targets_B)[0], logits_BxV.argmax(axis=-1) == targets_B

        parts = jnp.swapaxes(hidden_BxNxD, 0, 1), batch["targets"].T
        scores_NxB, greedy_NxB = jax.lax.map(score, parts, batch_size=block)
        return scores_NxB.T, greedy_NxB.T

    # --- texts ------------------------------------------------------------------------------------

    def generate_until(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[str]:
        """Return what follows each context, to the end of the text, the first stop text, or the most new tokens."""
        groups: dict[tuple[Decoding, tuple[str, ...]], list[int]] = {}
        for number, instance in enumerate(requests):
            groups.setdefault(settings_of(instance.args[1]), []).append(number)
        contexts = {n: self._context(requests[n].args[0], key[0]) for key, group in groups.items() for n in group}
        texts: dict[int, str] = {}
        with tqdm(total=len(requests), desc="generating", disable=disable_tqdm) as bar:
            for (settings, stop), group in groups.items():
                group.sort(key=lambda number: -len(contexts[number]))
                size = self._size(len(group))
                for part in chunks(group, size):
                    full = [part[i % len(part)] for i in range(size)]
                    batch = decoding.pad([contexts[number] for number in full], self._tokenizer.pad_id)
                    made_BxN = self._generate(batch, np.array(full, np.int32), settings, stop)
                    for number, made_N in zip(part, made_BxN):
                        texts[number] = self._text(made_N, stop)
                        bar.update()
        return [texts[number] for number in range(len(requests))]

    def _context(self, text: str, settings: Decoding) -> list[int]:
        """Return the tokens of a context; a long one loses its first, so that there are positions for the new ones."""
        room = self.max_length - settings.max_new_tokens
        if room < 1:
            raise UserError(
                f"--harness: a task generates up to {settings.max_new_tokens} tokens (max_gen_toks), and the model has "
                f"{self.max_length} positions, for them and what they follow"
            )
        return self.tok_encode(text)[-room:] or [self.prefix_token_id]

    def _generate(
        self, batch: dict[str, np.ndarray], rows_B: np.ndarray, settings: Decoding, stop: Sequence[str]
    ) -> np.ndarray:
        """Return new tokens int32 [B, N]; fewer where all rows have ended, or hold a stop text."""
        if settings not in self._programs:
            self._programs[settings] = self._compile(settings)
        begin, go_on = self._programs[settings]
        placed = sharding.place({**batch, "row": rows_B}, self._mesh)
        rows = placed.pop("row")
        if settings.num_beams > 1:
            return jax.device_get(begin(self._unstacked, placed, rows))
        token_B, carry = begin(self._unstacked, placed, rows)
        made = [np.asarray(token_B)[:, None]]
        while (count := sum(part.shape[1] for part in made)) < settings.max_new_tokens:
            if all(self._ended(tokens_N, stop) for tokens_N in np.concatenate(made, axis=1)):
                break
            token_B, carry, tokens_BxS = go_on(self._unstacked, token_B, carry)
            made.append(np.asarray(tokens_BxS)[:, : settings.max_new_tokens - count])
        return np.concatenate(made, axis=1)

    def _compile(self, settings: Decoding) -> tuple[Callable, Callable]:
        """Return the programs of the first tokens and of `STEPS` more; with beams the first returns all of them."""
        if settings.num_beams > 1:

            def whole(params: Params, batch: Batch, rows_B: jax.Array) -> jax.Array:
                return sampling.generate(self._model, params, batch, settings, self._tokenizer, self._key, rows_B)

            return jax.jit(whole), jax.jit(whole)
        blocks = -(-(settings.max_new_tokens - 1) // STEPS)
        room = dataclasses.replace(settings, max_new_tokens=1 + blocks * STEPS)  # of the cache: whole blocks
        sampler = sampling.Sampler(self._model, room, *decoding.token_ids(self._tokenizer))

        def begin(params: Params, batch: Batch, rows_B: jax.Array) -> tuple[jax.Array, dict[str, Any]]:
            return sampler.start(params, batch, sampling.row_keys(self._key, rows_B))

        def go_on(params: Params, token_B: jax.Array, carry: dict[str, Any]) -> tuple[jax.Array, Any, jax.Array]:
            def step(state: tuple[jax.Array, Any], _: None) -> tuple[tuple[jax.Array, Any], jax.Array]:
                state = sampler.step(params, *state)
                return state, state[0]

            (token_B, carry), tokens_SxB = jax.lax.scan(step, (token_B, carry), length=STEPS)
            return token_B, carry, tokens_SxB.T

        return jax.jit(begin), jax.jit(go_on, donate_argnums=2)

    def _ended(self, tokens_N: np.ndarray, stop: Sequence[str]) -> bool:
        if np.isin(tokens_N, self._tokenizer.end_ids).any():
            return True
        text = self._tokenizer.decode(tokens_N) if stop else ""
        return any(word in text for word in stop)

    def _text(self, tokens_N: np.ndarray, stop: Sequence[str]) -> str:
        return postprocess_generated_text(completion(self._tokenizer, tokens_N), list(stop), None)

    def _size(self, count: int) -> int:
        """Return the rows of a batch of at most `count`: the config's batch size, in whole rows of every device."""
        return -(-min(self._batch_size, max(count, 1)) // self._ways) * self._ways


def settings_of(given: Mapping[str, Any]) -> tuple[Decoding, tuple[str, ...]]:
    """Return how to generate, and the stop texts, for a task's `generation_kwargs`.

    What has no effect is left out, as sampling's settings where the likeliest token is taken.

    Raises:
      UserError: one of them is not known here, or has no such value.
    """
    named = dict(normalize_gen_kwargs(dict(given), NEW_TOKENS))
    stop = tuple(dict.fromkeys(str(text) for text in named.pop("until") if text))
    count, sample = named.pop("max_gen_toks"), named.pop("do_sample")
    for name in named:
        if name not in SETTINGS:
            raise UserError(
                f"--harness: a task generates with '{name}', which is not known here{nearest(name, SETTINGS)}"
            )
    named["temperature"] = float(named.get("temperature", 1.0)) if sample else 0.0
    idle = [*(SAMPLING if not named["temperature"] else ()), *(BEAMS if named.get("num_beams", 1) == 1 else ())]
    kept = {name: value for name, value in named.items() if name not in idle}
    try:
        return Decoding(max_new_tokens=count, **kept), stop
    except (UserError, TypeError) as error:
        raise UserError(f"--harness: a task's generation_kwargs: {error}") from None


def bucket(count: int, least: int) -> int:
    """Return the smallest of `least` times 1, 1.5, 2, 3, 4, 6, 8, ... that is not below `count`."""
    size = least
    while size < count:
        if size * 3 // 2 >= count:
            return size * 3 // 2
        size *= 2
    return size


def chunks(items: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    """Yield `size` items at a time; the last may be fewer."""
    for start in range(0, len(items), size):
        yield items[start : start + size]
