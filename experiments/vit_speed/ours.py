"""This project's side of the benchmark: times training steps and prints the seconds of each as JSON."""

import functools
import json
import sys
import time

import jax
import numpy as np
from workload import BATCH_SIZE, CLASSES, CLIP_NORM, LEARNING_RATE, SIZES, WARM_STEPS, WEIGHT_DECAY

from research import optimizer, step
from research.models import vit
from research.tasks.image_classification import ImageClassification


def main(steps: int) -> None:
    task = ImageClassification(vit.ImageClassifier(vit.Encoder(**SIZES, unroll=SIZES["num_layers"]), CLASSES))
    rng = np.random.default_rng(0)
    shape = (BATCH_SIZE, SIZES["image_size"], SIZES["image_size"], SIZES["num_channels"])
    batch = {
        "image": rng.normal(size=shape).astype(np.float32),
        "label": rng.integers(0, CLASSES, BATCH_SIZE).astype(np.int32),
        "mask": np.ones(BATCH_SIZE, np.float32),
    }
    spec = {key: jax.ShapeDtypeStruct(x.shape, x.dtype) for key, x in batch.items()}
    adamw = optimizer.adamw(1000, LEARNING_RATE, schedule="constant", weight_decay=WEIGHT_DECAY, clip_norm=CLIP_NORM)
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
    main(int(sys.argv[1]))
