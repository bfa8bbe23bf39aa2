"""Messages from descriptors: sound and hostile values for every field, recursively.

Sound messages get past the checks and reach what lies behind them; hostile ones
try the checks. A call's messages are of one kind or the other, or garbage.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
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
_SOUND_TEXTS = st.text("abc defgh.?", min_size=1, max_size=40)
_ANY_TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)

_INT_RANGES = {
    FieldDescriptor.CPPTYPE_INT32: (-(2**31), 2**31 - 1),
    FieldDescriptor.CPPTYPE_INT64: (-(2**63), 2**63 - 1),
    FieldDescriptor.CPPTYPE_UINT32: (0, 2**32 - 1),
    FieldDescriptor.CPPTYPE_UINT64: (0, 2**64 - 1),
}
_INTEGER_TYPES = set(_INT_RANGES)

Values = Sequence[str] | Sequence[bytes] | Sequence[int]


class Generator:
    """Strategies for messages.

    known: values that are sound, by field name or "Message.field".
    """

    def __init__(self, known: Mapping[str, Values], *, sound: bool) -> None:
        self._known = known
        self._sound = sound

    def message(self, descriptor: Descriptor, depth: int = 0) -> st.SearchStrategy[Any]:
        """Messages of a type, with all or some of their fields set."""
        cls = GetMessageClass(descriptor)
        fields = [field for field in descriptor.fields if depth < _MAX_DEPTH]
        parts = {field.name: self._field(descriptor, field, depth) for field in fields}
        whole, subset = st.fixed_dictionaries(parts), st.fixed_dictionaries({}, optional=parts)
        values = st.one_of(whole, whole, subset) if self._sound else st.one_of(whole, subset)
        return values.map(lambda chosen: _build(cls, chosen))

    def stream(self, descriptor: Descriptor) -> st.SearchStrategy[list[Any]]:
        """A client stream whose messages come in the right order: header, the rest, end."""
        cls = GetMessageClass(descriptor)
        first, *fields = descriptor.fields
        header = self._only(cls, descriptor, first)
        others = [self._only(cls, descriptor, field) for field in fields if field.name != "end"]
        ends = any(field.name == "end" for field in fields)
        rounds = st.lists(st.tuples(*others), min_size=1, max_size=3)
        return st.tuples(header, rounds).map(
            lambda pair: [
                pair[0],
                *(message for one in pair[1] for message in one),
                *([cls(end={"documents": len(pair[1])})] if ends else []),
            ]
        )

    def _only(
        self, cls: Callable[..., Message], owner: Descriptor, field: FieldDescriptor
    ) -> st.SearchStrategy[Any]:
        """Messages with this one field set."""
        return self._field(owner, field, 0).map(lambda value: _build(cls, {field.name: value}))

    def _field(
        self, owner: Descriptor, field: FieldDescriptor, depth: int
    ) -> st.SearchStrategy[Any]:
        if field.message_type is not None and field.message_type.GetOptions().map_entry:
            entry = field.message_type
            key, value = entry.fields_by_name["key"], entry.fields_by_name["value"]
            keys, values = self._scalar(owner, key), self._scalar(owner, value)
            return st.dictionaries(keys, values, max_size=3)
        one = (
            self.message(field.message_type, depth + 1)
            if field.message_type is not None
            else self._scalar(owner, field)
        )
        least = 1 if self._sound else 0
        return st.lists(one, min_size=least, max_size=4) if field.is_repeated else one

    def _scalar(self, owner: Descriptor, field: FieldDescriptor) -> st.SearchStrategy[Any]:
        known = self._known.get(f"{owner.name}.{field.name}", self._known.get(field.name, ()))
        sound = st.sampled_from(list(known)) if known else _sound(field)
        return sound if self._sound else st.one_of(sound, _hostile(field))


def _sound(field: FieldDescriptor) -> st.SearchStrategy[Any]:
    if field.enum_type is not None:
        return st.sampled_from([value.number for value in field.enum_type.values][1:])
    if field.cpp_type in _INTEGER_TYPES:
        return st.integers(0, 12)
    if field.cpp_type == FieldDescriptor.CPPTYPE_BOOL:
        return st.booleans()
    if field.cpp_type == FieldDescriptor.CPPTYPE_STRING:
        return st.binary(max_size=200) if field.type == field.TYPE_BYTES else _SOUND_TEXTS
    return st.floats(0, 1, width=32)


def _hostile(field: FieldDescriptor) -> st.SearchStrategy[Any]:
    if field.enum_type is not None:
        return st.integers(-5, 2**31 - 1)
    if field.cpp_type in _INTEGER_TYPES:
        low, high = _INT_RANGES[field.cpp_type]
        return st.one_of(st.integers(low, high), st.sampled_from([low, high, max(low, -1)]))
    if field.cpp_type == FieldDescriptor.CPPTYPE_BOOL:
        return st.booleans()
    if field.cpp_type == FieldDescriptor.CPPTYPE_STRING:
        if field.type == field.TYPE_BYTES:
            return st.one_of(st.binary(max_size=200), st.just(bytes(1 << 20)))
        return st.one_of(_ANY_TEXTS, _HOSTILE_TEXTS)
    return st.sampled_from([-1.0, 1e30, float("inf"), float("-inf"), float("nan")])


def _build(cls: Callable[[], Message], values: dict[str, Any]) -> Message:
    message = cls()
    for name, value in values.items():
        if isinstance(value, dict):
            getattr(message, name).update(value)
        elif isinstance(value, list):
            getattr(message, name).extend(value)
        elif isinstance(value, Message):
            # Setting a member of a oneof replaces what an earlier one set.
            getattr(message, name).CopyFrom(value)
        else:
            setattr(message, name, value)
    return message
