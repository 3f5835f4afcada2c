"""Settings of all tests, and of the processes that they start."""

import importlib.util
import os

import pytest

# Compiling is most of what small models cost; the tests need right programs, not fast ones.
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_backend_optimization_level=0".strip()
os.environ.setdefault("HF_HUB_OFFLINE", "1")


def pytest_configure(config):
    """Says what the comparisons need, instead of an error at every import."""
    missing = [name for name in ("torch", "transformers") if importlib.util.find_spec(name) is None]
    if config.option.markexpr == "peers" and missing:
        pytest.exit(f"'{missing[0]}' is missing: run `make install EXTRAS=test,peers` for the comparisons with it", 2)
