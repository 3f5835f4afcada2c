"""Fine-tunes a published encoder of DINOv2's architecture on a little of Fashion-MNIST, in the manner of DeiT.

The weights are those of a small DINOv2 (Oquab 2023: 12 layers, 384 wide, patches of 14 pixels) that an ONNX file in the
Python package registry holds; see `research/pretrained/onnx.py`. Garments of 28 x 28 pixels are made 56 x 56, so that
16 patches stand in place of the 1,369 that the positions are learned for. AdamW with layer-wise decay, label smoothing,
mixup, drop path and crops of the padded image, as DeiT fine-tunes (Touvron 2021), on 6,000 of the 60,000 images.

Variants:

  (default)  fine-tunes all of it
  probe      trains the linear layer only, on what the encoder says of an image; the encoder stays as it is
  scratch    the same model from random parameters, for comparison
  tiny, probe-tiny   need neither network nor files and take seconds

Published: nothing on these data and weights. Hardware: 2 CPU cores.
"""

from ml_collections import ConfigDict

from research.configuration.variants import DINOV2_SMALL, choose, tiny_images

LAYERS, SIDE = 12, 56


def get_config(variant: str = "") -> ConfigDict:
    config = ConfigDict()
    config.seed = 0
    config.batch_size = 64
    config.num_epochs = 4.0
    config.task = dict(
        call="research.tasks.image_classification.ImageClassification",
        label_smoothing=0.1,
        mixup=0.2,
        model=dict(
            call="research.pretrained.huggingface.image_classifier",
            path=DINOV2_SMALL,
            num_outputs=10,
            drop_path=0.1,
            unroll=LAYERS,
        ),
    )
    config.init = dict(path=DINOV2_SMALL)
    config.data = data("train[:6000]", train=True)
    config.evals = dict(
        validation=dict(
            call="research.evaluators.image_classification.ImageScores", data=data("train[58000:]"), mistakes=0
        ),
        test=dict(call="research.evaluators.image_classification.ImageScores", data=data("test")),
    )
    config.optimizer = dict(
        learning_rate=5e-4,
        schedule="cosine",
        warmup=0.1,
        weight_decay=0.05,
        clip_norm=1.0,
        layer_decay=0.75,
    )
    config.mesh = dict(data=-1, fsdp=1, model=1)
    config.checkpoint = dict(every_steps=200, keep=1)
    config.log = dict(every_steps=10, evaluate_every_steps=0)
    return choose(variant, VARIANTS, config)


def data(split: str, train: bool = False) -> dict:
    crop = dict(call="research.data.image.RandomCrop", size=28, padding=2)
    augment = [crop, dict(call="research.data.image.RandomFlip")] if train else []
    return dict(
        call="research.data.dataset.Dataset",
        source=dict(call="research.data.source.tfds", dataset="fashion_mnist", split=split),
        ops=[
            dict(call="research.data.image.Decode"),
            *augment,
            dict(call="research.data.image.Resize", size=SIDE, interpolation="bicubic"),
            dict(
                call="research.data.image.Normalize", mean=[0.485, 0.456, 0.406], std=[0.229, 0.224, 0.225]
            ),  # of ImageNet, as the encoder saw them
        ],
        features=["image", "label"],
    )


def probe(config: ConfigDict) -> ConfigDict:
    config.task.update(label_smoothing=0.0, mixup=0.0)
    config.task.model.drop_path = 0.0
    config.optimizer = dict(learning_rate=3e-3, schedule="cosine", warmup=0.1, clip_norm=None, freeze=("^encoder/",))
    return config


def scratch(config: ConfigDict) -> ConfigDict:
    """Without layer-wise decay, which would keep random layers as they are."""
    config.init = None
    config.optimizer.layer_decay = None
    return config


def tiny(config: ConfigDict) -> ConfigDict:
    config.task.model = dict(
        call="research.models.vit.ImageClassifier",
        num_outputs=3,
        pooling="token_and_mean",
        encoder=dict(
            call="research.models.vit.Encoder",
            image_size=42,
            patch_size=14,
            hidden_size=32,
            num_layers=2,
            num_heads=2,
            intermediate_size=64,
            layer_scale=1.0,
            initializer_range=0.1,
        ),
    )
    config.task.mixup = 0.0  # thirty steps are too few for it
    return tiny_images(config, size=28)


VARIANTS = {
    "": lambda config: config,
    "probe": probe,
    "scratch": scratch,
    "tiny": tiny,
    "probe-tiny": lambda config: tiny(probe(config)),
}
