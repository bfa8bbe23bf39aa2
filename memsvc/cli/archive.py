"""`memsvc memory export|import` and `memsvc verify-archive`."""

from __future__ import annotations

import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from memsvc.cli.content import FileArgument
from memsvc.cli.exits import ExitCode
from memsvc.cli.memory import MemoryArgument, memory_group
from memsvc.cli.output import size
from memsvc.cli.session import Session, command
from memsvc.client import ConfigurationError, PassphraseError, SealedArchiveError
from memsvc.client.archives import SEALED

if TYPE_CHECKING:
    from storage.archive import Archive

PassphraseFileOption = Annotated[
    Path | None,
    typer.Option(help="File whose first line is the archive's passphrase; else it is asked for."),
]
PublicKeyOption = Annotated[
    Path | None,
    typer.Option(help="Public key file (receipts/public.key of a server) that must have signed."),
]
RequestIdOption = Annotated[
    str, typer.Option(help="The same again, after an interruption, goes on where it was.")
]
EncryptOption = Annotated[
    bool, typer.Option("--encrypt", help="Encrypt by a passphrase, which stays on this machine.")
]


def passphrase_of(session: Session, file: Path | None, *, again: bool) -> str:
    """From the file, or asked for on a terminal. again: asked for twice, for a new one.

    Raises PassphraseError, ConfigurationError.
    """
    if file is not None:
        try:
            lines = file.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigurationError(f"Cannot read {file}: {error}") from error
        return lines[0] if lines else ""
    if not sys.stdin.isatty() or session.output.as_json:
        raise PassphraseError("A passphrase is needed: give --passphrase-file.")
    found: str = typer.prompt("Passphrase", hide_input=True, confirmation_prompt=again, err=True)
    return found


def public_key_of(path: Path | None) -> str:
    """64 hex digits; empty without a file. Raises ConfigurationError."""
    if path is None:
        return ""
    try:
        text = path.read_text().strip()
        if len(bytes.fromhex(text)) == 32:
            return text
    except (OSError, ValueError) as error:
        raise ConfigurationError(f"{path} holds no public key: {error}") from error
    raise ConfigurationError(f"{path} holds no public key: it must be 64 hex digits")


def _is_sealed(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(len(SEALED)) == SEALED


@command(memory_group, "export")
def export(
    session: Session,
    memory: MemoryArgument,
    file: Annotated[str, typer.Argument(metavar="FILE", help="A file, or - for stdout.")],
    *,
    without_blocks: Annotated[
        bool, typer.Option("--without-blocks", help="Leave the KV blocks out.")
    ] = False,
    sign: Annotated[bool, typer.Option("--sign", help="Have the server sign it.")] = False,
    encrypt: EncryptOption = False,
    passphrase_file: PassphraseFileOption = None,
    request_id: RequestIdOption = "",
    force: Annotated[bool, typer.Option("--force", help="Replace the file.")] = False,
) -> None:
    """Writes the memory as one archive. The file appears only when it is whole.

    A lost connection is taken up where it broke; with --request-id, so is a command that
    was interrupted. --passphrase-file implies --encrypt.
    """
    output = session.output
    target = Path(file)
    sealed = encrypt or passphrase_file is not None
    if file == "-" and (output.as_json or sealed):
        raise typer.BadParameter("stdout takes neither JSON beside an archive nor an encrypted one")
    if file != "-" and target.exists() and not force:
        raise typer.BadParameter(f"{file} exists; --force replaces it", param_hint="FILE")
    passphrase = passphrase_of(session, passphrase_file, again=True) if sealed else None
    with session.client() as client, output.progress("Exporting", None) as bar:
        handle = client.memory(memory)
        if file == "-":
            at = 0
            for part in handle.export(without_blocks=without_blocks, signed=sign):
                sys.stdout.buffer.write(part.data)
                at += len(part.data)
                bar.at(at, part.total_bytes)
            sys.stdout.buffer.flush()
            return
        written = handle.export_to(
            target,
            without_blocks=without_blocks,
            signed=sign,
            passphrase=passphrase,
            request_id=request_id,
            on_received=bar.at,
        )
    output.result({"file": file, "bytes": written}, f"Exported {size(written)} to {file}.")


@command(memory_group, "import")
def import_memory(
    session: Session,
    file: FileArgument,
    *,
    memory: Annotated[str, typer.Option("--id", help="Id of the new memory.")] = "",
    display_name: Annotated[str, typer.Option(help="Else the archive's own.")] = "",
    public_key: PublicKeyOption = None,
    passphrase_file: PassphraseFileOption = None,
    request_id: RequestIdOption = "",
) -> None:
    """Makes a new memory from an archive. A passphrase is asked for where there is one."""
    signed_by = public_key_of(public_key)
    with _archive(file) as path:
        sealed = passphrase_file is not None or _is_sealed(path)
        passphrase = passphrase_of(session, passphrase_file, again=False) if sealed else None
        total = path.stat().st_size
        with session.client() as client, session.output.progress("Importing", total) as bar:
            made = client.memories.import_archive(
                path,
                memory_id=memory,
                display_name=display_name,
                passphrase=passphrase,
                signed_by=signed_by,
                request_id=request_id,
                on_sent=bar.at,
            )
    session.output.result(
        made,
        f"Imported {made.memory.name}: {made.memory.document_count} documents, "
        f"{made.reused_blocks} blocks taken over, {made.documents_to_encode} to encode.",
    )


@contextmanager
def _archive(file: str) -> Iterator[Path]:
    if file != "-":
        if not Path(file).is_file():
            raise typer.BadParameter(f"no such file: {file}", param_hint="FILE")
        yield Path(file)
        return
    # A retry must be able to read it again.
    with tempfile.NamedTemporaryFile(prefix="memsvc-import-") as staged:
        shutil.copyfileobj(sys.stdin.buffer, staged)
        staged.flush()
        yield Path(staged.name)


def _verify_archive(
    session: Session,
    file: Annotated[Path, typer.Argument(help="An archive.", exists=True, dir_okay=False)],
    public_key: PublicKeyOption = None,
    passphrase_file: PassphraseFileOption = None,
) -> None:
    """Verifies every checksum and record of an archive, and its signature. Imports nothing.

    Needs no server. Without --public-key a signature is only said to be there: anybody can
    sign. Ends with 13 when something is wrong.
    """
    # Late: they take longer to load than a client's whole command takes.
    from memsvc.client.sealed import UnsealedFile  # noqa: PLC0415
    from storage.archive import ArchiveError, open_archive  # noqa: PLC0415

    signer = public_key_of(public_key)
    sealed = passphrase_file is not None or _is_sealed(file)
    passphrase = passphrase_of(session, passphrase_file, again=False) if sealed else None
    try:
        with file.open("rb") as opened, session.output.progress("Verifying", None):
            source = opened if passphrase is None else UnsealedFile(opened, passphrase)
            with open_archive(source) as archive:
                if signer:
                    archive.check_signer(signer)
                told = _told(archive, sealed=sealed, trusted=bool(signer))
    except (ArchiveError, SealedArchiveError) as error:
        kind = type(error).__name__
        session.output.result(
            {"sound": False, "kind": kind, "problem": str(error)}, f"Not sound: {error}."
        )
        raise typer.Exit(ExitCode.FINDINGS) from error
    lines = [f"{name}: {value}" for name, value in told.items()]
    session.output.result({"sound": True, **told}, "\n".join(["Sound.", *lines]))


def _told(archive: Archive, *, sealed: bool, trusted: bool) -> dict[str, object]:
    manifest = archive.manifest
    return {
        "display_name": manifest.display_name,
        "revision": manifest.revision,
        "revisions": manifest.revisions,
        "documents": manifest.documents,
        "blocks": {one.model_id: one.blocks for one in manifest.encodings},
        "encrypted": sealed,
        "signed_by": archive.signature.public_key if archive.signature else None,
        "signer_trusted": trusted,
    }


def register(app: typer.Typer) -> None:
    """Adds the commands of this module to the root."""
    command(app, "verify-archive", local=True)(_verify_archive)
