"""A checkpoint as a folder that `transformers`' from_pretrained loads."""

import pathlib
import tempfile
from typing import Any

import flax.linen as nn
import jax
from ml_collections import ConfigDict

from research import storage
from research.build import build
from research.data.tokenizer import Tokenizer
from research.errors import UserError
from research.evaluate import restore_trained
from research.experiment import Experiment, own
from research.models import vit
from research.models.encoder_decoder import EncoderDecoder
from research.pretrained import families, huggingface, peft, preprocessor
from research.reporting.record import write_json
from research.task import Params
from research.tasks.ia3 import IA3
from research.tasks.lora import LoRA
from research.tasks.prompt_tuning import check_no_prompt

PROBLEMS = {
    "softmax": "single_label_classification",
    "sigmoid": "multi_label_classification",
    "regression": "regression",
}
IMAGE_OPS = tuple(
    f"research.data.{name}"
    for name in ("image.CenterCrop", "image.Normalize", "image.Resize", "boxes.Resize", "boxes.Targets")
)


def run(config: ConfigDict, workdir: pathlib.Path, output: str = "", checkpoint: str = "") -> pathlib.Path:
    """Write config.json, model.safetensors, and the tokenizer's files or preprocessor_config.json.

    Of a run with adapters these are merged; alone they are in "adapter" below it, in PEFT's format.

    Args:
      config: of the run.
      workdir: the run's folder.
      output: the folder to write; "" is "export" in the run's folder.
      checkpoint: "latest", "best" or a step; "" takes the best where the run keeps it.

    Returns:
      the folder.
    """
    experiment = Experiment(config, workdir=workdir)
    check_no_prompt(experiment.plain_task, "--mode=export")
    step, trained = restore_trained(experiment, workdir, checkpoint)
    params = experiment.merged(trained, plain=True)
    folder = storage.path(output) if output else workdir / "export"
    tokenizer = experiment.tokenizer
    model, params = at_trained_size(experiment, jax.device_get(own(params, experiment.fixed)))
    names = getattr(experiment.task, "label_names", ())
    outputs = getattr(model, "num_outputs", 0)
    labels = names[-outputs:] if names and outputs else None  # of two labels on one output, the second
    with tempfile.TemporaryDirectory() as temporary:
        files = tokenizer.save(pathlib.Path(temporary)) if tokenizer else ()
        if (described := image_preprocessor(experiment)) is not None:
            files = [*files, pathlib.Path(temporary) / preprocessor.FILE]
            write_json(files[-1], described)
        huggingface.save(
            folder,
            model,
            params,
            labels=labels,
            problem_type=PROBLEMS.get(getattr(experiment.task, "objective", "")),
            tokenizer_files=files,
            config=special_tokens(model, tokenizer, experiment.decoding.decoder_start_id) if tokenizer else {},
            model_type=first_family(experiment.config),
        )
    if isinstance(experiment.trained_task, LoRA | IA3):
        base = (experiment.config.get("init") or {}).get("path", "")
        with storage.writing(folder / "adapter", last=peft.CONFIG) as adapter:
            peft.save(adapter, experiment.trained_task, jax.device_get(trained), base, first_family(experiment.config))
    print(f"wrote the checkpoint of step {step} to {folder}")
    return folder


def first_family(config: ConfigDict) -> str:
    """Return the family of the weights that a run began with; "" where there are none, or they are there no more."""
    path = (config.get("init") or {}).get("path")
    try:
        return families.model_type(path) if path else ""
    except UserError:
        return ""


def at_trained_size(experiment: Experiment, params: Params) -> tuple[nn.Module, Params]:
    """Return the model and its parameters with the positions of the images that it was trained on.

    Transformers' ViT refuses images of another size than that of its positions.
    """
    model, image = experiment.task.model, experiment.spec.get("image")
    encoder = getattr(model, "encoder", None)
    if image is None or not isinstance(encoder, vit.Encoder) or image.shape[1] != image.shape[2]:
        return model, params
    encoder, fitted = vit.to_image_size(encoder, params["encoder"], image.shape[1])
    return model.clone(encoder=encoder), {**params, "encoder": fitted}


def image_preprocessor(experiment: Experiment) -> dict[str, Any] | None:
    """Return what preprocessor_config.json holds: the ops of the first evaluation on images, else of training."""
    spec, config = experiment.spec, experiment.config
    if "image" not in spec:
        return None
    nodes = [evaluator["data"] for evaluator in (config.get("evals") or {}).values() if "data" in evaluator]
    for node in [*nodes, config.data]:
        calls = [op for op in node.get("ops", ()) if op["call"] in IMAGE_OPS]
        described = preprocessor.describe(build(calls, "config.data.ops"), spec["image"].shape[1:])
        if described is not None:
            return described
    return None


def special_tokens(model: nn.Module, tokenizer: Tokenizer, decoder_start_id: int | None) -> dict[str, Any]:
    """Return what config.json says of the tokenizer's special tokens, which Transformers generates with."""
    ids: dict[str, Any] = {f"{role}_token_id": getattr(tokenizer, f"{role}_id") for role in ("pad", "bos", "eos")}
    if len(tokenizer.end_ids) > 1:
        ids["eos_token_id"] = list(tokenizer.end_ids)
    if isinstance(model, EncoderDecoder):
        ids["decoder_start_token_id"] = tokenizer.pad_id if decoder_start_id is None else decoder_start_id
    return {name: number for name, number in ids.items() if number is not None}
