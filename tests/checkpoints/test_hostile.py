"""Damaged and lying checkpoints end in a CheckpointError, whatever the bytes, in little memory."""

from __future__ import annotations

import contextlib
import json
import resource
import struct
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from model_adapter.checkpoints import CheckpointError, load_directory, load_gguf
from model_adapter.checkpoints.errors import CorruptFileError
from model_adapter.checkpoints.gguf_file import GgufFile
from tests.support.tiny_checkpoints import tiny_config, write_directory, write_gguf

_SLOW = settings(
    max_examples=60,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)

#: Numbers that a header could lie with.
_LIES = st.sampled_from([0, 1, 2**16, 2**31, 2**32 - 1, 2**40, 2**63 - 1, 2**64 - 1])


@pytest.fixture(scope="module")
def gguf_bytes(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("gguf") / "a.gguf"
    write_gguf(path)
    return path.read_bytes()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("published")
    write_directory(path, tiny_config())
    return path


def _header_end(content: bytes) -> int:
    return content.rfind(b"blk.2.") + 64


@given(data=st.data())
@_SLOW
def test_mutated_gguf_headers(tmp_path: Path, gguf_bytes: bytes, data: st.DataObject) -> None:
    content = bytearray(gguf_bytes)
    limit = _header_end(gguf_bytes)
    for _ in range(data.draw(st.integers(1, 3))):
        # Half of the edits fall into the first fields, where they do most.
        position = data.draw(st.integers(0, data.draw(st.sampled_from([400, limit]))))
        if data.draw(st.booleans()):
            content[position : position + 8] = struct.pack("<Q", data.draw(_LIES))
        else:
            content[position] = data.draw(st.integers(0, 255))
    _loads_or_refuses(tmp_path, bytes(content))


@given(size=st.integers(0, 60_000))
@_SLOW
def test_truncated_gguf(tmp_path: Path, gguf_bytes: bytes, size: int) -> None:
    path = tmp_path / "a.gguf"
    path.write_bytes(gguf_bytes[: min(size, len(gguf_bytes) - 1)])
    with pytest.raises(CheckpointError):
        load_gguf(path)


def _loads_or_refuses(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "a.gguf"
    path.write_bytes(content)
    tracemalloc.start()
    try:
        load_gguf(path)
    except CheckpointError:
        pass
    finally:
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert peak < 64 << 20


def _announcing(tensors: int, entries: int, rest: bytes = b"") -> bytes:
    return b"GGUF" + struct.pack("<IQQ", 3, tensors, entries) + rest


def _text(value: bytes, length: int | None = None) -> bytes:
    return struct.pack("<Q", len(value) if length is None else length) + value


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"GGUF",
        b"FUGG" + bytes(64),
        b"GGUF" + struct.pack(">IQQ", 3, 0, 0),
        b"GGUF" + struct.pack("<IQQ", 1, 0, 0),
        _announcing(2**63, 0),
        _announcing(0, 2**63),
        _announcing(1, 0),
        _announcing(0, 1, _text(b"key", 2**62)),
        _announcing(0, 1, _text(b"\xff\xfe") + struct.pack("<I", 4)),
        _announcing(0, 1, _text(b"k") + struct.pack("<I", 99)),
        _announcing(0, 1, _text(b"k") + struct.pack("<IIQ", 9, 8, 2**60)),
        _announcing(0, 1, _text(b"k") + struct.pack("<IIQ", 9, 4, 2**61)),
        _announcing(0, 1, _text(b"k") + struct.pack("<IIQ", 9, 9, 1)),
        _announcing(0, 2, 2 * (_text(b"k") + struct.pack("<II", 4, 1))),
        _announcing(1, 0, _text(b"t") + struct.pack("<I", 9)),
        _announcing(1, 0, _text(b"t") + struct.pack("<IQIQ", 1, 2**62, 0, 0) + bytes(64)),
        _announcing(1, 0, _text(b"t") + struct.pack("<IQIQ", 1, 0, 0, 0) + bytes(64)),
        _announcing(1, 0, _text(b"t") + struct.pack("<IQIQ", 1, 4, 77, 0) + bytes(64)),
        _announcing(1, 0, _text(b"t") + struct.pack("<IQIQ", 1, 4, 0, 2**63) + bytes(64)),
        _announcing(1, 0, _text(b"t") + struct.pack("<IQIQ", 1, 4, 0, 7) + bytes(64)),
        _announcing(1, 0, _text(b"t") + struct.pack("<IQIQ", 1, 33, 8, 0) + bytes(64)),
        _announcing(2, 0, 2 * (_text(b"t") + struct.pack("<IQIQ", 1, 4, 0, 0)) + bytes(99)),
    ],
)
def test_lying_gguf_headers(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "a.gguf"
    path.write_bytes(content)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(CheckpointError):
        GgufFile(path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 << 10


@given(data=st.data())
@_SLOW
def test_mutated_safetensors(tmp_path: Path, folder: Path, data: st.DataObject) -> None:
    for source in folder.iterdir():
        if source.suffix == ".json":
            (tmp_path / source.name).write_bytes(source.read_bytes())
    content = bytearray((folder / "model.safetensors").read_bytes())
    header = 8 + struct.unpack_from("<Q", content)[0]
    for _ in range(data.draw(st.integers(1, 3))):
        position = data.draw(st.integers(0, header))
        content[position] = data.draw(st.integers(0, 255))
    if data.draw(st.booleans()):
        del content[data.draw(st.integers(0, len(content))) :]
    (tmp_path / "model.safetensors").write_bytes(content)
    with contextlib.suppress(CheckpointError):
        load_directory(tmp_path)


@given(data=st.data())
@_SLOW
def test_mutated_configs(tmp_path: Path, folder: Path, data: st.DataObject) -> None:
    for source in folder.iterdir():
        (tmp_path / source.name).write_bytes(source.read_bytes())
    raw = json.loads((folder / "config.json").read_text())
    target = raw["msa_config"] if data.draw(st.booleans()) else raw
    value = st.one_of(
        st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=20),
        st.lists(st.integers(), max_size=3), st.dictionaries(st.text(max_size=3), st.none()),
    )  # fmt: skip
    target[data.draw(st.sampled_from(sorted(target)))] = data.draw(value)
    (tmp_path / "config.json").write_text(json.dumps(raw))
    with contextlib.suppress(CheckpointError):
        load_directory(tmp_path)


@pytest.mark.parametrize(
    "name", ["../model.safetensors", "/etc/passwd", "a/b.safetensors", ".hidden", "x.bin", ""]
)
def test_index_names_stay_in_the_folder(tmp_path: Path, name: str) -> None:
    write_directory(tmp_path, tiny_config(), shards=2)
    path = tmp_path / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["model.norm.weight"] = name
    path.write_text(json.dumps(index))
    with pytest.raises(CorruptFileError, match="not a file beside it"):
        load_directory(tmp_path)
