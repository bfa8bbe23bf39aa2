"""Archives on their way: what goes on where a cut left it, and what begins again.

A transfer has a request_id, under which the server keeps what is there of it for a while. An
export goes on behind the bytes that came. An import asks the server how many it has, by the
offset it starts with. What the server holds no longer begins again from the start.
"""

from __future__ import annotations

import asyncio
import io
import os
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator
from itertools import islice
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, BinaryIO

from memsvc.client.errors import OffsetNotAvailableError, PassphraseError, StreamBrokenError
from memsvc.client.transport import Deadline, Transport
from memsvc.client.types import ArchivePart
from memsvc.v1 import memory_service_pb2 as service

if TYPE_CHECKING:
    from memsvc.client.sealed import Sealer, Unsealer
    from memsvc.v1.memory_service_pb2_grpc import MemoryServiceAsyncStub

#: What a file under a passphrase begins with.
SEALED = b"msamem sealed v1"
#: Half of what one import message may carry.
PIECE_BYTES = 1 << 20
#: How often a transfer begins anew from its start before that is an error.
_RESTARTS = 3

OnBytes = Callable[[int, int], object]


async def download(
    transport: Transport,
    stub: MemoryServiceAsyncStub,
    request: service.ExportMemoryRequest,
    timeout_s: float | None,
) -> AsyncGenerator[ArchivePart, None]:
    """The archive from the request's offset on, over as many calls as it takes.

    Raises OffsetNotAvailableError when the server holds it no longer.
    """
    at, total = request.offset, 0

    def again() -> service.ExportMemoryRequest:
        later = service.ExportMemoryRequest()
        later.CopyFrom(request)
        later.offset = at
        return later

    stream = transport.stream(stub.ExportMemory, request, timeout_s=timeout_s, again=again)
    try:
        async for message in stream:
            total = message.total_bytes or total
            at += len(message.data)
            if message.data:
                yield ArchivePart(message.data, total)
    except OffsetNotAvailableError:
        # The server let go of it when it had sent all; the cut only took that away.
        if not total or at != total:
            raise
    finally:
        await stream.aclose()
    if at != total:
        raise StreamBrokenError("The archive ended before it was whole.")


class Target:
    """The file that an archive is written to, under a passphrase or as it is.

    arrived: bytes of the archive that are in it. What an earlier process left of an archive
    under a passphrase is begun anew: its key must not be used for another archive.
    """

    def __init__(self, file: BinaryIO, passphrase: str | None) -> None:
        self._file = file
        self._passphrase = passphrase
        self._sealer: Sealer | None = None
        self.arrived = file.seek(0, os.SEEK_END)
        if passphrase is not None:
            self.begin()

    def begin(self) -> None:
        """From the start, whatever was there."""
        self._file.seek(0)
        self._file.truncate()
        self.arrived = 0
        if self._passphrase is not None:
            self._sealer = _sealing().Sealer(self._passphrase)
            self._file.write(self._sealer.header)

    def write(self, data: bytes) -> None:
        """The next bytes of the archive."""
        self._file.write(data if self._sealer is None else self._sealer.update(data))
        self.arrived += len(data)

    def finish(self) -> int:
        """All of it is on disk; the file's bytes."""
        if self._sealer is not None:
            self._file.write(self._sealer.finish())
        self._file.flush()
        os.fsync(self._file.fileno())
        return self._file.tell()


def _sealing() -> ModuleType:
    # Late: only who uses a passphrase needs the cryptography library.
    from memsvc.client import sealed  # noqa: PLC0415

    return sealed


async def download_to(
    transport: Transport,
    stub: MemoryServiceAsyncStub,
    request: service.ExportMemoryRequest,
    target: Target,
    *,
    on_received: OnBytes | None,
    timeout_s: float | None,
) -> int:
    """Writes the archive behind what the target holds of it; returns the file's bytes, on disk."""
    deadline = Deadline(timeout_s)
    for attempt in range(_RESTARTS):
        request.offset = target.arrived
        try:
            async for part in download(transport, stub, request, deadline.remaining_s()):
                await asyncio.to_thread(target.write, part.data)
                if on_received is not None:
                    on_received(target.arrived, part.total_bytes)
        except OffsetNotAvailableError:
            if attempt == _RESTARTS - 1:
                raise
            await asyncio.to_thread(target.begin)
        else:
            break
    return await asyncio.to_thread(target.finish)


class Source:
    """An archive to be sent, from any offset on: a file or bytes, under a passphrase or not.

    A context manager that closes the file.
    """

    def __init__(self, source: Path | bytes, passphrase: str | None) -> None:
        self._source = source
        self._passphrase = passphrase
        self._file: BinaryIO | None = None
        self._unsealer: Unsealer | None = None
        self.size = 0

    async def open(self) -> None:
        """Raises OSError, PassphraseError, SealedArchiveError. Then `size` is known."""
        await asyncio.to_thread(self._open)

    def _open(self) -> None:
        source = self._source
        file = io.BytesIO(source) if isinstance(source, bytes) else source.open("rb")
        self._file = file
        begins, size = file.read(len(SEALED)), file.seek(0, os.SEEK_END)
        file.seek(0)
        self.size = size
        if self._passphrase is None and begins == SEALED:
            raise PassphraseError("The archive is under a passphrase.")
        if self._passphrase is not None:
            self._unsealer = _sealing().Unsealer(file, size, self._passphrase)
            self.size = self._unsealer.content_bytes

    def close(self) -> None:
        """Again is no error."""
        if self._file is not None:
            self._file.close()

    async def pieces(self, offset: int) -> AsyncGenerator[bytes, None]:
        """From there to the end."""
        pieces = self._pieces(offset)
        while piece := await asyncio.to_thread(next, pieces, b""):
            yield piece

    def _pieces(self, offset: int) -> Iterator[bytes]:
        assert self._file is not None
        if self._unsealer is None:
            self._file.seek(offset)
            while piece := self._file.read(PIECE_BYTES):
                yield piece
            return
        frames = self._unsealer.pieces(offset)
        most = -(-PIECE_BYTES // self._unsealer.frame_bytes)
        while piece := b"".join(islice(frames, most)):
            yield piece


class Upload:
    """One import, over as many calls as it takes.

    resume: an earlier process may have sent a part of it under the same request_id.
    """

    def __init__(
        self,
        header: service.ImportMemoryRequest.Header,
        source: Source,
        on_sent: Callable[[int], object] | None,
        *,
        resume: bool,
    ) -> None:
        self._header = header
        self._source = source
        self._on_sent = on_sent
        self._start = 0
        self._known = not resume

    async def run(
        self, transport: Transport, stub: MemoryServiceAsyncStub, timeout_s: float | None
    ) -> service.ImportMemoryResponse:
        """Raises what the last call raised."""
        size, deadline = self._source.size, Deadline(timeout_s)
        restarts = 0

        async def requests() -> AsyncIterator[service.ImportMemoryRequest]:
            # Later attempts ask with all of it: either that is there, or the server says what is.
            start, self._known = (self._start if self._known else size), False
            self._header.offset = start
            yield service.ImportMemoryRequest(header=self._header)
            async for piece in self._source.pieces(start):
                start += len(piece)
                if self._on_sent is not None:
                    self._on_sent(start)
                yield service.ImportMemoryRequest(data=piece)

        while True:
            try:
                return await transport.upload(
                    stub.ImportMemory, requests, timeout_s=deadline.remaining_s(), repeatable=True
                )
            except OffsetNotAvailableError as error:
                available = error.available
                if available <= self._start:
                    restarts += 1
                if restarts > _RESTARTS:
                    raise
                self._start, self._known = available, True
