"""--mode=explain: why a checkpoint says what it says of an input, as a page for the browser."""

import io
import json
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from research import precompute, storage
from research.analysis.explanation import IMAGE, Explainer, Explanation
from research.data.dataset import Example
from research.data.source import examples
from research.errors import UserError
from research.evaluate import restore_params
from research.experiment import Experiment
from research.predict import check_input, read_input, without_augmentation
from research.reporting import explanations, page
from research.reporting.pictures import pixels
from research.reporting.writers import Progress
from research.task import DescribesRows, Explains, Params, Question
from research.tasks import encoders, tokens
from research.tasks.prompt_tuning import check_no_prompt

MOST = 32  # examples of a page
EXCERPT = 80  # characters of a heading
Section = tuple[str, page.Html]


def run(
    config: ConfigDict,
    workdir: pathlib.Path,
    input: str = "-",
    output: str = "",
    checkpoint: str = "",
    target: str = "",
) -> None:
    """Explain what a run's model predicts for every line of `input`: see `analysis.explanation`.

    Args:
      config: of the run.
      workdir: the run's folder.
      input: as `predict.run` reads it; 32 examples at most.
      output: the page, a file that ends in .html; the numbers go beside it, to a file of that name in .npz. "" is
        explain.html in the run's folder.
      checkpoint: "latest", "best" or a step; "" takes the best where the run keeps it.
      target: what to explain instead of the prediction: see the task's `questions`.

    Raises:
      UserError: the input cannot be read, has no example or too many, or holds nothing that could be explained.
    """
    if jax.process_count() > 1:
        raise UserError("--mode=explain runs in one process")
    file = storage.path(output) if output else workdir / "explain.html"
    if file.suffix != ".html":
        raise UserError(f"--output: {output} does not end in .html; the page goes there, its numbers beside it")
    storage.check_output(str(file))
    config = without_augmentation(config)
    rows = read_input(input, config)
    if not 0 < len(rows) <= MOST:
        raise UserError(f"--input: it holds {len(rows)} examples; a page explains from 1 to {MOST}")
    bare = [{name: value for name, value in row.items() if name != "label"} for _, row in rows]
    experiment = Experiment(config, source=examples(bare), workdir=workdir)
    check_no_prompt(experiment.plain_task, "--mode=explain")
    step, params = restore_params(experiment, workdir, checkpoint, plain=True)
    check_input(rows, bare, experiment)
    sections: list[Section] = []
    arrays: dict[str, np.ndarray] = {}
    progress = Progress(0, 0)
    for number, section in enumerate(_sections(experiment, params, rows, bare, target, progress), start=1):
        sections.append(section[0])
        arrays |= {f"{number}/{name}": value for name, value in section[1].items()}
    about = f"{workdir.name}: {type(experiment.task.model).__name__} at step {step}"
    storage.write(file, _document(about, sections).encode())
    buffer = io.BytesIO()
    np.savez_compressed(buffer, allow_pickle=False, **arrays)
    storage.write(file.with_suffix(".npz"), buffer.getvalue())
    print(file)


def _document(about: str, sections: Sequence[Section]) -> str:
    links = [page.tag("li", page.tag("a", title, href=f"#s{i}")) for i, (title, _) in enumerate(sections, start=1)]
    contents = page.tag("nav", page.tag("ol", *links), aria_label="Examples") if len(links) > 1 else None
    bodies = [
        page.tag("section", page.tag("h2", title, id=f"s{i}"), body)
        for i, (title, body) in enumerate(sections, start=1)
    ]
    return page.page(f"Explanations: {about}", explanations.legend(), contents, *bodies)


def _sections(
    experiment: Experiment,
    params: Params,
    rows: Sequence[tuple[str, Example]],
    bare: Sequence[Example],
    target: str,
    progress: Progress,
) -> Iterator[tuple[Section, dict[str, np.ndarray]]]:
    """Yield every row's part of the page, and its numbers."""
    explainer = _explainer(experiment, params)
    predict, complete = jax.jit(experiment.plain_task.predict), precompute.completing(experiment)
    key = jax.random.key(experiment.config.get("seed", 0))
    _check_task(experiment, target)
    for (place, row), example in zip(rows, bare):
        batches = [one for _, batch in experiment.data.rows([example]) for one in _apart(batch)]
        outputs = [_first(jax.device_get(predict(params, complete(batch), key))) for batch in batches]
        prediction = _described(experiment, example, outputs)
        for part, (batch, output) in enumerate(zip(batches, outputs), start=1):
            title = f"{place}{_excerpt(row)}" + (f" (part {part} of {len(batches)})" if len(batches) > 1 else "")
            try:
                asked = _questions(experiment, params, _unpadded(batch, experiment), output, target)
            except UserError as error:
                own = str(error).startswith(("--", "config."))
                raise UserError(str(error) if own else f"--input: {place}{error}") from None
            with progress.phase(title):
                found = [explainer.explain(question) for question in asked]
            yield (title, _body(experiment, row, prediction, batch, found)), _arrays(found)


def _explainer(experiment: Experiment, params: Params) -> Explainer:
    """Return what explains; a token is hidden by the mask token, or else the unknown one, or padding."""
    tokenizer = experiment.tokenizer
    if tokenizer is None:
        return Explainer(experiment.task.model, params)
    blank = next(id for id in (tokenizer.mask_id, tokenizer.unk_id, tokenizer.pad_id) if id is not None)
    return Explainer(experiment.task.model, params, blank, tokenizer.special_ids)


def _apart(batch: Mapping[str, np.ndarray]) -> Iterator[dict[str, Any]]:
    for i in range(len(batch["mask"])):
        yield {name: value[i : i + 1] for name, value in batch.items()}


def _first(outputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {name: np.asarray(value)[0] for name, value in outputs.items()}


def _unpadded(batch: dict[str, Any], experiment: Experiment) -> dict[str, Any]:
    """Return a packed row, which is much longer than its one document, without most of its padding."""
    if not experiment.data.pack or "attention_mask" not in batch:
        return batch
    whole, length = batch["attention_mask"].shape[1], int((batch["attention_mask"] != 0).sum())
    kept = min(-(-max(length, 1) // 16) * 16, whole)
    sides = {name: value for name, value in batch.items() if value.ndim > 1 and value.shape[1] == whole}
    return batch | {name: value[:, :kept] for name, value in sides.items() if not name.startswith("decoder_")}


def _described(experiment: Experiment, example: Example, outputs: Sequence[dict[str, np.ndarray]]) -> Mapping[str, Any]:
    """Return what `predict` writes for an example."""
    if isinstance(experiment.task, DescribesRows):
        return experiment.task.describe_rows(experiment.data.transform(dict(example)), outputs)
    return experiment.task.describe(outputs[0])


def _check_task(experiment: Experiment, target: str) -> None:
    """Raise UserError unless the task says what to explain, or its model is called with features of a batch alone."""
    task, kind = experiment.plain_task, type(experiment.plain_task).__name__
    if isinstance(task, Explains):
        return
    if target:
        raise UserError(f"--target: a {kind} names nothing of its outputs that could be chosen")
    if encoders.inputs(task.model)[0] not in experiment.data.features:
        raise UserError(f"config.task: a {kind} says nothing that could be explained: no class, token, box or pair")


def _questions(
    experiment: Experiment, params: Params, batch: dict[str, Any], output: dict[str, np.ndarray], target: str
) -> Sequence[Question]:
    """Return what the task asks, or else for the largest number of the model's outputs."""
    task = experiment.plain_task
    if isinstance(task, Explains):
        return task.questions(params, batch, output, target)
    inputs, kind = encoders.inputs(task.model), type(task).__name__
    outputs: Any = task.model.apply({"params": params}, *[batch.get(name) for name in inputs])
    if not isinstance(outputs, jax.Array):
        raise UserError(f"config.task.model: a {kind}'s model makes no one array of numbers, of which one is explained")
    chosen = int(outputs[0].reshape(-1).argmax())
    return [Question(f"the model's largest output, number {chosen}", batch, inputs, encoders.output, chosen)]


def _excerpt(row: Example) -> str:
    """Return how an example is called: its first text, or the path of its image; else all of it."""
    first = next((value for value in row.values() if isinstance(value, str)), None)
    text = " ".join((_plain(row) if first is None else first).split())
    return text if len(text) <= EXCERPT else text[: EXCERPT - 1] + "…"


def _body(
    experiment: Experiment,
    row: Example,
    prediction: Mapping[str, Any],
    batch: Mapping[str, np.ndarray],
    found: Sequence[Explanation],
) -> page.Html:
    namer: Callable[[int], str] = lambda id: _visible(tokens.word(experiment.tokenizer, id))  # noqa: E731
    said = [(name, value) for name, value in [*row.items(), *prediction.items()]]
    facts = [page.join([page.tag("dt", name), page.tag("dd", _plain(value))]) for name, value in said]
    model = experiment.task.model
    encoder = getattr(model, "encoder", None) or getattr(model, IMAGE, None)
    prefix = getattr(encoder, "prefix_tokens", 0)
    parts = [
        page.tag(
            "article",
            page.tag("h3", f"Explained: {one.question.title}"),
            explanations.blocks(one, namer, _picture(experiment, batch), prefix),
        )
        for one in found
    ]
    return page.join([page.tag("dl", *facts), *parts])


def _visible(token: str) -> str:
    """Return a token such that one sees it where it is white space alone."""
    return token if token.strip() else "".join({" ": "␣", "\n": "⏎", "\t": "⇥"}.get(sign, sign) for sign in token)


def _plain(value: Any) -> str:
    """Return a field of an example or of a prediction as text; numbers with four digits."""
    if isinstance(value, str):
        return value
    rounded = json.loads(json.dumps(value, default=str), parse_float=lambda text: float(f"{float(text):.4g}"))
    return json.dumps(rounded, ensure_ascii=False)


def _picture(experiment: Experiment, batch: Mapping[str, np.ndarray]) -> np.ndarray | None:
    """Return an example's image as one sees it, without padding; None where there is none."""
    if IMAGE not in batch:
        return None
    picture = pixels(np.asarray(batch[IMAGE][0], np.float32), experiment.data.ops)
    if "pixel_mask" in batch:
        mask_HxW = batch["pixel_mask"][0] != 0
        picture = picture[: max(mask_HxW.any(axis=1).sum(), 1), : max(mask_HxW.any(axis=0).sum(), 1)]
    return picture


def _arrays(found: Sequence[Explanation]) -> dict[str, np.ndarray]:
    return {f"{i}/{name}": value for i, one in enumerate(found, start=1) for name, value in one.arrays().items()}
