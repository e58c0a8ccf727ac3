"""A few images in this process: the same steps as a run, without Ray and without writing anything."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
from PIL import Image

from pipeline.config import JobConfig
from pipeline.errors import ConfigError
from pipeline.inputs.shards import Shard, discover
from pipeline.inputs.stream import pixel_blocks, read_rows
from pipeline.model.engines import choose_engine
from pipeline.model.spec import ModelSpec, make_spec
from pipeline.model.zoo import resolve
from pipeline.rows import Columns, Kind, Row
from pipeline.storage import Store

if TYPE_CHECKING:
    from pipeline.model.predictor import ResNetPredictor

MAX_BATCH_SIZE = 32


def predict_images(images: Any, config: JobConfig) -> pa.Table:
    """See `pipeline.api.predict`."""
    items = images if isinstance(images, list | tuple) else [images]
    store = Store(config.input_storage)
    rows = [
        Row(0, Kind.SAMPLE, number, _name(item, number), _encoded(item, store)) for number, item in enumerate(items)
    ]
    return _results(rows, config).drop_columns(["shard"])


def preview_samples(config: JobConfig, limit: int) -> pa.Table:
    """See `pipeline.api.preview`."""
    shards = discover(config.input, Store(config.input_storage))
    return _with_urls(list(islice(_samples(shards, config), limit)), shards, config)


def predict_rows(wanted: Sequence[tuple[Shard, set[int]]], config: JobConfig) -> pa.Table:
    """Certain samples of certain shards, computed anew. A shard is read up to the last one of them."""
    shards = [shard for shard, _ in wanted]
    rows: list[Row] = []
    for number, (shard, indices) in enumerate(wanted):
        for row in _samples([shard], config):
            if row.index in indices:
                row.shard = number
                rows.append(row)
            if row.index >= max(indices):
                break
    return _with_urls(rows, shards, config)


def _samples(shards: Sequence[Shard], config: JobConfig) -> Iterator[Row]:
    store = Store(config.input_storage)
    for number, shard in enumerate(shards):
        yield from (row for row in read_rows(number, shard, config.input, store) if row.kind <= Kind.ERROR)


def _with_urls(rows: list[Row], shards: Sequence[Shard], config: JobConfig) -> pa.Table:
    table = _results(rows, config)
    urls = pa.array([shard.url for shard in shards], pa.string()).take(table["shard"])
    return table.set_column(table.schema.get_field_index("shard"), "shard", urls)


def _results(rows: list[Row], config: JobConfig) -> pa.Table:
    """Identity, results, and `error` and `message` where there is no result; sorted by shard and index."""
    spec = make_spec(config)
    batch_size = min(MAX_BATCH_SIZE, max(len(rows), 1))
    output = config.output
    predictor = _predictor(
        _Hashable(spec), config.runtime.engine, config.runtime.device, batch_size, output.model_dump_json()
    )
    blocks = pixel_blocks(rows, spec.transform, config.input, batch_size)
    schema = predictor.columns.pieces()
    table = pa.concat_tables([schema.empty_table(), *(predictor(block) for block in blocks)])
    table = table.sort_by([("shard", "ascending"), ("index", "ascending")])
    names = ["key", "shard", "index", *(f.name for f in predictor.columns.results())]
    return table.select([*names, "width", "height", "error", "message"]).combine_chunks()


class _Hashable:
    """A spec as a cache key: its fingerprint says it all."""

    def __init__(self, spec: ModelSpec) -> None:
        self.spec = spec

    def __hash__(self) -> int:
        return hash(self.spec.fingerprint)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Hashable) and other.spec.fingerprint == self.spec.fingerprint


@lru_cache(maxsize=2)
def _predictor(key: _Hashable, engine: str, device: str, batch_size: int, output_json: str) -> ResNetPredictor:
    """Loading a network takes seconds, and a notebook calls again and again."""
    import torch

    from pipeline.config import Output
    from pipeline.model.predictor import PredictorSettings, ResNetPredictor

    spec, output = key.spec, Output.model_validate_json(output_json)
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    info = resolve(spec)
    columns = Columns(output.predictions, output.embeddings, output.embedding_dtype, info.embedding_dim)
    engine = choose_engine(engine, device, spec.precision)
    return ResNetPredictor(spec, info, PredictorSettings(engine, device, batch_size, output.top_k, columns))


def _name(image: Any, number: int) -> str:
    return str(image) if isinstance(image, str | Path) else str(number)


def _encoded(image: Any, store: Store) -> bytes:
    """The bytes of an image file; what is decoded already is encoded without loss, to take the same path."""
    if isinstance(image, str | Path):
        return store.read(str(image))
    if isinstance(image, bytes | bytearray | memoryview):
        return bytes(image)
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8 or image.ndim not in (2, 3):
            raise ConfigError(f"an image array is uint8 (H, W, 3) or (H, W); got {image.dtype} {image.shape}.")
        image = Image.fromarray(image)
    if not isinstance(image, Image.Image):
        raise ConfigError(f"an image is a path, a URL, bytes, a Pillow image or an array; got {type(image).__name__}.")
    buffer = io.BytesIO()
    image.convert("RGB").save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()
