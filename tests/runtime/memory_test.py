import jax
import jax.numpy as jnp
import pytest

from research.runtime import memory


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 17179869184 bytes.", "asked for 16.00 GiB"),
        ("RESOURCE_EXHAUSTED: Error allocating device buffer: Attempting to allocate 2.50G.", "asked for 2.50G"),
        (
            "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space hbm. Used "
            "34.20G of 15.75G hbm. Exceeded hbm capacity by 18.45G.",
            "asked for 34.20G, there are 15.75G",
        ),
        ("RESOURCE_EXHAUSTED: in words of the future", "out of device memory: a larger"),
    ],
)
def test_it_says_what_was_asked_for_and_what_takes_less(text, said):
    line = memory.explain(RuntimeError(text))
    assert said in line
    assert "\n" not in line
    for key in ("microbatches", "remat", "batch_size"):
        assert key in line


def test_other_errors_are_none_of_its_business():
    assert memory.explain(RuntimeError("INTERNAL: something else")) is None
    assert memory.explain(MemoryError()).startswith("out of host memory")


def test_an_allocation_that_is_truly_too_large_is_recognised():
    with pytest.raises(jax.errors.JaxRuntimeError) as caught:
        jax.block_until_ready(jax.jit(lambda: jnp.ones((2**25, 2**20)))())  # 128 TiB
    assert memory.explain(caught.value) is not None
