"""Data sets of the Hugging Face hub: which of a repository's files are which config and split.

  hf://datasets/ORG/NAME                                the split that is asked for, of the one config or the default
  hf://datasets/ORG/NAME@REVISION#config=en,split=dev   of a branch, tag or commit (`/` written %2F)
  hf://datasets/ORG/NAME/FOLDER or /PATTERN             the same of these files alone, whatever the card says

Configs and splits are those of the card (`configs:` of README.md), else what the names of the files say:
data/train-00000-of-00002.parquet, CONFIG/test-*.parquet, CONFIG/train/0000.parquet (as on the branch
refs/convert/parquet, which is taken where the repository itself has no files that can be read), train.jsonl.gz, and
files without the name of a split are "train". Their code is never run. The files of one split are fetched, into the
hub's own cache, after one request for the names of all; where there is no network, what is cached counts as all.
"""

import collections
import contextlib
import glob
import logging
import pathlib
import re
import urllib.parse
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from research import assets
from research.data import rows
from research.errors import UserError, nearest

SCHEME = "hf://datasets/"
CONVERTED = "refs/convert/parquet"  # the hub's own copy of many a data set
DEFAULT = "default"
WORDS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}

Configs = dict[str, dict[str, list[str]]]  # config -> split -> names of files

_FORM = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+)(?:@(?P<revision>[^/@#]+))?(?:/(?P<path>[^#]+))?(?:#(?P<options>.*))?")


def files(uri: str, split: str, suffixes: Sequence[str]) -> list[pathlib.Path]:
    """Return the files of a split of a data set, fetched first if they are not cached.

    Args:
      uri: see above.
      split: the one that is meant where the URI names none.
      suffixes: of the files that can be read, without that of a compression.

    Raises:
      UserError: the URI is malformed; no such repository, revision, config or split (it says which there are); it
        cannot be fetched.
    """
    match = _FORM.fullmatch(uri.removeprefix(SCHEME))
    if not match:
        raise UserError(f"'{uri}' names no data set; write {SCHEME}ORG/NAME@REVISION#config=NAME,split=NAME")
    options = _options(uri, match["options"])
    revision = urllib.parse.unquote(match["revision"]) if match["revision"] else None
    for tried in (revision, CONVERTED) if revision is None else (revision,):
        with _complaint_of_main(tried, revision):
            commit, names, card = _listing(uri, match["repo"], tried)
        names = [name for name in names if rows.suffix(pathlib.PurePosixPath(name)) in suffixes]
        if names:
            break
    if not names:
        raise UserError(f"'{uri}' holds no file that ends in {', '.join(suffixes)}")
    configs = _below(uri, names, match["path"]) if match["path"] else _carded(card, names) or _guessed(names)
    chosen = _choose(uri, configs, options.get("config"), options.get("split") or split)
    return _fetched(uri, match["repo"], commit, chosen)


def _options(uri: str, text: str | None) -> dict[str, str]:
    parts = [part.partition("=")[::2] for part in (text or "").split(",") if part]
    for name, value in parts:
        if name not in ("config", "split") or not value:
            raise UserError(f"'{uri}': after '#' write config=NAME or split=NAME, parted by a comma")
    return dict(parts)


@contextlib.contextmanager
def _complaint_of_main(tried: str | None, asked: str | None) -> Iterator[None]:
    """Let a converted copy that nobody asked for be missing."""
    try:
        yield
    except UserError:
        if tried == asked:
            raise


def _listing(uri: str, repo: str, revision: str | None) -> tuple[str, list[str], Mapping[str, Any]]:
    """Return the commit of a repository, the names of its files, and what its card says.

    A branch that is cached is taken at the commit that is cached, so that a run which goes on has the same data.
    """
    from huggingface_hub import HfApi, constants, metadata_load

    with assets.hub_errors(uri, assets.DATASETS + repo, revision):
        folder = _snapshot(repo, revision, ["README.md"])
    names = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
    if not constants.HF_HUB_OFFLINE:
        try:
            names = HfApi().list_repo_files(repo, repo_type="dataset", revision=folder.name)
        except Exception as error:  # the transport's own errors differ between the client's versions
            logging.warning("%s: the hub does not answer (%s); what is cached is taken for all", uri, error)
    card = folder / "README.md"
    try:
        return folder.name, sorted(names), (metadata_load(card) if card.exists() else None) or {}
    except ValueError as error:
        raise UserError(f"'{uri}': the card is not as the hub's are: {' '.join(str(error).split())}") from error


def _snapshot(repo: str, revision: str | None, names: Sequence[str]) -> pathlib.Path:
    """Return the folder of a repository with those of these files that it has; what the client raises comes through."""
    from huggingface_hub import errors, snapshot_download

    patterns = [glob.escape(name) for name in names]
    with contextlib.suppress(errors.LocalEntryNotFoundError):
        folder = snapshot_download(repo, repo_type="dataset", revision=revision, local_files_only=True)
        if all(pathlib.Path(folder, name).exists() for name in names):
            return pathlib.Path(folder)
        revision = pathlib.Path(folder).name
    return pathlib.Path(snapshot_download(repo, repo_type="dataset", revision=revision, allow_patterns=patterns))


def _fetched(uri: str, repo: str, commit: str, names: Sequence[str]) -> list[pathlib.Path]:
    from huggingface_hub import errors

    with assets.hub_errors(uri, assets.DATASETS + repo, commit):
        folder = _snapshot(repo, commit, names)
        shards = [re.fullmatch(r"(.*-)\d+(-of-(\d+).*)", name) for name in names]
        groups = collections.Counter((shard[1], shard[2], int(shard[3])) for shard in shards if shard)
        whole = all(count == wanted for (_, _, wanted), count in groups.items())
        if not whole or not all(folder.joinpath(name).exists() for name in names):
            raise errors.LocalEntryNotFoundError(f"{repo} is cached in part")
    assets.note(uri, f"commit:{folder.name}")
    return [folder / name for name in names]


def _choose(uri: str, configs: Configs, config: str | None, split: str) -> list[str]:
    there = "; ".join(f"{name}: {', '.join(splits)}" for name, splits in configs.items())
    if config is None:
        if len(configs) > 1 and DEFAULT not in configs:
            raise UserError(f"'{uri}' has several configs; add #config=NAME, of: {there}")
        config = DEFAULT if DEFAULT in configs else next(iter(configs))
    if config not in configs:
        raise UserError(f"'{uri}' has no config '{config}'{nearest(config, configs)} (its splits by config: {there})")
    if split not in configs[config]:
        hint = nearest(split, configs[config])
        raise UserError(f"'{uri}' has no split '{split}'{hint} (its splits by config: {there})")
    return configs[config][split]


def _below(uri: str, names: Sequence[str], path: str) -> Configs:
    """Return the files of a folder or a pattern, as one config."""
    chosen = _matching(names, path.rstrip("/")) or [name for name in names if name.startswith(path.rstrip("/") + "/")]
    if not chosen:
        raise UserError(f"'{uri}': the repository has no such file or folder{nearest(path, names)}")
    configs: Configs = {DEFAULT: {}}
    for name in chosen:
        configs[DEFAULT].setdefault(_place(name)[1], []).append(name)
    return configs


def _carded(card: Mapping[str, Any], names: Sequence[str]) -> Configs:
    """Return what the `configs` of a card say; a config or split without files here is left out."""
    configs: Configs = {}
    for entry in card.get("configs") or ():
        given, folder = entry.get("data_files"), entry.get("data_dir")
        here = [name for name in names if not folder or name.startswith(folder.strip("/") + "/")]
        splits: dict[str, list[str]] = {}
        if given is None:
            for name in here:
                splits.setdefault(_place(name)[1], []).append(name)
        for part in [given] if isinstance(given, str | dict) else given or ():
            part = part if isinstance(part, dict) else {"split": "train", "path": part}
            patterns = [part["path"]] if isinstance(part["path"], str) else part["path"]
            for pattern in patterns:
                inside = f"{folder.strip('/')}/{pattern}" if folder else pattern
                splits.setdefault(part.get("split", "train"), []).extend(_matching(here, inside))
        if splits := {split: some for split, some in splits.items() if some}:
            configs[DEFAULT if entry.get("default") else str(entry.get("config_name", DEFAULT))] = splits
    return configs


def _guessed(names: Sequence[str]) -> Configs:
    configs: Configs = {}
    for name in names:
        config, split = _place(name)
        configs.setdefault(config, {}).setdefault(split, []).append(name)
    return configs


def _place(name: str) -> tuple[str, str]:
    """Return the config and the split that the name of a file says."""
    *folders, file = pathlib.PurePosixPath(name).parts
    stem = file.partition(".")[0]
    split = _word(stem)
    if shard := re.fullmatch(r"(?:.*-)?(\w+)-\d+-of-\d+.*", stem):
        split = next((split for split, words in WORDS.items() if shard[1] in words), shard[1])
    config = [folder for folder in folders if folder != "data"]
    if config and split is None:
        found = config[-1].removeprefix("partial-")
        split = _word(found) or (found if re.fullmatch(r"\d+", stem) and len(config) > 1 else None)
        config = config[:-1] if split else config
    return "/".join(config) or DEFAULT, split or "train"


def _word(text: str) -> str | None:
    """Return the split that a word in a name stands for; None where there is none."""
    for split, words in WORDS.items():
        if any(re.fullmatch(rf"(.*[^a-zA-Z])?{word}([^a-zA-Z].*)?", text) for word in words):
            return split
    return None


def _matching(names: Sequence[str], pattern: str) -> list[str]:
    """Return the names that a pattern means, in which `*` stays within a folder and `**` does not."""
    from fsspec.utils import glob_translate

    pattern = pattern.removeprefix("./")
    if not glob.has_magic(pattern):
        return [name for name in names if name == pattern]
    form = re.compile(glob_translate(pattern))
    return [name for name in names if form.match(name)]
