"""PyTorch's side of the benchmark: the same steps with Transformers' models, printed as JSON."""

import json
import os
import sys
import time

import numpy as np
import torch
import transformers
from workloads import CLIP_NORM, LEARNING_RATE, MASKED, WARM_STEPS, WEIGHT_DECAY, WORKLOADS, Workload


def make(work: Workload) -> tuple[torch.nn.Module, dict[str, torch.Tensor]]:
    rng = np.random.default_rng(0)
    sizes = {
        "hidden_size": work.hidden_size,
        "num_hidden_layers": work.num_layers,
        "num_attention_heads": work.num_heads,
        "intermediate_size": work.intermediate_size,
        "hidden_dropout_prob": work.dropout,
        "attention_probs_dropout_prob": work.dropout,
        "attn_implementation": "sdpa",
    }
    if work.kind == "vit":
        vit = transformers.ViTConfig(
            image_size=work.image_size, patch_size=work.patch_size, num_channels=1, num_labels=10, **sizes
        )
        images = {"pixel_values": torch.randn(work.batch_size, 1, work.image_size, work.image_size)}
        return transformers.ViTForImageClassification(vit), images | {"labels": torch.arange(work.batch_size) % 10}
    ids = torch.from_numpy(rng.integers(5, work.vocab_size, (work.batch_size, work.length + 1)))
    if work.kind == "gpt":
        config = transformers.GPT2Config(
            vocab_size=work.vocab_size,
            n_positions=work.length,
            n_embd=work.hidden_size,
            n_layer=work.num_layers,
            n_head=work.num_heads,
            n_inner=work.intermediate_size,
            resid_pdrop=work.dropout,
            embd_pdrop=work.dropout,
            attn_pdrop=work.dropout,
            bos_token_id=0,
            eos_token_id=0,
            use_cache=False,
            attn_implementation="sdpa",
        )
        return transformers.GPT2LMHeadModel(config), {"input_ids": ids[:, :-1], "labels": ids[:, :-1]}
    config = transformers.BertConfig(vocab_size=work.vocab_size, num_labels=2, **sizes)
    batch = {"input_ids": ids[:, :-1], "attention_mask": torch.ones_like(ids[:, 1:])}
    if work.kind == "bert":
        return transformers.BertForSequenceClassification(config), batch | {"labels": ids[:, 0] % 2}
    labels = torch.full_like(ids[:, 1:], -100)
    labels[:, : MASKED * 6 : 6] = ids[:, : MASKED * 6 : 6]
    return transformers.BertForMaskedLM(config), batch | {"labels": labels}


def main(name: str, steps: int) -> None:
    torch.manual_seed(0)
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    model, batch = make(WORKLOADS[name])
    model.train()
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
    main(sys.argv[1], int(sys.argv[2]))
