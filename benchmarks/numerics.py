"""How far every engine and precision is from fp32 eager on equal pixels, and how fast it is: a Markdown table.

    python -m benchmarks.numerics [PHOTOGRAPHS] [--networks resnet18 resnet50]

The networks tell the photographs apart (`networks.write_weights`), and the reference must predict many classes: any two
programs agree on a network that gives everything the same class. int8 is calibrated on every other photograph. Each
engine is a process of its own, one after the other on all cores; images/s are measured for some seconds, as
`runtime.batch_size` is. What this machine cannot do is left out, and said on stderr. float16 takes minutes on a CPU
that only emulates it.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from hashlib import sha256
from multiprocessing import get_context
from pathlib import Path

import numpy as np

from benchmarks.networks import spec_of, write_weights
from benchmarks.photographs import images_in, refuse_unreadable
from pipeline.config import Precision, Storage, Transform
from pipeline.errors import ConfigError
from pipeline.examples.photos import load_photos
from pipeline.inputs.images import decode
from pipeline.model.engines import load_engine
from pipeline.model.spec import ModelSpec, Quantised
from pipeline.model.tuning import measure_rate
from pipeline.model.zoo import resolve, share_cores

BATCH_SIZE = 32
SECONDS = 3.0  # that the rate is measured for
MIN_CLASSES = 10  # that the reference predicts
TORCH: list[Precision] = ["float32", "bfloat16", "float16"]
PRECISIONS: dict[str, dict[str, list[Precision]]] = {
    "cpu": {"eager": TORCH, "compile": TORCH, "openvino": ["float32", "bfloat16", "int8"]},
    "cuda": {"eager": TORCH, "compile": TORCH},
}

Results = tuple[np.ndarray, np.ndarray, float]  # logits (N, C), embeddings (N, D), images/s


def arms() -> Iterator[tuple[str, str, Precision]]:
    """Device, engine and precision, fp32 eager on the CPU first."""
    import torch

    for device in ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]:
        for engine, precisions in PRECISIONS[device].items():
            yield from ((device, engine, precision) for precision in precisions)


def spec_in(precision: Precision, network: str, weights: Path) -> ModelSpec:
    spec = spec_of(network, str(weights))
    identity = spec.identity | {"precision": precision}
    return replace(spec, precision=precision, identity=identity, fingerprint=f"numerics-{network}-{precision}")


def calibrated(spec: ModelSpec, pixels: np.ndarray, folder: Path) -> ModelSpec:
    from pipeline.model.openvino_engine import packed
    from pipeline.model.quantised import quantise

    network = packed(quantise(spec, list(pixels[::2])))
    path = folder / "network.zip"
    path.write_bytes(network)
    return spec.calibrated(Quantised(str(path), sha256(network).hexdigest(), Storage()))


def measure(arm: tuple[str, str, Precision], network: str, weights: Path, pixels_path: Path) -> Results:
    """Run in a process of its own. Raises ConfigError for what this machine can't do."""
    share_cores()
    device, engine_name, precision = arm
    pixels = np.fromfile(pixels_path, np.uint8).reshape(-1, 224, 224, 3)
    spec = spec_in(precision, network, weights)
    if precision == "int8":
        spec = calibrated(spec, pixels, weights.parent)
    engine = load_engine(engine_name, spec, resolve(spec), device, BATCH_SIZE)
    padded = np.concatenate([pixels, pixels[: -len(pixels) % BATCH_SIZE]])
    parts = [engine(padded[start : start + BATCH_SIZE]) for start in range(0, len(padded), BATCH_SIZE)]
    logits, embeddings = (np.concatenate(rows)[: len(pixels)] for rows in zip(*parts, strict=True))
    return logits, embeddings, measure_rate(engine, spec, device, BATCH_SIZE, SECONDS)


def row(arm: tuple[str, str, Precision], network: str, found: Results, reference: Results) -> str:
    top1 = float((found[0].argmax(axis=1) == reference[0].argmax(axis=1)).mean())
    mean = reference[1].mean(axis=0)
    a, b = reference[1] - mean, found[1] - mean
    cosines = (a * b).sum(axis=1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
    p1 = float(np.quantile(cosines, 0.01))
    device, engine, precision = arm
    return f"| {network} | {device} | {engine} | {precision} | {top1:.3f} | {p1:.5f} | {found[2]:.0f} |"


def table(network: str, encoded: list[bytes], folder: Path) -> Iterator[str]:
    weights, pixels = folder / f"{network}.pth", folder / "pixels"
    write_weights(network, encoded, weights)
    np.stack([decode(data, Transform(decode="reference"), 50_000_000).array for data in encoded]).tofile(pixels)
    reference: Results | None = None
    for arm in arms():
        with ProcessPoolExecutor(1, get_context("spawn")) as process:
            try:
                found = process.submit(measure, arm, network, weights, pixels).result()
            except ConfigError as error:
                print(f"left out: {network} {' '.join(arm)}: {error}", file=sys.stderr)
                continue
        if reference is None:
            reference = found
            classes = len(np.unique(found[0].argmax(axis=1)))
            if classes < MIN_CLASSES:
                raise SystemExit(f"{network} predicts {classes} classes only, so agreement shows nothing")
        yield row(arm, network, found, reference)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photographs", type=Path, nargs="?", help="a folder; default: the 16 of scikit-image")
    parser.add_argument("--networks", nargs="+", default=["resnet18", "resnet50"])
    options = parser.parse_args()
    if options.photographs is None:
        encoded = [data for _, data in load_photos()]
    else:
        listed = [(str(path), path.read_bytes()) for path in images_in(options.photographs)]
        refuse_unreadable(listed)
        encoded = [data for _, data in listed]
    if len(set(encoded)) < MIN_CLASSES:
        parser.error(f"{len(set(encoded))} photographs are too few to show anything: take {MIN_CLASSES} or more")
    print("| network | device | engine | precision | top-1 | centred cosine, p1 | images/s |")
    print("| --- | --- | --- | --- | ---: | ---: | ---: |")
    with tempfile.TemporaryDirectory() as folder:
        for network in options.networks:
            for line in table(network, encoded, Path(folder)):
                print(line, flush=True)


if __name__ == "__main__":
    main()
