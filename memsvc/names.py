"""Resource names: parsing and formatting, nothing else.

A malformed name is FIELD_INVALID and names its field; whether the resource
exists is another question, asked of the catalog.
"""

from __future__ import annotations

import re
import secrets

from memsvc import errors

RESOURCE_ID = re.compile(r"[a-z][a-z0-9-]{2,61}[a-z0-9]")
MODEL_ID = re.compile(r"[a-z0-9][a-z0-9._-]{0,62}")
KEY_ID = re.compile(r"[0-9a-f]{16}")
RECEIPT_ID = re.compile(r"[0-9]{16}-[0-9a-f]{8}")
DOCUMENT_NUMBER = re.compile(r"[1-9][0-9]{0,18}")
MAX_NUMBER = 2**63 - 1

_ID_RULE = "must match [a-z]([a-z0-9-]{2,61}[a-z0-9])"


def new_memory_id() -> str:
    """An id for a memory whose creator chose none."""
    return f"m-{secrets.token_hex(8)}"


def check_id(field: str, value: str) -> str:
    """A memory or tenant id that a caller chose."""
    if not value:
        raise errors.field_required(field)
    if not RESOURCE_ID.fullmatch(value):
        raise errors.field_invalid(field, _ID_RULE)
    return value


def memory_name(memory_id: str) -> str:
    """ "memories/{memory}"."""
    return f"memories/{memory_id}"


def document_name(memory_id: str, number: int) -> str:
    """ "memories/{memory}/documents/{number}"."""
    return f"memories/{memory_id}/documents/{number}"


def model_name(model_id: str) -> str:
    """ "models/{model}"."""
    return f"models/{model_id}"


def tenant_name(tenant_id: str) -> str:
    """ "tenants/{tenant}"."""
    return f"tenants/{tenant_id}"


def api_key_name(tenant_id: str, key_id: str) -> str:
    """ "tenants/{tenant}/apiKeys/{api_key}"."""
    return f"tenants/{tenant_id}/apiKeys/{key_id}"


def quotas_name(tenant_id: str) -> str:
    """ "tenants/{tenant}/quotas"."""
    return f"{tenant_name(tenant_id)}/quotas"


def receipt_name(tenant_id: str, receipt_id: str) -> str:
    """ "tenants/{tenant}/deletionReceipts/{deletion_receipt}"."""
    return f"{tenant_name(tenant_id)}/deletionReceipts/{receipt_id}"


def parse_memory(field: str, name: str) -> str:
    """Returns the memory id."""
    (memory_id,) = _parts(field, name, "memories/{memory}", RESOURCE_ID)
    return memory_id


def parse_document(field: str, name: str) -> tuple[str, int]:
    """Returns memory id and document number."""
    pattern = "memories/{memory}/documents/{number}"
    memory_id, number = _parts(field, name, pattern, RESOURCE_ID, DOCUMENT_NUMBER)
    if int(number) > MAX_NUMBER:
        raise errors.field_invalid(field, f"must be of the form {pattern}")
    return memory_id, int(number)


def parse_model(field: str, name: str) -> str:
    """Returns the model id."""
    (model_id,) = _parts(field, name, "models/{model}", MODEL_ID)
    return model_id


def parse_tenant(field: str, name: str) -> str:
    """Returns the tenant id."""
    (tenant_id,) = _parts(field, name, "tenants/{tenant}", RESOURCE_ID)
    return tenant_id


def parse_quotas(field: str, name: str) -> str:
    """Returns the tenant id."""
    (tenant_id,) = _parts(field, name, "tenants/{tenant}/quotas", RESOURCE_ID)
    return tenant_id


def parse_api_key(field: str, name: str) -> tuple[str, str]:
    """Returns tenant id and key id."""
    pattern = "tenants/{tenant}/apiKeys/{api_key}"
    tenant_id, key_id = _parts(field, name, pattern, RESOURCE_ID, KEY_ID)
    return tenant_id, key_id


def parse_receipt(field: str, name: str) -> tuple[str, str]:
    """Returns tenant id and receipt id."""
    pattern = "tenants/{tenant}/deletionReceipts/{deletion_receipt}"
    tenant_id, receipt_id = _parts(field, name, pattern, RESOURCE_ID, RECEIPT_ID)
    return tenant_id, receipt_id


def clean(name: str) -> str:
    """The name if it is one of these, else nothing: for where no user text belongs."""
    for pattern, *rules in _KNOWN:
        given, expected = name.split("/"), pattern.split("/")
        if len(given) == len(expected) and given[::2] == expected[::2]:
            return name if all(map(re.Pattern.fullmatch, rules, given[1::2])) else ""
    return ""


_KNOWN: tuple[tuple[str, *tuple[re.Pattern[str], ...]], ...] = (
    ("memories/{memory}", RESOURCE_ID),
    ("memories/{memory}/documents/{number}", RESOURCE_ID, DOCUMENT_NUMBER),
    ("models/{model}", MODEL_ID),
    ("tenants/{tenant}", RESOURCE_ID),
    ("tenants/{tenant}/apiKeys/{api_key}", RESOURCE_ID, KEY_ID),
    ("tenants/{tenant}/quotas", RESOURCE_ID),
    ("tenants/{tenant}/deletionReceipts/{deletion_receipt}", RESOURCE_ID, RECEIPT_ID),
)


def _parts(field: str, name: str, pattern: str, *rules: re.Pattern[str]) -> tuple[str, ...]:
    if not name:
        raise errors.field_required(field)
    given, expected = name.split("/"), pattern.split("/")
    collections_match = len(given) == len(expected) and given[::2] == expected[::2]
    ids = given[1::2]
    if not collections_match or not all(map(re.Pattern.fullmatch, rules, ids)):
        raise errors.field_invalid(field, f"must be of the form {pattern}")
    return tuple(ids)
