"""A checkpoint as a folder that `transformers`' from_pretrained loads."""

import pathlib
import tempfile

import jax
from ml_collections import ConfigDict

from research.evaluate import restore_params
from research.experiment import Experiment
from research.pretrained import huggingface

PROBLEMS = {
    "softmax": "single_label_classification",
    "sigmoid": "multi_label_classification",
    "regression": "regression",
}


def run(config: ConfigDict, workdir: pathlib.Path, output: str = "", checkpoint: str = "") -> pathlib.Path:
    """Writes config.json, model.safetensors and the tokenizer's files.

    Args:
      config: of the run.
      workdir: the run's folder.
      output: the folder to write; "" is "export" in the run's folder.
      checkpoint: "latest", "best" or a step; "" takes the best where the run keeps it.

    Returns:
      the folder.
    """
    experiment = Experiment(config, workdir=workdir)
    step, params = restore_params(experiment, workdir, checkpoint)
    folder = pathlib.Path(output).expanduser() if output else workdir / "export"
    labels = experiment.label_names[-experiment.task.model.num_outputs :]  # of two labels on one output, the second
    with tempfile.TemporaryDirectory() as temporary:
        huggingface.save(
            folder,
            experiment.task.model,
            jax.device_get(params),
            labels=labels or None,
            problem_type=PROBLEMS.get(getattr(experiment.task, "objective", "")),
            tokenizer_files=experiment.tokenizer.save(pathlib.Path(temporary)) if experiment.tokenizer else (),
        )
    print(f"wrote the checkpoint of step {step} to {folder}")
    return folder
