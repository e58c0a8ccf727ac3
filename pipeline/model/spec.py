"""The model that a config asks for, as far as it can be known without torch: for the driver, and for every worker."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from pathlib import PurePosixPath
from typing import Any, Literal
from urllib.parse import urlsplit

from pipeline.config import JobConfig, Model, Output, Precision, Storage, Transform, digest
from pipeline.errors import ConfigError, clean
from pipeline.model.cache import fetch, file_sha256
from pipeline.model.catalog import ARCHITECTURES, NUM_IMAGENET_CLASSES, architecture, full_weights_name
from pipeline.model.classes import check_count, class_names, find_file
from pipeline.model.source import Source, locate
from pipeline.rows import Columns
from pipeline.urls import is_local, is_relative, local_path

FILE_SUFFIXES = (".pth", ".pt", ".th", ".ckpt", ".bin", ".tar", ".safetensors")  # .pth.tar among them

# Part of every fingerprint: raise it when the same settings begin to mean other numbers, as they would if EXIF
# orientation were no longer applied. Datasets written before are then refused rather than mixed.
RECIPE = 1
CALIBRATION = "calibration"  # the component of an identity that names an int8 network


@dataclass(frozen=True)
class WeightsRef:
    """Where parameters come from: torchvision's by full name, a file by absolute path or URL, or a seed.

    `none` is the noop engine's, which needs no parameters. A file always has a sha256.
    """

    kind: Literal["torchvision", "file", "random", "none"]
    reference: str = ""
    sha256: str | None = None
    seed: int = 0

    def identity(self) -> str:
        """What of it decides the numbers."""
        if self.kind == "file":
            return f"sha256:{self.sha256}"
        return {"torchvision": self.reference, "random": f"random, seed {self.seed}", "none": "none"}[self.kind]


@dataclass(frozen=True)
class Quantised:
    """Where a dataset keeps the int8 network that was calibrated for it."""

    url: str
    sha256: str
    storage: Storage


@dataclass(frozen=True)
class ModelSpec:
    """All that a worker needs to build the model. Picklable.

    `identity` holds the components behind `fingerprint`, so that two datasets' difference can be spelled out.
    """

    name: str
    weights: WeightsRef
    num_classes: int | None  # as asked for; None: whatever the weights or the network have
    classes: tuple[str, ...] | None
    transform: Transform  # the preset with the config's overrides on top
    precision: Precision
    storage: Storage  # how the weights' URL is reached
    source: Source | None = field(repr=False)  # of a custom network
    fingerprint: str
    identity: dict[str, Any]
    quantised: Quantised | None = None

    @property
    def is_noop(self) -> bool:
        """Whether it is for the noop engine."""
        return self.weights.kind == "none"

    @property
    def input_size(self) -> int | None:
        """Height and width of the pixels; None where images come in sizes of their own."""
        return self.transform.crop

    @property
    def needs_calibration(self) -> bool:
        """An int8 network is made of a job's own images; until then the fingerprint is not the dataset's."""
        return self.precision == "int8" and not self.is_noop and self.quantised is None

    def calibrated(self, quantised: Quantised) -> ModelSpec:
        """The same model with that network, which is part of what decides the rows."""
        identity = self.identity | {CALIBRATION: f"sha256:{quantised.sha256}"}
        return replace(self, quantised=quantised, identity=identity, fingerprint=digest(identity))


@dataclass(frozen=True)
class ModelInfo:
    """What only the built network knows."""

    num_classes: int
    classes: tuple[str, ...] | None
    embedding_dim: int
    ends_in_softmax: bool = False
    has_head: bool = True  # in its weights


PROBE_SIZES = (224, 32, 64, 96, 28)  # pixels that a network is tried with in turn, where the transform sets no size


def suffix_of(url: str) -> str:
    """Of a path or URL, such as `.pth`."""
    return PurePosixPath(urlsplit(url).path if "://" in url else url).suffix


def result_columns(output: Output, info: ModelInfo) -> Columns:
    """Raises ConfigError where a network can't tell classes apart, has no head, or returns probabilities for logits."""
    if output.predictions and not info.has_head:
        raise ConfigError(
            "output.predictions: the weights are those of a backbone, without the head that makes predictions, or with"
            " another one beside it. Set output.predictions=false for embeddings alone, or give the weights of the"
            " whole network, with model.name a callable that builds it."
        )
    if output.predictions and info.num_classes == 1:
        raise ConfigError(
            "output.predictions: the network has one class, so every image would be of it, with the score 1. Give the"
            " network two logits, for no and yes, or set output.predictions=false for embeddings alone."
        )
    if output.predictions and info.ends_in_softmax:
        raise ConfigError(
            "output.predictions: the network returns probabilities where logits are needed, and a second softmax would"
            " make their scores nearly equal. Leave out the one that it ends in, or set output.predictions=false for"
            " embeddings alone."
        )
    top_k = output.top_k if output.predictions else 0
    return Columns(top_k, output.embedding_dtype if output.embeddings else None, info.embedding_dim)


def make_spec(config: JobConfig) -> ModelSpec:
    """Find and check the model of a job. Reads the weights file once to hash it, unless `model.sha256` is given.

    Raises ConfigError for what can't be built, WeightsError for weights that can't be fetched.
    """
    model = config.model
    source = locate(model.name, config.directory) if model.is_custom else None
    weights = WeightsRef("none") if config.runtime.engine == "noop" else _weights(config)
    classes = class_names(model.classes, config.directory, config.storage)
    check_count(classes, _num_classes(model, weights))
    transform = _preset(model).overlaid(model.transform)
    _check_crop(transform, model.transform)
    identity = _identity(config, weights, source, classes, transform)
    return ModelSpec(
        name=model.name,
        weights=weights,
        num_classes=model.num_classes,
        classes=classes,
        transform=transform,
        precision=model.precision,
        storage=config.storage,
        source=source,
        fingerprint=digest(identity),
        identity=identity,
    )


def noop_info(spec: ModelSpec) -> ModelInfo:
    """The shape of what the noop engine returns: the real network's where that is known without building it."""
    known = ARCHITECTURES.get(spec.name)
    named = len(spec.classes) if spec.classes is not None else None
    num_classes = spec.num_classes or named or NUM_IMAGENET_CLASSES
    return ModelInfo(num_classes, spec.classes, known.embedding_dim if known else 512)


def _num_classes(model: Model, weights: WeightsRef) -> int | None:
    if weights.kind != "torchvision":
        return model.num_classes
    if model.num_classes not in (None, NUM_IMAGENET_CLASSES):
        raise ConfigError(
            f"model.num_classes: {weights.reference} has {NUM_IMAGENET_CLASSES} classes, not {model.num_classes}."
            " Leave it out, or give the weights of a network that was trained on other classes."
        )
    return NUM_IMAGENET_CLASSES


def _weights(config: JobConfig) -> WeightsRef:
    model = config.model
    if model.weights == "random":
        return WeightsRef("random", seed=model.seed)
    if suffix_of(model.weights) in FILE_SUFFIXES:
        return _weights_file(config)
    if model.is_custom:
        raise ConfigError(
            f"model.weights: the network {model.name} takes a path or URL that ends in {', '.join(FILE_SUFFIXES)},"
            f" or random (as the callable leaves them); got {model.weights!r}."
        )
    reference = full_weights_name(model.name, model.weights)
    return WeightsRef("torchvision", reference, model.sha256 and model.sha256.lower())


def _weights_file(config: JobConfig) -> WeightsRef:
    """A local path is made absolute and hashed in place, a URL fetched into this node's cache."""
    url, known = config.model.weights, config.model.sha256
    if is_local(url):
        path = local_path(url) if "://" in url else find_file(url, config.directory, "model.weights")
        try:
            url, found = str(path), known or file_sha256(path)
        except OSError as error:
            raise ConfigError(f"model.weights: cannot read {path}: {clean(error)}.") from error
        if found is None:
            raise ConfigError(f"model.weights: there is no file {path}.")
    else:
        found = known or fetch(url, config.storage).stem
    return WeightsRef("file", url, found.lower())


def with_absolute_weights(config: JobConfig) -> JobConfig:
    """The same job for a process that works in another folder. A path that is absolute may be of another machine, so
    that only a relative one is looked for."""
    url = config.model.weights
    if suffix_of(url) not in FILE_SUFFIXES or not is_local(url):
        return config
    path = find_file(url, config.directory, "model.weights") if is_relative(url) else local_path(url)
    return config.model_copy(update={"model": config.model.model_copy(update={"weights": str(path)})})


def _preset(model: Model) -> Transform:
    """The transform of the torchvision weights; of IMAGENET1K_V1 for weights by path; ImageNet's for custom ones."""
    if model.is_custom:
        return Transform()
    known = architecture(model.name)
    member = model.weights.rpartition(".")[2]
    return known.transform(member if member in known.resize else "IMAGENET1K_V1")


def _check_crop(transform: Transform, given: Transform | None) -> None:
    """ConfigError where the crop is larger than the images are made, and not both were asked for: a black border would
    fill it."""
    keys = {"resize", "crop"} & (given.model_fields_set if given else set())
    if len(keys) != 1 or (transform.crop or 0) <= (transform.resize or math.inf):
        return
    if "resize" in keys:
        raise ConfigError(
            f"model.transform.resize: {transform.resize} is less than the crop of the preset, {transform.crop}, so"
            f" images would get a black border. Set model.transform.crop as well, to {transform.resize} or null."
        )
    raise ConfigError(
        f"model.transform.crop: {transform.crop} is more than the resize of the preset, {transform.resize}, so images"
        f" would get a black border. Set model.transform.resize as well, to {transform.crop} or more."
    )


def _identity(
    config: JobConfig,
    weights: WeightsRef,
    source: Source | None,
    classes: tuple[str, ...] | None,
    transform: Transform,
) -> dict[str, Any]:
    """What decides the rows, in a form that reads well where two datasets differ. Never the engine, save noop."""
    model, output = config.model, config.output
    identity: dict[str, Any] = {
        "recipe": RECIPE,
        "name": model.name,
        "weights": weights.identity(),
        "classes": classes and f"{len(classes)} names, {digest(classes)}",
        "transform": transform.model_dump(),
        "precision": model.precision,
        "columns": {
            "predictions": output.predictions,
            "embeddings": output.embeddings,
            "top_k": output.top_k if output.predictions else None,
            "embedding_dtype": output.embedding_dtype if output.embeddings else None,
        },
    }
    if source is not None:
        identity["source"] = source.meaning
    if weights.kind in ("random", "none"):  # elsewhere the weights decide it
        identity["num_classes"] = model.num_classes
    if weights.kind == "none":
        identity["engine"] = "noop"
    return identity
