"""Parameters of a network: read, verified, unpacked from what training scripts wrap around them, and put in place.

Nothing but tensors and plain values is ever unpickled: a pickle can run code. Imports torch; workers only.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import logging
import pickle
import re
import socket
import sys
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.errors import WeightsError, clean, redact
from pipeline.model.cache import check_sha256, fetch, file_sha256, lock
from pipeline.model.keys import COUNTERS, StateDict, is_extra, listed, module_of
from pipeline.model.spec import ModelSpec, suffix_of
from pipeline.model.stand_ins import NotPlain, holds_stand_in, safe_globals
from pipeline.urls import is_local

log = logging.getLogger(__name__)

WRAPPERS = ("state_dict", "model_state_dict", "model_state", "model", "network", "net", "module", "weights")
# Names that are looked at where none of those is there: of a network, and of the average of one.
OWN, AVERAGED = ("params", "state"), ("params_ema", "ema")
# How files begin that are often found under a checkpoint's name.
OTHER_FILES = {
    rb"$": "it is empty. Fetch it again",
    rb"\s*<": "it is a web page. Fetch it again, and look at what the server says",
    rb"version https://git-lfs": "it only names a file that Git LFS keeps. Fetch that: git lfs pull",
    rb"\x1f\x8b": "it is compressed by gzip. Unpack it first",
    rb".{257}ustar": "it is a tar. Unpack it first",
}
DOWNLOAD_TIMEOUT_S = 60.0


def load_state_dict(spec: ModelSpec) -> StateDict:
    """The tensors of the model's weights, with the keys that their file has, on the CPU.

    Raises WeightsError for a file that can't be fetched or read, holds no tensors, or is not the expected one.
    """
    reference, sha256 = spec.weights.reference, spec.weights.sha256
    if spec.weights.kind == "torchvision":
        return load_torchvision(reference, sha256)
    path = Path(reference) if is_local(reference) else fetch(reference, spec.storage, sha256)
    return parse(_read(path, reference, sha256), reference)


def load_torchvision(full_name: str, sha256: str | None = None) -> StateDict:
    """The tensors of `ResNet50_Weights.IMAGENET1K_V2`, downloaded into torch's hub directory once per node."""
    from torchvision.models import get_weight

    weights = get_weight(full_name)
    path = Path(torch.hub.get_dir()) / "checkpoints" / Path(weights.url).name
    # torch.hub, too, gives a name only to what is whole.
    fetching = contextlib.nullcontext() if path.is_file() else lock(weights.url)
    # Ray shows a worker's stdout on the driver's, which may be JSON, and torch.hub prints.
    with fetching, contextlib.redirect_stdout(sys.stderr), _socket_timeout(DOWNLOAD_TIMEOUT_S):
        try:
            state = weights.get_state_dict(progress=False, check_hash=True, map_location="cpu", weights_only=True)
        except (OSError, RuntimeError, pickle.UnpicklingError) as error:
            raise WeightsError(
                f"cannot fetch {full_name} from {weights.url}: {clean(error)}. Check the network, or download the"
                f" file elsewhere and put it at {path}."
            ) from error
    found = file_sha256(path) or ""
    if sha256 is not None:
        check_sha256(found, sha256, weights.url)
    elif not found.startswith(path.stem.rpartition("-")[2]):  # its name says so, and torch.hub looks at downloads only
        log.warning("%s is not what torchvision publishes as %s: its sha256 begins with %s", path, full_name, found[:8])
    return StateDict(state, getattr(state, "_metadata", None))


@contextlib.contextmanager
def _socket_timeout(seconds: float) -> Iterator[None]:
    """torch.hub opens its connection without one and would wait forever where packets are dropped."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(seconds)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)


def _read(path: Path, reference: str, sha256: str | None) -> bytes:
    """The file's bytes, read once, so that what was verified is what is loaded."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise WeightsError(
            f"cannot read the weights {path} on node {socket.gethostname()}: {clean(error)}. A path must exist on"
            " every node; a URL (s3://, https://) is fetched by each."
        ) from error
    check_sha256(hashlib.sha256(data).hexdigest(), sha256, reference)
    return data


def parse(data: bytes, source: str) -> StateDict:
    """The tensors in the bytes of a .safetensors file or of a torch checkpoint, wrappers removed."""
    name = redact(source)
    if suffix_of(source) == ".safetensors":
        from safetensors import SafetensorError
        from safetensors.torch import load

        try:
            return StateDict(load(data))
        except SafetensorError as error:
            raise WeightsError(f"{name} is not a safetensors file: {clean(error)}.") from error
    return _unwrap(_unpickle(data, name), name)


def _unpickle(data: bytes, name: str) -> Any:
    for magic, what in OTHER_FILES.items():
        if re.match(magic, data, re.DOTALL):
            raise WeightsError(f"{name} is no checkpoint: {what}.")
    _check_unfolded(data, name)
    try:
        with torch.serialization.safe_globals(safe_globals()):
            return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as error:
        if isinstance(error, NotPlain):
            raise _pickled(name, f"Among them is {error}.") from error
        if isinstance(error, pickle.UnpicklingError) and "GLOBAL" in str(error):
            raise _pickled(name, f"torch says: {_first_sentence(error)}") from error
        raise WeightsError(f"{name} is no checkpoint that torch can read: {_first_sentence(error)}.") from error


def _pickled(name: str, what: str) -> WeightsError:
    return WeightsError(
        f"{name} holds pickled objects besides tensors, which are not loaded, since loading them can run any code."
        " Where you trust the file, save its tensors alone: torch.save(network.state_dict(), path), or as"
        f" .safetensors. {what}"
    )


def _first_sentence(error: Exception) -> str:
    """Of what torch says; the rest is how to run the code in a pickle."""
    text = str(error).partition("\n\nCheck the documentation")[0].rpartition("WeightsUnpickler error:")[2]
    return clean(text.rpartition("\n\n")[2].partition(". ")[0] or type(error).__name__)


def _check_unfolded(data: bytes, name: str) -> None:
    """torch writes its archives uncompressed, but reads compressed ones, which can hold a thousand times their size."""
    if not data.startswith(b"PK"):
        return
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            size = sum(member.file_size for member in archive.infolist())
    except (zipfile.BadZipFile, NotImplementedError) as error:
        raise WeightsError(f"{name} is no checkpoint that torch can read: {clean(error)}.") from error
    if size > len(data):
        raise WeightsError(
            f"{name} unfolds from {len(data)} bytes to {size}, which nothing does that torch.save writes. Save its"
            " tensors anew: torch.save(network.state_dict(), path)."
        )


def _unwrap(checkpoint: Any, name: str) -> StateDict:
    """The mapping of tensors in what a training script saved, such as `{"state_dict": …, "epoch": 3}`."""
    state = _state_in(checkpoint)
    if not _is_network(state) and isinstance(checkpoint, Mapping):
        state = _lone_state(checkpoint, name) or state
    _check_extras(state, name)
    if state:
        return state
    has = (
        f"the entries {', '.join(map(str, checkpoint))}"
        if isinstance(checkpoint, Mapping)
        else f"a {type(checkpoint).__name__}"
    )
    raise WeightsError(
        f"{name} holds no state_dict, but {has}. Save torch.save(network.state_dict(), path), or put it under the"
        f" key {WRAPPERS[0]}."
    )


def _state_in(saved: Any, depth: int = 8) -> StateDict:
    """The tensors of the first wrapper that holds any, which goes before tensors that lie beside it, such as a loss."""
    if not isinstance(saved, Mapping) or not depth:
        return StateDict()
    inner = next(filter(None, (_state_in(saved.get(key), depth - 1) for key in WRAPPERS)), None)
    return inner or StateDict(
        ((str(key), value) for key, value in saved.items() if isinstance(value, Tensor) or is_extra(str(key))),
        getattr(saved, "_metadata", None),
    )


def _lone_state(checkpoint: Mapping[Any, Any], name: str) -> StateDict | None:
    """The only network in a checkpoint without a wrapper's usual name, None where there is none. WeightsError where
    there are several: a network beside its average, or two that were trained against each other."""
    inner = {
        str(key): _state_in(value)
        for key, value in checkpoint.items()
        if not is_extra(str(key)) and (str(key) in (*OWN, *AVERAGED) or _is_of_tensors(value))
    }
    inner = {key: state for key, state in inner.items() if _is_network(state)}
    own = [key for key in OWN if key in inner]
    if len(own) == 1 and not any(key in inner for key in AVERAGED):
        return inner[own[0]]
    if len(inner) > 1:
        raise WeightsError(
            f"{name} holds tensors under several keys, {', '.join(inner)}, any of which may be the network. Save the"
            f" one that is meant under the key {WRAPPERS[0]}, or alone."
        )
    return next(iter(inner.values()), None)


def _is_of_tensors(value: Any) -> bool:
    """Whether it can be a state_dict; what an optimizer keeps lies one step deeper, beside plain values."""
    return isinstance(value, Mapping) and all(
        isinstance(key, str) and (isinstance(found, Tensor) or is_extra(key)) for key, found in value.items()
    )


def _is_network(state: StateDict) -> bool:
    """Whether it holds more than single numbers, such as a loss."""
    return any(isinstance(value, Tensor) and value.ndim for value in state.values())


def _check_extras(state: StateDict, name: str) -> None:
    """WeightsError if a module would be given something else than it has stored."""
    for key, value in state.items():
        if is_extra(key) and holds_stand_in(value):
            raise _pickled(name, f"Among them is what a module is to be given as {key}.")


def fill(network: nn.Module, state: Mapping[str, Any], name: str) -> str | None:
    """Copy the tensors into the network. WeightsError that lists what differs unless they fit exactly, but for one
    `nn.Linear` that they may lack, since backbones are stored without their head: its path is returned."""
    own = _tensors(network)
    _check_plain(own, state, name)
    shapes = {
        key: f"{key} {tuple(state[key].shape)} instead of {tuple(own[key].shape)}"
        for key in _of_another_shape(own, state)
    }
    fitting = {key: value for key, value in state.items() if key not in shapes} if shapes else state
    try:
        # Which keys differ is said by torch, since modules may know older names of theirs, unless it is made silent.
        absent, unknown = network.load_state_dict(fitting, strict=False) or (
            [key for key in own if key not in state],
            [key for key in state if key not in own],
        )
    except Exception as error:  # custom modules may look at what they are given
        raise WeightsError(f"the network does not take the weights {redact(name)}: {clean(error)}.") from error
    # Counters of BatchNorm and of averaged networks may be there or not: inference doesn't need them. Of tensors under
    # several names some formats store one.
    absent = [key for key in absent if key in own and key not in shapes]
    stored = {value.data_ptr() for key, value in own.items() if key not in absent}
    missing = [key for key in absent if not key.endswith(COUNTERS) and own[key].data_ptr() not in stored]
    unexpected = [key for key in unknown if not (key.endswith(COUNTERS) or is_extra(key))]
    if not (missing or unexpected or shapes):
        return None
    unfilled = None if unexpected or shapes else _linear_of(network, missing)
    if unfilled is None:
        raise misfit(name, missing, unexpected, list(shapes.values()))
    return unfilled


def _linear_of(network: nn.Module, missing: list[str]) -> str | None:
    """The path of the `nn.Linear` whose tensors are just these."""
    layers = {path: module for path, module in network.named_modules() if isinstance(module, nn.Linear)}
    return next((path for path in layers if {f"{path}.{key}" for key in _tensors(layers[path])} == set(missing)), None)


def misfit(
    name: str, missing: Sequence[str], unexpected: Sequence[str] = (), shapes: Sequence[str] = ()
) -> WeightsError:
    return WeightsError(
        f"the weights {redact(name)} do not fit the network"
        + listed("missing in the weights", missing)
        + listed("unknown to the network", unexpected)
        + listed("of another shape", shapes)
        + f". {_advice(missing, unexpected)}"
    )


def _advice(missing: Sequence[str], unexpected: Sequence[str]) -> str:
    """A layer, usually the head, may have been replaced by several."""
    modules = {module_of(key) for key in missing}
    name = next(iter(modules), "")
    if len(modules) != 1 or not unexpected or not all(module_of(key).startswith(f"{name}.") for key in unexpected):
        return "Check model.name and model.num_classes."
    return (
        f"Its {name} was replaced by other layers before it was trained: give model.name a callable that builds the"
        " network with these, as my_networks:build."
    )


def _check_plain(own: Mapping[str, Tensor], state: Mapping[str, Any], name: str) -> None:
    odd = [
        f"{key} {str(state[key].dtype).removeprefix('torch.')}, {state[key].layout}"
        for key, value in own.items()
        if key in state and not key.endswith(COUNTERS) and not _is_plain(state[key], value)
    ]
    if odd:
        raise WeightsError(
            f"the weights {redact(name)} are not stored as plain numbers{listed('that are something else', odd)}. Save"
            " those of the network before it was quantised or pruned."
        )


def _is_plain(stored: Tensor, wanted: Tensor) -> bool:
    """Whether a tensor's values are those that the network's own is to have, if perhaps in another precision."""
    is_alike = stored.is_floating_point() == wanted.is_floating_point() and stored.is_complex() == wanted.is_complex()
    return is_alike and stored.layout == torch.strided and not stored.is_meta and not stored.is_quantized


def fits(network: nn.Module, state: Mapping[str, Any]) -> bool:
    """Whether all tensors that both have are of one shape."""
    return not _of_another_shape(_tensors(network), state)


def _of_another_shape(own: Mapping[str, Tensor], state: Mapping[str, Any]) -> list[str]:
    return [key for key, value in own.items() if key in state and not _has_shape(state[key], value.shape)]


def _has_shape(stored: Tensor, shape: torch.Size) -> bool:
    """A single number may be a vector of one, as torch 0.3 stored it: torch takes either."""
    return stored.shape == shape or (stored.shape == (1,) and shape == ())


def _tensors(network: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by key, without what a module keeps besides (`get_extra_state`)."""
    state = network.state_dict()
    return {key: value for key, value in state.items() if isinstance(value, Tensor) and not is_extra(key)}
