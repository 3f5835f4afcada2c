r"""Trains vision transformers on ImageNet from scratch: configs/vit_imagenet.py:VARIANT.

ViT by the recipe of Beyer 2022 ("Better plain ViT baselines for ImageNet-1k"), as big_vision's vit_s16_i1k.py has it:
fixed sine-cosine positions, mean pooling, inception crops, mirroring, RandAugment(2, 10), mixup 0.2, Adam at 1e-3 with
a warm-up of 10,000 steps and a cosine, batch 1024. Its weight decay of 1e-4 is not multiplied by the rate of 1e-3, ours
is: 0.1. The last percent of the training images is held out, as there.

  variant       model      parameters  epochs  published top-1          operations
  (default)     ViT-S/16       22.0 M      90  76.5 %                      3.1e18
  300           ViT-S/16       22.0 M     300  about 80 %                  1.0e19
  ti16          ViT-Ti/16       5.7 M      90  none by this recipe         8.5e17
  b16           ViT-B/16       86.4 M      90  none by this recipe         1.2e19
  l16           ViT-L/16      304.1 M      90  none by this recipe         4.2e19
  h14           ViT-H/14      631.7 M      90  none by this recipe         1.1e20
  deit          DeiT-S/16      22.1 M     300  79.8 % (from memory)        1.1e19
  distilled     DeiT-S/16      22.4 M     300  81.2 % (from memory)        2.4e19

`deit` and `distilled` follow Touvron 2021 ("Training data-efficient image transformers"): class token, learned
positions, label smoothing, mixup 0.8, CutMix 1.0, random erasing, drop path 0.1, weight decay 0.05. `distilled` has a
second token that learns what a teacher says; its teacher is the run in runs/vit_imagenet/b16 (--config.init.path is
another run of b16), where the paper's is a convolutional network, RegNetY-16GF, which taught better than a transformer.

What differs from the authors' code: kernels begin as normals of deviation 0.02; big_vision's head has one more layer;
DeiT also repeats augmentations within a batch, and its RandAugment(2, 9) varies the magnitude.

Not run here. `operations` are of the training images, forward and backward (of the teacher forward), multiplications
and additions; at 35 % of an H100's peak of 989e12 a second 8 of them train the default in 20 minutes, if their hosts
decode 95,000 images a second, and the authors' TPU-v3-8 took 6 to 7 hours. imagenet2012 must be prepared by TFDS, from
the archives that image-net.org gives to those who register.
`:tiny` and `:deit-tiny` need neither network nor files and take seconds.
"""

from collections.abc import Callable

from ml_collections import ConfigDict

from research.configuration.variants import choose, tiny_images

SIDE = 224
# Patch size, width, layers, heads.
SIZES = {
    "ti16": (16, 192, 12, 3),
    "s16": (16, 384, 12, 6),
    "b16": (16, 768, 12, 12),
    "l16": (16, 1024, 24, 16),
    "h14": (14, 1280, 32, 16),
}
BEYER = dict(mean=[0.5], std=[0.5])
DEIT = dict(mean=[0.485, 0.456, 0.406], std=[0.229, 0.224, 0.225])


def get_config(variant: str = "") -> ConfigDict:
    config = ConfigDict()
    config.seed = 0
    config.batch_size = 1024
    config.num_epochs = 90.0
    config.task = dict(
        call="research.tasks.image_classification.ImageClassification",
        mixup=0.2,
        model=classifier("s16"),
    )
    augment = [dict(call="research.data.augmentation.RandAugment", layers=2, magnitude=10)]
    set_data(config, augment, BEYER)
    config.optimizer = dict(
        learning_rate=1e-3,
        schedule="cosine",
        warmup=10_000,
        weight_decay=0.1,
        no_decay=["^(?!.*kernel$)"],  # kernels only
        clip_norm=1.0,
    )
    config.mesh = dict(data=-1, fsdp=1, model=1)
    config.plan = dict(topology="v3:4x4", examples=1_268_355)  # 99 % of 1,281,167
    config.checkpoint = dict(every_steps=1000, keep=2)
    config.log = dict(every_steps=50, evaluate_every_steps=2500)
    return choose(variant, VARIANTS, config)


def encoder(size: str, **fields: float | str) -> dict:
    patch_size, width, layers, heads = SIZES[size]
    return dict(
        call="research.models.vit.Encoder",
        image_size=SIDE,
        patch_size=patch_size,
        hidden_size=width,
        num_layers=layers,
        num_heads=heads,
        intermediate_size=4 * width,
        dtype="bfloat16",
        remat="full" if size in ("l16", "h14") else "none",
        **fields,
    )


def classifier(size: str) -> dict:
    return dict(
        call="research.models.vit.ImageClassifier",
        num_outputs=1000,
        pooling="mean",
        encoder=encoder(size, positions="sinusoidal", prefix_tokens=0),
    )


def set_data(config: ConfigDict, augment: list[dict], normalize: dict) -> None:
    def data(split: str, *ops: dict) -> dict:
        return dict(
            call="research.data.dataset.Dataset",
            source=dict(call="research.data.source.tfds", dataset="imagenet2012", split=split),
            ops=[*ops, dict(call="research.data.image.Normalize", **normalize)],
            features=["image", "label"],
        )

    def scores(split: str) -> dict:
        look = [
            dict(call="research.data.image.Decode", min_side=512),
            dict(call="research.data.image.Resize", size=256),
            dict(call="research.data.image.CenterCrop", size=SIDE),
        ]
        return dict(call="research.evaluators.image_classification.ImageScores", data=data(split, *look))

    train: list[dict] = [
        dict(call="research.data.image.DecodeRandomResizedCrop", size=SIDE, area=(0.05, 1.0)),
        dict(call="research.data.image.RandomFlip"),
        *augment,
    ]
    config.data = data("train[:99%]", *train)
    config.evals = dict(minival=scores("train[99%:]"), validation=scores("validation"))


def of_size(size: str) -> Callable[[ConfigDict], ConfigDict]:
    def change(config: ConfigDict) -> ConfigDict:
        config.task.model = classifier(size)
        if size in ("l16", "h14"):
            config.plan.topology = "v5e:8x8"
        return config

    return change


def longer(config: ConfigDict) -> ConfigDict:
    config.num_epochs = 300.0
    return config


def deit(config: ConfigDict) -> ConfigDict:
    config.num_epochs = 300.0
    config.task.update(mixup=0.8, cutmix=1.0, label_smoothing=0.1)
    config.task.model = dict(
        call="research.models.vit.ImageClassifier", num_outputs=1000, encoder=encoder("s16", drop_path=0.1)
    )
    augment = [
        dict(call="research.data.augmentation.RandAugment", layers=2, magnitude=9),
        dict(call="research.data.augmentation.RandomErasing", probability=0.25),
    ]
    set_data(config, augment, DEIT)
    config.optimizer = config.optimizer.to_dict() | dict(warmup=5 / 300, weight_decay=0.05, clip_norm=None)
    return config


def distilled(config: ConfigDict) -> ConfigDict:
    config = deit(config)
    config.task.call = "research.tasks.image_classification.Distillation"
    config.task.teacher = classifier("b16")
    config.task.model = dict(
        call="research.models.vit.DistilledClassifier",
        num_outputs=1000,
        encoder=encoder("s16", drop_path=0.1, prefix_tokens=2),
    )
    set_data(config, list(config.data.ops[2:-1]), BEYER)  # as the teacher knows them
    config.init = dict(
        call="research.configuration.transfer.load_params",
        path="runs/vit_imagenet/b16",
        renames=[["^", "teacher/"]],
        new=["^(?!teacher/)"],
    )
    config.optimizer.freeze = ["^teacher/"]
    return config


def tiny(config: ConfigDict) -> ConfigDict:
    config.task.model.encoder.update(hidden_size=32, num_layers=2, num_heads=2, intermediate_size=64)
    config.task.model.encoder.update(image_size=32, patch_size=8, dtype="float32", initializer_range=0.1)
    config.task.update(mixup=0.05, cutmix=0.0)
    config.data.ops[0].update(size=32, area=(0.7, 1.0))  # thirty steps are too few for more
    config.data.ops[2]["magnitude"] = 1
    for evaluator in config.evals.values():
        evaluator.data.ops[1]["size"], evaluator.data.ops[2]["size"] = 36, 32
    return tiny_images(config, size=40)


VARIANTS = {
    "": lambda config: config,
    "300": longer,
    **{size: of_size(size) for size in SIZES if size != "s16"},
    "deit": deit,
    "distilled": distilled,
    "tiny": tiny,
    "deit-tiny": lambda config: tiny(deit(config)),
}
