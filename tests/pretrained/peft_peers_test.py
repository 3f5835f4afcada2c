"""Adapters against the library PEFT: its model and ours say the same with an adapter that either wrote."""

import functools

import jax
import numpy as np
import pytest
import safetensors

from research.errors import UserError
from research.pretrained import huggingface, peft
from research.pretrained.families import families
from research.tasks.adapters import flat
from research.tasks.ia3 import IA3
from research.tasks.lora import LoRA

pytestmark = pytest.mark.peers
torch = pytest.importorskip("torch")
library = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

IDS = np.arange(3, 19, dtype=np.int32).reshape(2, 8)
IMAGES = np.random.default_rng(0).normal(size=(2, 32, 32, 3)).astype(np.float32)
SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
SIZES |= {"initializer_range": 0.2}
IMAGE = {"image_size": 32, "patch_size": 16, "num_labels": 3}
CASES = {
    "bert": (transformers.BertForSequenceClassification, transformers.BertConfig(vocab_size=40, num_labels=3, **SIZES)),
    "llama": (transformers.LlamaForCausalLM, transformers.LlamaConfig(vocab_size=40, **SIZES)),
    "gpt2": (transformers.GPT2LMHeadModel, transformers.GPT2Config(vocab_size=40, n_embd=16, n_layer=2, n_head=2)),
    "t5": (
        transformers.T5ForConditionalGeneration,
        transformers.T5Config(vocab_size=40, d_model=16, num_layers=2, num_heads=2, d_kv=8, d_ff=24),
    ),
    "vit": (transformers.ViTForImageClassification, transformers.ViTConfig(**SIZES, **IMAGE)),
    "dinov2": (
        transformers.Dinov2ForImageClassification,
        transformers.Dinov2Config(**{**SIZES, "mlp_ratio": 2}, **IMAGE),
    ),
}
# Modules whose outputs are adapted, whose inputs are, and what trains whole.
TARGETS = {
    "bert": (["query", "value", "intermediate.dense"], ["output.dense"], ["classifier"]),
    "llama": (["q_proj", "v_proj"], ["down_proj"], None),
    "gpt2": (["c_attn"], ["mlp.c_proj"], None),
    "t5": (["q", "v"], ["wo"], None),
    "vit": (["q_proj", "v_proj", "fc1"], ["fc2"], ["classifier"]),
    "dinov2": (["q_proj", "v_proj", "fc1"], ["fc2"], ["classifier"]),
}
KINDS = ("lora", "dora", "ia3")


def theirs(name, model):
    ids = torch.tensor(IDS, dtype=torch.long)
    inputs = {"input_ids": ids}
    if name == "t5":
        inputs["decoder_input_ids"] = ids
    if name in ("vit", "dinov2"):
        inputs = {"pixel_values": torch.tensor(IMAGES.transpose(0, 3, 1, 2))}
    with torch.no_grad():
        return model.eval()(**inputs).logits.numpy()


def arguments(name):
    if name in ("vit", "dinov2"):
        return (IMAGES,)
    return {"bert": (IDS, np.ones_like(IDS)), "t5": (IDS, IDS)}.get(name, (IDS,))


def ours(name, model, params):
    return np.asarray(model.apply({"params": params}, *arguments(name)))


@pytest.fixture(params=CASES)
def case(request, tmp_path):
    """Returns the name, a saved base, and our model of it with its parameters' shapes."""
    kind, config = CASES[request.param]
    torch.manual_seed(0)
    kind(config).save_pretrained(tmp_path / "base")
    kinds = {"t5": "encoder_decoder", "vit": "image_classifier", "dinov2": "image_classifier"}
    load = functools.partial(huggingface.load_model, kind=kinds.get(request.param, "causal_lm"))
    if kinds.get(request.param) == "image_classifier":
        load = functools.partial(load, num_outputs=3)
    model = (huggingface.sequence_classifier if request.param == "bert" else load)(str(tmp_path / "base"))
    shapes = jax.eval_shape(lambda key: model.init(key, *arguments(request.param))["params"], jax.random.key(0))
    return request.param, tmp_path / "base", model, shapes


def adapter_of_peft(name, kind):
    targets, feedforward, whole = TARGETS[name]
    if kind == "ia3":
        return library.IA3Config(
            target_modules=targets + feedforward,
            feedforward_modules=feedforward,
            modules_to_save=whole,
            init_ia3_weights=False,
            fan_in_fan_out=name == "gpt2",
        )
    return library.LoraConfig(
        r=3,
        lora_alpha=5,
        target_modules=targets + feedforward,
        modules_to_save=whole,
        use_rslora=True,
        use_dora=kind == "dora",
        init_lora_weights=False,
        fan_in_fan_out=name == "gpt2",
    )


@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_of_peft_loads(case, kind, tmp_path):
    name, base, model, shapes = case
    peer = library.get_peft_model(CASES[name][0].from_pretrained(base), adapter_of_peft(name, kind))
    for key, parameter in peer.named_parameters():
        if "magnitude" in key:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    peer.save_pretrained(tmp_path / "adapter")
    params, report = peft.load_params(str(base), model, shapes, adapter=str(tmp_path / "adapter"))
    assert not report.new
    plain, _ = huggingface.load_params(str(base), model, shapes)
    assert np.abs(ours(name, model, params) - ours(name, model, plain)).max() > 1e-4
    np.testing.assert_allclose(ours(name, model, params), theirs(name, peer), rtol=1e-3, atol=1e-4)


def adapted(kind, base, whole):
    if kind == "ia3":
        targets = ("layers/.*attention/(query|value)/kernel$", "layers/mlp/up/kernel$")
        return IA3(base, targets, ("layers/mlp/down/kernel$",), whole=whole)
    return LoRA(base, ("layers/.*/kernel$",), rank=3, dora=kind == "dora", whole=whole)


@pytest.mark.parametrize("kind", KINDS)
def test_our_adapter_loads_in_peft(case, kind, tmp_path):
    name, base, model, shapes = case
    plain, _ = huggingface.load_params(str(base), model, shapes)

    class Base:
        def init(self, rng, spec):
            return plain

    base_task = Base()
    base_task.model = model
    whole = ("^head_",) if name in ("bert", "vit", "dinov2") else ()
    task = adapted(kind, base_task, whole)
    params = jax.device_get(task.init(jax.random.key(0), {}))
    rng = np.random.default_rng(2)
    for part in (task.part, "whole") if whole else (task.part,):
        params[part] = jax.tree.map(lambda x: x + rng.normal(0, 0.1, x.shape).astype(np.float32), params[part])
    if name == "gpt2":
        with pytest.raises(UserError, match="which PEFT adapts as one"):
            peft.save(tmp_path / "adapter", task, params, str(base))
        return
    peft.save(tmp_path / "adapter", task, params, str(base))
    peer = library.PeftModel.from_pretrained(CASES[name][0].from_pretrained(base), str(tmp_path / "adapter"))
    merged = task.merge(params)
    assert np.abs(ours(name, model, merged) - ours(name, model, plain)).max() > 1e-3
    np.testing.assert_allclose(ours(name, model, merged), theirs(name, peer), rtol=1e-3, atol=1e-4)
    again, _ = peft.load_params(str(base), model, shapes, adapter=str(tmp_path / "adapter"))
    for path, array in flat(merged).items():
        np.testing.assert_allclose(flat(again)[path], array, rtol=1e-3, atol=1e-5, err_msg=path)


DETR = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24}
DETR |= {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
DETR |= {"use_timm_backbone": False, "use_pretrained_backbone": False, "backbone": None}
RESNET = {"embedding_size": 8, "hidden_sizes": [8], "depths": [1], "out_features": ["stage1"]}


@pytest.mark.parametrize("name", ["vit", "deit", "dinov2", "detr", "bert", "llama"])
def test_names_in_memory_are_those_of_transformers(name, tmp_path):
    kind, config = {
        **CASES,
        "deit": (transformers.DeiTForImageClassification, transformers.DeiTConfig(**SIZES, **IMAGE)),
        "detr": (
            transformers.DetrForObjectDetection,
            transformers.DetrConfig(**DETR, backbone_config=transformers.ResNetConfig(**RESNET)),
        ),
    }[name]
    model = kind(config)
    model.save_pretrained(tmp_path)
    with safetensors.safe_open(tmp_path / "model.safetensors", "np") as file:
        named = {families()[name].in_memory(key) for key in file.keys()}  # noqa: SIM118
    assert named <= set(model.state_dict())
