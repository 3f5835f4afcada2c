import pytest

from research.errors import nearest


@pytest.mark.parametrize(
    ("name", "options", "expected"),
    [
        ("--foo", ["--mode", "--config"], "; there are: --config, --mode"),
        ("--cofnig", ["--mode", "--config"], "; did you mean '--config'?"),
        (
            "configs/no_such.py",
            ["configs/squad.py", "configs/glue.py"],
            "; there are: configs/glue.py, configs/squad.py",
        ),
        ("configs/sqaud.py", ["configs/squad.py", "configs/glue.py"], "; did you mean 'configs/squad.py'?"),
        ("learning_rat", ["learning_rate", "warmup"], "; did you mean 'learning_rate'?"),
        ("x", [], ""),
        ("zzz", [f"option{i:02}" for i in range(20)], ", option11, ..."),
    ],
)
def test_only_what_is_near_is_suggested(name, options, expected):
    assert nearest(name, options).endswith(expected)
