"""Fine-tunes BERT to find the people, places, organisations and other names in news: CoNLL-2003's English part.

Tjong Kim Sang and De Meulder (2003). Recipe: that of BERT (Devlin 2018, section 5.3 and A.3): the label of a word at
its first token, a linear layer on the encoder, batch 32, 3 epochs, learning rate 5e-5, the cased model.
Published: F1 of entities 96.4 percent on the development set and 92.4 on the test set, BERT-base (Devlin 2018, table
7; from memory). That model saw each sentence amid its document; here sentences stand alone, which costs up to a point
(from memory). Not run here: the data and the weights need the network.
Hardware: one accelerator; minutes.
`:tiny` needs neither network nor files and takes seconds.
"""

from ml_collections import ConfigDict, FieldReference

from research.configuration.variants import choose, tiny_sentences


def get_config(variant: str = "") -> ConfigDict:
    path = FieldReference("hf://google-bert/bert-base-cased")
    config = ConfigDict()
    config.seed = 0
    config.batch_size = 32
    config.num_epochs = 3.0
    config.tokenizer = dict(call="research.data.tokenizer.load", path=path)
    config.task = dict(
        call="research.tasks.token_classification.TokenClassification",
        model=dict(call="research.pretrained.huggingface.token_classifier", path=path),
    )
    config.init = dict(path=path, new_head=False)
    config.data = data("train")
    config.evals = {
        split: dict(call="research.evaluators.entities.Entities", data=data(split)) for split in ("dev", "test")
    }
    config.optimizer = dict(learning_rate=5e-5, schedule="linear", warmup=0.1, weight_decay=0.01, clip_norm=1.0)
    config.mesh = dict(data=-1, fsdp=1, model=1)
    config.checkpoint = dict(every_steps=500, keep=2)
    config.log = dict(every_steps=50, evaluate_every_steps=0)
    return choose(variant, VARIANTS, config)


def data(split: str) -> dict:
    return dict(
        call="research.data.dataset.Dataset",
        source=dict(call="research.data.source.tfds", dataset="conll2003", split=split),
        ops=[dict(call="research.data.token_classification.AlignLabels", max_length=256)],
        features=("input_ids", "attention_mask", "token_type_ids", "targets", "target_mask"),
    )


VARIANTS = {"": lambda config: config, "tiny": tiny_sentences}
