"""What both sides of the benchmark train: sizes, batches and recipe, as plain numbers."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Workload:
    """A model and its batches, which are random; the optimizer is AdamW on both sides, in float32."""

    # "gpt": next-token prediction; "bert": classification of two classes; "bert_mlm": masked tokens; "vit":
    # classification of ten classes.
    kind: str
    hidden_size: int
    num_layers: int
    num_heads: int
    intermediate_size: int
    batch_size: int
    dropout: float = 0.0
    vocab_size: int = 0  # of texts
    length: int = 0
    image_size: int = 0  # of images, which are grey and square
    patch_size: int = 0

    @property
    def unit(self) -> str:
        """What is counted."""
        return "tokens" if self.length else "images"

    @property
    def units(self) -> int:
        """How many a batch has."""
        return self.batch_size * (self.length or 1)


BERT_BASE = {"hidden_size": 768, "num_layers": 12, "num_heads": 12, "intermediate_size": 3072, "vocab_size": 30522}
WORKLOADS = {
    "gpt": Workload("gpt", 256, 4, 4, 1024, batch_size=16, vocab_size=260, length=256),
    "bert": Workload("bert", **BERT_BASE, batch_size=8, length=128, dropout=0.1),
    "bert_mlm": Workload("bert_mlm", **BERT_BASE, batch_size=8, length=128, dropout=0.1),
    "vit": Workload("vit", 192, 6, 3, 768, batch_size=128, image_size=28, patch_size=4),
}
MASKED = 20  # tokens of a row, of 128 that is 15 %
LEARNING_RATE, WEIGHT_DECAY, CLIP_NORM = 1e-4, 0.1, 1.0
WARM_STEPS = 3
