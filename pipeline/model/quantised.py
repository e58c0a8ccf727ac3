"""int8: a network that NNCF quantises on images of the job, for OpenVINO.

Weights and activations become 8-bit integers, with ranges measured on those images; other images give other ranges and
so other rows. That is why it is done once for a dataset and kept in it: then actors need neither torch nor NNCF, and
every node and every night computes with the same network.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import redirect_stdout
from os import devnull
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline.errors import ConfigError
from pipeline.model.engines import num_cores
from pipeline.model.openvino_engine import (
    PRECISIONS,
    OpenVinoEngine,
    check_installed,
    compiled,
    converted,
    import_untracked,
)
from pipeline.model.spec import ModelSpec

Image = npt.NDArray[np.uint8]  # (H, W, 3)


def quantise(spec: ModelSpec, images: Sequence[Image]) -> Any:
    """OpenVINO's model of the network in int8, with ranges measured on these images (at least one), each by itself.

    Raises ConfigError where OpenVINO or NNCF is not installed, else what `converted` raises.
    """
    check_installed()
    network = converted(spec)
    side = spec.transform.crop or -1
    network.reshape([1, side, side, 3])
    # Progress bars and remarks stay out of stdout, where a caller's JSON may be.
    with Path(devnull).open("w") as nowhere, redirect_stdout(nowhere):
        nncf = _import_nncf()
        found = nncf.quantize(
            network,
            nncf.Dataset([image[np.newaxis] for image in images]),
            preset=nncf.QuantizationPreset.MIXED,  # activations may be asymmetric, as those behind other than ReLU are
            subset_size=len(images),
        )
    found.reshape([-1, side, side, 3])
    return found


def agreement(spec: ModelSpec, quantised: Any, images: Sequence[Image]) -> float:
    """The share of these images whose class is the fp32 network's."""
    networks = [converted(spec), quantised.clone()]
    engines = [OpenVinoEngine(compiled(network, PRECISIONS["int8"], num_cores())) for network in networks]
    same = [len({int(engine(image[np.newaxis])[0].argmax()) for engine in engines}) == 1 for image in images]
    return sum(same) / len(same)


def _import_nncf() -> Any:
    logger_class = logging.getLoggerClass()
    try:
        return import_untracked("nncf")
    except ImportError as error:
        raise ConfigError(
            "model.precision: int8 is calibrated by nncf, which is not installed on this node: pip install"
            " 'nncf>=3,<4', or use another precision. Only the first run of a dataset needs it."
        ) from error
    finally:
        logging.setLoggerClass(logger_class)  # it sets one of its own, for everybody
