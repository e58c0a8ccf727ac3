"""Where everything lies in an output dataset, what it is (`_dataset.json`), and what stands in it now."""

from __future__ import annotations

import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.errors import FatalError, ModelMismatch, NotFound
from pipeline.outputs.ledger import Mark, Standing, by_shard
from pipeline.outputs.schema import FORMAT_VERSION, errors_schema
from pipeline.storage import Store, join

PARQUET = ".parquet"
IDENTITY = "_dataset.json"

Identity = dict[str, Any]


@dataclass(frozen=True)
class Dataset:
    """An output URL and the store that it lies in."""

    url: str
    store: Store

    def path(self, *names: str) -> str:
        return join(self.url, *names)

    def standing(self) -> dict[str, Standing]:
        """What stands, by shard id: three listings and nothing opened."""
        with ThreadPoolExecutor(3) as pool:
            ledger, data, errors = pool.map(self._names_and_versions, ("_ledger", "data", "errors"))
        marks = (Mark.parse(name) for name in ledger)
        return by_shard((m for m in marks if m is not None), _parts(data), _parts(errors))

    def standing_of(self, shard_id: str) -> Standing:
        """What stands for one shard."""
        marks = (Mark.parse(_name(f.url)) for f in self.store.starting_with(self.path("_ledger", f"{shard_id}.")))
        part = self._version(self.path("data", shard_id + PARQUET))
        errors = self._version(self.path("errors", shard_id + PARQUET))
        return Standing(tuple(m for m in marks if m is not None and m.shard_id == shard_id), part, errors)

    def read_mark(self, mark: Mark) -> dict[str, Any]:
        """The body of a mark: shard URL, counts, and what it vouches for."""
        body: dict[str, Any] = json.loads(self.store.read(self.path("_ledger", mark.name)))
        return body

    def read_marks(self, marks: list[Mark]) -> list[dict[str, Any]]:
        with ThreadPoolExecutor(16) as pool:
            return list(pool.map(self.read_mark, marks))

    def identity(self) -> Identity | None:
        """What `_dataset.json` says; None for a dataset that does not exist yet."""
        try:
            text = self.store.read(self.path(IDENTITY))
        except NotFound:
            return None
        try:
            found: Identity = json.loads(text)
            version = found["format_version"]
        except (ValueError, KeyError, TypeError) as cause:
            raise FatalError(f"{self.path(IDENTITY)} is not the description of a dataset of ours: {cause}") from cause
        if version != FORMAT_VERSION:
            raise FatalError(f"{self.url} has format version {version}; this program writes {FORMAT_VERSION}.")
        return found

    def check_identity(self, ours: Identity) -> None:
        """Raise ModelMismatch if there is anything in the dataset and it is another model's. Of `ours`, the fingerprint
        and the components behind it are enough."""
        theirs = self.identity()
        if theirs is not None and not _is_same(theirs, ours) and not self._is_empty():
            raise ModelMismatch(_difference(self.url, theirs, ours))

    def claim_identity(self, ours: Identity) -> None:
        """Write what the dataset is, unless it says so already; called before the first commit.

        A dataset without a part or a mark may be claimed anew, so that a first run with the wrong model locks
        nobody out. What stands after writing decides: of two first runs with two models one is refused.
        """
        data = json.dumps(ours, indent=1, ensure_ascii=False).encode()
        self.check_identity(ours)
        found = self.identity()
        if found is not None and _is_same(found, ours):
            return
        if not self.store.put_if_absent(self.path(IDENTITY), data):
            self.check_identity(ours)
            self.store.put(self.path(IDENTITY), data)
        self.check_identity(ours)
        self.store.put(self.path("README.md"), dataset_card(ours).encode())

    def _is_empty(self) -> bool:
        return not any(self.store.find(self.path(folder)) for folder in ("_ledger", "data"))

    def _names_and_versions(self, folder: str) -> dict[str, str]:
        return {_name(file.url): file.version for file in self.store.find(self.path(folder))}

    def _version(self, url: str) -> str | None:
        try:
            return self.store.info(url).version
        except NotFound:
            return None


def make_identity(model: Identity, model_fingerprint: str, classes: list[str] | None, num_classes: int) -> Identity:
    """The content of `_dataset.json`. `model` are the components behind the fingerprint; no run ids, no times."""
    identity: Identity = {
        "format_version": FORMAT_VERSION,
        "model_fingerprint": model_fingerprint,
        "model": model,
        "num_classes": num_classes,
        "classes": classes,
    }
    return json.loads(json.dumps(identity))  # type: ignore[no-any-return]  # as it will be read back


def _is_same(theirs: Identity, ours: Identity) -> bool:
    return bool(theirs["model_fingerprint"] == ours["model_fingerprint"])


def _difference(url: str, theirs: Identity, ours: Identity) -> str:
    lines = [
        f"{url} holds another model's rows, and vectors of two models must not mix. Choose another output.url, or"
        " the model that the dataset was made with:"
    ]
    old, new = _flat(theirs), _flat(ours)
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


def _parts(names: dict[str, str]) -> dict[str, str]:
    return {name.removesuffix(PARQUET): version for name, version in names.items() if name.endswith(PARQUET)}


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
    """All rows of `data` or `errors`, sorted by shard and index within each part. Reads several parts at a time."""
    urls = [file.url for file in dataset.store.find(dataset.path(folder)) if file.url.endswith(PARQUET)]
    if not urls and dataset.identity() is None:
        raise NotFound(f"there is no dataset at {dataset.url}. Check the URL, or run a job first.")

    def read_part(url: str) -> pa.Table:
        with dataset.store.open(url, read_ahead=False) as file:
            return pq.read_table(file, columns=None if columns is None else list(columns)).replace_schema_metadata()

    with ThreadPoolExecutor(8) as pool:
        tables = list(pool.map(read_part, urls))
    return pa.concat_tables(tables) if tables else errors_schema().empty_table()
