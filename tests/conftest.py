"""Settings of all tests, and of the processes that they start."""

import os

# Compiling is most of what small models cost; the tests need right programs, not fast ones.
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_backend_optimization_level=0".strip()
os.environ.setdefault("HF_HUB_OFFLINE", "1")
