"""PyTorch's side of the benchmark: the usual model, torch.compile, bfloat16 autocast, flash attention, fused AdamW."""

import argparse
import json
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn
from workloads import BLOCKS, CLIP_NORM, LEARNING_RATE, WARM_STEPS, WEIGHT_DECAY, WORKLOADS, Workload, tiny

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


class Block(nn.Module):
    def __init__(self, width: int, heads: int, hidden: int):
        super().__init__()
        self.heads = heads
        self.attention_norm, self.mlp_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query_key_value, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, length, width = x.shape
        split = self.query_key_value(self.attention_norm(x)).view(batch, length, 3, self.heads, width // self.heads)
        query, key, value = split.permute(2, 0, 3, 1, 4)
        found = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.out(found.transpose(1, 2).reshape(batch, length, width))
        return x + self.down(F.gelu(self.up(self.mlp_norm(x)), approximate="tanh"))


class GPT(nn.Module):
    """GPT-2 in plain PyTorch, which compiles better than Transformers'."""

    def __init__(self, work: Workload):
        super().__init__()
        width = work.hidden_size
        self.word, self.position = nn.Embedding(work.vocab_size, width), nn.Embedding(work.length, width)
        blocks = [Block(width, work.num_heads, work.intermediate_size) for _ in range(work.num_layers)]
        self.blocks, self.norm = nn.Sequential(*blocks), nn.LayerNorm(width)
        self.head = nn.Linear(width, work.vocab_size, bias=False)
        self.head.weight = self.word.weight
        for parameter in self.parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=0.02)

    def forward(self, ids: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        x = self.blocks(self.word(ids) + self.position.weight)
        return F.cross_entropy(self.head(self.norm(x)).float().flatten(0, 1), targets.flatten())


class Lossy(nn.Module):
    """A module and how its loss is computed, to be compiled as one."""

    def __init__(self, model: nn.Module, loss: Callable[..., torch.Tensor]):
        super().__init__()
        self.model, self.loss = model, loss

    def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
        return self.loss(self.model, *inputs)


def sizes(work: Workload) -> dict[str, int]:
    names = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
    return dict(zip(names, (work.hidden_size, work.num_layers, work.num_heads, work.intermediate_size)))


def make_of_text(work: Workload) -> tuple[nn.Module, tuple[torch.Tensor, ...]]:
    ids = torch.randint(5, work.vocab_size, (work.batch_size, work.length + 1), device=DEVICE)
    source, targets = ids[:, :-1].contiguous(), ids[:, 1:].contiguous()
    if work.kind == "gpt":
        return GPT(work), (source, targets)
    import transformers

    if work.kind == "llama":
        shape = {"num_key_value_heads": work.num_kv_heads, "max_position_embeddings": work.length}
        config = transformers.LlamaConfig(vocab_size=work.vocab_size, **sizes(work), **shape, use_cache=False)
        model = transformers.LlamaForCausalLM._from_config(config, attn_implementation="sdpa", dtype=torch.float32)

        def next_token(model: nn.Module, source: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
            return F.cross_entropy(model(input_ids=source).logits.float().flatten(0, 1), targets.flatten())

        return Lossy(model, next_token), (source, targets)
    ones = torch.ones_like(source)
    if work.kind == "bert":
        config = transformers.BertConfig(vocab_size=work.vocab_size, **sizes(work))
        model = transformers.BertForSequenceClassification(config)
        return Lossy(model, lambda m, x, mask, y: m(x, attention_mask=mask, labels=y).loss), (
            source,
            ones,
            ids[:, 0] % 2,
        )
    config = transformers.T5Config(
        vocab_size=work.vocab_size,
        d_model=work.hidden_size,
        d_kv=work.hidden_size // work.num_heads,
        d_ff=work.intermediate_size,
        num_layers=work.num_layers,
        num_heads=work.num_heads,
        dropout_rate=work.dropout,
        use_cache=False,
        decoder_start_token_id=0,
    )
    targets = torch.randint(5, work.vocab_size, (work.batch_size, work.target_length), device=DEVICE)
    model = transformers.T5ForConditionalGeneration(config)
    return Lossy(model, lambda m, x, mask, y: m(input_ids=x, attention_mask=mask, labels=y).loss), (
        source,
        ones,
        targets,
    )


def make_of_images(work: Workload) -> tuple[nn.Module, tuple[torch.Tensor, ...]]:
    labels = torch.randint(0, 1000, (work.batch_size,), device=DEVICE)
    if work.kind == "vit":
        import timm

        shape = {"img_size": work.image_size, "patch_size": work.patch_size, "embed_dim": work.hidden_size}
        depth = {"depth": work.num_layers, "num_heads": work.num_heads}
        model = timm.models.vision_transformer.VisionTransformer(num_classes=1000, **shape, **depth)
        image = torch.randn(work.batch_size, 3, work.image_size, work.image_size, device=DEVICE)
        return Lossy(model, lambda m, x, y: F.cross_entropy(m(x).float(), y)), (image, labels)
    import diffusers

    model = diffusers.DiTTransformer2DModel(
        num_attention_heads=work.num_heads,
        attention_head_dim=work.hidden_size // work.num_heads,
        in_channels=4,
        out_channels=4,
        num_layers=work.num_layers,
        sample_size=work.image_size,
        patch_size=work.patch_size,
        num_embeds_ada_norm=1000,
    )
    # The noise schedule of the paper: what is timed is the model, so that two numbers an image are enough.
    kept = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, device=DEVICE), 0)

    def denoise(model: nn.Module, image: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
        time_ = torch.randint(0, 1000, (len(image),), device=image.device)
        noise, share = torch.randn_like(image), kept[time_][:, None, None, None]
        said = model(share.sqrt() * image + (1 - share).sqrt() * noise, timestep=time_, class_labels=label).sample
        return F.mse_loss(said.float(), noise)

    latents = torch.randn(work.batch_size, 4, work.image_size, work.image_size, device=DEVICE)
    return Lossy(model, denoise), (latents, labels)


def run(work: Workload, steps: int) -> dict:
    torch.manual_seed(0)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    model, inputs = (make_of_images if work.image_size else make_of_text)(work)
    model = model.to(DEVICE).train()
    fused = {"fused": True} if DEVICE == "cuda" else {}
    adamw = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY, **fused)
    compiled = torch.compile(model)

    def several(count: int) -> tuple[float, float]:
        begin = time.perf_counter()
        for _ in range(count):
            with torch.autocast(DEVICE, torch.bfloat16):
                loss = compiled(*inputs)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), CLIP_NORM)
            adamw.step()
            adamw.zero_grad(set_to_none=True)
        value = loss.item()
        return value, (time.perf_counter() - begin) / count

    begin = time.perf_counter()
    several(WARM_STEPS)
    compile_seconds = time.perf_counter() - begin
    blocks = [several(steps) for _ in range(BLOCKS)]
    parameters = sum(parameter.numel() for parameter in model.parameters())
    seconds = [each for _, each in blocks]
    on_gpu = DEVICE == "cuda"
    return {
        "seconds": seconds,
        "compile_seconds": compile_seconds,
        "operations_per_second": work.operations(parameters) / statistics.median(seconds),
        "peak_memory_bytes": torch.cuda.max_memory_allocated() if on_gpu else 0,
        "loss": blocks[-1][0],
        "parameters": parameters,
        "device": torch.cuda.get_device_name() if on_gpu else "cpu",
        "packages": {"torch": torch.__version__},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("workload", choices=WORKLOADS)
    parser.add_argument("--steps", type=int, default=10, help="steps of each of the three blocks that are timed")
    parser.add_argument("--tiny", action="store_true", help="a size for a CPU, to try the script")
    arguments = parser.parse_args()
    work = WORKLOADS[arguments.workload]
    print(json.dumps(run(tiny(work) if arguments.tiny else work, arguments.steps)))


if __name__ == "__main__":
    main()
