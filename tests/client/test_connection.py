"""Where to connect, and what to trust and show, from the environment."""

from __future__ import annotations

from pathlib import Path

import pytest

from memsvc.client import TLS, ConfigurationError, Connection

BASE = {"MEMSVC_ADDRESS": "localhost:1", "MEMSVC_API_KEY": "msk_x"}


@pytest.fixture
def files(tmp_path: Path) -> dict[str, str]:
    names = {
        "MEMSVC_TLS_ROOTS": "roots",
        "MEMSVC_TLS_CLIENT_CERTIFICATE": "certificate",
        "MEMSVC_TLS_CLIENT_KEY": "key",
    }
    for name in names.values():
        (tmp_path / name).write_text(name)
    return {variable: str(tmp_path / name) for variable, name in names.items()}


def test_no_tls_unless_told() -> None:
    assert Connection.from_environment(BASE).tls is None


def test_roots_and_a_certificate_of_ones_own(files: dict[str, str]) -> None:
    found = Connection.from_environment(BASE | files)
    assert found.tls == TLS(b"roots", b"certificate", b"key")
    assert "key'" not in repr(found.tls)
    roots_only = {**BASE, "MEMSVC_TLS_ROOTS": files["MEMSVC_TLS_ROOTS"]}
    assert Connection.from_environment(roots_only).tls == TLS(b"roots")
    assert Connection.from_environment({**BASE, "MEMSVC_TLS_ROOTS": "system"}).tls == TLS()


@pytest.mark.parametrize("missing", ["MEMSVC_TLS_CLIENT_CERTIFICATE", "MEMSVC_TLS_CLIENT_KEY"])
def test_half_a_certificate_is_refused(files: dict[str, str], missing: str) -> None:
    with pytest.raises(ConfigurationError, match="go together"):
        Connection.from_environment(BASE | {k: v for k, v in files.items() if k != missing})


def test_a_file_that_is_not_there_is_named(files: dict[str, str]) -> None:
    with pytest.raises(ConfigurationError, match="/nowhere"):
        Connection.from_environment(BASE | files | {"MEMSVC_TLS_CLIENT_KEY": "/nowhere"})
