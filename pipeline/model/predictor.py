"""The predictor that an actor hosts: blocks of pixels in, pieces of labels and embeddings out."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from pipeline.deaths import LONE_DEATHS, SPLIT_AFTER, NoNotes, Notes, killer
from pipeline.errors import FatalError, Reject
from pipeline.model.engines import OutOfMemory, load_engine
from pipeline.model.spec import ModelInfo, ModelSpec
from pipeline.rows import IDENTITY, VERDICT, Columns, Kind

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class PredictorSettings:
    engine: str
    device: str
    batch_size: int
    top_k: int
    columns: Columns


class ResNetPredictor:
    """Hosts one network. Batches are padded to the fixed size, so that a row never depends on its neighbours.

    Batches that kill the process are divided until the sample is found that does it; that one becomes an error row.
    Where the device runs out of memory, batches of half the size are computed from then on.
    """

    def __init__(
        self, spec: ModelSpec, info: ModelInfo, settings: PredictorSettings, notes: Notes | None = None
    ) -> None:
        self._settings = settings
        self._notes = notes or NoNotes()
        self._fits = settings.batch_size  # images that the device has memory for
        self.columns = settings.columns
        self._engine = load_engine(settings.engine, spec, info, settings.device, settings.batch_size)
        names = info.classes or [str(number) for number in range(info.num_classes)]
        self._classes = pa.array(names, pa.string())

    def __call__(self, block: pa.Table) -> pa.Table:
        """PIXELS to pieces: the columns of `Columns.pieces`, every row of the block once, in any order."""
        return self._guarded(block) if block.num_rows else self._pieces(block)

    def _guarded(self, block: pa.Table) -> pa.Table:
        """The pieces of a block, done in smaller parts once several processes have died of it."""
        (first, at), (last, end) = ((block["shard"][row].as_py(), block["index"][row].as_py()) for row in (0, -1))
        work = f"predict {first}:{at} to {last}:{end}, {block.num_rows} rows"
        deaths = self._notes.begin(work)
        if block.num_rows > 1 and deaths >= SPLIT_AFTER:
            size = self._settings.batch_size if block.num_rows > self._settings.batch_size else 1
            parts = [self._guarded(block.slice(start, size)) for start in range(0, block.num_rows, size)]
            pieces = pa.concat_tables(parts)
        elif deaths >= LONE_DEATHS and block["kind"][0].as_py() == Kind.SAMPLE:
            pieces = _padded(_rejected(block, killer("predict")), self._settings.columns.pieces())
        else:
            pieces = self._pieces(block)
        self._notes.end(work)
        return pieces

    def _pieces(self, block: pa.Table) -> pa.Table:
        kinds = block["kind"].to_numpy()
        schema = self._settings.columns.pieces()
        others = _padded(block.take(np.flatnonzero(kinds != Kind.SAMPLE)), schema)
        samples = block.drop_columns(["pixels"]).take(np.flatnonzero(kinds == Kind.SAMPLE))
        if samples.num_rows == 0:
            return others
        logits, embeddings = self._predict(block, kinds == Kind.SAMPLE)
        rows, is_finite = self._rows(samples, logits, embeddings)
        if not is_finite.all():
            others = pa.concat_tables([others, _padded(_rejected(samples.filter(~is_finite), NOT_FINITE), schema)])
            rows = rows.filter(is_finite)
        return pa.concat_tables([rows.select(schema.names).cast(schema), others])

    def _predict(self, block: pa.Table, wanted: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Logits float32 (N, C) and embeddings float32 (N, D) of the N samples, in the order of the block."""
        places: list[np.ndarray] = []
        results: list[tuple[np.ndarray, np.ndarray]] = []
        for rows, pixels in batches(block, wanted, self._settings.batch_size):
            logits, embeddings = self._forward(pixels)
            places.append(rows)
            results.append((logits[: len(rows)], embeddings[: len(rows)]))
        order = np.argsort(np.concatenate(places))
        return np.concatenate([r[0] for r in results])[order], np.concatenate([r[1] for r in results])[order]

    def _forward(self, pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Logits and embeddings of a batch, computed in parts that the device has memory for."""
        size = self._fits
        try:
            parts = [self._engine(pixels[start : start + size]) for start in range(0, len(pixels), size)]
        except OutOfMemory as cause:
            if size == 1:
                raise FatalError(
                    f"the device has not enough memory for a single image of {pixels.shape[2]} x {pixels.shape[1]}"
                    " pixels. Use a larger device, runtime.device=cpu, or a smaller model.transform."
                ) from cause
            self._fits = size // 2
            log.warning(
                "out of device memory with %d images at once: going on with %d. Set runtime.batch_size",
                size,
                self._fits,
            )
        else:
            logits, embeddings = zip(*parts, strict=True)
            return (
                (logits[0], embeddings[0]) if len(parts) == 1 else (np.concatenate(logits), np.concatenate(embeddings))
            )
        return self._forward(pixels)

    def _rows(self, samples: pa.Table, logits: np.ndarray, embeddings: np.ndarray) -> tuple[pa.Table, np.ndarray]:
        """The samples with their results, and which of them are finite all through."""
        columns = self._settings.columns
        is_finite = np.isfinite(logits).all(axis=1)
        if columns.predictions:
            scores = softmax(logits)
            for name, column in self._predictions(scores).items():
                samples = samples.append_column(name, column)
        if columns.embeddings:
            with np.errstate(over="ignore"):  # what overflows to infinity becomes an error row
                stored = embeddings.astype(columns.embedding_dtype)
            is_finite &= np.isfinite(stored).all(axis=1)
            flat = pa.array(stored.reshape(-1))
            samples = samples.append_column("embedding", pa.FixedSizeListArray.from_arrays(flat, stored.shape[1]))
        return samples, is_finite

    def _predictions(self, scores: np.ndarray) -> dict[str, pa.Array]:
        ids = top_ids(scores, self._settings.top_k)
        k = ids.shape[1]
        best = np.take_along_axis(scores, ids, axis=1)
        labels = self._classes.take(pa.array(ids.reshape(-1)))
        entries = pa.StructArray.from_arrays(
            [pa.array(ids.reshape(-1)), labels, pa.array(best.reshape(-1))], ["class_id", "label", "score"]
        )
        return {
            "class_id": pa.array(ids[:, 0]),
            "label": self._classes.take(pa.array(ids[:, 0])),
            "score": pa.array(best[:, 0]),
            "top_k": pa.ListArray.from_arrays(np.arange(0, len(ids) * k + 1, k, dtype=np.int32), entries),
        }


def batches(block: pa.Table, wanted: np.ndarray, batch_size: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(row numbers, pixels uint8 (batch_size, H, W, 3)) over the wanted rows, images of one size together.

    A batch that lies in one piece in the block is a view of it; others are gathered and padded with zeros.
    """
    heights, widths = block["pixel_height"].to_numpy(), block["pixel_width"].to_numpy()
    images = _PixelColumn(block["pixels"])
    rows = np.flatnonzero(wanted)
    sizes = np.stack([heights[rows], widths[rows]], axis=1).astype(np.int64)
    for size in np.unique(sizes, axis=0):
        same = rows[(sizes == size).all(axis=1)]
        for start in range(0, len(same), batch_size):
            chosen = same[start : start + batch_size]
            yield chosen, images.batch(chosen, (int(size[0]), int(size[1]), 3), batch_size)


class _PixelColumn:
    """The pixels of a block as views of its buffers."""

    def __init__(self, column: pa.ChunkedArray) -> None:
        self._chunks: list[tuple[np.ndarray, np.ndarray]] = []  # bytes, offsets of values
        self._starts: list[int] = []
        start = 0
        for chunk in column.chunks:
            _, offsets, data = chunk.buffers()
            values = np.frombuffer(data, np.uint8) if data is not None else np.empty(0, np.uint8)
            window = np.frombuffer(offsets, np.int64, len(chunk) + 1, chunk.offset * 8)
            self._chunks.append((values, window))
            self._starts.append(start)
            start += len(chunk)

    def batch(self, rows: np.ndarray, shape: tuple[int, int, int], batch_size: int) -> np.ndarray:
        """uint8 (batch_size, *shape); rows beyond `rows` are zero."""
        number = int(np.searchsorted(self._starts, rows[0], side="right")) - 1
        values, offsets = self._chunks[number]
        first, last = rows[0] - self._starts[number], rows[-1] - self._starts[number]
        if len(rows) == batch_size == last - first + 1 and last + 1 < len(offsets):
            return values[offsets[first] : offsets[last + 1]].reshape(batch_size, *shape)
        gathered = np.zeros((batch_size, *shape), np.uint8)
        for place, row in enumerate(rows):
            number = int(np.searchsorted(self._starts, row, side="right")) - 1
            values, offsets = self._chunks[number]
            at = row - self._starts[number]
            gathered[place] = values[offsets[at] : offsets[at + 1]].reshape(shape)
        return gathered


def softmax(logits: np.ndarray) -> np.ndarray:
    """float32 (N, C) to float32 (N, C), rows summing to 1."""
    with np.errstate(invalid="ignore", over="ignore"):  # rows that are not finite become error rows
        powers = np.exp(logits - logits.max(axis=1, keepdims=True))
        return np.asarray(powers / powers.sum(axis=1, keepdims=True), np.float32)


def top_ids(scores: np.ndarray, k: int) -> np.ndarray:
    """int32 (N, min(k, C)): the ids of the highest scores, descending, ties to the lower id."""
    num_classes = scores.shape[1]
    k = min(k, num_classes)
    if k == num_classes:
        return np.argsort(-scores, axis=1, kind="stable").astype(np.int32)
    # Sorting all classes costs more than a small network; but a tie across the cut must go to the lower id.
    ids = np.sort(np.argpartition(-scores, k - 1, axis=1)[:, :k], axis=1)
    best = np.take_along_axis(scores, ids, axis=1)
    ids = np.take_along_axis(ids, np.argsort(-best, axis=1, kind="stable"), axis=1)
    is_tied = (scores >= best.min(axis=1, keepdims=True)).sum(axis=1) != k
    if is_tied.any():
        ids[is_tied] = np.argsort(-scores[is_tied], axis=1, kind="stable")[:, :k]
    return ids.astype(np.int32)


NOT_FINITE = Reject("predict", "not_finite", "the network's result is not finite, or overflows the embedding's type")


def _rejected(samples: pa.Table, reject: Reject) -> pa.Table:
    """Error rows for these samples."""
    verdict = {"stage": reject.stage, "error": reject.error, "message": reject.message}
    for name, value in verdict.items():
        column = pa.repeat(pa.scalar(value, pa.string()), samples.num_rows)
        samples = samples.set_column(samples.schema.get_field_index(name), name, column)
    kind = pa.repeat(pa.scalar(int(Kind.ERROR), pa.uint8()), samples.num_rows)
    return samples.set_column(samples.schema.get_field_index("kind"), "kind", kind)


def _padded(rows: pa.Table, schema: pa.Schema) -> pa.Table:
    """Identity and verdict of these rows; every other column is null."""
    known = {*IDENTITY.names, *VERDICT.names}
    columns = [rows[f.name] if f.name in known else pa.nulls(rows.num_rows, f.type) for f in schema]
    return pa.table(columns, schema=schema)
