"""What both sides of the benchmark train: sizes, batches and recipe, as plain numbers."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Workload:
    """A model and its batches; the optimizer is AdamW on both sides, in float32, on random tokens."""

    kind: str  # "gpt": next-token prediction; "bert": classification of two classes; "bert_mlm": masked tokens
    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    intermediate_size: int
    batch_size: int
    length: int
    dropout: float


WORKLOADS = {
    "gpt": Workload("gpt", 260, 256, 4, 4, 1024, batch_size=16, length=256, dropout=0.0),
    "bert": Workload("bert", 30522, 768, 12, 12, 3072, batch_size=8, length=128, dropout=0.1),
    "bert_mlm": Workload("bert_mlm", 30522, 768, 12, 12, 3072, batch_size=8, length=128, dropout=0.1),
}
MASKED = 20  # tokens of a row, of 128 that is 15 %
LEARNING_RATE, WEIGHT_DECAY, CLIP_NORM = 1e-4, 0.1, 1.0
WARM_STEPS = 3
