"""Every kind of damage to a dataset of three shards with one error row each, and what verify says of it."""

from __future__ import annotations

import io
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.outputs.dataset import Dataset
from pipeline.outputs.ledger import Mark, commit_hash
from tests.support.datasets import mark, names, part, rewrite, set_column, vouch

PER_SHARD = 20
BROKEN_AT = 7  # the index of the picture that cannot be read


def delete_part(d: Dataset) -> None:
    part(d).unlink()


def delete_mark(d: Dataset) -> None:
    mark(d).unlink()


def delete_errors_part(d: Dataset) -> None:
    part(d, folder="errors").unlink()


def lose_a_shard(d: Dataset) -> None:
    """Part, mark and errors part together: nothing that stands tells of it."""
    for path in (part(d, folder="errors"), mark(d), part(d)):
        path.unlink()


def foreign_part(d: Dataset) -> None:
    shutil.copy2(part(d), part(d).with_name("0-foreign.parquet"))


def foreign_part_with_a_mark(d: Dataset) -> None:
    foreign_part(d)
    vouch(d, "0-foreign")


def foreign_errors_part(d: Dataset) -> None:
    shutil.copy2(part(d, folder="errors"), part(d, folder="errors").with_name("0-foreign.parquet"))


def errors_part_of_another_shard(d: Dataset) -> None:
    shutil.copy2(part(d, 1, "errors"), part(d, 0, "errors"))
    vouch(d, names(d)[0])


def extra_mark(d: Dataset) -> None:
    shutil.copy2(mark(d), mark(d).with_name(f"{names(d)[0]}.0123456789abcdef.0123456789abcdef.json"))


def stale_mark(d: Dataset) -> None:
    shard, fingerprint, _, _ = mark(d).name.rsplit(".", 3)
    mark(d).rename(mark(d).with_name(f"{shard}.{fingerprint}.0123456789abcdef.json"))


def mark_for_another_source(d: Dataset) -> None:
    shard, _, commit, _ = mark(d).name.rsplit(".", 3)
    mark(d).rename(mark(d).with_name(f"{shard}.0123456789abcdef.{commit}.json"))


def mark_that_counts_otherwise(d: Dataset) -> None:
    mark(d).write_text(mark(d).read_text().replace('"predicted": 19', '"predicted": 18'))


def torn_mark(d: Dataset) -> None:
    mark(d).write_text(mark(d).read_text()[:30])


def part_that_was_touched(d: Dataset) -> None:
    rewrite(part(d), set_column("label", 3, "9"))


def changed(name: str, value: Any, place: int = 3) -> Callable[[Dataset], None]:
    def damage(d: Dataset) -> None:
        rewrite(part(d), set_column(name, place, value))
        vouch(d, names(d)[0])

    damage.__name__ = f"{name}={value}"
    return damage


def changed_rows(change: Callable[[pa.Table], pa.Table], **footer: Any) -> Callable[[Dataset], None]:
    def damage(d: Dataset) -> None:
        rewrite(part(d), change, **footer)
        vouch(d, names(d)[0])

    return damage


def cut(d: Dataset) -> None:
    data = part(d).read_bytes()
    part(d).write_bytes(data[: len(data) // 2])


def cut_but_vouched_for(d: Dataset) -> None:
    name, body = names(d)[0], mark(d).read_text()
    whole = part(d).read_bytes()
    vouch_for_bytes(d, name, whole[: len(whole) // 2], body)


def vouch_for_bytes(d: Dataset, name: str, data: bytes, body: str) -> None:
    """A mark that is to be believed beside a part that is not even Parquet."""
    fingerprint = mark(d).name.rsplit(".", 3)[1]
    mark(d).unlink()
    part(d).write_bytes(data)
    standing = d.standing_of(name)
    assert standing.part is not None
    path = Path(d.url, "_ledger", Mark(name, fingerprint, commit_hash(standing.part, standing.errors)).name)
    path.write_text(body)


def garbled(d: Dataset) -> None:
    """The pages of a column overwritten, the footer as it was."""
    data = bytearray(part(d).read_bytes())
    data[8:600] = b"\xff" * 592
    vouch_for_bytes(d, names(d)[0], bytes(data), mark(d).read_text())


def no_parquet_at_all(d: Dataset) -> None:
    vouch_for_bytes(d, names(d)[0], b"", mark(d).read_text())


def parquet_of_somebody_else(d: Dataset) -> None:
    buffer = io.BytesIO()
    pq.write_table(pa.table({"a": [1]}), buffer)
    vouch_for_bytes(d, names(d)[0], buffer.getvalue(), mark(d).read_text())


def embedding_values(rows: pa.Table) -> np.ndarray:
    """(rows, 64), a copy."""
    return rows["embedding"].combine_chunks().flatten().to_numpy().reshape(-1, 64).copy()


def with_embeddings(rows: pa.Table, values: np.ndarray) -> pa.Table:
    column = pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1)), values.shape[1])
    return rows.set_column(rows.schema.get_field_index("embedding"), "embedding", column)


def planted_embedding(value: float) -> Callable[[Dataset], None]:
    def plant(rows: pa.Table) -> pa.Table:
        values = embedding_values(rows)
        values[2, 5] = value
        return with_embeddings(rows, values)

    return changed_rows(plant)


def flipped_bit(d: Dataset) -> None:
    """In the last embedding of the part, whose pages are not compressed: it stays a number, and size and time stay."""
    path = part(d)
    data, found = bytearray(path.read_bytes()), path.stat()
    last = embedding_values(pq.read_table(path))[-1].tobytes()
    data[data.rindex(last) + 3] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(found.st_atime_ns, found.st_mtime_ns))


def part_of_another_shard(d: Dataset) -> None:
    first, second = part(d, 0), part(d, 1)
    shutil.copy2(second, first)
    shutil.copy2(part(d, 1, "errors"), part(d, 0, "errors"))
    body, fingerprint = mark(d).read_text(), mark(d).name.rsplit(".", 3)[1]
    mark(d).unlink()
    standing = d.standing_of(names(d)[0])
    assert standing.part is not None
    Path(d.url, "_ledger", Mark(names(d)[0], fingerprint, commit_hash(standing.part, standing.errors)).name).write_text(
        body
    )


def narrower_embeddings(d: Dataset) -> None:
    rewrite(part(d), lambda rows: with_embeddings(rows, embedding_values(rows)[:, :32]))
    vouch(d, names(d)[0])


def edited_top_k(edit: Callable[[list[dict[str, Any]]], list[dict[str, Any]]]) -> Callable[[Dataset], None]:
    """Of one row; its first entry stays what the row says."""

    def change(rows: pa.Table) -> pa.Table:
        return set_column("top_k", 3, edit(rows["top_k"][3].as_py()))(rows)

    return changed_rows(change)


def file_beside(name: str) -> Callable[[Dataset], None]:
    def damage(d: Dataset) -> None:
        Path(d.url, name).parent.mkdir(exist_ok=True)
        Path(d.url, name).write_bytes(b"?")

    return damage


DAMAGE: dict[str, tuple[Callable[[Dataset], None], str]] = {
    "deleted part": (delete_part, "not committed: 1 mark, and there is an errors part"),
    "part without a mark": (delete_mark, "not committed: no marks, and there is a part and an errors part"),
    "missing errors part": (delete_errors_part, "its mark counts 1 error rows, and there is no errors part"),
    "lost shard": (lose_a_shard, "digits-000.tar stands, though run 20260101T000000Z-aaaaaaaa committed it"),
    "foreign part": (foreign_part, "0-foreign: not committed: no marks, and there is a part"),
    "foreign part with a mark": (foreign_part_with_a_mark, "0-foreign: it is the part of another shard, file://"),
    "foreign errors part": (foreign_errors_part, "0-foreign: not committed: no marks, and there is an errors part"),
    "another shard's errors": (errors_part_of_another_shard, "its errors part says"),
    "extra mark": (extra_mark, "not committed: 2 marks, and there is a part and an errors part"),
    "stale mark": (stale_mark, "its mark vouches for other versions than those that stand there"),
    "mark of another source": (mark_for_another_source, "its mark is for source 0123456789abcdef"),
    "mark counts otherwise": (mark_that_counts_otherwise, "its mark says"),
    "torn mark": (torn_mark, ".json is damaged or not ours"),
    "touched part": (part_that_was_touched, "its mark vouches for other versions than those that stand there"),
    "changed label": (changed("label", "9"), "whose class_id, label and score are not the first of their top_k"),
    "changed class": (changed("class_id", 11), "whose class_id, label and score are not the first of their top_k"),
    "changed score": (changed("score", 0.125), "whose class_id, label and score are not the first of their top_k"),
    "empty top_k": (changed("top_k", []), "rows with an empty top_k"),
    "null label": (changed("label", None), "label is null in 1 rows"),
    "row of another shard": (changed("shard", "file:///x.tar"), "rows of other shards than file://"),
    "duplicate index": (changed("index", 4), "index 4 stands twice"),
    "index of an error row": (changed("index", BROKEN_AT), f"index {BROKEN_AT} stands twice"),
    "index beyond": (changed("index", 99), "index 99 is none of the 20 listed"),
    "negative index": (changed("index", -1), "index -1 is none of the 20 listed"),
    "missing row": (changed_rows(lambda rows: rows.slice(1)), "18 rows and 1 error rows, its footer says 19 and 1"),
    "missing index": (
        changed_rows(lambda rows: rows.slice(2), predicted=17, listed=18),
        "index 0 is missing, and 1 more",
    ),
    "wrong footer count": (
        changed_rows(lambda rows: rows, predicted=20),
        "19 rows and 1 error rows, its footer says 20",
    ),
    "counts that don't add up": (
        changed_rows(lambda rows: rows, listed=21),
        "21 samples listed, but 19 predicted and 1",
    ),
    "another model": (changed_rows(lambda rows: rows, model_fingerprint="cafe"), "model cafe, but the dataset is"),
    "not a number": (planted_embedding(np.nan), "embeddings that are not finite"),
    "infinite": (planted_embedding(-np.inf), "embeddings that are not finite"),
    "flipped bit": (flipped_bit, ".parquet is damaged or not ours: "),
    "part of another shard": (part_of_another_shard, "it is the part of another shard, file://"),
    "labels only": (
        changed_rows(lambda rows: rows.drop_columns(["embedding"])),
        "damaged or not ours: its columns are",
    ),
    "other type of embeddings": (
        changed_rows(lambda rows: with_embeddings(rows, embedding_values(rows).astype(np.float32))),
        "damaged or not ours: its columns are",
    ),
    "narrower embeddings": (narrower_embeddings, "its embeddings have 32 numbers, those of other shards 64"),
    "top_k in disorder": (
        edited_top_k(lambda top: [top[0], *reversed(top[1:])]),
        "rows whose top_k is not in descending order",
    ),
    "top_k too short": (edited_top_k(lambda top: top[:2]), "rows that do not have 5 entries in their top_k"),
    "label in top_k": (
        edited_top_k(lambda top: [*top[:4], top[4] | {"label": "cat"}]),
        "labels that are not the names of their class_id",
    ),
    "class in top_k": (
        edited_top_k(lambda top: [*top[:4], top[4] | {"class_id": 10}]),
        "class ids that are none of the 10 classes",
    ),
    "score in top_k": (
        edited_top_k(lambda top: [*top[:4], top[4] | {"score": float("nan")}]),
        "scores that are not between 0 and 1",
    ),
    "column missing": (changed_rows(lambda rows: rows.drop_columns(["width"])), "damaged or not ours: its columns are"),
    "list of any size": (
        changed_rows(
            lambda rows: rows.set_column(
                rows.schema.get_field_index("embedding"), "embedding", rows["embedding"].cast(pa.list_(pa.float16()))
            )
        ),
        "embedding is list",
    ),
    "truncated": (cut, "its mark vouches for other versions than those that stand there"),
    "truncated but vouched for": (cut_but_vouched_for, ".parquet is damaged or not ours: "),
    "garbled pages": (garbled, ".parquet is damaged or not ours: "),
    "empty file": (no_parquet_at_all, ".parquet is damaged or not ours: "),
    "somebody else's Parquet": (parquet_of_somebody_else, ".parquet is damaged or not ours: "),
}
