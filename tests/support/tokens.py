"""An issuer of tokens for tests: it signs, and publishes its keys in a file."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import jwt
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from jwt.algorithms import ECAlgorithm, OKPAlgorithm, RSAAlgorithm

ISSUER, AUDIENCE = "https://issuer.example", "memsvc"


class Issuer:
    """Keys by kid; publish() writes the public halves where a server reads them."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self._keys: dict[str, tuple[str, Any]] = {}

    def add(self, kid: str, algorithm: str = "ES256") -> None:
        """Makes a key."""
        if algorithm == "ES256":
            key: Any = ec.generate_private_key(ec.SECP256R1())
        elif algorithm == "EdDSA":
            key = ed25519.Ed25519PrivateKey.generate()
        else:
            key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
        self._keys[kid] = (algorithm, key)

    def drop(self, kid: str) -> None:
        """Forgets a key."""
        del self._keys[kid]

    def public(self, kid: str) -> dict[str, Any]:
        """A key as the file has it."""
        algorithm, key = self._keys[kid]
        kinds: dict[str, Any] = {"ES256": ECAlgorithm, "EdDSA": OKPAlgorithm}
        kind = kinds.get(algorithm, RSAAlgorithm)
        return {**kind.to_jwk(key.public_key(), as_dict=True), "kid": kid, "alg": algorithm}

    def publish(self) -> None:
        """Replaces the file, as a careful writer does."""
        text = json.dumps({"keys": [self.public(kid) for kid in self._keys]})
        fresh = self.file.with_suffix(".new")
        fresh.write_text(text)
        fresh.rename(self.file)

    def token(self, kid: str, *, header: dict[str, Any] | None = None, **claims: Any) -> str:
        """A sound token but for what is given; a claim of None is left out."""
        now = time.time()
        payload = {
            "iss": ISSUER,
            "aud": AUDIENCE,
            "sub": "anna",
            "exp": now + 600,
            "memsvc_tenant": "default",
            "memsvc_scope": "read-write",
            **claims,
        }
        algorithm, key = self._keys[kid]
        return jwt.encode(
            {name: value for name, value in payload.items() if value is not None},
            key,
            algorithm=algorithm,
            headers={"kid": kid, **(header or {})},
        )
