"""Where everything lies in an output dataset, what it is (`_dataset.json`), and what stands in it now."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, BinaryIO, TypeVar

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from tenacity import Retrying, retry_if_exception_type, stop_after_attempt

from pipeline.errors import ConfigError, FatalError, ModelMismatch, NotFound, SourceChanged, clean
from pipeline.outputs.ledger import (
    Claim,
    Disown,
    Identify,
    Mark,
    Owner,
    Standing,
    Standings,
    claim_steps,
    marks_by_shard,
    run_steps,
)
from pipeline.outputs.schema import FORMAT_VERSION, Footer, errors_schema
from pipeline.storage import Store, side_by_side
from pipeline.urls import canonical, join

PARQUET = ".parquet"
IDENTITY = "_dataset.json"
CARD = "README.md"
READ_ATTEMPTS = 5
READ_BYTES = 2**20  # of an errors part, per column and step, whatever the size of a row group
UNKNOWN = "unknown"  # the owner of files that are not ours
# What json and pyarrow say of files that are damaged, or that others have put there; what a store says is our own.
NOT_OURS = (ValueError, KeyError, TypeError, OSError, pa.ArrowException)

Identity = dict[str, Any]
T = TypeVar("T")


@dataclass(frozen=True)
class Dataset:
    """An output URL and the store that it lies in."""

    url: str
    store: Store

    def path(self, *names: str) -> str:
        return join(self.url, *names)

    def standing(self) -> Standings:
        """What stands, by shard id: three listings and nothing opened."""
        with ThreadPoolExecutor(3) as pool:
            marks = pool.submit(lambda: marks_by_shard(_marks(name for name, _ in self.listed("_ledger"))))
            parts, errors = pool.map(lambda folder: dict(_parts(self.listed(folder))), ("data", "errors"))
            return Standings(marks.result(), parts, errors)

    def standing_of(self, shard_id: str) -> Standing:
        """What stands for one shard."""
        files = self.store.starting_with(self.path("_ledger", f"{shard_id}."))
        marks = [mark for mark in _marks(_name(file.url) for file in files) if mark.shard_id == shard_id]
        part, errors = (self._version(self.part_url(folder, shard_id)) for folder in ("data", "errors"))
        return Standing(tuple(sorted(marks, key=lambda mark: mark.name)), part, errors)

    def read_mark(self, mark: Mark) -> dict[str, Any]:
        """The body of a mark: shard URL, counts, and what it vouches for."""
        body: dict[str, Any] = json.loads(self.store.read(self.path("_ledger", mark.name)))
        return body

    def read_marks(self, marks: list[Mark]) -> list[dict[str, Any]]:
        """The bodies of these marks, 16 at a time, without those that a rival has deleted since they were listed."""

        def read(mark: Mark) -> dict[str, Any] | None:
            with suppress(NotFound):
                return self.read_mark(mark)
            return None

        return [body for body in side_by_side(read, marks) if body is not None]

    def read_footer(self, folder: str, shard_id: str) -> Footer:
        """What a part or an errors part says about itself."""
        with self.open_part(folder, shard_id) as file:
            return Footer.of(pq.read_schema(file))

    def footers(self, shard_id: str, standing: Standing) -> list[Footer]:
        """What the part and the errors part of a shard say of themselves, from its mark where that vouches for them.
        Files that are not ours, or gone since they were listed, say nothing."""
        if standing.valid_mark is not None:
            with suppress(NotFound, SourceChanged, *NOT_OURS):
                return [Footer(**self.read_mark(standing.valid_mark))]
        found = []
        for folder, version in (("data", standing.part), ("errors", standing.errors)):
            with suppress(NotFound, SourceChanged, *NOT_OURS):
                if version is not None:
                    found.append(self.read_footer(folder, shard_id))
        return found

    def footers_of(self, standing: Mapping[str, Standing]) -> dict[str, list[Footer]]:
        """`footers` of many shards by id, 16 at a time."""
        return dict(zip(standing, side_by_side(lambda item: self.footers(*item), standing.items()), strict=True))

    @contextmanager
    def errors_part(self, shard_id: str) -> Iterator[pq.ParquetFile]:
        """The error rows of a shard, to be read in steps. Raises NotFound where there are none (any more), FatalError
        for a file that cannot be read."""
        try:
            with self.open_part("errors", shard_id) as file:
                yield pq.ParquetFile(file, pre_buffer=False, buffer_size=READ_BYTES)
        except NOT_OURS as cause:
            raise FatalError(
                f"{self.part_url('errors', shard_id)} is damaged or not ours: {clean(cause)}. Delete it and run again:"
                " its shard is done anew."
            ) from cause

    def error_classes(self, shard_id: str) -> set[str]:
        """The classes that a shard's error rows are of. Reads that one column."""

        def classes() -> set[str]:
            with self.errors_part(shard_id) as part:
                batches = part.iter_batches(columns=["error"], use_threads=False)
                return {name for batch in batches for name in pc.unique(batch["error"]).to_pylist()}

        return undisturbed(classes) or set()

    def keys(self, shard_id: str) -> set[str]:
        """The keys in a shard's part and errors part. What is gone, or not ours, has none."""
        found: set[str] = set()
        for folder in ("data", "errors"):
            with suppress(NotFound, SourceChanged, *NOT_OURS), self.open_part(folder, shard_id) as file:
                keys = pq.ParquetFile(file, pre_buffer=False, buffer_size=READ_BYTES).read(["key"], use_threads=False)
                found |= set(keys["key"].drop_null().to_pylist())
        return found

    def known_identity(self) -> Identity:
        """What `_dataset.json` says. Raises NotFound where there is no dataset, or it has lost that file."""
        found = self.identity()
        if found is None:
            none = f"there is no dataset at {self.url}: it has no {IDENTITY}. Check the URL, or run a job first."
            empty = f"{self.url} holds nothing yet: no run has committed a shard."
            raise NotFound(self.lost_identity() or (empty if self.has_runs() else none))
        return found

    def lost_identity(self) -> str:
        """Where there is no `_dataset.json`: what to do about that, if anything stands; else nothing."""
        owner = self.owner()
        if owner is None or (owner == UNKNOWN and not self.has_runs()):  # somebody else's folder is no dataset
            return ""
        missing = f"{self.path(IDENTITY)} is missing"
        if owner == UNKNOWN:
            return (
                f"{missing}, and what data and _ledger hold is damaged or not ours. Remove that, or restore the file."
            )
        restored = f"Restore it, or run again: a run of the same model ({owner}) that has a shard to do writes it."
        return f"{missing}, though shards are there. {restored}"

    def has_runs(self) -> bool:
        """Whether a run has left its report here, if only that there was nothing to do."""
        return next(self.store.each_below(self.path("_runs")), None) is not None

    def identity(self) -> Identity | None:
        """What `_dataset.json` says; None for a dataset that does not exist yet."""
        try:
            text = self.store.read(self.path(IDENTITY))
        except NotFound:
            return None
        try:
            found: Identity = json.loads(text)
            version, _, _ = found["format_version"], found["model_fingerprint"], found["model"]
        except (ValueError, KeyError, TypeError) as cause:
            raise FatalError(f"{self.path(IDENTITY)} is not the description of a dataset of ours: {cause}") from cause
        if version != FORMAT_VERSION:
            raise FatalError(f"{self.url} has format version {version}; this program writes {FORMAT_VERSION}.")
        return found

    def owner(self) -> str | None:
        """The fingerprint of the model that what stands is of, from any mark or part; None where nothing stands."""
        is_empty = True
        for mark in _marks(name for name, _ in self.listed("_ledger")):
            is_empty = False
            with suppress(NotFound, *NOT_OURS):
                return str(self.read_mark(mark)["model_fingerprint"])
        for name, _ in _parts(self.listed("data")):
            is_empty = False
            with suppress(NotFound, SourceChanged, *NOT_OURS):
                return self.read_footer("data", name).model_fingerprint
        return None if is_empty else UNKNOWN

    def check_identity(self, ours: Identity) -> None:
        """Raise ModelMismatch if there is anything in the dataset and it is another model's, FatalError if it is no
        model's. Of `ours`, the fingerprint and the components behind it are enough."""
        theirs = self.identity()
        if theirs is not None and _model(theirs) == _model(ours):
            return
        owner = self.owner()
        if owner is None or (theirs is None and owner == _model(ours)):
            return
        if owner == UNKNOWN:
            raise FatalError(f"{self.url} holds files that are not ours in data or _ledger. Choose another output.url.")
        raise ModelMismatch(_difference(self.url, theirs or {"model_fingerprint": owner}, ours))

    def confirm_identity(self, ours: Identity) -> None:
        """Raise ModelMismatch unless the dataset is claimed for our model, which a run has done before it commits."""
        theirs = self.identity()
        if theirs is None:
            raise ModelMismatch(f"{self.path(IDENTITY)} is gone. Another run may be claiming the dataset: run again.")
        if _model(theirs) != _model(ours):
            raise ModelMismatch(_difference(self.url, theirs, ours))

    def claim_identity(self, ours: Identity) -> None:
        """Make the dataset our model's, unless it is already; called before the first commit.

        A dataset without a part or a mark may be claimed anew, so that a first run with the wrong model locks
        nobody out. Raises ModelMismatch also for the one of two first runs with two models that comes too late.
        """
        self.check_identity(ours)
        if not run_steps(claim_steps(ours, _model), self._claim_step):
            self.confirm_identity(ours)
        self.store.put_if_absent(self.path(CARD), dataset_card(ours).encode())

    def _claim_step(self, step: Identify | Owner | Claim | Disown) -> Any:
        match step:
            case Identify():
                return self.identity()
            case Owner():
                return self.owner()
            case Claim(identity):
                data = json.dumps(identity, indent=1, ensure_ascii=False).encode()
                return self.store.put_if_absent(self.path(IDENTITY), data)
            case Disown():
                if self._has_our_card():
                    self.store.delete(self.path(CARD))
                return self.store.delete(self.path(IDENTITY))

    def _has_our_card(self) -> bool:
        """A README that somebody else wrote, or has gone on with, is theirs and stays."""
        identity = self.identity()
        with suppress(NotFound):
            return identity is not None and self.store.read(self.path(CARD)) == dataset_card(identity).encode()
        return False

    def part_url(self, folder: str, shard_id: str) -> str:
        """Of a shard's part (in `data`) or errors part (in `errors`)."""
        return self.path(folder, shard_id + PARQUET)

    def open_part(self, folder: str, shard_id: str) -> BinaryIO:
        return self.store.open(self.part_url(folder, shard_id), read_ahead=False)

    def part_ids(self, folder: str) -> list[str]:
        """The sorted ids of the shards that have a part in `data`, or an errors part in `errors`."""
        return sorted(shard_id for shard_id, _ in _parts(self.listed(folder)))

    def listed(self, folder: str) -> Iterator[tuple[str, str]]:
        """Names and versions of the files directly in a folder as they are listed; whatever lies deeper is not ours."""
        url = canonical(self.path(folder))
        for file in self.store.each_below(url):
            above, _, name = file.url.rpartition("/")
            if above == url:
                yield name, file.version

    def _version(self, url: str) -> str | None:
        try:
            return self.store.info(url).version
        except NotFound:
            return None


def make_identity(model: Identity, model_fingerprint: str, classes: Sequence[str] | None, num_classes: int) -> Identity:
    """The content of `_dataset.json`. `model` are the components behind the fingerprint; no run ids, no times."""
    identity: Identity = {
        "format_version": FORMAT_VERSION,
        "model_fingerprint": model_fingerprint,
        "model": model,
        "num_classes": num_classes,
        "classes": classes,
    }
    return json.loads(json.dumps(identity))  # type: ignore[no-any-return]  # as it will be read back


def _model(identity: Identity) -> str:
    return str(identity["model_fingerprint"])


def _difference(url: str, theirs: Identity, ours: Identity) -> str:
    lines = [
        f"{url} holds another model's rows, and vectors of two models must not mix. Choose another output.url, or"
        " the model that the dataset was made with:"
    ]
    shared = theirs.keys() & ours.keys()
    old, new = (_flat({name: identity[name] for name in shared}) for identity in (theirs, ours))
    for name in sorted(old.keys() | new.keys()):
        if old.get(name) != new.get(name) and not name.startswith("classes"):
            lines.append(f"  {name}: the dataset has {_short(old.get(name))}, this run {_short(new.get(name))}")
    return "\n".join(lines)


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 100 else text[:97] + "…"


def _flat(value: Any, path: str = "") -> dict[str, Any]:
    if not isinstance(value, dict):
        return {path: value}
    return {k: v for name, child in value.items() for k, v in _flat(child, f"{path}.{name}" if path else name).items()}


def _name(url: str) -> str:
    return url.rpartition("/")[2]


def _marks(names: Iterable[str]) -> Iterator[Mark]:
    return (mark for name in names if (mark := Mark.parse(name)) is not None)


def _parts(files: Iterable[tuple[str, str]]) -> Iterator[tuple[str, str]]:
    """Shard ids and versions."""
    return ((name.removesuffix(PARQUET), version) for name, version in files if name.endswith(PARQUET))


def dataset_card(identity: Identity) -> str:
    """A README that tells Hugging Face `datasets` which files are rows and which are error rows."""
    model = identity["model"]
    return f"""---
configs:
- config_name: default
  data_files: "data/*.parquet"
- config_name: errors
  data_files: "errors/*.parquet"
---
# Labels and embeddings

Made by resnet-batch with `{model.get("name")}`, weights `{model.get("weights")}`
(model fingerprint `{identity["model_fingerprint"]}`).

- `data/`: one Parquet file per input shard, replaced as a whole: `select * from 'data/*.parquet'`
- `errors/`: the samples that could not be read or decoded, with the reason
- `_ledger/`: which shards are complete; `resnet-batch verify` checks it against everything else
"""  # noqa: S608 - a recipe for people, run by nobody


def read_table(dataset: Dataset, folder: str, columns: Sequence[str] | None = None) -> pa.Table:
    """All rows of `data` or `errors`, part by part, sorted by index within each. Reads several parts at a time.

    Raises NotFound where there is no dataset, or no shard of it is committed yet, so that its columns are unknown, and
    ConfigError for a column that it does not have.
    """
    dataset.known_identity()

    def chosen(names: list[str]) -> list[str]:
        if unknown := [name for name in columns or () if name not in names]:
            raise ConfigError(f"{dataset.url} has no column {', '.join(unknown)}; there are {', '.join(names)}.")
        return names if columns is None else list(columns)

    def rows(shard_id: str) -> pa.Table:
        with dataset.open_part(folder, shard_id) as file:
            part = pq.ParquetFile(file, pre_buffer=True)
            wanted = chosen(part.schema_arrow.names)
            # Several are read at once anyway, and a process that ends while pyarrow's own threads do may be aborted.
            return part.read(wanted, use_threads=False).select(wanted).replace_schema_metadata()

    tables = side_by_side(lambda name: undisturbed(partial(rows, name)), dataset.part_ids(folder), at_once=8)
    found = [table for table in tables if table is not None]
    if found:
        return pa.concat_tables(found)
    if folder == "errors":
        return errors_schema().empty_table().select(chosen(errors_schema().names))
    raise NotFound(f"no shard of {dataset.url} is committed yet. Run the job first.")


def undisturbed(read: Callable[[], T]) -> T | None:
    """What `read` makes of a part as it is now: again where a run replaces it meanwhile, and None where it has gone.

    Raises SourceChanged for one that is replaced again and again.
    """
    attempts = Retrying(
        retry=retry_if_exception_type(SourceChanged), stop=stop_after_attempt(READ_ATTEMPTS), reraise=True
    )
    try:
        return attempts(read)
    except NotFound:
        return None
