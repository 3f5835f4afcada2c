"""Learns images and texts together: CLIP (Radford 2021) from scratch on your own pairs, and SigLIP (Zhai 2023).

Published: on 400 million pairs, 32 epochs in batches of 32,768, zero-shot ImageNet accuracy 63.2 % (base32) and 75.3 %
(large14). The data are yours: `--config.data.source.train=captions.jsonl`, lines {"image": "a/1.jpg", "text": "a dog"},
and `--config.data.source.images=photos`, the folder that the images are in; a share is held out, on which retrieval is
measured.
Hardware: the published large14 took 256 V100 for 12 days.
Variants: finetune, which starts from the published base32, and with `--config.num_steps=0` measures it; base32, base16,
large14, siglip_base16, with the tokenizers of the published models; tiny, which needs neither network nor files and
takes seconds.
"""

from ml_collections import ConfigDict, FieldReference

from research.configuration.variants import choose, tiny_images

CLIP = "hf://openai/clip-vit-base-patch32"
SIGLIP_TOKENIZER = "hf://google/siglip-base-patch16-224"


def get_config(variant: str = "") -> ConfigDict:
    # References, so that an override of the training data's is one of the evaluation's too.
    pairs = dict(
        call="research.data.captions.captions",
        train=FieldReference("captions.jsonl"),
        images=FieldReference("photos"),
        held_out=FieldReference(0.02),
    )
    config = ConfigDict()
    config.seed = 0
    config.batch_size = 1024
    config.num_epochs = 32.0
    config.tokenizer = dict(call="research.data.tokenizer.load", path=CLIP)
    config.task = dict(
        call="research.tasks.contrastive.Contrastive",
        model=dict(
            call="research.models.clip.Clip",
            image=dict(
                call="research.models.vit.Encoder",
                patch_size=32,
                activation="quick_gelu",
                layer_norm_epsilon=1e-5,
                patch_bias=False,
                embedding_norm=True,
                dtype="bfloat16",
            ),
            text=dict(call="research.models.clip.TextEncoder", vocab_size=49408, dtype="bfloat16"),
        ),
    )
    config.data = data(pairs | dict(split="train"), train=True)
    config.evals = dict(
        validation=dict(call="research.evaluators.zero_shot.Retrieval", data=data(pairs | dict(split="validation"))),
    )
    config.optimizer = dict(
        learning_rate=5e-4,
        schedule="cosine",
        warmup=0.02,
        weight_decay=0.2,
        b2=0.98,
        epsilon=1e-6,
        clip_norm=None,
    )
    config.mesh = dict(data=-1, fsdp=1, model=1)
    config.checkpoint = dict(every_steps=1000, keep=2)
    config.log = dict(every_steps=50, evaluate_every_steps=5000)
    config.plan = dict(topology="v5e:4x4", vocab_size=49408, examples=400_000_000)
    return choose(variant, VARIANTS, config)


def data(source: dict, train: bool = False) -> dict:
    window = dict(call="research.data.image.DecodeRandomResizedCrop", size=224, area=(0.9, 1.0))
    whole = [
        dict(call="research.data.image.Decode"),
        dict(call="research.data.image.Resize", size=224, interpolation="bicubic"),
        dict(call="research.data.image.CenterCrop", size=224),
    ]
    return dict(
        call="research.data.dataset.Dataset",
        source=source,
        ops=[
            dict(call="research.data.captions.PaddedTokens", max_length=77),
            *([window] if train else whole),
            dict(
                call="research.data.image.Normalize",
                mean=[0.48145466, 0.4578275, 0.40821073],
                std=[0.26862954, 0.26130258, 0.27577711],
            ),
        ],
        features=["image", "input_ids", "attention_mask"],
    )


def base16(config: ConfigDict) -> ConfigDict:
    config.task.model.image.patch_size = 16
    return config


def large14(config: ConfigDict) -> ConfigDict:
    model = config.task.model
    model.projection_size = 768
    model.image.update(patch_size=14, hidden_size=1024, num_layers=24, num_heads=16, intermediate_size=4096)
    model.text.update(hidden_size=768, num_heads=12, intermediate_size=3072)
    model.image.remat = model.text.remat = "dots"
    config.mesh = dict(data=1, fsdp=-1, model=1)
    config.optimizer.learning_rate = 4e-4
    return config


def finetune(config: ConfigDict) -> ConfigDict:
    load = "research.pretrained.huggingface.load_model"
    config.task.model = dict(call=load, path=CLIP, kind="dual_encoder", image_dtype="bfloat16", text_dtype="bfloat16")
    config.init = dict(path=CLIP)
    config.batch_size, config.num_epochs = 256, 5.0
    config.optimizer.update(learning_rate=1e-5, warmup=0.1, weight_decay=0.1, clip_norm=1.0)
    return config


def siglip_base16(config: ConfigDict) -> ConfigDict:
    config.tokenizer.path = SIGLIP_TOKENIZER
    config.task.update(loss_kind="sigmoid", max_scale=None)
    fields = dict(activation="gelu_pytorch_tanh", layer_norm_epsilon=1e-6)
    image = dict(patch_size=16, prefix_tokens=0, patch_bias=True, embedding_norm=False)
    text = dict(vocab_size=32000, hidden_size=768, num_heads=12, intermediate_size=3072, max_positions=64, causal=False)
    config.plan.vocab_size = 32000
    config.task.model.call = "research.models.clip.SigLip"
    config.task.model.image.update(image | fields)
    config.task.model.text.update(text | fields)
    config.optimizer.update(learning_rate=1e-3, weight_decay=1e-4, b2=0.95)
    for node in (config.data, config.evals.validation.data):
        node.ops[0]["max_length"] = 64
        node.ops[-1].update(mean=[0.5] * 3, std=[0.5] * 3)
        node.features = ["image", "input_ids"]
    return config


def tiny(config: ConfigDict) -> ConfigDict:
    small = dict(hidden_size=32, num_layers=2, num_heads=2, intermediate_size=64, initializer_range=0.1)
    config.task.model.image.update(small | dict(image_size=32, patch_size=8, dtype="float32"))
    config.task.model.text.update(small | dict(vocab_size=260, max_positions=16, dtype="float32"))
    config.task.model.update(projection_size=32, end_id=2)
    captions = dict(
        call="research.data.captions.ClassCaptions",
        classes=("disc", "square", "cross"),
        templates=("a {}",),
        max_length=16,
    )
    for node in (config.data, config.evals.validation.data):
        node.ops[0] = captions
    config.data.ops[1]["size"] = 32
    for op in config.evals.validation.data.ops[2:4]:
        op["size"] = 32
    config = tiny_images(config, size=40)
    config.batch_size, config.num_steps = 16, 100  # contrasts need more examples, and more steps, than classes do
    config.optimizer.learning_rate = 2e-3
    config.log.evaluate_every_steps = 50
    config.tokenizer = dict(call="research.data.tokenizer.byte_level")
    return config


VARIANTS = {
    "": lambda config: config,
    "finetune": finetune,
    "base32": lambda config: config,
    "base16": base16,
    "large14": large14,
    "siglip_base16": siglip_base16,
    "tiny": tiny,
}
