"""The predictor that an actor hosts: blocks of pixels in, pieces of labels and embeddings out."""

from __future__ import annotations

import gc
import logging
import re
import sys
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import NoReturn

import numpy as np
import pyarrow as pa

from pipeline.deaths import LONE_DEATHS, SPLIT_AFTER, Notes, killer
from pipeline.errors import FatalError, PipelineError, Reject, clean
from pipeline.model.engines import Engine, OutOfMemory, PixelBatch, load_engine
from pipeline.model.results import Batch, Results, connect
from pipeline.model.spec import PROBE_SIZES, ModelInfo, ModelSpec
from pipeline.model.tuning import images_at_once
from pipeline.model.turns import Turns
from pipeline.rows import IDENTITY, VERDICT, Columns, Kind
from pipeline.timing import Busy

IMAGE_SIZE = ["pixel_width", "pixel_height"]

NOT_SUPPORTED = "STATUS_NOT_SUPPORTED"  # what cuDNN says of an image's size
DEVICE_ERROR = re.compile("cuda|cudnn|cublas|accelerator", re.IGNORECASE)

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class PredictorSettings:
    engine: str
    device: str
    batch_size: int  # images; where they come in sizes of their own, see `tuning.images_at_once`
    columns: Columns


class ResNetPredictor:
    """Hosts one network. Batches are padded to a size that is fixed, or follows from that of the images, so that a row
    never depends on its neighbours.

    Batches that kill the process are divided until the sample is found that does it; that one becomes an error row.
    Where the device runs out of memory, batches of half the size are computed from then on.

    Several threads may call it at once: while the results of one block become a table, the next is computed.
    """

    def __init__(
        self,
        spec: ModelSpec,
        info: ModelInfo,
        settings: PredictorSettings,
        notes: Notes | None = None,
        decode: Callable[[pa.Table], pa.Table] | None = None,
    ) -> None:
        """`decode` turns blocks with ENCODED rows into blocks without."""
        self._settings, self._decode = settings, decode
        self._notes = notes or Notes()
        self._fits = settings.batch_size  # the batch size that the device has memory for
        self._is_fixed = spec.input_size is not None  # else images come in sizes of their own
        self._has_computed = False
        self.columns = settings.columns
        # One thread has an engine of torch's, whichever thread a block comes in: it does one batch at a time, and torch
        # keeps CUDA graphs and a CPU's worker threads for each thread that computes.
        thread = ThreadPoolExecutor(1, "engine")
        engine = thread.submit(self._load, spec, info).result()
        self._most = self._fits  # that the engine is made for
        self._sides = (spec.input_size,) if spec.input_size else PROBE_SIZES
        self._compute = connect(engine, settings.device, settings.columns, thread)
        self._turns = Turns()
        self._busy = Busy()
        names = info.classes or [str(number) for number in range(info.num_classes)]
        self._classes = pa.array(names, pa.string())

    def _load(self, spec: ModelSpec, info: ModelInfo) -> Engine:
        while True:
            size = self._fits
            try:
                return load_engine(self._settings.engine, spec, info, self._settings.device, size)
            except OutOfMemory:
                if size == 1 or self._settings.engine != "compile":  # which computes a whole batch beforehand
                    raise
            gc.collect()  # a network refers to itself, and its memory is wanted now
            self._halve(size)

    def __call__(self, block: pa.Table) -> pa.Table:
        """PIXELS to pieces: the columns of `Columns.pieces`, every row of the block once, in any order."""
        if block.num_rows == 0:
            return self._pieces(block)
        with self._busy.work():
            try:
                pieces = self._noted(block)
            except Exception as cause:
                if _is_lasting(cause):
                    self._notes.die(clean(cause))
                raise
        if spent := self._busy.take():
            self._notes.spend(spent)
        return pieces

    def _noted(self, block: pa.Table) -> pa.Table:
        if block.num_rows > 1:
            with self._turns.shared():
                work = _work(block)
                if self._notes.begin(work) < SPLIT_AFTER:
                    pieces = self._pieces(block)
                    self._notes.end(work)
                    return pieces
        with self._turns.alone():  # a process that dies now dies of this, and no other block is blamed
            return self._guarded(block)

    def _guarded(self, block: pa.Table) -> pa.Table:
        """The pieces of a block, done in smaller parts once several processes have died of it."""
        work = _work(block)
        deaths = self._notes.begin(work)
        if block.num_rows > 1 and deaths >= SPLIT_AFTER:
            size = self._settings.batch_size if block.num_rows > self._settings.batch_size else 1
            parts = [self._guarded(block.slice(start, size)) for start in range(0, block.num_rows, size)]
            pieces = pa.concat_tables(parts)
        elif deaths >= LONE_DEATHS and block["kind"][0].as_py() in (Kind.SAMPLE, Kind.ENCODED):
            self._takes_noise()  # this process dies where the device is in trouble: then no image is blamed
            pieces = _padded(_rejected(block, killer("predict")), self._settings.columns.pieces())
        else:
            pieces = self._pieces(block)
        self._notes.end(work)
        return pieces

    def _takes_noise(self) -> bool:
        """Whether noise is predicted in one of the sizes that the network was tried with as it was built. Trouble
        of the device that lasts is raised: no image is to be blamed for it."""
        for side in self._sides:
            images = self._images_at_once(self._fits)(side, side)
            noise = np.random.default_rng(0).integers(0, 256, (images, side, side, 3), np.uint8)
            try:
                list(self._compute([(np.arange(1), noise)]))
                return True
            except Exception as cause:
                if _is_lasting(cause):
                    raise
                log.info("a batch of noise of %d pixels: %s", side, clean(cause))
        return False

    def _pieces(self, block: pa.Table) -> pa.Table:
        block = block if self._decode is None else self._decode(block)
        kinds = block["kind"].to_numpy()
        schema = self._settings.columns.pieces()
        others = _padded(block.take(np.flatnonzero(kinds != Kind.SAMPLE)), schema)
        wanted = np.flatnonzero(kinds == Kind.SAMPLE)
        if len(wanted) == 0:
            return others
        results, refused = self._results(block, wanted)
        samples = block.drop_columns(["pixels"])
        for row, reject in refused.items():
            others = pa.concat_tables([others, _padded(_rejected(samples.slice(row, 1), reject), schema)])
        if results is None:
            return others
        samples = samples.take(np.setdiff1d(wanted, list(refused)))
        rows, is_finite = self._rows(samples, results), results.is_finite
        if not is_finite.all():
            others = pa.concat_tables([others, _padded(_rejected(samples.filter(~is_finite), NOT_FINITE), schema)])
            rows = rows.filter(is_finite)
        return pa.concat_tables([rows.select(schema.names).cast(schema), others])

    def _results(self, block: pa.Table, wanted: np.ndarray) -> tuple[Results | None, dict[int, Reject]]:
        """Of the wanted rows, in their order, None if there are none; and of those that the network does not take, why.

        An image is blamed only where images have sizes of their own, and others or noise go well, whether it comes
        first or last: else it is the network's or the device's fault, and raised.
        """
        found, refused, failure = self._computed(block, wanted)
        if not found:
            self._has_computed = self._has_computed or self._takes_noise()
            if failure and not self._has_computed:
                _give_up(failure, block.select(IMAGE_SIZE).take(wanted))
            return None, refused
        self._has_computed = True
        order = np.argsort(np.concatenate([rows for rows, _ in found]))
        columns = zip(*(results for _, results in found), strict=True)
        return Results(*(np.concatenate(column)[order] for column in columns)), refused

    def _computed(
        self, block: pa.Table, wanted: np.ndarray
    ) -> tuple[list[tuple[np.ndarray, Results]], dict[int, Reject], Exception | None]:
        """The wanted rows batch by batch, those that failed each alone and why, and the last failure, if any."""
        is_left = np.zeros(block.num_rows, np.bool_)
        is_left[wanted] = True
        found: list[tuple[np.ndarray, Results]] = []
        refused: dict[int, Reject] = {}
        failure: Exception | None = None  # since the first one, batches are computed alone, so that each is its own
        while is_left.any():
            size = self._fits
            todo = batches(block, np.flatnonzero(is_left), self._images_at_once(size))
            one = next(todo) if failure else None
            try:
                for rows, results in self._compute(todo if one is None else [one]):
                    found.append((rows, results))
                    is_left[rows] = False
            except Exception as cause:  # noqa: BLE001 - a network may raise anything; raised or recorded below
                lacks_memory = isinstance(cause, OutOfMemory)
                if self._is_fixed and lacks_memory and size > 1:
                    self._halve(size)
                    continue
                if self._is_fixed or _is_of_device(cause):
                    _give_up(cause, block.select(IMAGE_SIZE).filter(is_left))
                failure = cause
                traceback.clear_frames(cause.__traceback__)  # which hold what the device has computed of the image
                if one is not None and lacks_memory and len(one[1]) > 1:
                    self._halve(size, one[1])
                elif one is not None:
                    refused.update(dict.fromkeys(one[0].tolist(), _size_refused(cause)))
                    is_left[one[0]] = False
                    self._fits = self._most  # there may be room for the others
        return found, refused, failure

    def _halve(self, size: int, failed: PixelBatch | None = None) -> None:
        """Go on with half the batch size, or with less: what fails with few tiny images is divided, too."""
        if self._fits != size:  # another thread met with the same
            return
        self._fits = size // 2
        while failed is not None and self._images_at_once(self._fits)(*failed.shape[1:3]) > len(failed) // 2:
            self._fits //= 2
        log.warning(
            "out of device memory with batches of %d: going on with %s. Set runtime.batch_size",
            *(size, self._fits or "one image after the other"),
        )

    def _images_at_once(self, batch_size: int) -> Callable[[int, int], int]:
        if self._is_fixed:
            return lambda height, width: batch_size
        return partial(images_at_once, batch_size)

    def _rows(self, samples: pa.Table, results: Results) -> pa.Table:
        """The samples with their results."""
        columns = self._settings.columns
        if columns.top_k:
            for name, column in self._predictions(results.ids, results.scores).items():
                samples = samples.append_column(name, column)
        if columns.embedding_dtype:
            flat = pa.array(results.embeddings.reshape(-1))
            embeddings = pa.FixedSizeListArray.from_arrays(flat, results.embeddings.shape[1])
            samples = samples.append_column("embedding", embeddings)
        return samples

    def _predictions(self, ids: np.ndarray, scores: np.ndarray) -> dict[str, pa.Array]:
        k = ids.shape[1]
        labels = self._classes.take(pa.array(ids.reshape(-1)))
        entries = pa.StructArray.from_arrays(
            [pa.array(ids.reshape(-1)), labels, pa.array(scores.reshape(-1))], ["class_id", "label", "score"]
        )
        return {
            "class_id": pa.array(ids[:, 0]),
            "label": self._classes.take(pa.array(ids[:, 0])),
            "score": pa.array(scores[:, 0]),
            "top_k": pa.ListArray.from_arrays(np.arange(0, len(ids) * k + 1, k, dtype=np.int32), entries),
        }


def _work(block: pa.Table) -> str:
    """What a block is called in the notes."""
    (first, at), (last, end) = ((block["shard"][row].as_py(), block["index"][row].as_py()) for row in (0, -1))
    return f"predict {first}:{at} to {last}:{end}, {block.num_rows} rows"


def batches(block: pa.Table, rows: np.ndarray, at_once: Callable[[int, int], int]) -> Iterator[Batch]:
    """These rows with their pixels, uint8 (B, H, W, 3), images of one size together; of its height and width follows B.

    A batch that lies in one piece in the block is a view of it; others are gathered and padded with zeros.
    """
    heights, widths = block["pixel_height"].to_numpy(), block["pixel_width"].to_numpy()
    images = _PixelColumn(block["pixels"])
    sizes = np.stack([heights[rows], widths[rows]], axis=1).astype(np.int64)
    for size in np.unique(sizes, axis=0):
        same, (height, width) = rows[(sizes == size).all(axis=1)], (int(size[0]), int(size[1]))
        batch_size = at_once(height, width)
        for start in range(0, len(same), batch_size):
            chosen = same[start : start + batch_size]
            yield chosen, images.batch(chosen, (height, width, 3), batch_size)


class _PixelColumn:
    """The pixels of a block as views of its buffer; of several chunks, as Ray may have merged them, a copy is made."""

    def __init__(self, column: pa.ChunkedArray) -> None:
        chunk = column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()
        _, offsets, data = chunk.buffers()
        self._bytes = np.frombuffer(data, np.uint8)
        self._offsets = np.frombuffer(offsets, np.int64, len(chunk) + 1, chunk.offset * 8)

    def batch(self, rows: np.ndarray, shape: tuple[int, int, int], batch_size: int) -> np.ndarray:
        """uint8 (batch_size, *shape); rows beyond `rows` are zero."""
        first, last = rows[0], rows[-1]
        if len(rows) == batch_size == last - first + 1:
            return self._bytes[self._offsets[first] : self._offsets[last + 1]].reshape(batch_size, *shape)
        gathered = np.zeros((batch_size, *shape), np.uint8)
        for place, row in enumerate(rows):
            gathered[place] = self._bytes[self._offsets[row] : self._offsets[row + 1]].reshape(shape)
        return gathered


def _size_refused(cause: Exception) -> Reject:
    if isinstance(cause, OutOfMemory):
        return Reject("predict", "too_large", "the device has too little memory for an image of this size")
    return Reject("predict", "unsupported_size", f"the network fails with an image of this size: {clean(cause)}")


def _is_lasting(cause: Exception) -> bool:
    """Whether all that this process still tries on its device will fail as well: CUDA forgets no error of its kernels.
    Then another process may do better, and an image that causes it is found as one that kills is."""
    if type(cause).__name__ == "AcceleratorError":  # torch's, which an actor with another engine does not import
        return True
    torch = sys.modules.get("torch")
    if torch is None or not _is_of_device(cause) or not torch.cuda.is_initialized():
        return False
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False


def _is_of_device(cause: Exception) -> bool:
    """Whether it is a GPU that is in trouble, whatever the image."""
    said = f"{type(cause).__name__}: {cause}"
    return not isinstance(cause, OutOfMemory) and bool(DEVICE_ERROR.search(said)) and NOT_SUPPORTED not in said


def _give_up(cause: Exception, images: pa.Table) -> NoReturn:
    """Trouble of the device is raised as it is: another worker may do better. A network's would come again."""
    if isinstance(cause, PipelineError) or _is_of_device(cause):
        raise cause
    width, height = (images[name][0].as_py() for name in IMAGE_SIZE)
    if isinstance(cause, OutOfMemory):
        raise FatalError(
            f"the device has not enough memory for a single image of {width} x {height} pixels. Use a larger device,"
            " runtime.device=cpu, or a smaller model.transform."
        ) from cause
    raise FatalError(
        f"the network fails with images of {width} x {height} pixels: {clean(cause)}. Set model.transform.resize and"
        " crop to a size that it takes."
    ) from cause


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
