r"""Fine-tunes a published detector on your own images with boxes, annotated in COCO's format.

  python -m research.main --config=configs/finetune_detection.py --workdir=runs/birds \
      --config.data.source.images=birds/images --config.data.source.annotations=birds/annotations.json
  python -m research.main --workdir=runs/birds --mode=predict --input=more_birds --output=predictions.jsonl

Each of these is said once and holds everywhere:
  --config.data.source.images       the folder in which the annotations' file names are found
  --config.data.source.annotations  a JSON file with "images", "annotations" and "categories"
  --config.data.source.held_out     another share of the images than 0.1 to evaluate on; 0 where you have others, with
                                    --config.data.source.validation_annotations (and validation_images)
  --config.data.source.broken       "skip" leaves out images and boxes that are broken; by default they are an "error"
  --config.init.path                the detector: hf://ORG/NAME, a folder, or what --mode=export wrote
  --config.init.new_head=false      keep the classes that it knows, if they are yours too
  --config.data.ops[4].size         the side that images are resized to at most and padded to, in pixels
  --config.data.ops[4].max_boxes    the most objects in an image; no more than the detector has queries

The number and the names of the classes come from the annotations' categories. Results are COCO's average precision, and
figures/ shows images with true and predicted boxes.
Recipe: as published (Carion 2020), at a tenth of the rate for the backbone; 50 epochs. Expected: depends on the data;
a few thousand boxes are little for DETR, even from published weights.
Hardware: an accelerator with 16 GB. `:scratch` trains a small DETR from random at 128 pixels on any folder, which runs
on 2 CPU cores but needs some 10,000 images to learn much. `:tiny` needs neither network nor files.
"""

from ml_collections import ConfigDict, FieldReference
from ml_collections.config_dict import placeholder

from research.configuration.variants import choose, derived, tiny_images


def get_config(variant: str = "") -> ConfigDict:
    path = FieldReference("hf://facebook/detr-resnet-50")
    size, boxes = FieldReference(800), FieldReference(100)
    folder = dict(
        call="research.data.source.coco_folder",
        images=placeholder(str),
        annotations=placeholder(str),
        validation_images=placeholder(str),
        validation_annotations=placeholder(str),
        held_out=FieldReference(0.1),
        broken=FieldReference("error"),
    )

    def data(split: str, ops: list) -> dict:
        return dict(
            call="research.data.dataset.Dataset",
            source=folder | dict(split=split),
            ops=[
                dict(call="research.data.image.Decode"),
                *ops,
                dict(call="research.data.image.Normalize", mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225)),
                dict(call="research.data.boxes.Targets", size=size, max_boxes=boxes),
            ],
            features=("image", "pixel_mask", "boxes", "classes", "box_mask", "image_size"),
        )

    def share(part: float) -> FieldReference:
        return derived(size, lambda side: round(part * side), int)

    shorter = derived(size, lambda side: [side * part // 8 for part in range(4, 9)], list)
    jitter = dict(call="research.data.boxes.RandomResize", shorter=shorter, longer=size)
    crop = dict(call="research.data.boxes.RandomCrop", least=share(0.5), most=share(0.8))
    train = [
        dict(call="research.data.boxes.RandomFlip"),
        dict(call="research.data.boxes.Choose", choices=[[jitter], [jitter, crop, jitter]]),
    ]
    evaluate = [dict(call="research.data.boxes.Resize", shorter=size, longer=size)]
    config = ConfigDict()
    config.seed = 0
    config.batch_size = 8
    config.num_epochs = 50.0
    config.task = dict(
        call="research.tasks.detection.Detection",
        model=dict(call="research.pretrained.huggingface.detector", path=path),
    )
    config.init = dict(path=path, new_head=True)
    config.data = data("train", train)
    config.evals = dict(test=dict(call="research.evaluators.coco.Coco", data=data("validation", evaluate)))
    config.optimizer = dict(
        learning_rate=1e-4,
        schedule="cosine",
        warmup=0.05,
        weight_decay=1e-4,
        clip_norm=0.1,
        learning_rate_multipliers=(("^backbone/", 0.1),),
        freeze=("^backbone/.*norm",),
    )
    config.mesh = dict(data=-1, fsdp=1, model=1)
    config.checkpoint = dict(every_steps=500, keep=2)
    config.log = dict(every_steps=20, evaluate_every_steps=0)
    return choose(variant, VARIANTS, config)


def scratch(config: ConfigDict) -> ConfigDict:
    config.init = None
    config.task.model = dict(
        call="research.models.detr.Detr",
        num_queries=50,
        hidden_size=128,
        num_layers=2,
        num_decoder_layers=3,
        num_heads=4,
        intermediate_size=256,
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
    )
    config.data.ops[-1]["size"].set(128)
    config.data.ops[-1]["max_boxes"].set(50)
    config.batch_size = 32
    config.optimizer.update(learning_rate=5e-4, freeze=(), learning_rate_multipliers=())
    return config


def tiny(config: ConfigDict) -> ConfigDict:
    config = scratch(config)
    config.data.ops[-1]["size"].set(64)
    config.data.ops[-1]["max_boxes"].set(4)
    config.task.model.update(hidden_size=32, num_layers=1, num_decoder_layers=2, num_heads=2, intermediate_size=64)
    config.task.model.update(num_queries=8)
    config.task.model.backbone.update(stem_width=16, widths=[16, 32])
    return tiny_images(config, size=80, objects=3)


VARIANTS = {"": lambda config: config, "scratch": scratch, "tiny": tiny}
