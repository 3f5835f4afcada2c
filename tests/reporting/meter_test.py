import json
import math

import numpy as np
import pytest

from research.metrics import Mean
from research.reporting.meter import Meter, NonFiniteError


def step(meter: Meter, number: int, total: float, count: float) -> None:
    meter.add_metrics(number, {"loss": Mean(np.float32(total), np.float32(count))})
    attention = np.asarray([[1, 1, 0], [1, 1, 1], [1, 1, 1]])
    meter.add_batch({"mask": np.asarray([1, 1, 0]), "attention_mask": attention}, processes=2)
    meter.add_seconds(train=0.5)


def test_means_are_divided_once_and_forgotten():
    meter = Meter()
    step(meter, 1, 6.0, 2.0)
    step(meter, 2, 6.0, 4.0)
    row = meter.flush()
    assert row == {
        "train/loss": 2.0,
        "train/steps_per_second": 2.0,
        "train/examples_per_second": 8.0,
        "train/tokens_per_second": 20.0,
        "train/padding_share": 1 - 20 / 36,
    }
    assert meter.flush() == {}
    assert meter.summary()["train_seconds"] == 1.0


def test_tokens_of_packed_documents_and_of_both_sides_are_counted():
    meter = Meter()
    packed, other = np.asarray([[1, 2, 2, 0], [1, 1, 3, 3]]), np.asarray([[1, 0], [1, 2]])
    meter.add_batch({"mask": np.ones(2), "attention_mask": packed, "decoder_attention_mask": other}, processes=1)
    meter.add_seconds(train=1.0)
    assert meter.summary()["tokens_per_second"] == 10.0
    assert meter.summary()["padding_share"] == pytest.approx(2 / 12)


def test_a_run_that_goes_on_logs_the_same_numbers():
    whole, first = Meter(), Meter()
    step(whole, 1, 0.1, 3.0)
    step(first, 1, 0.1, 3.0)
    second = Meter(json.loads(json.dumps(first.state())))
    for meter in (whole, second):
        step(meter, 2, 0.7, 2.0)
    assert second.state() == whole.state()
    assert second.flush() == whole.flush()
    assert second.summary() == whole.summary()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", ["loss", "gradient_norm"])
def test_what_is_not_finite_names_the_step(name, value):
    message = f"the {name.replace('_', ' ')} is {value} at step 7; the last good checkpoint is kept"
    with pytest.raises(NonFiniteError, match=f"^{message}$"):
        Meter().add_metrics(7, {name: Mean(np.float32(value), np.float32(1))})


def test_a_metric_that_counted_nothing_is_nan():
    meter = Meter()
    meter.add_metrics(1, {"accuracy": Mean(np.float32(0), np.float32(0))})
    assert math.isnan(meter.flush()["train/accuracy"])


def test_operations_are_told_a_device_and_as_a_share_of_its_peak():
    meter = Meter(devices=4, peak=50.0)
    meter.add_operations(400.0)
    meter.add_seconds(train=2.0, wait=0.5)
    summary = meter.summary()
    assert (summary["operations_per_second"], summary["mfu"], summary["waiting_share"]) == (50.0, 1.0, 0.25)
    unknown = Meter()
    unknown.add_operations(1.0)
    assert "mfu" not in unknown.summary()
