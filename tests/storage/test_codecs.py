"""Codecs: lossless ones give the same bits, int8 stays near, nothing expands unasked."""

from __future__ import annotations

import numpy as np
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from storage.codecs import (
    Codec,
    CodecError,
    compress,
    decode_arrays,
    decompress,
    encode_arrays,
    to_bf16,
    to_float,
)
from storage.layout import Bits, KVLayout, LayoutError
from tests.support.blocks import LAYOUTS, SEPARATE, SHARED, WIDE, make_block, same_bits

CODECS = st.sampled_from(Codec)
LOSSLESS = (Codec.RAW, Codec.ZSTD)


@pytest.mark.parametrize("codec", LOSSLESS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("tokens", [1, 64, 300])
def test_lossless_codecs_give_the_same_bits(codec: Codec, layout: KVLayout, tokens: int) -> None:
    block = make_block(layout, 1, tokens)
    arrays = [block.routing_key_LCE, block.value_LCE]
    payload = memoryview(encode_arrays(codec, arrays, layout))
    found = decode_arrays(codec, payload, 2, layout.chunks(tokens), layout)
    assert all(same_bits(*pair) for pair in zip(found, arrays, strict=True))


def test_lossless_codecs_keep_what_is_not_finite() -> None:
    array = np.full((3, 1, 16), 0x7F81, np.uint16)  # A signalling NaN.
    for codec in LOSSLESS:
        payload = memoryview(encode_arrays(codec, [array], SHARED))
        assert same_bits(decode_arrays(codec, payload, 1, 1, SHARED)[0], array)


def relative_error(array: Bits, layout: KVLayout, codec: Codec) -> float:
    payload = memoryview(encode_arrays(codec, [array], layout))
    (found,) = decode_arrays(codec, payload, 1, array.shape[1], layout)
    assert found.dtype == array.dtype
    exact = to_float(array).astype(np.float64)
    spread = float(np.sqrt(np.mean((to_float(found) - exact) ** 2)))
    return spread / float(np.sqrt(np.mean(exact**2)))


@pytest.mark.parametrize("codec", [Codec.INT8, Codec.INT8_ZSTD])
def test_int8_loses_about_a_hundredth(codec: Codec) -> None:
    layout = KVLayout(tuple(range(15)), 3, 64, 64, "bf16", separate_routing_keys=False)
    array = make_block(layout, 1, 640).value_LCE
    assert 0.001 < relative_error(array, layout, codec) < 0.012
    assert relative_error(make_block(WIDE, 1, 50).value_LCE, WIDE, codec) < 0.012


def test_int8_takes_little_more_than_half() -> None:
    layout = KVLayout(tuple(range(15)), 3, 64, 64, "bf16", separate_routing_keys=False)
    array = make_block(layout, 1, 640).value_LCE
    assert len(encode_arrays(Codec.INT8, [array], layout)) / array.nbytes < 0.52


@settings(max_examples=200)
@given(
    st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=16, max_size=16)
)
def test_int8_stays_within_a_step_at_any_scale(values: list[float]) -> None:
    array = to_bf16(np.array(values, np.float32).clip(-3e38, 3e38)).reshape(1, 1, 16)
    layout = KVLayout((0,), 1, 16, 64, "bf16", separate_routing_keys=True)
    payload = memoryview(encode_arrays(Codec.INT8, [array], layout))
    (found,) = decode_arrays(Codec.INT8, payload, 1, 1, layout)
    exact = to_float(array).astype(np.float64)
    peak = np.abs(exact).max()
    step = max(peak / 127 * 1.01, 1e-40)
    assert np.abs(to_float(found) - exact).max() <= step / 2 + peak / 256 + 1e-40


def test_int8_refuses_what_is_not_finite() -> None:
    for bits in (0x7F80, 0xFF80, 0x7FC0):
        array = np.full((3, 1, 16), bits, np.uint16)
        with pytest.raises(LayoutError):
            encode_arrays(Codec.INT8, [array], SHARED)


@pytest.mark.parametrize("codec", [Codec.INT8, Codec.INT8_ZSTD])
@pytest.mark.parametrize("bits", [0x7F80, 0xFF80, 0x7FC0, 0x7F81])
def test_int8_refuses_a_stored_scale_that_is_not_finite(codec: Codec, bits: int) -> None:
    array = make_block(SHARED, 1, 64).value_LCE
    raw = bytearray(encode_arrays(Codec.INT8, [array], SHARED))
    raw[:2] = bits.to_bytes(2, "little")
    payload = compress(raw) if codec is Codec.INT8_ZSTD else bytes(raw)
    with pytest.raises(CodecError, match="finite"):
        decode_arrays(codec, memoryview(payload), 1, array.shape[1], SHARED)


def test_int8_keeps_zeros() -> None:
    array = np.zeros((3, 2, 16), np.uint16)
    payload = memoryview(encode_arrays(Codec.INT8, [array], SHARED))
    assert same_bits(decode_arrays(Codec.INT8, payload, 1, 2, SHARED)[0], array)


@given(st.floats(width=32, allow_nan=False, allow_infinity=False))
def test_bf16_is_rounded_to_nearest(value: float) -> None:
    value = max(min(value, 3.38e38), -3.38e38)
    (found,) = to_float(to_bf16(np.array([value], np.float32)))
    assert abs(float(found) - value) <= abs(value) / 256 + 1e-40


@settings(max_examples=200)
@given(CODECS, st.binary(max_size=300), st.integers(1, 3), st.integers(1, 5))
def test_any_payload_is_decoded_or_refused(
    codec: Codec, payload: bytes, count: int, chunks: int
) -> None:
    try:
        arrays = decode_arrays(codec, memoryview(payload), count, chunks, SEPARATE)
    except CodecError:
        return
    assert [array.shape for array in arrays] == [(2, chunks, 16)] * count


def test_an_unknown_codec_is_refused() -> None:
    with pytest.raises(CodecError):
        decode_arrays(77, memoryview(b""), 1, 1, SHARED)


class TestBounded:
    """A frame gives what was asked for, or nothing."""

    def test_a_bomb_is_refused_before_it_expands(self) -> None:
        bomb = zstandard.ZstdCompressor().compress(bytes(2**30))
        assert len(bomb) < 100_000
        with pytest.raises(CodecError, match="holds"):
            decompress(bomb, 1000)

    def test_a_frame_that_hides_its_size_is_refused(self) -> None:
        hidden = zstandard.ZstdCompressor(write_content_size=False).compress(b"text")
        with pytest.raises(CodecError):
            decompress(hidden, 4)

    def test_a_frame_that_is_cut_or_followed_is_refused(self) -> None:
        frame = compress(b"text" * 100)
        for data in (frame[:-1], frame + b"x", frame + frame, b"", b"text"):
            with pytest.raises(CodecError):
                decompress(data, 400)

    def test_a_frame_carries_a_checksum(self) -> None:
        assert zstandard.get_frame_parameters(compress(b"text")).has_checksum
