"""Config nodes become objects, or one line says why not."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import pytest
from ml_collections import ConfigDict

from research.build import build, invoke
from research.errors import UserError


@dataclasses.dataclass(frozen=True)
class Part:
    size: int
    rate: float = 0.1
    names: tuple[str, ...] = ()
    on: bool = False
    limit: int | None = None
    inner: Any = None
    seed: int = 0

    def __post_init__(self):
        if self.rate > 1:
            raise UserError(f"rate: {self.rate} is more than 1")
        if self.rate < 0:
            raise UserError("a part runs forwards")


def open_ended(size: int, *rest: int, **others: str) -> tuple[int, dict[str, str]]:
    return size, others


def either(rate: int | float, names: str | Sequence[str]) -> tuple[Any, Any]:
    return rate, names


PART, OPEN, EITHER = (f"{__name__}.{x}" for x in ("Part", "open_ended", "either"))


def node(call=PART, **arguments):
    return {"call": call, **arguments}


def test_nodes_nest_and_sequences_become_tuples():
    config = ConfigDict({"a": node(size=1, names=["x", "y"], inner=[node(size=2), {"plain": [3]}])})
    assert build(config, "config") == {"a": Part(1, names=("x", "y"), inner=(Part(2), {"plain": (3,)}))}


def test_plain_values_stay():
    for value in (None, 3, "text", 0.5, True):
        assert build(value, "config.x") is value


def test_context_goes_to_those_who_ask_and_were_not_told():
    built = build([node(size=1), node(size=1, seed=5), node(OPEN, size=1)], "config", seed=7, unwanted=3)
    assert built == (Part(1, seed=7), Part(1, seed=5), (1, {}))


def test_extra_keywords_go_where_any_are_taken():
    assert build(node(OPEN, size=1, x="y"), "config") == (1, {"x": "y"})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"size": 1, "rat": 0.5}, "config.x.rat: Part takes no 'rat'; did you mean 'rate'"),
        ({}, "config.x.size: Part needs it"),
        ({"size": None}, "config.x.size: Part needs it"),
        ({"size": 2.0}, "config.x.size: 2.0 is a float, not int"),
        ({"size": True}, "config.x.size: True is a bool, not int"),
        ({"size": "1"}, "config.x.size: '1' is a str, not int"),
        ({"size": 1, "rate": True}, "config.x.rate: True is a bool, not float"),
        ({"size": 1, "on": 1}, "config.x.on: 1 is a int, not bool"),
        ({"size": 1, "limit": False}, r"config.x.limit: False is a bool, not int \| None"),
        ({"size": 1, "names": ["a", 2]}, "config.x.names: .* is a tuple"),
        ({"size": 1, "names": "ab"}, "config.x.names: 'ab' is a str"),
        ({"size": 1, "rate": 2.0}, "config.x.rate: 2.0 is more than 1"),
        ({"size": 1, "rate": -1.0}, "config.x: a part runs forwards"),
        ({"size": 1, "inner": [node(size="a")]}, r"config.x.inner\[0\].size: 'a' is a str"),
        ({"size": 1, "inner": node(size=1, rate=2.0)}, "config.x.inner.rate: 2.0 is more"),
    ],
)
def test_arguments_that_do_not_fit(arguments, message):
    with pytest.raises(UserError, match=message) as info:
        build(node(**arguments), "config.x")
    assert "\n" not in str(info.value)


@pytest.mark.parametrize("arguments", [{"size": 1, "rate": 1}, {"size": 1, "limit": 3}, {"size": 1, "limit": None}])
def test_arguments_that_fit(arguments):
    assert build(node(**arguments), "config.x") == Part(**arguments)


def test_unions():
    assert build(node(EITHER, rate=1, names="a"), "config") == (1, "a")
    assert build(node(EITHER, rate=0.1, names=["a"]), "config") == (0.1, ("a",))
    with pytest.raises(UserError, match=r"config.rate: True is a bool"):
        build(node(EITHER, rate=True, names="a"), "config")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ("research.models.bert.Encodr", "no 'Encodr' in 'research.models.bert'; did you mean 'Encoder'"),
        ("research.models.brt.Encoder", "no module 'research.models.brt'; did you mean 'research.models.bert'"),
        ("research.modles.bert.Encoder", "no module .*; did you mean 'research.models'"),
        ("rsearch.models.bert.Encoder", "no module 'rsearch.models.bert'; did you mean 'research'"),
        ("research.models.bert.Encoder.x", "no module 'research.models.bert.Encoder'"),
        ("Encoder", "'Encoder' is not of the form package.module.name"),
        ("", "'' is not of the form"),
        ("research.errors.difflib", "'research.errors.difflib' cannot be called"),
        (3, "'3' is not of the form"),
    ],
)
def test_calls_that_do_not_exist(call, message):
    with pytest.raises(UserError, match=f"config.x.call: {message}"):
        build({"call": call}, "config.x")


def test_a_missing_package_is_named(tmp_path, monkeypatch):
    (tmp_path / "wants_more.py").write_text("import a_package_that_nobody_has.inside\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserError, match=r"config.call: 'wants_more.X' needs the package 'a_package_that_nobody_has'"):
        build({"call": "wants_more.X"}, "config")


def test_other_errors_are_not_hidden():
    def broken(size: int) -> None:
        raise ValueError("a defect, not a mistake")

    with pytest.raises(ValueError, match="a defect"):
        invoke(broken, {"size": 1}, "config")
