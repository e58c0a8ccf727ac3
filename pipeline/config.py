"""What a user can say: the sections of a job, loaded from YAML and `key=value` overrides, refused when misspelt."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self, get_args

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PrivateAttr,
    ValidationError,
    field_validator,
    model_validator,
)
from yaml import MarkedYAMLError, YAMLError

from pipeline.config_errors import explain, has_secret, is_secret, option_paths
from pipeline.errors import ConfigError, redact

PositiveInt = Annotated[int, Field(ge=1)]
NonNegativeInt = Annotated[int, Field(ge=0)]
Share = Annotated[float, Field(ge=0, le=1)]
PositiveFloat = Annotated[float, Field(gt=0)]
Channels = Annotated[list[float], Field(min_length=3, max_length=3)]
Interpolation = Annotated[
    Literal["nearest", "bilinear", "bicubic", "lanczos"],
    BeforeValidator(lambda given: "bilinear" if given is None else given),
]
Decode = Literal["fast", "reference", "nvjpeg"]
Precision = Literal["float32", "bfloat16", "float16", "int8"]

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


def _harmless(url: str) -> str:
    if not url:
        raise ValueError("must not be empty")
    if has_secret(url):
        raise ValueError(
            "a name, a password or a signature in a URL would be written into the dataset and its logs. Leave it out,"
            " and let the environment hold what the store asks for"
        )
    return url


Url = Annotated[str, AfterValidator(_harmless)]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, hide_input_in_errors=True)

    def overlaid(self, override: Self | None) -> Self:
        """This section with those keys replaced that `override` was explicitly given."""
        given = sorted(override.model_fields_set) if override else ()
        return self.model_copy(update={name: getattr(override, name) for name in given})


class Transform(Section):
    """Bytes to uint8 pixels, and how the model normalises them on its device.

    `resize` is the length of the short side and `crop` the side of the central square, both in pixels; `None`
    leaves the step out. `mean` and `std` are per RGB channel on the 0..1 scale. `decode: reference` reads and
    resizes exactly as Pillow and the torchvision preset do; `fast` is within two levels of it, and of JPEGs
    that it reads at a part of their size the cosine of the embeddings is kept (docs/numerics.md);
    `nvjpeg` has a GPU do it to JPEGs.
    """

    resize: PositiveInt | None = 256
    crop: PositiveInt | None = 224
    mean: Channels | None = list(IMAGENET_MEAN)
    std: Channels | None = list(IMAGENET_STD)
    interpolation: Interpolation = "bilinear"
    decode: Decode = "fast"

    @field_validator("mean")
    @classmethod
    def _on_unit_scale(cls, mean: list[float] | None) -> list[float] | None:
        if mean and max(mean) > 1:
            raise ValueError("pixels are on a scale from 0 to 1. Divide means on that of 0 to 255 by 255, and std too")
        return mean

    @field_validator("std")
    @classmethod
    def _no_zero(cls, std: list[float] | None) -> list[float] | None:
        if std and min(std) <= 0:
            raise ValueError("every std must be above 0, since pixels are divided by it")
        return std


class Storage(Section):
    """How a store is reached; passed to fsspec. Secrets come from the environment, never from the file."""

    endpoint_url: Url | None = None
    options: dict[str, Any] = {}
    shared: bool = False  # a local path is the same directory on every node
    connect_timeout_s: PositiveFloat = 5.0
    read_timeout_s: PositiveFloat = 15.0
    deadline_s: PositiveFloat = 100.0  # of one storage call, its retries included

    @field_validator("options")
    @classmethod
    def _no_secrets(cls, options: dict[str, Any]) -> dict[str, Any]:
        for path, value in option_paths(options):
            if is_secret(path) or (isinstance(value, str) and has_secret(value)):
                raise ValueError(
                    f"{path} looks like a secret. Leave it out and set it in the environment"
                    " (AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, AWS_PROFILE, or an instance role)"
                )
        return options


class Input(Section):
    url: Url | Annotated[list[Url], Field(min_length=1)]
    format: Literal["auto", "webdataset", "parquet", "files"] = "auto"
    image: str | None = None  # Parquet: the image column; default: the only binary or struct<bytes, path> one
    key: str | None = None  # Parquet: the column to take keys from
    group_size: PositiveInt = 1000  # loose files: samples in a shard, on average
    max_pixels: PositiveInt = 50_000_000  # larger images, before or after resizing, become error rows
    max_errors: NonNegativeInt | None = None  # more error rows than this in one run stop it
    max_error_rate: Share | None = None  # so does a larger share of all samples (of 100 where they are fewer)
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

    @field_validator("seed")
    @classmethod
    def _known_to_torch(cls, seed: int) -> int:
        if not -(2**63) <= seed < 2**64:
            raise ValueError("must be from -2**63 to 2**64 - 1, as torch takes it")
        return seed

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
    url: Url
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
    address: Url = "local"
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
        return self.storage.overlaid(self.input.storage)

    @property
    def output_storage(self) -> Storage:
        return self.storage.overlaid(self.output.storage)


def load_config(path: str | Path | None = None, overrides: Sequence[str] = ()) -> JobConfig:
    """The job that a YAML file and `section.key=value` overrides describe.

    Raises ConfigError that names every wrong key with its full path, its value and the nearest valid key.
    """
    config = OmegaConf.create() if path is None else _read(path)
    for override in overrides:
        _override(config, override)
    try:
        data = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        raise ConfigError(f"cannot make out the config: {_reason(error)}.") from error
    assert isinstance(data, dict), "the root is a mapping, and overrides have keys"
    return make_config(data, directory=Path(path).resolve().parent if path is not None else None)


def make_config(data: Mapping[Any, Any], directory: Path | None = None) -> JobConfig:
    """The job that a plain mapping describes; errors as in `load_config`."""
    data = {"input": {}, "output": {}} | dict(data)  # so that what is missing is called input.url
    try:
        config = JobConfig.model_validate(data)
    except ValidationError as error:
        raise ConfigError("\n".join(explain(error, data, config_keys(JobConfig)))) from None
    config._directory = directory
    return config


def _read(path: str | Path) -> DictConfig:
    try:
        config = OmegaConf.load(path)
    except FileNotFoundError:
        raise ConfigError(
            f"there is no config file {redact(str(path))}. `resnet-batch init` writes one to start from."
        ) from None
    except IsADirectoryError:
        raise ConfigError(
            f"{redact(str(path))} is a folder, not a config file. To read its images: input.url={redact(str(path))}."
        ) from None
    except (OSError, UnicodeDecodeError, YAMLError, OmegaConfBaseException) as error:
        raise ConfigError(f"cannot read the config {path}: {_reason(error)}.") from error
    if not isinstance(config, DictConfig):
        raise ConfigError(f"the config {path} must be a mapping with the sections {', '.join(JobConfig.model_fields)}.")
    return config


def _override(config: DictConfig, override: str) -> None:
    """Set one key. A mapping is merged into what is there; a list replaces it."""
    key, equals, text = override.partition("=")
    if not key or not equals:
        raise ConfigError(
            f"an override reads section.key=value, as in model.name=resnet18; got {redact(override)!r}. A config file"
            " comes before all overrides."
        )
    try:
        OmegaConf.update(config, key, _value(text), merge=True, force_add=True)
    except (YAMLError, OmegaConfBaseException, ValueError) as error:
        raise ConfigError(f"{key}: cannot set it to what was given: {_reason(error)}.") from error


def _value(text: str) -> Any:
    """What stands behind the `=`: YAML where that is a list, a mapping, quoted, a number, true, false or null; else
    the text as it is, since `*.tar`, `a: b` and `images #1` are paths here."""
    is_yaml = text.startswith(("[", "{", "'", '"'))
    try:
        parsed: Any = OmegaConf.to_container(OmegaConf.from_dotlist([f"value={text}"]), resolve=False)
    except (YAMLError, UnicodeEncodeError):  # a path need not be UTF-8
        if is_yaml:
            raise
        return text
    value = parsed["value"]
    return value if is_yaml or value is None or isinstance(value, int | float) else text


def _reason(error: Exception) -> str:
    """One line, without the excerpts that YAML's errors may hold."""
    if isinstance(error, MarkedYAMLError) and error.problem_mark is not None:
        return f"line {error.problem_mark.line + 1}, column {error.problem_mark.column + 1}: {error.problem}"
    place = getattr(error, "full_key", None)
    text = str(error).strip().partition("\n")[0]
    return redact(f"{place}: {text}" if place else text)


def config_keys(section: type[BaseModel], prefix: str = "") -> list[str]:
    """Every key that a config may have, with its full path, sections included."""
    keys: list[str] = []
    for name, field in section.model_fields.items():
        keys.append(prefix + name)
        for kind in (field.annotation, *get_args(field.annotation)):
            if isinstance(kind, type) and issubclass(kind, BaseModel):
                keys.extend(config_keys(kind, f"{prefix}{name}."))
    return keys


def each_text(value: Any, change: Callable[[str], str]) -> Any:
    """The value, of mappings and lists, with each text in it changed; keys stay."""
    if isinstance(value, dict):
        return {name: each_text(child, change) for name, child in value.items()}
    if isinstance(value, list):
        return [each_text(child, change) for child in value]
    return change(value) if isinstance(value, str) else value


def digest(value: Any, length: int = 16) -> str:
    """The first `length` hex digits of the sha256 of a value's canonical JSON: the hash behind every fingerprint."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()[:length]
