"""Archives with passphrases and signatures, and dumps of other services, from the command line."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from memsvc.cli.exits import ExitCode
from tests.cli.test_commands import EXAMPLES, Shell
from tests.support.dumps import CLAUDE, MEM0, encoded
from tests.support.live import live_server


@pytest.fixture(scope="module")
def shell(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shell]:
    with live_server(tmp_path_factory.mktemp("moving") / "data") as server:
        yield Shell(server)


@pytest.fixture(scope="module")
def anna(shell: Shell) -> str:
    """A memory with the sample conversation in it."""
    shell.one("memory", "create", "anna")
    shell.one("memory", "append", "anna", EXAMPLES / "conversation.jsonl")
    return "anna"


def test_encrypted_signed_verified_and_imported(shell: Shell, anna: str, tmp_path: Path) -> None:
    passphrase = tmp_path / "passphrase"
    passphrase.write_text("four herons stand still\nthis line is not part of it\n")
    path, key = tmp_path / "anna.msamem", shell.server.folder / "receipts" / "public.key"
    opened = ("--passphrase-file", passphrase)
    exported = shell.one("memory", "export", anna, path, "--sign", *opened)
    assert exported["bytes"] == path.stat().st_size
    assert path.read_bytes().startswith(b"msamem sealed v1")
    told = shell.one("verify-archive", path, "--public-key", key, *opened)
    assert told["sound"] and told["encrypted"] and told["signer_trusted"]
    assert told["signed_by"] == key.read_text().strip()
    documents = len(shell.lines("document", "list", anna))
    assert told["documents"] == documents > 0
    made = shell.one("memory", "import", path, "--public-key", key, *opened)
    assert made["memory"]["document_count"] == documents
    wrong = tmp_path / "wrong"
    wrong.write_text("three herons")
    for command in ("verify-archive",), ("memory", "import"):
        found = shell.error(ExitCode.CONFIGURATION, *command, path, "--passphrase-file", wrong)
        assert found["kind"] == "PassphraseError"
        # Without a terminal nobody can be asked.
        found = shell.error(ExitCode.CONFIGURATION, *command, path)
        assert "--passphrase-file" in found["message"]


def unsound(shell: Shell, *arguments: str | Path) -> Any:
    out = shell.run("verify-archive", *arguments, "--json", code=ExitCode.FINDINGS)
    told = json.loads(out)
    assert told["sound"] is False
    return told


def test_what_is_wrong_with_an_archive_is_told(shell: Shell, anna: str, tmp_path: Path) -> None:
    path, key = tmp_path / "anna.msamem", shell.server.folder / "receipts" / "public.key"
    shell.one("memory", "export", anna, path, "--request-id", "monday")
    assert shell.one("verify-archive", path)["signed_by"] is None
    found = unsound(shell, path, "--public-key", key)
    assert found["kind"] == "ArchiveSignatureError"
    found = shell.error(ExitCode.INVALID, "memory", "import", path, "--public-key", key)
    assert found["reason"] == "ARCHIVE_SIGNATURE_INVALID"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    assert unsound(shell, path)["kind"].startswith("Archive")
    path.write_text("no key")
    shell.error(ExitCode.CONFIGURATION, "memory", "import", path, "--public-key", path)
    shell.run("verify-archive", tmp_path / "none", code=ExitCode.USAGE)
    shell.run("memory", "export", anna, "-", "--encrypt", code=ExitCode.USAGE)


def test_dumps_of_other_services(shell: Shell, tmp_path: Path) -> None:
    path = tmp_path / "dump.json"
    path.write_bytes(encoded(CLAUDE))
    dry = shell.one("import-from", "claude", path, "--dry-run")
    assert (dry["memory"], dry["turns"], dry["texts"]) == (None, 2, 0)
    made = shell.one("import-from", "claude", path)
    assert made["revision"] == 1 and len(made["documents"]) == 2
    # Again into the same memory it is the same import, not a second one.
    again = shell.one("import-from", "claude", path, "--memory", made["memory"])
    assert (again["revision"], again["documents"]) == (1, made["documents"])
    path.write_bytes(encoded(MEM0))
    more = shell.one("import-from", "mem0", path, "--memory", made["memory"])
    assert more["revision"] == 2 and len(more["documents"]) == 2
    path.write_bytes(encoded(CLAUDE).replace(b"human", b"robot"))
    found = shell.error(ExitCode.INVALID, "import-from", "claude", path)
    assert found["message"].startswith("[0].chat_messages[0].sender")
    shell.error(ExitCode.CONFIGURATION, "import-from", "diary", path)
    shell.error(ExitCode.CONFIGURATION, "import-from", "claude", tmp_path / "none")
