"""The photographs inside the installed wheels."""

from __future__ import annotations

import io
import tarfile

import pytest
from PIL import Image

from pipeline.errors import ConfigError
from pipeline.examples import photos
from pipeline.examples.photos import load_photos, write_photo_shards


def test_every_photograph_opens_and_some_are_grey():
    found = load_photos()
    assert [name for name, _ in found] == sorted({name for name, _ in found})
    assert {"astronaut.png", "coffee.png", "china.jpg", "flower.jpg"} <= {name for name, _ in found}
    modes = set()
    for _, data in found:
        with Image.open(io.BytesIO(data)) as image:
            image.load()
            assert min(image.size) >= 224
            modes.add(image.mode)
    assert modes == {"RGB", "L"}


def test_shards_hold_each_photograph_once_and_stay_untouched(tmp_path):
    paths = write_photo_shards(tmp_path)
    before = [path.stat().st_mtime_ns for path in paths]
    found = []
    for path in paths:
        with tarfile.open(path) as tar:
            found += [(member.name, tar.extractfile(member).read()) for member in tar]
    assert found == load_photos()
    assert write_photo_shards(tmp_path) == paths
    assert [path.stat().st_mtime_ns for path in paths] == before


@pytest.mark.parametrize("missing", [{"no_such_package": ["a.png"]}, {"sklearn": ["no_such.png"]}])
def test_what_is_not_installed_is_named_with_the_remedy(monkeypatch, missing):
    monkeypatch.setattr(photos, "PHOTOS", missing)
    with pytest.raises(ConfigError, match="pip install .*scikit-image.* .*scikit-learn"):
        load_photos()
