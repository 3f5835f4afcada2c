"""Every form of URI, against archives made here and clients that copy them."""

import hashlib
import io
import json
import multiprocessing
import pathlib
import subprocess
import sys
import tarfile
import zipfile

import pytest

from research import assets
from research.errors import UserError


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("RESEARCH_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(assets, "_RESOLVED", {})
    return tmp_path / "cache"


def _tar(files: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def _zip(files: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as zipped:
        for name, content in files.items():
            zipped.writestr(name, content)
    return buffer.getvalue()


def _sha(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


WHEEL = _zip({"thing/data.txt": b"wheel", "thing/deep/a": b"a"})
SDIST = _tar({"thing-1.0/data.txt": b"sdist", "thing-1.0/inner.tar.gz": _tar({"in/x.txt": b"nested"})})


@pytest.fixture
def clients(monkeypatch):
    """Stands in for the registries; maps what a client is asked for to what it puts into its folder."""

    class Clients:
        def __init__(self):
            self.wheel = self.sdist = self.npm = self.apt = None
            self.calls = []

        def run(self, command, cwd=None, **kwargs):
            if command[0] == "dpkg-deb":
                return subprocess.CompletedProcess(command, 0, stdout=_tar({"usr/share/a.txt": b"debian"}))
            kind = {"npm": "npm", "apt-get": "apt"}.get(command[0], "wheel" if command[1] == "-m" else "sdist")
            self.calls.append((kind, command))
            offer = getattr(self, kind)
            if offer is None:
                raise subprocess.CalledProcessError(1, command, stderr=f"WARNING: x\nERROR: no {kind} here\n")
            if isinstance(offer, Exception):
                raise offer
            name, content = offer
            pathlib.Path(cwd, name).write_bytes(content)
            return subprocess.CompletedProcess(command, 0)

    clients = Clients()
    monkeypatch.setattr(assets.subprocess, "run", clients.run)
    return clients


def test_local_path(tmp_path, monkeypatch):
    (tmp_path / "weights").mkdir()
    assert assets.resolve(str(tmp_path / "weights")) == tmp_path / "weights"
    monkeypatch.setenv("HOME", str(tmp_path))
    assert assets.resolve("~/weights") == tmp_path / "weights"
    with pytest.raises(UserError, match=r"wieghts/config.json'; did you mean 'weights'\?"):
        assets.resolve(str(tmp_path / "wieghts" / "config.json"))


@pytest.mark.parametrize(
    ("uri", "message"),
    [
        ("pipy://a==1/b", "unknown scheme 'pipy://' .* did you mean 'pypi'"),
        ("pypi://thing/data.txt", "write pypi://NAME==VERSION/MEMBER"),
        ("pypi://thing==1.0/../../etc", "may not hold '..'"),
        ("pypi://--index-url==1.0/x", "write pypi://"),
        ("npm://thing@latest/x", "write npm://NAME@VERSION/MEMBER"),
        ("apt://thing==1.0/x", "write apt://NAME=VERSION/MEMBER"),
        ("pypi://thing==1.0/x#md5=00", "'#md5=00' .* is not #sha256= and 64"),
        ("pypi://thing==1.0/x#sha256=00", "is not #sha256= and 64"),
        ("hf://", "names no repository"),
        ("hf://datasets/org/name", r"is a data set, which the functions of research\.data\.files alone can read"),
    ],
)
def test_malformed_uri(uri, message, clients):
    clients.wheel = ("thing-1.0-py3-none-any.whl", WHEEL)
    with pytest.raises(UserError, match=message):
        assets.resolve(uri)


def test_wheel_first_and_cached(clients):
    clients.wheel = ("thing-1.0-py3-none-any.whl", WHEEL)
    clients.sdist = ("thing-1.0.tar.gz", SDIST)
    assert assets.resolve("pypi://thing==1.0/thing/data.txt").read_bytes() == b"wheel"
    assert assets.resolve("pypi://thing==1.0/thing/deep").is_dir()
    assert [kind for kind, _ in clients.calls] == ["wheel"]
    command = clients.calls[0][1]
    assert command[:4] == [sys.executable, "-m", "pip", "download"]
    assert {"--no-deps", "--only-binary=:all:"} < set(command)
    assert assets.resolved()["pypi://thing==1.0/thing/deep"] == f"sha256:{_sha(WHEEL)}"


def test_sdist_and_nested_archive(clients):
    clients.sdist = ("thing-1.0.tar.gz", SDIST)
    uri = f"pypi://thing==1.0/thing-1.0/inner.tar.gz!/in/x.txt#sha256={_sha(SDIST)}"
    assert assets.resolve(uri).read_bytes() == b"nested"
    with pytest.raises(UserError, match=r"'thing-1\.0' before '!/' is a folder"):
        assets.resolve("pypi://thing==1.0/thing-1.0!/x")


def test_a_pinned_sdist_beside_a_wheel(clients):
    clients.wheel = ("thing-1.0-py3-none-any.whl", WHEEL)
    clients.sdist = ("thing-1.0.tar.gz", SDIST)
    assets.resolve("pypi://thing==1.0/thing/data.txt")
    uri = f"pypi://thing==1.0/thing-1.0/data.txt#sha256={_sha(SDIST)}"
    assert assets.resolve(uri).read_bytes() == b"sdist"


def test_another_hash_is_refused_and_not_kept(clients, cache):
    clients.wheel = ("thing-1.0-py3-none-any.whl", WHEEL)
    with pytest.raises(UserError, match=f"has SHA-256 {_sha(WHEEL)}, expected {'0' * 64}"):
        assets.resolve(f"pypi://thing==1.0/thing/data.txt#sha256={'0' * 64}")
    assert [path for path in cache.rglob("*") if path.is_file()] == []


def test_missing_member_names_the_nearest(clients):
    clients.wheel = ("thing-1.0-py3-none-any.whl", WHEEL)
    with pytest.raises(UserError, match=r"holds no 'thing/dat.txt'; did you mean 'data.txt'\?"):
        assets.resolve("pypi://thing==1.0/thing/dat.txt")


def test_npm_and_apt(clients):
    clients.npm = ("scope-thing-1.2.3.tgz", _tar({"package/a.json": b"{}"}))
    assert assets.resolve("npm://@scope/thing@1.2.3/package/a.json").read_bytes() == b"{}"
    assert clients.calls[-1][1] == ["npm", "pack", "--ignore-scripts", "@scope/thing@1.2.3"]
    clients.apt = ("thing_1%3a2.0-1_all.deb", b"!<arch>\nrest")
    assert assets.resolve("apt://thing=1:2.0-1/usr/share/a.txt").read_bytes() == b"debian"
    assert clients.calls[-1][1] == ["apt-get", "download", "thing=1:2.0-1"]


def test_no_client_and_no_network_say_where_to_put_the_archive(clients, cache):
    clients.npm = FileNotFoundError()
    folder = cache / "npm" / "thing=1.2.3"
    with pytest.raises(UserError, match=f"npm is not installed; without a network, .* into '{folder}'"):
        assets.resolve("npm://thing@1.2.3/package")
    with pytest.raises(
        UserError, match=r"cannot fetch .*: ERROR: no wheel here; ERROR: no sdist here; without"
    ) as info:
        assets.resolve("pypi://thing==1.0/x")
    assert "\n" not in str(info.value)
    folder.mkdir(parents=True)
    (folder / "any-name.tgz").write_bytes(_tar({"package/a.json": b"put here"}))
    assert assets.resolve("npm://thing@1.2.3/package/a.json").read_bytes() == b"put here"


@pytest.mark.parametrize(
    "content",
    [_tar({"../evil": b""}), _zip({"../evil": b""}), _zip({"/evil": b""}), b"junk"],
    ids=["tar", "zip", "absolute", "junk"],
)
def test_hostile_and_broken_archives(clients, cache, content):
    clients.wheel = ("thing-1.0-py3-none-any.whl", content)
    with pytest.raises(UserError, match=r"cannot unpack thing-1\.0-py3-none-any\.whl"):
        assets.resolve("pypi://thing==1.0/evil")
    assert not list(cache.rglob("evil"))
    assert not list((cache / "trees").glob("*"))


def test_an_interrupted_unpacking_is_not_used(clients, cache, monkeypatch):
    clients.wheel = ("thing-1.0-py3-none-any.whl", WHEEL)
    extract = assets._extract

    def half(archive, folder):
        (folder / "thing").mkdir()
        raise KeyboardInterrupt

    monkeypatch.setattr(assets, "_extract", half)
    with pytest.raises(KeyboardInterrupt):
        assets.resolve("pypi://thing==1.0/thing")
    monkeypatch.setattr(assets, "_extract", extract)
    assert assets.resolve("pypi://thing==1.0/thing/data.txt").read_bytes() == b"wheel"


def _resolve_in_a_process(uri):
    return assets.resolve(uri).read_bytes()


def test_processes_that_race(cache):
    folder = cache / "pypi" / "thing=1.0"
    folder.mkdir(parents=True)
    (folder / "thing-1.0.whl").write_bytes(_zip({f"thing/{i}": b"x" * 1000 for i in range(300)}))
    with multiprocessing.get_context("spawn").Pool(3) as pool:
        assert pool.map(_resolve_in_a_process, ["pypi://thing==1.0/thing/299"] * 3, chunksize=1) == [b"x" * 1000] * 3
    assert not list((cache / "partial").iterdir())


def test_the_one_that_loses_a_race_uses_the_winner(clients, monkeypatch):
    clients.wheel = ("thing-1.0-py3-none-any.whl", WHEEL)
    extract = assets._extract

    def slow(archive, folder):
        extract(archive, folder)
        winner = assets._tree(_sha(WHEEL))
        winner.mkdir(parents=True)
        (winner / "winner").write_bytes(b"first")

    monkeypatch.setattr(assets, "_extract", slow)
    assert assets.resolve("pypi://thing==1.0/winner").read_bytes() == b"first"


# --- the hub, by its cache on disk ----------------------------------------------------------------

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """Returns a function that lays out a repository as the hub's client caches it; there is no network."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)

    def lay(repo, *files):
        folder = tmp_path / "hub" / f"models--{repo.replace('/', '--')}"
        (folder / "refs").mkdir(parents=True)
        (folder / "refs" / "main").write_text(COMMIT)
        snapshot = folder / "snapshots" / COMMIT
        for name in files:
            (snapshot / name).parent.mkdir(parents=True, exist_ok=True)
            index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
            (snapshot / name).write_text(json.dumps(index) if name.endswith("index.json") else "x")
        return snapshot

    return lay


def test_hub_from_its_cache(hub):
    snapshot = hub("org/bert", "config.json", "model.safetensors", "vocab.txt", "sub/file.txt")
    for uri in ("hf://org/bert", "hf://org/bert@main", f"hf://org/bert@{COMMIT}"):
        assert assets.resolve(uri) == snapshot
        assert assets.resolved()[uri] == f"commit:{COMMIT}"
    assert assets.resolve("hf://org/bert/sub/file.txt") == snapshot / "sub/file.txt"
    assert assets.resolve("hf://org/bert@main/config.json") == snapshot / "config.json"


def test_hub_without_an_organisation(hub):
    snapshot = hub("gpt2", "config.json", "pytorch_model.bin", "vocab.json")
    assert assets.resolve("hf://gpt2") == snapshot
    assert assets.resolve("hf://gpt2@main/vocab.json") == snapshot / "vocab.json"


def test_hub_with_nothing_cached(hub, tmp_path):
    with pytest.raises(UserError, match=f"run `hf download org/nothing` and copy .* '{tmp_path}/hub'") as info:
        assets.resolve("hf://org/nothing")
    assert "\n" not in str(info.value)
    hub("org/bert", "config.json", "model.safetensors", "vocab.txt")
    with pytest.raises(UserError, match="no such file"):
        assets.resolve("hf://org/bert/missing.json")


class _Hub:
    """Stands in for `snapshot_download`: what a call may download, by its patterns, goes into a folder."""

    def __init__(self, folder, remote):
        self.folder, self.remote, self.downloads = folder / "snapshots" / COMMIT, remote, []

    def __call__(self, repo, revision, allow_patterns, local_files_only, ignore_patterns=()):
        from huggingface_hub import errors
        from huggingface_hub.utils import filter_repo_objects

        if local_files_only:
            if not self.folder.exists():
                raise errors.LocalEntryNotFoundError("nothing cached")
            return str(self.folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        wanted = filter_repo_objects(self.remote, allow_patterns=allow_patterns, ignore_patterns=list(ignore_patterns))
        for name in wanted:
            self.downloads.append(name)
            (self.folder / name).write_text("x")
        return str(self.folder)


def test_hub_downloads_safetensors_only_where_there_are_some(tmp_path, monkeypatch):
    hub = _Hub(
        tmp_path,
        ["config.json", "model.safetensors", "pytorch_model.bin", "tokenizer.json", "onnx/model.onnx", "tf_model.h5"],
    )
    monkeypatch.setattr("huggingface_hub.snapshot_download", hub)
    assets.resolve("hf://org/bert")
    assert sorted(hub.downloads) == ["config.json", "model.safetensors", "tokenizer.json"]
    hub.downloads.clear()
    assets.resolve("hf://org/bert")
    assert hub.downloads == []


def test_hub_downloads_pickles_where_there_is_nothing_else(tmp_path, monkeypatch):
    hub = _Hub(tmp_path, ["config.json", "pytorch_model.bin", "vocab.txt"])
    monkeypatch.setattr("huggingface_hub.snapshot_download", hub)
    folder = assets.resolve("hf://org/bert")
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "pytorch_model.bin", "vocab.txt"]


def test_a_partly_cached_repository_is_completed(tmp_path, monkeypatch):
    hub = _Hub(tmp_path, ["config.json", "model.safetensors", "vocab.txt"])
    hub.folder.mkdir(parents=True)
    (hub.folder / "config.json").write_text("x")
    monkeypatch.setattr("huggingface_hub.snapshot_download", hub)
    assert (assets.resolve("hf://org/bert") / "model.safetensors").exists()


def test_a_missing_shard_is_noticed(hub):
    snapshot = hub("org/big", "config.json", "model.safetensors.index.json", "model-00001-of-00002.safetensors")
    (snapshot / "vocab.txt").write_text("x")
    with pytest.raises(UserError, match="'hf://org/big' is not cached"):
        assets.resolve("hf://org/big")
    (snapshot / "model-00002-of-00002.safetensors").write_text("x")
    assert assets.resolve("hf://org/big") == snapshot
