"""Class names from the config: a list, or a text or JSON file with one for every class id."""

from __future__ import annotations

import json
import re
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipeline.config import Storage
from pipeline.errors import ConfigError, clean, redact
from pipeline.storage import Store
from pipeline.urls import expanded

HALF = re.compile("[\ud800-\udfff]")  # of a character, which JSON can spell and no file hold


def class_names(given: list[str] | str | None, directory: Path | None, storage: Storage) -> tuple[str, ...] | None:
    """The names in the order of the class ids. A string is the URL or the path of a file of names.

    A text file has one name per line; JSON is a list, a mapping from id to name or to `[wnid, name]`, as ImageNet's
    class index comes, or from name to id, as torchvision's folders have it; or either under `id2label`. Raises
    ConfigError for a file that is neither, NotFound, AccessDenied.
    """
    if given is None or isinstance(given, list):
        return None if given is None else tuple(given)
    url = given if "://" in given else str(find_file(given, directory, "model.classes"))
    try:
        text = Store(storage).read(url).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(f"model.classes: {redact(given)} is not UTF-8 text: {error}.") from error
    is_json = given.split("?", 1)[0].lower().endswith(".json")
    names = _from_json(text, given) if is_json else _from_lines(text, given)
    if not names:
        raise ConfigError(f"model.classes: {redact(given)} holds no names.")
    return names


def check_count(classes: tuple[str, ...] | None, num_classes: int | None) -> None:
    """ConfigError if there is not one name for every class."""
    if classes is not None and num_classes is not None and len(classes) != num_classes:
        raise ConfigError(
            f"model.classes: {len(classes)} names for {num_classes} classes. Give one name for every class id, or"
            " leave model.classes out: then the id is the label."
        )


def find_file(path: str, directory: Path | None, key: str) -> Path:
    """The absolute path of a file that lies beside the config or in the current directory."""
    given = expanded(path)
    tried = [(folder / given).absolute() for folder in (directory, Path.cwd()) if folder is not None]
    for candidate in dict.fromkeys(tried):
        try:
            if stat.S_ISREG(candidate.stat().st_mode):
                return candidate
        except (FileNotFoundError, NotADirectoryError):
            pass
        except OSError as error:  # a folder that may not be looked into, a name that is too long
            raise ConfigError(f"{key}: cannot look for {candidate}: {clean(error)}.") from error
    places = " or ".join(str(p) for p in dict.fromkeys(tried))
    start = "the config file's folder" if directory is not None else "the current folder"
    raise ConfigError(f"{key}: there is no file {places}. A relative path starts at {start}.")


def _from_lines(text: str, source: str) -> tuple[str, ...]:
    # Not splitlines(), which also cuts at characters that a name may contain.
    lines = [line.strip() for line in text.rstrip().split("\n")] if text.strip() else []
    if "" in lines:
        raise ConfigError(
            f"model.classes: line {lines.index('') + 1} of {redact(source)} is empty, which would leave a class"
            " without a name."
        )
    return tuple(lines)


def _from_json(text: str, source: str) -> tuple[str, ...]:
    try:
        data = json.loads(text)
    except json.JSONDecodeError as error:
        raise ConfigError(f"model.classes: {redact(source)} is not JSON: {error}.") from error
    if isinstance(data, Mapping) and isinstance(data.get("id2label"), Mapping):  # Hugging Face's config.json
        data = data["id2label"]
    if isinstance(data, Mapping):
        if sorted(number for number in data.values() if type(number) is int) == list(range(len(data))):
            data = {str(number): name for name, number in data.items()}
        ids = [str(number) for number in range(len(data))]
        if set(data) != set(ids):
            raise ConfigError(
                f"model.classes: the keys of {redact(source)} must be the class ids 0 to {len(data) - 1}, as text,"
                " or its values, as numbers."
            )
        data = [data[number] for number in ids]
    if not isinstance(data, list):
        raise ConfigError(f"model.classes: {redact(source)} must hold a list of names or a mapping from id to name.")
    return tuple(_name(entry, number, source) for number, entry in enumerate(data))


def _name(entry: Any, number: int, source: str) -> str:
    """A name, or the name in ImageNet's `[wnid, name]`."""
    name = entry[1] if isinstance(entry, list) and len(entry) == 2 else entry
    if not isinstance(name, str) or not name or HALF.search(name):
        raise ConfigError(f"model.classes: the name of class {number} in {redact(source)} is {entry!r}, not text.")
    return name
