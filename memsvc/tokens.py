"""JSON web tokens as credentials: made elsewhere, verified here against a file of keys.

A token is accepted with a signature by a key of the file (asymmetric algorithms alone),
the issuer and audience of the settings, and an end that lies ahead, not too far. The
file is read anew when it changes: a key put in is good at once, a key taken out is
good no longer. Every refusal is the same to the caller.
"""

from __future__ import annotations

import json
import logging
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import jwt

from memsvc.config import Config
from storage.catalog import Scope

log = logging.getLogger(__name__)

#: A secret shared with an issuer would let it, and whoever steals it here, make tokens.
ALGORITHMS = frozenset(
    ["RS256", "RS384", "RS512", "PS256", "PS384", "PS512", "ES256", "ES384", "ES512", "EdDSA"]
)
MAX_TOKEN_BYTES = 8192
_MAX_MEMORIES = 100
_LOOK_EVERY_S = 1.0
_PLAIN_SUBJECT = re.compile(r"[A-Za-z0-9._@|:-]{1,128}")


class TokenError(Exception):
    """The token is no credential. The message is for logs and holds nothing of it."""


class KeySetError(Exception):
    """The file of keys cannot be used; the message says why."""


@dataclass(frozen=True)
class Claims:
    """What a token says of its bearer. memories: ids; None for all of the tenant's.

    actor: names the subject where names belong, without any other text. ends_us: when
    the token ends, skew included, in UTC microseconds.
    """

    actor: str
    tenant_id: str
    scope: Scope
    memories: tuple[str, ...] | None
    ends_us: int


class TokenVerifier:
    """Verifies tokens as the settings say. clock: UTC seconds."""

    def __init__(self, config: Config, clock: Callable[[], float] = time.time) -> None:
        self._config = config
        self._clock = clock
        self._path = Path(config.jwt_jwks_file)
        self._stamp = _stamp(self._path)
        self._keys = _load(self._path)
        self._looked = time.monotonic()
        #: Counts the changes of the keys: what was verified before one is not now.
        self.generation = 0

    def refresh(self) -> None:
        """Reads the keys anew when the file has changed; a broken file changes nothing."""
        if time.monotonic() - self._looked >= _LOOK_EVERY_S:
            self._look()

    def verify(self, token: str) -> Claims:
        """Raises TokenError."""
        if len(token) > MAX_TOKEN_BYTES:
            raise TokenError("is too long")
        try:
            header = jwt.get_unverified_header(token)
            key = self._key(header.get("kid"))
            # Times are checked below, by this verifier's own clock.
            payload = jwt.decode(
                token,
                key=key,
                algorithms=[key.algorithm_name],
                audience=self._config.jwt_audience,
                issuer=self._config.jwt_issuer,
                options={
                    "require": ["exp", "iss", "aud", "sub"],
                    "verify_exp": False,
                    "verify_nbf": False,
                    "verify_iat": False,
                },
            )
        except jwt.PyJWTError as error:
            raise TokenError(type(error).__name__) from error
        return self._claims(payload)

    def _key(self, kid: object) -> jwt.PyJWK:
        if not isinstance(kid, str) or not kid:
            raise TokenError("names no key")
        if kid not in self._keys:
            # Perhaps a new one: the issuer changes keys before it signs with them.
            self._look()
        if kid not in self._keys:
            raise TokenError("names a key that is not in the file")
        return self._keys[kid]

    def _look(self) -> None:
        self._looked = time.monotonic()
        try:
            stamp = _stamp(self._path)
            if stamp == self._stamp:
                return
            keys = _load(self._path)
        except KeySetError as error:
            log.error("the keys for tokens stay as they were: %s", error)
            return
        self._stamp, self._keys = stamp, keys
        self.generation += 1
        log.info("keys for tokens were read anew", extra={"keys": len(keys)})

    def _claims(self, payload: Mapping[str, Any]) -> Claims:
        prefix, now = self._config.jwt_claim_prefix, self._clock()
        leeway = self._config.jwt_leeway_s
        ends, starts = _seconds(payload, "exp"), _seconds(payload, "nbf", default=0)
        if not now - leeway < ends <= now + self._config.jwt_max_lifetime_s + leeway:
            raise TokenError("has ended, or lives too long")
        if starts > now + leeway:
            raise TokenError("does not hold yet")
        tenant, scope = payload.get(f"{prefix}tenant"), payload.get(f"{prefix}scope")
        if not isinstance(tenant, str) or not isinstance(scope, str) or scope not in _SCOPES:
            raise TokenError("lacks a tenant or a scope")
        memories = _memories(payload.get(f"{prefix}memories"))
        if memories is not None and _SCOPES[scope] is Scope.ADMIN:
            raise TokenError("limits an admin to some memories")
        return Claims(
            _actor(payload["sub"]),
            tenant,
            _SCOPES[scope],
            memories,
            round((ends + leeway) * 1_000_000),
        )


_SCOPES: Mapping[str, Scope] = {
    "read": Scope.READ,
    "read-write": Scope.READ_WRITE,
    "admin": Scope.ADMIN,
}


def _seconds(payload: Mapping[str, Any], name: str, default: float | None = None) -> float:
    value = payload.get(name, default)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 2**40:
        raise TokenError(f"has no time in {name}")
    return value


def _memories(value: object) -> tuple[str, ...] | None:
    """Ids of memories. A claim that is there and is no list of names opens nothing."""
    if value is None:
        return None
    if not isinstance(value, list) or len(value) > _MAX_MEMORIES:
        raise TokenError("has no list of memories")
    if not all(isinstance(name, str) and name.startswith("memories/") for name in value):
        raise TokenError("names memories in another way")
    return tuple(name.removeprefix("memories/") for name in value)


def _actor(subject: object) -> str:
    """A subject may be anything; what is not plainly an identifier is hashed."""
    text = str(subject)
    if _PLAIN_SUBJECT.fullmatch(text):
        return f"jwt:{text}"
    return f"jwt:sha256:{sha256(text.encode()).hexdigest()[:32]}"


def _encrypts(entry: Mapping[str, Any]) -> bool:
    return entry.get("use") == "enc"


def _stamp(path: Path) -> tuple[int, int, int]:
    try:
        found = path.stat()
    except OSError as error:
        raise KeySetError(f"{path}: {error.strerror}") from error
    return found.st_mtime_ns, found.st_size, found.st_ino


def _load(path: Path) -> dict[str, jwt.PyJWK]:
    """Public keys by kid; those for encryption, which issuers list too, are left out.

    A symmetric, private or unnamed key makes the whole file unusable.
    """
    try:
        listed = [entry for entry in json.loads(path.read_text())["keys"] if not _encrypts(entry)]
        if not listed:
            raise KeySetError(f"{path}: holds no keys")
        if any("d" in entry for entry in listed):
            raise KeySetError(f"{path}: holds a private key, which belongs to the issuer alone")
        keys = [jwt.PyJWK(entry) for entry in listed]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, jwt.PyJWTError) as error:
        # The library's own words repeat the key.
        raise KeySetError(f"{path}: {type(error).__name__}") from error
    for key in keys:
        if key.algorithm_name not in ALGORITHMS:
            raise KeySetError(f"{path}: {key.algorithm_name} is not an algorithm for tokens")
        if not key.key_id:
            raise KeySetError(f"{path}: a key has no kid")
    named = {str(key.key_id): key for key in keys}
    if len(named) != len(keys):
        raise KeySetError(f"{path}: two keys have one kid")
    return named
