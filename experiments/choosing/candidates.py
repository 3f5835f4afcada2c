"""Writes candidates that differ in how much of MiniLM's pretraining they keep, as Hugging Face folders.

python experiments/choosing/candidates.py runs/choosing/candidates
"""

import argparse
import json
import pathlib
import re
import shutil

import numpy as np
from safetensors.numpy import load_file, save_file

from research import assets
from research.configuration.variants import MINILM
from research.reporting import benchmark

DEPTHS = (1, 2, 3)  # of its six layers, the first ones
CHANGED = 2  # layers of those whose weights are changed too
NOISE = 0.5  # on every matrix, in its own standard deviations
RANGE = 0.02  # of BERT's initialisation

Weights = dict[str, np.ndarray]


def write(folder: pathlib.Path, config: dict, weights: Weights, source: pathlib.Path) -> None:
    """Write a folder with these weights and MiniLM's tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.txt"):
        shutil.copyfile(source / name, folder / name)
    (folder / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def truncated(weights: Weights, depth: int) -> Weights:
    """Return the weights without the layers from `depth` on."""
    layer = re.compile(r"encoder\.layer\.(\d+)\.")
    return {k: v for k, v in weights.items() if (found := layer.search(k)) is None or int(found[1]) < depth}


def noisy(weights: Weights, scale: float) -> Weights:
    """Return the weights with normal noise on all matrices."""
    rng = np.random.default_rng(0)
    changed = dict(weights)
    for name, value in sorted(weights.items()):
        if _is_matrix(value):
            changed[name] = value + (scale * value.std() * rng.normal(size=value.shape)).astype(value.dtype)
    return changed


def random(weights: Weights, keep: str = "^$") -> Weights:
    """Return new weights, drawn as BERT's are, but for those whose names the regular expression matches."""
    rng = np.random.default_rng(0)
    new = {}
    for name, value in sorted(weights.items()):
        fresh = np.zeros_like(value)  # biases
        if _is_matrix(value):
            fresh = RANGE * rng.normal(size=value.shape).astype(value.dtype)
        elif name.endswith("LayerNorm.weight"):
            fresh = np.ones_like(value)
        new[name] = value if re.search(keep, name) else fresh
    return new


def _is_matrix(value: np.ndarray) -> bool:
    return value.ndim == 2 and np.issubdtype(value.dtype, np.floating)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=pathlib.Path, help="where the folders are to be")
    folder = parser.parse_args().folder
    source = assets.resolve(MINILM)
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    weights = {k: v for k, v in load_file(source / "model.safetensors").items() if "position_ids" not in k}
    write(folder / "minilm", config, weights, source)
    for depth in DEPTHS:
        write(folder / f"layers-{depth}", config | {"num_hidden_layers": depth}, truncated(weights, depth), source)
    config, weights = config | {"num_hidden_layers": CHANGED}, truncated(weights, CHANGED)
    write(folder / "noise", config, noisy(weights, NOISE), source)
    write(folder / "embeddings", config, random(weights, "embeddings"), source)
    write(folder / "random", config, random(weights), source)


if __name__ == "__main__":
    benchmark.exit_with(main)
