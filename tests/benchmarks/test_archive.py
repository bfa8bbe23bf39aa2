"""What benchmarks.archive makes its memory of."""

from __future__ import annotations

from pathlib import Path

from benchmarks import archive
from storage.archive import open_archive


def test_the_archive_is_sound_and_the_same_each_time(tmp_path: Path) -> None:
    paths = [tmp_path / name for name in "ab"]
    for path in paths:
        archive.write(path, 45)
    assert archive.members(paths[0]) == archive.members(paths[1])
    with open_archive(paths[0]) as opened:
        assert opened.manifest.documents == opened.manifest.encodings[0].blocks == 45
        assert [row.last_number for row in opened.revisions()] == [20, 40, 45]
    archive.copy(paths[0], paths[1])
    assert paths[0].read_bytes() == paths[1].read_bytes()
