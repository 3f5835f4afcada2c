"""Classifies Fashion-MNIST by a small ViT (Dosovitskiy 2020), trained from scratch.

Published: the data set's own table of benchmarks (Xiao 2017); see experiments/vit_fashion_mnist.
Hardware: one CPU core, three quarters of an hour. Variants: tiny, which needs neither network nor files and takes
seconds.
"""

from ml_collections import ConfigDict

from research.configuration.variants import choose, tiny_images


def get_config(variant: str = "") -> ConfigDict:
    config = ConfigDict()
    config.seed = 0
    config.batch_size = 64
    config.num_epochs = 20.0
    config.task = dict(
        call="research.tasks.image_classification.ImageClassification",
        label_smoothing=0.1,
        model=dict(
            call="research.models.vit.ImageClassifier",
            num_outputs=10,
            pooling="mean",
            encoder=dict(
                call="research.models.vit.Encoder",
                image_size=28,
                patch_size=7,
                num_channels=1,
                hidden_size=128,
                num_layers=6,
                num_heads=4,
                intermediate_size=512,
                prefix_tokens=0,
                drop_path=0.1,
                unroll=6,
            ),
        ),
    )
    config.data = data("train[:55000]", train=True)
    config.evals = dict(
        validation=dict(call="research.evaluators.classification.Scores", data=data("train[55000:]")),
        test=dict(call="research.evaluators.image_classification.ImageScores", data=data("test")),
    )
    config.optimizer = dict(learning_rate=1e-3, schedule="cosine", warmup=0.05, weight_decay=0.05, clip_norm=1.0)
    config.mesh = dict(data=-1, fsdp=1, model=1)
    config.checkpoint = dict(every_steps=860, keep=2)
    config.log = dict(every_steps=50, evaluate_every_steps=1720)
    return choose(variant, VARIANTS, config)


def data(split: str, train: bool = False) -> dict:
    augment = [dict(call="research.data.image.RandomFlip")] if train else []
    return dict(
        call="research.data.dataset.Dataset",
        source=dict(call="research.data.source.tfds", dataset="fashion_mnist", split=split),
        ops=[
            dict(call="research.data.image.Decode", channels=1),
            *augment,
            dict(call="research.data.image.Normalize", mean=[0.286], std=[0.353]),
        ],
        features=["image", "label"],
    )


def tiny(config: ConfigDict) -> ConfigDict:
    small = dict(hidden_size=32, num_layers=2, num_heads=2, intermediate_size=64, initializer_range=0.1)
    config.task.model.encoder.update(small)
    return tiny_images(config, size=28, channels=1)


VARIANTS = {"": lambda config: config, "tiny": tiny}
