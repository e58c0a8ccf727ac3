"""The 1,797 handwritten digits that scikit-learn ships, split for training and testing, and as WebDataset shards.

Alpaydin and Kaynak, "Optical Recognition of Handwritten Digits" (1998), UCI Machine Learning Repository.
"""

from __future__ import annotations

import hashlib
import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

from pipeline.errors import ConfigError
from pipeline.examples.tars import filling, write_tar

CHECKPOINT = Path(__file__).with_name("digits_resnet20.safetensors")  # of the ResNet-20 in network.py
HELD_OUT = 450
TRAIN_SHARDS = 6
HELD_OUT_SHARDS = 2


@dataclass(frozen=True)
class Digits:
    """Row i of every field is digit i, in scikit-learn's order."""

    keys: list[str]  # digit-0000 ...
    images: npt.NDArray[np.uint8]  # (N, 8, 8) grey, ink bright on black
    labels: npt.NDArray[np.int64]  # (N,) 0..9
    held_out: npt.NDArray[np.bool_]  # (N,) never trained on


def load_digits_images() -> Digits:
    """The digits, their 17 grey levels 0..16 spread evenly over 0..255 (level 16 is 255; rounded to nearest).

    The held-out part is the 450 digits whose keys have the smallest sha256: a choice that looks at no image and
    is the same with every version of every library. Digits by one writer may be in both parts.
    Raises ConfigError where scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ConfigError("the demo's digits come with scikit-learn: pip install scikit-learn.") from error
    source = load_digits()
    keys = [f"digit-{number:04d}" for number in range(len(source.target))]
    hashes = [hashlib.sha256(key.encode()).hexdigest() for key in keys]
    levels = source.images.astype(np.int64)
    return Digits(
        keys=keys,
        images=((levels * 255 + 8) // 16).astype(np.uint8),
        labels=source.target.astype(np.int64),
        held_out=np.array(hashes) < sorted(hashes)[HELD_OUT],
    )


def encode_png(image: npt.NDArray[np.uint8]) -> bytes:
    """PNG file of uint8 pixels (H, W) or (H, W, 3)."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format="PNG")
    return buffer.getvalue()


def write_shards(folder: Path) -> list[Path]:
    """Write `digits-train-*.tar` and `digits-held-out-*.tar` into `folder` and return their paths, sorted by name.

    Every sample is `<key>.png` with its true digit in `<key>.cls`. Writing again leaves right files untouched.
    """
    digits = load_digits_images()
    paths = []
    with filling(folder):
        for part, chosen, count in (
            ("held-out", digits.held_out, HELD_OUT_SHARDS),
            ("train", ~digits.held_out, TRAIN_SHARDS),
        ):
            for number, rows in enumerate(np.array_split(np.flatnonzero(chosen), count)):
                path = folder / f"digits-{part}-{number:03d}.tar"
                write_tar(path, [member for row in rows for member in _sample(digits, row)])
                paths.append(path)
    return paths


def _sample(digits: Digits, row: int) -> list[tuple[str, bytes]]:
    key = digits.keys[row]
    return [(f"{key}.png", encode_png(digits.images[row])), (f"{key}.cls", str(digits.labels[row]).encode())]
