"""Archives under a passphrase: what is written, and that every damage to it is noticed."""

from __future__ import annotations

import hashlib
import hmac
import io
import random

import pytest
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from hypothesis import given, settings
from hypothesis import strategies as st

from memsvc.client import PassphraseError, SealedArchiveError
from memsvc.client.sealed import (
    FRAME_BYTES,
    HEADER_BYTES,
    Cost,
    Sealer,
    UnsealedFile,
    Unsealer,
    sealed_archive,
)

#: Quick to derive; what is measured here is not how slow it is.
CHEAP = Cost(4, 1, 1)
FRAME = FRAME_BYTES + 16


def opened(data: bytes, passphrase: str = "right") -> bytes:
    return b"".join(Unsealer(io.BytesIO(data), len(data), passphrase).pieces())


def content(size: int) -> bytes:
    return random.Random(size).randbytes(size)


@pytest.mark.parametrize(
    "size", [0, 1, FRAME_BYTES - 1, FRAME_BYTES, FRAME_BYTES + 1, 3 * FRAME_BYTES, 200_000]
)
def test_round_trip(size: int) -> None:
    sealed = sealed_archive(content(size), "right", CHEAP)
    assert opened(sealed) == content(size)
    frames = max(1, -(-size // FRAME_BYTES))
    assert len(sealed) == HEADER_BYTES + size + 16 * frames
    assert Unsealer(io.BytesIO(sealed), len(sealed), "right").content_bytes == size


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 100_000), max_size=6))
def test_pieces_do_not_matter(sizes: list[int]) -> None:
    sealer = Sealer("right", CHEAP)
    pieces = [content(size) for size in sizes]
    sealed = b"".join([sealer.header, *map(sealer.update, pieces), sealer.finish()])
    assert opened(sealed) == b"".join(pieces)


def test_the_documented_layout_suffices_to_read_one() -> None:
    """By hashlib and AES-GCM alone, as any other language would."""
    sealed = sealed_archive(content(70_000), "Grüße", CHEAP)
    assert sealed[:16] == b"msamem sealed v1"
    kdf, log_n, r, p = sealed[16:20]
    assert (kdf, log_n, r, p) == (1, *CHEAP)
    size = int.from_bytes(sealed[20:24], "big")
    both = hashlib.scrypt("Grüße".encode(), salt=sealed[24:40], n=1 << log_n, r=r, p=p, dklen=64)
    assert hmac.digest(both[32:], sealed[:40], "sha256") == sealed[40:72]
    rest, plain, frame = sealed[72:], b"", 0
    while rest:
        part, rest = rest[: size + 16], rest[size + 16 :]
        nonce = bytes(3) + frame.to_bytes(8, "big") + bytes([not rest])
        plain += AESGCM(both[:32]).decrypt(nonce, part, None)
        frame += 1
    assert plain == content(70_000)


def test_letters_that_look_alike_are_alike() -> None:
    assert opened(sealed_archive(b"x", "\u00fc", CHEAP), "u\u0308") == b"x"


def test_the_default_cost_is_what_the_document_says() -> None:
    assert Cost() == (17, 8, 1)


def test_no_two_files_share_a_key() -> None:
    first, second = (sealed_archive(bytes(100), "right", CHEAP) for _ in range(2))
    assert first[24:40] != second[24:40] and first[HEADER_BYTES:] != second[HEADER_BYTES:]


@pytest.mark.parametrize("passphrase", ["wrong", "", "right ", "Right"])
def test_a_wrong_passphrase_is_told_from_damage(passphrase: str) -> None:
    with pytest.raises(PassphraseError):
        opened(sealed_archive(content(10), "right", CHEAP), passphrase)


def test_frames_that_are_missing_moved_doubled_or_added_are_noticed() -> None:
    sealed = sealed_archive(content(3 * FRAME_BYTES + 9), "right", CHEAP)
    head, body = sealed[:HEADER_BYTES], sealed[HEADER_BYTES:]
    a, b, c, last = (body[at : at + FRAME] for at in range(0, len(body), FRAME))
    other = sealed_archive(content(9), "right", CHEAP)[HEADER_BYTES:]
    for frames in (
        [a, b, c],
        [a, b],
        [],
        [a, c, last],
        [b, a, c, last],
        [a, b, b, last],
        [a, b, c, c, last],
        [a, b, c, last, last],
        [a, b, c, other],
        [a, b, c, last + b"x"],
        [last],
    ):
        with pytest.raises(SealedArchiveError):
            opened(head + b"".join(frames))


def test_every_cut_is_noticed() -> None:
    sealed = sealed_archive(content(FRAME_BYTES + 50), "right", CHEAP)
    for length in [*range(HEADER_BYTES + 40), *range(HEADER_BYTES + FRAME - 20, len(sealed))]:
        with pytest.raises((SealedArchiveError, PassphraseError)):
            opened(sealed[:length])


def test_every_bit_counts() -> None:
    sealed = sealed_archive(content(40), "right", CHEAP)
    for bit in range(8 * len(sealed)):
        damaged = bytearray(sealed)
        damaged[bit // 8] ^= 1 << bit % 8
        with pytest.raises((SealedArchiveError, PassphraseError)):
            opened(bytes(damaged))


@pytest.mark.parametrize(
    ("at", "value", "problem"),
    [
        (16, bytes([2]), "unknown"),
        (17, bytes([31]), "more than"),
        (17, bytes([24]), "more than"),
        (17, bytes([0]), "more than"),
        (18, bytes([0]), "more than"),
        (19, bytes([0]), "more than"),
        (19, bytes([200]), "more than"),
        (20, bytes(4), "frames"),
        (20, b"\xff" * 4, "frames"),
    ],
)
def test_a_header_cannot_make_its_reader_work(at: int, value: bytes, problem: str) -> None:
    sealed = bytearray(sealed_archive(b"", "right", Cost(17, 8, 1)._replace(log_n=4)))
    sealed[at : at + len(value)] = value
    with pytest.raises(SealedArchiveError, match=problem):
        opened(bytes(sealed))


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 150_000), st.integers(-1, 90_000)), max_size=8))
def test_it_reads_as_a_file_does(steps: list[tuple[int, int]]) -> None:
    plain = io.BytesIO(content(150_000))
    found = UnsealedFile(io.BytesIO(sealed_archive(plain.getvalue(), "right", CHEAP)), "right")
    for offset, size in steps:
        assert found.seek(offset) == plain.seek(offset)
        assert found.read(size) == plain.read(size)
        assert found.tell() == plain.tell()
    found.close()
