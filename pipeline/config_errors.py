"""What is wrong with a config, in words for the person who wrote it, and what of it must never be shown."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any
from urllib.parse import parse_qsl

from pydantic import ValidationError

from pipeline.errors import has_password, redact

SECRET_WORDS = (
    *("secret", "token", "password", "passwd", "credential", "authorization", "signature", "cookie"),
    *("accesskey", "accountkey", "apikey", "customerkey", "connectionstring"),
)

# By pydantic's type of error: what the key may hold instead. In braces: from the error's context.
WANTED = {
    "string_type": "text",
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "bool_type": "true or false",
    "list_type": "a list",
    "dict_type": "a mapping",
    "model_type": "a section with keys of its own",
    "literal_error": "{expected}",
    "greater_than": "above {gt:g}",
    "greater_than_equal": "at least {ge:g}",
    "less_than_equal": "at most {le:g}",
    "too_short": "a list of {min_length} or more",
    "too_long": "a list of {max_length} or fewer",
    "string_pattern_mismatch": "64 hex digits",  # model.sha256 has the only pattern
}
MISSING = "missing, and there is no default"


def explain(error: ValidationError, data: Mapping[Any, Any], keys: Sequence[str]) -> Iterator[str]:
    """One line per wrong key. A union reports an error for every branch: they become one line, and where one branch
    went further into the value than the others, only that one's. `keys` are the valid ones."""
    values: dict[str, Any] = {}
    wanted: dict[str, list[str]] = {}
    said: dict[str, str] = {}
    for item in error.errors():
        path, value = _real_path(item["loc"], item["type"], data)
        if item["type"] == "extra_forbidden" and isinstance(value, Mapping) and value:
            leaves = {key: leaf for key, leaf in option_paths(value, path) if not isinstance(leaf, Mapping | list)}
            values |= leaves
            said |= {key: f"unknown key{_nearest(key, keys)}" for key in leaves}
            continue
        values[path] = value
        if item["type"] in WANTED:
            wanted.setdefault(path, []).append(WANTED[item["type"]].format(**item.get("ctx", {})))
        else:
            said[path] = _said(item["type"], item["msg"], path, keys)
    for path, value in values.items():
        if any(other.startswith(f"{path}.") for other in values):
            continue
        choices = dict.fromkeys(wanted.get(path, ()))
        quote = "; quote it to make it text" if "text" in choices and isinstance(value, int | float) else ""
        text = said.get(path) or f"must be {' or '.join(choices)}{quote}"
        yield f"{path or 'config'}: {text}{'' if text == MISSING else _got(path, value)}"


def _real_path(location: tuple[int | str, ...], kind: str, data: Any) -> tuple[str, Any]:
    """The key's path in the user's data, and what is there: pydantic's location also names union branches."""
    path: list[str] = []
    for step in location:
        if isinstance(data, Mapping) and (step in data or (kind == "missing" and step == location[-1])):
            path.append(str(step))
            data = data.get(step)
        elif isinstance(data, list) and isinstance(step, int):
            path.append(str(step))
            data = data[step]
    return ".".join(path), data


def _said(kind: str, message: str, path: str, keys: Sequence[str]) -> str:
    if kind in ("extra_forbidden", "invalid_key"):
        return f"unknown key{_nearest(path, keys)}"
    if kind == "missing":
        return MISSING
    return message.removeprefix("Value error, ")


def _nearest(path: str, keys: Sequence[str]) -> str:
    """The nearest valid keys: in the same section, else by name in any, since forgetting the section is common."""
    section, _, name = path.rpartition(".")
    if path in keys:  # "model.name" as the name of one key
        return f"; on the command line it is {path}=…, but here it stands in a section: {section}: {{{name}: …}}"
    by_name: dict[str, list[str]] = {}
    for key in sorted(keys, key=lambda key: key.count(".")):
        by_name.setdefault(key.rpartition(".")[2], []).append(key)
    if section not in keys and (close := difflib.get_close_matches(path, keys, n=1, cutoff=0.8)):
        return f"; did you mean {close[0]}?"
    siblings = {last: key for last, same in by_name.items() for key in same if key.rpartition(".")[0] == section}
    near = [siblings[last] for last in difflib.get_close_matches(name, siblings, n=1, cutoff=0.7)]
    if not near:
        near = [key for last in difflib.get_close_matches(name, by_name, n=1, cutoff=0.7) for key in by_name[last]]
        near = [key for key in near if key.count(".") == near[0].count(".")]
    if near:
        return f"; did you mean {' or '.join(near)}?"
    shown = siblings or [key for key in keys if "." not in key]
    return f"; valid keys here: {', '.join(shown)}"


def _got(path: str, value: Any) -> str:
    """The value, as far as it may be shown: no secrets, no whole sections, no passwords in URLs."""
    has_keys = any(isinstance(item, Mapping) for item in (value if isinstance(value, list) else [value]))
    if has_keys or ".options" in path or (is_secret(path) and path != "input.key"):
        return ""
    text = redact(json.dumps(value, ensure_ascii=False, default=str))
    return f" (got {text if len(text) <= 100 else f'{text[:97]}…'})"


def is_secret(path: str) -> bool:
    """Whether the last name of a path sounds like a secret's."""
    name = path.rpartition(".")[2].lower()
    plain = name.replace("_", "").replace("-", "")
    return name in ("key", "sas", "sig") or any(word in plain for word in SECRET_WORDS)


def has_secret(url: str) -> bool:
    """Whether a URL holds a name or password, or a query parameter that sounds like a secret, as presigned ones do."""
    query = url.partition("://")[2].partition("?")[2]
    return has_password(url) or any(is_secret(name) for name, _ in parse_qsl(query, keep_blank_values=True))


def option_paths(options: Any, above: str = "") -> Iterator[tuple[str, Any]]:
    """Every name in a tree of mappings and lists with its path, and what is there."""
    yield above, options
    if isinstance(options, Mapping):
        for name, value in options.items():
            yield from option_paths(value, f"{above}.{name}" if above else str(name))
    elif isinstance(options, list):
        for value in options:
            yield from option_paths(value, above)
