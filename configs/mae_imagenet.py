"""Masked autoencoding of ImageNet (He 2021) by ViT-B, L and H: configs/mae_imagenet.py:SIZE-JOB.

  job        published top-1 accuracy: base  large   huge     epochs             operations
  pretrain                                                    1600    1.2e20 2.5e20 6.0e20
  finetune                             83.6   85.9   86.9   100 (50)  1.3e19 2.4e19 6.4e19
  probe                                68.0   75.8   76.6    90 (50)  4.0e18 7.9e18 2.1e19

Patches are 16 x 16 pixels, of huge 14 x 14; "" is base-pretrain. Numbers in brackets are for large and huge. The
accuracies are the paper's, as the authors' repository quotes them; its own code reached 83.66, 85.95 and
86.93, and 67.8, 76.0 and 77.2.

Pretraining (appendix A.1): 224 x 224 pixels, random crops of a fifth of the area or more, mirrored or not; 75 % hidden;
normalised pixels; AdamW of rate 1.5e-4 * batch / 256, betas 0.9 and 0.95, decay 0.05; 40 epochs of warm-up, then a
cosine. Write it to runs/mae_imagenet_SIZE, where the other jobs look (--config.init.path is another run).
Fine-tuning (the same, and the repository's FINETUNE.md): mean pooling, RandAugment of 9, random
erasing of 0.25, mixup 0.8 and CutMix 1.0, smoothing 0.1, layer-wise decay 0.65 (0.75), drop path 0.1 (0.2, 0.3), rate
5e-4 (1e-3) * batch / 256, 5 epochs of warm-up.

What differs from the authors' code: kernels begin as normals of deviation 0.02, not uniform by Xavier's rule; the mean
is taken after the last norm, not before a new one; the probe's rate is for AdamW, where they use LARS and normalise
features over the batch.

Not run here. `operations` are of 1,281,167 images an epoch, forward and backward, multiplications and additions; of the
probe forward alone. At 35 % of an H100's peak of 989e12 a second 8 of them pretrain in 12, 26 and 60 hours and
fine-tune in 1.4, 2.4 and 6.4. The authors' took 64 V100s 42 hours for 800 epochs of large, and 32 V100s 7 hours to
fine-tune base. imagenet2012 must be prepared by TFDS, from the archives that image-net.org gives to those who register.
`:tiny` and `:finetune-tiny` need neither network nor files and take seconds.
"""

from collections.abc import Callable

from ml_collections import ConfigDict

from research.configuration.variants import choose, tiny_images

SIDE, FILTER = 224, "bicubic"
# Patch size, width, layers, heads; drop path, and when fine-tuned epochs, rate for a batch of 256, layer decay.
SIZES = {
    "base": (16, 768, 12, 12, 0.1, 100.0, 5e-4, 0.65),
    "large": (16, 1024, 24, 16, 0.2, 50.0, 1e-3, 0.75),
    "huge": (14, 1280, 32, 16, 0.3, 50.0, 1e-3, 0.75),
}


def get_config(variant: str = "") -> ConfigDict:
    config = ConfigDict()
    config.seed = 0
    config.mesh = dict(data=-1, fsdp=1, model=1)
    config.plan = dict(topology="v3:8x8", examples=1_281_167)
    config.checkpoint = dict(every_steps=5000, keep=2)
    config.log = dict(every_steps=100, evaluate_every_steps=25000)
    return choose(variant, VARIANTS, config)


def encoder(size: str, **fields: float) -> dict:
    patch_size, width, layers, heads, *_ = SIZES[size]
    return dict(
        call="research.models.vit.Encoder",
        image_size=SIDE,
        patch_size=patch_size,
        hidden_size=width,
        num_layers=layers,
        num_heads=heads,
        intermediate_size=4 * width,
        positions="sinusoidal",
        dtype="bfloat16",
        remat="full" if size == "huge" else "none",
        **fields,
    )


def data(split: str, features: tuple[str, ...], *look: dict) -> dict:
    """Return a dataset whose images are cut out, and changed, by the ops `look`."""
    return dict(
        call="research.data.dataset.Dataset",
        source=dict(call="research.data.source.tfds", dataset="imagenet2012", split=split),
        ops=[
            dict(call="research.data.image.Decode"),
            *look,
            dict(call="research.data.image.Normalize", mean=[0.485, 0.456, 0.406], std=[0.229, 0.224, 0.225]),
        ],
        features=features,
    )


def crop(least: float) -> tuple[dict, dict]:
    """Return the ops that cut out at least this share of an image, and mirror it or not."""
    name = "research.data.image.RandomResizedCrop"
    cut = dict(call=name, size=SIDE, area=[least, 1.0], interpolation=FILTER)
    return cut, dict(call="research.data.image.RandomFlip")


def middle() -> tuple[dict, dict]:
    resize = dict(call="research.data.image.Resize", size=256, interpolation=FILTER)
    return resize, dict(call="research.data.image.CenterCrop", size=SIDE)


def pretrain(size: str) -> Callable[[ConfigDict], ConfigDict]:
    def change(config: ConfigDict) -> ConfigDict:
        config.batch_size, config.num_epochs = 4096, 1600.0
        config.task = dict(
            call="research.tasks.reconstruction.Reconstruction",
            model=dict(
                call="research.models.mae.MaskedAutoencoder",
                encoder=encoder(size),
                decoder_hidden_size=512,
                decoder_num_layers=8,
                decoder_num_heads=16,
                decoder_intermediate_size=2048,
                mask_ratio=0.75,
                normalize_targets=True,
            ),
        )
        config.data = data("train", ("image",), *crop(0.2))
        held_out = data("validation", ("image",), *middle())
        config.evals = dict(
            validation=dict(call="research.evaluators.means.Means", data=held_out),
            pictures=dict(call="research.evaluators.reconstructions.Reconstructions", data=held_out, count=12),
        )
        config.optimizer = dict(
            learning_rate=1.5e-4 * 4096 / 256,
            schedule="cosine",
            warmup=40 / 1600,
            b2=0.95,
            weight_decay=0.05,
            clip_norm=None,
        )
        return config

    return change


def classify(config: ConfigDict, size: str, epochs: float) -> ConfigDict:
    """Begin with the pretrained encoder of a size."""
    config.num_epochs = epochs
    validation = data("validation", ("image", "label"), *middle())
    config.evals = dict(validation=dict(call="research.evaluators.classification.Scores", data=validation))
    config.init = dict(
        call="research.configuration.transfer.load_params", path=f"runs/mae_imagenet_{size}", new=("^head",)
    )
    return config


def finetune(size: str) -> Callable[[ConfigDict], ConfigDict]:
    *_, drop_path, epochs, rate, decay = SIZES[size]

    def change(config: ConfigDict) -> ConfigDict:
        config = classify(config, size, epochs)
        config.batch_size = 1024
        config.task = dict(
            call="research.tasks.image_classification.ImageClassification",
            label_smoothing=0.1,
            mixup=0.8,
            cutmix=1.0,
            model=classifier(size, "mean", drop_path=drop_path),
        )
        augment = dict(call="research.data.augmentation.RandAugment", layers=2, magnitude=9)
        erase = dict(call="research.data.augmentation.RandomErasing", probability=0.25)
        config.data = data("train", ("image", "label"), *crop(0.08), augment, erase)
        config.optimizer = dict(
            learning_rate=rate * 1024 / 256,
            schedule="cosine",
            warmup=5 / epochs,
            weight_decay=0.05,
            clip_norm=None,
            layer_decay=decay,
        )
        return config

    return change


def probe(size: str) -> Callable[[ConfigDict], ConfigDict]:
    def change(config: ConfigDict) -> ConfigDict:
        config = classify(config, size, 90.0 if size == "base" else 50.0)
        config.batch_size = 16384
        config.task = dict(call="research.tasks.classification.Classification", model=classifier(size, "token"))
        config.data = data("train", ("image", "label"), *crop(0.08))
        config.optimizer = dict(
            learning_rate=1e-2, schedule="cosine", warmup=10 / config.num_epochs, clip_norm=None, freeze=("^encoder/",)
        )
        return config

    return change


def classifier(size: str, pooling: str, **fields: float) -> dict:
    return dict(
        call="research.models.vit.ImageClassifier", num_outputs=1000, pooling=pooling, encoder=encoder(size, **fields)
    )


def tiny(config: ConfigDict) -> ConfigDict:
    """Small images, of which small ones are cut out."""
    config.task.model.encoder.update(image_size=32, patch_size=8, hidden_size=32, num_layers=2, num_heads=2)
    config.task.model.encoder.update(intermediate_size=64, dtype="float32", initializer_range=0.1)
    if "decoder_num_layers" in config.task.model:
        config.task.model.update(
            decoder_hidden_size=32, decoder_num_layers=1, decoder_num_heads=2, decoder_intermediate_size=64
        )
    if "mixup" in config.task:
        config.task.update(mixup=0.05, cutmix=0.0)  # thirty steps are too few for more
        config.data.ops[1]["area"], config.data.ops[3]["magnitude"] = (0.7, 1.0), 1
    config = tiny_images(config, size=36)
    for node in [config.data, *(evaluator.data for evaluator in config.evals.values())]:
        for op in node.ops:
            if "size" in op:
                op["size"] = 32
    return config


JOBS = {"pretrain": pretrain, "finetune": finetune, "probe": probe}
VARIANTS = {
    "": pretrain("base"),
    **{f"{size}-{job}": JOBS[job](size) for size in SIZES for job in JOBS},
    "tiny": lambda config: tiny(pretrain("base")(config)),
    "finetune-tiny": lambda config: tiny(finetune("base")(config)),
}
