"""The engine for CPUs: OpenVINO. A node converts a network once; later actors load it and never import torch.

The converted network is fp32 and takes any batch and image size; batch size, image size where it is known, and
precision are set when it is compiled. It is compared with torch before it is used: conversion follows one run of
the network, so what a network decides by its input would be frozen, and the numbers silently wrong.
"""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.errors import ConfigError, clean
from pipeline.model.cache import cache_directory, lock, new_folder
from pipeline.model.engines import Pixels, Rows, num_cores
from pipeline.model.spec import ModelInfo, ModelSpec
from pipeline.model.zoo import build, cache_key

if TYPE_CHECKING:
    from pipeline.model.network import Network

PRECISIONS = {"float32": "f32", "bfloat16": "bf16"}
TOLERANCE = 1e-3  # greatest difference to torch in fp32, of the greatest value; some 1e-6 is usual


class OpenVinoEngine:
    """See `Engine`."""

    def __init__(self, request: Any) -> None:
        self.request = request

    def __call__(self, pixels: Pixels) -> tuple[Rows, Rows]:
        outputs = self.request.infer([np.ascontiguousarray(pixels)], share_inputs=True)
        return outputs[0], outputs[1]


def load_openvino(spec: ModelSpec, info: ModelInfo, batch_size: int, threads: int | None) -> OpenVinoEngine:
    """The network compiled for this CPU, with all its cores unless `threads` says otherwise.

    Raises ConfigError where OpenVINO is not installed, does not know the network's operations, or the CPU does not
    compute in the precision; else what `zoo.build` raises.
    """
    try:
        import openvino  # noqa: F401
    except ImportError as error:
        raise ConfigError(
            "runtime.engine: openvino is not installed on this node: pip install 'resnet-batch[cpu]', or use"
            " runtime.engine=eager."
        ) from error
    model = _converted(spec)
    side = info.input_size or -1
    model.reshape([batch_size, side, side, 3])
    return OpenVinoEngine(_compile(model, PRECISIONS[spec.precision], threads or num_cores()))


def _compile(model: Any, precision: str, threads: int) -> Any:
    """An inference request. One stream, since batches come one after the other and each should have all cores."""
    import openvino

    settings = {
        # By itself OpenVINO takes bf16 on CPUs that have it.
        "INFERENCE_PRECISION_HINT": precision,
        "NUM_STREAMS": "1",
        "INFERENCE_NUM_THREADS": str(threads),
        # Decoding runs on the same cores: a pinned thread would wait for it where a free one moves aside.
        "ENABLE_CPU_PINNING": "NO",
    }
    compiled = openvino.Core().compile_model(model, "CPU", settings)
    found = compiled.get_property("INFERENCE_PRECISION_HINT").get_type_name()
    if found != precision:
        raise ConfigError(f"model.precision: this CPU computes in {found} instead of {precision}. Use float32.")
    return compiled.create_infer_request()


def _converted(spec: ModelSpec) -> Any:
    """The network as OpenVINO's model: read from this node's cache, or converted and left there if that is sound."""
    import openvino

    key = cache_key(spec, "openvino", "torch", "torchvision")
    if key is None:
        return _convert(spec)
    folder = cache_directory("openvino") / key
    with lock(str(folder)):
        if not folder.is_dir():
            with new_folder(folder) as temporary:
                # Not the default, which rounds the weights to fp16.
                openvino.save_model(_convert(spec), temporary / "network.xml", compress_to_fp16=False)
    return openvino.Core().read_model(folder / "network.xml")


def _convert(spec: ModelSpec) -> Any:
    """Trace the network and translate the trace. Not by `openvino.convert_model`, which sends usage statistics."""
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
            model = frontend.convert(frontend.load(decoder))
    except Exception as error:
        raise ConfigError(
            f"runtime.engine: openvino can't convert the network {spec.name}: {clean(error)}. Use runtime.engine=eager."
        ) from error
    _check_agreement(network, model, spec)
    return model


def _check_agreement(network: Network, model: Any, spec: ModelSpec) -> None:
    """ConfigError unless the converted network gives torch's numbers, at two sizes where images have their own."""
    import torch

    side = network.head.input_size
    engine = OpenVinoEngine(_compile(model.clone(), "f32", num_cores()))
    noise = np.random.default_rng(0).integers(0, 256, (3, side + 32, side, 3), np.uint8)
    for pixels in [noise[:2, :side]] if spec.transform.crop else [noise[:2, :side], noise]:
        try:
            with torch.inference_mode():
                expected = [rows.numpy() for rows in network(torch.from_numpy(pixels))]
        except RuntimeError:
            if len(pixels) == 2:
                raise
            continue  # a network that takes one size only: torch refuses others at run time as well
        for found, wanted in zip(engine(pixels), expected, strict=True):
            if not np.abs(found - wanted).max() <= TOLERANCE * np.abs(wanted).max():
                raise ConfigError(
                    f"runtime.engine: openvino does not compute what torch does with the network {spec.name}, perhaps"
                    " because what it does depends on its input. Use runtime.engine=eager."
                )
