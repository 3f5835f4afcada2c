"""What a run's folder may name, and what it may not."""

import importlib.util
import json
import pathlib
import sys

import pytest
from ml_collections import ConfigDict

from research import main
from research.configuration import trust
from research.configuration.moved import current_config
from research.configuration.transfer import load_params
from research.errors import UserError
from research.evaluators.features import TrainedRun
from research.experiment import Experiment
from research.reporting.record import Record, load_config

ROOT = pathlib.Path(__file__).parents[2]
MODES = ("evaluate", "predict", "generate", "export")


def write(folder, config):
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture
def evil(tmp_path, monkeypatch):
    """A module that leaves a file when it is imported, and another one when it is called."""
    (tmp_path / "evil_parts.py").write_text(
        f"import pathlib\npathlib.Path({str(tmp_path)!r}, 'imported').touch()\n"
        f"def run(): pathlib.Path({str(tmp_path)!r}, 'called').touch()\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    sys.modules.pop("evil_parts", None)


BAD = {"call": "evil_parts.run"}
PLACES = {
    "config.task": {"task": BAD},
    "config.task.model.encoder": {"task": {"call": "research.tasks.causal_lm.CausalLM", "model": {"encoder": BAD}}},
    "config.data.ops[1][0]": {"data": {"ops": [{"call": "research.data.text.Tokenize"}, [BAD]]}},
    "config.data.source.records[0].x": {"data": {"source": {"records": [{"x": BAD}]}}},
    "config.evals.x": {"evals": {"x": BAD}},
    "config.evals.x.data.source": {"evals": {"x": {"data": {"source": BAD}}}},
    "config.derived.spec": {"derived": {"spec": BAD}},
    "config.task.call": {"task": {"call": {"call": "evil_parts.run"}}},
    **{f"config.{key}": {key: BAD} for key in ("init", "optimizer", "mesh", "checkpoint", "log", "decoding")},
    **{f"config.{key}": {key: BAD} for key in ("tokenizer", "unknown")},
}


@pytest.mark.parametrize("name", PLACES)
def test_every_node_is_checked_and_nothing_is_imported(name, evil):
    folder = write(evil / "run", PLACES[name])
    with pytest.raises(UserError) as error:
        load_config(folder)
    shown = name.removesuffix(".call")
    assert str(error.value).startswith(f"{shown}.call: {folder / 'config.json'} wants to call ")
    assert "evil_parts.run" in str(error.value)
    assert "--trust=evil_parts" in str(error.value) or name == "config.task.call"
    assert not (evil / "imported").exists()


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_refuses(mode, evil, capsys):
    folder = write(evil / "run", PLACES["config.evals.x"])
    flags = ["--prompt=a"] if mode == "generate" else []
    # Overrides look at what a node calls, so the config is checked before they are applied.
    for override in ([], ["--config.evals.x.command=a"]):
        assert main.main([f"--mode={mode}", f"--workdir={folder}", *flags, *override]) == 2
        assert "config.evals.x.call: " in capsys.readouterr().err
    assert not (evil / "imported").exists()


REFUSED = (
    *(
        "os.system",
        "builtins.exec",
        "builtins.eval",
        "subprocess.run",
        "pathlib.Path.write_text",
        "importlib.import_module",
    ),
    *("research.reporting.benchmark.run", "research.train.run", "research.main.main", "research.build.locate"),
    *("research.export.run", "research.assets.resolve", "research.runtime.allocator.keep"),
    # only begin like what is allowed
    *(
        "research.tasks_evil.x",
        "research.optimizers.adamw",
        "optaxx.adamw",
        "researchx.tasks.classification.Classification",
    ),
    # what a module imports, and what is reached through it
    *("research.data.source.os.system", "research.data.source.importlib.import_module", "research.data.source.pathlib"),
    *("research.data.source.UserError", "research.models.bert.nn.Module", "research.data.source.__globals__"),
    *(
        "research.models.bert.Encoder.clone",
        "research.pretrained.torch_zip.pickle.loads",
        "research.data.tokenizer.json",
    ),
    *("optax._src.base.identity", "optax.jax.jit", "optax.contrib._muon.muon", "optax.tree_map_params"),
    # private, called for its effect, or returning no part of a run
    *("research.data.source._stock_builder", "research.pretrained.huggingface.save", "research.generation.draw.write"),
    *(
        "research.pretrained.weight_files.write",
        "research.pretrained.weight_files.read_json",
        "research.data.rows.read",
    ),
    *("research.experiment.Experiment", "research.checkpoint.quieten", "research.sharding.place"),
    # not there, or not a dotted path
    *("research.data.nowhere.Thing", "research.data", "research", "os", "", ".os.system", "research..data.source.tfds"),
    *("research.data./tmp/x.Thing", 5, True, ["os.system"], {"a": 1}),
)


@pytest.mark.parametrize("call", REFUSED, ids=str)
def test_refused(call, tmp_path):
    with pytest.raises(UserError, match=r"^config\.task\.call: "):
        load_config(write(tmp_path / "run", {"task": {"call": call}}))


@pytest.mark.parametrize(
    "call",
    [
        *("research.optimizer.sgd", "research.sharding.make_mesh", "research.checkpoint.Checkpoints"),
        *("research.experiment.Log", "research.generation.decoding.Decoding", "research.evaluators.squad.Squad"),
        *("optax.scale_by_lion", "optax.adafactor", "optax.contrib.muon", "optax.warmup_cosine_decay_schedule"),
        *("research.transfer.load_params", "research.diffusion.Gaussian", None),  # older names, and a section's default
    ],
)
def test_allowed(call, tmp_path):
    load_config(write(tmp_path / "run", {"task": {"call": call}}))


def test_all_recorded_runs_may_be_read():
    runs = sorted(ROOT.glob("experiments/*/runs/*/*/config.json"))
    assert len(runs) > 50
    for path in runs:
        trust.check(current_config(json.loads(path.read_text())), path)


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.py")), ids=lambda path: path.stem)
def test_what_configs_name_may_be_read_back(path):
    spec = importlib.util.spec_from_file_location("config", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for variant in module.VARIANTS:
        trust.check(json.loads(module.get_config(variant).to_json()), path)


def test_the_user_trusts_a_package(evil, capsys):
    folder = write(evil / "run", {"evals": {"x": BAD, "y": {"call": "other.thing"}}})
    assert main.main(["--mode=evaluate", f"--workdir={folder}", "--trust=evil_parts"]) == 2
    assert "config.evals.y.call" in capsys.readouterr().err
    for flags in (["--trust=evil_parts,other"], ["--trust=evil_parts", "--trust=other.thing"]):
        assert main.main(["--mode=evaluate", f"--workdir={folder}", *flags]) == 2
        assert "config.batch_size: it is missing" in capsys.readouterr().err
    assert main.main(["--mode=evaluate", f"--workdir={folder}", "--trust=evil_part"]) == 2
    assert "config.evals.x.call" in capsys.readouterr().err
    assert main.main(["--mode=evaluate", f"--workdir={folder}", "--trust=evil_parts,"]) == 2
    assert "--trust: '' is not a module" in capsys.readouterr().err


def test_trust_ends_with_the_command():
    with trust.also(["evil_parts"]):
        trust.check({"task": BAD}, pathlib.Path("x"))
    with pytest.raises(UserError):
        trust.check({"task": BAD}, pathlib.Path("x"))


def own(folder, call="evil_parts.run"):
    """The config of a user, who names evil_parts."""
    return {
        "batch_size": 8,
        "num_steps": 1,
        "task": {"call": call},
        "data": {"call": "research.data.dataset.Dataset"},
        "init": {"call": "research.configuration.transfer.load_params", "path": str(folder)},
    }


def test_a_config_of_the_users_own_is_trusted_and_what_it_names(evil):
    stored = own("elsewhere")
    folder = write(evil / "run", stored)
    (folder / "tokenizer").mkdir()
    with trust.also([]):
        with pytest.raises(UserError, match=r"^config\.task\.call: "):
            Record(folder, stored)
        experiment = Experiment(ConfigDict(stored), workdir=folder)
        Record(folder, stored)
        assert load_config(folder).task.call == "evil_parts.run"
        assert experiment._kept
        # That the config names one function of a module does not open the modules of this package.
        with pytest.raises(UserError, match=r"^config\.task\.call: "):
            load_config(write(evil / "other", {"task": {"call": "research.pretrained.huggingface.save"}}))


def test_a_config_file_and_overrides_run_anything(evil, capsys):
    config = evil / "config.py"
    config.write_text(
        f"from ml_collections import ConfigDict\ndef get_config():\n    return ConfigDict({own('x')!r})\n"
    )
    main.main([f"--config={config}", "--mode=evaluate", f"--workdir={evil / 'run'}"])
    assert "wants to call" not in capsys.readouterr().err
    folder = write(evil / "run", own("x", "research.tasks.classification.Classification"))
    (folder / "checkpoints").mkdir()
    main.main(["--mode=evaluate", f"--workdir={folder}", "--config.task.call=evil_parts.run"])
    assert "wants to call" not in capsys.readouterr().err


def test_folders_that_a_config_leads_to_are_checked(evil):
    folder = write(evil / "run", own("x"))
    (folder / "checkpoints").mkdir()
    with pytest.raises(UserError, match=r"^config\.task\.call: "):
        load_params(str(folder), None, {})
    with pytest.raises(UserError, match=r"^config\.task\.call: "):
        TrainedRun(str(folder)).check((8, 8, 1), ("a", "b"))
    (folder / "tokenizer").mkdir()
    with trust.also([]):
        experiment = Experiment(ConfigDict(own("x", "research.tasks.classification.Classification")), workdir=folder)
        with pytest.raises(UserError, match=r"^config\.task\.call: "):
            _ = experiment.tokenizer
    assert not (evil / "imported").exists()


def test_a_folder_may_name_nothing_that_writes_or_runs():
    """A guard for parts that are added: their own code must not do what a folder may not."""
    import ast

    effects = {"system", "popen", "Popen", "write_text", "write_bytes", "rmtree", "unlink", "exec", "eval", "mkdir"}
    for package in trust.PACKAGES:
        base = ROOT.joinpath(*package.split("."))
        for file in base.rglob("*.py") if base.is_dir() else [base.with_suffix(".py")]:
            module = ".".join(file.relative_to(ROOT).with_suffix("").parts)
            for node in ast.parse(file.read_text()).body:
                if not isinstance(node, ast.FunctionDef | ast.ClassDef) or not trust._is_part(f"{module}.{node.name}"):
                    continue
                made = [n for n in ast.walk(node) if isinstance(n, ast.FunctionDef)]
                run = [n for n in made if n.name in ("__init__", "__post_init__", "__call__", "setup", node.name)]
                for call in (c for n in run for c in ast.walk(n) if isinstance(c, ast.Call)):
                    called = getattr(call.func, "attr", getattr(call.func, "id", ""))
                    assert called not in effects, f"{module}.{node.name} calls {called}"
