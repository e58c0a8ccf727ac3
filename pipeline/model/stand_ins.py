"""What checkpoints hold beside their tensors, by the names that pickles have for it, as what can do nothing.

torch's unpickler calls what a file names, with arguments from the file, and looks at names alone. Nothing but tensors
is wanted, so most names lead to stand-ins that forget what they are given: neither numpy's arrays nor pathlib see a
file's arguments, and an array or a path costs no memory, whatever size it claims.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import Any

import numpy as np

FACTORIES = ("list", "dict", "int", "float", "str", "bool", "tuple", "frozenset", "bytes")  # torch knows set itself
PATHS = [pure + kind for pure in ("", "Pure") for kind in ("Path", "PosixPath", "WindowsPath")]
TIMES = ("datetime", "date", "time", "timedelta", "timezone")
CORES = ("numpy.core.multiarray", "numpy._core.multiarray")  # numpy 1 and 2


class NotPlain(Exception):
    """A file holds what may be anything."""


class StandIn:
    """Takes any arguments and any state, and keeps neither."""

    __slots__ = ()

    def __new__(cls, *args: Any) -> StandIn:
        return super().__new__(cls)

    def __init__(self, *args: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass


class ArrayStandIn(StandIn):
    """Of numpy's arrays. One of numbers or texts is told by its state: (version, shape, dtype, order, bytes)."""

    __slots__ = ()

    def __setstate__(self, state: Any) -> None:
        dtypes = [value for value in state if isinstance(value, np.dtype)]
        if not dtypes or any(dtype.hasobject for dtype in dtypes):
            raise NotPlain("a numpy array of Python objects")


def _mapping(*args: Any) -> dict[Any, Any]:
    """In place of a defaultdict: the unpickler puts entries into plain dicts only."""
    return {}


def _sequence(*args: Any) -> list[Any]:
    """In place of a deque: the unpickler appends to lists only."""
    return []


def _number(dtype: Any, data: Any = b"") -> Any:
    """A numpy scalar, as what a module keeps beside tensors may hold one. Its type may claim any number of bytes, and
    numpy would allocate what the file lacks."""
    is_plain = isinstance(dtype, np.dtype) and not dtype.hasobject and isinstance(data, (bytes, str))
    if not is_plain or dtype.itemsize > len(data):
        raise NotPlain("a numpy scalar of Python objects, or one that is cut off")
    return np._core.multiarray.scalar(dtype, data)  # type: ignore[attr-defined]


STAND_INS = (StandIn, ArrayStandIn, _mapping, _sequence, _number)  # as a file may name them without a call


def safe_globals() -> list[Any]:
    """What training scripts store beside the tensors, for `torch.serialization.safe_globals`: arguments, numpy's
    numbers and arrays, paths, times, containers. None of it can run code."""
    kinds = [getattr(np.dtypes, name) for name in np.dtypes.__all__]
    named: dict[str, Any] = {f"{core}.scalar": _number for core in CORES}
    named |= {f"{core}._reconstruct": ArrayStandIn for core in CORES} | {"numpy.ndarray": ArrayStandIn}
    # Python 3.13 says pathlib._local.
    named |= {f"{module}.{path}": StandIn for module in ("pathlib", "pathlib._local") for path in PATHS}
    named |= {f"datetime.{kind}": StandIn for kind in TIMES}
    named |= {f"builtins.{kind}": StandIn for kind in FACTORIES}  # which a defaultdict names
    named |= {"collections.defaultdict": _mapping, "collections.deque": _sequence}
    return [argparse.Namespace, np.dtype, *kinds, *((value, name) for name, value in named.items())]


def holds_stand_in(value: Any) -> bool:
    """Whether there is a stand-in somewhere in what was loaded, instead of what was meant."""
    todo, seen = [value], set[int]()
    while todo:
        found = todo.pop()
        if isinstance(found, StandIn) or any(found is one for one in STAND_INS):
            return True
        if id(found) in seen:  # a file may hold itself
            continue
        seen.add(id(found))
        if isinstance(found, Mapping):
            todo += [*found.keys(), *found.values()]
        elif isinstance(found, (list, tuple, set)):
            todo += found
        elif isinstance(found, argparse.Namespace):
            todo += vars(found).values()
    return False
