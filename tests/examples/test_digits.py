"""The demo's digits, shards, network and checkpoint. The accuracy here is the reference's: plain torch and Pillow."""

from __future__ import annotations

import io
import subprocess
import sys
import tarfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline.examples import digits as digits_module
from pipeline.examples.digits import Digits, encode_png, load_digits_images, write_shards

CHECKPOINT = Path(digits_module.__file__).with_name("digits_resnet20.safetensors")


@pytest.fixture(scope="module")
def digits() -> Digits:
    return load_digits_images()


def members(paths: list[Path]) -> list[tuple[str, bytes]]:
    found = []
    for path in paths:
        with tarfile.open(path) as tar:
            found += [(member.name, tar.extractfile(member).read()) for member in tar]
    return found


def test_digits_are_scikit_learns_with_16_levels_over_the_whole_byte(digits):
    from sklearn.datasets import load_digits

    assert digits.images.shape == (1797, 8, 8)
    assert digits.images.dtype == np.uint8
    assert np.array_equal(np.round(digits.images / 255 * 16), load_digits().images)
    assert digits.images.max() == 255
    assert np.array_equal(digits.labels, load_digits().target)
    assert len(set(digits.keys)) == 1797


def test_split_is_fixed_and_holds_every_digit_on_both_sides(digits):
    assert digits.held_out.sum() == 450
    # A split that moves would put images that the checkpoint was trained on into the held-out part.
    assert np.flatnonzero(digits.held_out)[:8].tolist() == [1, 18, 19, 24, 28, 30, 31, 36]
    assert min(Counter(digits.labels[digits.held_out].tolist()).values()) >= 30
    assert set(digits.labels[~digits.held_out].tolist()) == set(range(10))


def test_png_keeps_the_pixels(digits):
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(encode_png(digits.images[7])))), digits.images[7])


def test_shards_hold_every_digit_once_in_its_part(digits, tmp_path):
    paths = write_shards(tmp_path)
    assert sorted(tmp_path.iterdir()) == paths
    assert len(paths) == 8
    for part, chosen in (("held-out", digits.held_out), ("train", ~digits.held_out)):
        found = members([path for path in paths if path.name.startswith(f"digits-{part}-")])
        expected = []
        for row in np.flatnonzero(chosen):
            expected.append((f"{digits.keys[row]}.png", encode_png(digits.images[row])))
            expected.append((f"{digits.keys[row]}.cls", str(digits.labels[row]).encode()))
        assert found == expected


def test_shards_are_the_same_bytes_wherever_they_are_written(tmp_path):
    first, second = write_shards(tmp_path / "a"), write_shards(tmp_path / "b")
    assert [path.name for path in first] == [path.name for path in second]
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in second]
    for path in first:
        with tarfile.open(path) as tar:
            assert {(m.mtime, m.uid, m.gid, m.uname, m.gname) for m in tar} == {(0, 0, 0, "", "")}


def test_writing_again_touches_only_what_is_wrong(tmp_path):
    paths = write_shards(tmp_path)
    right = paths[0].read_bytes()
    paths[0].write_bytes(right[:-1] + b"x")
    before = {path: (path.stat().st_mtime_ns, path.stat().st_ino) for path in paths}
    write_shards(tmp_path)
    after = {path: (path.stat().st_mtime_ns, path.stat().st_ino) for path in paths}
    assert [path for path in paths if before[path] != after[path]] == [paths[0]]
    assert paths[0].read_bytes() == right
    assert sorted(tmp_path.iterdir()) == paths


def test_digits_come_without_torch(tmp_path):
    code = (
        "import sys; from pathlib import Path; from pipeline.examples import digits, grid, photos;"
        f"digits.write_shards(Path({str(tmp_path)!r})); photos.load_photos();"
        "sys.exit('torch' in sys.modules or 'ray' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_network_has_the_papers_layers():
    from torch import nn

    from pipeline.examples.network import digits_resnet20

    network = digits_resnet20()
    weighted = {n: m for n, m in network.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)}
    projections = {n: m for n, m in weighted.items() if "downsample" in n}
    layers = [m for n, m in weighted.items() if n not in projections]
    widths = [m.out_channels for m in layers if isinstance(m, nn.Conv2d)]
    assert len(layers) == 20
    assert widths == [16] * 7 + [32] * 6 + [64] * 6
    assert [(m.kernel_size, m.stride) for m in projections.values()] == [((1, 1), (2, 2))] * 2
    assert not any(isinstance(m, nn.MaxPool2d) for m in network.modules())
    assert digits_resnet20(num_classes=7).fc.out_features == 7


def test_checkpoint_is_small_and_right_on_the_held_out_part(digits):
    import torch
    from safetensors.torch import load_file

    from pipeline.examples.network import digits_resnet20

    assert CHECKPOINT.stat().st_size <= 1_500_000
    state = load_file(CHECKPOINT)
    assert {t.dtype for name, t in state.items() if not name.endswith("num_batches_tracked")} == {torch.float32}
    network = digits_resnet20().eval()
    network.load_state_dict(state)
    rows = []
    for image in digits.images[digits.held_out]:
        picture = Image.open(io.BytesIO(encode_png(image))).convert("RGB")
        rows.append(np.asarray(picture.resize((32, 32), Image.Resampling.BILINEAR)))
    inputs = torch.from_numpy(np.stack(rows)).permute(0, 3, 1, 2).float() / 255
    with torch.inference_mode():
        predicted = network((inputs - 0.5) / 0.5).argmax(dim=1).numpy()
    assert (predicted == digits.labels[digits.held_out]).mean() >= 0.97
