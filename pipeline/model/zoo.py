"""Networks by name: the paper's depths, torchvision's ResNet family, and your own. torch is imported on use only."""

from __future__ import annotations

import inspect
import logging
import os
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.config import digest
from pipeline.errors import ConfigError, PipelineError, WeightsError, clean
from pipeline.model.cache import file_sha256, keep, recall
from pipeline.model.catalog import NUM_IMAGENET_CLASSES
from pipeline.model.classes import check_count
from pipeline.model.source import installed_packages, is_closed, load_callable
from pipeline.model.spec import ModelInfo, ModelSpec, noop_info

if TYPE_CHECKING:
    from torch import nn

    from pipeline.model.network import Head, Network

log = logging.getLogger(__name__)

PRETRAINED = {18: "IMAGENET1K_V1", 34: "IMAGENET1K_V1", 50: "IMAGENET1K_V2", 101: "IMAGENET1K_V2", 152: "IMAGENET1K_V2"}


def get_resnet(depth: int, pretrained: bool = False, num_classes: int = 1000) -> nn.Module:
    """The residual network of that many layers (He et al. 2015, table 1), as torchvision builds it.

    With `pretrained`, torchvision's best ImageNet weights of that depth: IMAGENET1K_V1 for 18 and 34 layers,
    IMAGENET1K_V2 for 50, 101 and 152; they have 1,000 classes. Raises ValueError for another depth.
    """
    from torchvision import models

    if depth not in PRETRAINED:
        raise ValueError(f"there is no ResNet of depth {depth}. Supported: {', '.join(map(str, PRETRAINED))}.")
    if pretrained and num_classes != 1000:
        raise ValueError(f"the pretrained weights have 1000 classes, not {num_classes}.")
    network: nn.Module = models.get_model(f"resnet{depth}", weights=None, num_classes=num_classes)
    if pretrained:
        from pipeline.model.weights import load_torchvision

        network.load_state_dict(load_torchvision(f"ResNet{depth}_Weights.{PRETRAINED[depth]}"))
    return network


def share_cores() -> None:
    """Have torch's threads sleep instead of spin while they wait for each other. Must come before torch is imported.

    Where decoding runs on the same cores, spinning threads steal the time of those that they wait for: ResNet-18 on
    two cores of a busy machine made 10 images/s with spinning threads and 48 with sleeping ones.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")


def build(spec: ModelSpec) -> Network:
    """The network of a spec with its weights, ready for inference on the CPU: pixels to logits and embedding.

    Raises ConfigError for a network that can't be built, has no pooled embedding or another number of classes than
    `model.num_classes` says; WeightsError.
    """
    share_cores()
    from pipeline.model.network import Network, set_arithmetic

    body, unfilled = _with_weights(spec)
    body.eval()
    for parameter in body.parameters():
        parameter.requires_grad_(False)
    head = _head_of(body, spec)
    if unfilled not in (None, head.name):
        raise _lacks(spec, body, unfilled)
    _check_num_classes(spec, head.num_classes)
    set_arithmetic()
    return Network(body, replace(head, is_filled=unfilled is None), spec.transform).eval()


def _lacks(spec: ModelSpec, body: nn.Module, layer: str) -> WeightsError:
    from pipeline.model.weights import misfit

    return misfit(spec.weights.reference, [f"{layer}.{key}" for key in body.get_submodule(layer).state_dict()])


def resolve(spec: ModelSpec) -> ModelInfo:
    """What is to be known of the model besides its spec. Builds the network unless this node remembers it.

    Raises ConfigError if there is not one class name for every class, or if a row of the results depends on others;
    WeightsError if embeddings need a head that the weights lack; else as `build`.
    """
    known = remembered(spec)
    if known is not None:
        return known
    share_cores()
    from pipeline.model.network import check_rows, depends_on_head, ends_in_softmax

    network, classes = build(spec), spec.classes or _imagenet_names(spec)
    head = network.head
    check_count(classes, head.num_classes)
    noise = check_rows(network, spec.name)
    if not head.is_filled and depends_on_head(network):
        raise _lacks(spec, network.body, head.name)
    if head.linear.out_features != head.num_classes:
        log.warning(
            "model.name: the embedding is what %s is given, the last nn.Linear that %s executes. That is no head, as it"
            " returns %d numbers for %d classes: see to it that the pooled features are what goes into it",
            *(head.name, spec.name, head.linear.out_features, head.num_classes),
        )
    info = ModelInfo(head.num_classes, classes, head.embedding_dim, ends_in_softmax(noise), head.is_filled)
    keep("info", cache_key(spec, "torch", "torchvision"), asdict(info))
    return info


def remembered(spec: ModelSpec) -> ModelInfo | None:
    """What `resolve` returns, if this node has found it before; None if the network must be built for it."""
    if spec.is_noop:
        return noop_info(spec)
    found = recall("info", cache_key(spec, "torch", "torchvision"))
    return found and ModelInfo(**found | {"classes": found["classes"] and tuple(found["classes"])})


def cache_key(spec: ModelSpec, *packages: str) -> str | None:
    """Names what was made from a model with these packages and this code; None where that can change unseen.

    A custom network may import any package, so all that are installed are in its key. It can change unseen where its
    code reads other things than its own files (`source.is_closed`), or where its weights are as it leaves them.
    """
    others: list[str] = []
    if spec.source is not None and not spec.source.is_own:
        if spec.weights.kind != "file" or not is_closed(spec.source):
            return None
        others = installed_packages()
    code = {path.name: file_sha256(path) for path in sorted(Path(__file__).parent.glob("*.py"))}
    made_with = [[package, version(package)] for package in packages]
    # The sha256, since a fingerprint knows torchvision's weights by name, and what is cached is not checked again; the
    # class count, since weights without a head leave it open, and a fingerprint leaves it to the weights.
    return digest([spec.fingerprint, spec.weights.sha256, spec.num_classes, code, made_with, *others], 32)


def _check_num_classes(spec: ModelSpec, found: int) -> None:
    if spec.num_classes not in (None, found):
        raise ConfigError(
            f"model.num_classes is {spec.num_classes}, but the network {spec.name} has {found} classes. A custom"
            " callable may take num_classes as an argument; leave the key out otherwise."
        )


def _imagenet_names(spec: ModelSpec) -> tuple[str, ...] | None:
    if spec.weights.kind != "torchvision":
        return None
    from torchvision.models import get_weight

    return tuple(get_weight(spec.weights.reference).meta["categories"])


def _with_weights(spec: ModelSpec) -> tuple[nn.Module, str | None]:
    """The network as made and filled, its class count taken from the weights unless the config gives one; and the
    linear layer that the weights lack.

    It has not been run before it is filled, and not been in eval mode: some derive tensors from their parameters then.
    """
    from pipeline.model.keys import match_keys
    from pipeline.model.weights import fill, fits, load_state_dict

    make = _maker(spec)
    if spec.weights.kind == "random":
        return make(spec.num_classes or (len(spec.classes) if spec.classes else None)), None
    body = make(spec.num_classes)
    state = match_keys(load_state_dict(spec), body.state_dict())
    if spec.num_classes is None and not fits(body, state):
        head = _head_of(body.eval(), spec)
        # Its weight may be under other names (weight_norm), but the first dimension is that of the classes.
        found = (
            value for key, value in state.items() if key.startswith(f"{head.name}.") and bool(getattr(value, "ndim", 0))
        )
        body = make(next(found, head.linear.weight).shape[0])
    return body, fill(body, state, spec.weights.reference)


def _head_of(body: nn.Module, spec: ModelSpec) -> Head:
    """The network's head. One in half or double precision that does not take float32 images is put into float32."""
    import torch

    from pipeline.model.network import find_head

    try:
        return find_head(body, spec.transform.crop, spec.name)
    except ConfigError:
        if all(parameter.dtype == torch.float32 for parameter in body.parameters()):
            raise
        return find_head(body.float(), spec.transform.crop, spec.name)


def _maker(spec: ModelSpec) -> Callable[[int | None], nn.Module]:
    """What makes the untrained network with a given number of classes, or with its own if that is None."""
    if spec.source is not None:
        # Modules may draw numbers too. Not with the config's seed: a process imports once, for whichever comes first.
        with _seeded(0):
            factory = load_callable(spec.source)
        takes = _takes_num_classes(factory)
        if spec.weights.kind == "file" and _needs_num_classes(factory):  # until the file's head is seen
            factory = partial(factory, num_classes=NUM_IMAGENET_CLASSES)
    else:
        from torchvision import models

        factory, takes = partial(models.get_model, spec.name, weights=None), True
    return lambda num_classes: _make(
        partial(factory, num_classes=num_classes) if takes and num_classes is not None else factory, spec
    )


def _takes_num_classes(factory: Callable[..., Any]) -> bool:
    parameters = inspect.signature(factory).parameters
    return "num_classes" in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())


def _needs_num_classes(factory: Callable[..., Any]) -> bool:
    parameter = inspect.signature(factory).parameters.get("num_classes")
    return parameter is not None and parameter.default is parameter.empty


def _make(factory: Callable[[], Any], spec: ModelSpec) -> nn.Module:
    """What the factory makes, on the CPU, without what parallelises or compiles it: that is the engine's affair."""
    import torch

    with _seeded(spec.weights.seed):
        try:
            body = factory()
        except PipelineError:
            raise
        except SystemExit as error:
            raise ConfigError(
                f"model.name: {spec.name} ends the process as it is called (argparse?). It is called by another"
                " program, whose command line is not its own: give its arguments defaults."
            ) from error
        except Exception as error:
            advice = (
                "Of its files only Python's travel: name others by a path that every node has, weights in model.weights"
                if isinstance(error, OSError)
                else "It is called without arguments, or with num_classes where it takes that"
            )
            raise ConfigError(
                f"model.name: calling {spec.name} failed with {type(error).__name__}: {clean(error)}. {advice}."
            ) from error
    if not isinstance(body, torch.nn.Module):
        raise ConfigError(f"model.name: {spec.name} returned a {type(body).__name__}, not an nn.Module.")
    if any(isinstance(parameter, torch.nn.parameter.UninitializedParameter) for parameter in body.parameters()):
        raise ConfigError(f"model.name: {spec.name} has lazy layers. Run it once in the callable, or give their sizes.")
    return _bare(body).cpu()  # some put themselves on the GPU


def _bare(network: nn.Module) -> nn.Module:
    """The network inside of DataParallel and torch.compile."""
    from torch import nn

    inner = network.module if isinstance(network, nn.DataParallel) else getattr(network, "_orig_mod", None)
    return network if inner is None else _bare(inner)


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Random numbers from a seed, torch's, numpy's and Python's, leaving this process's own state alone."""
    import numpy as np
    import torch

    before = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            random.seed(seed)
            np.random.seed(seed % 2**32)
            yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])
