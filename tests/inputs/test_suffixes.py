"""No image is passed over in silence: whatever has an image's suffix ends as a row or as an error row."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.backends import FileInfo
from pipeline.config import Transform
from pipeline.errors import Reject
from pipeline.inputs import heif
from pipeline.inputs.images import decode
from pipeline.inputs.shards import IMAGE_SUFFIXES, group_files
from tests.inputs.discovery import found, names, paths, touch
from tests.inputs.helpers import MAX_PIXELS, encode, photo
from tests.inputs.reading import samples
from tests.support.tars import tar

PHOTO = photo(60, 40)
JPEG = encode(PHOTO, "JPEG")
heif.opener()  # so that Pillow writes HEIC
HEIC = encode(PHOTO, "HEIF")
JPEG_2000 = b"\x00\x00\x00\x0cjP  \r\n\x87\n" + bytes(100)
CODESTREAM = b"\xff\x4f\xff\x51\0\x29" + bytes(100)
PSD = b"8BPS\0\1" + bytes(100)
SVG = b'<svg xmlns="http://www.w3.org/2000/svg"/>'

# What a file of that suffix holds, and the error class that it ends as; "" for pixels.
WHOLE = {
    **dict.fromkeys(("jpg", "jpeg", "jpe", "jfif"), (JPEG, "")),
    "mpo": (encode(PHOTO, "MPO", save_all=True, append_images=[photo(60, 40, 1)]), ""),
    "png": (encode(PHOTO, "PNG"), ""),
    "apng": (encode(PHOTO, "PNG", save_all=True, append_images=[photo(60, 40, 1)]), ""),
    "gif": (encode(PHOTO, "GIF"), ""),
    "webp": (encode(PHOTO, "WEBP"), ""),
    "bmp": (encode(PHOTO, "BMP"), ""),
    **{suffix: (encode(PHOTO, "TIFF"), "") for suffix in ("tif", "tiff")},
    "avif": (encode(PHOTO, "AVIF"), ""),
    "avifs": (encode(PHOTO, "AVIF", save_all=True, append_images=[photo(60, 40, 1)]), ""),
    **dict.fromkeys(("heic", "heics", "heif", "heifs", "hif"), (HEIC, "")),
    "jxl": (b"\xff\x0a" + bytes(100), "unsupported_format"),
    **dict.fromkeys(("jp2", "jpf", "jpx", "jpm"), (JPEG_2000, "unsupported_format")),
    **dict.fromkeys(("j2k", "j2c", "jpc"), (CODESTREAM, "unsupported_format")),
    **{suffix: (encode(PHOTO, "PPM"), "not_an_image") for suffix in ("ppm", "pnm")},
    "pgm": (encode(PHOTO.convert("L"), "PPM"), "not_an_image"),
    "pbm": (encode(PHOTO.convert("1"), "PPM"), "not_an_image"),
    "pam": (b"P7\nWIDTH 1\nHEIGHT 1\nDEPTH 1\nMAXVAL 255\nENDHDR\n\0", "not_an_image"),
    "dib": (encode(PHOTO, "DIB"), "not_an_image"),
    "ico": (encode(PHOTO, "ICO"), "unsupported_format"),
    "tga": (encode(PHOTO, "TGA"), "not_an_image"),
    **dict.fromkeys(("psd", "psb"), (PSD, "unsupported_format")),
    "eps": (encode(PHOTO, "EPS"), "unsupported_format"),
    "svg": (SVG, "not_an_image"),
}


def outcome(data: bytes | None) -> str:
    """The error class of these bytes, "" for pixels."""
    assert data is not None
    try:
        decode(data, Transform(), MAX_PIXELS)
    except Reject as reject:
        return reject.error
    return ""


def test_the_table_has_every_suffix() -> None:
    assert {f".{suffix}" for suffix in WHOLE} == set(IMAGE_SUFFIXES)


@pytest.mark.parametrize("suffix", WHOLE)
def test_an_image_of_every_suffix_ends_as_a_row_or_an_error_row(suffix: str, tmp_path: Path) -> None:
    data, error = WHOLE[suffix]
    (tmp_path / "loose").mkdir()
    (tmp_path / f"loose/a.{suffix}").write_bytes(data)
    (tmp_path / f"loose/B.{suffix.upper()}").write_bytes(data)
    (tmp_path / "a.tar").write_bytes(tar((f"a.{suffix}", data), (f"_b.{suffix.upper()}", data)))
    for place, keys in (("loose", [f"B.{suffix.upper()}", f"a.{suffix}"]), ("a.tar", ["a", "_b"])):
        rows = samples(tmp_path / place)
        assert [row.key for row in rows] == keys
        assert [outcome(row.data) for row in rows] == [error, error]


# --- names that begin with `_` ---


def test_an_image_may_have_a_name_that_begins_with_an_underscore(tmp_path: Path) -> None:
    touch(tmp_path, "_MG_1234.JPG", "trip/_DSC0001.png", "__x.jpg", "_.jpg", "a.jpg")
    expected = ["_.jpg", "_MG_1234.JPG", "__x.jpg", "a.jpg", "trip/_DSC0001.png"]
    for how in ("auto", "files"):
        assert paths(found(tmp_path, format=how)) == expected
        assert paths(found(tmp_path / "**", format=how)) == expected
    assert paths(found(tmp_path / "**/*.jpg")) == ["_.jpg", "__x.jpg", "a.jpg"]
    assert paths(found(tmp_path / "_MG_1234.JPG")) == ["_MG_1234.JPG"]


def test_other_names_that_begin_so_are_writers_leftovers(tmp_path: Path) -> None:
    touch(tmp_path, "a.jpg", "_a.tar", "_b.parquet", "_SUCCESS", "_c.txt", "_temporary/d.jpg", "x/_y/z/e.jpg")
    touch(tmp_path, ".f.jpg", "._MG_1.JPG", ".g/h.jpg", "._i/j.jpg", "b.tar")
    shards = found(tmp_path)
    assert names(shards) == {"b.tar", f"{tmp_path.name}#"}
    assert paths(shards) == ["a.jpg"]
    assert paths(found(tmp_path / "**", format="files")) == ["a.jpg", "b.tar"], "a pattern takes whatever it matches"
    touch(tmp_path, "_k.jpg")
    assert names(found(tmp_path / "**", format="webdataset")) == {"a.jpg", "b.tar"}, "to be read as a tar, it is none"


def test_a_folder_or_a_dot_that_the_url_spells_is_meant(tmp_path: Path) -> None:
    touch(tmp_path, "_raw/_a.jpg", "_raw/_in/b.jpg", ".c.jpg", "_d.jpg")
    assert paths(found(tmp_path / "_raw")) == ["_a.jpg"]
    assert paths(found(tmp_path / "_raw/*")) == ["_a.jpg"]
    assert paths(found(tmp_path / ".*.jpg")) == [".c.jpg"]


def test_groups_of_other_files_are_what_they_always_were() -> None:
    """Their ids and fingerprints are in every dataset: another one would be done again."""
    files = [FileInfo(f"s3://b/raw/{number:03}.jpg", number, "v") for number in range(60)]
    groups = list(group_files("s3://b/raw", files, 20))
    assert [(group.id, group.fingerprint, len(group.members)) for group in groups] == [
        ("raw-ba598dc5f12800cc", "231aa7177e6adc75", 1),
        ("raw001.jpg-1eadec963fbb9edf", "0eacfdf798760585", 36),
        ("raw037.jpg-ab96bfd07ebab655", "8609f7e84f2f45ac", 23),
    ]
