"""Does label smoothing calibrate? A small ViT on 10,000 images of Fashion-MNIST, with and without.

The published claim (Müller 2019, "When does label smoothing help?", section 4 and table 3): a network that is trained
on smoothed labels is about as accurate, and its confidence is nearer to its accuracy, without any scaling afterwards.
The measure is the expected calibration error of 15 bins (Guo 2017).
Data: the first 10,000 training images and the 10,000 test images. Model and recipe: those of
configs/vit_fashion_mnist.py with 4 layers, without stochastic depth and flips, which regularise as well: the model is
to overfit.
`:smoothed` smooths labels by 0.1. `:tiny` needs neither network nor files and takes seconds.
Expected: see experiments/calibration. Hardware: one CPU core, 5 minutes a run.
"""

from ml_collections import ConfigDict

from research.configuration.variants import choose, tiny_images


def get_config(variant: str = "") -> ConfigDict:
    config = ConfigDict()
    config.seed = 0
    config.batch_size = 64
    config.num_epochs = 10.0
    config.task = dict(
        call="research.tasks.image_classification.ImageClassification",
        label_smoothing=0.0,
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
                num_layers=4,
                num_heads=4,
                intermediate_size=512,
                prefix_tokens=0,
                unroll=4,
            ),
        ),
    )
    config.data = data("train[:10000]")
    config.evals = dict(test=dict(call="research.evaluators.calibration.Calibration", data=data("test")))
    config.optimizer = dict(learning_rate=1e-3, schedule="cosine", warmup=0.05, weight_decay=0.05, clip_norm=1.0)
    config.mesh = dict(data=-1, fsdp=1, model=1)
    config.checkpoint = dict(every_steps=0, keep=1)
    config.log = dict(every_steps=50, evaluate_every_steps=312)
    return choose(variant, VARIANTS, config)


def data(split: str) -> dict:
    return dict(
        call="research.data.dataset.Dataset",
        source=dict(call="research.data.source.tfds", dataset="fashion_mnist", split=split),
        ops=[
            dict(call="research.data.image.Decode", channels=1),
            dict(call="research.data.image.Normalize", mean=[0.286], std=[0.353]),
        ],
        features=["image", "label"],
    )


def smoothed(config: ConfigDict) -> ConfigDict:
    config.task.label_smoothing = 0.1
    return config


def tiny(config: ConfigDict) -> ConfigDict:
    small = dict(hidden_size=32, num_layers=2, num_heads=2, intermediate_size=64, initializer_range=0.1)
    config.task.model.encoder.update(small)
    return tiny_images(config, size=28, channels=1)


VARIANTS = {"": lambda config: config, "smoothed": smoothed, "tiny": tiny}
