"""Sources: stock TFDS sets on mocked data, our own prepared for real, and records at hand."""

import concurrent.futures
import pickle

import numpy as np
import pytest
import requests
import tensorflow_datasets

from research.data import source
from research.errors import UserError

GLUE = {
    "cola": ("sentence",),
    "sst2": ("sentence",),
    "mrpc": ("sentence1", "sentence2"),
    "qqp": ("question1", "question2"),
    "stsb": ("sentence1", "sentence2"),
    "mnli": ("premise", "hypothesis"),
    "mnli_matched": ("premise", "hypothesis"),
    "mnli_mismatched": ("premise", "hypothesis"),
    "qnli": ("question", "sentence"),
    "rte": ("sentence1", "sentence2"),
    "wnli": ("sentence1", "sentence2"),
}


@pytest.mark.parametrize("task", GLUE)
def test_glue(task, tmp_path):
    with tensorflow_datasets.testing.mock_data(num_examples=5):
        read = source.tfds(f"glue/{task}", "validation", data_dir=str(tmp_path))
        assert len(read) == 5
        example = read[3]
    assert all(type(example[name]) is str for name in GLUE[task])
    if task == "stsb":
        assert example["label"].dtype == np.float32
        assert read.label_names == {}
    else:
        assert 0 <= int(example["label"]) < len(read.label_names["label"])
    if task.startswith("mnli"):
        assert read.label_names["label"] == ("entailment", "neutral", "contradiction")


def test_mnli_development_sets(tmp_path):
    with tensorflow_datasets.testing.mock_data(num_examples=2):
        for split in ("validation_matched", "validation_mismatched"):
            assert len(source.tfds("glue/mnli", split, data_dir=str(tmp_path))) == 2


def test_nested_text_is_decoded(tmp_path):
    with tensorflow_datasets.testing.mock_data(num_examples=2):
        squad = source.tfds("squad/v1.1", "validation", data_dir=str(tmp_path))[0]
        pair = source.tfds("wmt14_translate/de-en", "train", data_dir=str(tmp_path))[0]
    assert all(type(text) is str for text in (squad["context"], *squad["answers"]["text"], pair["de"], pair["en"]))
    assert squad["answers"]["answer_start"].dtype == np.int32


STOCK = {
    "wikipedia/20230601.en": ("title", "text"),
    "c4/en": ("text", "url"),
    "lm1b": ("text",),
    "squad/v2.0": ("id", "title", "context", "question"),
    "wmt14_translate/de-en": ("de", "en"),
    "cnn_dailymail": ("article", "highlights"),
    "xsum": ("document", "summary"),
}


@pytest.mark.parametrize("name", STOCK)
def test_stock_sets_of_language(name, tmp_path):
    with tensorflow_datasets.testing.mock_data(num_examples=2):
        read = source.tfds(name, "train", data_dir=str(tmp_path))
        assert len(read) == 2
        example = read[1]
    assert all(type(example[feature]) is str for feature in STOCK[name])


def test_stock_sequences_of_classes(tmp_path):
    with tensorflow_datasets.testing.mock_data(num_examples=2):
        read = source.tfds("conll2003", "validation", data_dir=str(tmp_path))
        example = read[0]
    people, organisations, places, others = ([f"{b}-{kind}" for b in "BI"] for kind in ("PER", "ORG", "LOC", "MISC"))
    assert read.label_names["ner"] == ("O", *people, *organisations, *places, *others)
    assert all(type(token) is str for token in example["tokens"])
    assert example["ner"].dtype.kind == "i"
    assert np.ndim(example["ner"]) == 1


def test_stock_sets_whose_code_needs_what_is_not_there(tmp_path, monkeypatch):
    def missing(name, **kwargs):
        raise ModuleNotFoundError(f"Failed to construct dataset {name}: No module named 'tensorflow'\nInstall it")

    monkeypatch.setattr(tensorflow_datasets, "builder", missing)
    with pytest.raises(UserError, match=r"^dataset 'squad' cannot be opened here: No module named 'tensorflow'$"):
        source.tfds("squad", data_dir=str(tmp_path))
    monkeypatch.undo()
    monkeypatch.setattr(source, "_stock_modules", lambda: {"deeper": "no_such_package.deeper"})
    with pytest.raises(UserError, match=r"^dataset 'deeper' cannot be opened here: No module named 'no_such_package'$"):
        source.tfds("deeper", data_dir=str(tmp_path))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("movie_snipets", "unknown dataset 'movie_snipets'; did you mean 'movie_snippets'"),
        ("glu/sst2", "unknown dataset 'glu/sst2'; did you mean 'glue'"),
        ("glue/sst", "dataset 'glue' has no config 'sst'; did you mean 'sst2'"),
    ],
)
def test_unknown_names(name, message, tmp_path):
    with pytest.raises(UserError, match=message):
        source.tfds(name, data_dir=str(tmp_path))


def test_a_stock_dataset_that_cannot_be_prepared(tmp_path, monkeypatch):
    def fail(self, **kwargs):
        raise requests.exceptions.ConnectionError("no route\nto host")

    monkeypatch.setattr(tensorflow_datasets.core.DatasetBuilder, "download_and_prepare", fail)
    folder = tmp_path / "glue" / "sst2" / "2.0.0"
    with pytest.raises(UserError, match=f"no route to host.* run `tfds build glue/sst2 .* '{folder}'") as info:
        source.tfds("glue/sst2", data_dir=str(tmp_path))
    assert "\n" not in str(info.value)


class _Tiny(tensorflow_datasets.core.GeneratorBasedBuilder, skip_registration=True):
    """Stands in for a stock dataset that somebody prepared."""

    VERSION = tensorflow_datasets.core.Version("1.0.0")
    name = "tiny"

    def _info(self):
        features = tensorflow_datasets.features
        tags = features.Sequence(features.ClassLabel(names=["noun", "verb"]))
        tree = {
            "text": features.Text(),
            "tags": tags,
            "words": features.Sequence(features.Text()),
            "raw": features.Tensor(shape=(), dtype=np.object_),
        }
        return tensorflow_datasets.core.DatasetInfo(
            builder=self, features=features.FeaturesDict(tree), disable_shuffling=True
        )

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples(20), "test": self._generate_examples(4)}

    def _generate_examples(self, count):
        for i in range(count):
            yield i, {"text": f"é{i}", "tags": [i % 2] * (i % 3), "words": ["a", "ü"], "raw": b"\xff"}


@pytest.fixture
def tiny(tmp_path):
    def make():
        return _Tiny(data_dir=str(tmp_path))

    return lambda split="train": source._source(make, "tiny", split)


def test_prepared_data(tiny):
    train = tiny()
    assert len(train) == 20
    with pytest.raises(IndexError):
        train[20]
    assert train[7]["text"] == "é7"
    assert train[7]["words"] == ["a", "ü"]
    assert train[7]["raw"] == b"\xff"  # not text: left as it is
    np.testing.assert_array_equal(train[5]["tags"], [1, 1])
    assert train.label_names == {"tags": ("noun", "verb")}


def test_slices_of_splits(tiny):
    assert [example["text"] for example in tiny("train[:90%]")] == [f"é{i}" for i in range(18)]
    assert len(tiny("train[18:]+test")) == 6
    with pytest.raises(UserError, match="'tiny' has no split 'tset'; did you mean 'test'"):
        tiny("tset")
    with pytest.raises(UserError, match=r"split: 'train\[:9x\]' is not a valid split"):
        tiny("train[:9x]")


def test_threads_and_pickles_read_the_same(tiny):
    train = tiny()
    expected = [example["text"] for example in train]
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        assert list(pool.map(lambda i: train[i]["text"], list(range(20)) * 10)) == expected * 10
    copy = pickle.loads(pickle.dumps(train))
    assert [example["text"] for example in copy] == expected


def test_the_process_that_prepares_last_uses_what_the_first_prepared(tiny, tmp_path, monkeypatch):
    generate = _Tiny._generate_examples

    def overtaken(self, count):
        monkeypatch.setattr(_Tiny, "_generate_examples", generate)
        source._made(lambda: _Tiny(data_dir=str(tmp_path))).download_and_prepare(file_format="array_record")
        yield from generate(self, 1)

    monkeypatch.setattr(_Tiny, "_generate_examples", overtaken)
    assert len(tiny()) == 20


def test_our_own_datasets_are_prepared_in_silence(tmp_path, capfd):
    file = tmp_path / "a.csv"
    file.write_text("text,label\na,1\nb,0\n")
    assert len(source.table(str(file), label="label", data_dir=str(tmp_path / "tfds"))) == 2
    assert capfd.readouterr() == ("", "")


def test_another_format_is_named(tmp_path, monkeypatch):
    builder = source._made(lambda: _Tiny(data_dir=str(tmp_path)))
    builder.download_and_prepare(file_format="array_record")
    info = tmp_path / "tiny" / "1.0.0" / "dataset_info.json"
    info.write_text(info.read_text().replace("array_record", "tfrecord"))
    with pytest.raises(UserError, match=r"format without random access; .*--file_format=array_record"):
        source._source(lambda: _Tiny(data_dir=str(tmp_path)), "tiny", "train")


def test_examples():
    read = source.examples(({"text": "good", "label": 1}, {"text": "bad", "label": 0}), {"label": ["neg", "pos"]})
    assert (len(read), read[1]) == (2, {"text": "bad", "label": 0})
    assert read.label_names == {"label": ("neg", "pos")}
    read[0]["text"] = "changed"  # a copy
    assert read[0]["text"] == "good"
    assert [example["label"] for example in read] == [1, 0]


def test_default_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    assert source._data_dir(None) == str(tmp_path)
    monkeypatch.delenv("TFDS_DATA_DIR")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert source._data_dir(None) == str(tmp_path / "tensorflow_datasets")
    assert source._data_dir("~/x") == str(tmp_path / "x")
