"""Every command against a real server."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from memsvc.cli.exits import ExitCode
from memsvc.cli.main import build
from tests.support.live import LiveServer, live_server, run_cli

EXAMPLES = Path(__file__).parents[2] / "examples"


class Shell:
    """Runs commands for one data folder."""

    def __init__(self, server: LiveServer) -> None:
        self.server = server

    def invoke(self, *arguments: str | Path, stdin: str | bytes = b"") -> Result:
        """In this process: starting one for every command would take most of the time."""
        words = [*map(str, arguments), "--data-dir", str(self.server.folder)]
        return CliRunner().invoke(build(words[0]), words, input=stdin)

    def run(
        self, *arguments: str | Path, stdin: str | bytes = b"", code: ExitCode = ExitCode.OK
    ) -> bytes:
        done = self.invoke(*arguments, stdin=stdin)
        assert done.exit_code == code, done.output + self.server.log_tail()
        return done.stdout_bytes

    def text(self, *arguments: str | Path, stdin: str | bytes = b"") -> str:
        return self.run(*arguments, stdin=stdin).decode()

    def lines(self, *arguments: str | Path, stdin: str | bytes = b"") -> list[Any]:
        out = self.run(*arguments, "--json", stdin=stdin).decode()
        return [json.loads(line) for line in out.splitlines()]

    def one(self, *arguments: str | Path, stdin: str | bytes = b"") -> Any:
        (value,) = self.lines(*arguments, stdin=stdin)
        return value

    def error(self, code: ExitCode, *arguments: str | Path, stdin: str | bytes = b"") -> Any:
        done = self.invoke(*arguments, "--json", stdin=stdin)
        assert done.exit_code == code, done.output
        assert done.stdout == ""
        return json.loads(done.stderr)["error"]


@pytest.fixture(scope="module")
def shell(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shell]:
    with live_server(tmp_path_factory.mktemp("cli") / "data") as server:
        yield Shell(server)


@pytest.fixture(scope="module")
def anna(shell: Shell) -> str:
    """A memory with the sample conversation in it."""
    shell.one("memory", "create", "anna", "--display-name", "Anna", "--label", "kind=test")
    shell.one("memory", "append", "anna", EXAMPLES / "conversation.jsonl")
    return "anna"


def test_init_keeps_the_key_privately_and_changes_nothing_the_second_time(shell: Shell) -> None:
    key = shell.server.folder / "operator.key"
    assert stat.S_IMODE(key.stat().st_mode) == 0o600
    assert stat.S_IMODE((shell.server.folder / "address").stat().st_mode) == 0o600
    # A folder that a server holds is left alone.
    shell.error(ExitCode.CONFIGURATION, "init")


def test_init_prints_the_key_once(tmp_path: Path) -> None:
    first = run_cli("init", "--data-dir", tmp_path / "d")
    assert first.stdout.decode().startswith("msk_")
    again = run_cli("init", "--data-dir", tmp_path / "d", "--json")
    assert json.loads(again.stdout)["api_key"] is None
    assert again.returncode == ExitCode.OK


def test_migrate(tmp_path: Path) -> None:
    run_cli("init", "--data-dir", tmp_path / "d")
    done = run_cli("migrate", "--data-dir", tmp_path / "d", "--json")
    assert json.loads(done.stdout)["changed"] is False
    missing = run_cli("migrate", "--data-dir", tmp_path / "none", "--json")
    assert missing.returncode == ExitCode.CONFIGURATION


def test_check_is_clean_beside_a_server(shell: Shell, anna: str) -> None:
    shell.text("memory", "watch", anna)
    assert shell.text("check") == "Everything is sound.\n"
    assert shell.lines("check")[-1]["damage"] == 0


def test_memory_list_and_show(shell: Shell, anna: str) -> None:
    assert anna in shell.text("memory", "list")
    listed = {memory["name"] for memory in shell.lines("memory", "list")}
    assert "memories/anna" in listed
    shown = shell.one("memory", "show", anna)
    assert (shown["display_name"], shown["labels"]) == ("Anna", {"kind": "test"})
    assert "kind=test" in shell.text("memory", "show", anna)


def test_memory_create_without_an_id(shell: Shell) -> None:
    name = shell.one("memory", "create", "--packing", "window", "--window-turns", "3")["name"]
    shown = shell.one("memory", "show", name)
    assert shown["packing"]["mode"] == "window"
    shell.text("memory", "delete", name)


def test_memory_update(shell: Shell, anna: str) -> None:
    changed = shell.one("memory", "update", anna, "--label", "kind=sample")
    assert changed["labels"] == {"kind": "sample"}
    stale = shell.error(
        ExitCode.CONFLICT, "memory", "update", anna, "--clear-labels", "--etag", "old"
    )
    assert stale["reason"] == "ETAG_MISMATCH"
    shell.run("memory", "update", anna, code=ExitCode.USAGE)


def test_append_from_stdin_text_and_option(shell: Shell) -> None:
    shell.text("memory", "create", "plain")
    piped = shell.one("memory", "append", "plain", "-", stdin="first line\nsecond line\n")
    assert (piped["turns"], len(piped["documents"])) == (2, 2)
    said = shell.text("memory", "append", "plain", "--text", "third", "--speaker", "Ada")
    assert said.startswith("Appended 1 turns")
    documents = shell.lines("document", "list", "plain", "--full")
    turns = [turn for document in documents for turn in document["source"]["turns"]]
    assert [turn["text"] for turn in turns] == ["first line", "second line", "third"]
    assert turns[2]["speaker"] == "Ada"


def test_append_sends_nothing_when_a_line_is_bad(shell: Shell) -> None:
    shell.text("memory", "create", "careful")
    bad = '{"text": "good"}\n{"role": "nobody", "text": "bad"}\n'
    done = shell.invoke("memory", "append", "careful", stdin=bad)
    assert done.exit_code == ExitCode.USAGE
    assert "line 2" in done.stderr
    assert shell.one("memory", "show", "careful")["document_count"] == 0


def test_put_files(shell: Shell, tmp_path: Path) -> None:
    shell.text("memory", "create", "notes")
    note = tmp_path / "tides.txt"
    note.write_text("High tide comes at noon.")
    written = shell.one("memory", "put", "notes", note, "-", stdin="Low tide at six.")
    assert len(written["documents"]) == 2
    first = shell.one("document", "get", "notes", "1")
    assert first["source"]["title"] == "tides.txt"
    assert "High tide" in shell.text("document", "get", "notes", "1")


def test_query_streams_answer_and_citations(shell: Shell, anna: str) -> None:
    question = "Who is the landlady of the workshop?"
    told = shell.text("memory", "query", anna, question)
    assert "Dona Graça" in told
    assert "[3] 2025-09-06 18:11" in told
    assert shell.text("memory", "query", anna, "-", stdin=question) == told
    events = shell.lines("memory", "query", anna, question, "--max-tokens", "8")
    kinds = [event["event"] for event in events]
    assert kinds[0] == "routing"
    assert kinds[-2:] == ["usage", "done"]


def test_retrieve(shell: Shell, anna: str) -> None:
    ranked = shell.lines("memory", "retrieve", anna, "landlady", "--limit", "1")
    assert [document["number"] for document in ranked] == [3]
    assert "Dona Graça" in shell.text("memory", "retrieve", anna, "landlady")


def test_watch_ends_when_all_is_encoded(shell: Shell, anna: str) -> None:
    last = shell.lines("memory", "watch", anna)[-1]
    assert last["encodings"][0]["state"] == "ready"
    assert last["encodings"][0]["encoded_documents"] == 68


def test_document_commands(shell: Shell) -> None:
    shell.text("memory", "create", "pages")
    shell.text("memory", "append", "pages", stdin="a\nb\nc\n")
    assert [d["number"] for d in shell.lines("document", "list", "pages")] == [1, 2, 3]
    assert shell.one("document", "delete", "pages", "1", "3")["revision"] == 2
    assert "b" in shell.text("document", "list", "pages")
    missing = shell.error(ExitCode.NOT_FOUND, "document", "get", "pages", "1")
    assert missing["reason"] == "DOCUMENT_NOT_FOUND"


def test_the_past(shell: Shell) -> None:
    shell.text("memory", "create", "past")
    for place in ("Graz", "Lisbon"):
        shell.text("memory", "append", "past", "--text", f"Anna lived in {place}")
    made = shell.lines("memory", "revisions", "past")
    assert [(one["revision"], one["documents_added"]) for one in made] == [(2, 1), (1, 1)]
    assert "Added" in shell.text("memory", "revisions", "past", "--limit", "1")
    for then in ("1", made[1]["create_time"]):
        listed = shell.lines("document", "list", "past", "--as-of", then)
        assert [document["number"] for document in listed] == [1]
        ranked = shell.lines("memory", "retrieve", "past", "Anna lived", "--as-of", then)
        assert [document["number"] for document in ranked] == [1]
    assert "Lisbon" not in shell.text("memory", "query", "past", "Anna lived?", "--as-of", "1")
    wrong = shell.invoke("memory", "query", "past", "Anna?", "--as-of", "yesterday")
    assert wrong.exit_code == ExitCode.USAGE
    ahead = shell.error(ExitCode.PRECONDITION, "document", "list", "past", "--as-of", "9")
    assert ahead["reason"] == "REVISION_NOT_REACHED"


def test_forking_and_going_back(shell: Shell) -> None:
    shell.text("memory", "create", "trunk")
    for place in ("Graz", "Lisbon", "Oslo"):
        shell.text("memory", "append", "trunk", "--text", f"Anna lived in {place}")
    shell.one("document", "delete", "trunk", "1")
    made = shell.one("memory", "fork", "trunk", "branch", "--as-of", "2")
    assert made["memory"]["document_count"] == 1 and made["documents_missing"] == 1
    assert "at 2" in shell.text("memory", "show", "branch")
    assert "1 of then" in shell.text("memory", "fork", "trunk", "--as-of", "2")
    back = shell.one("memory", "restore", "trunk", "--revision", "2")
    assert (back["documents_removed"], back["documents_missing"]) == (1, 1)
    assert "Deleted 0 documents" in shell.text("memory", "restore", "trunk", "--revision", "5")
    shell.text("memory", "delete", "trunk")
    assert [d["number"] for d in shell.lines("document", "list", "branch")] == [2]


def test_filters(shell: Shell) -> None:
    shell.text("memory", "create", "told")
    lines = [
        {"text": "Anna lived in Graz", "speaker": "Anna", "occurred_at": "2025-03-01T12:00:00Z"},
        {"text": "Bob lived in Oslo", "speaker": "Bob", "metadata": {"app": "mail", "mood": ""}},
        {"text": "Who lived where?", "role": "assistant", "metadata": {"app": "chat"}},
    ]
    shell.text("memory", "append", "told", stdin="\n".join(json.dumps(line) for line in lines))

    def found(*options: str) -> list[int]:
        listed = [d["number"] for d in shell.lines("document", "list", "told", *options)]
        ranked = shell.lines("memory", "retrieve", "told", "Who lived where?", *options)
        assert sorted(document["number"] for document in ranked) == listed
        return listed

    assert found("--speaker", "Anna", "--speaker", "Nobody") == [1]
    assert found("--role", "assistant") == [3]
    assert found("--occurred-from", "2025-01-01", "--occurred-before", "2026-01-01") == [1]
    assert found("--metadata", "app=mail", "--metadata", "app=chat") == [2, 3]
    assert found("--metadata", "app", "--metadata", "mood=") == [2]
    latest = ("retrieve", "told", "Where lived Anna?", "--prefer-latest", "--speaker", "Anna")
    assert [d["number"] for d in shell.lines("memory", *latest)] == [1]
    answered = shell.text("memory", "query", "told", "Who lived where?", "--speaker", "Bob")
    assert "Oslo" in answered and "Graz" not in answered
    assert "No document matches" in shell.text("document", "list", "told", "--role", "tool")
    refused = shell.error(ExitCode.INVALID, "document", "list", "told", "--speaker", "x" * 200)
    assert (refused["reason"], refused["field"]) == ("TEXT_TOO_LONG", "filter.speakers[0]")


def test_export_import_delete(shell: Shell, anna: str, tmp_path: Path) -> None:
    archive = tmp_path / "anna.archive"
    exported = shell.one("memory", "export", anna, archive)
    assert exported["bytes"] == archive.stat().st_size
    shell.run("memory", "export", anna, archive, code=ExitCode.USAGE)
    shell.text("memory", "export", anna, archive, "--force")
    made = shell.one("memory", "import", archive, "--id", "anna-again")
    assert made["memory"]["document_count"] == 68
    assert "Dona Graça" in shell.text("memory", "query", "anna-again", "Who is the landlady?")
    taken = shell.error(ExitCode.CONFLICT, "memory", "import", archive, "--id", "anna-again")
    assert taken["reason"] == "ALREADY_EXISTS"
    assert shell.text("memory", "delete", "anna-again") == "Deleted anna-again.\n"
    shell.error(ExitCode.NOT_FOUND, "memory", "delete", "anna-again")
    shell.text("memory", "delete", "anna-again", "--missing-ok")


def test_export_and_import_through_a_pipe(shell: Shell, anna: str) -> None:
    data = shell.run("memory", "export", anna, "-", "--without-blocks")
    made = shell.one("memory", "import", "-", "--id", "piped", stdin=data)
    assert made["memory"]["document_count"] == 68
    assert made["reused_blocks"] == 0
    cut = shell.error(ExitCode.INVALID, "memory", "import", "-", stdin=data[: len(data) // 2])
    assert cut["reason"] == "ARCHIVE_TRUNCATED"


def test_models(shell: Shell) -> None:
    assert shell.one("model", "list")["name"] == "models/fake"
    assert "serving" in shell.text("model", "list")


def test_models_of_a_memory(shell: Shell) -> None:
    shell.text("memory", "create", "modelled")
    shown = shell.one("memory", "show", "modelled")
    assert (shown["default_model"], shown["next_model"]) == ("models/fake", "")
    attached = shell.one("model", "attach", "modelled", "fake", "--default")
    assert attached["default_model"] == "models/fake"
    refused = shell.error(ExitCode.PRECONDITION, "model", "detach", "modelled", "fake")
    assert refused["reason"] == "MODEL_IN_USE"
    missing = shell.error(ExitCode.NOT_FOUND, "model", "attach", "modelled", "models/none")
    assert missing["reason"] == "MODEL_NOT_FOUND"
    assert "attached" in shell.text("model", "attach", "modelled", "fake")
    tenant = shell.one("admin", "tenant", "update", "default", "--default-model", "fake")
    assert tenant["default_model"] == "models/fake"
    tenant = shell.one("admin", "tenant", "update", "default", "--default-model", "")
    assert tenant["default_model"] == ""
    worker = shell.one("admin", "workers")
    assert (worker["state"], worker["model"], worker["device"]) == ("serving", "models/fake", "cpu")
    assert "serving" in shell.text("admin", "workers")


def test_admin(shell: Shell) -> None:
    shell.one("admin", "tenant", "create", "acme", "--display-name", "Acme")
    assert "acme" in shell.text("admin", "tenant", "list")
    made = shell.one("admin", "key", "create", "read", "--tenant", "acme")
    assert made["api_key"]["scope"] == "read"
    refused = run_cli(
        *("memory", "create", "x-memory", "--json", "--address", shell.server.address),
        extra={"MEMSVC_API_KEY": made["secret"]},
    )
    assert refused.returncode == ExitCode.PERMISSION_DENIED
    shell.text("admin", "key", "revoke", made["api_key"]["name"])
    assert shell.lines("admin", "key", "list", "--tenant", "acme")[0]["revoke_time"]
    gone = run_cli(
        *("memory", "list", "--address", shell.server.address),
        extra={"MEMSVC_API_KEY": made["secret"]},
    )
    assert gone.returncode == ExitCode.UNAUTHENTICATED
    assert shell.one("admin", "usage")["queries"] >= 0
    assert "text" in shell.text("admin", "usage", "--tenant", "acme")
    shell.text("admin", "tenant", "delete", "acme")


def test_keys_of_some_memories_are_made_and_rotated(shell: Shell) -> None:
    shell.one("memory", "create", "for-a-key")
    made = shell.one("admin", "key", "create", "read", "--memory", "for-a-key")
    assert made["api_key"]["memories"] == ["memories/for-a-key"]
    name = made["api_key"]["name"]
    rotated = shell.one("admin", "key", "rotate", name, "--grace-hours", "0")
    assert rotated["api_key"]["memories"] == ["memories/for-a-key"]
    assert rotated["previous"]["name"] == name
    assert rotated["secret"] != made["secret"]
    again = shell.error(ExitCode.PRECONDITION, "admin", "key", "rotate", name)
    assert again["reason"] == "API_KEY_NOT_ACTIVE"
    listed = shell.lines("admin", "key", "list")
    assert [key["operator"] for key in listed] == [False, False, True]


def test_exit_codes_of_common_failures(shell: Shell, tmp_path: Path) -> None:
    error = shell.error(ExitCode.NOT_FOUND, "memory", "show", "nowhere")
    assert error["reason"] == "MEMORY_NOT_FOUND"
    error = shell.error(ExitCode.INVALID, "memory", "create", "UPPER CASE")
    assert error["field"] == "memory_id"
    shell.run("memory", "append", "nowhere", tmp_path / "none", code=ExitCode.USAGE)
    shell.run("memory", "frobnicate", code=ExitCode.USAGE)
    nobody = run_cli("memory", "list", "--data-dir", tmp_path, "--json")
    assert nobody.returncode == ExitCode.CONFIGURATION


def test_no_server_is_its_own_exit_code(tmp_path: Path) -> None:
    (tmp_path / "operator.key").write_text("msk_0_0")
    done = run_cli("memory", "list", "--data-dir", tmp_path, "--address", "127.0.0.1:1", "--json")
    assert done.returncode == ExitCode.UNAVAILABLE


def test_no_progress_bar_in_a_pipe(shell: Shell, anna: str, tmp_path: Path) -> None:
    done = run_cli("memory", "export", anna, tmp_path / "a", "--data-dir", shell.server.folder)
    assert done.stderr == b""
    assert os.linesep.encode() in done.stdout


def test_serve_refuses_a_held_folder_and_an_unknown_setting(shell: Shell) -> None:
    error = shell.error(ExitCode.CONFIGURATION, "serve")
    assert "holds" in error["message"]
    shell.run("serve", "--set", "no_such=1", code=ExitCode.USAGE)
    error = shell.error(ExitCode.CONFIGURATION, "serve", "--set", "drain_grace_s=often")
    assert "drain_grace_s" in error["message"]
