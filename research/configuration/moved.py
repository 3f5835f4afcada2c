"""Dotted paths that older configs name, and where what they named is now."""

from collections.abc import Mapping
from typing import Any

# The longest that fits counts, so that a name can go elsewhere than its module.
MOVED = {
    "research.data.image.ColorJitter": "research.data.augmentation.ColorJitter",
    "research.data.image.RandAugment": "research.data.augmentation.RandAugment",
    "research.data.image.RandomErasing": "research.data.augmentation.RandomErasing",
    "research.data.tokenizer.train": "research.data.tokenizer_training.train",
    "research.decoding": "research.generation.decoding",
    "research.diffusion": "research.generation.diffusion",
    "research.optimizer.adamw": "research.optimizer.make_optimizer",
    "research.features": "research.evaluators.features",
    "research.transfer": "research.configuration.transfer",
}
# Settings that were flags, and are names now.
RENAMED = {"remat": {True: "full", False: "none"}}


def current(path: str) -> str:
    """Return the dotted path at which the thing that `path` named is found now."""
    for old in sorted(MOVED, key=len, reverse=True):
        if path == old or path.startswith(f"{old}."):
            return MOVED[old] + path[len(old) :]
    return path


def current_config(node: Any) -> Any:
    """Return a config, as config.json holds it, with every `call` and setting brought up to date."""
    if isinstance(node, Mapping):
        if node.get("call") == "research.optimizer.sgd":
            node = _without_sgd(node)
        return {key: _current_value(key, value) for key, value in node.items()}
    if isinstance(node, list | tuple):
        return [current_config(value) for value in node]
    return node


def _without_sgd(node: Mapping[str, Any]) -> dict[str, Any]:
    """Return the section of an optimizer that was a function of its own, with a direction instead."""
    rest = {key: value for key, value in node.items() if key not in ("call", "momentum")}
    return rest | {"direction": {"call": "optax.trace", "decay": node.get("momentum", 0.9)}}


def _current_value(key: str, value: Any) -> Any:
    if key == "call" and isinstance(value, str):
        return current(value)
    if isinstance(value, bool):
        return RENAMED.get(key, {}).get(value, value)
    return current_config(value)
