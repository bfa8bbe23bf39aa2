"""What memsvc.client promises: its names, and that it stays light."""

from __future__ import annotations

import subprocess
import sys

import memsvc.client
from memsvc.client import errors

EXPORTED = {
    "AlreadyExistsError",
    "Answer",
    "ApiError",
    "ApiKey",
    "ArchiveInvalidError",
    "ArchivePart",
    "AsyncClient",
    "AsyncMemoryHandle",
    "AuditEvent",
    "CallCancelledError",
    "Citation",
    "Client",
    "ConfigurationError",
    "Connection",
    "Conversation",
    "CreatedApiKey",
    "DataLossError",
    "DeadlineExceededError",
    "DeletionReceipt",
    "Document",
    "Done",
    "DoneReason",
    "Encoding",
    "EncodingState",
    "EtagMismatchError",
    "FailedPreconditionError",
    "Filter",
    "Forked",
    "Generation",
    "ImportFormatError",
    "Imported",
    "InternalError",
    "InvalidArgumentError",
    "KVLayout",
    "LayerScore",
    "MemoryHandle",
    "Memory",
    "MemoryState",
    "MemsvcError",
    "Model",
    "ModelState",
    "NO_RETRIES",
    "NotFoundError",
    "OffsetNotAvailableError",
    "Packing",
    "PackingMode",
    "Page",
    "PassphraseError",
    "PermissionDeniedError",
    "Progress",
    "QueryEvent",
    "RankedDocument",
    "RequestIdReusedError",
    "ResourceExhaustedError",
    "Restored",
    "Retrieved",
    "Revision",
    "RetryPolicy",
    "Role",
    "RotatedApiKey",
    "Routing",
    "Scope",
    "SealedArchiveError",
    "StreamBrokenError",
    "TLS",
    "Tenant",
    "TenantUsage",
    "TextDelta",
    "TextSource",
    "Turn",
    "UnauthenticatedError",
    "UnavailableError",
    "Usage",
    "Worker",
    "WorkerState",
    "Written",
}


def test_exported_names_are_frozen() -> None:
    assert set(memsvc.client.__all__) == EXPORTED
    for name in EXPORTED:
        assert hasattr(memsvc.client, name), name


def test_it_pulls_in_nothing_heavy() -> None:
    code = (
        "import sys, memsvc.client;"
        "heavy = {'torch', 'sqlalchemy', 'lmdb', 'numpy', 'storage', 'model_adapter', 'rich'};"
        "print(sorted(heavy & {name.partition('.')[0] for name in sys.modules}))"
    )
    found = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True
    ).stdout.strip()
    assert found == "[]"


def test_the_printed_tree_is_the_real_one() -> None:
    lines = (errors.__doc__ or "").splitlines()
    printed: list[tuple[str, str]] = []
    stack: list[tuple[int, str]] = []
    for line in lines:
        word = line.lstrip(" │├└─")
        if not word.split(" ")[0].endswith("Error") or line == word:
            continue
        depth, name = len(line) - len(word), word.split(" ")[0]
        while stack and stack[-1][0] >= depth:
            stack.pop()
        printed.append((name, stack[-1][1] if stack else "Exception"))
        stack.append((depth, name))
    real = [
        (name, value.__base__.__name__)
        for name, value in vars(errors).items()
        if isinstance(value, type) and issubclass(value, errors.MemsvcError) and value.__base__
    ]
    assert sorted(printed) == sorted(real)
