"""The command line: what it takes, and every mistake in one line with exit status 2."""

import os
import pathlib
import re
import subprocess
import sys

import pytest

from research import main

ROOT = pathlib.Path(__file__).parents[1]
MOVIES = f"--config={ROOT}/configs/movie_snippets.py"
TINY = f"{MOVIES}:tiny"
TABLE = f"--config={ROOT}/configs/finetune_text.py"


@pytest.fixture(autouse=True)
def compiled(monkeypatch, tmp_path_factory):
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path_factory.getbasetemp().parent / "compiled"))


def mistake(capsys, *arguments):
    """Runs a command line that is wrong and returns the line that says why."""
    assert main.main(arguments) == 2
    captured = capsys.readouterr()
    lines = captured.err.splitlines()
    assert captured.out == ""
    assert len(lines) == 1, captured.err
    assert lines[0].startswith("error: ")
    return lines[0]


FLAGS = {
    "no file": (["--config=configs/movie_snipets.py"], "no file configs/movie_snipets.py; did you mean 'configs/movie"),
    "no variant": ([f"{MOVIES}:tinny"], "no variant 'tinny'; did you mean 'tiny'"),
    "no task": ([f"--config={ROOT}/configs/glue.py"], "no variant ''; there are: cola"),
    "no mode": ([TINY, "--mode=evalute"], "--mode: there is no 'evalute'; did you mean 'evaluate'"),
    "no such file": (["--config=configs/no_such.py"], "no file configs/no_such.py; there are: configs/bert"),
    "a flag far from any": ([TINY, "--foo=1"], "--foo: there is no such flag; there are: --candidates, --checkpoint"),
    "no flag": ([TINY, "--workdri=x"], "--workdri: there is no such flag; did you mean '--workdir'"),
    "no value": ([TINY, "--mode"], "--mode: expected one argument"),
    "a bare word": ([TINY, "train"], "'train' is no flag"),
    "spaces": ([TINY, "--config.seed", "3"], "--config.seed: it has no value; write --config.seed=VALUE"),
    "no config": ([], "--config: say which config file"),
    "train a checkpoint": ([TINY, "--checkpoint=best"], "--checkpoint: --mode=train takes no such flag"),
    "train an input": ([TINY, "--input=x"], "--input: --mode=train takes no such flag"),
    "evaluate to": (["--mode=evaluate", "--output=x"], "--output: --mode=evaluate takes no such flag"),
}


@pytest.mark.parametrize("case", FLAGS)
def test_flags(case, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    arguments, message = FLAGS[case]
    assert message in mistake(capsys, f"--workdir={tmp_path}/run", *arguments)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("mode", ["train", "evaluate"])
@pytest.mark.parametrize("name", ["file", "file/run", "file/a/b"])
def test_a_workdir_that_is_a_file_or_below_one(mode, name, capsys, tmp_path):
    (tmp_path / "file").touch()
    line = mistake(capsys, TINY, f"--workdir={tmp_path / name}", f"--mode={mode}")
    assert line == f"error: --workdir: {tmp_path / 'file'} is a file; name a folder"


def test_a_workdir_that_cannot_be_written(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: path != tmp_path)
    line = mistake(capsys, TINY, f"--workdir={tmp_path}/a/run")
    assert line == f"error: --workdir: {tmp_path} cannot be written to; name another folder"


def test_no_workdir(capsys):
    assert "--workdir: say which folder" in mistake(capsys, TINY)


@pytest.mark.parametrize("mode", ["evaluate", "predict", "export"])
def test_no_run(mode, capsys, tmp_path):
    assert f"--workdir: {tmp_path} holds no run" in mistake(capsys, f"--mode={mode}", f"--workdir={tmp_path}")
    (tmp_path / "empty").touch()
    flags = [f"--input={tmp_path}/empty"] if mode == "predict" else []
    assert "holds no checkpoints" in mistake(capsys, TINY, f"--mode={mode}", f"--workdir={tmp_path}", *flags)


OVERRIDES = {
    "top level": ("batchsize=8", "config.batchsize: there is no such key; did you mean 'batch_size'"),
    "section": ("optimizer.learnin_rate=1", "config.optimizer.learnin_rate: .* did you mean 'learning_rate'"),
    "unnamed call": ("checkpoint.bset=x", "config.checkpoint.bset: .* did you mean 'best'"),
    "in a sequence": ("data.ops[0].max_lenght=8", r"config.data.ops\[0\].max_lenght: .* did you mean 'max_length'"),
    "in an evaluator": ("evals.test.score=f1", "config.evals.test.score: .* did you mean 'scores'"),
    "parent": ("evals.tets.scores=f1", "config.evals.tets: .* did you mean 'test'"),
    "below a value": ("batch_size.x=1", "config.batch_size.x: there is no such key below a plain value"),
    "index": ("data.ops[1].max_length=8", r"config.data.ops\[1\]: the sequence has 1 items"),
    "no sequence": ("optimizer[0]=8", "config.optimizer: it is no sequence"),
    "odd key": ("data..x=8", "config.data..x: keys are written like"),
    "no key": ("=8", "config.: keys are written like"),
    "float for int": ("batch_size=8.0", "config.batch_size: '8.0' is not an integer"),
    "text for int": ("batch_size=many", "config.batch_size: 'many' is not an integer"),
    "bool for int": ("batch_size=true", "config.batch_size: 'true' is not an integer"),
    "null for int": ("batch_size=null", "config.batch_size: it is missing"),
    "text for float": ("optimizer.learning_rate=1e-3x", "config.optimizer.learning_rate: '1e-3x' is not a number"),
    "bool for float": ("num_epochs=true", "config.num_epochs: 'true' is not a number"),
    "bool for a new int": ("optimizer.layer_decay=true", "config.optimizer.layer_decay: True is a bool"),
    "nothing": ("batch_size=", "config.batch_size: '' is not an integer"),
    "value for section": (
        "optimizer=adam",
        "config.optimizer: it is a section, not 'adam'; override its keys",
    ),
    "garbage for section": ("evals={test", "config.evals: it is a section, not '{test'"),
    "section misspelt": ('optimizer={"learning_rat": 1}', "config.optimizer.learning_rat: .* 'learning_rate'"),
    "section wanting": ("optimizer={}", "config.optimizer.learning_rate: make_optimizer needs it"),
    "evals": ('evals={"test": {"x": 1}}', "config.evals.test: it is no evaluator"),
    "task": ("task={}", "config.task: it must be a section with a `call`"),
    "no such class": (
        "task.call=research.tasks.classification.Clasification",
        "no 'Clasification' in .* 'Classification'",
    ),
    "no such module": (
        "task.call=research.tasks.clasification.X",
        "no module .*; did you mean",
    ),
    "below a class": ("task.call=research.tasks.classification.Classification.x", "config.task.call: no module"),
    "no package": ("task.call=reserch.tasks.X", "config.task.call: no module 'reserch.tasks'; did you"),
    "no module": ("task.call=Classification", "config.task.call: 'Classification' is not of the form package"),
    "not callable": (
        "task.call=research.errors.difflib",
        "'research.errors.difflib' cannot be called",
    ),
    "package missing": (
        "task.call=needs_a_package.Task",
        "needs the package 'a_package_that_nobody_has'",
    ),
    "batch size": ("optimizer.microbatches=3", "config.batch_size: 8 does not divide into 3 parts"),
    "mesh": ("mesh.model=5", "config.mesh: .* needs .* devices"),
    "both lengths": ("num_steps=5", "config.num_steps, config.num_epochs: set one of them, and only one"),
    "neither length": ("num_epochs=null", "config.num_steps, config.num_epochs: set one of them"),
    "negative": ("num_epochs=-1.0", "config.num_epochs: -1.0 is less than 0"),
    "log never": ("log.every_steps=0", "config.log: every_steps must be at least 1"),
    "objective": ("task.objective=softmx", "config.task.objective: unknown 'softmx'; did you mean 'softmax'"),
    "smoothing": ("task.label_smoothing=2", "config.task.label_smoothing: 2.* must lie in"),
    "schedule": ("optimizer.schedule=linaer", "config.optimizer.schedule: unknown 'linaer'; did you mean 'linear'"),
    "score": (
        "evals.test.scores=acuracy",
        "scores: unknown score 'acuracy'; did you mean 'accuracy'",
    ),
    "score of others": (
        "evals.test.scores=pearson",
        "config.evals.test.scores: 'pearson' is not defined for 'softmax' with 2 outputs",
    ),
    "features": ("data.features=input_ids,label", "config.data.features: 'attention_mask' is missing"),
    "no feature": ("data.features=input_id,attention_mask,label", "'input_id'; did you mean 'input_ids'"),
    "text field": ('data.ops[0].fields=["texts"]', "no text field 'texts'; did you mean 'text'"),
    "too long": ("data.ops[0].max_length=99", "max_length 99 is more than the 32 tokens"),
    "early stopping": ("checkpoint.patience=3", "config.checkpoint.patience: early stopping needs"),
    "frozen nothing": ('optimizer.freeze=["encodr"]', "config.optimizer.freeze: 'encodr' finds no parameter"),
}


@pytest.mark.parametrize("case", OVERRIDES)
def test_overrides(case, capsys, tmp_path, monkeypatch):
    (tmp_path / "needs_a_package.py").write_text("import a_package_that_nobody_has\n")
    monkeypatch.syspath_prepend(tmp_path)
    override, message = OVERRIDES[case]
    line = mistake(capsys, TINY, f"--workdir={tmp_path}/run", f"--config.{override}")
    assert re.search(message, line), line
    assert not (tmp_path / "run" / "checkpoints").exists()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["seed=1", "seed=2"], "config.seed: it is overridden by the later --config.seed"),
        (
            ["evals.test.scores=f1", "evals={}"],
            "config.evals.test.scores: it is overridden by the later",
        ),
    ],
)
def test_overrides_without_effect(overrides, message, capsys, tmp_path):
    assert message in mistake(capsys, TINY, f"--workdir={tmp_path}", *(f"--config.{o}" for o in overrides))


TABLES = {
    "no file given": ([], "config.data.source.train: table needs it"),
    "no such file": (["train={}/tabel.csv"], "config.data.source: no such file or .* did you mean 'table.csv'"),
    "no such column": (["train={}/table.csv", "text=txt"], "has no column 'txt'; did you mean 'text'"),
    "no such kind": (
        ["train={}/table.csv", "kind=clasification"],
        "config.data.source.kind: no 'clasification'; ",
    ),
    "held out": (["train={}/table.csv", "held_out=2"], "config.data.source.held_out: 2"),
}


@pytest.mark.parametrize("case", TABLES)
def test_tables(case, capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    (tmp_path / "table.csv").write_text("text,label\na,x\nb,y\nc,x\n")
    overrides, message = TABLES[case]
    given = [f"--config.data.source.{o.format(tmp_path)}" for o in overrides]
    own = '--config.tokenizer={"call": "research.data.tokenizer.byte_level"}'
    line = mistake(capsys, TABLE, f"--workdir={tmp_path}/run", own, *given)
    assert re.search(message, line), line


FILES = {
    "syntax": ("def get_config(:\n", ":1: SyntaxError: "),
    "name": ("def get_config():\n    x = 3\n    return confg\n", ":3: NameError: name 'confg' is not defined"),
    "key": ("def get_config():\n    return {}['model']\n", ":2: KeyError: 'model'"),
    "import": ("import a_package_that_nobody_has\n", ":1: ModuleNotFoundError: No module named 'a_package"),
    "no function": ("x = 3\n", "AttributeError: .*get_config"),
    "no config": ("def get_config():\n    return 3\n", "returns a int, not a ConfigDict"),
    "no variants": ("def get_config():\n    return 3\n", "TypeError: get_config"),
}


@pytest.mark.parametrize("case", FILES)
def test_config_files(case, capsys, tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(FILES[case][0])
    line = mistake(capsys, f"--config={path}{':x' * (case == 'no variants')}", f"--workdir={tmp_path}/run")
    assert re.search(FILES[case][1], line), line
    assert str(path) in line


def test_as_a_program(tmp_path):
    def run(*arguments):
        environment = os.environ | {"JAX_PLATFORMS": "cpu"}
        command = [sys.executable, "-m", "research.main", *arguments]
        return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)

    nothing = run()
    assert nothing.returncode == 2
    assert "--workdir" in nothing.stderr
    helped = run("--help")
    assert helped.returncode == 0
    assert helped.stderr == ""
    for word in (*main.MODES, *(f"--{name}" for name in main.FLAGS), "--distributed"):
        assert word in helped.stdout
    wrong = run(TINY, f"--workdir={tmp_path}/run", "--config.task.model.encoder.hidden_siz=8")
    assert wrong.returncode == 2
    assert wrong.stderr.startswith("error: config.task.model.encoder.hidden_siz: there is no such key; did you mean")
    assert wrong.stderr.count("\n") == 1
