"""Superposition: sparse features share dimensions, dense ones do not (Elhage 2022).

Data: vectors of 20 independent features, each 0 with probability S and else uniform in [0, 1). Model: 5 hidden
dimensions, x' = ReLU(W^T W x + b). Loss: the squared error, of feature i times 0.7^i.
Recipe: Adam at 1e-3, 1,024 vectors a step, 10,000 steps (the notebook beside the paper); here Adam at 1e-2 falling to
0, 1,500 steps, with as large a batch.
Published: figures of "Demonstrating superposition", 20 features in 5 dimensions: dense, the model has the five most
important features, orthogonally, as a linear one has at any sparsity; the sparser, the more features it has, not
orthogonally. Expected: see experiments/superposition.
Variants: `` (S = 0), `half` (0.7), `sparse` (0.99), `linear` (0.99, without the ReLU), `tiny` (seconds).
Hardware: 2 CPU cores, a minute.
"""

from ml_collections import ConfigDict

from research.configuration.variants import choose, datasets


def get_config(variant: str = "") -> ConfigDict:
    config = ConfigDict()
    config.seed = 0
    config.batch_size = 1024
    config.num_steps = 1500
    config.task = dict(
        call="research.tasks.feature_reconstruction.FeatureReconstruction",
        importance=0.7,
        model=dict(call="research.models.feature_autoencoder.FeatureAutoencoder", hidden_size=5, activation="relu"),
    )
    config.data = data(seed=0, count=10_000_000)
    config.evals = dict(test=dict(call="research.evaluators.superposition.Superposition", data=data(1, count=10_000)))
    config.optimizer = dict(learning_rate=1e-2, schedule="cosine", clip_norm=None)
    config.mesh = dict(data=-1, fsdp=1, model=1)
    config.checkpoint = dict(every_steps=0, keep=1)
    config.log = dict(every_steps=50, evaluate_every_steps=100)
    return choose(variant, VARIANTS, config)


def data(seed: int, count: int) -> dict:
    return dict(
        call="research.data.dataset.Dataset",
        source=dict(
            call="research.data.sparse_features.sparse_features", features=20, sparsity=0.0, seed=seed, count=count
        ),
        features=("features",),
    )


def sparse(config: ConfigDict, sparsity: float = 0.99) -> ConfigDict:
    for node in datasets(config):
        node.source.sparsity = sparsity
    return config


def linear(config: ConfigDict) -> ConfigDict:
    config.task.model.activation = "linear"
    return sparse(config)


def tiny(config: ConfigDict) -> ConfigDict:
    for node in datasets(config):
        node.source.update(features=4, count=64)
    config.task.model.hidden_size = 2
    config.batch_size = 16
    config.num_steps = 30
    config.checkpoint.every_steps = 10
    config.log = dict(every_steps=5, evaluate_every_steps=15)
    return config


VARIANTS = {
    "": lambda config: config,
    "half": lambda config: sparse(config, 0.7),
    "sparse": sparse,
    "linear": linear,
    "tiny": tiny,
}
