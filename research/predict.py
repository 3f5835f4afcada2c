"""JSON lines in, JSON lines with predictions out."""

import json
import pathlib
import sys
from typing import Any, TextIO

import jax
from ml_collections import ConfigDict

from research import sharding
from research.errors import UserError
from research.evaluate import restore_params
from research.experiment import Experiment


def run(config: ConfigDict, workdir: pathlib.Path, input: str, output: str = "-", checkpoint: str = "") -> None:
    """Predicts for every line of `input`.

    Args:
      config: of the run.
      workdir: the run's folder.
      input: a file of JSON objects, a line each, with the fields of the config's data but the label; "-" is stdin.
      output: where each object goes with the prediction added; "-" is stdout.
      checkpoint: "latest", "best" or a step; "" takes the best where the run keeps it.
    """
    if jax.process_count() > 1:
        raise UserError("--mode=predict runs in one process")
    examples = _read(input)
    if not examples:
        return
    experiment = Experiment(config, source=examples)
    _, params = restore_params(experiment, workdir, checkpoint)
    task, data, mesh = experiment.task, experiment.data, experiment.mesh
    predict = jax.jit(task.predict)
    with open(output, "w", encoding="utf-8") if output != "-" else _Borrowed(sys.stdout) as file:
        for rows, batch in data.rows(examples):
            outputs = jax.device_get(predict(params, sharding.place(batch, mesh, data.padding), jax.random.key(0)))
            for i, row in enumerate(rows):
                described = task.describe({name: value[i] for name, value in outputs.items()})
                file.write(json.dumps(row | described, ensure_ascii=False) + "\n")


def _read(path: str) -> list[dict[str, Any]]:
    if path != "-" and not pathlib.Path(path).is_file():
        raise UserError(f"--input: there is no file {path}")
    text = sys.stdin.read() if path == "-" else pathlib.Path(path).read_text(encoding="utf-8")
    examples = []
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip():
            continue
        try:
            example = json.loads(line)
        except ValueError as error:
            raise UserError(f"--input: line {number} is not JSON: {error}") from None
        if not isinstance(example, dict):
            raise UserError(f"--input: line {number} is not a JSON object")
        examples.append(example)
    return examples


class _Borrowed:
    """A file that is not ours to close."""

    def __init__(self, file: TextIO):
        self._file = file

    def __enter__(self) -> TextIO:
        return self._file

    def __exit__(self, *_: object) -> None:
        self._file.flush()
