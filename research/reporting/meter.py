"""Adds up what happened since the last line of training metrics, and over the whole run."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np


class NonFiniteError(Exception):
    """The loss or its gradient became infinite or NaN."""


class Meter:
    """Sums on the host, in float64; its state goes into the checkpoint, so that a resumed run logs the same numbers."""

    def __init__(self, state: Mapping[str, Any] | None = None, devices: int = 1, peak: float | None = None):
        """Go on from what `state` returned, else begin at zero.

        Args:
          state: None for a new run.
          devices: over how many the operations of a step are spread.
          peak: operations a second that a device can do; None where it is not known.
        """
        state = state or {}
        self._devices, self._peak = devices, peak
        self._means: dict[str, list[float]] = {k: list(v) for k, v in state.get("means", {}).items()}
        self._interval: dict[str, float] = dict(state.get("interval", {}))
        self._run: dict[str, float] = dict(state.get("run", {}))

    def state(self) -> dict[str, Any]:
        """Return all sums, as JSON."""
        return {"means": self._means, "interval": self._interval, "run": self._run}

    def add_metrics(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Add the means of one step.

        Raises:
          NonFiniteError: the loss or the gradient's norm is not finite.
        """
        for name, mean in metrics.items():
            total, count = float(mean.total), float(mean.count)
            if name in ("loss", "gradient_norm") and not math.isfinite(total):
                raise NonFiniteError(
                    f"the {name.replace('_', ' ')} is {total} at step {step}; the last good checkpoint is kept"
                )
            sums = self._means.setdefault(name, [0.0, 0.0])
            sums[0] += total
            sums[1] += count

    def add_batch(self, batch: Mapping[str, np.ndarray], processes: int) -> None:
        """Count a batch: its real examples and, of text, its tokens on all sides and the places for tokens."""
        counts = {"steps": 1.0, "examples": float(batch["mask"].sum()) * processes}
        # Masks hold numbers of documents where several share a row.
        for numbers in (batch[name] for name in ("attention_mask", "decoder_attention_mask") if name in batch):
            tokens = float(np.count_nonzero(numbers[batch["mask"] > 0]))
            counts["tokens"] = counts.get("tokens", 0.0) + tokens * processes
            counts["places"] = counts.get("places", 0.0) + float(numbers.size) * processes
        self._add(counts)

    def add_operations(self, operations: float) -> None:
        """Add the operations of a step, by the convention of `flops`."""
        self._add({"operations": operations})

    def add_seconds(self, **seconds: float) -> None:
        """Add time spent: `train` seconds, of which some are `wait` seconds, without data; or `compile` seconds."""
        self._add({f"{name}_seconds": value for name, value in seconds.items()})

    def flush(self) -> dict[str, float]:
        """Return the training metrics since the last call, and forget them; empty where there were none."""
        if not self._means:
            return {}
        row = {f"train/{k}": total / count if count else math.nan for k, (total, count) in self._means.items()}
        row |= {f"train/{k}": v for k, v in self._speeds(self._interval).items()}
        self._means, self._interval = {}, {}
        return row

    def summary(self) -> dict[str, float]:
        """Return the times and speeds of the whole run; compilation counts apart."""
        times = {name: self._run.get(name, 0.0) for name in ("train_seconds", "compile_seconds")}
        return times | self._speeds(self._run)

    def _add(self, counts: Mapping[str, float]) -> None:
        for sums in (self._interval, self._run):
            for name, value in counts.items():
                sums[name] = sums.get(name, 0.0) + value

    def _speeds(self, sums: Mapping[str, float]) -> dict[str, float]:
        """Return rates, "mfu", and shares: of places that hold padding, and of time without data."""
        seconds = max(sums.get("train_seconds", 0.0), 1e-9)
        rates = {f"{k}_per_second": sums[k] / seconds for k in ("steps", "examples", "tokens") if k in sums}
        if "operations" in sums:
            rates["operations_per_second"] = sums["operations"] / seconds / self._devices
            if self._peak:
                rates["mfu"] = rates["operations_per_second"] / self._peak
        if sums.get("places"):
            rates["padding_share"] = 1 - sums["tokens"] / sums["places"]
        return rates | ({"waiting_share": sums["wait_seconds"] / seconds} if "wait_seconds" in sums else {})
