"""Transformers' side: greedy tokens of the same weights by `generate`, with its cache."""

import json
import os
import sys
import time

import numpy as np
import torch
import transformers


def main(folder: str, batch_size: int, prompt_tokens: int, new_tokens: int, repeats: int) -> None:
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    model.generation_config.eos_token_id = None  # as many tokens on both sides
    ids = torch.from_numpy(np.random.default_rng(0).integers(100, 40000, (batch_size, prompt_tokens)))
    options = {
        "max_new_tokens": new_tokens,
        "min_new_tokens": new_tokens,
        "do_sample": False,
        "attention_mask": torch.ones_like(ids),
        "pad_token_id": 0,
    }
    seconds = []
    with torch.inference_mode():
        for _ in range(1 + repeats):
            begin = time.perf_counter()
            tokens = model.generate(ids, **options)[:, prompt_tokens:]
            seconds.append(time.perf_counter() - begin)
    packages = {"torch": torch.__version__, "transformers": transformers.__version__}
    print(json.dumps({"seconds": {"cached": seconds[1:]}, "tokens": tokens.tolist(), "packages": packages}))


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:]))
