import subprocess
import sys

import pytest

SCRIPT = """
import resource, sys, threading
from model_adapter.allocator import keep_freed_memory

if "tuned" in sys.argv and not keep_freed_memory():
    raise SystemExit("no glibc")

def work():
    for _ in range(50):
        blocks = [bytearray(4 << 20) for _ in range(8)]
        del blocks

thread = threading.Thread(target=work)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
thread.start(); thread.join()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def page_faults(*arguments: str) -> int:
    run = [sys.executable, "-c", SCRIPT, *arguments]
    done = subprocess.run(run, capture_output=True, text=True, check=False)
    if "no glibc" in done.stderr:
        pytest.skip("the C library is not glibc: nothing is tuned")
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


def test_a_threads_freed_memory_is_not_faulted_in_again() -> None:
    assert page_faults("tuned") < page_faults() / 5
