"""A few images in this process: the same numbers as plain torch, whatever form an image comes in."""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import pipeline
from pipeline.config import make_config
from pipeline.errors import ConfigError, NotFound, SourceChanged
from pipeline.examples.digits import encode_png, load_digits_images
from pipeline.examples.network import digits_resnet20
from pipeline.inputs.shards import discover
from pipeline.local import predict_rows
from pipeline.model.spec import make_spec
from pipeline.storage import Store
from tests.support.jobs import BROKEN, WEIGHTS, digits_config, digits_tars

NUMBER = 12


@pytest.fixture(scope="module")
def config() -> dict[str, Any]:
    """Without input and output: they say nothing here."""
    found = digits_config("unused", "unused", output={"embedding_dtype": "float32"})
    del found["input"], found["output"]["url"]
    return found | {"output": {"url": "unused", "embedding_dtype": "float32"}}


@pytest.fixture(scope="module")
def pngs() -> list[bytes]:
    return [encode_png(image) for image in load_digits_images().images[:NUMBER]]


@pytest.fixture(scope="module")
def images(pngs: list[bytes]) -> list[Image.Image]:
    return [Image.open(io.BytesIO(png)) for png in pngs]


@pytest.fixture(scope="module")
def reference() -> torch.nn.Module:
    network = digits_resnet20(10)
    network.load_state_dict(load_file(WEIGHTS))
    return network.eval()


@torch.inference_mode()
def by_torch(network: torch.nn.Module, image: Image.Image) -> tuple[np.ndarray, np.ndarray]:
    """Scores (10,) and embedding (64,) as plain torch computes them in float32, one image at a time."""
    pixels = np.asarray(image.convert("RGB").resize((32, 32), Image.Resampling.BILINEAR), np.float32)
    batch = (torch.from_numpy(pixels).permute(2, 0, 1)[None] / 255 - 0.5) / 0.5
    body = torch.nn.Sequential(*list(network.children())[:-1])
    return torch.softmax(network(batch), 1)[0].numpy(), body(batch)[0].numpy()


def assert_same(row: dict[str, Any], network: torch.nn.Module, image: Image.Image) -> None:
    scores, embedding = by_torch(network, image)
    assert row["class_id"] == scores.argmax()
    assert row["score"] == pytest.approx(scores.max(), abs=2e-3)
    assert np.abs(np.asarray(row["embedding"]) - embedding).max() <= 0.02 * np.abs(embedding).max()


# --- Numbers -------------------------------------------------------------------------------------------------------


def test_the_numbers_are_plain_torchs(
    config: dict[str, Any], pngs: list[bytes], images: list[Image.Image], reference: torch.nn.Module
):
    exact = config | {"model": config["model"] | {"transform": config["model"]["transform"] | {"decode": "reference"}}}
    rows = pipeline.predict(pngs, exact).to_pylist()
    expected = [by_torch(reference, image) for image in images]
    assert len({int(scores.argmax()) for scores, _ in expected}) >= 8, "the reference tells digits apart"
    for row, (scores, embedding) in zip(rows, expected, strict=True):
        assert row["class_id"] == scores.argmax()
        assert [entry["score"] for entry in row["top_k"]] == pytest.approx(np.sort(scores)[:-6:-1], abs=1e-5)
        np.testing.assert_allclose(row["embedding"], embedding, rtol=1e-4, atol=1e-5)


def test_one_image_gives_the_numbers_of_many(config: dict[str, Any], pngs: list[bytes]):
    many = pipeline.predict(pngs, config)
    for number in (0, NUMBER - 1):
        one = pipeline.predict(pngs[number], config)
        assert one.num_rows == 1
        row, same = one.to_pylist()[0], many.to_pylist()[number]
        assert row["class_id"] == same["class_id"]
        np.testing.assert_allclose(row["embedding"], same["embedding"], rtol=1e-4, atol=1e-5)


# --- Forms of an image ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "HSV"])
def test_a_pillow_image_of_any_mode_means_its_rgb(
    mode: str, config: dict[str, Any], images: list[Image.Image], reference: torch.nn.Module
):
    image = images[3].convert(mode)
    (row,) = pipeline.predict(image, config).to_pylist()
    assert_same(row, reference, image)
    assert (row["width"], row["height"], row["error"]) == (8, 8, None)


def test_sixteen_bit_grey_is_scaled_as_in_a_file(
    config: dict[str, Any], images: list[Image.Image], reference: torch.nn.Module
):
    wide = Image.fromarray(np.asarray(images[3], np.uint16) * 257)
    assert wide.mode == "I;16"
    (row,) = pipeline.predict(wide, config).to_pylist()
    assert_same(row, reference, images[3])


def as_file_and_as_image(data: bytes, config: dict[str, Any]) -> None:
    """Both ways give the same row."""
    file, opened = pipeline.predict([data, Image.open(io.BytesIO(data))], config).to_pylist()
    assert file["error"] is None
    assert {**opened, "key": "0", "index": 0} == file


def test_deep_grey_of_a_file_that_is_opened(config: dict[str, Any], images: list[Image.Image]):
    """Big-endian, of 12 bits, and with white as zero."""
    grey = np.asarray(images[3].convert("L"), np.uint16)
    as_file_and_as_image(saved(Image.fromarray((grey * 257).astype(">u2")), "TIFF"), config)
    as_file_and_as_image(saved(Image.fromarray(grey * 16), "TIFF", tiffinfo={258: 12}), config)
    as_file_and_as_image(saved(Image.fromarray(65535 - grey * 257), "TIFF", tiffinfo={262: 0}), config)


def saved(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def test_what_surrounds_the_pixels_of_an_opened_file_says_nothing(config: dict[str, Any], images: list[Image.Image]):
    for exif in (b"broken", b"II*\0"):
        as_file_and_as_image(saved(images[3], "PNG", exif=exif), config)
    profile = np.random.default_rng(0).bytes(2**21)
    as_file_and_as_image(saved(images[3].convert("RGB"), "TIFF", icc_profile=profile), config)


def test_a_path_that_is_not_utf8(config: dict[str, Any], pngs: list[bytes], tmp_path: Path):
    path = tmp_path / os.fsdecode(b"caf\xe9.png")
    path.write_bytes(pngs[0])
    (row,) = pipeline.predict(path, config).to_pylist()
    assert row["key"] == f"{tmp_path}/caf\\udce9.png"
    assert row["error"] is None


def test_a_rotated_photograph_is_turned_as_in_a_file(config: dict[str, Any], images: list[Image.Image]):
    buffer = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6
    images[2].resize((32, 24)).save(buffer, "JPEG", exif=exif, quality=100)
    (file,) = pipeline.predict(buffer.getvalue(), config).to_pylist()
    (opened,) = pipeline.predict(Image.open(buffer), config).to_pylist()
    assert (file["width"], file["height"]) == (opened["width"], opened["height"]) == (24, 32)
    assert file["class_id"] == opened["class_id"]
    np.testing.assert_allclose(file["embedding"], opened["embedding"], atol=0.05)


@pytest.mark.parametrize("mode", ["F", "I"])
def test_pixels_without_a_known_white_are_an_error_row(mode: str, config: dict[str, Any], images: list[Image.Image]):
    (row,) = pipeline.predict(images[3].convert(mode), config).to_pylist()
    assert (row["error"], row["class_id"]) == ("unsupported_mode", None)


def test_paths_bytes_arrays_and_a_broken_one_side_by_side(
    config: dict[str, Any], pngs: list[bytes], images: list[Image.Image], reference: torch.nn.Module, tmp_path: Path
):
    path = tmp_path / "digit.png"
    path.write_bytes(pngs[0])
    given = [
        path,
        str(path),
        pngs[1],
        bytearray(pngs[2]),
        BROKEN,
        np.asarray(images[4]),
        np.asarray(images[5].convert("RGB")),
    ]
    table = pipeline.predict(given, config)
    rows = table.to_pylist()
    assert table["index"].to_pylist() == list(range(7))
    assert table["key"].to_pylist() == [str(path), str(path), "2", "3", "4", "5", "6"]
    for number, digit in enumerate([0, 0, 1, 2, None, 4, 5]):
        if digit is not None:
            assert_same(rows[number], reference, images[digit])
            assert rows[number]["error"] is None
    assert rows[4]["error"] in {"corrupt", "truncated", "not_an_image"}
    assert rows[4]["message"]
    assert rows[4]["class_id"] is rows[4]["embedding"] is rows[4]["width"] is None


def test_a_file_that_pillow_opened_and_cannot_read_is_an_error_row(config: dict[str, Any], pngs: list[bytes]):
    buffer = io.BytesIO()
    Image.open(io.BytesIO(pngs[0])).resize((300, 300)).save(buffer, "JPEG")
    lazy = Image.open(io.BytesIO(buffer.getvalue()[: len(buffer.getvalue()) // 2]))
    rows = pipeline.predict([lazy, pngs[0]], config).to_pylist()
    assert rows[0]["error"] == "corrupt"
    assert "truncated" in rows[0]["message"]
    assert rows[1]["error"] is None


def test_an_avif_that_pillow_opened_and_cannot_read_is_an_error_row(config: dict[str, Any], images: list[Image.Image]):
    """Here Pillow raises a RuntimeError."""
    data = bytearray(saved(images[0].convert("RGB").resize((64, 64)), "AVIF"))
    begin = data.index(b"mdat") + 20
    data[begin:] = b"\xff" * (len(data) - begin)
    opened, read = pipeline.predict([Image.open(io.BytesIO(data)), bytes(data)], config).to_pylist()
    assert (opened["error"], opened["message"]) == (read["error"], read["message"])
    assert opened["error"] == "corrupt"


def test_several_are_anything_that_gives_images(config: dict[str, Any], pngs: list[bytes], images: list[Image.Image]):
    expected = pipeline.predict(pngs[:3], config)["class_id"].to_pylist()
    arrays = np.stack([np.asarray(image.convert("RGB")) for image in images[:3]])
    assert pipeline.predict((png for png in pngs[:3]), config)["class_id"].to_pylist() == expected
    assert pipeline.predict(tuple(images[:3]), config)["class_id"].to_pylist() == expected
    assert pipeline.predict(arrays, config)["class_id"].to_pylist() == expected
    assert pipeline.predict(arrays[0], config)["class_id"].to_pylist() == expected[:1]
    assert pipeline.predict([], config).num_rows == 0


@pytest.mark.parametrize(
    "wrong",
    [
        np.zeros((8, 8, 3), np.float32),
        np.zeros((8, 8, 4), np.uint8),
        np.zeros((0, 8, 3), np.uint8),
        np.zeros(3, np.uint8),
    ],
)
def test_an_array_of_another_kind_is_refused(wrong: np.ndarray, config: dict[str, Any]):
    with pytest.raises(ConfigError, match=r"an image array is uint8 \(H, W, 3\) or \(H, W\); got "):
        pipeline.predict(wrong, config)


def test_what_is_no_image_is_refused(config: dict[str, Any], tmp_path: Path):
    with pytest.raises(ConfigError, match="got int"):
        pipeline.predict([3], config)
    with pytest.raises(ConfigError, match="got NoneType"):
        pipeline.predict(None, config)
    with pytest.raises(NotFound, match=r"nope\.png"):
        pipeline.predict(tmp_path / "nope.png", config)


# --- Results -------------------------------------------------------------------------------------------------------


def test_the_columns_are_those_that_the_output_asks_for(config: dict[str, Any], pngs: list[bytes]):
    ends = ["width", "height", "error", "message"]
    config = config | {"runtime": {"engine": "noop"}}
    default = {name: section for name, section in config.items() if name not in ("input", "output")}
    labels = ["class_id", "label", "score", "top_k"]
    assert pipeline.predict(pngs[0], default).column_names == ["key", "index", *labels, "embedding", *ends]
    without = config | {"output": {"url": "x", "predictions": False}}
    assert pipeline.predict(pngs[0], without).column_names == ["key", "index", "embedding", *ends]
    small = config | {"output": {"url": "x", "embeddings": False, "top_k": 2}}
    table = pipeline.predict(pngs[0], small)
    assert table.column_names == ["key", "index", *labels, *ends]
    assert len(table["top_k"][0]) == 2


def test_class_names_are_used(config: dict[str, Any], pngs: list[bytes]):
    names = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
    named = config | {"model": config["model"] | {"classes": names}}
    table = pipeline.predict(pngs[:3], named)
    assert table["label"].to_pylist() == [names[number] for number in table["class_id"].to_pylist()]


def test_it_opens_in_pandas(config: dict[str, Any], pngs: list[bytes]):
    frame = pipeline.predict(pngs[:2], config).to_pandas()
    assert len(frame) == 2
    assert np.stack(frame["embedding"]).shape == (2, 64)


def test_the_network_is_loaded_once_for_calls_of_one_kind(
    config: dict[str, Any], pngs: list[bytes], monkeypatch: pytest.MonkeyPatch
):
    pipeline.predict(pngs[:3], config)
    monkeypatch.setattr("pipeline.model.predictor.ResNetPredictor.__init__", lambda *_: pytest.fail("loaded again"))
    pipeline.predict(pngs[:8], config)


# --- Samples of an input -------------------------------------------------------------------------------------------


def test_a_preview_runs_across_shards_and_writes_nothing(tmp_path: Path):
    digits_tars(tmp_path / "shards", 2, 5, broken=[1])
    config = digits_config(tmp_path / "shards", tmp_path / "labels")
    table = pipeline.preview(config, 7)
    assert not (tmp_path / "labels").exists()
    shards = [url.rpartition("/")[2] for url in table["shard"].to_pylist()]
    assert sorted(zip(shards, table["index"].to_pylist(), strict=True)) == [
        *(("digits-000.tar", index) for index in range(5)),
        *(("digits-001.tar", index) for index in range(2)),
    ]
    assert sum(error is not None for error in table["error"].to_pylist()) == 2
    assert pipeline.preview(config, 100).num_rows == 10


def test_rows_are_computed_again_from_the_places_that_were_asked_for(tmp_path: Path):
    digits_tars(tmp_path / "shards", 2, 5)
    config = make_config(digits_config(tmp_path / "shards", tmp_path / "labels"))
    first, second = discover(config.input, Store())
    table = predict_rows([(second, {0, 4}), (first, {2})], config, make_spec(config))
    got = {(row["shard"], row["index"]): row for row in table.to_pylist()}
    assert set(got) == {(second.url, 0), (second.url, 4), (first.url, 2)}
    whole = {(row["shard"], row["index"]): row for row in pipeline.preview(config, 10).to_pylist()}
    for place, row in got.items():
        assert (row["key"], row["class_id"]) == (whole[place]["key"], whole[place]["class_id"])


def test_a_shard_that_goes_meanwhile_is_an_error_and_not_fewer_rows(tmp_path: Path):
    (path,) = digits_tars(tmp_path / "shards", 1, 5)
    config = make_config(digits_config(tmp_path / "shards", tmp_path / "labels"))
    shards = discover(config.input, Store())
    path.unlink()
    with pytest.raises(SourceChanged):
        predict_rows([(shards[0], {0})], config, make_spec(config))


def test_an_empty_table_has_its_columns(config: dict[str, Any]):
    table = pipeline.predict([], config)
    assert table.schema.field("class_id").type == pa.int32()
