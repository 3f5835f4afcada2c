"""DETR with a ResNet-50 (Carion 2020) on COCO 2017: the recipe, which was not run here, and the published weights.

Published (table 1, and the README of the authors' code): 42.0 AP on the 5,000 validation images after 500 epochs, 39.5
after 150. Expected of `:published`, which trains nothing and evaluates hf://facebook/detr-resnet-50: 42.0 AP.
Recipe: AdamW, 1e-4 and 1e-5 for the backbone, both a tenth of it for the last fifth of the run (in `:short`, 150
epochs, the last third), weight decay 1e-4, gradients clipped to 0.1, batches of 64, 100 queries, dropout 0.1. Images
are flipped, their shorter side resized to 480, 512, ..., 800 and the longer one to at most 1,333; half of them are
cropped first. The backbone begins as torchvision's ResNet-50, trained on ImageNet (hf://timm/resnet50.tv_in1k); its
norms, first convolution and first stage stay as they are.
Differs: images are padded to 1,333 x 1,333, not to the largest of a batch, which costs 1.7 times as much where they are
4 to 3; classes keep their 91 numbers, of which 11 are never used.
Hardware: the paper's runs took 3 days for 300 epochs on 16 V100. At its 86 billion multiplications and additions an
image, 500 epochs are 3e19 floating-point operations, 5e19 with the padding: estimated a day on 8 A100 at a quarter of
their peak.
Needs TFDS's coco/2017, prepared where there is TensorFlow: `tfds build coco/2017 --file_format=array_record`.
Variants: short, published, tiny, which needs neither network nor files and takes seconds.
"""

from ml_collections import ConfigDict

from research.configuration.variants import choose, tiny_images

SHORTER = list(range(480, 801, 32))
LONGER = 1333
# COCO numbers its 80 classes from 1 to 90, and so do the published weights.
IDS = [number for number in range(1, 91) if number not in (12, 26, 29, 30, 45, 66, 68, 69, 71, 83)]
PUBLISHED = "hf://facebook/detr-resnet-50"


def get_config(variant: str = "") -> ConfigDict:
    config = ConfigDict()
    config.seed = 0
    config.batch_size = 64
    config.num_epochs = 500.0
    config.task = dict(
        call="research.tasks.detection.Detection",
        model=dict(
            call="research.models.detr.Detr",
            num_outputs=91,
            dtype="bfloat16",
            backbone=dict(call="research.models.resnet.ResNet"),
        ),
    )
    config.init = dict(call="research.pretrained.backbone.load_backbone", path="hf://timm/resnet50.tv_in1k")
    config.data = data("train", train=True)
    config.evals = dict(validation=dict(call="research.evaluators.coco.Coco", data=data("validation"), pictures=8))
    config.optimizer = dict(
        learning_rate=1e-4,
        schedule="step",
        drop_at=0.8,
        end_factor=0.1,
        weight_decay=1e-4,
        no_decay=(),
        clip_norm=0.1,
        learning_rate_multipliers=[("^backbone/", 0.1)],
        freeze=("^backbone/.*norm", "^backbone/stem", "^backbone/stage1"),
    )
    config.mesh = dict(data=-1, fsdp=1, model=1)
    config.plan = dict(
        topology="v5e:4x4",
        examples=118_287,
        published=dict(chip="V100", chips=16, hours=72, epochs=300, source="Carion 2020, section 4"),
    )
    config.checkpoint = dict(every_steps=1849, keep=2)
    config.log = dict(every_steps=50, evaluate_every_steps=18490)  # 10 epochs
    return choose(variant, VARIANTS, config)


def data(split: str, train: bool = False) -> dict:
    resize = dict(call="research.data.boxes.RandomResize", shorter=SHORTER, longer=LONGER)
    crop = [
        dict(call="research.data.boxes.RandomResize", shorter=[400, 500, 600], longer=LONGER),
        dict(call="research.data.boxes.RandomCrop", least=384, most=600),
        resize,
    ]
    augment = [
        dict(call="research.data.boxes.RandomFlip"),
        dict(call="research.data.boxes.Choose", choices=[[resize], crop]),
    ]
    fit = [dict(call="research.data.boxes.Resize", shorter=800, longer=LONGER)]
    return dict(
        call="research.data.dataset.Dataset",
        source=dict(
            call="research.data.boxes.renumbered",
            source=dict(call="research.data.source.tfds", dataset="coco/2017", split=split),
            ids=IDS,
        ),
        ops=[
            dict(call="research.data.image.Decode"),
            *(augment if train else fit),
            dict(call="research.data.image.Normalize", mean=[0.485, 0.456, 0.406], std=[0.229, 0.224, 0.225]),
            dict(call="research.data.boxes.Targets", size=LONGER, max_boxes=100, too_many="drop"),
        ],
        features=["image", "pixel_mask", "boxes", "classes", "box_mask", "image_size"],
    )


def short(config: ConfigDict) -> ConfigDict:
    config.num_epochs = 150.0
    config.optimizer.drop_at = 2 / 3
    return config


def published(config: ConfigDict) -> ConfigDict:
    config.num_epochs, config.num_steps = None, 0
    config.task.model = dict(call="research.pretrained.huggingface.detector", path=PUBLISHED)
    config.init = dict(path=PUBLISHED)
    config.batch_size = 8
    return config


def tiny(config: ConfigDict) -> ConfigDict:
    config.task.model.update(num_queries=6, hidden_size=32, num_layers=1, num_decoder_layers=2, num_heads=2)
    config.task.model.update(intermediate_size=64, dtype="float32")
    config.task.model.backbone.update(depths=[1, 1, 1], widths=[16, 32, 32], block="basic", stem_width=16, norm="group")
    config = tiny_images(config, size=80, objects=3)
    for node in (config.data, config.evals.validation.data):
        node.ops[-1].update(size=96, max_boxes=4)
        _shrink(node.ops)
    config.optimizer.update(freeze=("^backbone/stem",), clip_norm=1.0)
    return config


def _shrink(ops: list) -> None:
    """Make ops that resize and cut suit small images."""
    for op in ops:
        if op["call"].endswith("boxes.Resize"):
            op.update(shorter=64, longer=96)
        elif op["call"].endswith("boxes.RandomResize"):
            op.update(shorter=[48, 64], longer=96)
        elif op["call"].endswith("boxes.RandomCrop"):
            op.update(least=40, most=60)
        for choice in op.get("choices", ()):
            _shrink(choice)


VARIANTS = {"": lambda config: config, "short": short, "published": published, "tiny": tiny}
