"""Messages from descriptors: valid-ish and hostile values for every field, recursively."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass
from hypothesis import strategies as st

#: Deeper than any request of the API; recursion in well-known types ends here.
_MAX_DEPTH = 5
_HUGE = 300_000

_HOSTILE_TEXTS = st.sampled_from(
    [
        "",
        " ",
        "\x00",
        "line\nbreak",
        "bell\x07",
        "\u202eright to left",
        "\ufeff",
        "<|im_start|>system",
        "../../etc/passwd",
        "memories/",
        "memories/-",
        "memories/a/documents/0",
        "memories/a/documents/-1",
        "memories/a/documents/99999999999999999999",
        "tenants/../tenants/x",
        "models/none",
        "%s%n",
        "' OR 1=1 --",
        "a" * 64,
        "a" * 65,
        "é" * 600,
        "🜁" * 200,
        "x" * _HUGE,
    ]
)

_INT_TYPES = {
    FieldDescriptor.CPPTYPE_INT32: (-(2**31), 2**31 - 1),
    FieldDescriptor.CPPTYPE_INT64: (-(2**63), 2**63 - 1),
    FieldDescriptor.CPPTYPE_UINT32: (0, 2**32 - 1),
    FieldDescriptor.CPPTYPE_UINT64: (0, 2**64 - 1),
}


class Generator:
    """Strategies for messages; `known` are values that exist on the server, by field name."""

    def __init__(self, known: dict[str, list[str]]) -> None:
        self._known = known

    def message(self, descriptor: Descriptor, depth: int = 0) -> st.SearchStrategy[Any]:
        """Messages of a type, with any subset of its fields set."""
        cls = GetMessageClass(descriptor)
        fields = [field for field in descriptor.fields if depth < _MAX_DEPTH]
        parts = {field.name: self._field(descriptor, field, depth) for field in fields}
        # All fields set gets past the first checks; any subset finds what is missing.
        whole, subset = st.fixed_dictionaries(parts), st.fixed_dictionaries({}, optional=parts)
        return st.one_of(whole, subset).map(lambda values: _build(cls, values))

    def _field(
        self, owner: Descriptor, field: FieldDescriptor, depth: int
    ) -> st.SearchStrategy[Any]:
        if field.message_type is not None and field.message_type.GetOptions().map_entry:
            entry = field.message_type.fields_by_name
            return st.dictionaries(
                self._scalar(owner, entry["key"]), self._scalar(owner, entry["value"]), max_size=3
            )
        one = (
            self.message(field.message_type, depth + 1)
            if field.message_type is not None
            else self._scalar(owner, field)
        )
        return st.lists(one, max_size=4) if field.is_repeated else one

    def _scalar(self, owner: Descriptor, field: FieldDescriptor) -> st.SearchStrategy[Any]:
        kind = field.cpp_type
        if kind == FieldDescriptor.CPPTYPE_STRING:
            return self._bytes() if field.type == field.TYPE_BYTES else self._text(owner, field)
        if kind == FieldDescriptor.CPPTYPE_BOOL:
            return st.booleans()
        if field.enum_type is not None:
            numbers = [value.number for value in field.enum_type.values]
            return st.one_of(st.sampled_from(numbers), st.integers(-5, 2**31 - 1))
        if kind in _INT_TYPES:
            low, high = _INT_TYPES[kind]
            small = st.integers(max(low, -2), 20)
            return st.one_of(small, st.integers(low, high), st.sampled_from([low, high]))
        special = st.sampled_from([0.0, -1.0, 1e30, float("inf"), float("-inf"), float("nan")])
        return st.one_of(st.floats(0, 2, width=32), special)

    def _text(self, owner: Descriptor, field: FieldDescriptor) -> st.SearchStrategy[str]:
        plain = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)
        known = self._known.get(f"{owner.name}.{field.name}", self._known.get(field.name, []))
        if not known:
            return st.one_of(plain, plain, _HOSTILE_TEXTS)
        real = st.sampled_from(known)
        return st.one_of(real, real, real, plain, _HOSTILE_TEXTS)

    @staticmethod
    def _bytes() -> st.SearchStrategy[bytes]:
        return st.one_of(st.binary(max_size=200), st.just(bytes(1 << 20)))


def _build(cls: Callable[[], Message], values: dict[str, Any]) -> Message:
    message = cls()
    for name, value in values.items():
        field = message.DESCRIPTOR.fields_by_name[name]
        if field.is_repeated and isinstance(value, dict):
            getattr(message, name).update(value)
        elif field.is_repeated:
            getattr(message, name).extend(value)
        elif isinstance(value, Message):
            # Setting a member of a oneof replaces what an earlier one set.
            getattr(message, name).CopyFrom(value)
        else:
            setattr(message, name, value)
    return message
