"""Does linear self-attention learn to take a step of gradient descent? (von Oswald 2023)

Data: ten points of a random linear function of ten dimensions, inputs uniform in [-1, 1), and an eleventh input whose
value is to be predicted. Model: one layer of self-attention without softmax, one head, 11 wide.
Recipe: Adam, 2,048 functions a step (von Oswald 2023, appendix A); here Adam at 1e-2 falling to 0, 3,000 steps of 512.
Published: figure 2: the loss of the trained layer is that of one step of gradient descent at its best learning rate,
their predictions hardly differ, and the gradients of both with respect to the input point the same way. Expected: the
step has a squared error of 1.650 (twice the paper's loss), to predict 0 one of 3.333; see
experiments/in_context_gradient_descent.
Variants: `construction` is the paper's, a layer that takes the step by its parameters, and is not trained; `tiny`
(seconds).
Hardware: 2 CPU cores, a minute.
"""

from ml_collections import ConfigDict

from research.configuration.variants import choose, datasets, derived

DIMENSIONS = EXAMPLES = 10


def get_config(variant: str = "") -> ConfigDict:
    config = ConfigDict()
    config.seed = 0
    config.batch_size = 512
    config.num_steps = 3000
    config.task = dict(
        call="research.tasks.in_context_regression.InContextRegression",
        model=dict(call="research.models.linear_attention.LinearSelfAttention", initializer_range=0.1),
    )
    config.init = None
    config.data = data(count=10_000_000)
    config.evals = dict(
        test=dict(call="research.evaluators.in_context_regression.GradientDescent", data=data(count=20_000))
    )
    # Every seed has its own functions, and its own to be tested on.
    seed = config.get_ref("seed")
    config.data.source.seed = derived(seed, lambda seed: 2 * seed, int)
    config.evals.test.data.source.seed = derived(seed, lambda seed: 2 * seed + 1, int)
    config.optimizer = dict(learning_rate=1e-2, schedule="cosine", warmup=0.03, clip_norm=10.0)
    config.mesh = dict(data=-1, fsdp=1, model=1)
    config.checkpoint = dict(every_steps=0, keep=1)
    config.log = dict(every_steps=50, evaluate_every_steps=100)
    return choose(variant, VARIANTS, config)


def data(count: int) -> dict:
    return dict(
        call="research.data.dataset.Dataset",
        source=dict(
            call="research.data.linear_functions.linear_functions",
            dimensions=DIMENSIONS,
            points=EXAMPLES + 1,
            inputs="uniform",
            count=count,
        ),
        features=("inputs", "outputs"),
    )


def construction(config: ConfigDict) -> ConfigDict:
    config.num_steps = 0
    config.init = dict(
        call="research.configuration.constructed.gradient_descent_step", dimensions=DIMENSIONS, examples=EXAMPLES
    )
    return config


def tiny(config: ConfigDict) -> ConfigDict:
    for node in datasets(config):
        node.source.update(dimensions=2, points=6, count=64)
    config.batch_size = 16
    config.num_steps = 60
    config.optimizer.update(warmup=0, learning_rate=5e-2)
    config.checkpoint.every_steps = 20
    config.log = dict(every_steps=20, evaluate_every_steps=30)
    return config


VARIANTS = {"": lambda config: config, "construction": construction, "tiny": tiny}
