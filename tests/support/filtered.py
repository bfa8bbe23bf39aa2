"""Documents of every kind and filters over them, for tests of filters."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

from hypothesis import strategies as st

from storage.documents import Conversation, Role, Source, TextSource, Turn
from storage.filters import DocumentFilter, MetadataCondition

_START = datetime(2026, 1, 1, tzinfo=UTC)

moments = st.integers(-3, 6).map(lambda days: _START + timedelta(days=days, microseconds=days))
names = st.sampled_from(["Anna", "Bob", "anna", "Zoë"])
keys = st.sampled_from(["place", "mood", "k"])
values = st.sampled_from(["", "home", "work", "k"])
_WORDS = "Lisbon boat chess Kiel garden night train moved bought works"
words = st.sampled_from(_WORDS.split(" "))
sentences = st.lists(words, min_size=1, max_size=6).map(" ".join)
metadata = st.dictionaries(keys, values, max_size=3)

turns = st.builds(
    Turn,
    role=st.sampled_from(Role),
    text=sentences,
    occurred_at=st.none() | moments,
    speaker=st.just("") | names,
    metadata=metadata,
)
sources = st.one_of(
    st.lists(turns, min_size=1, max_size=4).map(lambda found: Conversation(tuple(found))),
    st.builds(TextSource, text=sentences, occurred_at=st.none() | moments, metadata=metadata),
)
#: Of conversations and texts, numbered from 1.
memories: st.SearchStrategy[dict[int, Source]] = st.lists(sources, min_size=1, max_size=12).map(
    lambda found: dict(enumerate(found, start=1))
)
filters = st.builds(
    DocumentFilter,
    occurred_from=st.none() | moments,
    occurred_before=st.none() | moments,
    roles=st.frozensets(st.sampled_from(Role), max_size=2),
    speakers=st.frozensets(names, max_size=2),
    metadata=st.lists(
        st.builds(MetadataCondition, keys, st.frozensets(values, max_size=2)), max_size=2
    ).map(tuple),
)
