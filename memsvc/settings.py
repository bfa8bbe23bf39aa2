"""How a setting is declared, read and checked; `memsvc.config` holds the settings themselves."""

from __future__ import annotations

import dataclasses
from dataclasses import field
from pathlib import Path
from typing import Any


class ConfigError(ValueError):
    """A setting is unknown, malformed or out of range. The message names it."""


def setting(
    default: Any,
    help_text: str,
    *,
    low: float | None = None,
    high: float | None = None,
    choices: tuple[str, ...] = (),
    secret: bool = False,
) -> Any:
    """A field of the settings; low and high are within the range, secret ones are never shown."""
    metadata = {"help": help_text, "low": low, "high": high, "choices": choices, "secret": secret}
    return field(default=default, metadata=metadata)


_TRUTH = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}


def parsed(declared: dataclasses.Field[Any], value: object) -> object:
    """The value in the setting's type. Raises ConfigError."""
    kind: type = type(declared.default)
    if isinstance(value, kind) and not (kind is int and isinstance(value, bool)):
        return value
    try:
        if kind is bool:
            return _TRUTH[str(value).lower()]
        if isinstance(value, bool) or not isinstance(value, str | int | float | Path):
            raise TypeError
        return kind(value)
    except (ValueError, TypeError, KeyError) as error:
        raise ConfigError(f"{declared.name}: {value!r} is not of type {kind.__name__}") from error


def check(declared: dataclasses.Field[Any], value: Any) -> None:
    """Raises ConfigError when the value is outside of its range or choices."""
    low, high = declared.metadata["low"], declared.metadata["high"]
    if low is not None and not value >= low:
        raise ConfigError(f"{declared.name}: {value} is below {low}")
    if high is not None and not value <= high:
        raise ConfigError(f"{declared.name}: {value} is above {high}")
    choices = declared.metadata["choices"]
    if choices and value not in choices:
        raise ConfigError(f"{declared.name}: {value!r} is none of {', '.join(choices)}")
