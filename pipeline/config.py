"""What a user can say: the sections of a job, loaded from YAML and `key=value` overrides, refused when misspelt."""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PrivateAttr,
    ValidationError,
    field_validator,
    model_validator,
)
from yaml import YAMLError

from pipeline.errors import ConfigError

PositiveInt = Annotated[int, Field(ge=1)]
PositiveFloat = Annotated[float, Field(gt=0)]
Channels = Annotated[list[float], Field(min_length=3, max_length=3)]
Interpolation = Literal["nearest", "bilinear", "bicubic", "lanczos"]
Decode = Literal["fast", "reference"]
Precision = Literal["float32", "bfloat16", "float16", "int8"]

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
SECRET_WORDS = ("secret", "token", "password", "credential", "access_key", "account_key")


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class Transform(Section):
    """Bytes to uint8 pixels, and how the model normalises them on its device.

    `resize` is the length of the short side and `crop` the side of the central square, both in pixels; `None`
    leaves the step out. `mean` and `std` are per RGB channel on the 0..1 scale. `decode: reference` reads and
    resizes exactly as Pillow and the torchvision preset do; `fast` is within one level of it (docs/numerics.md).
    """

    resize: PositiveInt | None = 256
    crop: PositiveInt | None = 224
    mean: Channels | None = list(IMAGENET_MEAN)
    std: Channels | None = list(IMAGENET_STD)
    interpolation: Interpolation = "bilinear"
    decode: Decode = "fast"

    @field_validator("std")
    @classmethod
    def _no_zero(cls, std: list[float] | None) -> list[float] | None:
        if std and min(std) <= 0:
            raise ValueError("every std must be above 0, since pixels are divided by it")
        return std

    def overlaid(self, override: Transform | None) -> Transform:
        """This transform with those keys replaced that `override` was explicitly given."""
        return self.model_copy(update=override.explicit()) if override else self

    def explicit(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in sorted(self.model_fields_set)}


class Storage(Section):
    """How a store is reached; passed to fsspec. Secrets come from the environment, never from the file."""

    endpoint_url: str | None = None
    options: dict[str, Any] = {}
    shared: bool = False  # a local path is the same directory on every node
    connect_timeout_s: PositiveFloat = 5.0
    read_timeout_s: PositiveFloat = 15.0
    deadline_s: PositiveFloat = 120.0  # of one storage call, its retries included

    @field_validator("options")
    @classmethod
    def _no_secrets(cls, options: dict[str, Any]) -> dict[str, Any]:
        for path in _leaf_paths(options):
            if path[-1] in ("key", "sas") or any(word in path[-1].lower() for word in SECRET_WORDS):
                raise ValueError(
                    f"{'.'.join(path)} looks like a secret. Leave it out and set it in the environment"
                    " (AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, AWS_PROFILE, or an instance role)"
                )
        return options


class Input(Section):
    url: str | Annotated[list[str], Field(min_length=1)]
    format: Literal["auto", "webdataset", "parquet", "files"] = "auto"
    image: str | None = None  # Parquet: the image column; default: the only binary or struct<bytes, path> one
    key: str | None = None  # Parquet: the column to take keys from
    group_size: PositiveInt = 1000  # loose files: samples in a shard, on average
    max_pixels: PositiveInt = 50_000_000  # larger images, before or after resizing, become error rows
    allow_empty: bool = False  # an empty listing is an error unless this is set
    storage: Storage | None = None

    @property
    def urls(self) -> list[str]:
        return [self.url] if isinstance(self.url, str) else list(self.url)


class Model(Section):
    name: str = "resnet50"
    weights: str = "IMAGENET1K_V2"
    sha256: Annotated[str, Field(pattern=r"^[0-9a-fA-F]{64}$")] | None = None
    seed: int = 0  # of `weights: random`
    num_classes: PositiveInt | None = None
    classes: list[str] | str | None = None  # names, or a text or JSON file of names
    transform: Transform | None = None
    precision: Precision = "float32"

    @property
    def is_custom(self) -> bool:
        return ":" in self.name

    @field_validator("weights")
    @classmethod
    def _pinned(cls, weights: str) -> str:
        if weights.rsplit(".", 1)[-1] == "DEFAULT":
            raise ValueError(
                "DEFAULT changes between torchvision releases, and vectors of two models must not mix."
                " Name the weights, such as IMAGENET1K_V2"
            )
        return weights


class Output(Section):
    url: str
    predictions: bool = True
    embeddings: bool = True
    top_k: PositiveInt = 5
    embedding_dtype: Literal["float16", "float32"] = "float16"
    storage: Storage | None = None

    @model_validator(mode="after")
    def _something(self) -> Output:
        if not (self.predictions or self.embeddings):
            raise ValueError("set predictions or embeddings to true, else there is nothing to write")
        return self


class Runtime(Section):
    address: str = "local"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    engine: Literal["auto", "eager", "compile", "openvino", "noop"] = "auto"
    actors: PositiveInt | Literal["auto"] = "auto"
    batch_size: PositiveInt | Literal["auto"] = "auto"


class JobConfig(Section):
    """One job. `load_config` makes it from a file and overrides; `JobConfig(**dict)` works as well."""

    input: Input
    model: Model = Model()
    output: Output
    runtime: Runtime = Runtime()
    storage: Storage = Storage()

    _directory: Path | None = PrivateAttr(default=None)

    @property
    def directory(self) -> Path | None:
        """Where the config file lies: custom networks and class names are looked for here first."""
        return self._directory

    @property
    def input_storage(self) -> Storage:
        return _overlay(self.storage, self.input.storage)

    @property
    def output_storage(self) -> Storage:
        return _overlay(self.storage, self.output.storage)


def _overlay(base: Storage, override: Storage | None) -> Storage:
    if override is None:
        return base
    return base.model_copy(update={name: getattr(override, name) for name in override.model_fields_set})


def load_config(path: str | Path | None = None, overrides: Sequence[str] = ()) -> JobConfig:
    """The job that a YAML file and `section.key=value` overrides describe.

    Raises ConfigError that names every wrong key with its full path, its value and the nearest valid key.
    """
    try:
        merged = OmegaConf.merge(
            OmegaConf.load(path) if path is not None else OmegaConf.create(),
            OmegaConf.from_dotlist(_checked_overrides(overrides)),
        )
        data = OmegaConf.to_container(merged, resolve=True)
    except FileNotFoundError:
        raise ConfigError(f"there is no config file {path}. `resnet-batch init` writes one to start from.") from None
    except (OSError, YAMLError, OmegaConfBaseException) as error:
        raise ConfigError(f"cannot read the config {path or ''}: {' '.join(str(error).split())}") from error
    if not isinstance(data, dict):
        raise ConfigError(f"the config {path} must be a mapping with the sections {', '.join(JobConfig.model_fields)}.")
    return make_config(data, directory=Path(path).resolve().parent if path is not None else None)


def make_config(data: Mapping[Any, Any], directory: Path | None = None) -> JobConfig:
    """The job that a plain mapping describes; errors as in `load_config`."""
    try:
        config = JobConfig.model_validate(dict(data))
    except ValidationError as error:
        raise ConfigError("\n".join(_explain(error, data))) from None
    config._directory = directory
    return config


def _checked_overrides(overrides: Sequence[str]) -> list[str]:
    for override in overrides:
        if "=" not in override:
            raise ConfigError(f"an override reads section.key=value, as in model.name=resnet18; got {override!r}.")
    return list(overrides)


def _explain(error: ValidationError, data: Mapping[Any, Any]) -> Iterator[str]:
    """One line per wrong key. A union reports an error for every branch; they are put into one line."""
    messages: dict[str, list[str]] = {}
    values: dict[str, Any] = {}
    for item in error.errors():
        path, value = _real_path(item["loc"], data)
        text = item["msg"].removeprefix("Value error, ").removeprefix("Input should be ")
        if item["type"] == "extra_forbidden":
            text = f"unknown key{_nearest(path)}"
        elif item["type"] == "missing":
            text = "missing: this key is needed"
        messages.setdefault(path, []).append(text)
        values[path] = value
    for path, texts in messages.items():
        shown = "" if texts[0].startswith("missing") or _is_secret(path) else f" (got {values[path]!r})"
        yield f"{path or 'config'}: {' or '.join(dict.fromkeys(texts))}{shown}"


def _real_path(location: tuple[int | str, ...], data: Any) -> tuple[str, Any]:
    """The key's path in the user's data: pydantic's location also names union branches, which are no keys."""
    path: list[str] = []
    for step in location:
        if isinstance(data, Mapping):
            path.append(str(step))
            data = data.get(step)
        elif isinstance(data, list) and isinstance(step, int):
            path.append(str(step))
            data = data[step]
    return ".".join(path), data


def _nearest(path: str) -> str:
    known = config_keys(JobConfig)
    # A bare key such as `url=` is compared with the last parts too, since forgetting the section is common.
    by_last = {key.rsplit(".", 1)[-1]: key for key in known}
    near = difflib.get_close_matches(path, known, n=1, cutoff=0.7)
    near = near or [by_last[m] for m in difflib.get_close_matches(path.rsplit(".", 1)[-1], by_last, n=1, cutoff=0.7)]
    if near:
        return f"; did you mean {near[0]}?"
    section = path.rpartition(".")[0]
    siblings = [key.rsplit(".", 1)[-1] for key in known if key.rpartition(".")[0] == section]
    return f"; valid keys here: {', '.join(siblings)}" if siblings else ""


def _is_secret(path: str) -> bool:
    return ".options" in path or any(word in path.lower() for word in SECRET_WORDS)


def config_keys(section: type[BaseModel], prefix: str = "") -> list[str]:
    """Every key that a config may have, with its full path, sections included."""
    keys: list[str] = []
    for name, field in section.model_fields.items():
        keys.append(prefix + name)
        for kind in (field.annotation, *get_args(field.annotation)):
            if isinstance(kind, type) and issubclass(kind, BaseModel):
                keys.extend(config_keys(kind, f"{prefix}{name}."))
    return keys


def _leaf_paths(options: Mapping[str, Any], above: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    for name, value in options.items():
        if isinstance(value, Mapping):
            yield from _leaf_paths(value, (*above, str(name)))
        else:
            yield (*above, str(name))


def digest(value: Any, length: int = 16) -> str:
    """The first `length` hex digits of the sha256 of a value's canonical JSON: the hash behind every fingerprint."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()[:length]
