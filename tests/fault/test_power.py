"""The disk whose power can be cut: what was synced stays, what was not is gone."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.fault.figures import CannotTryError
from tests.fault.power import PowerDisk


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[PowerDisk]:
    try:
        made = PowerDisk(tmp_path)
    except CannotTryError as error:
        pytest.skip(str(error))
    yield made
    made.close()
    assert not (tmp_path / "disk.img").exists()


def test_only_what_was_synced_survives(disk: PowerDisk) -> None:
    for name, synced in (("kept", True), ("gone", False)):
        with (disk.mount / name).open("w") as file:
            file.write(name)
            file.flush()
            if synced:
                os.fsync(file.fileno())
    disk.power_off()
    with pytest.raises(OSError):
        (disk.mount / "late").write_text("late")
    disk.take_out()
    disk.power_on()
    assert sorted(path.name for path in disk.mount.iterdir()) == ["kept", "lost+found"]
    assert (disk.mount / "kept").read_text() == "kept"
