"""Archives under a passphrase: encrypted and decrypted here, where the passphrase is known.

The server never sees it (docs/adr/0015). The layout is drawn in docs/format/archive.md: a header
of 72 bytes, then frames of AES-256-GCM, each under a counter that also says whether it is the
last one, so that frames which are missing, moved, doubled or added are noticed. The key is made
from the passphrase by scrypt with a salt of the file's own; no key is ever used for two files.
Memory stays at one frame, besides the 128 MiB that scrypt takes for a moment.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
import struct
import unicodedata
from collections.abc import Iterator
from typing import BinaryIO, NamedTuple, Protocol

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.scrypt import Scrypt

from memsvc.client.archives import SEALED
from memsvc.client.errors import PassphraseError, SealedArchiveError

#: Bytes of a frame's content; the last one's may be fewer.
FRAME_BYTES = 64 << 10
_TAG_BYTES = 16
_SALT_BYTES = 16
_KEY_BYTES = 32
_CHECK_BYTES = 32
#: Key derivation, its parameters, bytes of a frame, salt.
_PARAMETERS = struct.Struct(f">BBBBI{_SALT_BYTES}s")
_SCRYPT = 1
_HEAD_BYTES = len(SEALED) + _PARAMETERS.size
HEADER_BYTES = _HEAD_BYTES + _CHECK_BYTES
_COUNTER = struct.Struct(">3xQB")
#: What a header may ask of a reader: memory of scrypt in bytes, its passes, bytes of a frame.
_MAX_SCRYPT_BYTES, _MAX_PASSES, _MAX_FRAME = 1 << 30, 4, 16 << 20


class Cost(NamedTuple):
    """scrypt's parameters: N is 2**log_n; it takes 128 * r * N bytes, p times over."""

    log_n: int = 17
    r: int = 8
    p: int = 1


class Readable(Protocol):
    """What a sealed archive is read from."""

    def read(self, size: int = -1, /) -> bytes:
        """Fewer bytes than `size` at the end only."""
        ...

    def seek(self, offset: int, whence: int = 0, /) -> int:
        """As of a file."""
        ...


def _derived(passphrase: str, salt: bytes, cost: Cost) -> tuple[AESGCM, bytes]:
    """The cipher of the frames, and the key of the header's check."""
    # Keyboards differ in how they compose letters; a passphrase must not.
    text = unicodedata.normalize("NFC", passphrase).encode()
    scrypt = Scrypt(salt=salt, length=2 * _KEY_BYTES, n=1 << cost.log_n, r=cost.r, p=cost.p)
    both = scrypt.derive(text)
    return AESGCM(both[:_KEY_BYTES]), both[_KEY_BYTES:]


def _check(key: bytes, head: bytes) -> bytes:
    return hmac.new(key, head, hashlib.sha256).digest()


class Sealer:
    """Seals one archive, piece by piece: `update` for each, `finish` once.

    cost: for tests; the default takes a third of a second. Blocks.
    """

    def __init__(self, passphrase: str, cost: Cost | None = None) -> None:
        if not passphrase:
            raise PassphraseError("A passphrase must not be empty.")
        cost = cost or Cost()
        salt = secrets.token_bytes(_SALT_BYTES)
        head = SEALED + _PARAMETERS.pack(_SCRYPT, *cost, FRAME_BYTES, salt)
        self._cipher, key = _derived(passphrase, salt, cost)
        self._pending = bytearray()
        self._frame = 0
        #: What the file begins with.
        self.header = head + _check(key, head)

    def update(self, data: bytes) -> bytes:
        """The frames that are full with it. One is held back: it may be the last."""
        self._pending += data
        sealed: list[bytes] = []
        at = 0
        while len(self._pending) - at > FRAME_BYTES:
            sealed.append(self._seal(bytes(self._pending[at : at + FRAME_BYTES]), last=False))
            at += FRAME_BYTES
        del self._pending[:at]
        return b"".join(sealed)

    def finish(self) -> bytes:
        """The last frame."""
        return self._seal(bytes(self._pending), last=True)

    def _seal(self, content: bytes, *, last: bool) -> bytes:
        nonce = _COUNTER.pack(self._frame, last)
        self._frame += 1
        return self._cipher.encrypt(nonce, content, None)


class Unsealer:
    """Reads a sealed archive. Raises PassphraseError, SealedArchiveError. Blocks.

    size: of the whole file. content_bytes: of the archive in it. frame_bytes: of a whole frame's
    content.
    """

    def __init__(self, file: Readable, size: int, passphrase: str) -> None:
        self._file = file
        header = file.read(HEADER_BYTES)
        if not header.startswith(SEALED):
            raise SealedArchiveError("The archive is under no passphrase.")
        if len(header) < HEADER_BYTES:
            raise SealedArchiveError("The archive ends within its header.")
        head, check = header[:_HEAD_BYTES], header[_HEAD_BYTES:]
        kind, *cost, self.frame_bytes, salt = _PARAMETERS.unpack(head[len(SEALED) :])
        asked = Cost(*cost)
        _check_parameters(kind, asked, self.frame_bytes)
        self._cipher, key = _derived(passphrase, salt, asked)
        if not hmac.compare_digest(_check(key, head), check):
            raise PassphraseError("The passphrase is wrong, or the archive's header was altered.")
        sealed = self.frame_bytes + _TAG_BYTES
        whole, rest = divmod(size - HEADER_BYTES, sealed)
        if size - HEADER_BYTES < _TAG_BYTES or 0 < rest < _TAG_BYTES:
            raise SealedArchiveError("The archive ends within a frame.")
        self._frames = whole + (rest > 0)
        self.content_bytes = size - HEADER_BYTES - self._frames * _TAG_BYTES

    def pieces(self, offset: int = 0) -> Iterator[bytes]:
        """The archive's bytes from there on, a frame at a time, each verified."""
        number, within = divmod(offset, self.frame_bytes)
        sealed = self.frame_bytes + _TAG_BYTES
        self._file.seek(HEADER_BYTES + number * sealed)
        for frame in range(number, self._frames):
            data = self._file.read(sealed)
            nonce = _COUNTER.pack(frame, frame == self._frames - 1)
            try:
                content = self._cipher.decrypt(nonce, data, None)
            except (InvalidTag, ValueError) as error:
                raise SealedArchiveError(
                    f"Frame {frame} of the archive was altered, or the archive was cut or put "
                    "together otherwise."
                ) from error
            yield content[within:]
            within = 0


def _check_parameters(kind: int, cost: Cost, frame_bytes: int) -> None:
    """Before anything of that size is allocated. Raises SealedArchiveError."""
    if kind != _SCRYPT:
        raise SealedArchiveError(f"The archive's key is made in a way ({kind}) unknown here.")
    # scrypt itself asks for N < 2**(16 r).
    sound = 1 <= cost.log_n < min(31, 16 * cost.r) and cost.r >= 1 and 1 <= cost.p <= _MAX_PASSES
    if not sound or 128 * cost.r << cost.log_n > _MAX_SCRYPT_BYTES:
        raise SealedArchiveError("Making the archive's key would take more than is allowed here.")
    if not 1 <= frame_bytes <= _MAX_FRAME:
        raise SealedArchiveError("The archive's frames are larger than is allowed here.")


class UnsealedFile:
    """The archive in a sealed file, read as a file that is open for reading.

    Memory stays at one frame. Closing it closes the file.
    """

    def __init__(self, file: BinaryIO, passphrase: str) -> None:
        self._file = file
        size = file.seek(0, 2)
        file.seek(0)
        self._unsealer = Unsealer(file, size, passphrase)
        self._at = 0
        self._frames = self._unsealer.pieces()
        self._rest = memoryview(b"")

    def read(self, size: int = -1, /) -> bytes:
        """As of a file; raises SealedArchiveError."""
        left = size if size >= 0 else self._unsealer.content_bytes
        parts: list[bytes] = []
        while left:
            if not self._rest:
                self._rest = memoryview(next(self._frames, b""))
                if not self._rest:
                    break
            part = self._rest[:left]
            self._rest = self._rest[len(part) :]
            left -= len(part)
            parts.append(bytes(part))
        data = b"".join(parts)
        self._at += len(data)
        return data

    def seek(self, offset: int, /) -> int:
        """From the start."""
        self._at = offset
        self._frames = self._unsealer.pieces(offset)
        self._rest = memoryview(b"")
        return offset

    def tell(self) -> int:
        """As of a file."""
        return self._at

    def close(self) -> None:
        """Again is no error."""
        self._file.close()


def sealed_archive(archive: bytes, passphrase: str, cost: Cost | None = None) -> bytes:
    """A whole archive as it lies under the passphrase."""
    sealer = Sealer(passphrase, cost)
    return sealer.header + sealer.update(archive) + sealer.finish()
