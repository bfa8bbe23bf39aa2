"""Keys rotated, receipts verified, deletions searched for: by commands, on real processes."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from memsvc.canaries import Search, forms, processes_of
from memsvc.cli.exits import ExitCode
from memsvc.cli.main import build
from memsvc.client import Turn
from tests.support.live import LiveServer, live_server

TEXT = "the heron canary 41d7 waits by the third lock"


def run(folder: Path, *arguments: str) -> tuple[int, list[Any]]:
    """Exit code, and the lines of JSON that a command prints."""
    command, *rest = arguments
    words = command.split()
    done = CliRunner().invoke(build(), [*words, "--data-dir", str(folder), "--json", *rest])
    return done.exit_code, [json.loads(line) for line in done.stdout.splitlines()]


def test_nothing_of_what_was_deleted_is_left(tmp_path: Path) -> None:
    """In no file, no log, and no memory of the server or its worker."""
    options = ("--set", "wipe_freed_memory=true")
    with live_server(tmp_path / "data", options=options) as server:
        # A connection keeps what it read last until it is closed: this one is.
        with server.client() as client:
            client.memories.create("herons")
            herons = client.memory("herons")
            herons.append([Turn("user", f"{TEXT}, number {n}") for n in range(12)])
            herons.ask("Where does the heron wait?")
            herons.ask("And which lock is it?")
        search = ["verify-deletion", "--canary", TEXT, "--log", str(server.log)]
        code, lines = run(server.folder, *search)
        assert code == ExitCode.FINDINGS
        assert {"process"} == {line["hit"]["where"].split()[0] for line in lines[:-1]}, "encrypted"
        with server.client() as client:
            client.memories.delete("herons")
        deadline = time.monotonic() + 10
        while code != ExitCode.OK and time.monotonic() < deadline:
            code, lines = run(server.folder, *search)
        assert (code, lines[-1]["hits"]) == (ExitCode.OK, 0), lines
        assert lines[-1]["searched"]["processes"] == 2
        assert lines[-1]["searched"]["files"] > 8
    check_receipt(server.folder)


def check_receipt(folder: Path) -> None:
    """Of the one deletion there was, without its server."""
    (tenant,) = (path for path in (folder / "receipts").iterdir() if path.is_dir())
    (receipt,) = tenant.iterdir()
    code, (found,) = run(folder, "verify-receipt", str(receipt))
    assert (code, found["genuine"], found["statement"]["texts"]) == (ExitCode.OK, True, 12)
    other = folder / "other.key"
    other.write_text("ab" * 32)
    code, (found,) = run(folder, "verify-receipt", str(receipt), "--public-key", str(other))
    assert (code, found["genuine"]) == (ExitCode.FINDINGS, False)


def test_keys_are_rotated_and_everything_still_opens(tmp_path: Path) -> None:
    server = LiveServer(tmp_path / "data")
    server.start()
    try:
        with server.client() as client:
            client.memories.create("herons")
            client.memory("herons").append([Turn("user", TEXT)])
        code, _ = run(server.folder, "keys rotate-root")
        assert code == ExitCode.CONFIGURATION, "a server holds the folder"
        server.stop()
        before = (server.folder / "root.key").read_text()
        (data,) = server.folder.glob("tenants/*/data.mdb")
        written = data.read_bytes()
        for command in ("keys rotate-root", "keys rotate-tenants", "keys rewrap"):
            assert run(server.folder, command) == (ExitCode.OK, [{"tenants": 1}])
        assert before not in (server.folder / "root.key").read_text()
        assert data.read_bytes() == written, "no data is written anew"
        server.start()
        with server.client() as client:
            document = client.memory("herons").documents.get(1)
            assert TEXT in str(document)
        server.stop()
        (server.folder / "root.key").write_text(before)
        server.spawn()
        assert server.process.wait(timeout=60) == ExitCode.CONFIGURATION, "the old key is worthless"
    finally:
        server.kill()


@pytest.mark.parametrize("canary", [TEXT, "Grüße an 世界 🌍", 'a "quoted" \\ text'])
def test_each_form_of_a_canary_is_found_wherever_it_lies(tmp_path: Path, canary: str) -> None:
    whole = forms(canary)
    for index, form in enumerate(whole):
        place = 16 * 2**20 - len(form) // 2
        with (tmp_path / f"file{index}").open("wb") as file:
            file.seek(place)  # Across two pieces.
            file.write(form + b"\0" * 100)
        hits = list(Search([canary]).file(tmp_path / f"file{index}"))
        assert [(hit.canary, hit.offset) for hit in hits] == [(0, place)]
    search = Search(["not there at all", canary])
    assert {hit.canary for hit in search.folder(tmp_path)} == {1}
    assert search.searched.files == len(whole)


def test_a_file_that_was_removed_is_found_in_the_map_of_it(tmp_path: Path) -> None:
    file = tmp_path / "removed"
    file.write_text(TEXT * 100)
    code = (
        "import mmap, os, sys; file = open(sys.argv[1], 'rb')\n"
        "held = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)\n"
        "os.unlink(sys.argv[1]); print('ready', flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, str(file)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as holder:
        assert holder.stdout is not None and holder.stdout.readline() == b"ready\n"
        hits = list(Search([TEXT]).process(holder.pid))
        holder.communicate()
    assert len(hits) == 100
    assert {hit.where for hit in hits} == {f"process {holder.pid} {file} (deleted)"}


def test_a_short_canary_is_refused(tmp_path: Path) -> None:
    tmp_path.joinpath("file").write_text("abc")
    assert run(tmp_path, "verify-deletion", "--canary", "abc")[0] == ExitCode.USAGE
    assert run(tmp_path, "verify-deletion")[0] == ExitCode.USAGE


def test_a_process_that_cannot_be_read_is_no_all_clear(tmp_path: Path) -> None:
    search = Search([TEXT])
    assert list(search.process(2**22 + 1)) == []
    assert search.searched.unreadable
    assert processes_of(tmp_path, tmp_path / "no.lock") == []
