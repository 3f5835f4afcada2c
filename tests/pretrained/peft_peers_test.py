"""Adapters against the library PEFT: its model and ours say the same with an adapter that either wrote."""

import functools

import jax
import numpy as np
import pytest

from research.pretrained import huggingface, peft
from research.tasks.lora import LoRA

pytestmark = pytest.mark.peers
torch = pytest.importorskip("torch")
library = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

IDS = np.arange(3, 19, dtype=np.int32).reshape(2, 8)
BERT = transformers.BertConfig(
    vocab_size=40, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24, num_labels=3
)
LLAMA = transformers.LlamaConfig(
    vocab_size=40, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24
)
T5 = transformers.T5Config(vocab_size=40, d_model=16, num_layers=2, num_heads=2, d_kv=8, d_ff=24)
CASES = {
    "bert": (transformers.BertForSequenceClassification, BERT, ["query", "value", "dense"], ["classifier"]),
    "llama": (transformers.LlamaForCausalLM, LLAMA, ["q_proj", "v_proj", "down_proj"], None),
    "t5": (transformers.T5ForConditionalGeneration, T5, ["q", "v", "wo"], None),
}


def theirs(name, model):
    ids = torch.tensor(IDS, dtype=torch.long)
    inputs = {"input_ids": ids}
    if name == "t5":
        inputs["decoder_input_ids"] = ids
    with torch.no_grad():
        return model.eval()(**inputs).logits.numpy()


def arguments(name):
    ones = np.ones_like(IDS)
    return {"bert": (IDS, ones), "llama": (IDS,), "t5": (IDS, IDS)}[name]


def ours(name, model, params):
    return np.asarray(model.apply({"params": params}, *arguments(name)))


@pytest.fixture(params=CASES)  # see the head of research/pretrained/peft.py for ViT
def case(request, tmp_path):
    """Returns the name, a saved base, and our model of it with its parameters' shapes."""
    kind, config, *_ = CASES[request.param]
    torch.manual_seed(0)
    kind(config).save_pretrained(tmp_path / "base")
    load = {
        "bert": huggingface.sequence_classifier,
        "llama": functools.partial(huggingface.load_model, kind="causal_lm"),
        "t5": functools.partial(huggingface.load_model, kind="encoder_decoder"),
    }[request.param]
    model = load(str(tmp_path / "base"))
    shapes = jax.eval_shape(lambda key: model.init(key, *arguments(request.param))["params"], jax.random.key(0))
    return request.param, tmp_path / "base", model, shapes


def test_an_adapter_of_peft_loads(case, tmp_path):
    name, base, model, shapes = case
    kind, _, targets, whole = CASES[name]
    config = library.LoraConfig(
        r=3, lora_alpha=5, target_modules=targets, modules_to_save=whole, use_rslora=True, init_lora_weights=False
    )
    peer = library.get_peft_model(kind.from_pretrained(base), config)
    peer.save_pretrained(tmp_path / "adapter")
    params, report = peft.load_params(str(base), model, shapes, adapter=str(tmp_path / "adapter"))
    assert not report.new
    plain, _ = huggingface.load_params(str(base), model, shapes)
    assert np.abs(ours(name, model, params) - ours(name, model, plain)).max() > 1e-4
    np.testing.assert_allclose(ours(name, model, params), theirs(name, peer), rtol=1e-3, atol=1e-4)


def test_our_adapter_loads_in_peft(case, tmp_path):
    name, base, model, shapes = case
    plain, _ = huggingface.load_params(str(base), model, shapes)

    class Base:
        def init(self, rng, spec):
            return plain

    base_task = Base()
    base_task.model = model
    whole = ("^head_",) if name == "bert" else ()
    task = LoRA(base_task, ("layers/.*/kernel$",), rank=3, whole=whole)
    params = task.init(jax.random.key(0), {})
    rng = np.random.default_rng(2)
    for part in ("lora", "whole") if whole else ("lora",):
        params[part] = jax.tree.map(lambda x: rng.normal(0, 0.1, x.shape).astype(np.float32), params[part])
    peft.save(tmp_path / "adapter", task, jax.device_get(params), str(base))
    peer = library.PeftModel.from_pretrained(CASES[name][0].from_pretrained(base), str(tmp_path / "adapter"))
    np.testing.assert_allclose(ours(name, model, task.merge(params)), theirs(name, peer), rtol=1e-3, atol=1e-4)
    again, _ = peft.load_params(str(base), model, shapes, adapter=str(tmp_path / "adapter"))
    np.testing.assert_allclose(ours(name, model, again), ours(name, model, task.merge(params)), rtol=1e-3, atol=1e-4)
