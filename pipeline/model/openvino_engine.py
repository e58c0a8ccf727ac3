"""The engine for CPUs: OpenVINO. A node converts a network once; later actors load it and never import torch.

The converted network is fp32 and takes any batch and image size; both, where the image size is known, and the
precision are set when it is compiled. It is compared with torch before it is used: conversion follows one run of
the network, so what a network decides by its input would be frozen, and the numbers silently wrong.

An int8 network is not converted but loaded as its dataset keeps it: `quantised.py` makes it.
"""

from __future__ import annotations

import importlib
import io
import logging
import shutil
import sys
import tempfile
import warnings
import zipfile
from collections.abc import Iterator
from pathlib import Path
from queue import SimpleQueue
from threading import Lock
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.errors import ConfigError, FatalError, WeightsError, clean, redact
from pipeline.model.cache import cache_directory, fetch, lock, new_folder
from pipeline.model.engines import Outputs, PixelBatch, Unconvertible, num_cores
from pipeline.model.spec import ModelSpec, Quantised
from pipeline.model.zoo import build, cache_key

if TYPE_CHECKING:
    from pipeline.model.network import Network

log = logging.getLogger(__name__)

# What is not quantised in an int8 network is computed in fp32.
PRECISIONS = {"float32": "f32", "bfloat16": "bf16", "int8": "f32"}
TELEMETRY = "openvino_telemetry"
NETWORK = ("network.xml", "network.bin")  # OpenVINO's files
STREAMS = 8  # at the most: every one has memory for a batch
THREADS = 8  # at least for each, where one image may need gigabytes
IMAGES = 256  # that lie in two blocks of pixels at least, or else eight batches
# Arrays go into and out of OpenVINO by one thread at a time: the first two to do so would wait for each other for ever,
# one for what the other sets up, that one for Python's lock. (A function's static variable in its Python binding.)
BINDING = Lock()
TOLERANCE = 1e-3  # greatest difference to torch in fp32, of the greatest value; some 1e-6 is usual


class OpenVinoEngine:
    """See `Engine`. The network is compiled: `compiled` makes it."""

    def __init__(self, network: Any) -> None:
        self.streams: int = network.get_property("NUM_STREAMS")
        self._idle: SimpleQueue[Any] = SimpleQueue()
        for _ in range(self.streams):
            self._idle.put(network.create_infer_request())

    def __call__(self, pixels: PixelBatch) -> tuple[Outputs, Outputs]:
        request = self._idle.get()
        try:
            with BINDING:
                request.start_async([np.ascontiguousarray(pixels)], share_inputs=True)
            request.wait()
            with BINDING:
                logits, embeddings = (request.get_output_tensor(number).data.copy() for number in range(2))
            return logits, embeddings
        finally:
            self._idle.put(request)


def load_openvino(spec: ModelSpec, batch_size: int) -> OpenVinoEngine:
    """The network compiled for this CPU, with all its cores.

    Raises ConfigError where OpenVINO is not installed, does not know the network's operations, or the CPU does not
    compute in the precision, or for int8 without a calibrated network; else what `zoo.build` raises.
    """
    check_installed()
    if spec.needs_calibration:
        raise ConfigError(
            "model.precision: int8 needs a network that is calibrated on a job's own images. A run makes it and leaves"
            " it in its dataset, but output.url has none yet. Do the run first, or use another precision."
        )
    network = converted(spec) if spec.quantised is None else _stored(spec.quantised)
    side = spec.input_size
    network.reshape([batch_size, side, side, 3] if side else [-1, -1, -1, 3])
    threads = num_cores()
    streams = num_streams(threads, batch_size, spec.input_size)
    return OpenVinoEngine(compiled(network, PRECISIONS[spec.precision], threads, streams))


def num_streams(threads: int, batch_size: int, input_size: int | None) -> int:
    """How many batches to compute at once, each on an equal share of the threads.

    A batch for each core, not all cores for a batch: threads that share a batch wait for each other after every layer,
    and so for whatever else one of the cores does. No more than there are batches to have; and few where images come in
    sizes of their own, of which a single one may need much memory.
    """
    most = min(STREAMS, max(1, IMAGES // batch_size)) if input_size else max(1, threads // THREADS)
    return threads // -(-threads // most)


def check_installed() -> None:
    """ConfigError unless there is OpenVINO. MUST come before any other import of it."""
    try:
        import_untracked("openvino")
    except ImportError as error:
        raise ConfigError(
            "runtime.engine: openvino is not installed on this node: pip install openvino, or use runtime.engine=eager."
        ) from error


def import_untracked(name: str) -> Any:
    """Import OpenVINO or NNCF as if the package were missing that sends their usage statistics: without that, a mere
    `import openvino` forks a process that calls Google Analytics."""
    before = sys.modules.get(TELEMETRY)
    sys.modules[TELEMETRY] = None  # type: ignore[assignment]  # Python's sign for "there is no such module"
    try:
        return importlib.import_module(name)
    finally:
        del sys.modules[TELEMETRY]
        if before is not None:
            sys.modules[TELEMETRY] = before


def compiled(network: Any, precision: str, threads: int, streams: int = 1) -> Any:
    """The network for this CPU, which computes `streams` batches at once, each on its share of the threads."""
    import openvino

    settings = {
        # By itself OpenVINO takes bf16 on CPUs that have it.
        "INFERENCE_PRECISION_HINT": precision,
        "NUM_STREAMS": str(streams),
        "INFERENCE_NUM_THREADS": str(threads),
        # Decoding runs on the same cores: a pinned thread would wait for it where a free one moves aside.
        "ENABLE_CPU_PINNING": "NO",
        # By itself OpenVINO leaves out the second thread of a core, and divides what remains unevenly.
        "ENABLE_HYPER_THREADING": "YES",
    }
    if any(operation.get_type_name() == "GroupNormalization" for operation in network.get_ops()):
        settings["SNIPPETS_MODE"] = "DISABLE"  # else compiling a ResNet with group norms of a fixed size is a segfault
    found = openvino.Core().compile_model(network, "CPU", settings)
    chosen = found.get_property("INFERENCE_PRECISION_HINT").get_type_name()
    if chosen != precision:
        raise ConfigError(f"model.precision: this CPU computes in {chosen} instead of {precision}. Use float32.")
    return found


def is_converted(spec: ModelSpec) -> bool:
    """Whether this node's cache holds the network."""
    folder = _folder(spec)
    return folder is not None and folder.is_dir()


def _folder(spec: ModelSpec) -> Path | None:
    key = cache_key(spec, "openvino", "torch", "torchvision")
    return cache_directory("openvino") / key if key else None


def converted(spec: ModelSpec) -> Any:
    """The fp32 network: read from this node's cache, or converted and left there if that is sound.

    Raises Unconvertible, and what `zoo.build` raises.
    """
    check_installed()
    import openvino

    folder = _folder(spec)
    if folder is None:
        return _convert(spec)
    network = _kept(folder)
    if network is not None:
        return network
    with lock(str(folder)):
        network = _kept(folder)  # another process may have converted it meanwhile
        if network is not None:
            return network
        with new_folder(folder) as temporary:
            if folder.is_dir():
                log.warning("the converted network in %s cannot be read: converting it again", folder)
            _save(_convert(spec), temporary)
            shutil.rmtree(folder, ignore_errors=True)
        return openvino.Core().read_model(folder / NETWORK[0])


def _kept(folder: Path) -> Any | None:
    """The network that this node has converted, None if it hasn't or its files are damaged."""
    import openvino

    try:
        return openvino.Core().read_model(folder / NETWORK[0]) if folder.is_dir() else None
    except RuntimeError:
        return None


def _save(network: Any, folder: Path) -> None:
    """Raises FatalError where it can't be written."""
    import openvino

    try:
        # Not the default, which rounds the weights to fp16.
        openvino.save_model(network, folder / NETWORK[0], compress_to_fp16=False)
    except RuntimeError as error:
        raise FatalError(
            f"cannot write the converted network to {folder}: {clean(error)}. Is the disk full? Free some space there,"
            " or set RESNET_BATCH_CACHE to another folder (TMPDIR for an int8 network)."
        ) from error


def packed(network: Any) -> bytes:
    """The network as one file, a zip of OpenVINO's two."""
    buffer = io.BytesIO()
    with tempfile.TemporaryDirectory() as folder, zipfile.ZipFile(buffer, "w") as archive:
        _save(network, Path(folder))
        for name in NETWORK:
            archive.writestr(zipfile.ZipInfo(name), (Path(folder) / name).read_bytes())  # without a time
    return buffer.getvalue()


def unpacked(path: Path) -> Any:
    """The network that `packed` put into a file. WeightsError for another file."""
    import openvino

    try:
        with zipfile.ZipFile(path) as archive:
            text, weights = (archive.read(name) for name in NETWORK)
        return openvino.Core().read_model(text, weights)
    except (zipfile.BadZipFile, KeyError, RuntimeError) as error:
        raise WeightsError(f"{path} is no network that this OpenVINO reads: {clean(error)}.") from error


def _stored(quantised: Quantised) -> Any:
    advice = "The dataset can only grow with the int8 network that it was begun with: restore it, or begin a new one."
    return unpacked(fetch(quantised.url, quantised.storage, quantised.sha256, advice))


def _convert(spec: ModelSpec) -> Any:
    """Trace the network and translate the trace. Not by `openvino.convert_model`, which sends usage statistics."""
    import openvino
    import torch
    from openvino.frontend import FrontEndManager
    from openvino.frontend.pytorch.ts_decoder import TorchScriptPythonDecoder

    network = build(spec)
    side = network.head.input_size
    example = torch.zeros((2, side, side, 3), dtype=torch.uint8)
    try:
        with warnings.catch_warnings(action="ignore"):  # tracing warns of what `_check_agreement` tests
            decoder = TorchScriptPythonDecoder(network, example_input=(example,))
            frontend = FrontEndManager().load_by_framework("pytorch")
            loaded = frontend.load(decoder)
            if spec.transform.crop:  # what is computed from the size is then a constant
                loaded.set_partial_shape(loaded.get_inputs()[0], openvino.PartialShape([-1, side, side, 3]))
            model = frontend.convert(loaded)
    except Exception as error:
        raise Unconvertible(
            f"OpenVINO can't convert the network {spec.name}: {clean(error)}. {_way_out(spec)}."
        ) from error
    _check_agreement(network, model, spec)
    return model


def _way_out(spec: ModelSpec) -> str:
    if spec.precision == "int8":
        return "In int8 nothing else computes it: use another model.precision"
    return "With runtime.engine=eager it is computed"


def _check_agreement(network: Network, model: Any, spec: ModelSpec) -> None:
    """Unconvertible unless the converted network gives torch's numbers. WeightsError if torch gives none that are
    finite: where it gives some, images may have results, and those that have none become error rows."""
    differs = (
        f"OpenVINO does not compute what torch does with the network {spec.name}, perhaps because what it does depends"
        f" on its input, or on the size or the number of the images. {_way_out(spec)}."
    )
    examples = list(_computed_examples(network, spec.transform.crop is not None))
    if not any(_has_finite_row(expected) for _, expected in examples):
        raise WeightsError(
            f"the network {spec.name} returns numbers that are not finite, in torch as well: its weights"
            f" ({redact(spec.weights.reference) or spec.weights.kind}) are damaged, or training has diverged."
        )
    try:
        engine = OpenVinoEngine(compiled(model.clone(), "f32", num_cores()))
        agree = all(
            _agree(*rows) for pixels, expected in examples for rows in zip(engine(pixels), expected, strict=True)
        )
    except RuntimeError as error:
        raise Unconvertible(f"{differs} OpenVINO says: {clean(error)}") from error
    if not agree:
        raise Unconvertible(differs)


def _computed_examples(network: Network, is_fixed: bool) -> Iterator[tuple[PixelBatch, list[Outputs]]]:
    """Pixels, and torch's logits and embeddings of them. A network may take one size only, that of the first example:
    torch refuses others at run time as well."""
    import torch

    for number, pixels in enumerate(_examples(network.head.input_size, is_fixed)):
        try:
            with torch.inference_mode():
                expected = [rows.numpy() for rows in network(torch.from_numpy(pixels))]
        except Exception:
            if number == 0:
                raise
            continue
        yield pixels, expected


def _has_finite_row(outputs: list[Outputs]) -> bool:
    """Whether the logits and the embedding of an image are finite."""
    return bool(np.all([np.isfinite(rows).all(axis=1) for rows in outputs], axis=0).any())


def _examples(side: int, is_fixed: bool) -> Iterator[PixelBatch]:
    """Batches uint8 (3 or 1, H, W, 3) of another kind than the two black images of `side` pixels that are traced:
    what a network makes of how many they are, of how bright or of what size would be frozen. The first is of that
    size."""
    noise = np.random.default_rng(0).integers(0, 256, (3, side + 32, side + 32, 3), np.uint8)
    yield np.ascontiguousarray(noise[:, :side, :side])
    bright = np.linspace(160, 255, side * side * 3).reshape(1, side, side, 3)
    yield bright.astype(np.uint8)
    if not is_fixed:
        for height, width in ((side + 32, side), (side, side + 32), (side + 32, side + 32), (side // 2, side // 2)):
            yield np.ascontiguousarray(noise[:, :height, :width])


def _agree(found: Outputs, wanted: Outputs) -> bool:
    """Whether the finite numbers are alike, and stand in the same places: a row that is not finite is an error row."""
    if found.shape != wanted.shape:
        return False
    is_finite = np.isfinite(wanted)
    if not np.array_equal(np.isfinite(found), is_finite):
        return False
    found, wanted = found[is_finite], wanted[is_finite]
    return not wanted.size or bool(np.abs(found - wanted).max() <= TOLERANCE * np.abs(wanted).max())
