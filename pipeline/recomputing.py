"""Rows of a dataset computed again from their source bytes: `verify --sample`."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow.parquet as pq

from pipeline.calibration import with_network
from pipeline.config import JobConfig, Runtime
from pipeline.errors import ConfigError, NotFound, SourceChanged, clean
from pipeline.inputs.shards import Shard
from pipeline.local import predict_rows
from pipeline.model.spec import ModelSpec, make_spec
from pipeline.outputs.dataset import Dataset
from pipeline.outputs.schema import Footer
from pipeline.overview import last_config, listed_shards
from pipeline.urls import is_local, local_path

OWN_NETWORKS = ("pipeline.examples.network:digits_resnet20",)  # which whoever writes to a dataset may name there
MAX_PARTS = 8  # that the sampled rows come from, where these have enough
MIN_COSINE = 0.99  # of the centred embeddings of another engine or processor
MIN_MARGIN = 1e-3  # between the first two scores: closer, and another processor may well decide otherwise
# Of a score between two engines or processors. Two engines in bfloat16 were up to 0.005 apart (400 digits); int8 on two
# processors was not measured.
MAX_SHIFT = 0.1


@dataclass
class Recomputed:
    sampled: int = 0
    agreed: int = 0
    note: str = ""
    problems: list[str] = field(default_factory=list)


def recompute(dataset: Dataset, footers: Mapping[str, Footer], sample: int, config: JobConfig | None) -> Recomputed:
    """Recompute random rows of these committed shards and compare classes, scores and embedding.

    Without a config, that of the last run is taken, on whatever device there is here, but no code: a custom network is
    then a module that the current folder or the Python path has. Shards that changed or went since they were committed
    cannot be recomputed, and are left out; that none is left is a problem. Raises ModelMismatch if the config is of
    another model than the dataset's, ConfigError where there is none.
    """
    is_given = config is not None
    config = config or _last_config(dataset)
    spec = make_spec(config) if is_given else _last_spec(config)
    if not is_given and not _may_be_executed(spec, dataset):
        return Recomputed(
            note=f"--sample needs --config: the network {clean(config.model.name)} is no module of yours, and what is"
            " to be executed is not taken from a dataset"
        )
    spec = with_network(spec, dataset)
    dataset.check_identity({"model_fingerprint": spec.fingerprint, "model": spec.identity})
    shards = listed_shards(config)
    fingerprints = {name: shard.fingerprint for name, shard in shards.items()}
    there = [name for name, footer in footers.items() if fingerprints.get(name) == footer.shard_fingerprint]
    result = Recomputed()
    if len(there) < len(footers):
        result.note = (
            f"{len(footers) - len(there)} of {len(footers)} shards are no longer in the input as they were committed:"
            " their rows were not recomputed"
        )
    rows, mean = _pick(dataset, shares({name: footers[name].predicted for name in there}, sample))
    if rows:
        _compare(rows, mean, {shards[name].url: shards[name] for name in there}, config, spec, result)
    elif any(footer.predicted for footer in footers.values()):
        result.problems.append(
            "--sample: not one row could be recomputed. Give --config with the input that they were made of, or leave"
            " --sample out."
        )
    return result


def _last_config(dataset: Dataset) -> JobConfig:
    config = last_config(dataset, "--sample")
    is_noop = config.runtime.engine == "noop"
    device: Literal["cpu", "auto"] = "cpu" if config.model.precision == "int8" else "auto"
    return config.model_copy(update={"runtime": Runtime(engine="noop" if is_noop else "auto", device=device)})


def _may_be_executed(spec: ModelSpec, dataset: Dataset) -> bool:
    """Whether a network that a dataset names is the user's own: not any function of an installed package, and no file
    that lies in the dataset. Nothing of it was executed so far."""
    if spec.source is None or spec.name in OWN_NETWORKS:
        return True
    is_inside = is_local(dataset.url) and Path(spec.source.found_in).is_relative_to(local_path(dataset.url))
    return bool(spec.source.files) and not is_inside


def _last_spec(config: JobConfig) -> ModelSpec:
    try:
        return make_spec(config)
    except ConfigError as cause:
        raise ConfigError(f"--sample takes the config of the last run. {cause} Give --config.") from cause


def shares(counts: Mapping[str, int], sample: int) -> dict[str, int]:
    """How many rows of which shards are to be drawn, of the rows that each has: `sample` in all, or all there are. They
    are spread over some shards that chance chooses, as evenly as these allow."""
    chosen: list[str] = []
    room = 0
    for name in random.sample(sorted(counts), len(counts)):
        if len(chosen) >= min(MAX_PARTS, sample) and room >= sample:
            break
        chosen.append(name)
        room += counts[name]
    found: dict[str, int] = {}
    for left, name in zip(range(len(chosen), 0, -1), sorted(chosen, key=counts.__getitem__), strict=True):
        found[name] = min(-(-sample // left), counts[name])
        sample -= found[name]
    return {name: share for name, share in found.items() if share}


def _pick(dataset: Dataset, wanted: Mapping[str, int]) -> tuple[list[dict[str, Any]], np.ndarray | None]:
    """So many random rows of these parts, and the mean embedding (D,) of the row groups that they come from."""
    rows: list[dict[str, Any]] = []
    total, count = None, 0
    for name, share in wanted.items():
        with suppress(NotFound, SourceChanged), dataset.open_part("data", name) as file:  # else a run replaces it
            parquet, left = pq.ParquetFile(file), share
            for number in random.sample(range(parquet.num_row_groups), parquet.num_row_groups):
                group = parquet.read_row_group(number)
                chosen = random.sample(range(group.num_rows), min(left, group.num_rows))
                rows.extend(group.take(sorted(chosen)).to_pylist())
                left -= len(chosen)
                if "embedding" in group.column_names:
                    values = group["embedding"].combine_chunks().flatten().to_numpy(zero_copy_only=False)
                    summed = values.reshape(group.num_rows, -1).sum(axis=0, dtype=np.float64)
                    total, count = summed if total is None else total + summed, count + group.num_rows
                if not left:
                    break
    return rows, None if total is None else total / count


def _compare(
    rows: list[dict[str, Any]],
    mean: np.ndarray | None,
    shards: Mapping[str, Shard],
    config: JobConfig,
    spec: ModelSpec,
    result: Recomputed,
) -> None:
    wanted: dict[str, set[int]] = {}
    for row in rows:
        wanted.setdefault(row["shard"], set()).add(row["index"])
    # Two classes at least, which a margin lies between.
    output = config.output.model_copy(update={"top_k": max(config.output.top_k, 2)})
    config = config.model_copy(update={"output": output})
    again = predict_rows([(shards[url], indices) for url, indices in wanted.items()], config, spec)
    known = {(row["shard"], row["index"]): row for row in again.to_pylist()}
    for row in rows:
        result.sampled += 1
        found = known.get((row["shard"], row["index"]))
        difference = "it is not in its shard" if found is None else next(differences(row, found, mean), None)
        if difference is None:
            result.agreed += 1
        else:
            result.problems.append(f"{row['shard']} index {row['index']} ({row['key']}): {difference}")


def differences(stored: dict[str, Any], found: dict[str, Any], mean: np.ndarray | None) -> Iterator[str]:
    """Why two results of one sample are not the same."""
    if found["error"] is not None:
        yield f"it is an error row when it is computed again: {found['message']}"
        return
    if found["key"] != stored["key"]:
        yield f"its key is {found['key']}"
    if (found["width"], found["height"]) != (stored["width"], stored["height"]):
        yield f"its size is {found['width']} x {found['height']}, stored {stored['width']} x {stored['height']}"
    if "class_id" in stored and found["class_id"] != stored["class_id"] and _margin(found) > MIN_MARGIN:
        yield f"computed again it is {found['label']}, stored {stored['label']}"
    elif "class_id" in stored and (shift := _shift(stored, found)) > MAX_SHIFT:
        yield f"its scores differ by up to {shift:.2f} from those computed again"
    if mean is not None:
        a, b = np.asarray(stored["embedding"], np.float64), np.asarray(found["embedding"], np.float64)
        cosine = _cosine(a - mean, b - mean)
        if cosine < MIN_COSINE and not np.allclose(a, b, rtol=0, atol=2e-3 * np.abs(b).max()):
            yield f"the centred cosine of its embedding with the one computed again is {cosine:.4f}"


def _shift(stored: dict[str, Any], found: dict[str, Any]) -> float:
    """The most that a stored score differs from the same class's computed again; where that class is none of the first
    classes, what it has more than the last of these."""
    scores: dict[int, float] = {entry["class_id"]: entry["score"] for entry in found["top_k"]}
    last = min(scores.values())
    entries: list[tuple[int, float]] = [(entry["class_id"], entry["score"]) for entry in stored["top_k"]]
    return max(abs(score - scores[name]) if name in scores else score - last for name, score in entries)


def _margin(row: dict[str, Any]) -> float:
    scores = [entry["score"] for entry in row["top_k"]]
    return float(scores[0] - scores[1]) if len(scores) > 1 else 1.0


def _cosine(a: np.ndarray, b: np.ndarray) -> float:
    norms = np.linalg.norm(a) * np.linalg.norm(b)
    return float(a @ b / norms) if norms else 0.0
