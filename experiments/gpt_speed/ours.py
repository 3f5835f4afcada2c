"""This project's side of the benchmark: times training steps and prints the seconds of each as JSON."""

import functools
import json
import sys
import time
from typing import Any

import jax
import numpy as np
from workloads import CLIP_NORM, LEARNING_RATE, MASKED, WARM_STEPS, WEIGHT_DECAY, WORKLOADS, Workload

from research import optimizer, step
from research.models import bert, gpt, vit
from research.task import Task
from research.tasks.causal_lm import CausalLM
from research.tasks.classification import Classification
from research.tasks.image_classification import ImageClassification
from research.tasks.masked_lm import MaskedLM


def make(work: Workload) -> tuple[Task, dict[str, np.ndarray]]:
    sizes = {
        name: getattr(work, name) for name in ("hidden_size", "num_layers", "num_heads", "intermediate_size", "dropout")
    }
    if work.kind == "vit":
        encoder = vit.Encoder(work.image_size, work.patch_size, num_channels=1, **sizes, unroll=work.num_layers)
        image = np.random.default_rng(0).normal(size=(work.batch_size, work.image_size, work.image_size, 1))
        batch = {"image": image.astype(np.float32), "label": np.arange(work.batch_size, dtype=np.int32) % 10}
        task: Task = ImageClassification(vit.ImageClassifier(encoder, 10))
        return task, batch | {"mask": np.ones(work.batch_size, np.float32)}
    return make_of_text(work, sizes | {"vocab_size": work.vocab_size})


def make_of_text(work: Workload, sizes: dict[str, Any]) -> tuple[Task, dict[str, np.ndarray]]:
    ids = np.random.default_rng(0).integers(5, work.vocab_size, (work.batch_size, work.length + 1)).astype(np.int32)
    batch = {"input_ids": ids[:, :-1], "mask": np.ones(work.batch_size, np.float32)}
    if work.kind == "gpt":
        model = gpt.Decoder(**sizes, max_positions=work.length, unroll=work.num_layers)
        return CausalLM(model), batch | {"targets": ids[:, 1:], "target_mask": np.ones_like(ids[:, 1:], np.float32)}
    encoder = bert.Encoder(**sizes, attention_dropout=work.dropout, unroll=work.num_layers)
    batch["attention_mask"] = np.ones_like(ids[:, 1:])
    if work.kind == "bert":
        task: Task = Classification(bert.SequenceClassifier(encoder, 2, head_dropout=work.dropout))
        return task, batch | {"label": ids[:, 0] % 2}
    chosen = np.zeros_like(ids[:, 1:], np.float32)
    chosen[:, ::6] = 1
    chosen[:, MASKED * 6 :] = 0
    return MaskedLM(bert.MaskedLM(encoder), MASKED), batch | {"targets": ids[:, :-1], "target_mask": chosen}


def main(name: str, steps: int) -> None:
    task, batch = make(WORKLOADS[name])
    spec = {key: jax.ShapeDtypeStruct(x.shape, x.dtype) for key, x in batch.items()}
    adamw = optimizer.make_optimizer(
        1000, LEARNING_RATE, schedule="constant", weight_decay=WEIGHT_DECAY, clip_norm=CLIP_NORM
    )
    state = jax.jit(lambda: step.init_state(task, adamw, spec, 0))()
    jitted = jax.jit(functools.partial(step.train_step, task, adamw), donate_argnums=0)
    begin = time.perf_counter()
    compiled = jitted.lower(state, batch).compile()
    compile_seconds = time.perf_counter() - begin
    seconds = []
    for _ in range(WARM_STEPS + steps):
        begin = time.perf_counter()
        state, metrics = compiled(state, batch)
        loss = float(metrics["loss"].compute())
        seconds.append(time.perf_counter() - begin)
    print(
        json.dumps(
            {
                "seconds": seconds[WARM_STEPS:],
                "compile_seconds": compile_seconds,
                "loss": loss,
                "parameters": sum(x.size for x in jax.tree.leaves(state.params)),
                "packages": {"jax": jax.__version__},
            }
        )
    )


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
