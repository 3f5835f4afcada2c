"""Masked autoencoding (He 2021) of Fashion-MNIST by a small ViT, and what it is worth where labels are few.

Variants:

  (default)   pretrains on 55,000 images without their labels; write it to runs/mae_fashion_mnist
  finetune    fine-tunes that run's encoder with 600 labels, 1 % (--config.init.path is another run)
  scratch     the same model and data, from random parameters
  probe       trains a linear layer on that run's encoder, which stays as it is, with the same 600 labels
  tiny, finetune-tiny, probe-tiny   need neither network nor files and take seconds
"""

from ml_collections import ConfigDict

from research.configuration.variants import choose, tiny_images

LAYERS = 6


def get_config(variant: str = "") -> ConfigDict:
    config = ConfigDict()
    config.seed = 0
    config.batch_size = 128
    config.num_epochs = 20.0
    config.task = dict(
        call="research.tasks.reconstruction.Reconstruction",
        model=dict(
            call="research.models.mae.MaskedAutoencoder",
            encoder=dict(
                call="research.models.vit.Encoder",
                image_size=28,
                patch_size=4,
                num_channels=1,
                hidden_size=128,
                num_layers=LAYERS,
                num_heads=4,
                intermediate_size=512,
                positions="sinusoidal",
                initializer_range=0.05,
                unroll=LAYERS,
            ),
            decoder_hidden_size=64,
            decoder_num_layers=2,
            decoder_num_heads=2,
            decoder_intermediate_size=256,
            mask_ratio=0.75,
            normalize_targets=True,
        ),
    )
    config.data = data("train[:55000]", train=True)
    config.evals = dict(
        validation=dict(call="research.evaluators.means.Means", data=data("train[55000:]")),
        test=dict(call="research.evaluators.reconstructions.Reconstructions", data=data("test"), count=12),
    )
    config.optimizer = dict(
        learning_rate=1e-3, schedule="cosine", warmup=0.05, b2=0.95, weight_decay=0.05, clip_norm=1.0
    )
    config.mesh = dict(data=-1, fsdp=1, model=1)
    config.checkpoint = dict(every_steps=1000, keep=2)
    config.log = dict(every_steps=50, evaluate_every_steps=1720)
    return choose(variant, VARIANTS, config)


def data(split: str, train: bool = False, features: tuple[str, ...] = ("image",)) -> dict:
    augment = [dict(call="research.data.image.RandomFlip")] if train else []
    return dict(
        call="research.data.dataset.Dataset",
        source=dict(call="research.data.source.tfds", dataset="fashion_mnist", split=split),
        ops=[
            dict(call="research.data.image.Decode", channels=1),
            *augment,
            dict(call="research.data.image.Normalize", mean=[0.286], std=[0.353]),
        ],
        features=features,
    )


def classify(config: ConfigDict) -> ConfigDict:
    """Make a classifier of the encoder, trained on 600 labels."""
    encoder = config.task.model.encoder
    config.task = dict(
        call="research.tasks.classification.Classification",
        label_smoothing=0.1,
        model=dict(call="research.models.vit.ImageClassifier", num_outputs=10, pooling="mean", encoder=encoder),
    )
    both = ("image", "label")
    config.data = data("train[:600]", train=True, features=both)
    config.evals = dict(
        validation=dict(call="research.evaluators.classification.Scores", data=data("train[55000:]", features=both)),
        test=dict(call="research.evaluators.classification.Scores", data=data("test", features=both)),
    )
    config.batch_size = 60
    config.num_epochs = 100.0
    config.log = dict(every_steps=20, evaluate_every_steps=500)
    return config


def finetune(config: ConfigDict) -> ConfigDict:
    config = classify(config)
    config.task.model.encoder.drop_path = 0.1
    config.init = dict(
        call="research.configuration.transfer.load_params", path="runs/mae_fashion_mnist", new=("^head",)
    )
    config.optimizer.update(learning_rate=1e-3, warmup=0.1, b2=0.999, layer_decay=0.75)
    return config


def scratch(config: ConfigDict) -> ConfigDict:
    """Without layer-wise decay, which would keep random layers as they are."""
    config = finetune(config)
    config.init = None
    config.optimizer.layer_decay = None
    return config


def probe(config: ConfigDict) -> ConfigDict:
    config = classify(config)
    config.task.label_smoothing = 0.0
    config.init = dict(
        call="research.configuration.transfer.load_params", path="runs/mae_fashion_mnist", new=("^head",)
    )
    config.optimizer = dict(learning_rate=1e-2, schedule="cosine", warmup=0.1, clip_norm=None, freeze=("^encoder/",))
    return config


def tiny(config: ConfigDict) -> ConfigDict:
    encoder = config.task.model.encoder
    encoder.update(hidden_size=32, num_layers=2, num_heads=2, intermediate_size=64, initializer_range=0.1)
    if "decoder_num_layers" in config.task.model:
        config.task.model.update(decoder_hidden_size=32, decoder_num_layers=1, decoder_intermediate_size=64)
    config = tiny_images(config, size=28, channels=1)
    if "freeze" in config.optimizer:
        config.optimizer.learning_rate = 0.1  # a linear layer can take it, and has but thirty steps
    return config


VARIANTS = {
    "": lambda config: config,
    "finetune": finetune,
    "scratch": scratch,
    "probe": probe,
    "tiny": tiny,
    "finetune-tiny": lambda config: tiny(finetune(config)),
    "probe-tiny": lambda config: tiny(probe(config)),
}
