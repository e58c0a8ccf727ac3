"""The rows of a run against plain torchvision: Pillow's decode, the weights' preset, an fp32 eager network."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.models import ResNet18_Weights, resnet18

import pipeline
from pipeline.examples.photos import load_photos
from pipeline.examples.tars import write_tar
from tests.model.helpers import discriminating_state
from tests.support.jobs import rows

pytestmark = pytest.mark.usefixtures("ray_cluster")
Encoded = list[tuple[str, bytes]]


def encoded_photographs() -> Iterator[tuple[str, bytes]]:
    """Photographs cut, made smaller and larger, and encoded anew: sizes from 96 to 1,400 pixels, four formats."""
    rng = np.random.default_rng(7)
    for name, data in load_photos():
        whole = Image.open(io.BytesIO(data)).convert("RGB")
        for number in range(7):
            side = int(rng.integers(90, min(whole.size) + 1))
            left, top = (int(rng.integers(0, extent - side + 1)) for extent in whole.size)
            cut = whole.crop((left, top, left + side, top + side))
            width, height = (int(rng.integers(96, 1400)) for _ in range(2))
            kind, options = [
                ("JPEG", {"quality": 90}),
                ("PNG", {"compress_level": 1}),
                ("WEBP", {"quality": 90}),
                ("JPEG", {}),
            ][number % 4]
            buffer = io.BytesIO()
            cut.resize((width, height), Image.Resampling.BICUBIC).save(buffer, kind, **options)
            yield f"{name.partition('.')[0]}-{number}.{kind.lower()}", buffer.getvalue()


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Encoded]:
    folder = tmp_path_factory.mktemp("photographs")
    encoded = list(encoded_photographs())
    for shard in range(4):
        write_tar(folder / f"photographs-{shard}.tar", encoded[shard::4])
    torch.save(discriminating_state(), folder / "network.pth")
    return folder, encoded


@pytest.fixture(scope="module")
def reference(photographs: tuple[Path, Encoded]) -> tuple[dict[str, int], dict[str, np.ndarray]]:
    """Class and embedding of every image by its key, computed with torchvision alone."""
    folder, encoded = photographs
    network = resnet18(num_classes=len(torch.load(folder / "network.pth")["fc.bias"])).eval()
    network.load_state_dict(torch.load(folder / "network.pth"))
    preset = ResNet18_Weights.IMAGENET1K_V1.transforms()
    pixels = torch.stack([preset(Image.open(io.BytesIO(data)).convert("RGB")) for _, data in encoded])
    body = torch.nn.Sequential(*list(network.children())[:-1], torch.nn.Flatten())
    with torch.inference_mode():
        embeddings = torch.cat([body(batch) for batch in pixels.split(16)])
        classes = network.fc(embeddings).argmax(dim=1)
    keys = [name.rpartition(".")[0] for name, _ in encoded]
    return dict(zip(keys, classes.tolist(), strict=True)), dict(zip(keys, embeddings.numpy(), strict=True))


def agreement(output: Path, reference: tuple[dict[str, int], dict[str, np.ndarray]]) -> tuple[float, np.ndarray]:
    """Top-1 agreement, and the cosine of every image's embedding after subtracting the mean of the set."""
    classes, embeddings = reference
    table = rows(output)
    keys = table["key"].to_pylist()
    assert sorted(keys) == sorted(classes)
    same = np.mean([classes[key] == found for key, found in zip(keys, table["class_id"].to_pylist(), strict=True)])
    column = table["embedding"].combine_chunks()
    ours = column.flatten().to_numpy(zero_copy_only=False).reshape(len(column), -1).astype(np.float64)
    theirs = np.stack([embeddings[key] for key in keys]).astype(np.float64)
    ours, theirs = ours - theirs.mean(axis=0), theirs - theirs.mean(axis=0)
    cosine = (ours * theirs).sum(axis=1) / np.linalg.norm(ours, axis=1) / np.linalg.norm(theirs, axis=1)
    return float(same), cosine


def run(folder: Path, output: Path, engine: str, decode: str) -> None:
    report = pipeline.run(
        {
            "input": {"url": f"{folder}/*.tar"},
            "model": {"name": "resnet18", "weights": str(folder / "network.pth"), "transform": {"decode": decode}},
            "output": {"url": str(output), "embedding_dtype": "float32"},
            "runtime": {"engine": engine, "batch_size": 16},
        }
    )
    assert (report.exit_code, report.errors) == (0, 0)


def test_the_reference_tells_photographs_apart(reference: tuple[dict[str, int], dict[str, np.ndarray]]):
    """Else agreement would mean nothing: an untrained network gives every photograph the same class."""
    classes, embeddings = reference
    assert len(set(classes.values())) >= 12
    centred = np.stack(list(embeddings.values()))
    centred = centred - centred.mean(axis=0)
    unit = centred / np.linalg.norm(centred, axis=1, keepdims=True)
    others = (unit @ unit.T)[~np.eye(len(unit), dtype=bool)]
    assert np.quantile(others, 0.5) < 0.3


def test_decode_and_engine_of_the_reference_give_its_numbers(
    photographs: tuple[Path, Encoded], reference: tuple[dict[str, int], dict[str, np.ndarray]], tmp_path: Path
):
    run(photographs[0], tmp_path / "labels", "eager", "reference")
    same, cosine = agreement(tmp_path / "labels", reference)
    assert same == 1.0
    assert cosine.min() >= 0.99999


@pytest.mark.parametrize("engine", ["eager", "openvino"])
def test_the_fast_path_agrees(
    engine: str,
    photographs: tuple[Path, Encoded],
    reference: tuple[dict[str, int], dict[str, np.ndarray]],
    tmp_path: Path,
):
    run(photographs[0], tmp_path / "labels", engine, "fast")
    same, cosine = agreement(tmp_path / "labels", reference)
    print(f"{engine}: top-1 {same:.4f}, centred cosine p1 {np.quantile(cosine, 0.01):.6f}, least {cosine.min():.6f}")
    assert same >= 0.99
    assert np.quantile(cosine, 0.01) >= 0.99
