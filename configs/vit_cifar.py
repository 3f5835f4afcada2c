"""Fine-tunes a published ViT-B/16 on CIFAR-10, or CIFAR-100 (`:cifar100`), as Dosovitskiy 2020 does.

The recipe is that of the authors' repository, vision_transformer (paper, appendix B.1.1): 384 x 384 pixels, to which
the positions are interpolated, inception crops of a twentieth of the area or more, mirroring, 10,000 steps of batch
512 by gradient descent with momentum 0.9, clipped to a norm of 1, without weight decay, rate 0.03 after 500 steps of
warm-up, a cosine; a new head that begins at zero there, and near zero here. Weights: ImageNet-21k.

Published top-1 accuracy (the same repository): CIFAR-10 99.02 %, CIFAR-100 92.06 %.

Not run here: the weights need the hub, the images a download. Some 1.7e18 multiplications and additions: 10 minutes on
8 H100 at 35 % of their peak; one H100, with microbatches=8, takes an hour and a half.
`:tiny` and `:cifar100-tiny` need neither network nor files and take seconds.
"""

from ml_collections import ConfigDict, FieldReference

from research.configuration.variants import choose, tiny_images


def get_config(variant: str = "") -> ConfigDict:
    path = FieldReference("hf://google/vit-base-patch16-224-in21k")
    config = ConfigDict()
    config.seed = 0
    config.batch_size = 512
    config.num_steps = 10_000
    config.task = dict(
        call="research.tasks.image_classification.ImageClassification",
        model=dict(call="research.pretrained.huggingface.image_classifier", path=path, dtype="bfloat16"),
    )
    config.init = dict(path=path, new_head=True)
    config.data = data("cifar10", "train", train=True)
    config.evals = dict(
        test=dict(call="research.evaluators.image_classification.ImageScores", data=data("cifar10", "test"))
    )
    config.optimizer = dict(
        direction=dict(call="optax.trace", decay=0.9),  # momentum
        learning_rate=0.03,
        schedule="cosine",
        warmup=500,
        clip_norm=1.0,
        microbatches=1,
    )
    config.mesh = dict(data=-1, fsdp=1, model=1)
    config.checkpoint = dict(every_steps=1000, keep=2)
    config.log = dict(every_steps=50, evaluate_every_steps=1000)
    return choose(variant, VARIANTS, config)


def data(dataset: str, split: str, train: bool = False) -> dict:
    crop = dict(call="research.data.image.RandomResizedCrop", size=384, area=(0.05, 1.0))
    augment = [crop, dict(call="research.data.image.RandomFlip")]
    return dict(
        call="research.data.dataset.Dataset",
        source=dict(call="research.data.source.tfds", dataset=dataset, split=split),
        ops=[
            dict(call="research.data.image.Decode"),
            *(augment if train else [dict(call="research.data.image.Resize", size=384)]),
            dict(call="research.data.image.Normalize", mean=[0.5], std=[0.5]),
        ],
        features=["image", "label"],
    )


def cifar100(config: ConfigDict) -> ConfigDict:
    for node in (config.data, config.evals.test.data):
        node.source.dataset = "cifar100"
    return config


def tiny(config: ConfigDict) -> ConfigDict:
    config.task.model = dict(
        call="research.models.vit.ImageClassifier",
        num_outputs=3,
        encoder=dict(
            call="research.models.vit.Encoder",
            image_size=32,
            patch_size=8,
            hidden_size=32,
            num_layers=2,
            num_heads=2,
            intermediate_size=64,
            initializer_range=0.1,
        ),
    )
    config.data.ops[1].update(size=32, area=(0.7, 1.0))  # thirty steps are too few for more
    config.evals.test.data.ops[1]["size"] = 32
    return tiny_images(config, size=40)


VARIANTS = {
    "": lambda config: config,
    "cifar100": cifar100,
    "tiny": tiny,
    "cifar100-tiny": lambda config: tiny(cifar100(config)),
}
