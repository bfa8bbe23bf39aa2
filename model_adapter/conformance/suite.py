"""All checks, in the order in which a broken worker is best understood."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Awaitable, Callable

from grpc import aio

from model_adapter.conformance import answers, blocks, refusals, routing
from model_adapter.conformance.harness import Harness, error_info
from model_adapter.conformance.report import ContractError, Result, SkippedError

Check = Callable[[Harness], Awaitable[None]]

CHECKS: tuple[tuple[str, Check], ...] = (
    ("info", blocks.info),
    ("encode: every document", blocks.every_document),
    ("encode: same text, same block", blocks.same_text),
    ("encode: another text, another block", blocks.another_text),
    ("identity", refusals.identity),
    ("limits: long document", refusals.long_document),
    ("limits: long question", refusals.long_question),
    ("malformed requests", refusals.malformed),
    ("route: ranking", routing.ranking),
    ("route: relevance", routing.relevance),
    ("route: snapshot", routing.snapshot),
    ("route: filters", routing.filters),
    ("route: deletion", routing.deletion),
    ("route: removed", routing.removed),
    ("evict", routing.eviction),
    ("tenants", routing.tenants),
    ("query: events", answers.events),
    ("query: limits", answers.limits),
    ("query: empty memory", answers.empty),
    ("query: repeatable", answers.repeatable),
    ("cancel: query", answers.cancelled_query),
    ("cancel: encode", answers.cancelled_encode),
)


async def run(harness: Harness, only: str = "") -> AsyncIterator[Result]:
    """Results as they come. only: checks whose name begins so."""
    for name, check in CHECKS:
        if not name.startswith(only):
            continue
        began = time.monotonic()
        outcome, detail = "failed", ""
        try:
            await check(harness)
            outcome = "passed"
        except SkippedError as skipped:
            outcome, detail = "skipped", str(skipped)
        except ContractError as broken:
            detail = str(broken)
        except aio.AioRpcError as error:
            info = error_info(error)
            reason = info.reason if info is not None else "no ErrorInfo"
            detail = f"a call failed with {error.code().name} ({reason})"
        yield Result(name, outcome, detail, round(time.monotonic() - began, 3))
