"""What does a small transformer learn in context of linear functions? (Garg 2022)

Data: eleven points of a random linear function without noise, inputs and weights standard normal, in five dimensions.
Model: GPT-2's blocks, 3 layers, 64 wide, over x_1, y_1, x_2, y_2, ...; what is read off at x_i is to be y_i.
Recipe: Adam at 1e-4, batches of 64, 500,000 steps, 20 dimensions, 12 layers, 256 wide, and a curriculum over dimensions
and points (Garg 2022, appendix A); here Adam at 2e-3 falling to 0, 8,000 batches of 64, no curriculum, and initial
kernels with a deviation of 0.1: with the usual 0.02 it predicts 0 for long.
Published: figure 2: the error of the transformer follows that of least squares, which is 0 from as many examples as
dimensions on. Expected: see experiments/linear_functions.
Variant: `tiny` (seconds).
Hardware: 2 CPU cores, four minutes (three of one core).
"""

from ml_collections import ConfigDict

from research.configuration.variants import choose, datasets, derived


def get_config(variant: str = "") -> ConfigDict:
    config = ConfigDict()
    config.seed = 0
    config.batch_size = 64
    config.num_steps = 8000
    config.task = dict(
        call="research.tasks.in_context_regression.InContextRegression",
        model=dict(
            call="research.models.in_context_decoder.InContextDecoder",
            max_points=11,
            hidden_size=64,
            num_layers=3,
            num_heads=2,
            intermediate_size=256,
            initializer_range=0.1,
            unroll=3,
        ),
    )
    config.data = data(count=10_000_000)
    config.evals = dict(
        test=dict(call="research.evaluators.in_context_regression.ErrorByExamples", data=data(count=5_000))
    )
    # Every seed has its own functions, and its own to be tested on.
    seed = config.get_ref("seed")
    config.data.source.seed = derived(seed, lambda seed: 2 * seed, int)
    config.evals.test.data.source.seed = derived(seed, lambda seed: 2 * seed + 1, int)
    config.optimizer = dict(learning_rate=2e-3, schedule="cosine", warmup=0.05)
    config.mesh = dict(data=-1, fsdp=1, model=1)
    config.checkpoint = dict(every_steps=0, keep=1)
    config.log = dict(every_steps=100, evaluate_every_steps=1000)
    return choose(variant, VARIANTS, config)


def data(count: int) -> dict:
    return dict(
        call="research.data.dataset.Dataset",
        source=dict(
            call="research.data.linear_functions.linear_functions",
            dimensions=5,
            points=11,
            inputs="normal",
            count=count,
        ),
        features=("inputs", "outputs"),
    )


def tiny(config: ConfigDict) -> ConfigDict:
    for node in datasets(config):
        node.source.update(dimensions=1, points=4, count=64)
    config.batch_size = 16
    config.num_steps = 40
    config.task.model.update(max_points=4, hidden_size=32, num_layers=1, intermediate_size=64)
    config.optimizer.update(warmup=0, learning_rate=1e-2)
    config.checkpoint.every_steps = 10
    config.log = dict(every_steps=20, evaluate_every_steps=20)
    return config


VARIANTS = {"": lambda config: config, "tiny": tiny}
