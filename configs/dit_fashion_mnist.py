"""Draws Fashion-MNIST, class by class, with guidance: a small diffusion transformer (Peebles 2022) on pixels.

Cosine schedule (Nichol 2021), v-prediction (Salimans 2022), classifier-free guidance (Ho 2022), 50 steps of DDIM (Song
2020), averaged weights. Not published on this data; what it reaches: experiments/dit_fashion_mnist. The distance
and the accuracy of the drawn images are those of the classifier of configs/vit_fashion_mnist.py, which is trained first
(or name another one: --config.evals.frechet.network.path=DIR).
Hardware: one CPU core, an hour. Variants: tiny, which needs neither network nor files and takes seconds.
"""

from ml_collections import ConfigDict

from research.configuration.variants import choose, tiny_images


def get_config(variant: str = "") -> ConfigDict:
    config = ConfigDict()
    config.seed = 0
    config.batch_size = 128
    config.num_steps = 3000
    config.task = dict(
        call="research.tasks.diffusion.Diffusion",
        label_dropout=0.1,
        process=dict(call="research.generation.diffusion.Gaussian", schedule="cosine", prediction="v"),
        sampling=dict(
            call="research.generation.diffusion.Sampling", sampler="ddim", steps=50, eta=0.0, guidance=2.0, clip=True
        ),
        model=dict(
            call="research.models.dit.DiT",
            image_size=28,
            patch_size=4,
            num_channels=1,
            num_classes=10,
            hidden_size=128,
            num_layers=6,
            num_heads=4,
            intermediate_size=512,
            learned_variance=False,
            unroll=6,
        ),
    )
    config.data = data("train", train=True)
    config.evals = dict(
        test=dict(call="research.evaluators.means.Means", data=data("test")),
        samples=dict(call="research.evaluators.samples.Samples", data=data("test")),
        frechet=dict(
            call="research.evaluators.frechet.Frechet",
            network=dict(call="research.evaluators.features.TrainedRun", path="runs/vit_fashion_mnist"),
            num_samples=1000,
            data=data("test"),
        ),
    )
    config.optimizer = dict(
        learning_rate=1e-3, schedule="cosine", warmup=200, weight_decay=0.0, clip_norm=1.0, average=0.999
    )
    config.mesh = dict(data=-1, fsdp=1, model=1)
    config.checkpoint = dict(every_steps=500, keep=2)
    config.log = dict(every_steps=20, evaluate_every_steps=1500)
    return choose(variant, VARIANTS, config)


def data(split: str, train: bool = False) -> dict:
    augment = [dict(call="research.data.image.RandomFlip")] if train else []
    return dict(
        call="research.data.dataset.Dataset",
        source=dict(call="research.data.source.tfds", dataset="fashion_mnist", split=split),
        ops=[
            dict(call="research.data.image.Decode", channels=1),
            *augment,
            dict(call="research.data.image.Normalize", mean=[0.5], std=[0.5]),
        ],
        features=["image", "label"],
    )


def tiny(config: ConfigDict) -> ConfigDict:
    config.task.model.update(num_classes=3, hidden_size=32, num_layers=2, num_heads=2, intermediate_size=128, unroll=2)
    config.task.sampling.steps = 4
    config.evals.frechet.network = dict(call="research.evaluators.frechet.Pixels")
    config.evals.frechet.num_samples = 16
    config = tiny_images(config, size=28, channels=1)
    config.optimizer.average = 0.9
    return config


VARIANTS = {"": lambda config: config, "tiny": tiny}
