import subprocess
import sys

import pytest

from research.runtime import allocator

# Takes and gives back 64 MiB in a thread of its own, time and again, and prints how many pages the kernel had to find.
CHURN = """
import resource, sys, threading
from research.runtime import allocator
if sys.argv[1:]:
    allocator.keep()
def churn():
    for _ in range(20):
        bytearray(2**26)
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(2):
    before = faults()
    thread = threading.Thread(target=churn)
    thread.start()
    thread.join()
print(faults() - before)
"""


def page_faults(*arguments: str, **environment: str) -> int:
    done = subprocess.run(
        [sys.executable, "-c", CHURN, *arguments], env=environment, check=True, capture_output=True, text=True
    )
    return int(done.stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="these are settings of glibc")
def test_buffers_that_a_thread_has_given_back_are_not_asked_for_again():
    every_time = 20 * 2**26 // 2**16  # pages of 64 KiB at most
    assert page_faults() >= every_time
    assert page_faults("keep", JAX_PLATFORMS="cpu") < every_time / 10
    assert page_faults(GLIBC_TUNABLES=allocator.TUNABLES) < every_time / 10


@pytest.mark.skipif(sys.platform != "linux", reason="these are settings of glibc")
def test_nothing_changes_where_an_accelerator_computes():
    assert page_faults("keep", JAX_PLATFORMS="cuda") >= 20 * 2**26 // 2**16
