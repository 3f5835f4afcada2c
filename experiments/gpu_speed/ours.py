"""This project's side of the benchmark: times training steps on the default device and prints what it saw as JSON."""

import argparse
import functools
import json
import pathlib
import shutil
import statistics
import tempfile
import time
from typing import Any

import jax
import numpy as np
from workloads import BLOCKS, CLIP_NORM, LEARNING_RATE, WARM_STEPS, WEIGHT_DECAY, WORKLOADS, Workload, tiny

from research import optimizer, step
from research.models import bert, dit, encoder_decoder, gpt, vit
from research.task import Task
from research.tasks.causal_lm import CausalLM
from research.tasks.classification import Classification
from research.tasks.diffusion import Diffusion
from research.tasks.image_classification import ImageClassification
from research.tasks.seq2seq import Seq2Seq


def make(work: Workload, options: dict[str, Any]) -> tuple[Task, dict[str, np.ndarray]]:
    """Return the task and a batch."""
    names = ("hidden_size", "num_layers", "num_heads", "intermediate_size")
    options = {name: getattr(work, name) for name in names} | {"dtype": "bfloat16"} | options
    if work.image_size:
        return make_of_images(work, options)
    rng, size = np.random.default_rng(0), work.batch_size
    ids = rng.integers(5, work.vocab_size, (size, work.length + 1)).astype(np.int32)
    batch = {"mask": np.ones(size, np.float32), "input_ids": ids[:, :-1]}
    shifted = {"targets": ids[:, 1:], "target_mask": np.ones((size, work.length), np.float32)}
    options |= {"vocab_size": work.vocab_size}
    if work.kind == "gpt":
        return CausalLM(gpt.Decoder(**options, max_positions=work.length)), batch | shifted
    if work.kind == "llama":
        plain = {"attention_bias": False, "out_bias": False, "mlp_bias": False, "tie_embeddings": False}
        shape = {"positions": "rotary", "norm": "rms", "activation": "silu", "gated": True}
        return CausalLM(gpt.Decoder(**options, **plain, **shape, num_kv_heads=work.num_kv_heads)), batch | shifted
    batch["attention_mask"] = np.ones_like(batch["input_ids"])
    if work.kind == "bert":
        encoder = bert.Encoder(**options, dropout=work.dropout, attention_dropout=work.dropout)
        task = Classification(bert.SequenceClassifier(encoder, 2, head_dropout=work.dropout))
        return task, batch | {"label": ids[:, 0] % 2}
    targets = rng.integers(5, work.vocab_size, (size, work.target_length)).astype(np.int32)
    batch |= {"decoder_input_ids": np.roll(targets, 1, 1), "targets": targets}
    batch["target_mask"] = np.ones(targets.shape, np.float32)
    kind = {"positions": "relative", "norm": "rms", "norm_first": True, "use_bias": False, "embedding_scale": 1.0}
    rates = {"dropout": work.dropout, "attention_dropout": work.dropout, "activation_dropout": work.dropout}
    scale = work.hidden_size**-0.5
    return Seq2Seq(encoder_decoder.EncoderDecoder(**options, **kind, **rates, logits_scale=scale)), batch


def make_of_images(work: Workload, options: dict[str, Any]) -> tuple[Task, dict[str, np.ndarray]]:
    """Return the task and a batch of images, or latents, and classes."""
    side, size, channels = work.image_size, work.batch_size, 4 if work.kind == "dit" else 3
    rng, options = np.random.default_rng(0), options | {"image_size": side, "patch_size": work.patch_size}
    image = rng.normal(size=(size, side, side, channels)).astype(np.float32)
    batch = {"image": image, "label": rng.integers(0, 1000, size).astype(np.int32), "mask": np.ones(size, np.float32)}
    if work.kind == "dit":
        return Diffusion(dit.DiT(**options, learned_variance=False), label_dropout=0.0), batch
    return ImageClassification(vit.ImageClassifier(vit.Encoder(**options), 1000)), batch


def run(work: Workload, steps: int, options: dict[str, Any], trace: pathlib.Path | None) -> dict[str, Any]:
    """Train, and return what is to be printed."""
    task, rows = make(work, options)
    spec = {key: jax.ShapeDtypeStruct(x.shape, x.dtype) for key, x in rows.items()}
    recipe = {"schedule": "constant", "weight_decay": WEIGHT_DECAY, "clip_norm": CLIP_NORM}
    adamw = optimizer.make_optimizer(1000, LEARNING_RATE, **recipe)
    state = jax.jit(lambda: step.init_state(task, adamw, spec, 0))()
    batch = jax.device_put(rows)
    begin = time.perf_counter()
    compiled = jax.jit(functools.partial(step.train_step, task, adamw), donate_argnums=0).lower(state, batch).compile()
    compile_seconds = time.perf_counter() - begin

    def several(state: Any, count: int) -> tuple[Any, float, float]:
        begin = time.perf_counter()
        for _ in range(count):
            state, metrics = compiled(state, batch)
        loss = float(metrics["loss"].compute())
        return state, loss, (time.perf_counter() - begin) / count

    state, _, _ = several(state, WARM_STEPS)
    seconds = []
    for _ in range(BLOCKS):
        state, loss, each = several(state, steps)
        seconds.append(each)
    if trace is not None:
        with tempfile.TemporaryDirectory() as folder:
            with jax.profiler.trace(folder, create_perfetto_trace=True):
                state, _, _ = several(state, 3)
            (found,) = pathlib.Path(folder).rglob("perfetto_trace.json.gz")
            shutil.copy(found, trace)
    parameters = sum(x.size for x in jax.tree.leaves(state.params))
    device, memory = jax.devices()[0], compiled.memory_analysis()
    return {
        "seconds": seconds,
        "compile_seconds": compile_seconds,
        "operations_per_second": work.operations(parameters) / statistics.median(seconds),
        "peak_memory_bytes": (device.memory_stats() or {}).get("peak_bytes_in_use", 0),
        "temporary_bytes": memory.temp_size_in_bytes,
        "loss": loss,
        "parameters": parameters,
        "device": device.device_kind,
        "packages": {"jax": jax.__version__},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("workload", choices=WORKLOADS)
    parser.add_argument("--steps", type=int, default=10, help="steps of each of the three blocks that are timed")
    parser.add_argument("--tiny", action="store_true", help="a size for a CPU, to try the script")
    parser.add_argument("--options", type=json.loads, default={}, help='of the model, as JSON: {"unroll": 1}')
    parser.add_argument("--trace", type=pathlib.Path, help="where to write a trace of three steps, for Perfetto")
    arguments = parser.parse_args()
    work = WORKLOADS[arguments.workload]
    said = run(tiny(work) if arguments.tiny else work, arguments.steps, arguments.options, arguments.trace)
    print(json.dumps(said))


if __name__ == "__main__":
    main()
