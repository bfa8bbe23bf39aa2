"""Page tokens: opaque to clients, signed, good for one listing only."""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import json
from collections.abc import Iterable, Sequence

from memsvc import errors

Position = Sequence[int | str]

#: A page ends here although it has fewer items than asked: a client takes 4 MiB.
PAGE_BYTES = 3 * 1024 * 1024 // 2

_MAC_BYTES = 16
_MAX_TOKEN = 1024


def fitting(sizes: Iterable[int]) -> int:
    """How many items of these sizes, in bytes, fit one page: the first always does."""
    total = count = 0
    for size in sizes:
        total += size
        if total > PAGE_BYTES and count:
            break
        count += 1
    return count


class PageTokens:
    """Issues and opens the page tokens of one server.

    A token is bound to the listing it came from: tenant, method, parent and
    filters. It holds a position and no data.
    """

    def __init__(self, key: bytes) -> None:
        self._key = key

    def issue(self, binding: Sequence[str], position: Position) -> str:
        """binding: tenant uid, method and whatever else picks the listing."""
        body = json.dumps(list(position), separators=(",", ":")).encode()
        return base64.urlsafe_b64encode(self._mac(binding, body) + body).decode().rstrip("=")

    def open(self, binding: Sequence[str], token: str) -> list[int | str] | None:
        """None for an empty token. Raises PAGE_TOKEN_INVALID."""
        if not token:
            return None
        if len(token) > _MAX_TOKEN:
            raise errors.page_token_invalid()
        try:
            padded = token.encode("ascii") + b"=" * (-len(token) % 4)
            raw = base64.b64decode(padded, altchars=b"-_", validate=True)
        except (UnicodeEncodeError, binascii.Error) as error:
            raise errors.page_token_invalid() from error
        mac, body = raw[:_MAC_BYTES], raw[_MAC_BYTES:]
        if not hmac.compare_digest(mac, self._mac(binding, body)):
            raise errors.page_token_invalid()
        position: list[int | str] = json.loads(body)
        return position

    def _mac(self, binding: Sequence[str], body: bytes) -> bytes:
        # JSON keeps the parts apart: ("a", "bc") and ("ab", "c") differ.
        message = json.dumps(list(binding)).encode() + b"\0" + body
        return hmac.digest(self._key, message, hashlib.sha256)[:_MAC_BYTES]
