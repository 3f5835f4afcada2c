"""PyTorch's side of the benchmark: the same steps with Transformers' ViT, printed as JSON."""

import json
import os
import sys
import time

import torch
import transformers
from workload import BATCH_SIZE, CLASSES, CLIP_NORM, LEARNING_RATE, SIZES, WARM_STEPS, WEIGHT_DECAY

NAMES = {"num_layers": "num_hidden_layers", "num_heads": "num_attention_heads"}


def main(steps: int) -> None:
    torch.manual_seed(0)
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    sizes = {NAMES.get(name, name): size for name, size in SIZES.items()}
    config = transformers.ViTConfig(**sizes, num_labels=CLASSES, attn_implementation="sdpa")
    model = transformers.ViTForImageClassification(config).train()
    shape = (BATCH_SIZE, SIZES["num_channels"], SIZES["image_size"], SIZES["image_size"])
    batch = {"pixel_values": torch.randn(shape), "labels": torch.randint(0, CLASSES, (BATCH_SIZE,))}
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY, fused=True)
    seconds = []
    for _ in range(WARM_STEPS + steps):
        begin = time.perf_counter()
        loss = model(**batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP_NORM)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        loss = loss.item()
        seconds.append(time.perf_counter() - begin)
    print(
        json.dumps(
            {
                "seconds": seconds[WARM_STEPS:],
                "compile_seconds": 0.0,
                "loss": loss,
                "parameters": sum(p.numel() for p in model.parameters()),
                "packages": {"torch": torch.__version__, "transformers": transformers.__version__},
            }
        )
    )


if __name__ == "__main__":
    main(int(sys.argv[1]))
