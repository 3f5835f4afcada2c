"""What both sides of the benchmark train: sizes, batches and recipe, as plain numbers."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Workload:
    """A model and its batches, which are random; bfloat16 products, float32 parameters, AdamW and clipping.

    Operations are counted as is usual: 6 a parameter that is multiplied and token, and 12 x layers x width x length a
    token for attention, whole where it is causal too.
    """

    # "gpt", "llama": next-token prediction; "bert": classification of two classes; "vit": classification of a thousand;
    # "dit": noise prediction on latents; "t5": from a text to another.
    kind: str
    hidden_size: int
    num_layers: int
    num_heads: int
    intermediate_size: int
    batch_size: int
    length: int  # tokens, or patches
    vocab_size: int = 0  # of texts
    target_length: int = 0
    num_kv_heads: int = 0
    image_size: int = 0
    patch_size: int = 0
    dropout: float = 0.0

    @property
    def unit(self) -> str:
        """What is counted."""
        return "images" if self.image_size else "tokens"

    @property
    def units(self) -> int:
        """How many a batch has."""
        return self.batch_size * (1 if self.image_size else self.length + self.target_length)

    def operations(self, parameters: int) -> float:
        """Return those of a step, of a model of so many parameters."""
        width, layers = self.hidden_size, self.num_layers
        if self.kind == "t5":  # half of the parameters see the input, half the target; three kinds of attention
            table = self.vocab_size * width
            blocks = (parameters - table) / 2.25  # a decoder's block has 1.5 times the products with parameters, about
            encoder, decoder = blocks * self.length, 1.25 * blocks * self.target_length
            pairs = self.length**2 + self.target_length**2 + self.length * self.target_length
            rest = table * self.target_length
            return self.batch_size * (6 * (encoder + decoder + rest) + 12 * layers * width * pairs)
        tables = {"gpt": self.length * width, "bert": (self.vocab_size + self.length) * width}.get(self.kind, 0)
        if self.kind == "llama":
            tables = self.vocab_size * width  # untied: one of two tables is multiplied
        if self.kind == "dit":
            # What makes shifts and scales is multiplied once an image, not once a patch.
            modulation = layers * 6 * width * width
            each = 6 * (parameters - modulation) + 12 * layers * width * self.length
            return self.batch_size * (self.length * each + 6 * modulation)
        return self.batch_size * self.length * (6 * (parameters - tables) + 12 * layers * width * self.length)


BASE = {"hidden_size": 768, "num_layers": 12, "num_heads": 12, "intermediate_size": 3072}
XL = {"hidden_size": 1152, "num_layers": 28, "num_heads": 16, "intermediate_size": 4608}
WORKLOADS = {
    "gpt2": Workload("gpt", **BASE, batch_size=32, length=1024, vocab_size=50304),
    "bert_base": Workload("bert", **BASE, batch_size=128, length=128, vocab_size=30522, dropout=0.1),
    "vit_b16": Workload("vit", **BASE, batch_size=128, length=197, image_size=224, patch_size=16),
    # TinyLlama (Zhang 2024)
    "llama_1b": Workload("llama", 2048, 22, 32, 5632, batch_size=4, length=2048, vocab_size=32000, num_kv_heads=4),
    "dit_xl2": Workload("dit", **XL, batch_size=64, length=256, image_size=32, patch_size=2),
    "t5_base": Workload("t5", **BASE, batch_size=32, length=512, target_length=128, vocab_size=32128, dropout=0.1),
}
LEARNING_RATE, WEIGHT_DECAY, CLIP_NORM = 1e-4, 0.1, 1.0
WARM_STEPS, BLOCKS = 4, 3


def tiny(work: Workload) -> Workload:
    """Return the same at a size that a CPU trains in a moment, to try the scripts."""
    image = {"image_size": 4 * work.patch_size, "length": 17 if work.kind == "vit" else 16} if work.image_size else {}
    sizes = {"hidden_size": 64, "num_layers": 2, "num_heads": 2, "intermediate_size": 128, "batch_size": 2}
    text = {"length": 32, "vocab_size": 512, "target_length": 16 if work.target_length else 0}
    return dataclasses.replace(work, **sizes, **(image or text), num_kv_heads=1 if work.num_kv_heads else 0)
