"""Text or images from a trained model, or straight from published weights."""

import dataclasses
import json
import math
import pathlib
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TextIO

import jax
import numpy as np
from ml_collections import ConfigDict

from research import sharding, storage
from research.build import locate
from research.data import chat
from research.data.tokenizer import Tokenizer
from research.errors import UserError, nearest
from research.evaluate import restore_params
from research.experiment import Experiment
from research.generation import decoding, draw, sampling
from research.generation.detokenizer import Detokenizer, completion
from research.task import Params
from research.tasks.diffusion import Diffusion
from research.tasks.prompt_tuning import check_no_prompt

# The features of all language tasks: what the spec of batches is where no run has recorded it.
FEATURES = ("input_ids", "attention_mask", "targets", "decoder_input_ids", "decoder_attention_mask")


@dataclasses.dataclass(frozen=True)
class Request:
    """A prompt.

    Attributes:
      number: its place among the prompts, from 0.
      fields: what the output repeats.
      ids: its tokens.
      before: the tokens whose text the output follows without a break.
    """

    number: int
    fields: Mapping[str, Any]
    ids: Sequence[int]
    before: Sequence[int]


def run(
    config: ConfigDict,
    workdir: pathlib.Path,
    prompt: str = "",
    input: str = "",
    output: str = "-",
    checkpoint: str = "",
) -> None:
    """Write what follows one prompt, token by token, or every prompt of a file, batch by batch; or draws images.

    Args:
      config: of the run; `decoding` says how, and `seed` makes samples repeatable: those of a prompt depend on its
        place in the file, and not on the others.
      workdir: the run's folder. If it holds no checkpoints, the weights that `config.init` names are taken.
      prompt: a text. Of images their classes, see `draw.classes`.
      input: a file instead, or "-" for stdin. Lines that begin with { are objects with a "prompt", or with "messages"
        for the chat template; any other line is a prompt itself.
      output: where the text goes, or for a file its objects with a "completion" each, in order; "-" is stdout. Where
        images go see `draw.target`.
      checkpoint: "latest", "best" or a step; "" takes the best where the run keeps it.
    """
    if jax.process_count() > 1:
        raise UserError("--mode=generate runs in one process")
    if locate(config.task["call"], "config.task") is Diffusion:
        if input:
            raise UserError("--input: images are drawn by class, and --prompt names the classes")
        _images(config, workdir, prompt, output, checkpoint)
        return
    if bool(prompt) == bool(input):
        raise UserError("--prompt, --input: give a text to continue, or a file of texts; exactly one of the two")
    storage.check_output(output)
    lines = [("--prompt", {"prompt": prompt})] if prompt else _read(input)
    experiment = experiment_of(config, workdir)
    requests = [_request(experiment, i, *line) for i, line in enumerate(lines)]
    params = decoding.unstack(trained_or_published(experiment, workdir, checkpoint)[1])
    with storage.text_output(output) as file:
        if prompt:
            _stream(experiment, params, requests[0], file)
            return
        for request, text in _completions(experiment, params, requests):
            file.write(json.dumps({**request.fields, "completion": text}, ensure_ascii=False) + "\n")
            file.flush()


def _images(config: ConfigDict, workdir: pathlib.Path, prompt: str, output: str, checkpoint: str) -> None:
    experiment = draw.experiment(config, workdir)
    task = experiment.plain_task
    assert isinstance(task, Diffusion)
    labels, path = draw.classes(task, prompt), draw.target(task, output, workdir)
    _, params = trained_or_published(experiment, workdir, checkpoint)
    with storage.writing(path) as local:
        draw.write(experiment, task, params, labels, local)
    print(path)


def experiment_of(config: ConfigDict, workdir: pathlib.Path) -> Experiment:
    """Return the objects of a config, checked to be able to generate, without a look at its training data."""
    if not config.get("derived"):
        spec = {name: {"shape": [1, 8], "dtype": "int32"} for name in FEATURES}
        spec["target_mask"] = {"shape": [1, 8], "dtype": "float32"}
        config = ConfigDict(config.to_dict())
        config.derived = {"label_names": [], "num_steps": config.get("num_steps") or 1, "spec": spec}
    experiment = Experiment(config, workdir=workdir)
    if experiment.tokenizer is None:
        raise UserError("config.tokenizer: it is missing, and a language model needs one")
    decoding.check_model(experiment.task.model)
    check_no_prompt(experiment.plain_task, "--mode=generate")
    return experiment


def trained_or_published(experiment: Experiment, workdir: pathlib.Path, checkpoint: str) -> tuple[int | None, Params]:
    """Return the step and parameters of a checkpoint, or else the published ones that the run would have started from.

    There is no step then.

    Raises:
      UserError: there is neither, or no such checkpoint.
    """
    if checkpoint or (workdir / "checkpoints").is_dir():
        return restore_params(experiment, workdir, checkpoint, plain=True)
    if not experiment.config.get("init"):
        raise UserError(f"--workdir: {workdir} holds no checkpoints, and config.init names no weights")
    print(f"{workdir} holds no checkpoints: taking the weights that config.init names", file=sys.stderr)
    params = experiment.pretrained()
    if params is None or any(x is None for x in jax.tree.leaves(params, is_leaf=lambda x: x is None)):
        raise UserError("config.init: the weights lack a part of the model, which would have to be trained")
    return None, params


def _request(experiment: Experiment, number: int, place: str, fields: Mapping[str, Any]) -> Request:
    """Encode a prompt; raise UserError naming its place."""
    model, settings = experiment.task.model, experiment.decoding
    try:
        ids, before = _encode(experiment.tokenizer, fields, settings, hasattr(model, "encode"))
        decoding.check_room(model, len(ids), settings)
    except UserError as error:
        place = "" if str(error).startswith("config.") else f"{place}: "
        raise UserError(f"{place}{error}") from None
    return Request(number, fields, ids, before)


def _encode(
    tokenizer: Tokenizer, fields: Mapping[str, Any], settings: decoding.Decoding, source: bool
) -> tuple[list[int], list[int]]:
    """Return the tokens of a prompt, and those that the output's text is to be read after.

    Args:
      tokenizer: of the run.
      fields: "prompt" or "messages".
      settings: what comes before it, and whether it is a user's turn.
      source: whether it is for an encoder; then it ends with the end token, as `data.language.Seq2Seq` has it.
    """
    messages, prompt = fields.get("messages"), fields.get("prompt", "")
    prompt = settings.prefix + prompt if prompt else ""
    if messages is None and settings.chat:
        messages = [{"role": "user", "content": prompt}]
    if messages is None:
        ids = tokenizer.backend.encode(prompt, add_special_tokens=False).ids
    else:
        ids, _ = chat.encode(tokenizer, chat.check_messages(messages), add_generation_prompt=True)
    if not ids:
        raise UserError("the prompt is empty")
    if source:
        return [*ids, *([] if tokenizer.eos_id is None else [tokenizer.eos_id])], []
    if messages is not None:
        return ids, []
    if not settings.bos:
        return ids, ids
    begin = tokenizer.bos_id if tokenizer.bos_id is not None else tokenizer.eos_id
    if begin is None:
        raise UserError("config.decoding.bos: the tokenizer has no token that begins a text; set bos=False")
    return [begin, *ids], ids


def _stream(experiment: Experiment, params: Params, request: Request, file: TextIO) -> None:
    """Write the text of one prompt, and the end of its line."""
    if experiment.decoding.num_beams > 1:  # which are not known to be the best ones before the end
        file.writelines(text for _, text in _completions(experiment, params, [request]))
    else:
        stream = sampling.Stream(experiment.task.model, params, experiment.decoding, experiment.tokenizer)
        text = Detokenizer(_writer(experiment), experiment.decoding.stop, request.before)
        for token in stream(request.ids, _key(experiment)):
            file.write(text.add([token]))
            file.flush()
            if text.ended:
                break
        file.write(text.close())
    file.write("\n")
    file.flush()


def _completions(experiment: Experiment, params: Params, requests: Sequence[Request]) -> Iterator[tuple[Request, str]]:
    model, settings, tokenizer = experiment.task.model, experiment.decoding, experiment.tokenizer
    ways = experiment.mesh.shape["data"] * experiment.mesh.shape["fsdp"]
    size = min(experiment.config.batch_size, math.ceil(len(requests) / ways) * ways)

    @jax.jit
    def generate(params: Params, batch: dict[str, jax.Array], rng: jax.Array) -> jax.Array:
        rows = batch.pop("row")
        return sampling.generate(model, params, batch, settings, tokenizer, rng, rows)

    for start in range(0, len(requests), size):
        part = requests[start : start + size]
        full = [part[i % len(part)] for i in range(size)]  # one shape, that divides over the devices
        batch = decoding.pad([request.ids for request in full], tokenizer.pad_id)
        batch["row"] = np.array([request.number for request in full], np.int32)
        tokens_BxN = jax.device_get(generate(params, sharding.place(batch, experiment.mesh), _key(experiment)))
        for request, tokens in zip(part, tokens_BxN):
            yield request, completion(_writer(experiment), tokens, settings.stop, request.before)


def _key(experiment: Experiment) -> jax.Array:
    return jax.random.key(experiment.config.get("seed", 0))


def _writer(experiment: Experiment) -> Tokenizer:
    """Return the tokenizer of what is generated; a task may have one that is not that of its inputs."""
    return getattr(experiment.task, "tokenizer", None) or experiment.tokenizer


def _read(path: str) -> list[tuple[str, dict[str, Any]]]:
    """Return the place and the fields of every line that is not empty."""
    if path != "-" and not storage.path(path).is_file():
        raise UserError(f"--input: there is no file {path}")
    content = sys.stdin.buffer.read() if path == "-" else storage.path(path).read_bytes()
    try:
        lines = content.decode("utf-8-sig").split("\n")
    except ValueError as error:
        raise UserError(f"--input: {path} is not UTF-8: {error}") from None
    places = ((f"--input: line {number}", line.rstrip("\r")) for number, line in enumerate(lines, start=1))
    return [(place, _fields(line, place)) for place, line in places if line.strip()]


def _fields(line: str, place: str) -> dict[str, Any]:
    if not line.startswith("{"):
        return {"prompt": line}
    try:
        fields = json.loads(line)
    except ValueError as error:
        raise UserError(f"{place} is not JSON: {error}") from None
    if ("prompt" in fields) == ("messages" in fields):
        wrong = "both" if "prompt" in fields else f"neither{nearest('prompt', fields)}"
        raise UserError(f"{place}: it needs a 'prompt' or 'messages'; it has {wrong}")
    if not isinstance(fields.get("prompt", ""), str):
        raise UserError(f"{place}: its prompt is no text")
    return fields
