"""Exit codes, for scripts. docs/cli.md explains them; their numbers do not change."""

from __future__ import annotations

from enum import IntEnum

from memsvc.client import errors


class ExitCode(IntEnum):
    """What a command ends with."""

    OK = 0
    #: Anything that has no code of its own.
    FAILED = 1
    #: Wrong options or arguments.
    USAGE = 2
    NOT_FOUND = 3
    #: The server refused a value; the message names the field.
    INVALID = 4
    UNAUTHENTICATED = 5
    PERMISSION_DENIED = 6
    #: The name is taken, or an etag is stale.
    CONFLICT = 7
    #: The state of the memory or archive does not allow it.
    PRECONDITION = 8
    EXHAUSTED = 9
    #: No server, or no worker; trying later may help.
    UNAVAILABLE = 10
    DEADLINE = 11
    DATA_LOSS = 12
    #: `memsvc check` found damage.
    FINDINGS = 13
    #: The server, the worker or this command is not configured so that it could start.
    CONFIGURATION = 14
    INTERRUPTED = 130


_OF_ERROR: tuple[tuple[type[errors.MemsvcError], ExitCode], ...] = (
    (errors.NotFoundError, ExitCode.NOT_FOUND),
    (errors.InvalidArgumentError, ExitCode.INVALID),
    (errors.UnauthenticatedError, ExitCode.UNAUTHENTICATED),
    (errors.PermissionDeniedError, ExitCode.PERMISSION_DENIED),
    (errors.AlreadyExistsError, ExitCode.CONFLICT),
    (errors.EtagMismatchError, ExitCode.CONFLICT),
    (errors.FailedPreconditionError, ExitCode.PRECONDITION),
    (errors.ResourceExhaustedError, ExitCode.EXHAUSTED),
    (errors.UnavailableError, ExitCode.UNAVAILABLE),
    (errors.StreamBrokenError, ExitCode.UNAVAILABLE),
    (errors.DeadlineExceededError, ExitCode.DEADLINE),
    (errors.DataLossError, ExitCode.DATA_LOSS),
    (errors.ConfigurationError, ExitCode.CONFIGURATION),
    (errors.PassphraseError, ExitCode.CONFIGURATION),
    (errors.SealedArchiveError, ExitCode.INVALID),
    (errors.ImportFormatError, ExitCode.INVALID),
)


def exit_code(error: errors.MemsvcError) -> ExitCode:
    """The exit code of a failed call."""
    return next((code for kind, code in _OF_ERROR if isinstance(error, kind)), ExitCode.FAILED)
