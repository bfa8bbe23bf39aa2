"""Migrations with data, from every revision there has been to the newest one and back.

rows/NNNN.sql holds, in plain SQL, what is typical of revision NNNN: at a revision all files
up to it are run. A migration that adds a table or column comes with such a file.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Connection, MetaData, select
from sqlalchemy.exc import DBAPIError

from storage.catalog import Catalog, EncodingState, MemoryState, migrate
from storage.catalog.schema import head_revision, run_locked
from storage.catalog.tables import metadata
from tests.support.catalogs import downgrade, open_catalog, upgrade

ROWS = Path(__file__).parent / "rows"
REVISIONS = [f"{number:04}" for number in range(1, int(head_revision()) + 1)]

Row = Mapping[str, Any]
#: Rows of every table, in a steady order.
Dump = dict[str, list[Row]]

#: What migrations make of rows from before them: table, column, key, value. The first
#: revision at which the column is there, and the rows say themselves what it holds.
DERIVED: dict[str, list[tuple[str, str, Row, Any]]] = {
    "0002": [("api_keys", "memories", {"key_id": "k2"}, None)],
    "0003": [
        ("tenants", "default_model_id", {"uid": "t2"}, ""),
        ("memories", "default_model_id", {"uid": "m1"}, "fake"),
        ("memories", "next_model_id", {"uid": "m1"}, ""),
        ("memories", "own_model", {"uid": "m1"}, False),
        ("encodings", "complete", {"memory_uid": "m1", "model_id": "fake"}, True),
        ("encodings", "complete", {"memory_uid": "m1", "model_id": "second"}, False),
        ("encodings", "complete", {"memory_uid": "m4", "model_id": "fake"}, True),
    ],
    "0005": [
        ("audit", "sequence", {"at_us": 1040}, None),
        ("audit", "outcome", {"at_us": 1040}, ""),
    ],
    "0006": [("tenants", "deleting_us", {"uid": "t2"}, None)],
    "0007": [("memories", "retention_s", {"uid": "m1"}, None)],
    "0008": [
        # Of revision 3, which removed one, nothing is left.
        ("revisions", "documents_added", {"memory_uid": "m1", "revision": 1}, 2),
        ("revisions", "last_number", {"memory_uid": "m1", "revision": 2}, 4),
        ("revisions", "created_us", {"memory_uid": "m1", "revision": 4}, 1023),
        ("revisions", "documents_removed", {"memory_uid": "m3", "revision": 1}, 0),
    ],
    "0009": [
        ("memories", "forked_from", {"uid": "m1"}, None),
        ("memories", "forked_revision", {"uid": "m1"}, None),
    ],
    "0010": [("requests", "memory_uid", {"request_id": "r-1"}, "")],
    "0012": [("memories", "purged_us", {"uid": "m1"}, None)],
}


def statements(revision: str, *, sqlite: bool) -> list[str]:
    """The revision's file for one of the databases."""
    file = ROWS / f"{revision}.sql"
    if not file.exists():
        return []
    text = file.read_text().replace("AS BYTES)", "AS BLOB)" if sqlite else "AS BYTEA)")
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("--")]
    return [one for one in "\n".join(lines).split(";\n") if one.strip(" \n;")]


def fill(url: str, revision: str) -> None:
    """Runs the files of all revisions up to this one."""

    def run(connection: Connection) -> None:
        for number in REVISIONS[: REVISIONS.index(revision) + 1]:
            for one in statements(number, sqlite=connection.dialect.name == "sqlite"):
                connection.exec_driver_sql(one.rstrip(";\n"))

    run_locked(url, run)


def dump(url: str) -> Dump:
    """All rows, read by what the database says of its tables and not by this code's."""

    def read(connection: Connection) -> Dump:
        found = MetaData()
        found.reflect(connection)
        return {
            table.name: sorted(
                (dict(row._mapping) for row in connection.execute(select(table))), key=repr
            )
            for table in found.sorted_tables
            if table.name != "alembic_version"
        }

    return run_locked(url, read)


def at(url: str, revision: str) -> Dump:
    """Makes a database of a revision with its rows; what it then holds."""
    upgrade(url, revision)
    fill(url, revision)
    return dump(url)


def only(rows: list[Row], key: Row) -> Row:
    """The one row with these values."""
    [found] = [row for row in rows if all(row[name] == value for name, value in key.items())]
    return found


def narrowed(rows: list[Row], like: list[Row]) -> list[Row]:
    """The rows with no other columns than those of another revision."""
    if not like:
        return rows
    return sorted(({name: row[name] for name in like[0]} for row in rows), key=repr)


@pytest.mark.parametrize("revision", REVISIONS)
async def test_up_keeps_every_value_and_down_gives_it_back(empty_url: str, revision: str) -> None:
    before = await asyncio.to_thread(at, empty_url, revision)
    await asyncio.to_thread(migrate, empty_url)
    after = await asyncio.to_thread(dump, empty_url)
    for table, rows in before.items():
        assert narrowed(after[table], rows) == rows, table
    for later in REVISIONS[REVISIONS.index(revision) + 1 :]:
        for table, column, key, value in DERIVED.get(later, []):
            assert only(after[table], key)[column] == value, (table, column)
    async with open_catalog(empty_url) as catalog:
        await _check_read(catalog)
    await asyncio.to_thread(_refuse_changes_of_audit, empty_url)
    await asyncio.to_thread(downgrade, empty_url, revision)
    assert await asyncio.to_thread(dump, empty_url) == before


async def _check_read(catalog: Catalog) -> None:
    alice = await catalog.get_memory("t1", "alice")
    assert (alice.state, alice.labels) == (MemoryState.ACTIVE, {"team": "blue"})
    assert await catalog.live_numbers("m1", 1, 9) == [1, 3, 4, 5]
    assert await catalog.removed_numbers("m1") == [2]
    fake, second = await catalog.list_encodings("m1")
    assert (fake.state, fake.encoded_documents) == (EncodingState.ENCODING, 2)
    assert (second.state, second.failure) == (EncodingState.FAILED, "MODEL_MISMATCH")
    assert await catalog.quarantined("m1", "fake") == {4: "DOCUMENT_TOO_LONG"}
    assert [m.uid for m in await catalog.memories_in_state(MemoryState.DELETING)] == ["m3"]
    assert (await catalog.usage("t1")).encoded_tokens == 9_000_000_000
    request = await catalog.find_request("t1", "r-1")
    assert request is not None
    assert (request.fingerprint, request.reply) == (b"fingerprint", b"reply")
    key = await catalog.find_api_key("k1")
    assert key is not None
    assert (key.tenant_id, key.digest, key.operator) == ("acme", b"digest-1", True)


def _refuse_changes_of_audit(url: str) -> None:
    def change(connection: Connection) -> None:
        connection.exec_driver_sql("UPDATE audit SET actor = 'somebody else'")

    with pytest.raises(DBAPIError, match="only added to"):
        run_locked(url, change)


def test_each_step_down_leaves_what_the_older_can_hold(empty_url: str) -> None:
    newest = at(empty_url, REVISIONS[-1])
    for revision in reversed(REVISIONS[:-1]):
        downgrade(empty_url, revision)
        for table, rows in dump(empty_url).items():
            expected = newest[table]
            if table == "api_keys" and revision < "0002":
                # Without its list this key would reach every memory.
                expected = [row for row in expected if row["key_id"] != "k2"]
            if revision < "0012":
                expected = without_lineages(table, expected)
            assert rows == narrowed(expected, rows), (revision, table)
    migrate(empty_url)
    assert sorted(dump(empty_url)) == sorted(newest)


def without_lineages(table: str, rows: list[Row]) -> list[Row]:
    """Rows of a table where a fork has all its documents' rows, and no deleted memory has any."""
    if table == "memories":
        return [row for row in rows if row["uid"] != "m5"]
    if table != "documents":
        return rows
    shown = [row for row in rows if row["memory_uid"] == "m5" and row["number"] != 3]
    changes: Row = {"memory_uid": "m6", "revision_removed": None}
    written: list[Row] = [{**row, **changes} for row in shown]
    return sorted([row for row in rows if row["memory_uid"] != "m5"] + written, key=repr)


def test_the_rows_fill_every_column(empty_url: str) -> None:
    filled = at(empty_url, REVISIONS[-1])
    assert set(filled) == set(metadata.tables)
    empty = [
        f"{table.name}.{column.name}"
        for table in metadata.sorted_tables
        for column in table.columns
        if all(row[column.name] is None for row in filled[table.name])
    ]
    assert empty == [], "add tests/catalog/rows/NNNN.sql for the newest revision"


def test_every_file_of_rows_has_its_revision() -> None:
    assert {file.stem for file in ROWS.glob("*.sql")} <= set(REVISIONS)
