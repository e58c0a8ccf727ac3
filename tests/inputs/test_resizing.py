"""The reference against torchvision's preset, and the one step against the two, on photographs."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from PIL import Image

from pipeline.config import Transform
from pipeline.inputs import resizing
from pipeline.inputs.images import decode
from tests.inputs.helpers import MAX_PIXELS, WHOLE, both, differences, encode, photo, preset

sides = st.integers(1, 300)
transforms = st.builds(
    Transform,
    resize=st.none() | st.integers(1, 150),
    crop=st.none() | st.integers(1, 150),
    interpolation=st.sampled_from(["nearest", "bilinear", "bicubic", "lanczos"]),
)
# The same examples every time, and no files beside the tests.
plan = settings(derandomize=True, database=None, max_examples=150)


@plan
@given(sides, sides, transforms)
@example(500, 375, Transform())
@example(375, 501, Transform(resize=232, interpolation="bicubic"))
@example(333, 333, Transform(resize=64, crop=63))  # half a pixel on each side: rounds to even
@example(331, 333, Transform(resize=65, crop=62))
@example(100, 30, Transform(resize=31, crop=70))  # cut across, padded down, by an odd number
@example(1, 1, Transform())
@example(2, 299, Transform(resize=3, crop=None))
@example(90, 250, Transform(resize=64, crop=64, interpolation="lanczos"))
def test_reference_is_torchvision_bit_for_bit(width: int, height: int, transform: Transform) -> None:
    data = encode(photo(width, height), "PNG", compress_level=1)
    expected = preset(data, transform)
    found = decode(data, transform.model_copy(update={"decode": "reference"}), MAX_PIXELS)
    np.testing.assert_array_equal(found.array, expected)
    assert (found.width, found.height) == (width, height)


@pytest.fixture(params=["rust", "pillow"])
def library(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Resizing with the vectorised library, and with Pillow as where that has no wheel."""
    if request.param == "pillow":
        monkeypatch.setattr(resizing, "rust", None)
    elif resizing.rust is None:
        pytest.skip("cykooz.resizer has no wheel for this platform")
    return request.param


@settings(plan, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(sides, sides, transforms, st.integers(0, 4))
@example(500, 375, Transform(), 0)
@example(375, 500, Transform(interpolation="lanczos"), 1)
@example(130, 300, Transform(resize=64, crop=64, interpolation="lanczos"), 2)  # tall: Pillow goes down first
@example(33, 20, Transform(interpolation="bicubic"), 3)
def test_fast_is_within_a_level(library: str, width: int, height: int, transform: Transform, which: int) -> None:
    fast, reference = both(encode(photo(width, height, which), "PNG", compress_level=1), transform)
    found = differences(fast, reference)
    assert found.max() <= 2  # two where ties are broken differently both across and down: one value in a million
    assert (found > 1).mean() < 0.005


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic", "lanczos"])
def test_fast_is_nearly_always_equal(library: str, interpolation: str) -> None:
    """The order of the two passes is Pillow's, else a fifth of all values would be a level off."""
    transform = Transform(interpolation=interpolation)
    found = [differences(*both(encode(photo(500, 375, which), "PNG"), transform)) for which in range(5)]
    assert np.max(found) <= 1
    assert np.mean(found) < 0.02


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF", "AVIF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_is_applied(kind: str, orientation: int, library: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encode(photo(301, 200), kind, exif=exif)
    # 96 x 64 cut to 61 x 61: the cut is a pixel off the centre, so mirroring has to move it.
    for transform in (Transform(resize=64, crop=61, interpolation="lanczos"), Transform(resize=None, crop=180), WHOLE):
        fast, reference = both(data, transform)
        np.testing.assert_array_equal(reference.array, preset(data, transform))
        assert differences(fast, reference).max() <= 1
        assert (fast.width, fast.height) == ((200, 301) if orientation >= 5 else (301, 200))
