from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest

from memsvc.config import Config, load_config
from memsvc.settings import ConfigError

DOCUMENT = Path(__file__).parents[2] / "docs" / "configuration.md"


def test_every_setting_is_documented_with_its_default() -> None:
    rows = dict(re.findall(r"^\| `(\w+)` \| (.*?) \|", DOCUMENT.read_text(), re.MULTILINE))
    defaults = {
        setting.name: f"`{setting.default}`" if str(setting.default) else "empty"
        for setting in dataclasses.fields(Config)
    }
    assert rows == defaults


def test_every_setting_has_help() -> None:
    assert all(setting.metadata["help"] for setting in dataclasses.fields(Config))


def test_command_line_beats_environment_beats_file_beats_default(tmp_path: Path) -> None:
    file = tmp_path / "memsvc.toml"
    file.write_text('listen = "file:1"\nbacklog_documents = 5\nopen_environments = 7\n')
    config = load_config(
        {"listen": "line:3", "log_level": None},
        {"MEMSVC_LISTEN": "env:2", "MEMSVC_BACKLOG_DOCUMENTS": "6", "MEMSVC_API_KEY": "other"},
        file,
    )
    assert (config.listen, config.backlog_documents, config.open_environments) == ("line:3", 6, 7)
    assert config.log_level == "info"


def test_environment_may_name_the_file(tmp_path: Path) -> None:
    file = tmp_path / "memsvc.toml"
    file.write_text("reader_threads = 2\n")
    assert load_config(environ={"MEMSVC_CONFIG": str(file)}).reader_threads == 2


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"no_such_setting": 1}, "no_such_setting"),
        ({"backlog_documents": 0}, "backlog_documents"),
        ({"backlog_documents": "many"}, "backlog_documents"),
        ({"backlog_documents": True}, "backlog_documents"),
        ({"log_format": "xml"}, "log_format"),
        ({"reflection": "perhaps"}, "reflection"),
        ({"encode_batch_documents": 257}, "encode_batch_documents"),
        ({"tls_certificate": "a.pem"}, "tls_private_key"),
        ({"listen": ""}, "listen"),
    ],
)
def test_a_wrong_setting_is_refused_by_name(values: dict[str, object], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        load_config(values)


def test_a_broken_file_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "memsvc.toml"
    file.write_text("listen = ")
    with pytest.raises(ConfigError, match=r"memsvc\.toml"):
        load_config(file=file)
    with pytest.raises(ConfigError, match=r"missing\.toml"):
        load_config(file=tmp_path / "missing.toml")


def test_secrets_are_not_shown() -> None:
    config = load_config({"database_url": "postgresql://user:hunter2@db/memsvc"})
    assert "hunter2" not in str(config.shown())
    assert config.catalog_url.endswith("@db/memsvc")


def test_default_catalog_is_in_the_data_folder(tmp_path: Path) -> None:
    config = load_config({"data": str(tmp_path)})
    assert config.catalog_url == f"sqlite:///{tmp_path}/catalog.db"
