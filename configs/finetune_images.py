r"""Fine-tunes a published vision transformer on your own folder of images: PATH/CLASS/*.jpg.

  python -m research.main --config=configs/finetune_images.py --workdir=runs/pets --config.data.source.path=pets
  python -m research.main --workdir=runs/pets --mode=predict --input=more_pets --output=predictions.jsonl

Each of these is said once and holds everywhere:
  --config.data.source.path      the folder: one folder for each class, or train/CLASS, validation/CLASS and test/CLASS
  --config.data.source.held_out  another share of the training images than 0.1 to evaluate on; 0 where you have others
  --config.data.source.broken    "skip" leaves out images that cannot be decoded; by default they are an "error"
  --config.init.path             the encoder: hf://ORG/NAME, a folder, or what --mode=export wrote
  --config.init.new_head=true    start from a classifier of other labels
  --config.data.ops[0].size      the side of the images in pixels, to which positions are interpolated
  --config.data.ops[2].mean, .std  of the channels, as the encoder had them: here 0.5; DeiT and DINOv2 had
                                 0.485,0.456,0.406 and 0.229,0.224,0.225 (in `:scratch` they are of ops[3])

Evaluated are the images in PATH/validation, else those held out; --config.evals.test.data.source.split=test takes
PATH/test.
The number and the names of the classes come from the folder. ViT, DeiT and DINOv2 are known: hf://facebook/dinov2-small.
Recipe: crops and flips as in Szegedy 2014, AdamW at a small rate. Expected: depends on the folder.
Hardware: any; ViT-B/16 at 224 pixels wants an accelerator. `:scratch` trains a small ViT (Ti/8 at 64 pixels) from
random on any folder, which takes minutes for a thousand images on 2 CPU cores; no model of Transformers is like it, so
that --mode=export does not take it. `:tiny` needs neither network nor files.
"""

from ml_collections import ConfigDict, FieldReference
from ml_collections.config_dict import placeholder

from research.configuration.variants import choose, derived, tiny_images


def get_config(variant: str = "") -> ConfigDict:
    path = FieldReference("hf://google/vit-base-patch16-224-in21k")
    size, mean, std = FieldReference(224), FieldReference((0.5,)), FieldReference((0.5,))
    folder = dict(
        call="research.data.source.image_folder",
        path=placeholder(str),
        held_out=FieldReference(0.1),
        labels=FieldReference(()),
        broken=FieldReference("error"),
    )
    normalize = dict(call="research.data.image.Normalize", mean=mean, std=std)

    def data(split: str, ops: list) -> dict:
        return dict(
            call="research.data.dataset.Dataset",
            source=folder | dict(split=split),
            ops=[*ops, normalize],
            features=("image", "label"),
        )

    train = [
        dict(call="research.data.image.DecodeRandomResizedCrop", size=size),
        dict(call="research.data.image.RandomFlip"),
    ]
    larger = derived(size, lambda size: size * 8 // 7, int)  # 256 for 224
    evaluate = [
        dict(call="research.data.image.Decode", min_side=derived(larger, lambda side: 2 * side, int)),
        dict(call="research.data.image.Resize", size=larger),
        dict(call="research.data.image.CenterCrop", size=size),
    ]
    config = ConfigDict()
    config.seed = 0
    config.batch_size = 32
    config.num_epochs = 5.0
    config.task = dict(
        call="research.tasks.classification.Classification",
        model=dict(call="research.pretrained.huggingface.image_classifier", path=path),
    )
    config.init = dict(path=path, new_head=False)
    config.data = data("train", train)
    config.evals = dict(
        test=dict(
            call="research.evaluators.image_classification.ImageScores",
            scores=("accuracy", "macro_f1"),
            data=data("validation", evaluate),
        )
    )
    config.optimizer = dict(learning_rate=5e-5, schedule="cosine", warmup=0.1, weight_decay=0.01, clip_norm=1.0)
    config.mesh = dict(data=-1, fsdp=1, model=1)
    config.checkpoint = dict(every_steps=500, keep=2)
    config.log = dict(every_steps=20, evaluate_every_steps=0)
    return choose(variant, VARIANTS, config)


def scratch(config: ConfigDict) -> ConfigDict:
    config.init = None
    config.task.model = dict(
        call="research.models.vit.ImageClassifier",
        pooling="mean",
        encoder=dict(
            call="research.models.vit.Encoder",
            image_size=64,
            patch_size=8,
            hidden_size=192,
            num_layers=6,
            num_heads=3,
            intermediate_size=768,
            prefix_tokens=0,
            drop_path=0.1,
            unroll=6,
        ),
    )
    config.task.label_smoothing = 0.1
    config.data.ops[0]["size"].set(64)
    config.data.ops[0]["area"] = (0.25, 1.0)
    config.data.ops.insert(2, dict(call="research.data.augmentation.RandAugment", layers=2, magnitude=5))
    config.num_epochs = 30.0
    config.optimizer.update(learning_rate=1e-3, weight_decay=0.05)
    return config


def tiny(config: ConfigDict) -> ConfigDict:
    config = scratch(config)
    config.task.label_smoothing = 0.0  # thirty steps are too few for more of this, and of augmentation
    config.data.ops[0]["size"].set(28)
    config.data.ops[0]["area"] = (0.9, 1.0)
    config.data.ops[2].update(layers=1, magnitude=1)
    sizes = dict(image_size=28, patch_size=4, hidden_size=32, num_layers=2, num_heads=2, intermediate_size=64)
    config.task.model.encoder.update(sizes, drop_path=0.0, initializer_range=0.1)
    return tiny_images(config, size=32)


VARIANTS = {"": lambda config: config, "scratch": scratch, "tiny": tiny}
