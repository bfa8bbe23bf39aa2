"""Encoded documents: the cache on disk, and the memory made of them."""

from pathlib import Path

import numpy as np
import pytest

from benchmarks.quality import encoded
from benchmarks.quality.encoded import BlockCache, EncodedView, join
from model_adapter.engine import DocumentText, Encoded, Generate
from model_adapter.fake import FakeEngine, FakeSpec
from tests.support.tiny_msa import TEXTS, answer, remember, tiny_engine

WORDS = {n: f"document {n} tells of thing{n} and " + "more words " * n for n in range(1, 8)}


class Counting(FakeEngine):
    """Counts the documents that it encodes."""

    def __init__(self, spec: FakeSpec | None = None) -> None:
        super().__init__(spec)
        self.encoded = 0

    def encode(self, documents: object) -> Encoded:
        assert isinstance(documents, list)
        self.encoded += len(documents)
        return super().encode(documents)


@pytest.fixture(autouse=True)
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoded, "SHARD", 3)
    monkeypatch.setattr(encoded, "BATCH", 2)


def test_a_second_run_encodes_nothing_and_reads_the_same(tmp_path: Path) -> None:
    engine = Counting()
    done: list[int] = []
    first = BlockCache(tmp_path, engine).encode(WORDS, done.append)
    again = BlockCache(tmp_path, engine).encode(WORDS, done.append)
    assert engine.encoded == len(WORDS)
    assert sum(done) == 2 * len(WORDS)
    assert list(first.numbers_N) == list(again.numbers_N) == list(WORDS)
    assert first.tokens == again.tokens == sum(len(text.split()) for text in WORDS.values())
    assert first.seconds == again.seconds > 0
    for kind in ("routing", "key", "value"):
        assert np.array_equal(first.arrays[kind], again.arrays[kind])


@pytest.mark.parametrize(
    "change",
    [
        lambda texts: texts | {2: "another text"},
        lambda texts: {number + 1: text for number, text in texts.items()},
    ],
    ids=["text", "number"],
)
def test_another_text_or_number_is_encoded_anew(tmp_path: Path, change: object) -> None:
    engine = Counting()
    BlockCache(tmp_path, engine).encode(WORDS)
    assert callable(change)
    BlockCache(tmp_path, engine).encode(change(WORDS))
    assert engine.encoded > len(WORDS)


def test_another_model_is_encoded_anew(tmp_path: Path) -> None:
    BlockCache(tmp_path, FakeEngine()).encode(WORDS)
    other = Counting(FakeSpec(name="other"))
    BlockCache(tmp_path, other).encode(WORDS)
    assert other.encoded == len(WORDS)


def test_no_partial_file_is_left(tmp_path: Path) -> None:
    BlockCache(tmp_path, FakeEngine()).encode(WORDS)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) == 3
    assert {path.suffix for path in files} == {".safetensors"}


def test_a_refused_document_is_left_out(tmp_path: Path) -> None:
    engine = FakeEngine(FakeSpec(max_document_tokens=20))
    texts = {1: "short", 2: "long " * 21, 3: "short too", 4: "long " * 30}
    found = BlockCache(tmp_path, engine).encode(texts)
    assert list(found.numbers_N) == [1, 3]
    assert found.block_bytes == 2 * engine.description.layout.block_bytes(1)


def test_a_memory_of_cached_blocks_reads_as_one_just_encoded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encoded, "SHARD", 99)
    monkeypatch.setattr(encoded, "BATCH", 99)  # batches of other sizes round otherwise
    engine = tiny_engine()
    fresh = remember(engine)
    kept = EncodedView(BlockCache(tmp_path, engine).encode(TEXTS), TEXTS)
    for question in ("Where was the painter born?", "Who sold the boat?"):
        assert engine.route(question, kept, 3) == engine.route(question, fresh, 3)
        request = Generate(question, 8)
        assert answer(engine, request, kept) == answer(engine, request, fresh)


def test_parts_are_joined_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    engine = FakeEngine()
    cache = BlockCache(tmp_path, engine)
    odd = cache.encode({n: text for n, text in WORDS.items() if n % 2})
    even = cache.encode({n: text for n, text in WORDS.items() if n % 2 == 0})
    whole, parts = cache.encode(WORDS), join([odd, even])
    assert list(parts.numbers_N) == list(whole.numbers_N)
    for kind, array in whole.arrays.items():
        assert np.array_equal(parts.arrays[kind], array)


def test_a_memory_of_some_documents_finds_only_those(tmp_path: Path) -> None:
    engine = FakeEngine()
    whole = BlockCache(tmp_path, engine).encode(WORDS)
    few = EncodedView(whole.take([6, 2, 99]), WORDS)
    assert list(few.numbers_N) == [2, 6]
    assert [found.number for found in engine.route("thing6 thing3", few, 5)] == [6]
    head = EncodedView(whole.first(3), WORDS)
    assert list(head.numbers_N) == [1, 2, 3]
    assert [found.number for found in engine.route("thing3 thing5", head, 5)] == [3]
    nothing = EncodedView(whole.take([]), WORDS)
    assert engine.route("thing1", nothing, 5) == []


def test_without_content_only_routing_keys_are_read(tmp_path: Path) -> None:
    engine = FakeEngine()
    found = BlockCache(tmp_path, engine, content=False).encode(WORDS)
    assert set(found.arrays) == {"routing"}
    view = EncodedView(found, WORDS)
    assert [document.number for document in engine.route("thing4", view, 5)] == [4]


def test_routing_keys_alone_are_not_taken_for_whole_blocks(tmp_path: Path) -> None:
    engine = Counting()
    keys = BlockCache(tmp_path, engine, content=False).encode(WORDS)
    whole = BlockCache(tmp_path, engine).encode(WORDS)
    assert engine.encoded == 2 * len(WORDS)
    assert set(whole.arrays) == {"routing", "key", "value"}
    assert np.array_equal(whole.arrays["routing"], keys.arrays["routing"])
    BlockCache(tmp_path / "new", engine).encode(WORDS)
    BlockCache(tmp_path / "new", engine, content=False).encode(WORDS)
    assert engine.encoded == 3 * len(WORDS)


def test_documents_are_numbered_in_the_block(tmp_path: Path) -> None:
    engine = tiny_engine()
    (block,) = engine.encode([DocumentText(5, TEXTS[1])]).blocks
    found = BlockCache(tmp_path, engine).encode({5: TEXTS[1]})
    assert np.array_equal(found.arrays["routing"], block.routing_key_LCE)
