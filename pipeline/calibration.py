"""The int8 network of a dataset: made once of the job's own images, kept beside the rows, and used ever after.

It lies in `_model/<fingerprint of the model before>.zip`, put there unless one stands, so that of two first runs at
once both go on with the network of one. Its sha256 is part of the model fingerprint, so of `_dataset.json` too: rows of
two calibrations never mix.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator, Sequence
from itertools import islice

import numpy as np
import pyarrow as pa

from pipeline.config import JobConfig, digest
from pipeline.deaths import Guard, Notes
from pipeline.errors import FatalError, NotFound, StoreUnavailable
from pipeline.inputs.shards import Shard
from pipeline.inputs.stream import pixel_blocks, read_rows
from pipeline.model.cache import fetch
from pipeline.model.openvino_engine import packed
from pipeline.model.quantised import Image, agreement, quantise
from pipeline.model.spec import CALIBRATION, ModelSpec, Quantised, make_spec
from pipeline.outputs.dataset import Dataset, Identity
from pipeline.rows import Kind
from pipeline.storage import Store

log = logging.getLogger(__name__)

NUM_IMAGES = 256
NUM_SHARDS = 32  # that they come from
MAX_BYTES = 256 * 2**20  # of pixels, where images keep their own size
FEW_IMAGES = 64
CHECKED_IMAGES = 64
LOW_AGREEMENT = 0.95


def known_spec(config: JobConfig) -> ModelSpec:
    """`make_spec`, with the int8 network that the dataset of this job has already. Costs a read of `_dataset.json`
    where int8 is asked for."""
    return with_network(make_spec(config), Dataset(config.output.url, Store(config.output_storage)))


def with_network(spec: ModelSpec, dataset: Dataset) -> ModelSpec:
    """The spec with the int8 network that stands in the dataset, if it asks for one and one stands."""
    if not spec.needs_calibration:
        return spec
    sha256 = _claimed(spec, dataset) or _standing(spec, dataset)
    return spec if sha256 is None else _calibrated(spec, dataset, sha256)


def network_problem(dataset: Dataset, identity: Identity) -> str | None:
    """What is wrong with the int8 network that the dataset was made with; None where all is well, or there is none."""
    model = dict(identity["model"])
    named = model.pop(CALIBRATION, None)
    if named is None:
        return None
    url = dataset.path("_model", f"{digest(model)}.zip")
    advice = "It stays readable, but can only grow once the file is restored."
    try:
        found = hashlib.sha256(dataset.store.read(url)).hexdigest()
    except NotFound:
        return f"the int8 network that it was made with is missing: {url}. {advice}"
    if f"sha256:{found}" != named:
        return f"{url} is not the int8 network that it was made with: its sha256 is {found}, not {named}. {advice}"
    return None


def _calibrated(spec: ModelSpec, dataset: Dataset, sha256: str) -> ModelSpec:
    return spec.calibrated(Quantised(_url(spec, dataset), sha256, dataset.store.options))


def _url(spec: ModelSpec, dataset: Dataset) -> str:
    return dataset.path("_model", f"{spec.fingerprint}.zip")


def _claimed(spec: ModelSpec, dataset: Dataset) -> str | None:
    """The sha256 that `_dataset.json` names, if it is this model's."""
    identity = dataset.identity()
    model = dict(identity["model"]) if identity is not None else {}
    named = model.pop(CALIBRATION, None)
    return str(named).removeprefix("sha256:") if named and digest(model) == spec.fingerprint else None


def _standing(spec: ModelSpec, dataset: Dataset) -> str | None:
    """The sha256 of a network that a run has left which got no further."""
    url = _url(spec, dataset)
    try:
        dataset.store.info(url)
    except NotFound:
        return None
    return fetch(url, dataset.store.options).stem


def spread(shards: Sequence[Shard]) -> list[Shard]:
    """NUM_SHARDS of them at equal distances, since neighbours often show the same class."""
    step = max(len(shards) / NUM_SHARDS, 1.0)
    return [shards[int(number * step)] for number in range(min(len(shards), NUM_SHARDS))]


def calibrate(
    spec: ModelSpec, config: JobConfig, shards: Sequence[Shard], notes: Notes | None = None, has_head: bool = True
) -> ModelSpec:
    """Make the network of a dataset that has none, of the first images of these shards, unless a rival is faster.
    With `notes`, an image that kills its process is left out once it has done so several times.

    Without a head in its weights, the network's classes say nothing, and are not compared.

    Needs torch and NNCF. Raises FatalError if no image can be decoded, StoreUnavailable if none can be
    read, and what `quantise` raises.
    """
    dataset = Dataset(config.output.url, Store(config.output_storage))
    images = _images(shards, spec, config, notes or Notes())
    if not images:
        raise FatalError(
            f"model.precision: int8 is calibrated on the job's images, but not one of the first of {len(shards)} shards"
            f" can be decoded, {shards[0].url} among them. Look at input.format and input.url."
        )
    if len(images) < FEW_IMAGES:
        log.warning("int8 is calibrated on %d images only; some %d make it better", len(images), NUM_IMAGES)
    network = quantise(spec, images)
    if has_head:
        _report(agreement(spec, network, images[:: -(-len(images) // CHECKED_IMAGES)]))
    dataset.store.put_if_absent(_url(spec, dataset), packed(network))
    sha256 = _standing(spec, dataset)
    assert sha256 is not None, "it was put a moment ago"
    return _calibrated(spec, dataset, sha256)


def _report(share: float) -> None:
    if share < LOW_AGREEMENT:
        log.warning(
            "int8 gives only %.0f %% of the calibration images the class that float32 gives them: this network does not"
            " take to it. Consider bfloat16",
            100 * share,
        )


def _images(shards: Sequence[Shard], spec: ModelSpec, config: JobConfig, notes: Notes) -> list[Image]:
    """About NUM_IMAGES, the first of each shard."""
    store = Store(config.input_storage)
    each = -(-NUM_IMAGES // len(shards))
    images: list[Image] = []
    reasons: list[str] = []
    num_bytes = 0
    for number, shard in enumerate(shards):
        guard = Guard(notes, f"calibrate on {number}")
        rows = read_rows(number, shard, config.input, store, guard)
        blocks = guard.watch(pixel_blocks(rows, spec.transform, config.input, each, guard))
        for image in islice((image for block in blocks for image in _pixels(block, reasons)), each):
            images.append(image)
            num_bytes += image.nbytes
            if num_bytes > MAX_BYTES:
                return images
    if not images and reasons:
        raise StoreUnavailable(f"no image could be read to calibrate int8 on. {reasons[0]} Run again.")
    return images


def _pixels(block: pa.Table, reasons: list[str]) -> Iterator[Image]:
    """The images of a block. Notes why its shard could not be read, where it could not."""
    kinds = block["kind"].to_numpy()
    reasons.extend(block.filter(pa.array(kinds == Kind.ABANDONED))["message"].to_pylist())
    samples = block.filter(pa.array(kinds == Kind.SAMPLE))
    shape = (samples["pixel_height"].to_pylist(), samples["pixel_width"].to_pylist())
    for data, height, width in zip(samples["pixels"], *shape, strict=True):
        yield np.frombuffer(data.as_py(), np.uint8).reshape(height, width, 3)
