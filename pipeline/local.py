"""A few images in this process: the same steps as a run, without Ray and without writing anything."""

from __future__ import annotations

import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
from PIL import Image, ImageOps

from pipeline.calibration import known_spec
from pipeline.config import JobConfig, Output
from pipeline.errors import ConfigError, PipelineError, Reject, clean
from pipeline.inputs.images import eight_bits
from pipeline.inputs.readers import read
from pipeline.inputs.shards import Shard, discover, printable
from pipeline.inputs.stream import pixel_blocks
from pipeline.model.engines import ROWS, find_engine
from pipeline.model.spec import ModelSpec, result_columns
from pipeline.model.tuning import OWN_SIZES
from pipeline.model.zoo import resolve, share_cores
from pipeline.nvjpeg import device_decoder
from pipeline.rows import Kind, Row
from pipeline.storage import Store

if TYPE_CHECKING:
    from pipeline.model.predictor import ResNetPredictor

PNG_MODES = ("1", "L", "LA", "P", "RGB", "RGBA")
TIFF_MODES = ("F", "I")  # read as such files are: their black and white are not known
BATCH_SIZES = (1, 8, 32)  # few, since a network is loaded for one of them and kept
BATCHES = {"cpu": 8, "cuda": 1}  # that there are at least of a larger size than 1: a CPU's cores compute one each
BATCHES_PER_BLOCK = 8
ORIENTATION = 0x0112  # EXIF's


def predict_images(images: Any, config: JobConfig) -> pa.Table:
    """See `pipeline.api.predict`."""
    store = Store(config.input_storage)
    rows = [_row(number, image, store) for number, image in enumerate(_items(images))]
    return _results(rows, config, known_spec(config)).drop_columns(["shard"])


def preview_samples(config: JobConfig, limit: int) -> pa.Table:
    """See `pipeline.api.preview`."""
    store = Store(config.input_storage)
    shards = discover(config.input, store, output=config.output.url)
    rows = (row for number, shard in enumerate(shards) for row in read(shard, config.input, store, number))
    return _with_urls(list(islice(rows, limit)), shards, config, known_spec(config))


def predict_rows(wanted: Sequence[tuple[Shard, set[int]]], config: JobConfig, spec: ModelSpec) -> pa.Table:
    """Certain samples of certain shards, computed anew. A shard is read up to the last one of them."""
    store = Store(config.input_storage)
    rows: list[Row] = []
    for number, (shard, indices) in enumerate(wanted):
        found = islice(read(shard, config.input, store, number), max(indices) + 1)
        rows.extend(row for row in found if row.index in indices)
    return _with_urls(rows, [shard for shard, _ in wanted], config, spec)


def _with_urls(rows: list[Row], shards: Sequence[Shard], config: JobConfig, spec: ModelSpec) -> pa.Table:
    table = _results(rows, config, spec)
    urls = pa.array([shard.url for shard in shards], pa.string()).take(table["shard"])
    return table.set_column(table.schema.get_field_index("shard"), "shard", urls)


def _results(rows: list[Row], config: JobConfig, spec: ModelSpec) -> pa.Table:
    """Identity, results, and `error` and `message` where there is no result; sorted by shard and index."""
    device = "cpu" if spec.is_noop else _device(config.runtime.device)
    batch_size = _batch_size(len(rows), device, spec)
    model = _Model(spec.fingerprint, config.output.top_k, spec, config.output)
    predictor = _predictor(model, config.runtime.engine, device, batch_size, config.input.max_pixels)
    blocks = pixel_blocks(rows, spec.transform, config.input, max(batch_size, ROWS) * BATCHES_PER_BLOCK)
    schema = predictor.columns.pieces()
    table = pa.concat_tables([schema.empty_table(), *(predictor(block) for block in blocks)])
    table = table.sort_by([("shard", "ascending"), ("index", "ascending")])
    names = ["key", "shard", "index", *(f.name for f in predictor.columns.results())]
    return table.select([*names, "width", "height", "error", "message"]).combine_chunks()


def _batch_size(images: int, device: str, spec: ModelSpec) -> int:
    if spec.input_size is None:
        return OWN_SIZES[device]
    return max(size for size in BATCH_SIZES if size == 1 or size * BATCHES[device] <= images)


def _device(requested: str) -> str:
    """`cpu` or `cuda`."""
    share_cores()
    import torch

    if requested == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    return requested


@dataclass(frozen=True)
class _Model:
    """A model and the columns that it is to fill. As a cache's key its fingerprint says it all, but for classes that
    are asked for besides those of the columns."""

    fingerprint: str
    top_k: int
    spec: ModelSpec = field(compare=False)
    output: Output = field(compare=False)


@lru_cache(maxsize=len(BATCH_SIZES))
def _predictor(model: _Model, engine: str, device: str, batch_size: int, max_pixels: int) -> ResNetPredictor:
    """Loading a network takes seconds, and a notebook calls again and again."""
    from pipeline.model.predictor import PredictorSettings, ResNetPredictor

    spec = model.spec
    info = resolve(spec)
    columns = result_columns(model.output, info)
    engine = find_engine(engine, device, spec)
    settings = PredictorSettings(engine, device, batch_size, columns)
    return ResNetPredictor(spec, info, settings, decode=device_decoder(spec.transform, max_pixels, device))


def _items(images: Any) -> Iterable[Any]:
    """One image, or each of several."""
    is_one = isinstance(images, str | Path | bytes | bytearray | memoryview | Image.Image)
    if is_one or (isinstance(images, np.ndarray) and images.ndim < 4) or not isinstance(images, Iterable):
        return [images]
    return images


def _name(image: Any, number: int) -> str:
    return printable(str(image)) if isinstance(image, str | Path) else str(number)


def _row(number: int, image: Any, store: Store) -> Row:
    name = _name(image, number)
    try:
        return Row(0, Kind.SAMPLE, number, name, _encoded(image, store))
    except (PipelineError, MemoryError):
        raise
    except Exception as cause:  # noqa: BLE001 - Pillow reads a file's pixels now, and raises whatever they lead it to
        return Row(0, Kind.ERROR, number, name, reject=Reject("decode", "corrupt", clean(cause)))


def _encoded(image: Any, store: Store) -> bytes:
    """The bytes of an image file; what is decoded already is encoded without loss, to take the same path."""
    if isinstance(image, str | Path):
        return store.read(str(image))
    if isinstance(image, bytes | bytearray | memoryview):
        return bytes(image)
    if isinstance(image, np.ndarray):
        has_shape = image.ndim == 2 or (image.ndim == 3 and image.shape[2] == 3)
        if image.dtype != np.uint8 or not has_shape or image.size == 0:
            raise ConfigError(f"an image array is uint8 (H, W, 3) or (H, W); got {image.dtype} {image.shape}.")
        image = Image.fromarray(image)
    if not isinstance(image, Image.Image):
        raise ConfigError(f"an image is a path, a URL, bytes, a Pillow image or an array; got {type(image).__name__}.")
    upright = _upright(image)
    buffer = io.BytesIO()
    if upright.mode in TIFF_MODES:
        upright.save(buffer, "TIFF")
    else:
        upright = upright if upright.mode in PNG_MODES else upright.convert("RGB")
        # Without its profile, which may be too large for Pillow to read it again.
        upright.save(buffer, "PNG", compress_level=1, icc_profile=None)
    return buffer.getvalue()


def _upright(image: Image.Image) -> Image.Image:
    image.load()
    is_deep = image.mode.startswith("I;16")
    pixels = Image.fromarray(eight_bits(image)) if is_deep else image
    try:
        if is_deep:
            pixels.getexif()[ORIENTATION] = image.getexif().get(ORIENTATION, 1)
        return ImageOps.exif_transpose(pixels)
    except Exception:  # noqa: BLE001 - broken metadata says nothing about the pixels, which are fine
        return pixels
