"""Images damaged at random, thousands of them: each is pixels or an error row, in both modes alike, and the worker lives."""

from __future__ import annotations

import signal

import pytest

from pipeline.inputs.images import Pixels, decode
from tests.support.mutations import MAX_PIXELS, decode_damaged, originals

FORMATS = {"JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF", "AVIF", "HEIF"}
BYTES_PER_PIXEL = 26  # at most: docs/odd-inputs.md


def assert_all_accounted_for(count: int, first: int) -> None:
    found = decode_damaged(count, first)
    verdicts = found["verdicts"]
    assert set(verdicts) == FORMATS
    assert all(sum(of_one.values()) == count // len(FORMATS) for of_one in verdicts.values()), verdicts
    # Neither so much damage that nothing is decoded, nor so little that all is.
    assert all(0.03 < of_one["read"] / sum(of_one.values()) < 0.7 for of_one in verdicts.values()), verdicts
    assert found["peak_mb"] < BYTES_PER_PIXEL * MAX_PIXELS / 2**20 + 10


def test_thousands_of_damaged_images_are_pixels_or_error_rows():
    assert_all_accounted_for(5600, first=0)


@pytest.mark.slow
@pytest.mark.parametrize("tenth", range(10))
def test_a_hundred_thousand_damaged_images_are_pixels_or_error_rows(tenth: int):
    assert_all_accounted_for(10_000, first=1_000_000 + tenth * 10_000)


def die_sometimes(data: bytes, *settings: object) -> Pixels:
    if data not in [original for _, original in originals()] and len(data) % 3 == 0:
        signal.raise_signal(signal.SIGSEGV)
    return decode(data, *settings)  # type: ignore[arg-type]


def raise_sometimes(data: bytes, *settings: object) -> Pixels:
    if len(data) % 3 == 0:
        raise ValueError("what nobody foresaw")
    return decode(data, *settings)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("decoder", "message"), [("die_sometimes", "exit status -11"), ("raise_sometimes", "what nobody foresaw")]
)
def test_a_worker_that_dies_or_raises_would_be_seen(decoder: str, message: str):
    with pytest.raises(AssertionError, match=message):
        decode_damaged(70, 0, f"tests.inputs.test_mutations:{decoder}")
