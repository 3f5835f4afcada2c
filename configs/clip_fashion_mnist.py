"""Learns images of garments and their names together, as CLIP does (Radford 2021), and classifies by prompts.

The texts are made of the ten classes and of six templates, so that this is a test of the method, not of CLIP's claim to
classes that it never saw: nothing but prompts tells the model which class is meant.
Hardware: one CPU core, five minutes where nothing else runs.
Variants: siglip, with a loss of pairs (Zhai 2023); tiny, which needs neither network nor files and takes seconds;
siglip-tiny.
"""

from ml_collections import ConfigDict

from research.configuration.variants import choose, tiny_images

CLASSES = (
    *("t-shirt", "pair of trousers", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag"),
    "ankle boot",
)
TEMPLATES = ("a {}", "a photo of a {}", "a picture of a {}", "a small photo of a {}", "a grey photo of a {}", "one {}")
UNSEEN = ("here is a {}",)
LENGTH = 40  # tokens


def get_config(variant: str = "") -> ConfigDict:
    config = ConfigDict()
    config.seed = 0
    config.batch_size = 128
    config.num_epochs = 2.0
    config.tokenizer = dict(call="research.data.tokenizer.byte_level")
    config.task = dict(
        call="research.tasks.contrastive.Contrastive",
        model=dict(
            call="research.models.clip.Clip",
            projection_size=64,
            end_id=2,
            image=dict(
                call="research.models.vit.Encoder",
                image_size=28,
                patch_size=7,
                num_channels=1,
                hidden_size=64,
                num_layers=4,
                num_heads=4,
                intermediate_size=256,
                patch_bias=False,
                embedding_norm=True,
                initializer_range=0.1,
            ),
            text=dict(
                call="research.models.clip.TextEncoder",
                hidden_size=64,
                num_layers=2,
                num_heads=4,
                intermediate_size=128,
                max_positions=LENGTH,
                initializer_range=0.1,
            ),
        ),
    )
    config.data = data("train", train=True)
    config.evals = dict(
        test=evaluation(TEMPLATES),
        unseen_prompt=evaluation(UNSEEN),
    )
    config.optimizer = dict(learning_rate=1e-3, schedule="cosine", warmup=0.05, weight_decay=0.05, clip_norm=1.0)
    config.mesh = dict(data=-1, fsdp=1, model=1)
    config.checkpoint = dict(every_steps=500, keep=2)
    config.log = dict(every_steps=50)
    return choose(variant, VARIANTS, config)


def data(split: str, train: bool = False) -> dict:
    drawn = [dict(call="research.data.image.RandomFlip")] if train else []
    text = [
        dict(call="research.data.captions.ClassCaptions", classes=CLASSES, templates=TEMPLATES, max_length=LENGTH),
    ]
    return dict(
        call="research.data.dataset.Dataset",
        source=dict(call="research.data.source.tfds", dataset="fashion_mnist", split=split),
        ops=[
            dict(call="research.data.image.Decode", channels=1),
            *drawn,
            dict(call="research.data.image.Normalize", mean=[0.286], std=[0.353]),
            *(text if train else []),
        ],
        features=["image", "input_ids", "attention_mask"] if train else ["image", "label"],
    )


def evaluation(templates: tuple[str, ...]) -> dict:
    return dict(
        call="research.evaluators.zero_shot.Classification",
        data=data("test"),
        classes=CLASSES,
        templates=templates,
        max_length=LENGTH,
    )


def siglip(config: ConfigDict) -> ConfigDict:
    config.task.loss_kind = "sigmoid"
    model = config.task.model
    del model.projection_size, model.end_id
    model.call = "research.models.clip.SigLip"
    model.image.update(prefix_tokens=0, patch_bias=True, embedding_norm=False)
    model.text.causal = False
    config.data.features = ["image", "input_ids"]
    return config


def tiny(config: ConfigDict) -> ConfigDict:
    config.task.model.image.update(hidden_size=32, num_layers=2, num_heads=2, intermediate_size=64)
    config.task.model.text.update(hidden_size=32, num_layers=1, num_heads=2, intermediate_size=64)
    tokenizer = config.tokenizer
    config = tiny_images(config, size=28, channels=1)
    config.batch_size, config.num_steps = 16, 100  # contrasts need more examples, and more steps, than classes do
    config.optimizer.learning_rate = 2e-3
    config.log.evaluate_every_steps = 50
    config.tokenizer = tokenizer
    names = ("disc", "square", "cross")
    config.data.ops[-1]["classes"] = names
    for evaluator in config.evals.values():
        evaluator.classes = names
    return config


VARIANTS = {
    "": lambda config: config,
    "siglip": siglip,
    "tiny": tiny,
    "siglip-tiny": lambda config: tiny(siglip(config)),
}
