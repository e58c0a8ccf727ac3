"""The classes of error rows: the one list of them, and the choice that a user makes among them.

docs/errors.md says what each means. They are stable: one is never renamed, and never given another meaning.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Literal, get_args

from pipeline.errors import ConfigError

ErrorClass = Literal[
    # read
    "truncated_shard",
    "corrupt_shard",
    "missing_column",
    "not_a_regular_member",
    "member_too_large",
    "null_image",
    # decode
    "empty",
    "not_an_image",
    "truncated",
    "corrupt",
    "too_large",
    "unsupported_format",
    "unsupported_mode",
    # predict
    "not_finite",
    "unsupported_size",
    # read, decode or predict
    "killed_worker",
]
ERROR_CLASSES: tuple[str, ...] = get_args(ErrorClass)
ALL = "all"


def choose_classes(names: Iterable[str] | str) -> frozenset[str]:
    """The classes that are meant: names, or several with commas between them, or `all`.

    Raises ConfigError for one that does not exist, with the nearest that does.
    """
    words = [names] if isinstance(names, str) else names
    chosen = [name for word in words for part in word.split(",") if (name := part.strip())]
    for name in chosen:
        if name not in (*ERROR_CLASSES, ALL):
            near = difflib.get_close_matches(name, ERROR_CLASSES, n=1)
            hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(ERROR_CLASSES)}, and `all`."
            raise ConfigError(f"there is no error class {name!r}; {hint}")
    return frozenset(ERROR_CLASSES if ALL in chosen else chosen)
