"""What every command shares: its common options, where to connect, and how it fails.

Address and key are looked for, first match wins:
    1. options:      --address, --api-key-file; files in the folder of --data-dir
    2. environment:  MEMSVC_ADDRESS, MEMSVC_API_KEY, MEMSVC_TLS_*; files in MEMSVC_DATA
    3. files in ./memsvc-data, which `memsvc init` and `memsvc serve` wrote
"""

from __future__ import annotations

import functools
import inspect
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Concatenate, ParamSpec, get_type_hints

import typer

from memsvc.cli.exits import ExitCode, exit_code
from memsvc.cli.output import Output
from memsvc.client import Client, ConfigurationError, MemsvcError
from memsvc.client.connection import TLS, Connection
from memsvc.config import ENV_PREFIX, Config, load_config
from memsvc.settings import ConfigError

Parameters = ParamSpec("Parameters")

#: Kept by `memsvc init`, mode 0600.
KEY_FILE = "operator.key"
#: Kept by `memsvc serve` while it runs.
ADDRESS_FILE = "address"

DataDirOption = Annotated[
    Path | None,
    typer.Option("--data-dir", help="Data folder.  [default: memsvc-data, or MEMSVC_DATA]"),
]
AddressOption = Annotated[
    str | None, typer.Option("--address", help="Server to talk to: host:port or unix:/PATH.")
]
KeyFileOption = Annotated[
    Path | None, typer.Option("--api-key-file", help="File that holds the API key.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON and nothing else.")]


@dataclass(frozen=True)
class Session:
    """One command's surroundings. Nothing is read before it is asked for."""

    output: Output
    environment: Mapping[str, str]
    data_dir: Path | None = None
    address: str | None = None
    api_key_file: Path | None = None

    @property
    def folder(self) -> Path:
        """The data folder, which need not exist."""
        named = self.environment.get(f"{ENV_PREFIX}DATA")
        return self.data_dir or (Path(named) if named else Path("memsvc-data"))

    def config(self, file: Path | None = None, **settings: object) -> Config:
        """The server's settings, with this session's data folder."""
        try:
            return load_config({"data": self.data_dir, **settings}, self.environment, file)
        except ConfigError as error:
            raise ConfigurationError(str(error)) from error

    def connection(self) -> Connection:
        """Where to connect. Raises ConfigurationError, saying what is missing."""
        address = self.address or self._found("MEMSVC_ADDRESS", ADDRESS_FILE) or Config().listen
        if self.api_key_file:
            key = _read(self.api_key_file) or ""
        else:
            key = self._found("MEMSVC_API_KEY", KEY_FILE) or ""
        if not key:
            raise ConfigurationError(
                "No API key: set MEMSVC_API_KEY, give --api-key-file, or run `memsvc init` "
                f"for the data folder {self.folder}."
            )
        return Connection(address, key, TLS.from_environment(self.environment))

    def client(self) -> Client:
        """A client to be used as a context manager."""
        found = self.connection()
        return Client(found.address, found.api_key, tls=found.tls)

    def _found(self, variable: str, file: str) -> str | None:
        local = _read(self.folder / file)
        if self.data_dir and local:
            return local
        return self.environment.get(variable) or local


def _read(path: Path) -> str | None:
    try:
        return path.read_text().strip()
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"Cannot read {path}: {error}") from error


def command(
    group: typer.Typer, name: str, *, local: bool = False, **settings: Any
) -> Callable[[Callable[Concatenate[Session, Parameters], None]], None]:
    """Registers a function as a command.

    Its first parameter is the Session, made of the options that every command
    takes; local ones talk to no server. MemsvcError ends with its exit code.
    """
    options: dict[str, Any] = {"data_dir": DataDirOption}
    if not local:
        options |= {"address": AddressOption, "api_key_file": KeyFileOption}
    options["as_json"] = JsonOption

    def register(function: Callable[Concatenate[Session, Parameters], None]) -> None:
        @functools.wraps(function)
        def run(**given: Any) -> None:
            common = {key: given.pop(key) for key in options}
            output = Output(as_json=common.pop("as_json"))
            _guarded(functools.partial(function, **given), Session(output, os.environ, **common))

        hints = get_type_hints(function, include_extras=True)
        own = list(inspect.signature(function).parameters.values())[1:]
        parameters = [p.replace(annotation=hints[p.name], kind=p.KEYWORD_ONLY) for p in own]
        for key, hint in options.items():
            default = False if key == "as_json" else None
            parameters.append(
                inspect.Parameter(
                    key, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=hint
                )
            )
        # Typer reads a command's options from these two.
        run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]  # functions take it
        run.__annotations__ = {p.name: p.annotation for p in parameters}
        del run.__wrapped__
        group.command(name, **settings)(run)

    return register


def _guarded(work: Callable[[Session], None], session: Session) -> None:
    try:
        work(session)
    except MemsvcError as error:
        session.output.failure(error)
        raise typer.Exit(exit_code(error)) from error
    except KeyboardInterrupt as error:
        raise typer.Exit(ExitCode.INTERRUPTED) from error
    except BrokenPipeError as error:
        # Whoever read our output has seen enough. Python would complain at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        raise typer.Exit(ExitCode.OK) from error
