"""The movie snippets of configs/movie_snippets.py at a reduced scale: 250 steps of 16 texts cut to 32 tokens."""

import pathlib

from ml_collections import ConfigDict

from research.configuration import overrides
from research.configuration.variants import datasets

MOVIES = pathlib.Path(__file__).resolve().parents[2] / "configs" / "movie_snippets.py"


def get_config(variant: str = "") -> ConfigDict:
    config = overrides.load(f"{MOVIES}:{variant}")
    config.batch_size = 16
    config.num_steps, config.num_epochs = 250, None
    for node in datasets(config):
        node.ops[0]["max_length"] = 32
        node.length_buckets = 1
    config.task.model.unroll = None
    config.optimizer.learning_rate = 2e-4
    config.checkpoint.every_steps = 250
    config.log.evaluate_every_steps = 0
    return config
