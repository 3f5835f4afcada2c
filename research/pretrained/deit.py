"""DeiT (Touvron 2021, "Training data-efficient image transformers") in Hugging Face's format."""

from research.models import vit
from research.pretrained import family
from research.pretrained.family import Family, Kind
from research.pretrained.vit import CONSTANTS, KEYS, MODULES, ONLY, encoder_tensors, leftovers

FAMILY = Family(
    prefix="deit.",
    kinds={
        "image_classifier": Kind(
            architecture="DeiTForImageClassification",
            model=vit.ImageClassifier,
            parts={"encoder": vit.Encoder},
            keys=KEYS,
            constants=CONSTANTS | {"prefix_tokens": 2, "pooling": "token"},
            tensors=family.linear("head_output", "classifier", part="head"),
        ),
        "distilled_image_classifier": Kind(
            architecture="DeiTForImageClassificationWithTeacher",
            model=vit.DistilledClassifier,
            parts={"encoder": vit.Encoder},
            keys=KEYS,
            constants=CONSTANTS | {"prefix_tokens": 2},
            tensors=[
                *family.linear("head_output", "cls_classifier", part="head"),
                *family.linear("head_distillation", "distillation_classifier", part="head"),
            ],
        ),
    },
    tensors=encoder_tensors("deit.", ("cls", "distillation")),
    only=ONLY,
    unused=leftovers("deit."),
    modules=MODULES,
)
