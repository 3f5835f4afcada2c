"""Draws ImageNet at 256 x 256 pixels: DiT-XL/2 and its smaller kin (Peebles 2022), on latents. Not run.

Published FID-50K (tables 2 and 4): XL/2 2.27 after 7M steps, with guidance 1.5 and 250 steps of DDPM; after 400,000
steps and without guidance XL/2 19.5, B/4 68.4. Parameters: XL/2 675 million, L/2 458, B/2 130, S/2 33.

The data are latents, for there is no autoencoder here: encode ImageNet's training images, cropped to 256 x 256 and also
mirrored, with that of Stable Diffusion (32 x 32 x 4, one sample each, times 0.18215), and write them where
config.data.source.path says, in the form that research/data/latents.py describes. --mode=generate gives latents back
(an .npz file), which the same autoencoder decodes. The published code guides three of the four channels, ours all.

Cost: 118.6 billion multiplications an image forward (XL/2), three times that in training: 3.6e19 for 400,000 steps of
256 images. As published, 5.7 steps a second on a TPU v3-256 pod: 20 hours, and 14 days for 7M steps.
Variants: xl2 (the default), xl4, xl8, l2, l4, l8, b2, b4, b8, s2, s4, s8; published, XL/2 with the published weights,
to draw with or to train further; tiny, which needs no files and takes seconds.
"""

from ml_collections import ConfigDict

from research.configuration.variants import choose, tiny_images

PUBLISHED = "hf://facebook/DiT-XL-2-256/transformer/"
SIZES = {
    "s": dict(hidden_size=384, num_layers=12, num_heads=6, intermediate_size=1536),
    "b": dict(hidden_size=768, num_layers=12, num_heads=12, intermediate_size=3072),
    "l": dict(hidden_size=1024, num_layers=24, num_heads=16, intermediate_size=4096),
    "xl": dict(hidden_size=1152, num_layers=28, num_heads=16, intermediate_size=4608),
}


def get_config(variant: str = "") -> ConfigDict:
    config = ConfigDict()
    config.seed = 0
    config.batch_size = 256
    config.num_steps = 400_000
    config.task = dict(
        call="research.tasks.diffusion.Diffusion",
        label_dropout=0.1,
        process=dict(
            call="research.generation.diffusion.Gaussian", schedule="linear", prediction="epsilon", num_steps=1000
        ),
        sampling=dict(
            call="research.generation.diffusion.Sampling", sampler="ddpm", steps=250, eta=0.0, guidance=1.5, clip=False
        ),
        model=dict(
            call="research.models.dit.DiT",
            image_size=32,
            patch_size=2,
            num_channels=4,
            num_classes=1000,
            **SIZES["xl"],
            learned_variance=True,
            dtype="bfloat16",
            remat="full",
        ),
    )
    config.data = data("latents/imagenet_256", "train")
    config.evals = dict(
        validation=dict(
            call="research.evaluators.means.Means", data=data(config.data.source.get_ref("path"), "validation")
        ),
    )
    config.optimizer = dict(
        learning_rate=1e-4, schedule="constant", warmup=0, weight_decay=0.0, clip_norm=None, average=0.9999
    )
    config.mesh = dict(data=-1, fsdp=1, model=1)
    config.plan = dict(
        topology="v3:8x8",
        published=dict(chip="v3", chips=128, steps_per_second=5.7, source="Peebles 2022, section 4"),
    )
    config.checkpoint = dict(every_steps=10_000, keep=2)
    config.log = dict(every_steps=100, evaluate_every_steps=50_000)
    return choose(variant, VARIANTS, config)


def data(path: str, split: str) -> dict:
    return dict(
        call="research.data.dataset.Dataset",
        source=dict(call="research.data.latents.latents", path=path, split=split),
        features=["image", "label"],
    )


def size(name: str, patch_size: int):
    def change(config: ConfigDict) -> ConfigDict:
        config.task.model.update(SIZES[name], patch_size=patch_size)
        return config

    return change


def published(config: ConfigDict) -> ConfigDict:
    call = "research.pretrained.huggingface.load_model"
    config.task.model = dict(call=call, path=PUBLISHED, kind="denoiser", dtype="bfloat16", remat="full")
    config.init = dict(path=PUBLISHED)
    return config


def tiny(config: ConfigDict) -> ConfigDict:
    """Shapes, whose pixels stand in for latents."""
    sizes = dict(image_size=16, patch_size=4, num_channels=1, num_classes=3, dtype="float32", remat="none")
    config.task.model.update(sizes, hidden_size=32, num_layers=2, num_heads=2, intermediate_size=128)
    config.task.sampling.steps = 4
    config = tiny_images(config, size=16, channels=1)
    for node in (config.data, config.evals.validation.data):
        node.ops = [
            dict(call="research.data.image.Decode", channels=1),
            dict(call="research.data.image.Normalize", mean=[0.5], std=[0.5]),
        ]
    config.optimizer.average = 0.9
    return config


VARIANTS = {"": lambda config: config}
VARIANTS |= {f"{name}{patch}": size(name, patch) for name in SIZES for patch in (2, 4, 8)}
VARIANTS |= {"published": published, "tiny": tiny}
