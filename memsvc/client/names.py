"""Resource names. Ids and whole names are taken alike."""

from __future__ import annotations

import uuid


def memory_name(memory: str) -> str:
    """ "anna" or "memories/anna" to "memories/anna"."""
    return memory if memory.startswith("memories/") else f"memories/{memory}"


def document_name(memory: str, document: int | str) -> str:
    """A number within the memory, or a whole name."""
    return f"{memory}/documents/{document}" if isinstance(document, int) else document


def model_name(model: str) -> str:
    """ "smollm2" or "models/smollm2"; empty stays the default model."""
    return model if not model or model.startswith("models/") else f"models/{model}"


def tenant_name(tenant: str) -> str:
    """ "acme" or "tenants/acme" to "tenants/acme"."""
    return tenant if tenant.startswith("tenants/") else f"tenants/{tenant}"


def new_request_id() -> str:
    """Makes a retry of one write recognisable to the server."""
    return uuid.uuid4().hex
