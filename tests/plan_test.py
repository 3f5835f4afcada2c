"""Planning: what is said of hardware that is not here, by the public command and without data."""

import importlib.util
import json
import re

import jax
import pytest

from research import main, plan
from research.configuration import overrides
from research.runtime import absent_gpus

HAS_LIBTPU = importlib.util.find_spec("libtpu") is not None


@pytest.fixture
def planned(tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    monkeypatch.setattr(absent_gpus, "_installed", lambda: False)

    def run(config, *flags, status=0):
        output = tmp_path / "plan.json"
        given = ["--mode=plan", f"--config=configs/{config}", f"--output={output}", *flags]
        assert main.main(given) == status
        out, error = capfd.readouterr()
        return (json.loads(output.read_text()), out + error) if status == 0 else error

    return run


def test_gpus_are_planned_for_by_arithmetic(planned):
    result, shown = planned("gpt3.py:1.3B", "--topology=h100x64", "--price=2")
    assert result["parameters"] == pytest.approx(1.3e9, rel=0.015)
    assert result["mesh"] == {"data": 1, "fsdp": 64, "model": 1}
    assert result["parameter_bytes"] == pytest.approx(4 * result["parameters"] / 64, rel=0.05)  # norms are whole
    assert result["optimizer_bytes"] == pytest.approx(2 * result["parameter_bytes"], rel=0.01)
    tokens = 512 * 2048
    count = result["parameters"] - 2048 * 2048
    assert result["operations"] == pytest.approx((6 * count + 12 * 24 * 2048 * 2048) * tokens, rel=0.01)
    assert result["seconds_at_least"]["operations"] == pytest.approx(result["operations"] / 64 / 989e12)
    assert result["hours_at_utilisation"] == pytest.approx(result["hours_at_bound"] / 0.4)
    assert result["price_at_bound"] == pytest.approx(2 * 64 * result["hours_at_bound"])
    assert result["compute_optimal_tokens"] == 20 * result["parameters"]
    assert re.search(r"fits\s+│ unknown", shown)


def test_what_does_not_fit_is_told_with_what_would(planned):
    result, shown = planned("llama.py:llama2_7b", "--topology=h100x8", "--config.mesh.data=-1", "--config.mesh.fsdp=1")
    assert result["fits"] is False
    assert re.search(r"would fit with\s+│ nothing that was tried", shown)  # without a compiler nothing is known to


def test_a_packed_base_counts_whole_and_takes_its_bits(planned):
    flags = ("--topology=h100x8", "--config.plan.vocab_size=300")
    whole, _ = planned("finetune_chat.py:tiny", *flags)
    packed, _ = planned("finetune_chat.py:qlora-tiny", *flags)
    adapters = 2 * 16 * (4 * (32 + 32) + 2 * (32 + 64))
    assert packed["parameters"] == whole["parameters"] + adapters
    kernels = 2 * (4 * 32 * 32 + 2 * 32 * 64)
    scales = 2 * (4 * 32 + 64 + 32)  # of blocks of all inputs
    assert packed["parameter_bytes"] == whole["parameter_bytes"] + 4 * adapters + 4 * scales - 3.5 * kernels


def test_the_step_is_compiled_for_the_devices_that_are_here(planned):
    result, _ = planned("gpt3.py:tiny", "--topology=cpu", "--config.plan.vocab_size=300")
    assert result["compiled"]
    assert result["peak_bytes"] > result["temporary_bytes"] > 0
    assert result["fits"] is None  # the memory of this machine is not the config's concern


def test_cheaper_configs_shard_recompute_and_split(monkeypatch):
    config = overrides.load("configs/gpt2.py")
    target = plan.find_target("h100x8")
    changes = [changes for changes, _ in plan._cheaper(config, target)]
    assert changes[0] == {"config.mesh": "dict(data=1, fsdp=-1)"}
    assert [list(change)[-1] for change in changes[1:4]] == ["remat"] * 3
    assert [change["remat"] for change in changes[1:4]] == ["attention", "dots", "full"]
    assert [change["config.optimizer.microbatches"] for change in changes[4:]] == [10, 20]
    assert config.mesh.data == -1  # what is asked of is left as it was


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--topology=b200x8"], "--topology: unknown chip 'b200'; did you mean 'h200'?"),
        (["--topology=h100"], "--topology: 'h100' is not here; a TPU slice is written v5e:4x4, GPUs h100x8"),
        (["--price=much"], "--price: much is not a positive number"),
        (["--utilisation=0"], "--utilisation: 0 is not a positive number"),
    ],
)
def test_mistakes(flags, message, planned):
    assert message in planned("gpt2.py", *flags, status=2)


def test_what_the_config_does_not_say_is_asked_for(planned):
    error = planned("movie_snippets.py", "--topology=h100x8", status=2)
    assert re.search(r"config\.(plan|task)", error)
    error = planned("finetune_text.py", status=2)
    assert "--topology: say what to plan for" in error


@pytest.mark.skipif(not HAS_LIBTPU, reason="needs libtpu, of the extra tpu")
@pytest.mark.parametrize("config", ["gpt2.py:tiny"])
def test_a_step_is_compiled_for_a_slice_that_is_not_here(config, planned):
    result, _ = planned(config, "--topology=v5e:2x2", "--config.plan.vocab_size=300")
    assert result["devices"] == 4
    assert result["fits"]
    assert jax.default_backend() == "cpu"
