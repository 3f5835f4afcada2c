"""Finds garments by a small DETR (Carion 2020), trained from scratch on composited scenes.

Scenes of 96 x 96 grey pixels show one to five pictures of Fashion-MNIST (Xiao 2017), of ten kinds, on textured
backgrounds; see research/data/datasets/garment_scenes.py. Test scenes show garments that no training scene has.
The model takes three equal channels and asks sixteen times, so that detr_deepforest.py can begin with what it learns.
No publication reports these scenes. Expected and reached: see experiments/detr_garments.
Hardware: one CPU core. Variants: tiny, which needs neither network nor files and takes seconds.
"""

from ml_collections import ConfigDict

from research.configuration.variants import choose, tiny_images

SIZE = 96


def get_config(variant: str = "") -> ConfigDict:
    config = ConfigDict()
    config.seed = 0
    config.batch_size = 16
    config.num_epochs = 18.0
    config.task = dict(
        call="research.tasks.detection.Detection",
        model=dict(
            call="research.models.detr.Detr",
            num_outputs=10,
            num_queries=16,
            hidden_size=128,
            num_layers=2,
            num_decoder_layers=3,
            num_heads=4,
            intermediate_size=256,
            input_positions=True,
            dropout=0.0,
            unroll=3,
            backbone=dict(
                call="research.models.resnet.ResNet",
                depths=[1, 1],
                widths=[64, 128],
                block="basic",
                stem_width=32,
                stem_stride=4,
                stem_pool=False,
                norm="group",
            ),
        ),
    )
    config.data = data("train", train=True)
    config.evals = dict(
        validation=dict(call="research.evaluators.coco.Coco", data=data("validation"), pictures=0),
        test=dict(call="research.evaluators.coco.Coco", data=data("test"), pictures=8),
    )
    config.optimizer = dict(learning_rate=5e-4, schedule="cosine", warmup=500, weight_decay=1e-4, clip_norm=0.1)
    config.mesh = dict(data=-1, fsdp=1, model=1)
    config.checkpoint = dict(every_steps=1500, keep=2)
    config.log = dict(every_steps=50, evaluate_every_steps=1500)
    return choose(variant, VARIANTS, config)


def data(split: str, train: bool = False) -> dict:
    augment = [dict(call="research.data.boxes.RandomFlip")] if train else []
    return dict(
        call="research.data.dataset.Dataset",
        source=dict(call="research.data.source.tfds", dataset="garment_scenes", split=split),
        ops=[
            dict(call="research.data.image.Decode", channels=3),
            *augment,
            dict(call="research.data.image.Normalize", mean=[0.3], std=[0.2]),
            dict(call="research.data.boxes.Targets", size=SIZE, max_boxes=5),
        ],
        features=["image", "pixel_mask", "boxes", "classes", "box_mask", "image_size"],
    )


def tiny(config: ConfigDict) -> ConfigDict:
    config.task.model.update(hidden_size=32, num_layers=1, num_decoder_layers=2, num_heads=2, intermediate_size=64)
    config.task.model.backbone.update(stem_width=16, widths=[16, 32])
    return tiny_images(config, size=SIZE, objects=3)


VARIANTS = {"": lambda config: config, "tiny": tiny}
