"""Decoding on the device, by the same code on torch's CPU: the reference's pixels, and the same error rows."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
import torchvision
from PIL import Image

from pipeline.config import Input, Transform
from pipeline.errors import ConfigError, Reject
from pipeline.inputs.images import decode, encoded
from pipeline.inputs.stream import pixel_blocks
from pipeline.nvjpeg import MAX_PIXELS, DeviceDecoder, _announce, _parts, device_decoder
from pipeline.rows import Kind, Row
from tests.inputs.helpers import encode, photo

LIMIT = 10**7
TRANSFORM = Transform(decode="nvjpeg")

pytestmark = pytest.mark.filterwarnings("ignore:.*torchcodec.*:UserWarning", "ignore:.*TorchCodec.*")


def jpeg(width: int, height: int, which: int = 0, **options: Any) -> bytes:
    return encode(photo(width, height, which), "JPEG", **options)


def turned(orientation: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return jpeg(400, 300, exif=exif)


def block_of(images: list[bytes], transform: Transform) -> pa.Table:
    """All of them, and the end of their shard."""
    rows = [Row(0, Kind.SAMPLE, index, f"{index}.jpg", data) for index, data in enumerate(images)]
    rows.append(Row(0, Kind.END, len(images)))
    return pa.concat_tables(pixel_blocks(rows, transform, Input(url="in", max_pixels=LIMIT), 1000))


def decoded(images: list[bytes], transform: Transform = TRANSFORM) -> list[dict[str, Any]]:
    """The rows that a core and then the device make of them, by index."""
    block = DeviceDecoder(transform, LIMIT, device="cpu")(block_of(images, transform))
    assert Kind.ENCODED not in block["kind"].to_pylist()
    return sorted(block.to_pylist(), key=lambda row: (row["index"], row["kind"]))


@pytest.mark.parametrize(
    "data",
    [
        jpeg(500, 375),
        jpeg(375, 500, 1, progressive=True),
        jpeg(1800, 1200, 2, quality=90),
        jpeg(90, 70, 3),
        encode(photo(300, 300).convert("L"), "JPEG"),
        *(turned(orientation) for orientation in range(1, 9)),
    ],
)
@pytest.mark.parametrize(
    "transform",
    [
        TRANSFORM,
        TRANSFORM.model_copy(update={"interpolation": "bicubic"}),
        TRANSFORM.model_copy(update={"crop": None}),
        TRANSFORM.model_copy(update={"resize": 100, "crop": 120}),
        TRANSFORM.model_copy(update={"resize": None, "crop": None}),
    ],
)
def test_pixels_are_the_references(data: bytes, transform: Transform) -> None:
    row, _ = decoded([data], transform)
    expected = decode(data, transform.model_copy(update={"decode": "reference"}), LIMIT)
    assert (row["width"], row["height"]) == (expected.width, expected.height)
    found = np.frombuffer(row["pixels"], np.uint8).reshape(row["pixel_height"], row["pixel_width"], 3)
    difference = np.abs(found.astype(int) - expected.array)
    assert found.shape == expected.array.shape
    # Bicubic overshoots, and Pillow cuts that off after each of two passes.
    assert difference.max() <= (10 if transform.interpolation == "bicubic" else 2)
    assert difference.mean() < 0.25


def test_only_whole_plain_jpegs_go_to_the_device() -> None:
    whole = jpeg(300, 200)
    assert encoded(whole, TRANSFORM, LIMIT) is not None
    assert encoded(whole + bytes(7), TRANSFORM, LIMIT) is not None, "filled up with zeros"
    assert encoded(whole[: len(whole) // 2], TRANSFORM, LIMIT) is None
    assert encoded(encode(photo(300, 200), "PNG"), TRANSFORM, LIMIT) is None
    assert encoded(encode(photo(300, 200).convert("CMYK"), "JPEG"), TRANSFORM, LIMIT) is None
    with pytest.raises(Reject, match="max_pixels"):
        encoded(whole, TRANSFORM, 300 * 200 - 1)


def test_what_is_an_error_is_the_same_as_on_a_core() -> None:
    whole = jpeg(300, 200)
    middle = len(whole) // 2
    images = [
        whole,
        whole[:middle],  # cut
        whole[:middle] + b"\xff\xd9",  # cut, with an end
        whole[:middle] + bytes(range(200)) + whole[middle + 200 :],  # damaged
        whole[:300] + b"\xff\xd9",  # nothing but a header
        encode(photo(300, 200), "PNG"),
        encode(photo(300, 200).convert("CMYK"), "JPEG"),
        b"",
        b"no image",
        jpeg(4000, 2600),  # beyond the limit
        whole,
    ]
    told = [(row["index"], row["kind"], row["stage"], row["error"], row["bytes_sha256"]) for row in decoded(images)]
    fast = block_of(images, Transform(decode="fast")).to_pylist()
    assert told == sorted(
        ((row["index"], row["kind"], row["stage"], row["error"], row["bytes_sha256"]) for row in fast),
        key=lambda row: row[:2],
    )
    assert {Kind.SAMPLE, Kind.ERROR, Kind.END} == {row[1] for row in told}


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("nvjpeg failed"),
        torch.OutOfMemoryError("too little"),
        torch.AcceleratorError("CUDA error: out of memory"),
    ],
)
def test_what_the_device_does_not_read_a_core_does(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, error: Exception
) -> None:
    """And only that: the others of its batch stay with the device. It is said once."""
    _announce.cache_clear()
    images = [jpeg(60 + number, 50) for number in range(9)]
    refused = torch.frombuffer(bytearray(images[4]), dtype=torch.uint8)
    alone: list[int] = []
    real = torchvision.io.decode_jpeg

    def decode_jpeg(given: list[torch.Tensor], *args: Any, **options: Any) -> Any:
        if any(torch.equal(one, refused) for one in given):
            raise error
        alone.append(len(given))
        return real(given, *args, **options)

    monkeypatch.setattr(torchvision.io, "decode_jpeg", decode_jpeg)
    rows = decoded(images)
    assert [row["kind"] for row in rows] == [Kind.SAMPLE] * 9 + [Kind.END]
    assert [row["width"] for row in rows[:9]] == [60 + number for number in range(9)]
    assert sum(alone) == 8
    decoded(images)
    (said,) = caplog.messages
    assert str(error) in said


def test_an_image_of_another_size_than_its_header_says_is_for_a_core(monkeypatch: pytest.MonkeyPatch) -> None:
    """By that the limits were checked."""
    _announce.cache_clear()
    real = torchvision.io.decode_jpeg
    monkeypatch.setattr(torchvision.io, "decode_jpeg", lambda *a, **o: [one[:, :-1] for one in real(*a, **o)])
    (row, _) = decoded([jpeg(60, 50)])
    assert (row["kind"], row["width"], row["height"]) == (Kind.SAMPLE, 60, 50)


def test_after_an_error_that_lasts_nothing_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    def decode_jpeg(*_: Any, **__: Any) -> Any:
        raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(torchvision.io, "decode_jpeg", decode_jpeg)
    with pytest.raises(torch.AcceleratorError):
        decoded([jpeg(60, 50), jpeg(60, 50)])


def test_jpegs_without_luminance_are_for_a_core() -> None:
    """nvJPEG documents YCbCr alone for three channels. Whether a marker says so or the names of the components."""
    coded = encode(photo(60, 50), "JPEG", keep_rgb=True)
    adobe = coded.index(b"\xff\xee")
    unmarked = coded[:adobe] + coded[adobe + 2 + int.from_bytes(coded[adobe + 2 : adobe + 4], "big") :]
    for data in (coded, unmarked):
        assert encoded(data, TRANSFORM, LIMIT) is None
        (row, _) = decoded([data])
        assert row["kind"] == Kind.SAMPLE
    assert encoded(jpeg(60, 50), TRANSFORM, LIMIT) is not None


def test_images_are_decoded_together_up_to_a_limit() -> None:
    sizes = np.array([MAX_PIXELS // 2, MAX_PIXELS // 2, 1, MAX_PIXELS * 3, 5, 5])
    assert list(_parts(sizes)) == [slice(0, 2), slice(2, 3), slice(3, 4), slice(4, 6)]


def test_it_is_refused_where_it_can_not_be() -> None:
    assert device_decoder(Transform(), LIMIT, "cpu") is None
    assert device_decoder(TRANSFORM, LIMIT, "cuda") == DeviceDecoder(TRANSFORM, LIMIT, "cuda")
    with pytest.raises(ConfigError, match=r"transform\.decode: nvjpeg needs a GPU"):
        device_decoder(TRANSFORM, LIMIT, "cpu")
    with pytest.raises(ConfigError, match="lanczos"):
        device_decoder(TRANSFORM.model_copy(update={"interpolation": "lanczos"}), LIMIT, "cuda")
