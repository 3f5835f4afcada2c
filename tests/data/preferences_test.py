"""Preferences in all their forms, and their tokens."""

import json

import numpy as np
import pytest

from research.data import files, preferences, tokenizer
from research.data.chat import ChatTokens
from research.data.dataset import Dataset
from research.data.preferences import ClassPreference, PreferenceTokens
from research.data.source import examples
from research.errors import UserError

USER = {"role": "user", "content": "Is it so?"}
YES, NO = ({"role": "assistant", "content": content} for content in ("Yes, it is.", "No."))
EARLIER = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}, USER]
FEATURES = ("input_ids", "targets", "target_mask", "attention_mask")
TOKENS = tokenizer.byte_level()


def answer(made, prefix=""):
    learnt = made[f"{prefix}target_mask"] == 1
    assert (np.diff(np.flatnonzero(learnt)) == 1).all()
    return TOKENS.decode(made[f"{prefix}targets"][learnt], skip_special=False)


@pytest.mark.parametrize(
    "example",
    [
        {"prompt": "Is it so?", "chosen": "Yes, it is.", "rejected": "No."},
        {"prompt": [USER], "chosen": [YES], "rejected": [NO]},
        {"prompt": "", "chosen": [USER, YES], "rejected": [USER, NO]},
        {"prompt": "Is it so?", "chosen": [USER, YES], "rejected": [USER, NO]},
        {"chosen": [USER, YES], "rejected": [USER, NO]},
    ],
    ids=["texts", "messages", "conversations", "conversations beside their prompt", "conversations alone"],
)
def test_all_forms_are_the_same_preference(example):
    assert preferences.conversations(*(example.get(name) for name in preferences.FIELDS)) == ([USER], [YES], [NO])
    (made,) = PreferenceTokens(TOKENS)(example)
    for prefix, said in (("", YES), ("rejected_", NO)):
        (alone,) = ChatTokens(TOKENS)({"messages": [USER, said]})
        for name in FEATURES:
            np.testing.assert_array_equal(made[prefix + name], alone[name])


def test_earlier_answers_are_the_prompts():
    (made,) = PreferenceTokens(TOKENS)({"prompt": EARLIER, "chosen": [YES], "rejected": "No."})
    assert answer(made).startswith("Yes, it is.")
    assert answer(made, "rejected_").startswith("No.")
    (whole,) = PreferenceTokens(TOKENS)({"chosen": [*EARLIER, YES], "rejected": [*EARLIER, NO]})
    for name in FEATURES:
        np.testing.assert_array_equal(made[name], whole[name])


def test_both_sides_share_the_lengths_of_buckets():
    records = [{"prompt": "a" * i, "chosen": "b", "rejected": "c" * (20 - i)} for i in (1, 2, 3, 15, 16, 17)]
    names = tuple(prefix + name for prefix in ("", "rejected_") for name in FEATURES)
    data = Dataset(examples(records), names, (PreferenceTokens(TOKENS, 200),), batch_size=3, length_buckets=2)
    for batch in data.epoch():
        assert len({batch[name].shape for name in names}) == 1
        for prefix in ("", "rejected_"):
            assert (batch[f"{prefix}target_mask"] <= batch[f"{prefix}attention_mask"]).all()


def test_what_holds_no_answer_is_left_out_and_a_prompt_alone_is_a_question():
    assert PreferenceTokens(TOKENS, 8)({"prompt": "Is it so?", "chosen": "Yes.", "rejected": "No."}) == []
    (made,) = PreferenceTokens(TOKENS)({"prompt": "Is it so?"})
    assert set(made) == {"prompt", "input_ids", "attention_mask"}
    asked = TOKENS.chat([USER], add_generation_prompt=True)
    assert TOKENS.decode(made["input_ids"], skip_special=False) == asked


@pytest.mark.parametrize(
    ("example", "problem"),
    [
        ({"prompt": "a", "chosen": "b", "rejected": "b"}, "'chosen' and 'rejected' are the same"),
        ({"prompt": "a", "chosen": "", "rejected": "b"}, "'chosen' is empty"),
        ({"chosen": "a", "rejected": "b"}, "'prompt' is empty"),
        ({"chosen": [USER, YES], "rejected": [EARLIER[0], NO]}, "have no prompt in common"),
        ({"chosen": [USER, YES], "rejected": [USER]}, "what follows the prompt in 'rejected' does not begin and end"),
        ({"prompt": "a", "chosen": [{"role": "assistant"}], "rejected": "b"}, "'chosen' must be a list of messages"),
    ],
)
def test_what_is_no_preference_is_said(example, problem):
    with pytest.raises(UserError, match=problem):
        PreferenceTokens(TOKENS)(example)


def test_a_class_is_a_preference():
    op = ClassPreference("Good? {text}", ("No.", "Yes."))
    assert op({"text": "fine", "label": 1}) == {
        **{"text": "fine", "label": 1, "prompt": "Good? fine"},
        **{"chosen": "Yes.", "rejected": "No."},
    }
    assert op({"text": "fine", "label": 0})["rejected"] == "Yes."
    assert op({"text": "fine"}) == {"text": "fine", "prompt": "Good? fine"}
    with pytest.raises(UserError, match=r"answers: there are 2, and an example has the class 2"):
        op({"text": "fine", "label": 2})
    with pytest.raises(UserError, match="must be two or more, and different"):
        ClassPreference("{text}", ("Yes.", "Yes."))


def test_files_of_preferences(tmp_path):
    rows = [
        {"question": "a?", "better": "b", "worse": "c"},
        {"question": [USER], "better": [YES], "worse": "c"},
        *({"question": f"{i}?", "better": "b", "worse": "c"} for i in range(18)),
    ]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    fields = {"prompt": "question", "chosen": "better", "rejected": "worse"}
    source = files.preferences(str(file), **fields)
    assert source[0]["prompt"] == [{"role": "user", "content": "a?"}]
    assert source[1] == {"prompt": [USER], "chosen": [YES], "rejected": [{"role": "assistant", "content": "c"}]}
    train, held_out = (files.preferences(str(file), split=split, held_out=0.1, **fields) for split in SPLITS)
    assert (len(train), len(held_out)) == (18, 2)
    with pytest.raises(UserError, match=r"has no column 'betters'; did you mean 'better'\?"):
        files.preferences(str(file), **{**fields, "chosen": "betters"})


SPLITS = ("train", "validation")


def test_bad_rows_of_files_are_named(tmp_path):
    file = tmp_path / "rows.jsonl"
    rows = [{"chosen": [USER, YES], "rejected": [USER, NO]}, {"chosen": "a", "rejected": "a"}, {"chosen": [USER]}]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(UserError, match=r"2 bad rows: .*rows.jsonl:2: 'prompt' is empty; .*:3: 'rejected' is empty"):
        files.preferences(str(file), prompt="")
    file.write_text(json.dumps(rows[0]) + "\n")
    assert files.preferences(str(file), prompt="")[0] == {"prompt": [USER], "chosen": [YES], "rejected": [NO]}
