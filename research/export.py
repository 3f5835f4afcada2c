"""A checkpoint as a folder that `transformers`' from_pretrained loads."""

import pathlib
import tempfile

import flax.linen as nn
import jax
from ml_collections import ConfigDict

from research.data.tokenizer import Tokenizer
from research.evaluate import restore_params
from research.experiment import Experiment
from research.models.encoder_decoder import EncoderDecoder
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
    model, tokenizer = experiment.task.model, experiment.tokenizer
    names = getattr(experiment.task, "label_names", ())
    labels = names[-model.num_outputs :] if names else None  # of two labels on one output, the second
    with tempfile.TemporaryDirectory() as temporary:
        huggingface.save(
            folder,
            model,
            jax.device_get(params),
            labels=labels,
            problem_type=PROBLEMS.get(getattr(experiment.task, "objective", "")),
            tokenizer_files=tokenizer.save(pathlib.Path(temporary)) if tokenizer else (),
            config=special_tokens(model, tokenizer, experiment.decoding.decoder_start_id) if tokenizer else {},
        )
    print(f"wrote the checkpoint of step {step} to {folder}")
    return folder


def special_tokens(model: nn.Module, tokenizer: Tokenizer, decoder_start_id: int | None) -> dict[str, int]:
    """Returns what config.json says of the tokenizer's special tokens, which Transformers generates with."""
    ids = {f"{role}_token_id": getattr(tokenizer, f"{role}_id") for role in ("pad", "bos", "eos")}
    if isinstance(model, EncoderDecoder):
        ids["decoder_start_token_id"] = tokenizer.pad_id if decoder_start_id is None else decoder_start_id
    return {name: number for name, number in ids.items() if number is not None}
