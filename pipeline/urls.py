"""What a URL says: its one absolute form, whether it is local or relative, and whether it is a pattern."""

from __future__ import annotations

import os
import re
from glob import escape
from pathlib import Path

from pipeline.config import JobConfig
from pipeline.errors import ConfigError

ESCAPED = re.compile(r"\[([*?\[])\]")  # a character that is no wildcard, as glob.escape writes it


def canonical(url: str) -> str:
    """The one absolute URL of a file, whichever way it was written: `file:///abs/path`, `s3://bucket/key`, …

    Raises ConfigError for what no worker could find: no name, `memory://`, a scheme with one slash.
    """
    protocol, separator, path = url.partition("://")
    if not separator:
        protocol, path = "file", url
        if re.match(r"[a-z0-9]+:/", url):
            raise ConfigError(f"{url}: a URL has two slashes after its colon, as in s3://bucket/key.")
    if not path or (protocol != "file" and not path.strip("/")):
        raise ConfigError(f"{url!r} names no file, folder or bucket.")
    if protocol in ("file", "local"):
        # Not resolve(), which would follow links; and POSIX lets a path begin with two slashes.
        return "file:///" + os.path.abspath(expanded(path)).lstrip("/")  # noqa: PTH100
    if protocol == "memory":
        raise ConfigError(
            f"{url}: memory:// lives in one process, and the workers are others. Use a folder or a bucket."
        )
    return f"{'s3' if protocol in ('s3a', 's3n') else protocol}://{path}"


def expanded(path: str) -> str:
    """A path whose `~` or `~name` is that home folder. Raises ConfigError where there is none, since a folder of that
    name is hardly ever meant."""
    found = os.path.expanduser(path)  # noqa: PTH111 - of `./~x` a Path makes `~x`
    if found.startswith("~"):
        raise ConfigError(f"{path}: there is no home folder {path.partition('/')[0]}. Where that is a name: ./{path}")
    return found


def is_local(url: str) -> bool:
    return canonical(url).startswith("file://")


def local_path(url: str) -> Path:
    return Path(canonical(url).removeprefix("file://"))


def join(url: str, *names: str) -> str:
    return "/".join((url.rstrip("/"), *names))


def stripped(url: str) -> str:
    """Without slashes at its end, except those of `file://` itself."""
    protocol, _, path = url.partition("://")
    return f"{protocol}://{path.rstrip('/')}"


def split_pattern(url: str) -> tuple[str, bool]:
    """The folder above the first wildcard and whether there is a wildcard at all. `[*]`, `[?]` and `[[]` are none."""
    at = wildcard_at(url)
    return (url, False) if at is None else (literal(url[:at].rpartition("/")[0]), True)


def wildcard_at(url: str) -> int | None:
    """Where the first wildcard is: the end, if there are only characters that are kept from being one."""
    if url.startswith(("http://", "https://")):  # there `?` begins the query and `[` stands around an IPv6 host
        return url.find("*") if "*" in url else None
    found = re.search(r"[*?\[]", ESCAPED.sub("___", url))
    return found.start() if found else len(url) if ESCAPED.search(url) else None


def literal(pattern: str) -> str:
    return ESCAPED.sub(r"\1", pattern)


def is_pattern(url: str) -> bool:
    """Where there is a file or a folder of that very name, such as `photos [2026]`, it is meant itself."""
    if not split_pattern(url)[1]:
        return False
    return not (is_local(url) and os.path.exists(local_path(url)))  # noqa: PTH110 - false for what no path can be


def is_relative(url: str) -> bool:
    """Whether a URL, or a line of a list, is a path that starts at some folder."""
    return "://" not in url and not url.startswith(("/", "~"))


def within(folder: str, url: str) -> str:
    """A relative URL as one in this folder, of whose own name nothing is a wildcard where the URL is a pattern."""
    joined = join(folder, url)
    if folder.startswith(("http://", "https://")) or not split_pattern(url)[1]:  # a web server has no listings
        return joined
    if is_local(joined) and os.path.exists(local_path(joined)):  # noqa: PTH110 - false for what no path can be
        return joined
    return join(escape(folder), url)


def absolute(url: str) -> str:
    """The same URL for a process that works in another folder."""
    if not is_local(url):
        return url
    return within(str(Path.cwd()), url) if is_relative(url) and split_pattern(url)[1] else str(local_path(url))


def with_absolute_urls(config: JobConfig) -> JobConfig:
    """The same job for a process that works in another folder."""
    url, out = config.input.url, config.output.url
    return config.model_copy(
        update={
            "input": config.input.model_copy(
                update={"url": absolute(url) if isinstance(url, str) else [absolute(one) for one in url]}
            ),
            "output": config.output.model_copy(update={"url": str(local_path(out)) if is_local(out) else out}),
        }
    )
