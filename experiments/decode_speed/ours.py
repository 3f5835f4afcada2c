"""This project's side: greedy tokens of SmolLM2, with the cache and by computing everything anew for each token."""

import json
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np

from research.generation import decoding, sampling
from research.pretrained import huggingface


def main(folder: str, batch_size: int, prompt_tokens: int, new_tokens: int, repeats: int) -> None:
    model = huggingface.load_model(folder, "causal_lm")
    ids = np.random.default_rng(0).integers(100, 40000, (batch_size, prompt_tokens)).astype(np.int32)
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), ids))["params"]
    params = jax.device_put(huggingface.load_params(folder, model, shapes)[0])
    settings = decoding.Decoding(max_new_tokens=new_tokens)
    unstacked = jax.block_until_ready(decoding.unstack(params))

    @jax.jit
    def cached(params, ids):
        return sampling.generate(model, params, {"input_ids": ids}, settings)

    @jax.jit
    def anew(params, ids):
        rows = jnp.pad(ids, ((0, 0), (0, new_tokens)))

        def step(i, rows):
            hidden = model.apply({"params": params}, rows, method="hidden")
            last = jax.lax.dynamic_index_in_dim(hidden, prompt_tokens + i - 1, 1, keepdims=False)
            token = model.apply({"params": params}, last, method="logits").argmax(-1)
            return rows.at[:, prompt_tokens + i].set(token)

        return jax.lax.fori_loop(0, new_tokens, step, rows)[:, prompt_tokens:]

    seconds, tokens = {}, {}
    for name, function, held, count in (("cached", cached, unstacked, repeats), ("anew", anew, params, 1)):
        compiled = function.lower(held, ids).compile()
        tokens[name] = np.asarray(compiled(held, ids)) if name == "cached" else None
        seconds[name] = []
        for _ in range(count):
            begin = time.perf_counter()
            tokens[name] = np.asarray(compiled(held, ids))
            seconds[name].append(time.perf_counter() - begin)
    print(
        json.dumps(
            {
                "seconds": seconds,
                "same_tokens": bool((tokens["cached"] == tokens["anew"]).all()),
                "tokens": tokens["cached"].tolist(),
                "packages": {"jax": jax.__version__},
            }
        )
    )


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:]))
