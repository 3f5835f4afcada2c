"""JSON lines, or images, in; JSON lines with predictions out."""

import codecs
import inspect
import itertools
import json
import pathlib
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from research import precompute, sharding, storage
from research.build import locate
from research.data import image, image_files, prepared
from research.data.dataset import Example
from research.data.source import examples
from research.errors import UserError
from research.evaluate import restore_params
from research.experiment import Experiment
from research.task import DescribesRows, Params


def run(config: ConfigDict, workdir: pathlib.Path, input: str = "-", output: str = "-", checkpoint: str = "") -> None:
    """Predict for every line of `input`.

    Args:
      config: of the run.
      workdir: the run's folder.
      input: a file of JSON objects, a line each, with the fields that the config's data have; "-" is stdin. A "label"
        is not needed, and not looked at. Where the data are images, the field of the image is a path; and the input
        may be an image itself, or a folder whose images, at any depth, are taken in the order of their names.
      output: where each object goes with the prediction added, in the same order; "-" is stdout. What the prediction
        adds takes the place of fields of the same name.
      checkpoint: "latest", "best" or a step; "" takes the best where the run keeps it.
    """
    if jax.process_count() > 1:
        raise UserError("--mode=predict runs in one process")
    storage.check_output(output)
    config = without_augmentation(config)
    rows = read_input(input, config)
    bare = [{name: value for name, value in row.items() if name != "label"} for _, row in rows]
    experiment = Experiment(config, source=examples(bare), workdir=workdir)
    _, params = restore_params(experiment, workdir, checkpoint)
    if rows:
        check_input(rows, bare, experiment)
    with storage.text_output(output) as file:
        for (_, row), described in zip(rows, _predictions(experiment, params, bare)):
            file.write(json.dumps(row | described, ensure_ascii=False) + "\n")
        file.flush()


def without_augmentation(config: ConfigDict) -> ConfigDict:
    """Return the config, as plain values; where its training data draw at random, with the ops of an evaluator's."""
    config = ConfigDict(json.loads(config.to_json()))
    every = [config.data, *(node.data for node in (config.get("evals") or {}).values() if node and "data" in node)]
    settled = [node.ops for node in every if "ops" in node and not any(_draws(op) for op in node.ops)]
    if settled and "ops" in config.data:
        config.data.ops = settled[0]
    return config


def _draws(op: ConfigDict) -> bool:
    """Return whether what an op makes of an example is random."""
    target = locate(op.get("call"), "config.data.ops")
    return prepared.draws(target.__call__ if inspect.isclass(target) else target)


def _predictions(experiment: Experiment, params: Params, bare: Sequence[Example]) -> Iterator[dict[str, Any]]:
    """Yield what the task says of each example, given the outputs of all rows that were made of it."""
    task, data = experiment.task, experiment.data
    for number, made in itertools.groupby(_outputs(experiment, params, bare), key=lambda pair: pair[0]):
        outputs = [output for _, output in made]
        if isinstance(task, DescribesRows):
            yield task.describe_rows(data.transform(bare[number]), outputs)
        else:
            yield task.describe(outputs[0])


def _outputs(
    experiment: Experiment, params: Params, bare: Sequence[Example]
) -> Iterator[tuple[int, dict[str, np.ndarray]]]:
    """Yield the outputs of every row, with the index of the example that it was made of."""
    data, mesh = experiment.data, experiment.mesh
    predict = jax.jit(sharding.over(mesh, experiment.task.predict))
    complete = precompute.completing(experiment)
    key = jax.random.key(experiment.config.get("seed", 0))
    for place, (made_from, batch) in enumerate(data.rows(bare)):
        # The last batch is filled up like the others, so that it divides over the devices and compiles no new shape.
        full = {name: np.resize(value, (data.batch_size, *value.shape[1:])) for name, value in batch.items()}
        placed, drawn = complete(sharding.place(full, mesh)), jax.random.fold_in(key, place)
        outputs = jax.device_get(predict(params, placed, drawn))
        for i, number in enumerate(made_from):
            yield number, {name: value[i] for name, value in outputs.items()}


def check_input(rows: Sequence[tuple[str, Example]], bare: Sequence[Example], experiment: Experiment) -> None:
    """Raise UserError naming the first line that cannot be predicted for, before anything is written."""
    for (place, _), example in zip(rows, bare):
        try:
            made = len(experiment.data.transform(example))
        except UserError as error:
            raise UserError(f"--input: {place}{error}") from None
        if made == 0 or (made > 1 and not isinstance(experiment.task, DescribesRows)):
            raise UserError(f"--input: {place}config.data.ops make {made} rows of it; predictions are for one")


def read_input(path: str, config: ConfigDict) -> list[tuple[str, Example]]:
    """Return what is to be predicted for: objects of JSON lines, or images; each with how messages begin."""
    field = _image_field(config)
    if path != "-" and storage.path(path).is_dir():
        if field is None:
            raise UserError(f"--input: {path} is a folder; this run takes a file of JSON lines")
        found, _ = image_files.find(storage.path(path))
        if not found:
            raise UserError(f"--input: {path} holds no image, a file that ends in {', '.join(image_files.SUFFIXES)}")
        return [("", {field: str(file)}) for file in found]
    if path != "-" and not storage.path(path).is_file():
        raise UserError(f"--input: there is no file {path}")
    content = sys.stdin.buffer.read() if path == "-" else storage.path(path).read_bytes()
    content = content.removeprefix(codecs.BOM_UTF8)
    if field is not None and path != "-" and not content.lstrip().startswith(b"{"):
        return [("", {field: path})]
    return [(f"line {number}: ", row) for number, row in _json_lines(content)]


def _image_field(config: ConfigDict) -> str | None:
    """Return the field of the examples that holds an image's path; None where the data are no images."""
    for op in config.data.get("ops", ()):
        if locate(op.get("call"), "config.data.ops") in (image.Decode, image.DecodeRandomResizedCrop):
            return op.get("field", "image")
    return None


def _json_lines(content: bytes) -> Iterator[tuple[int, Example]]:
    """Yield the line number, from 1, and the object of every line that is not empty."""
    for number, line in enumerate(content.split(b"\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line.decode("utf-8"))
            if b"\\ud" in line.lower():
                json.dumps(row, ensure_ascii=False).encode()  # half of a surrogate pair is no text
        except ValueError as error:
            raise UserError(f"--input: line {number} is not JSON: {error}") from None
        if not isinstance(row, dict):
            raise UserError(f"--input: line {number} is not a JSON object")
        yield number, row
