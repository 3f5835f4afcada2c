"""Finds trees in aerial photographs by a small DETR (Carion 2020) that has learnt to find garments.

It begins with the parameters of the run in runs/detr_garments/seed-0 (--config.init.path is another one), but for the
head that tells kinds apart; `:scratch` begins with none.

The data are the annotated images of the package deepforest (Weinstein 2019), cut into tiles of about 128 pixels; see
research/data/datasets/deepforest.py. Trained on four fifths of one image of Yellowstone (some 450 trees), validated on
the rest of it, tested on another image of Yellowstone, and on two of Florida and California, "other_sites".
What this can show: that the same loop learns from photographs, with crowded images, crops, turns and ignored boxes, and
how far so few trees carry. What it cannot: how good a detector of trees would be; published ones learn from thousands
of annotated and millions of machine-made boxes, and DETR from 118,000 images after pretraining.
Expected and reached: see experiments/detr_deepforest.
Hardware: one CPU core. Variants: scratch; tiny, which begins from scratch too, needs neither network nor files, and
takes seconds.
"""

from ml_collections import ConfigDict

from research.configuration.variants import choose, tiny_images

SIZE = 128


def get_config(variant: str = "") -> ConfigDict:
    config = ConfigDict()
    config.seed = 0
    config.batch_size = 16
    config.num_steps = 4000
    config.task = dict(
        call="research.tasks.detection.Detection",
        model=dict(
            call="research.models.detr.Detr",
            num_outputs=1,
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
    config.init = dict(
        call="research.configuration.transfer.load_params", path="runs/detr_garments/seed-0", new=("^class_head/",)
    )
    config.data = data("train", train=True)
    config.evals = dict(
        validation=dict(call="research.evaluators.coco.Coco", data=data("validation"), pictures=0),
        test=dict(call="research.evaluators.coco.Coco", data=data("test"), pictures=8),
        other_sites=dict(call="research.evaluators.coco.Coco", data=data("other_sites"), pictures=8),
    )
    config.optimizer = dict(learning_rate=3e-4, schedule="cosine", warmup=200, weight_decay=1e-4, clip_norm=0.1)
    config.mesh = dict(data=-1, fsdp=1, model=1)
    config.checkpoint = dict(every_steps=1000, keep=2)
    config.log = dict(every_steps=50, evaluate_every_steps=1000)
    return choose(variant, VARIANTS, config)


def data(split: str, train: bool = False) -> dict:
    augment = [
        dict(call="research.data.boxes.RandomFlip"),
        dict(call="research.data.boxes.RandomTurn"),
        dict(call="research.data.boxes.RandomCrop", least=96, most=SIZE, least_visible=0.3),
        dict(call="research.data.boxes.RandomResize", shorter=[96, 112, 128], longer=SIZE),
        dict(call="research.data.augmentation.ColorJitter", brightness=0.2, contrast=0.2, saturation=0.2),
    ]
    fit = [dict(call="research.data.boxes.Resize", shorter=SIZE, longer=SIZE)]
    return dict(
        call="research.data.dataset.Dataset",
        source=dict(call="research.data.source.tfds", dataset="deepforest", split=split),
        ops=[
            dict(call="research.data.image.Decode"),
            *(augment if train else fit),
            dict(call="research.data.image.Normalize"),
            dict(call="research.data.boxes.Targets", size=SIZE, max_boxes=16),
        ],
        features=["image", "pixel_mask", "boxes", "classes", "box_mask", "image_size"],
    )


def scratch(config: ConfigDict) -> ConfigDict:
    config.init = None
    config.optimizer.update(learning_rate=5e-4, warmup=500)
    return config


def tiny(config: ConfigDict) -> ConfigDict:
    config.task.model.update(hidden_size=32, num_layers=1, num_decoder_layers=2, num_heads=2, intermediate_size=64)
    config.task.model.update(num_queries=8)
    config.task.model.backbone.update(stem_width=16, widths=[16, 32])
    config = tiny_images(config, size=80, objects=3)
    for node in (config.data, *(evaluator.data for evaluator in config.evals.values())):
        for op in node.ops:
            op.update({key: 64 for key in ("longer", "size", "most") if key in op})
            op.update({"least": 40} if "least" in op else {})
            if "shorter" in op:
                op["shorter"] = [48, 64] if "RandomResize" in op["call"] else 64
        node.ops[-1]["max_boxes"] = 4
    return config


VARIANTS = {"": lambda config: config, "scratch": scratch, "tiny": tiny}
