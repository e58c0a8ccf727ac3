"""Photographs that scikit-image and scikit-learn ship inside their wheels, for `resnet-batch demo --pretrained`."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from pipeline.errors import ConfigError
from pipeline.examples.tars import filling, write_tar

SHARDS = 2

# Left out are scans, drawings, micrographs, and the second picture of the motorcycle's stereo pair.
PHOTOS = {
    "skimage": [
        "data/astronaut.png",
        "data/brick.png",
        "data/camera.png",
        "data/chelsea.png",
        "data/clock_motion.png",
        "data/coffee.png",
        "data/coins.png",
        "data/grass.png",
        "data/gravel.png",
        "data/hubble_deep_field.jpg",
        "data/moon.png",
        "data/motorcycle_left.png",
        "data/retina.jpg",
        "data/rocket.jpg",
    ],
    "sklearn": ["datasets/images/china.jpg", "datasets/images/flower.jpg"],
}


def load_photos() -> list[tuple[str, bytes]]:
    """`(file name, PNG or JPEG bytes)` of 16 photographs, sorted by name; some are grey.

    Raises ConfigError where scikit-image or scikit-learn is not installed, or ships other files than it used to.
    """
    paths = [_installed(package) / name for package, names in PHOTOS.items() for name in names]
    try:
        return sorted((path.name, path.read_bytes()) for path in paths)
    except FileNotFoundError as error:
        raise ConfigError(
            f"there is no photograph {error.filename}: install a scikit-image and a scikit-learn that"
            " resnet-batch knows: pip install 'scikit-image>=0.25,<1' 'scikit-learn>=1.6,<2'."
        ) from error


def write_photo_shards(folder: Path) -> list[Path]:
    """Write `photos-*.tar` into `folder`, one member per photograph, and return their paths, sorted by name.

    Writing again leaves right files untouched.
    """
    photos = load_photos()
    paths = []
    with filling(folder):
        for number in range(SHARDS):
            path = folder / f"photos-{number:03d}.tar"
            write_tar(path, photos[number * len(photos) // SHARDS : (number + 1) * len(photos) // SHARDS])
            paths.append(path)
    return paths


def _installed(package: str) -> Path:
    """Where a package lies, without importing it: that takes a second, and only its files are wanted."""
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise ConfigError("the photographs come with two packages: pip install scikit-image scikit-learn.")
    return Path(spec.submodule_search_locations[0])
