"""Where paths are opened: local ones by pathlib, those in buckets by fsspec behind the same interface.

`path` makes either of what a person wrote. A path in a bucket (`gs://bucket/run`, `s3://...`, or any other place that
fsspec knows) reads as a local one does: `/`, `name`, `exists`, `is_dir`, `iterdir`, `glob`, `read_bytes`, `read_text`.
What pathlib writes piece by piece is written by the functions below, as a bucket knows whole objects only: an object
appears at once or not at all, nothing can be appended to it, and a folder is no more than what its objects are called.

Credentials are those that the drivers find: gcloud's or AWS's own files and variables. None is kept here.
"""

import contextlib
import hashlib
import importlib
import io
import logging
import os
import pathlib
import re
import shutil
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TextIO

import numpy as np

from research.errors import UserError, nearest

PROBE_SECONDS = 60.0  # how long a place may take to answer at the start; drivers try again and again for longer
# Where an object that is put appears at once; elsewhere (sftp://, hdfs://, ...) it is put beside and moved.
OBJECT_STORES = ("gs", "s3", "az", "abfs", "abfss", "oss", "oci")
ALIASES = {"gcs": "gs", "s3a": "s3"}
EXTRAS = {"gs": "gcs", "s3": "s3"}  # of this package, with the driver; "buckets" has what all of them need
CREDENTIALS = {
    "gs": "`gcloud auth application-default login`, or GOOGLE_APPLICATION_CREDENTIALS",
    "s3": "`aws configure`, or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY",
}
# What fsspec knows besides: archives, what stands in front of another place, other programs' data; and hf://, which
# `assets.resolve` reads.
_NO_PLACES = set(
    "arrow_hdfs async_wrapper asynclocal asyncwrapper blockcache cached dask data dir dvc filecache generic gist git "
    "hf jlab jupyter libarchive local pyscript reference root simplecache tar tosfs wandb zip".split()
)
# The drivers' libraries: what they raise says what went wrong in a place, and not in this code.
_DRIVERS = ("gcsfs", "google", "s3fs", "botocore", "aiobotocore", "adlfs", "azure", "aiohttp", "paramiko")
_URI = re.compile(r"(?P<scheme>[A-Za-z][A-Za-z0-9+.-]*)://")


def path(text: str | os.PathLike) -> pathlib.Path:
    """Return the path that a person wrote: pathlib's, or one of the same interface in a bucket.

    Raises:
      UserError: nothing is known by its scheme, or the driver is not installed.
    """
    text = os.fspath(text) if isinstance(text, os.PathLike) else str(text)
    found = _URI.match(text)
    if found is None or found["scheme"] == "file":
        return pathlib.Path(text.removeprefix("file://")).expanduser()
    name = ALIASES.get(found["scheme"].lower(), found["scheme"].lower())
    _require(name, text)
    if not text[found.end() :].strip("/"):
        raise UserError(f"'{text}' names no bucket; write {name}://BUCKET/FOLDER")
    from upath import UPath

    return UPath(name + text[found.end("scheme") :].rstrip("/"))  # type: ignore[return-value]  # the same interface


def is_remote(path: pathlib.Path) -> bool:
    """Return whether a path is in a bucket."""
    return not isinstance(path, pathlib.PurePath)


def scheme(path: Any) -> str:
    """Return the scheme of a path, "file" where it is local."""
    return path.protocol if is_remote(path) else "file"


def knows(name: str) -> bool:
    """Return whether `path` takes this scheme, with its driver where it needs one."""
    return name == "file" or name in _schemes()


def schemes() -> str:
    """Return what a person may write instead of an unknown scheme, and what to install for it."""
    others = ", ".join(sorted(set(_schemes()) - {"gs", "s3", *ALIASES, "file"}))
    return f"gs:// (pip install -e .[gcs]), s3:// (.[s3]), and with .[buckets] and fsspec's driver of each: {others}"


def _schemes() -> list[str]:
    from fsspec.registry import available_protocols

    return [name for name in available_protocols() if name not in _NO_PLACES]


def _require(scheme: str, text: str) -> None:
    """Raise UserError unless the driver of a scheme is there; settle what drivers are to do."""
    if not knows(scheme):
        near = nearest(scheme, _schemes()) if len(scheme) > 2 else ""
        near = near if near.startswith("; did") else ""
        raise UserError(f"unknown scheme '{scheme}://' in '{text}'{near}; there are: {schemes()}")
    if scheme == "gs" and (emulator := os.environ.get("STORAGE_EMULATOR_HOST")):
        os.environ.setdefault("TENSORSTORE_GCS_HTTP_URL", emulator)  # TensorStore's own name for the same
        os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")  # it would ask what emulators do not know
    import fsspec

    if scheme in OBJECT_STORES:
        # Other processes, and TensorStore in this one, write to the same places: what was listed may be outdated.
        fsspec.config.conf.setdefault(scheme, {}).setdefault("use_listings_cache", False)
    for name in ("gcsfs", "aiobotocore", "fsspec"):
        logging.getLogger(name).setLevel(logging.CRITICAL)  # what goes wrong is raised, and said once
    try:
        fsspec.get_filesystem_class(scheme)
        importlib.import_module("upath")
    except ImportError as error:
        also = "" if scheme in EXTRAS else " and fsspec's driver of it"
        install = f"pip install -e .[{EXTRAS.get(scheme, 'buckets')}]{also}"
        raise UserError(f"'{text}': what opens {scheme}:// is not installed; {install} ({_one_line(error)})") from None


# --- checks at the start --------------------------------------------------------------------------


def check_folder(flag: str, folder: pathlib.Path, writes: bool) -> None:
    """Raise UserError unless a folder is one that can be read, or written to; it need not be there yet.

    Args:
      flag: what named it, for the message.
      folder: local, or in a bucket, which is asked, and waited for `PROBE_SECONDS` at most.
      writes: whether it is to be written to.
    """
    if is_remote(folder):
        _probe(flag, folder, writes)
        return
    there = next(path for path in (folder, *folder.parents) if path.exists())
    if not there.is_dir():
        raise UserError(f"{flag}: {there} is a file; name a folder")
    if writes and not os.access(there, os.W_OK | os.X_OK):
        raise UserError(f"{flag}: {there} cannot be written to; name another folder")


def check_output(output: str) -> None:
    """Raise UserError unless the file that --output names can be written; "-" is the standard output."""
    if output == "-":
        return
    file = path(output)
    if is_remote(file):
        _probe("--output", file.parent, writes=True)
    elif not file.absolute().parent.is_dir():
        raise UserError(f"--output: there is no folder {file.absolute().parent}")


def _probe(flag: str, folder: Any, writes: bool) -> None:
    """Raise UserError unless a bucket answers."""

    def ask() -> None:
        if not writes:
            folder.fs.invalidate_cache()
            with contextlib.suppress(FileNotFoundError):
                folder.fs.ls(folder.path)
            return
        name = (folder / f".probe.{uuid.uuid4().hex}").path
        if scheme(folder) not in OBJECT_STORES:
            folder.fs.makedirs(folder.path, exist_ok=True)
        folder.fs.pipe_file(name, b"probe")
        folder.fs.rm_file(name)

    error = _within(PROBE_SECONDS, ask)
    if error is not None:
        does = "written to" if writes else "read"
        hint = CREDENTIALS.get(scheme(folder))
        raise UserError(
            f"{flag}: {folder} cannot be {does} ({type(error).__name__}: {_one_line(error)})"
            + (f"; check that the bucket exists, and your credentials: {hint}" if hint else "")
        ) from None


def _within(seconds: float, function: Callable[[], None]) -> Exception | None:
    """Call a function in a thread that nobody waits for longer than this; return what it raised."""
    raised: list[Exception | None] = [TimeoutError(f"no answer within {seconds:.0f} s")]

    def call() -> None:
        try:
            function()
            raised[0] = None
        except Exception as error:  # each driver has its own
            raised[0] = error

    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    thread.join(seconds)
    return raised[0]


def explain(error: BaseException) -> str | None:
    """Return one line for what a driver raised; None where the error is none of theirs."""
    if type(error).__module__.partition(".")[0] not in _DRIVERS:
        return None
    return f"the storage said: {type(error).__name__}: {_one_line(error)}"


def is_outage(error: BaseException) -> bool:
    """Return whether an error says that a place could not be asked, and nothing of what it holds."""
    if isinstance(error, FileNotFoundError):
        return False
    kinds = "UNAVAILABLE|DEADLINE_EXCEEDED|PERMISSION_DENIED|UNAUTHENTICATED"
    return (
        explain(error) is not None
        or isinstance(error, ConnectionError | TimeoutError | PermissionError)
        or bool(re.match(rf"({kinds}):", str(error)))
    )


# --- whole files and folders ----------------------------------------------------------------------


def make_folder(folder: pathlib.Path) -> None:
    """Make a folder and those above it; in a bucket there is nothing to make."""
    if not is_remote(folder):
        folder.mkdir(parents=True, exist_ok=True)


def write_arrays(file: Any, arrays: Mapping[str, np.ndarray]) -> None:
    """Write arrays as an npz file; see `write`."""
    buffer = io.BytesIO()
    np.savez(buffer, allow_pickle=False, **arrays)
    write(file, buffer.getvalue())


def write(file: Any, content: bytes) -> None:
    """Write a file, which appears, or is replaced, at once or not at all; its folder is made where it is missing."""
    if is_remote(file):
        _put(file, lambda name: file.fs.pipe_file(name, content))
        return
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        with temporary.open("wb") as opened:
            opened.write(content)
            opened.flush()
            os.fsync(opened.fileno())
        temporary.replace(file)
    finally:
        temporary.unlink(missing_ok=True)


def put(local: pathlib.Path, remote: Any, last: str = "") -> None:
    """Copy a local file, or all files of a folder, into a bucket; the file called `last` after all others."""
    if local.is_file():
        _put(remote, lambda name: remote.fs.put_file(str(local), name))
        return
    files = sorted(file for file in local.rglob("*") if file.is_file())
    if scheme(remote) in OBJECT_STORES:  # several at once
        some = [file for file in files if file != local / last]
        remote.fs.put(list(map(str, some)), [(remote / file.relative_to(local).as_posix()).path for file in some])
        files = [file for file in files if file == local / last]
    for file in sorted(files, key=lambda file: file == local / last):
        put(file, remote / file.relative_to(local).as_posix())


def _put(file: Any, send: Callable[[str], None]) -> None:
    """Call `send` with the name to send to; elsewhere than in object stores move it to its own name then."""
    if scheme(file) in OBJECT_STORES:
        send(file.path)
        return
    file.fs.makedirs(file.parent.path, exist_ok=True)
    beside = file.with_name(f".{file.name}.{uuid.uuid4().hex}")
    send(beside.path)
    file.fs.mv(beside.path, file.path)


@contextlib.contextmanager
def writing(target: pathlib.Path, last: str = "") -> Iterator[pathlib.Path]:
    """A local path to write a file or a folder to: `target` itself, or what is put there at the end.

    Nothing is put where the block raises. See `put` for `last`.
    """
    if not is_remote(target):
        yield target
        return
    with tempfile.TemporaryDirectory() as folder:
        local = pathlib.Path(folder, target.name)
        yield local
        put(local, target, last)


@contextlib.contextmanager
def text_output(output: str) -> Iterator[TextIO]:
    """The file that --output names, to write text to; "-" is the standard output."""
    if output == "-":
        yield sys.stdout
        return
    with writing(path(output)) as local, local.open("w", encoding="utf-8") as file:
        yield file


def match(pattern: str) -> list[pathlib.Path]:
    """Return the files in a bucket that a pattern such as "gs://bucket/books/**/*.md" names, in order."""
    place: Any = path(pattern)
    return [path(place.fs.unstrip_protocol(name)) for name in sorted(place.fs.glob(place.path))]


def find(folder: Any) -> list[str]:
    """Return the files in a folder of a bucket, at any depth, relative to it, in the order of their names."""
    below = folder.path.rstrip("/") + "/"
    try:
        found = folder.fs.find(folder.path)
    except FileNotFoundError:
        return []
    return sorted(name.removeprefix(below) for name in found if name.startswith(below))


def remove(place: Any) -> None:
    """Delete a file or a folder, if it is there."""
    if is_remote(place):
        with contextlib.suppress(FileNotFoundError):
            place.fs.rm(place.path, recursive=True)
    elif place.is_dir():
        shutil.rmtree(place)
    else:
        place.unlink(missing_ok=True)


def rename(folder: Any, target: Any) -> None:
    """Give a folder another name; at once where it is local, file by file in a bucket."""
    if not is_remote(folder):
        folder.rename(target)
        return
    for name in find(folder):
        if scheme(folder) not in OBJECT_STORES:
            folder.fs.makedirs((target / name).parent.path, exist_ok=True)
        folder.fs.copy((folder / name).path, (target / name).path)
    remove(folder)


# --- copies ---------------------------------------------------------------------------------------


def cache_dir() -> pathlib.Path:
    """Return the folder where packages, and copies of what is in buckets, are kept."""
    return pathlib.Path(os.environ.get("RESEARCH_CACHE") or "~/.cache/research/assets").expanduser()


def fetch(place: Any) -> pathlib.Path:
    """Return a local copy of a file or a folder; a local one is its own. See `fetch_with_mark`."""
    return fetch_with_mark(place)[0] if is_remote(place) else place


def fetch_with_mark(place: Any) -> tuple[pathlib.Path, str]:
    """Return a local copy of a file or a folder in a bucket, and a hash that changes with what is there.

    A copy is made once and kept in `cache_dir`, until what is there changes: its names, sizes, times or tags.

    Raises:
      UserError: there is nothing, or it cannot be read.
    """
    try:
        listed = place.fs.find(place.path, detail=True)
    except FileNotFoundError:
        listed = {}
    except Exception as error:
        if explain(error) is None and not isinstance(error, OSError):
            raise
        raise UserError(f"cannot read '{place}' ({type(error).__name__}: {_one_line(error)})") from None
    if not listed:
        raise UserError(f"no such file or folder: '{place}'")
    facts = [
        (name, sorted((k, str(v)) for k, v in (listed[name] or place.fs.info(name)).items())) for name in sorted(listed)
    ]
    mark = hashlib.sha256(repr([str(place), facts]).encode()).hexdigest()
    kept = cache_dir() / "buckets" / mark / place.name
    if not kept.exists():
        download(place, kept)
    return kept, mark


def download(place: Any, target: pathlib.Path) -> None:
    """Copy a file or a folder of a bucket to the disk, where it appears at once."""
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}.{uuid.uuid4().hex}")
    try:
        if names := find(place):
            files = [partial / name for name in names]
            for folder in {file.parent for file in files}:
                folder.mkdir(parents=True, exist_ok=True)
            place.fs.get([(place / name).path for name in names], [str(file) for file in files])
        else:
            place.fs.get_file(place.path, str(partial))
        partial.rename(target)
    except OSError:
        if not target.exists():
            raise
        # Another process was first; what it fetched is the same.
    finally:
        remove(partial)


class Mirror:
    """Local files that grow, and their copies in a bucket, where nothing can be appended: sent whole, not too often.

    Attributes:
      local: the folder of the files.
    """

    PAUSE_SECONDS = 5.0  # between two copies, at least
    SHARE = 0.05  # of the time that may be spent on copying, by and large

    def __init__(self, remote: pathlib.Path):
        """Make an empty local folder for files of the folder `remote`."""
        self._folder = tempfile.TemporaryDirectory()
        self.local, self._remote = pathlib.Path(self._folder.name), remote
        self._sent: dict[pathlib.Path, int] = {}
        self._next = 0.0

    def send(self, now: bool = True) -> None:
        """Copy what has grown; unless `now`, only where it is time again, and a failure is but a warning."""
        begin = time.monotonic()
        if not now and begin < self._next:
            return
        try:
            for file in sorted(path for path in self.local.rglob("*") if path.is_file()):
                if (size := file.stat().st_size) != self._sent.get(file):
                    put(file, self._remote / file.relative_to(self.local).as_posix())
                    self._sent[file] = size
        except Exception as error:
            if now or (explain(error) is None and not isinstance(error, OSError)):
                raise
            logging.warning("%s cannot be written to (%s); trying again later", self._remote, _one_line(error))
        taken = time.monotonic() - begin
        self._next = begin + taken + max(self.PAUSE_SECONDS, taken / self.SHARE)

    def close(self) -> None:
        """Send what is left, and delete the local folder."""
        try:
            self.send()
        finally:
            self._folder.cleanup()


def _one_line(error: object) -> str:
    text = " ".join(str(error).split())
    return text if len(text) <= 300 else text[:300] + " ..."
