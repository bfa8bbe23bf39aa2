"""A server takes a tenant over whose deletion another one could not finish; both use one worker."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AsyncExitStack
from dataclasses import replace
from pathlib import Path

import pytest

from memsvc.config import Config, load_config
from memsvc.server import initialise
from tests.service_worker.test_owed import QUESTION, TEXTS, deletion, filled, in_store, ranked
from tests.support.answers import Asking, worker_apart
from tests.support.bad_disk import full_disk
from tests.support.postgres import PostgresForTests, postgres
from tests.support.served import refused, serve

__all__ = ["postgres"]


@pytest.fixture
def prepared(postgres: PostgresForTests, tmp_path: Path) -> Iterator[tuple[Config, str]]:
    """Settings without a worker's address, and the operator's credential."""
    name = postgres.make_database()
    config = load_config(
        {
            "data": tmp_path / "data",
            "listen": "127.0.0.1:0",
            "database_url": postgres.url(name),
            "lease_s": 600.0,
        }
    )
    credential = initialise(config).credential
    assert credential is not None
    yield config, credential
    postgres.drop_database(name)


async def test_what_is_owed_is_purged_before_anything_is_served(
    prepared: tuple[Config, str], tmp_path: Path
) -> None:
    config, credential = prepared
    async with (
        worker_apart(tmp_path / "data", tmp_path / "w") as worker,
        AsyncExitStack() as stack,
    ):
        config = replace(config, worker_address=worker.address)
        async with serve(config, credential) as running:
            first = Asking(running.server, running.channel, running.as_operator)
            memory = await filled(first)
            other = await stack.enter_async_context(serve(config, credential))
            second = Asking(other.server, other.channel, other.as_operator)
            with full_disk():
                found = await refused(deletion(first, memory, 2, request_id="r1"))
                assert found.reason == "DELETION_UNFINISHED"
            # Now the worker holds what is masked.
            assert await ranked(first, memory) == {1, 3, 4}
        answer = await second.ask(memory, QUESTION)
        assert answer.usage is not None and answer.usage.routed_documents == 3
        assert "7731" not in answer.text
        assert await in_store(second, memory) == [1, 3, 4]
        assert await second.texts(memory) == [TEXTS[0], *TEXTS[2:]]
        assert (await deletion(second, memory, 2, request_id="r1")).revision == 2
