"""Adapters in PEFT's format: what is written is read again, by the names of either version of Transformers."""

import json

import jax
import numpy as np
import pytest
import safetensors.numpy

from research.errors import UserError
from research.models import vit
from research.pretrained import huggingface, peft
from research.tasks.adapters import flat
from research.tasks.ia3 import IA3
from research.tasks.image_classification import ImageClassification
from research.tasks.lora import LoRA
from research.tasks.prompt_tuning import PromptTuning

ENCODER = vit.Encoder(8, 4, hidden_size=8, num_layers=2, num_heads=2, intermediate_size=16, layer_norm_epsilon=1e-12)
MODEL = vit.ImageClassifier(ENCODER, 3)
TASK = ImageClassification(MODEL)
SPEC = {"image": jax.ShapeDtypeStruct((2, 8, 8, 3), np.float32), "label": jax.ShapeDtypeStruct((2,), np.int32)}
SPEC |= {"mask": jax.ShapeDtypeStruct((2,), np.float32)}
KINDS = {
    "lora": LoRA(TASK, ("layers/.*/kernel$",), rank=2, whole=("^head_",)),
    "dora": LoRA(TASK, ("layers/.*/kernel$",), rank=2, dora=True, whole=("^head_",)),
    "ia3": IA3(TASK, ("attention/(key|value)/kernel$",), ("mlp/down/kernel$",), whole=("^head_",)),
}
OLDER = {
    "layers.": "encoder.layer.",
    "attention.q_proj": "attention.attention.query",
    "attention.k_proj": "attention.attention.key",
    "attention.v_proj": "attention.attention.value",
    "attention.o_proj": "attention.output.dense",
    "mlp.fc1": "intermediate.dense",
    "mlp.fc2": "output.dense",
}


@pytest.fixture(params=KINDS)
def written(request, tmp_path):
    """Returns the task, its parameters, the base's folder and the adapter's."""
    task = KINDS[request.param]
    params = jax.device_get(jax.jit(lambda: task.init(jax.random.key(0), SPEC))())
    base = str(huggingface.save(tmp_path / "base", MODEL, task.join(params)))
    rng = np.random.default_rng(0)
    for part in (task.part, "whole"):
        params[part] = jax.tree.map(lambda x: x + rng.normal(0, 0.3, x.shape).astype(np.float32), params[part])
    peft.save(tmp_path / "adapter", task, params, base)
    return task, params, base, tmp_path / "adapter"


def check(written) -> None:
    task, params, base, folder = written
    merged = flat(task.merge(params))
    read, _ = peft.load_params(base, MODEL, jax.eval_shape(lambda: task.join(params)), adapter=str(folder))
    for name, array in flat(read).items():
        np.testing.assert_allclose(array, merged[name], rtol=1e-5, atol=1e-6, err_msg=name)
        assert name in flat(params.get("base")) or name.startswith("head_")


def test_what_is_written_is_read(written):
    check(written)
    config = json.loads((written[3] / "adapter_config.json").read_text())
    assert "vit.layers.1.attention.v_proj" in config["target_modules"]
    assert config["modules_to_save"] == ["classifier"]


def test_names_of_transformers_4_are_read(written):
    tensors = safetensors.numpy.load_file(written[3] / "adapter_model.safetensors")
    for new, old in OLDER.items():
        tensors = {name.replace(new, old): array for name, array in tensors.items()}
    assert any("vit.encoder.layer.0.attention.attention.value." in name for name in tensors)
    safetensors.numpy.save_file(tensors, written[3] / "adapter_model.safetensors")
    check(written)


def test_other_kinds_are_one_line(written):
    task, params, base, folder = written
    config = json.loads((folder / "adapter_config.json").read_text())
    for key, value, message in (
        ("peft_type", "IA33", "has peft_type='IA33', of which LORA, IA3 are read; did you mean 'IA3'"),
        *([("bias", "all", "bias='all', of which only 'none' is implemented")] if isinstance(task, LoRA) else []),
    ):
        (folder / "adapter_config.json").write_text(json.dumps(config | {key: value}))
        with pytest.raises(UserError, match=message):
            peft.load_params(base, MODEL, jax.eval_shape(lambda: task.join(params)), adapter=str(folder))
    with pytest.raises(UserError, match="exists already"):
        peft.save(folder, task, params)


def test_a_prompt_is_for_texts():
    with pytest.raises(UserError, match="a prompt comes before a text, and image, label, mask hold no 'input_ids'"):
        jax.eval_shape(lambda: PromptTuning(TASK).init(jax.random.key(0), SPEC))
