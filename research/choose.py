"""--mode=choose: which pretrained model suits a task, by the features that each has before fine-tuning."""

import contextlib
import dataclasses
import io
import json
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import flax.linen as nn
import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import rich.console
import rich.table
from matplotlib.figure import Figure
from ml_collections import ConfigDict

from research import plan, sharding, storage, train
from research.analysis import transferability
from research.analysis.transferability import Score
from research.configuration import overrides
from research.data import keys
from research.errors import UserError
from research.experiment import Experiment, task_section
from research.predict import without_augmentation
from research.reporting.figures import COLOURS, DOTS_PER_INCH
from research.reporting.record import load_config, write_json
from research.reporting.writers import Progress
from research.task import Batch, Params
from research.tasks import encoders
from research.tasks.classification import Classification

VERSION = 1  # of the cached features
RESAMPLES = 200
LEAST = 50  # examples
WIDE = 2.0  # a ratio of widths at which scores of features compare with care
FEW = 5  # candidates
ROOM = 5  # examples for each feature, below which the H-score of features without a meaning is high too
CLASSIFIERS = {
    True: "research.pretrained.huggingface.sequence_classifier",
    False: "research.pretrained.huggingface.image_classifier",
}


@dataclasses.dataclass(frozen=True)
class Candidate:
    """What is known of a model before it is fine-tuned.

    Attributes:
      name: as it was given.
      features: float32 [N, D].
      labels: [N].
      scores: see `transferability.scores`.
      cost: see `plan.needs`.
    """

    name: str
    features: np.ndarray
    labels: np.ndarray
    scores: Mapping[str, Score]
    cost: Mapping[str, Any]


def run(
    config: ConfigDict, workdir: pathlib.Path, candidates: str, examples: str = "2000", topology: str | None = None
) -> dict[str, Any]:
    """Rank pretrained models for the task of a config, write choose.json and choose.png, and return the result.

    Args:
      config: of fine-tuning: classification or regression of texts or images.
      workdir: where to write.
      candidates: separated by commas. A model in any form that `assets.resolve` takes, which takes the place of the
        config's; the folder of a run of this code; or another config file for the same data, and its variant:
        configs/NAME.py:VARIANT.
      examples: how many of the training data are looked at.
      topology: what fine-tuning is planned for, see `plan.run`; by default config.plan.topology, else what is here.

    Raises:
      UserError: a candidate cannot be read or is for other data, or the task has no ranking; the message names it.
    """
    if jax.process_count() > 1:
        raise UserError("--mode=choose runs in one process")
    names = [name.strip() for name in candidates.split(",") if name.strip()]
    if len(set(names)) < max(len(names), 2):
        raise UserError(f"--candidates: {candidates}: name two or more different ones, separated by commas")
    if not examples.isdigit() or int(examples) < LEAST:
        raise UserError(f"--examples: {examples} is not a number from {LEAST} on")
    target = plan.find_target(topology or (config.get("plan") or {}).get("topology") or jax.default_backend())
    progress = Progress(0, 0)
    found: list[Candidate] = []
    for name in names:
        with progress.phase(name), _naming(name):
            found.append(_candidate(name, config, int(examples), target))
            _check_same_data(found[0], found[-1])
    found.sort(key=lambda candidate: -candidate.scores["logme"].value)
    weights = transferability.resample(len(found[0].labels), RESAMPLES, config.get("seed", 0))
    rows = [_summary(candidate, found, weights) for candidate in found]
    result = {
        "examples": len(found[0].labels),
        "topology": target.name,
        "candidates": rows,
        "cautions": _cautions(found, weights),
    }
    write_json(workdir / "choose.json", result)
    _draw(rows, workdir / "choose.png")
    _print(result)
    return result


@contextlib.contextmanager
def _naming(candidate: str) -> Iterator[None]:
    """Put the candidate's name before what is wrong with it."""
    try:
        yield
    except UserError as error:
        raise UserError(f"--candidates: {candidate}: {error}") from None


def _candidate(name: str, config: ConfigDict, examples: int, target: plan.Target) -> Candidate:
    experiment = Experiment(without_augmentation(_config(name, config)), workdir=_run_folder(name))
    objective = _objective(experiment)
    features, labels = _features(experiment, examples)
    classes = objective != "regression"
    if classes and np.unique(labels, return_counts=True)[1].min() < transferability.FOLDS:
        raise UserError(f"a class has fewer than {transferability.FOLDS} of {len(labels)} examples; take more examples")
    scores = transferability.scores(features, labels, classes, experiment.config.get("seed", 0))
    return Candidate(name, features, labels, scores, _cost(experiment, target))


def _config(name: str, config: ConfigDict) -> ConfigDict:
    """Return the config with which a candidate is fine-tuned."""
    if name.partition(":")[0].endswith(".py"):
        return overrides.load(name)
    config = ConfigDict(json.loads(config.to_json()))
    node = task_section(config)
    text = "input_ids" in config.data.features
    kept = {key: node.model[key] for key in ("num_outputs",) if key in node.model}
    if (folder := _run_folder(name)) is not None:
        theirs = load_config(folder)
        node.model = _classifier(task_section(theirs).model, text) | kept
        config.init = {"call": "research.configuration.transfer.load_params", "path": name, "new": ["^head"]}
        config.tokenizer = theirs.get("tokenizer")
        return config
    if node.model["call"] in CLASSIFIERS.values():  # its own settings, but for what depends on the depth
        kept = {key: value for key, value in node.model.items() if key not in ("call", "path", "unroll")}
    node.model = {"call": CLASSIFIERS[text], "path": name, **kept}
    config.init = {"path": name, "new_head": True}
    if text:
        config.tokenizer = {"call": "research.data.tokenizer.load", "path": name}
    return config


def _run_folder(name: str) -> pathlib.Path | None:
    """Return the folder of the run of this code that a candidate is; None of any other."""
    if name.partition("://")[0] in ("hf", "pypi", "npm", "apt"):
        return None
    folder = storage.path(name)
    return folder if (folder / "checkpoints").is_dir() else None


def _classifier(model: ConfigDict, text: bool) -> dict[str, Any]:
    """Return the section of a classifier on the encoder of a run's model."""
    if "encoder" in model:
        encoder = model.encoder.to_dict()
        if text:
            return {"call": "research.models.bert.SequenceClassifier", "encoder": encoder}
        pooling = "token" if encoder.get("prefix_tokens", 1) else "mean"
        return {"call": "research.models.vit.ImageClassifier", "encoder": encoder, "pooling": pooling}
    if model["call"] in CLASSIFIERS.values():
        return {key: value for key, value in model.to_dict().items() if key != "num_outputs"}
    raise UserError(f"the run trained a {model['call'].rpartition('.')[2]}, which has no encoder under a head")


def _objective(experiment: Experiment) -> str:
    """Return the objective of the task, or raise UserError where features cannot be ranked for it."""
    task = experiment.plain_task
    if not isinstance(task, Classification):
        raise UserError(f"config.task: a {type(task).__name__} cannot be ranked; classification and regression can")
    if task.objective != "softmax" and experiment.spec["label"].shape[1:] not in ((), (1,)):
        raise UserError(f"config.task.objective: '{task.objective}' of several labels an example cannot be ranked")
    return task.objective


def _features(experiment: Experiment, examples: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the features [N, D] and the labels [N] of a drawn part of the training data, from the cache if there."""
    source, seed = experiment.data.source, experiment.config.get("seed", 0)
    chosen = np.random.default_rng(seed).permutation(len(source))[:examples].tolist()
    if len(chosen) < LEAST:
        raise UserError(f"config.data: {len(chosen)} examples are too few; a ranking takes {LEAST} or more")
    params = experiment.merged(train.start(experiment).params, plain=True)
    path = _cached(experiment, params, chosen)
    if path is not None and path.exists():
        with np.load(path) as stored:
            return stored["features"], stored["labels"]
    features, labels = _extract(experiment, params, [source[i] for i in chosen])
    if path is not None:
        storage.write_arrays(path, {"features": features, "labels": labels})
    return features, labels


def _cached(experiment: Experiment, params: Params, chosen: Sequence[int]) -> pathlib.Path | None:
    """Return where features are kept, under a key of weights, model, data and examples; None where these have none."""
    data = experiment.data
    flat = flax.traverse_util.flatten_dict(jax.device_get(params), sep="/")
    encoder = {name: leaf for name, leaf in flat.items() if not name.startswith("head")}
    model = str(experiment.task.model)
    read = (data.source, list(data.ops), list(data.features), list(chosen))
    return keys.cached("features", VERSION, encoder, model, *read)


def _extract(
    experiment: Experiment, params: Params, examples: Sequence[Mapping[str, Any]]
) -> tuple[np.ndarray, np.ndarray]:
    """Return the features [N, D] and the labels [N] of examples, each seen once."""
    data, mesh = experiment.data, experiment.mesh
    pooled = jax.jit(sharding.over(mesh, _pooling(experiment.task.model)))
    features, labels = [], []
    for made_from, batch in data.rows([dict(example) for example in examples]):
        # The last batch is filled up like the others, so that it divides over the devices and compiles no new shape.
        full = {name: np.resize(value, (data.batch_size, *value.shape[1:])) for name, value in batch.items()}
        features.append(jax.device_get(pooled(params, sharding.place(full, mesh)))[: len(made_from)])
        labels.append(batch["label"])
    return np.concatenate(features), np.concatenate(labels).reshape(-1)


def _pooling(model: nn.Module) -> Callable[[Params, Batch], jax.Array]:
    """Return a function of parameters and a batch to features float32 [B, D] of the encoder's last hidden states.

    They are the mean over the tokens of a text, or the patches of an image, beside the first token where there is one
    that stands for the whole.
    """

    def pooled(params: Params, batch: Batch) -> jax.Array:
        inputs = [batch.get(name) for name in encoders.inputs(model)]
        _, state = model.apply(
            {"params": params}, *inputs, capture_intermediates=lambda module, _: module.name == "encoder"
        )
        if "encoder" not in state.get("intermediates", {}):
            raise UserError(f"config.task.model: a {type(model).__name__} has no encoder, whose features are compared")
        hidden_BxTxD = state["intermediates"]["encoder"]["__call__"][0].astype(jnp.float32)
        if "attention_mask" in batch:
            real_BxTx1 = (batch["attention_mask"] > 0)[..., None].astype(jnp.float32)
            mean_BxD = (hidden_BxTxD * real_BxTx1).sum(axis=1) / jnp.maximum(real_BxTx1.sum(axis=1), 1)
            return jnp.concatenate([hidden_BxTxD[:, 0], mean_BxD], axis=-1)
        prefix = model.encoder.prefix_tokens
        mean_BxD = hidden_BxTxD[:, prefix:].mean(axis=1)
        return jnp.concatenate([hidden_BxTxD[:, 0], mean_BxD], axis=-1) if prefix else mean_BxD

    return pooled


def _cost(experiment: Experiment, target: plan.Target) -> dict[str, Any]:
    """Return what fine-tuning takes: see `plan.needs`."""
    config = ConfigDict(experiment.resolved)
    section = (config.get("plan") or ConfigDict()).to_dict()
    if experiment.tokenizer is not None:
        section["vocab_size"] = experiment.tokenizer.vocab_size
    config.plan = section
    needs = plan.needs(config, target)
    kept = ("parameters", "operations", "peak_bytes", "memory_bytes", "fits")
    return {name: needs.get(name) for name in kept} | {"num_steps": experiment.num_steps}


def _check_same_data(first: Candidate, other: Candidate) -> None:
    if not np.array_equal(first.labels, other.labels):
        raise UserError(
            f"its examples or labels are others than those of {first.name}; the data and the seed must agree"
        )


def _interval(values: np.ndarray) -> list[float]:
    return [float(x) for x in np.percentile(values, (2.5, 97.5))]


def _summary(candidate: Candidate, every: Sequence[Candidate], weights: np.ndarray) -> dict[str, Any]:
    """Return a candidate's row of choose.json."""
    scores = {}
    for name, score in candidate.scores.items():
        ours = score.resampled(weights)
        best = np.max([other.scores[name].resampled(weights) for other in every], axis=0)
        scores[name] = {
            "value": score.value,
            "interval": _interval(ours),
            "rank": 1 + sum(other.scores[name].value > score.value for other in every),
            "first_in": float((ours >= best).mean()),
        }
    return {"name": candidate.name, "width": candidate.features.shape[1], "scores": scores, "cost": candidate.cost}


def _cautions(found: Sequence[Candidate], weights: np.ndarray) -> list[str]:
    """Return why the ranking, best first by LogME, is not to be trusted, in sentences; none where nothing speaks so."""
    first, cautions = found[0], []
    score = first.scores["logme"].resampled(weights)
    near = [other.name for other in found[1:] if _interval(score - other.scores["logme"].resampled(weights))[0] <= 0]
    if near:
        cautions.append(f"By LogME the examples do not tell the first, {first.name}, from {', '.join(near)}.")
    for name in first.scores:
        best = max(found, key=lambda candidate: candidate.scores[name].value)
        if best is not first:
            cautions.append(f"By {transferability.TITLES[name]} another one is first: {best.name}.")
    widths = [candidate.features.shape[1] for candidate in found]
    if max(widths) >= WIDE * min(widths):
        cautions.append(f"The features are {min(widths)} to {max(widths)} wide: wide ones fit more of any labels.")
    if "h_score" in first.scores and len(first.labels) < ROOM * max(widths):
        cautions.append(f"{len(first.labels)} examples are few for an H-score of features {max(widths)} wide.")
    if len(found) < FEW:
        cautions.append(f"{len(found)} candidates are few: a rank correlation was measured on more.")
    return cautions


def _draw(rows: Sequence[Mapping[str, Any]], path: pathlib.Path) -> None:
    """Draw every score with its interval, a panel each, the best by LogME on top."""
    names = list(rows[0]["scores"])
    size = (1.6 + 2.3 * len(names), 1.0 + 0.3 * len(rows))
    figure = Figure(figsize=size, layout="constrained")
    panels = figure.subplots(1, len(names), sharey=True)
    for panel, name, colour in zip(np.atleast_1d(panels), names, COLOURS):
        scores = [row["scores"][name] for row in rows]
        values = np.array([score["value"] for score in scores])
        ends = np.array([score["interval"] for score in scores])
        errors = np.maximum(np.abs(ends.T - values), 0)
        panel.errorbar(values, np.arange(len(rows)), xerr=errors, fmt="o", color=colour, capsize=3, markersize=4)
        panel.set_title(transferability.TITLES[name], fontsize=9)
        panel.tick_params(labelsize=8)
        panel.locator_params(axis="x", nbins=4)
        panel.margins(x=0.1, y=0.1 + 0.5 / len(rows))
        panel.grid(alpha=0.3)
    first = np.atleast_1d(panels)[0]
    first.set_yticks(np.arange(len(rows)), [_short(row["name"]) for row in rows])
    first.invert_yaxis()
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=DOTS_PER_INCH)
    storage.write(path, buffer.getvalue())


def _short(name: str) -> str:
    """Return a name without the digest that pins it, and its end if it is still long."""
    name = name.partition("#")[0]
    return name if len(name) <= 40 else "..." + name[-37:]


def _print(result: Mapping[str, Any]) -> None:
    """Print the table, best first by LogME, and the cautions."""
    rows = result["candidates"]
    title = (
        f"{result['examples']} examples; best first by LogME; intervals of 95 %; fine-tuning on {result['topology']}"
    )
    table = rich.table.Table(title=title, title_justify="left")
    table.add_column("candidate", overflow="fold")
    for name in rows[0]["scores"]:
        table.add_column(transferability.TITLES[name], justify="right")
    for name in ("parameters", "operations", "memory"):
        table.add_column(name, justify="right")
    for row in rows:
        scores = [
            f"{s['value']:.3f} ({s['interval'][0]:.3f} to {s['interval'][1]:.3f})" for s in row["scores"].values()
        ]
        cost = row["cost"]
        peak = "unknown" if cost["peak_bytes"] is None else f"{cost['peak_bytes'] / 1e9:.2f} GB"
        total = cost["operations"] * cost["num_steps"]
        table.add_row(_short(row["name"]), *scores, f"{cost['parameters'] / 1e6:.1f} M", f"{total:.2g}", peak)
    console = rich.console.Console(width=max(rich.console.Console().width, 40 + 27 * len(rows[0]["scores"]) + 40))
    console.print(table)
    for caution in result["cautions"]:
        console.print(f"caution: {caution}", markup=False, highlight=False, soft_wrap=True)
