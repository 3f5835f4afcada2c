"""What both sides of the benchmark train: sizes, batches and recipe, as plain numbers."""

SIZES = {
    "image_size": 28,
    "patch_size": 4,
    "num_channels": 1,
    "hidden_size": 192,
    "num_layers": 6,
    "num_heads": 3,
    "intermediate_size": 768,
}
CLASSES, BATCH_SIZE = 10, 128
LEARNING_RATE, WEIGHT_DECAY, CLIP_NORM = 1e-3, 0.05, 1.0
WARM_STEPS = 3
