"""The keys of a checkpoint's tensors: which of them are the network's, under whatever wrappers have put before them."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from functools import partial
from typing import Any

from torch import Tensor

from pipeline.errors import WeightsError

log = logging.getLogger(__name__)

PREFIXES = ("module.", "_orig_mod.", "model.", "network.", "net.", "backbone.", "encoder.", "resnet.")
# What DataParallel, Fabric, torch.compile, FSDP and checkpointing put before the names of what they wrap, which may be
# any module inside.
INSERTED = re.compile(r"\b(?:module|_(?:forward_module|orig_mod|fsdp_wrapped_module|checkpoint_wrapped_module))\.")
COUNTERS = ("num_batches_tracked", "n_averaged")
EXTRA = "_extra_state"  # torch's name for what a module keeps besides tensors
SHOWN_KEYS = 10


class StateDict(dict[str, Any]):
    """Tensors by key, the plain values of `get_extra_state` among them, and what torch keeps beside: the version of the
    code that wrote each module, by its path. Modules look at it to convert what an older version has written."""

    def __init__(self, values: Mapping[str, Any] | Iterable[tuple[str, Any]] = (), metadata: Any = None) -> None:
        super().__init__(values)
        # Nothing but versions is taken from a file: torch does other things as well that are asked for here.
        self._metadata = {
            path: {"version": module["version"]}
            for path, module in (metadata.items() if isinstance(metadata, Mapping) else ())
            if isinstance(path, str) and isinstance(module, Mapping) and isinstance(module.get("version"), int)
        }

    def renamed(self, rename: Callable[[str], str]) -> StateDict:
        """With other keys; `rename` is also given the paths of modules, with a dot at their end."""
        versions = {rename(f"{path}.").removesuffix("."): version for path, version in self._metadata.items()}
        return StateDict(((rename(key), value) for key, value in self.items()), versions)


def match_keys(state: StateDict, own: Iterable[str]) -> StateDict:
    """The state with those wrappers' prefixes removed (DataParallel, torch.compile, FSDP, Lightning) that `own` lacks.

    Prefixes are taken off one layer at a time; the layer at which most keys are the network's own is the right one. A
    prefix that is none of the usual ones is taken off where all of the network lies under it. Where all of the network,
    or all but its head, came from under a prefix, what lay beside it is something else's, such as the loss's. Where
    that may be the head that was trained, the network's own is left out as well. WeightsError for several networks.
    """
    wanted = [key for key in own if not (key.endswith(COUNTERS) or is_extra(key))]
    found, beside = max(_layers(state), key=lambda layer: len(layer[0].keys() & {*wanted}))
    if found.keys().isdisjoint(wanted):
        found, beside = _under_a_name(state, {*wanted}) or (found, beside)
    if not beside or not beside.isdisjoint(wanted) or not _is_network_of(found.keys() - beside, {*wanted}):
        return found
    log.warning("the weights hold more than the network, which is left out%s", listed("beside it", sorted(beside)))
    # Where the head is missing, it is in no doubt. The order is the network's own, which a file need not keep.
    is_whole = found.keys() >= {*wanted}
    last = next((key for key in reversed(wanted) if is_whole and _is_matrix(found[key])), None)
    if last is not None and (other := _others_head(found, last, beside)):
        head = module_of(last)
        log.warning("%s may be the head that was trained, so %s is left out: there are no predictions", other, head)
        beside = beside | {key for key in found if module_of(key) == head}
    return StateDict(((key, value) for key, value in found.items() if key not in beside), found._metadata)


def _is_network_of(keys: AbstractSet[str], wanted: set[str]) -> bool:
    """Whether these are all keys that are wanted, but perhaps for those of one module, the head."""
    modules = {module_of(key) for key in wanted - keys}
    found = wanted & keys
    return not modules or (bool(found) and len(modules) == 1 and not any(module_of(key) in modules for key in found))


def _under_a_name(state: StateDict, wanted: set[str]) -> tuple[StateDict, set[str]] | None:
    """The state without the prefix that a whole network lies under, `cnn.` for one, and the keys that lie beside."""
    prefixes = {key.removesuffix(end) for key in state for end in wanted if key.endswith(f".{end}")}
    prefixes = {prefix for prefix in prefixes if _is_network_of({key.removeprefix(prefix) for key in state}, wanted)}
    if len(prefixes) > 1:
        names = ", ".join(sorted(prefixes))
        raise WeightsError(f"the weights hold the network several times, under {names}. Save the one that is meant.")
    if not prefixes:
        return None
    (prefix,) = prefixes
    beside = {key for key in state if not key.startswith(prefix)}
    return state.renamed(lambda key: key.removeprefix(prefix)), beside


def _others_head(found: Mapping[str, Any], last: str, beside: AbstractSet[str]) -> str | None:
    """What lies beside a network and is as wide as what its last linear layer takes or returns; None if nothing does.
    That of another copy of the network, a teacher or an average, is nothing."""
    copies = (f".{last}", f".{last.replace('.', '')}")  # the second for averages that are stored without these dots
    widths = {*found[last].shape}
    others = (key for key in sorted(beside) if _is_matrix(found[key]) and not key.endswith(copies))
    return next((key for key in others if widths & {*found[key].shape}), None)


def _is_matrix(value: Any) -> bool:
    return isinstance(value, Tensor) and value.ndim == 2


def _layers(state: StateDict) -> Iterator[tuple[StateDict, set[str]]]:
    """The state with one prefix after the other off, as it is and without what torch inserts; and the keys of each that
    did not have its prefix."""
    for begin in (state, state.renamed(partial(INSERTED.sub, ""))):
        layer, beside, is_new = begin, set[str](), True
        while is_new and len(layer) == len(state):  # else two keys have become one
            yield layer, beside
            beside = {key for key in layer if _without_prefix(key) == key}
            stripped = layer.renamed(_without_prefix)
            layer, is_new = stripped, stripped.keys() != layer.keys()


def _without_prefix(key: str) -> str:
    return next((key.removeprefix(prefix) for prefix in PREFIXES if key.startswith(prefix)), key)


def module_of(key: str) -> str:
    return key.rpartition(".")[0]


def is_extra(key: str) -> bool:
    return key.rpartition(".")[2] == EXTRA


def listed(what: str, entries: Sequence[str]) -> str:
    if not entries:
        return ""
    more = ", …" if len(entries) > SHOWN_KEYS else ""
    return f"; {len(entries)} {what}: {', '.join(entries[:SHOWN_KEYS])}{more}"
