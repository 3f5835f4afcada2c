"""--mode=evaluate --harness=...: likelihoods and texts by hand, tasks of one's own, mistakes; and peers."""

import functools
import json
import math
import types

import jax
import numpy as np
import pytest
import tokenizers
from ml_collections import ConfigDict

from research import export, harness, main, sharding
from research.data import tokenizer
from research.errors import UserError
from research.generation import decoding, sampling
from research.generation.decoding import Decoding
from research.generation.detokenizer import completion
from research.models.encoder_decoder import EncoderDecoder
from research.models.gpt import Decoder
from research.pretrained import huggingface
from research.tasks.causal_lm import CausalLM

pytest.importorskip("lm_eval")
from lm_eval.api.instance import Instance
from lm_eval.tasks import TaskManager

from research.evaluators import harness_model

TEXTS = ["the cat sat on the mat", "a dog ran far away", "where is it? here and there", "one two three four five"]
ROWS = [
    {"question": "the cat sat on", "choices": [" the mat", " a dog", " it"], "answer": 0},
    {"question": "a dog", "choices": [" sat", " ran far away", " x"], "answer": 1},
    {"question": "where is it? ", "choices": ["here", "there", "and"], "answer": 1},
    {"question": "one two three " * 6, "choices": ["four", "five four", "two"], "answer": 0},
]
COMMON = """
dataset_path: json
dataset_kwargs:
  cache_dir: {folder}/cache
  data_files:
    validation: {folder}/rows.jsonl
validation_split: validation
metadata:
  version: 3.0
"""
TASKS = {
    "animals": """
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: "{{answer}}"
metric_list:
  - metric: acc
  - metric: acc_norm
""",
    "likely": """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{question}}{{choices[answer]}}"
metric_list:
  - metric: bits_per_byte
""",
    "written": """
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{choices[answer]}}"
generation_kwargs:
  until: ["a", "."]
  max_gen_toks: 8
  do_sample: false
  temperature: 0.0
metric_list:
  - metric: exact_match
    aggregation: mean
    higher_is_better: true
""",
}
MODEL = Decoder(
    vocab_size=260, hidden_size=16, num_layers=2, num_heads=2, intermediate_size=24, max_positions=40,
    initializer_range=0.5,
)  # fmt: skip


@pytest.fixture(scope="module")
def params():
    return jax.jit(MODEL.init)(jax.random.key(0), np.zeros((1, 4), np.int32))["params"]


@pytest.fixture(scope="module")
def model(params):
    experiment = types.SimpleNamespace(
        plain_task=CausalLM(MODEL),
        tokenizer=tokenizer.byte_level(),
        mesh=sharding.make_mesh(),
        config=ConfigDict({"batch_size": 3, "seed": 0}),
    )
    return harness_model.CausalModel(experiment, params)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Tasks of one's own; those of the harness, which take seconds to list, are left out."""
    monkeypatch.setattr("lm_eval.tasks.TaskManager", functools.partial(TaskManager, include_defaults=False))
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    for name, text in TASKS.items():
        common = COMMON.replace("{folder}", str(tmp_path / "tasks"))
        (tmp_path / "tasks" / f"{name}.yaml").write_text(f"task: {name}\n{common}{text}")
    return tmp_path / "tasks"


def ask(method, arguments):
    return method([Instance(method.__name__, {}, each, i) for i, each in enumerate(arguments)], disable_tqdm=True)


APPLY = jax.jit(MODEL.apply)


def log_probabilities(params, ids):
    """Of the token after each of ids [T], float64 [T, V]; what comes after them changes nothing."""
    padded = np.zeros((1, MODEL.max_positions), np.int32)
    padded[0, : len(ids)] = ids
    logits = np.asarray(APPLY({"params": params}, padded)[0, : len(ids)], np.float64)
    return logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))


def by_hand(params, context, continuation):
    ids = [*context, *continuation][-(MODEL.max_positions + 1) :]
    table = log_probabilities(params, ids[:-1])[-len(continuation) :]
    return sum(row[id] for row, id in zip(table, continuation)), [int(row.argmax()) for row in table] == continuation


def test_log_likelihoods_are_those_by_hand(model, params):
    pairs = [("the cat", " sat"), ("", "a dog"), ("x" * 60, "yz"), ("one ", "two"), *[("a", c) for c in "bcde"]]
    found = ask(model.loglikelihood, pairs)
    for (context, continuation), (likelihood, greedy) in zip(pairs, found):
        spaces = context[len(context.rstrip()) :]  # the harness counts them with what follows
        before = [1, *model.tok_encode(context.rstrip(), False)]  # [CLS] begins a text, and no [SEP] ends it
        after = model.tok_encode(spaces + continuation, False)
        want, likeliest = by_hand(params, before, after)
        assert likelihood == pytest.approx(want, rel=1e-5)
        assert greedy == likeliest


def test_the_likeliest_continuation_is_said_to_be_so(model, params):
    ids = [1, *model.tok_encode("the", False)]
    best = int(log_probabilities(params, ids)[-1].argmax())
    other = (best + 1) % MODEL.vocab_size
    found = model._loglikelihood_tokens([(None, ids, [best]), (None, ids, [other])], disable_tqdm=True)
    assert [greedy for _, greedy in found] == [True, False]


def test_choices_of_one_token_are_read_once_and_few_shapes_are_compiled(model):
    assert len(model._rows([(None, [1, 5, 6], [choice]) for choice in (7, 8, 9, 10)])) == 1
    rng = np.random.default_rng(0)
    requests = [(None, [1] * int(n), [int(i) + 4, 5]) for i, n in enumerate(rng.integers(1, 80, 200))]
    shapes = {batch["input_ids"].shape for _, batch in model._batches(model._rows(requests))}
    assert shapes == {(3, 16), (3, 24), (3, 32), (3, 40)}


def test_chunks_of_the_vocabulary_change_nothing(model, params):
    chunked = harness_model.CausalModel(
        types.SimpleNamespace(
            plain_task=CausalLM(MODEL, logits_chunk=3),
            tokenizer=model._tokenizer,
            mesh=model._mesh,
            config=ConfigDict({"batch_size": 2}),
        ),
        params,
    )
    pairs = [("the cat", " sat on the mat"), ("a", "b")]
    assert ask(chunked.loglikelihood, pairs) == [
        (pytest.approx(likelihood, rel=1e-5), greedy) for likelihood, greedy in ask(model.loglikelihood, pairs)
    ]


def test_a_long_text_is_read_in_windows(model, params):
    text = "where is it? here and there, " * 4
    ids = model.tok_encode(text)
    size = MODEL.max_positions
    want, place = 0.0, 0
    while place < len(ids):
        end = min(place + size, len(ids))
        begin = max(end - size, 0) if place else 0
        before = [1, *ids[begin:place]] if place == 0 else ids[max(end - size - 1, 0) : place]
        want += by_hand(params, before, ids[place:end])[0]
        place = end
    short, long = ask(model.loglikelihood_rolling, [("a",), (text,)])
    assert long == pytest.approx(want, rel=1e-5)
    assert short == pytest.approx(by_hand(params, [1], model.tok_encode("a"))[0], rel=1e-5)


@pytest.mark.parametrize("stop", [[], ["."]])
def test_texts_are_the_likeliest_tokens_one_by_one(model, params, stop):
    settings = {"max_gen_toks": 20, "until": stop, "temperature": 0.0, "top_p": 0.9}
    contexts = ["the cat", "a", "where is it? here and there"]
    for context, text in zip(contexts, ask(model.generate_until, [(context, settings) for context in contexts])):
        ids = model.tok_encode(context)[-(MODEL.max_positions - 20) :]
        made = []
        for _ in range(20):
            made.append(int(log_probabilities(params, [*ids, *made])[-1].argmax()))
            if made[-1] in model._tokenizer.end_ids:
                break
        want = model._tokenizer.decode([id for id in made if id not in model._tokenizer.end_ids])
        assert text == (want.split(".")[0] if stop else want)


def test_a_stop_text_ends_the_work(model, monkeypatch):
    (whole,) = ask(model.generate_until, [("a", {"max_gen_toks": 33, "until": []})])
    made = []
    generate = model._generate
    monkeypatch.setattr(model, "_generate", lambda *given: made.append(generate(*given)) or made[-1])
    (text,) = ask(model.generate_until, [("a", {"max_gen_toks": 33, "until": [whole[0]]})])
    assert text == ""
    assert made[0].shape[1] == 1


@pytest.mark.parametrize("settings", [{"num_beams": 3}, {"do_sample": True, "temperature": 0.8, "top_k": 9}])
def test_beams_and_samples_are_generated_as_elsewhere(model, params, settings):
    named = {name: value for name, value in settings.items() if name != "do_sample"}
    ids = model.tok_encode("the cat")
    batch = decoding.pad([ids], model._tokenizer.pad_id)
    want = sampling.generate(
        MODEL, params, batch, Decoding(9, **named), model._tokenizer, jax.random.key(0), np.array([0])
    )
    (text,) = ask(model.generate_until, [("the cat", {"max_gen_toks": 9, "until": [], **settings})])
    assert text == completion(model._tokenizer, np.asarray(want)[0])


def test_encoder_decoders_are_not_asked(model, params):
    task = types.SimpleNamespace(model=EncoderDecoder())
    experiment = types.SimpleNamespace(
        plain_task=task, tokenizer=model._tokenizer, mesh=model._mesh, config=ConfigDict()
    )
    with pytest.raises(UserError, match="EncoderDecoder is no causal language model"):
        harness_model.CausalModel(experiment, params)


def test_settings_of_generation():
    assert harness_model.settings_of({"until": ["\n", ""], "temperature": 0.0, "top_k": 5}) == (Decoding(256), ("\n",))
    sampled = harness_model.settings_of({"do_sample": True, "top_k": 5, "max_new_tokens": 7, "until": []})[0]
    assert sampled == Decoding(7, temperature=1.0, top_k=5)
    beams = harness_model.settings_of({"num_beams": 4, "length_penalty": 0.5, "until": []})[0]
    assert beams == Decoding(256, num_beams=4, length_penalty=0.5)
    with pytest.raises(UserError, match=r"generates with 'typical_p', which is not known here; did you mean 'top_p'\?"):
        harness_model.settings_of({"typical_p": 0.9})
    with pytest.raises(UserError, match="generation_kwargs: top_p: 2 must lie"):
        harness_model.settings_of({"do_sample": True, "temperature": 1.0, "top_p": 2})


def test_more_new_tokens_than_positions_are_one_line(model):
    with pytest.raises(UserError, match=r"up to 256 tokens \(max_gen_toks\), and the model has 40 positions"):
        ask(model.generate_until, [("a", {"until": []})])


@pytest.fixture
def published(tmp_path, params):
    """Weights in Transformers' format, and the config that starts from them."""
    files = tokenizer.byte_level().save(tmp_path / "tokenizer")
    return config_of(huggingface.save(tmp_path / "weights", MODEL, params, tokenizer_files=files))


def config_of(folder):
    call = {"call": "research.pretrained.huggingface.load_model", "path": str(folder), "kind": "causal_lm"}
    records = [{"text": text} for text in TEXTS]
    return ConfigDict(
        {
            "seed": 0,
            "batch_size": 2,
            "num_steps": 0,
            "tokenizer": {"call": "research.data.tokenizer.load", "path": str(folder)},
            "task": {"call": "research.tasks.causal_lm.CausalLM", "model": call},
            "init": {"path": str(folder)},
            "data": {
                "call": "research.data.dataset.Dataset",
                "source": {"call": "research.data.source.examples", "records": records},
                "ops": [{"call": "research.data.language.CausalTokens", "max_length": 16}],
                "features": ["input_ids", "targets", "target_mask", "attention_mask"],
                "length_buckets": 1,
            },
            "optimizer": {"learning_rate": 1e-2},
        }
    )


def test_tasks_of_ones_own_on_published_weights(published, folder, tmp_path, params, model, capsys):
    result = harness.run(published, tmp_path / "none", "animals, likely,written", str(folder))
    assert json.loads((tmp_path / "none" / "harness.json").read_text()) == result
    assert result["step"] is None
    assert result["tasks"]["animals"] == {"version": 3.0, "shots": 0, "examples": 4}
    right = sum(
        np.argmax([s for s, _ in ask(model.loglikelihood, [(row["question"], c) for c in row["choices"]])])
        == row["answer"]
        for row in ROWS
    )
    assert result["metrics"]["animals/acc"] == right / len(ROWS)
    texts = [row["question"] + row["choices"][row["answer"]] for row in ROWS]
    nats = sum(ask(model.loglikelihood_rolling, [(text,) for text in texts]))
    want = -nats / math.log(2) / sum(map(len, texts))
    assert result["metrics"]["likely/bits_per_byte"] == pytest.approx(want, rel=1e-5)
    printed = capsys.readouterr().err
    assert "animals/acc" in printed
    assert "the weights of config.init" in printed


@pytest.mark.parametrize(
    ("tasks", "include", "message"),
    [
        ("animels", "tasks", r"there is no task 'animels'; did you mean 'animals'\?"),
        (",", "tasks", "say which tasks, separated by commas"),
        ("animals", "nowhere", "--harness_include: there is no folder"),
        ("broken", "tasks", "--harness: broken cannot be loaded"),
    ],
)
def test_mistakes_are_one_line(published, folder, tmp_path, tasks, include, message):
    text = (folder / "likely.yaml").read_text().replace("rows.jsonl", "none.jsonl")
    (folder / "broken.yaml").write_text(text.replace("task: likely", "task: broken"))
    with pytest.raises(UserError, match=message) as caught:
        harness.run(published, tmp_path / "none", tasks, str(tmp_path / include))
    assert "\n" not in str(caught.value)


def trained_tokenizer(folder, begin):
    """Write a byte-pair tokenizer that begins texts with a token, or does not."""
    from tokenizers import decoders, models, pre_tokenizers, processors, trainers

    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    special = ["<pad>", "<s>", "</s>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(
        TEXTS, trainers.BpeTrainer(vocab_size=290, special_tokens=special, initial_alphabet=alphabet)
    )
    if begin:
        backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    folder.mkdir(parents=True)
    backend.save(str(folder / "tokenizer.json"))
    roles = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False, **roles}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return backend.get_vocab_size()


def theirs(weights, tasks, folder):
    """Return the harness' metrics with its Hugging Face backend, and its answers to every request."""
    from lm_eval.evaluator import evaluate
    from lm_eval.models.huggingface import HFLM

    model = HFLM(pretrained=str(weights), tokenizer=str(weights), dtype="float32", device="cpu", batch_size=2)
    loaded = harness._load(tasks, str(folder))
    found = evaluate(model, loaded, log_samples=True)
    return harness._metrics(found["results"]), answers(loaded)


def answers(loaded):
    """Return the answers to all requests: numbers and texts."""
    return {name: [request.resps[0] for request in task.instances] for name, task in loaded["tasks"].items()}


@pytest.mark.peers
@pytest.mark.parametrize(
    ("kind", "direction"), [("gpt2", "theirs"), ("llama", "theirs"), ("gpt2", "ours"), ("llama", "ours")]
)
def test_it_says_what_the_hugging_face_backend_says(kind, direction, folder, tmp_path, monkeypatch):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    size = trained_tokenizer(tmp_path / "weights", begin=kind == "llama")
    ids = {"vocab_size": size, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    torch.manual_seed(0)
    if kind == "gpt2":
        settings = transformers.GPT2Config(n_embd=32, n_layer=2, n_head=2, n_positions=48, initializer_range=0.3, **ids)
    else:
        sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
        settings = transformers.LlamaConfig(
            **sizes, intermediate_size=48, max_position_embeddings=48, initializer_range=0.3, **ids
        )
    transformers.AutoModelForCausalLM.from_config(settings).save_pretrained(tmp_path / "weights")
    config, weights = config_of(tmp_path / "weights"), tmp_path / "weights"
    if direction == "ours":  # a run of this project, exported
        config.num_steps, config.init = 3, None
        (tmp_path / "config.py").write_text(
            "from ml_collections import ConfigDict\n\n"
            f"def get_config(_=''):\n    return ConfigDict({config.to_dict()!r})\n"
        )
        assert main.main([f"--config={tmp_path}/config.py", f"--workdir={tmp_path}/run"]) == 0
        weights = export.run(ConfigDict(json.loads((tmp_path / "run/config.json").read_text())), tmp_path / "run")
    else:
        (tmp_path / "run").mkdir()
    kept = {}
    load = harness._load
    monkeypatch.setattr(harness, "_load", lambda *given: kept.setdefault("ours", load(*given)))
    tasks = ",".join(TASKS)
    ours = harness.run(config, tmp_path / "run", tasks, str(folder))["metrics"]
    monkeypatch.setattr(harness, "_load", load)
    want, wanted = theirs(weights, tasks, folder)
    assert ours == {name: pytest.approx(value, rel=1e-4) for name, value in want.items()}
    found = answers(kept["ours"])
    for name in ("animals", "likely"):
        for mine, other in zip(found[name], wanted[name], strict=True):
            np.testing.assert_allclose(mine, other, rtol=1e-4)
    assert found["written"] == wanted["written"]
