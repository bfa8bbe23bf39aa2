import os
import subprocess
import sys

import pytest

from model_adapter.allocator import keep_few_kernels

KERNELS = "ONEDNN_PRIMITIVE_CACHE_CAPACITY"

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


HOLES = """
import ctypes
from model_adapter.allocator import FreedMemory, keep_freed_memory, private_bytes

if not keep_freed_memory():
    raise SystemExit("no glibc")

def half_freed():
    blocks = [bytearray(1 << 20) for _ in range(400)]
    del blocks[::2]
    return blocks

first = half_freed()
before = private_bytes()
freed = FreedMemory(kept=150 << 20)
told = [(before - private_bytes()) >> 20, freed.bound()]
second = half_freed()
before = private_bytes()
told += [freed.bound(), (before - private_bytes()) >> 20, freed.bound()]
print(*told, sum(map(len, first + second)) >> 20)
"""


def test_freed_memory_between_what_is_in_use_is_given_back_above_a_bound() -> None:
    run = [sys.executable, "-c", HOLES]
    done = subprocess.run(run, capture_output=True, text=True, check=False)
    if "no glibc" in done.stderr:
        pytest.skip("the C library is not glibc: nothing is given back")
    assert done.returncode == 0, done.stderr
    at_first, early, given, later, again, in_use = done.stdout.split()
    assert (early, given, again, in_use) == ("False", "True", "False", "400")
    assert int(at_first) >= 190
    assert int(later) >= 190


def test_few_kernels_are_kept_unless_the_environment_says_how_many(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv(KERNELS, raising=False)
    keep_few_kernels()
    assert os.environ[KERNELS] == "64"
    monkeypatch.setenv(KERNELS, "7")
    keep_few_kernels()
    assert os.environ[KERNELS] == "7"
