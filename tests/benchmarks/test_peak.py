"""Peak memory is that of a process and of those it started, also when it was given back."""

import subprocess
import sys

from benchmarks.peak import peak_mib

#: Holds 100 MiB for a moment, says so, and waits for a line.
_HELD_ONCE = "b = b'x' * (100 << 20); del b; print(flush=True); input()"


def test_what_was_given_back_counts_and_children_count_apart() -> None:
    parent = (
        "import subprocess, sys\n"
        f"subprocess.run([sys.executable, '-c', {_HELD_ONCE!r}], check=True)"
    )
    with subprocess.Popen(
        [sys.executable, "-c", parent], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        process.stdout.readline()
        peak = peak_mib(process.pid)
        process.communicate(b"\n")
    assert peak["children"] > 100
    assert 1 < peak["itself"] < 100
