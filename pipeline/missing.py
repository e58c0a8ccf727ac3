"""Shards of the input that do not stand in the dataset: lost, where a run has committed them; else still to be done.

The runs' reports tell what was committed. What a prune has removed is no loss, even where the input lists it: it may
have come back, or the prune was given a narrower input. So a prune leaves a record beside the reports.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from pipeline.config import JobConfig
from pipeline.errors import NotFound, redact
from pipeline.inputs.shards import Shard, printable
from pipeline.outputs.dataset import Dataset
from pipeline.outputs.ledger import NOTHING
from pipeline.overview import REPORT, listed_now, run_files
from pipeline.report import counted, new_run_id
from pipeline.storage import side_by_side

PRUNED = "pruned.json"
NAMED = 3  # shards that have no rows yet


@dataclass(frozen=True)
class Missing:
    """A problem for each shard that is lost, and a note on those still to be done, or on why nothing is known."""

    problems: list[str] = field(default_factory=list)
    note: str = ""


def find_missing(
    dataset: Dataset,
    model_fingerprint: str | None,
    standing: Collection[str],
    said: Collection[str],
    config: JobConfig | None,
) -> Missing:
    """Compare the input of this config, or of the last run's, with the ids that stand.

    `said` are the URLs that the parts which stand give for their shards. Reports of another model are about rows that
    were here before these; without a fingerprint all count.
    """
    listed, why = listed_now(dataset, config, "verify", keep=lambda shard: shard.id not in standing)
    if listed is None:
        return Missing(note=f"what of the input has no rows is not known: {why}")
    absent = [shard for shard in listed if shard.id not in standing]
    judged = _judged(absent, {redact(url) for url in said})
    commits = _last_commits(dataset, judged.values(), model_fingerprint)
    claimed = [name for name, url in judged.items() if url in commits]
    now = dict(zip(claimed, side_by_side(dataset.standing_of, claimed), strict=True))
    lost = {name for name in claimed if now[name] == NOTHING}  # the others were committed since the listing
    return Missing(
        [
            f"{name}: nothing of {judged[name]} stands, though run {commits[judged[name]]} committed it. A run does it"
            " again."
            for name in sorted(lost)
        ],
        _still_to_do([redact(shard.url) for shard in absent if shard.id not in now]),
    )


def record_pruned(dataset: Dataset, urls: Iterable[str]) -> None:
    """Leave word that these shards, by their redacted URLs, are about to be removed on request."""
    body = printable(json.dumps({"removed": list(urls)}, indent=1, ensure_ascii=False))
    dataset.store.put(dataset.path("_runs", new_run_id(datetime.now(UTC)), PRUNED), body.encode())


def _judged(absent: Iterable[Shard], said: Collection[str]) -> dict[str, str]:
    """Those of which a report can tell whether they were committed, by id, with the URL that it would have for them.

    A group of loose files may have been cut anew. A report leaves queries out: where another one of a URL stands, it
    is this that was committed.
    """
    urls = {shard.id: (shard.url, redact(shard.url)) for shard in absent if shard.kind != "files"}
    return {name: shown for name, (url, shown) in urls.items() if url == shown or shown not in said}


def _last_commits(dataset: Dataset, urls: Iterable[str], model_fingerprint: str | None) -> dict[str, str]:
    """The run that committed each of these last, without those that were pruned since. Holds one report at a time."""
    found: dict[str, str] = {}
    left = set(urls)
    for file in run_files(dataset, REPORT, PRUNED) if left else ():
        body = _body(dataset, file)
        if file.endswith(PRUNED):
            left -= _texts(body, "removed")
        elif model_fingerprint in (None, body.get("model_fingerprint")):
            committed = left & _texts(body, "committed")
            found |= dict.fromkeys(committed, file.split("/")[-2])
            left -= committed
        if not left:
            break
    return found


def _body(dataset: Dataset, url: str) -> Mapping[str, Any]:
    """What is damaged, or gone since it was listed, says nothing."""
    try:
        body = json.loads(dataset.store.read(url))
    except (NotFound, ValueError):
        return {}
    return body if isinstance(body, dict) else {}


def _texts(body: Mapping[str, Any], key: str) -> set[str]:
    found = body.get(key)
    return {text for text in found if isinstance(text, str)} if isinstance(found, list) else set()


def _still_to_do(urls: list[str]) -> str:
    if not urls:
        return ""
    have, them = ("has", "it") if len(urls) == 1 else ("have", "them")
    more = f" and {len(urls) - NAMED:,} more" if len(urls) > NAMED else ""
    named = ", ".join(urls[:NAMED])
    return f"{counted(len(urls), 'shard')} of the input {have} no rows yet; a run does {them}: {named}{more}"
