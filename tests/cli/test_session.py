"""Where commands look for the address and the key, and how they fail."""

from __future__ import annotations

from pathlib import Path

import pytest

from memsvc.cli.exits import ExitCode, exit_code
from memsvc.cli.output import Output, size, to_json
from memsvc.cli.session import Session
from memsvc.client import Client, ConfigurationError, InternalError, MemsvcError, Turn, errors
from memsvc.client.errors import _BY_CODE
from memsvc.config import Config


def session(environment: dict[str, str] | None = None, **options: object) -> Session:
    return Session(Output(as_json=True), environment or {}, **options)  # type: ignore[arg-type]  # as each test says


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "operator.key").write_text("key-of-folder\n")
    (tmp_path / "address").write_text("folder:1\n")
    return tmp_path


ENVIRONMENT = {"MEMSVC_ADDRESS": "environment:1", "MEMSVC_API_KEY": "key-of-environment"}


def test_a_named_folder_comes_before_the_environment(folder: Path) -> None:
    found = session(ENVIRONMENT, data_dir=folder).connection()
    assert (found.address, found.api_key) == ("folder:1", "key-of-folder")


def test_the_environment_comes_before_its_own_folder(folder: Path) -> None:
    inside = ENVIRONMENT | {"MEMSVC_DATA": str(folder)}
    assert session(inside).connection().address == "environment:1"
    only_folder = session({"MEMSVC_DATA": str(folder)}).connection()
    assert (only_folder.address, only_folder.api_key) == ("folder:1", "key-of-folder")


def test_options_come_first(folder: Path, tmp_path: Path) -> None:
    key = tmp_path / "k"
    key.write_text("key-of-option")
    found = session(ENVIRONMENT, data_dir=folder, address="option:1", api_key_file=key).connection()
    assert (found.address, found.api_key) == ("option:1", "key-of-option")


def test_without_an_address_the_servers_default_is_tried(tmp_path: Path) -> None:
    (tmp_path / "operator.key").write_text("k")
    assert session(data_dir=tmp_path).connection().address == Config().listen


def test_without_a_key_it_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="memsvc init"):
        session(data_dir=tmp_path).connection()
    with pytest.raises(ConfigurationError):
        session({"MEMSVC_TLS_ROOTS": "/none", **ENVIRONMENT}, data_dir=tmp_path).connection()


def test_every_error_has_its_exit_code() -> None:
    coded = [kind("", code=code) for code, kind in _BY_CODE.items() if code != "CANCELLED"]
    codes = {exit_code(error) for error in coded}
    assert ExitCode.FAILED not in codes
    assert len(codes) == len(coded) - 1  # taken names and stale etags are both a conflict
    assert exit_code(InternalError("", code="INTERNAL")) is ExitCode.FAILED
    assert exit_code(MemsvcError()) is ExitCode.FAILED
    assert exit_code(errors.ConfigurationError()) is ExitCode.CONFIGURATION


def test_json_of_dataclasses() -> None:
    assert to_json(Turn("user", "é", metadata={"a": "b"})) == (
        '{"role": "user", "text": "é", "occurred_at": null, "speaker": "", "session": "", '
        '"metadata": {"a": "b"}}'
    )
    with pytest.raises(TypeError):
        to_json(Client)


def test_sizes_for_people() -> None:
    assert [size(n) for n in (0, 1023, 1024, 5 << 20, 1 << 45)] == [
        "0 B",
        "1023 B",
        "1.0 KiB",
        "5.0 MiB",
        "32.0 TiB",
    ]
