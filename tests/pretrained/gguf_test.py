"""GGUF files, made here as llama.cpp's converter makes them, and the published SmolLM2 against Transformers."""

import pathlib
import re

import gguf as peer
import jax
import numpy as np
import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers

from research import assets
from research.configuration.variants import SMOLLM2
from research.data import gguf as gguf_file
from research.errors import UserError
from research.models.gpt import Decoder
from research.pretrained import huggingface

MODEL = Decoder(
    vocab_size=300,
    hidden_size=32,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_width=8,
    intermediate_size=64,
    max_positions=77,
    positions="rotary",
    rope_theta=500.0,
    norm="rms",
    norm_epsilon=1e-3,
    activation="silu",
    gated=True,
    attention_bias=False,
    out_bias=False,
    mlp_bias=False,
    tie_embeddings=False,
)
OPTIONS = {
    "llama.block_count": 2,
    "llama.context_length": 77,
    "llama.embedding_length": 32,
    "llama.feed_forward_length": 64,
    "llama.attention.head_count": 4,
    "llama.attention.head_count_kv": 2,
    "llama.rope.dimension_count": 8,
    "llama.rope.freq_base": 500.0,
    "llama.attention.layer_norm_rms_epsilon": 1e-3,
}
NAMES = {
    "attn_norm": "attention_norm/scale",
    "attn_q": "attention/query/kernel",
    "attn_k": "attention/key/kernel",
    "attn_v": "attention/value/kernel",
    "attn_output": "attention/out/kernel",
    "ffn_norm": "mlp_norm/scale",
    "ffn_gate": "mlp/gate/kernel",
    "ffn_up": "mlp/up/kernel",
    "ffn_down": "mlp/down/kernel",
}
SPECIALS = ("<|end|>", "<|im_start|>", "<|im_end|>")
MERGES = (("t", "h"), ("th", "e"), ("Ġ", "the"), ("1", "2"), ("Ġ", "c"))
TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
TEXTS = ("the cat the 12 34", "it's 2024, isn't it?\n\n  été 日本 <|im_end|> the", "", " the")


def shapes(model):
    return jax.eval_shape(lambda key: model.init(key, np.zeros((1, 4), np.int32))["params"], jax.random.key(0))


def random_params(model):
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(np.float32), shapes(model))


def interleaved(array, heads):
    """Orders the rows of every head 0, K/2, 1, K/2 + 1, ..., as llama.cpp keeps them."""
    return np.concatenate(
        [head[np.arange(len(head)).reshape(2, -1).T.ravel()] for head in np.split(array, heads)], axis=0
    )


def tensors(params):
    """Returns the parameters by the names, and in the order, of GGUF."""
    layers = params["layers"]
    found = {
        "token_embd.weight": params["word"]["embedding"],
        "output_norm.weight": params["norm_out"]["scale"],
        "output.weight": params["head"]["kernel"].T,
    }
    for part, path in NAMES.items():
        leaf = layers
        for name in path.split("/"):
            leaf = leaf[name]
        for i in range(2):
            array = leaf[i].T
            if part in ("attn_q", "attn_k"):
                array = interleaved(array, 4 if part == "attn_q" else 2)
            found[f"blk.{i}.{part}.weight"] = array
    return found


def vocabulary():
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*SPECIALS, *alphabet, *("".join(merge) for merge in MERGES)]
    return tokens + [f"unused{i}" for i in range(300 - len(tokens))]


def write(path, architecture="llama", arrays=None, quantised=(), drop=(), **options):
    """Writes a file; `options` are metadata with "__" for "."; those that are None are left out."""
    writer = peer.GGUFWriter(path, architecture)
    metadata = OPTIONS | {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.padding_token_id": 0,
        "tokenizer.chat_template": TEMPLATE,
    }
    metadata |= {name.replace("__", "."): value for name, value in options.items()}
    for name, value in metadata.items():
        if isinstance(value, bool):
            writer.add_bool(name, value)
        elif isinstance(value, int):
            writer.add_uint32(name, value)
        elif isinstance(value, float):
            writer.add_float32(name, value)
        elif value is not None:
            writer.add_string(name, value)
    tokens = vocabulary()
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token in SPECIALS else 1 for token in tokens])
    writer.add_token_merges([" ".join(merge) for merge in MERGES])
    for name, array in (arrays or tensors(random_params(MODEL))).items():
        if name not in drop:
            kind = peer.GGMLQuantizationType.Q8_0 if name in quantised else None
            array = np.ascontiguousarray(array)
            writer.add_tensor(name, peer.quants.quantize(array, kind) if kind else array, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture
def path(tmp_path):
    return write(tmp_path / "model.gguf")


def load(path):
    model = huggingface.load_model(str(path), "causal_lm")
    return model, *huggingface.load_params(str(path), model, shapes(model))


def test_a_file_is_read_as_the_folder_that_it_was_made_from(path, tmp_path):
    model, params, report = load(path)
    assert model == MODEL
    assert report == huggingface.Report((), ())
    jax.tree.map(np.testing.assert_array_equal, params, random_params(MODEL))
    huggingface.save(tmp_path / "folder", model, params)
    again, _, _ = load(tmp_path / "folder")
    assert again == model


def test_quantised_tensors_become_the_float32_that_they_stand_for(tmp_path):
    names = ["blk.0.attn_q.weight", "blk.1.ffn_down.weight", "token_embd.weight"]
    _, params, _ = load(write(tmp_path / "model.gguf", quantised=names))
    want = random_params(MODEL)
    for ours, theirs in (
        (params["layers"]["attention"]["query"]["kernel"][0], want["layers"]["attention"]["query"]["kernel"][0]),
        (params["layers"]["mlp"]["down"]["kernel"][1], want["layers"]["mlp"]["down"]["kernel"][1]),
        (params["word"]["embedding"], want["word"]["embedding"]),
    ):
        assert ours.dtype == np.float32
        error = np.abs(ours - theirs).max()
        assert 0 < error < np.abs(theirs).max() / 127


def test_a_file_without_an_output_layer_is_tied(tmp_path):
    model, params, report = load(write(tmp_path / "model.gguf", drop=["output.weight"]))
    assert model == MODEL.clone(tie_embeddings=True)
    assert "head" not in params
    assert report == huggingface.Report((), ())


def test_options(tmp_path):
    names = {
        "llama__attention__head_count_kv": None,
        "llama__rope__scaling__type": "linear",
        "llama__rope__scaling__factor": 2.0,
        "llama__rope__freq_base": None,
        "llama__attention__layer_norm_rms_epsilon": 1e-5,
    }
    model = huggingface.load_model(str(write(tmp_path / "model.gguf", **names)), "causal_lm", dropout=0.1)
    want = MODEL.clone(num_kv_heads=4, rope_scaling={"rope_type": "linear", "factor": 2.0}, rope_theta=10000.0)
    assert model == want.clone(norm_epsilon=1e-5, dropout=0.1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"architecture": "qwen2"}, "the architecture 'qwen2', of which only 'llama' is read from GGUF"),
        ({"llama__expert_count": 8}, "has llama.expert_count=8, which is not implemented"),
        ({"llama__rope__scaling__type": "yarn"}, "has llama.rope.scaling.type='yarn', which is not implemented"),
        ({"llama__rope__dimension_count": 4}, "has llama.rope.dimension_count=4, which is not implemented"),
        ({"llama__block_count": None}, "does not say llama.block_count"),
        ({"drop": ["token_embd.weight"]}, "has no token_embd.weight"),
        ({"drop": ["blk.1.attn_v.weight"]}, "model.layers.1.self_attn.v_proj.weight missing"),
    ],
)
def test_what_is_not_implemented_or_missing_is_named(options, message, tmp_path):
    path = write(tmp_path / "model.gguf", **options)
    with pytest.raises(UserError, match=re.escape(message)) as error:
        load(path)
    assert "\n" not in str(error.value)


def test_stretched_wavelengths_and_broken_files_are_refused(tmp_path):
    arrays = tensors(random_params(MODEL)) | {"rope_freqs.weight": np.ones(4, np.float32)}
    with pytest.raises(UserError, match=r"rope_freqs\.weight, stretched rotary wavelengths, which is not implemented"):
        load(write(tmp_path / "model.gguf", arrays=arrays))
    (tmp_path / "broken.gguf").write_bytes(b"GGUF" + bytes(7))
    with pytest.raises(UserError, match=r"broken\.gguf cannot be read: "):
        load(tmp_path / "broken.gguf")


def test_a_tokenizer_of_byte_pairs(path):
    found = gguf_file.tokenizer(path)
    assert found.pad_id == 0
    assert found.specials == {"bos": "<|im_start|>", "eos": "<|im_end|>"}
    assert found.chat_template == TEMPLATE
    reference = Backend(models.BPE({token: id for id, token in enumerate(vocabulary())}, list(MERGES)))
    reference.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    reference.decoder = decoders.ByteLevel()
    reference.add_special_tokens(list(SPECIALS))
    for text in TEXTS:
        encoding = found.backend.encode(text)
        assert encoding.ids == reference.encode(text).ids
        assert found.backend.decode(encoding.ids, skip_special_tokens=False) == text
    assert found.backend.encode("12 the").tokens == ["1", "2", "Ġthe"]  # digits are apart, though a merge joins them
    assert found.backend.encode("<|im_start|>the<|im_end|>").ids == [1, found.backend.token_to_id("the"), 2]


def test_tokens_that_a_file_asks_for_at_the_ends(tmp_path):
    path = write(tmp_path / "model.gguf", tokenizer__ggml__add_bos_token=True, tokenizer__ggml__pre="gpt-2")
    found = gguf_file.tokenizer(path).backend
    assert found.encode("12").tokens == ["<|im_start|>", "12"]
    path = write(tmp_path / "other.gguf", tokenizer__ggml__add_eos_token=True, tokenizer__ggml__padding_token_id=None)
    found = gguf_file.tokenizer(path)
    assert found.backend.encode("12").tokens == ["1", "2", "<|im_end|>"]
    assert found.pad_id == 2


def test_other_tokenizers_are_refused(tmp_path):
    for options, message in (
        ({"tokenizer__ggml__model": "llama"}, "a tokenizer of the kind 'llama', of which only 'gpt2' is implemented"),
        ({"tokenizer__ggml__pre": "smolm"}, r"the unknown pre-tokenizer 'smolm'; did you mean 'smollm'"),
    ):
        with pytest.raises(UserError, match=message):
            gguf_file.tokenizer(write(tmp_path / "model.gguf", **options))


def peer_logits(path, ids):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    folder, name = str(path.parent), path.name
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, gguf_file=name, dtype=torch.float32).eval()
    with torch.no_grad():
        return model(torch.tensor(ids).long()).logits.numpy()


def assert_same_logits(path, ids, what):
    model, params, _ = load(path)
    ours = np.asarray(jax.jit(lambda params: model.apply({"params": params}, ids))(params))
    theirs = peer_logits(path, ids)
    error = np.abs(ours - theirs).max() / np.abs(theirs).max()
    print(f"PARITY {what}: {error:.2e} of the largest logit")
    assert error < 5e-5


@pytest.mark.peers
def test_logits_equal_transformers(tmp_path):
    path = write(tmp_path / "model.gguf", quantised=["blk.0.attn_k.weight", "blk.1.ffn_up.weight"])
    assert_same_logits(path, np.random.default_rng(0).integers(0, 300, (3, 19)), "GGUF")


@pytest.fixture
def smollm2():
    cached = assets.cache_dir() / "trees" / SMOLLM2.rpartition("=")[2]
    if not cached.exists():
        pytest.skip("SmolLM2 is not cached")
    return pathlib.Path(assets.resolve(SMOLLM2))


@pytest.mark.peers
def test_the_published_smollm2(smollm2):
    transformers = pytest.importorskip("transformers")
    reference = transformers.AutoTokenizer.from_pretrained(str(smollm2.parent), gguf_file=smollm2.name)
    found = gguf_file.tokenizer(smollm2)
    messages = [{"role": "user", "content": "What is the capital of France? It's 12,345 km\n\n\tfar; naïve 東京 🙂."}]
    prompt = reference.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    for text in (*TEXTS, prompt):
        assert found.backend.encode(text).ids == reference(text)["input_ids"]
    assert found.backend.id_to_token(found.pad_id) == reference.pad_token
    assert found.specials == {"bos": reference.bos_token, "eos": reference.eos_token, "unk": reference.unk_token}
    assert found.chat_template == reference.chat_template
    assert_same_logits(smollm2, np.array([found.backend.encode(prompt).ids]), "SmolLM2")
