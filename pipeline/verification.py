"""A whole dataset checked from the outside: marks, parts, errors parts, footers and rows against each other, and what
stands against what the input lists.

Every part is read, some thousand rows at a time, so that memory does not grow with it, and the checksums of its pages
are compared. Damage is a problem with a name, never a crash; what a store fails to deliver is raised, since it says
nothing about the dataset.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.backends import leftovers
from pipeline.calibration import network_problem
from pipeline.config import JobConfig
from pipeline.errors import ConfigError, NotFound, SourceChanged, clean
from pipeline.inputs.shards import shard_id
from pipeline.missing import find_missing
from pipeline.outputs.dataset import PARQUET, Dataset, Identity
from pipeline.outputs.ledger import Mark, Standing
from pipeline.outputs.schema import Footer, errors_schema, part_schema
from pipeline.recomputing import recompute
from pipeline.report import counted
from pipeline.rows import Columns
from pipeline.storage import side_by_side
from pipeline.urls import canonical, is_local, local_path

BATCH_ROWS = 2048
READ_BYTES = 4 * 2**20  # per column and step, whatever the size of a row group
STAGES = ("read", "decode", "predict")
DAMAGE = (pa.ArrowException, OSError, ValueError, KeyError, TypeError)  # what pyarrow and json say of a damaged file


@dataclass
class Verification:
    """What was checked, and each thing that is wrong by name."""

    url: str
    shards: int = 0
    predicted: int = 0
    errors: int = 0
    sampled: int = 0
    agreed: int = 0
    zero_embeddings: int = 0  # rows: no problem of the dataset, but they have no direction and no cosine
    note: str = ""  # on what could not be sampled or checked, or that there is nothing yet
    problems: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        return not self.problems

    def __str__(self) -> str:
        text = f"{counted(self.shards, 'shard')}, {counted(self.predicted, 'row')}, {counted(self.errors, 'error row')}"
        if self.sampled:
            text += f"; {self.agreed} of {self.sampled} recomputed rows agree"
        count = counted(len(self.problems), "problem")
        zeros = f"{self.zero_embeddings} embeddings are all zeros" if self.zero_embeddings else ""
        lines = [f"{text}: {'all is well' if self.ok else count}", zeros, self.note, *self.problems]
        return "\n".join(line for line in lines if line)


def verify_dataset(dataset: Dataset, sample: int = 0, config: JobConfig | None = None) -> Verification:
    """Read every part of the dataset and name every offender.

    What the input lists and a run has committed must stand. With `sample`, so many rows are recomputed from their
    source bytes. For both the given config or that of the last run is taken. Raises NotFound where there is no dataset;
    one that has lost its `_dataset.json` has that problem.
    """
    if sample < 0:
        raise ConfigError(f"sample is a number of rows, 0 for none; got {sample}.")
    result = Verification(dataset.url)
    identity = dataset.identity()
    if identity is None and (lost := dataset.lost_identity()):
        result.problems, result.note = [lost], "nothing else was checked"
        return result
    if identity is None and dataset.has_runs():
        missing = find_missing(dataset, None, (), (), config)
        result.problems = missing.problems
        result.note = _joined("" if missing.problems else "no run has committed a shard yet", missing.note)
        return result
    identity = identity or dataset.known_identity()  # which says what there is instead
    standing = sorted(dataset.standing().items())
    checked = side_by_side(lambda item: _check_shard(dataset, identity, *item), standing, at_once=4)
    found = {name: what for (name, _), what in zip(standing, checked, strict=True)}
    _agree_on_width(found)
    parts = {name: part for name, (part, _) in found.items() if part is not None}
    _count(parts, result)
    result.problems.extend(f"{name}: {problem}" for name, (_, problems) in found.items() for problem in problems)
    result.problems.extend(_overlaps(parts))
    result.problems.extend(_strangers(dataset))
    if problem := network_problem(dataset, identity):
        result.problems.append(problem)
    said = [part.footer.shard for part in parts.values()]
    missing = find_missing(dataset, identity["model_fingerprint"], found, said, config)
    result.problems, result.note = result.problems + missing.problems, missing.note
    if sample:
        sound = {name: part.footer for name, part in parts.items() if not found[name][1]}
        again = recompute(dataset, sound, sample, config)
        result.sampled, result.agreed, result.note = again.sampled, again.agreed, _joined(missing.note, again.note)
        result.problems.extend(again.problems)
    return result


def _count(parts: Mapping[str, _Scanned], result: Verification) -> None:
    result.shards = len(parts)
    result.predicted = sum(part.footer.predicted for part in parts.values())
    result.errors = sum(part.footer.errors for part in parts.values())
    result.zero_embeddings = sum(part.zeros for part in parts.values())


def _joined(*notes: str) -> str:
    return "\n".join(filter(None, notes))


# --- One shard -----------------------------------------------------------------------------------------------------


CHANGED = "it changed while it was checked, verify again"


class _Damaged(Exception):
    """A file that cannot be read for what it holds."""


@contextmanager
def _naming(name: str) -> Iterator[None]:
    try:
        yield
    except DAMAGE as cause:
        raise _Damaged(f"{name} is damaged or not ours: {clean(cause)}") from cause


_Checked = tuple["_Scanned | None", list[str]]  # the part, if it is committed and can be read, and all that is wrong


def _check_shard(dataset: Dataset, identity: Identity, name: str, standing: Standing) -> _Checked:
    try:
        mark = standing.valid_mark
        if mark is None:
            now = dataset.standing_of(name)  # parts are listed after marks: a run may have committed it in between
            if now != standing:
                return _check_shard(dataset, identity, name, now)
            return None, [f"not committed: {_why_not(dataset, standing)}. A run does it again."]
        body = _mark_body(dataset, mark)
        part = _scan(dataset, "data", name, identity)
        errors = _scan(dataset, "errors", name, identity) if standing.errors is not None else None
    except _Damaged as damage:
        return None, [str(damage)]
    except (NotFound, SourceChanged) as gone:
        return None, [f"{CHANGED}: {gone}"]
    problems = [*_footer_problems(name, mark, body, part, errors), *_index_problems(part, errors)]
    if problems and dataset.standing_of(name) != standing:
        return None, [f"{CHANGED}: a run has replaced it"]
    part.root = part.root or (errors.root if errors is not None else "")
    part.indices = part.indices[:0].copy()  # all shards' together would not be small
    return part, problems


def _agree_on_width(checked: Mapping[str, _Checked]) -> None:
    """The width of the embeddings is the one thing about the columns that only the parts say."""
    widths = {name: part.width for name, (part, _) in checked.items() if part is not None and part.width}
    for usual, _ in Counter(widths.values()).most_common(1):
        for name in (name for name, width in widths.items() if width != usual):
            checked[name][1].append(f"its embeddings have {widths[name]} numbers, those of other shards {usual}")


def _overlaps(parts: Mapping[str, _Scanned]) -> Iterator[str]:
    """Promise: no file stands in two groups. Two runs at once may leave that when a file that begins a group comes or
    goes; the next run mends it."""
    root = reach = holder = ""
    groups = ((part.root, part.footer.shard, name) for name, part in parts.items() if part.root)
    for its_root, shard, name in sorted(groups):
        if its_root != root:
            root, reach = its_root, ""
        elif shard.removeprefix(root) <= reach:
            yield f"{name}: its first files stand in {holder} as well. A run puts it right."
        last_path = parts[name].footer.last_path
        if last_path > reach and not last_path.endswith("\U0010ffff"):  # of a name that is not UTF-8: too far
            reach, holder = last_path, name


def _strangers(dataset: Dataset) -> Iterator[str]:
    """What lies where only parts and marks should: programs that read whole folders would take it for rows."""
    for folder in ("data", "errors", "_ledger"):
        root = canonical(dataset.path(folder))
        for file in dataset.store.find(root):
            path = file.url[len(root) + 1 :]
            is_ours = Mark.parse(path) is not None if folder == "_ledger" else path.endswith(PARQUET)
            if ("/" in path or not is_ours) and not path.startswith((".", "_")):
                yield f"{folder}/{path} is no file of this dataset"
    if is_local(dataset.url):
        for left in leftovers(local_path(dataset.url)):
            yield f"{left.relative_to(local_path(dataset.url))} was left by a writer that died; the next run removes it"


def _mark_body(dataset: Dataset, mark: Mark) -> Mapping[str, Any]:
    with _naming(f"_ledger/{mark.name}"):
        body = dataset.read_mark(mark)
        if not isinstance(body, dict):
            raise TypeError(f"it holds {type(body).__name__}")
        return body


def _why_not(dataset: Dataset, standing: Standing) -> str:
    there = [name for name, version in (("a part", standing.part), ("an errors part", standing.errors)) if version]
    if len(standing.marks) != 1 or standing.part is None:
        marks = f"{len(standing.marks) or 'no'} mark{'' if len(standing.marks) == 1 else 's'}"
        return f"{marks}, and there is {' and '.join(there) or 'nothing else'}"
    errors = _mark_body(dataset, standing.marks[0]).get("errors")
    if errors and standing.errors is None:
        return f"its mark counts {errors} error rows, and there is no errors part"
    if standing.errors is not None and not errors:
        return "there is an errors part, and its mark counts no error rows"
    return "its mark vouches for other versions than those that stand there"


@dataclass
class _Scanned:
    """A part or an errors part that was read to its end."""

    footer: Footer
    indices: np.ndarray  # int64 (rows,)
    problems: dict[str, None]  # in order, each once
    width: int = 0  # of the embeddings
    zeros: int = 0  # embeddings
    root: str = ""  # with the # behind it, of a group of loose files whose first one is here


def _scan(dataset: Dataset, folder: str, name: str, identity: Identity) -> _Scanned:
    with (
        _naming(f"{folder}/{name}{PARQUET}"),
        dataset.open_part(folder, name) as file,
    ):
        parquet = pq.ParquetFile(file, pre_buffer=False, buffer_size=READ_BYTES, page_checksum_verification=True)
        schema = parquet.schema_arrow
        footer = Footer.of(schema)
        result = _Scanned(footer, np.empty(0, np.int64), {})
        if footer.model_fingerprint != identity["model_fingerprint"]:
            result.problems[f"model {footer.model_fingerprint}, but the dataset is {identity['model_fingerprint']}"] = (
                None
            )
        expected = errors_schema() if folder == "errors" else _part_schema(identity, schema)
        result.width = _width(expected)
        if not schema.equals(expected):
            raise ValueError(f"its columns are {_columns(schema)}, not {_columns(expected)}")
        indices = []
        for batch in parquet.iter_batches(BATCH_ROWS, use_threads=False):
            rows = pa.Table.from_batches([batch])
            found = _error_problems(rows) if folder == "errors" else _row_problems(rows, identity)
            result.problems.update(dict.fromkeys([*_shard_problems(rows, footer), *found]))
            result.zeros += int((_norms(rows) == 0).sum())
            indices.append(rows["index"].to_numpy())
            if footer.last_path and 0 in indices[-1][:1]:
                result.root = _root(footer.shard, rows["key"][0].as_py() or "")
        result.indices = np.concatenate([result.indices, *indices])
        return result


def _root(group: str, first: str) -> str:
    """Its first file tells where the root ends in the URL of a group, since both may have a # in their names. The first
    group of a root is not named after it."""
    named = group.removesuffix(first) if group.endswith(f"#{first}") else group
    return named if named.endswith("#") else ""


def _part_schema(identity: Identity, schema: pa.Schema) -> pa.Schema:
    """What the schema of a part must be: the dataset says which columns, the part how wide an embedding is."""
    columns = identity["model"]["columns"]
    found = schema.field("embedding").type if "embedding" in schema.names else None
    if found is not None and not pa.types.is_fixed_size_list(found):
        raise ValueError(f"embedding is {found}, not a list of fixed size")
    width = 0 if found is None else found.list_size
    return part_schema(Columns(columns["top_k"] or 0, columns["embedding_dtype"], width))


def _width(schema: pa.Schema) -> int:
    return int(schema.field("embedding").type.list_size) if "embedding" in schema.names else 0


def _columns(schema: pa.Schema) -> str:
    return ", ".join(f"{f.name} {f.type}" for f in schema)


def _footer_problems(
    name: str, mark: Mark, body: Mapping[str, Any], part: _Scanned, errors: _Scanned | None
) -> Iterator[str]:
    footer = part.footer
    if footer.body() != body:
        yield f"its mark says {dict(body)}, its footer {footer.body()}"
    if footer.shard_fingerprint != mark.fingerprint:
        yield f"its mark is for source {mark.fingerprint}, its footer for {footer.shard_fingerprint}"
    if shard_id(footer.shard) != name and "\\udc" not in footer.shard:  # a name that is not UTF-8 stands there escaped
        yield f"it is the part of another shard, {footer.shard}"
    if errors is not None and errors.footer != footer:
        yield f"its errors part says {errors.footer.body()}, its part {footer.body()}"
    num_errors = len(errors.indices) if errors is not None else 0
    if (len(part.indices), num_errors) != (footer.predicted, footer.errors):
        yield (
            f"{len(part.indices)} rows and {num_errors} error rows, its footer says {footer.predicted} and"
            f" {footer.errors}"
        )
    if footer.listed != footer.predicted + footer.errors:
        yield f"{footer.listed} samples listed, but {footer.predicted} predicted and {footer.errors} errors"
    yield from part.problems
    yield from (f"errors part: {problem}" for problem in (errors.problems if errors is not None else ()))


def _index_problems(part: _Scanned, errors: _Scanned | None) -> Iterator[str]:
    """Promise: each index below `listed` is there once, as a row or as an error row."""
    listed = part.footer.listed
    indices, counts = np.unique(
        np.concatenate([part.indices, errors.indices]) if errors is not None else part.indices, return_counts=True
    )
    missing = np.setdiff1d(np.arange(listed), indices)
    twice = indices[counts > 1]
    beyond = indices[(indices < 0) | (indices >= listed)]
    for found, what in (
        (missing, "is missing"),
        (twice, "stands twice"),
        (beyond, f"is none of the {listed} listed"),
    ):
        if len(found):
            yield f"index {found[0]} {what}{f', and {len(found) - 1} more like it' if len(found) > 1 else ''}"


# --- Rows ----------------------------------------------------------------------------------------------------------


def _shard_problems(rows: pa.Table, footer: Footer) -> Iterator[str]:
    if rows.num_rows and pc.unique(rows["shard"]).to_pylist() != [footer.shard]:
        yield f"rows of other shards than {footer.shard}"


def _error_problems(rows: pa.Table) -> Iterator[str]:
    if not set(pc.unique(rows["stage"]).to_pylist()) <= set(STAGES):
        yield f"error rows of another stage than {', '.join(STAGES)}"


def _row_problems(rows: pa.Table, identity: Identity) -> Iterator[str]:
    for name in rows.column_names:
        if rows[name].null_count:
            yield f"{name} is null in {rows[name].null_count} rows"
            return
    if not np.isfinite(_norms(rows)).all():
        yield "embeddings that are not finite, or whose norm is not"
    if "class_id" in rows.column_names:
        yield from _prediction_problems(rows, identity)


def _norms(rows: pa.Table) -> np.ndarray:
    """float32 (rows,), as who searches these vectors computes them; empty where there are no embeddings."""
    if "embedding" not in rows.column_names or not rows.num_rows:
        return np.empty(0, np.float32)
    values = rows["embedding"].combine_chunks().flatten().to_numpy(zero_copy_only=False)
    with np.errstate(over="ignore", invalid="ignore"):
        return np.linalg.norm(values.reshape(rows.num_rows, -1).astype(np.float32), axis=1)  # type: ignore[no-any-return]


def _prediction_problems(rows: pa.Table, identity: Identity) -> Iterator[str]:
    num_classes = identity["num_classes"]
    lengths = pc.list_value_length(rows["top_k"]).to_numpy()
    if rows.num_rows == 0 or lengths.min() == 0:
        yield from ["rows with an empty top_k"] if rows.num_rows else []
        return
    first = pc.list_element(rows["top_k"], 0)
    if any(not pc.struct_field(first, name).equals(rows[name]) for name in ("class_id", "label", "score")):
        yield "rows whose class_id, label and score are not the first of their top_k"
    entries = rows["top_k"].combine_chunks().flatten()
    ids, scores = (entries.field(name).to_numpy(zero_copy_only=False) for name in ("class_id", "score"))
    if not (ids.min() >= 0 and ids.max() < num_classes):
        yield f"class ids that are none of the {num_classes} classes"
        return
    names = pa.array(identity["classes"] or [str(number) for number in range(num_classes)], pa.string())
    if not names.take(pa.array(ids.astype(np.int64))).equals(entries.field("label")):
        yield "labels that are not the names of their class_id"
    if not ((scores >= 0) & (scores <= 1.000001)).all():
        yield "scores that are not between 0 and 1"
    if lengths.max() > (most := min(identity["model"]["columns"]["top_k"], num_classes)) or lengths.min() < most:
        yield f"rows that do not have {most} entries in their top_k"
    goes_on = np.ones(len(ids), bool)
    goes_on[np.cumsum(lengths)[:-1]] = goes_on[0] = False  # where a row's entries begin
    if (goes_on[1:] & (np.diff(scores) > 0)).any():
        yield "rows whose top_k is not in descending order"
