"""Results as text, for people; `--json` has all of them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Group, RenderableType
from rich.table import Column, Table
from rich.text import Text

from pipeline.report import counted

if TYPE_CHECKING:
    from pipeline.error_rows import DeadLetters
    from pipeline.pruning import Pruned

SHOWN_GONE, SHOWN_SHARDS = 10, 20


def gone_shown(ids: Sequence[str]) -> str:
    lines = [f"{counted(len(ids), 'shard')} of the output no longer in the input", *ids[:SHOWN_GONE]]
    return "\n".join([*lines, *([f"and {len(ids) - SHOWN_GONE} more"] if len(ids) > SHOWN_GONE else [])])


def errors_shown(found: DeadLetters) -> RenderableType:
    more = len(found.shards) - SHOWN_SHARDS
    lines = [f" and {counted(more, 'more shard')}"] if more > 0 else []
    if (done := found.export) is not None:
        lines.append(f"{counted(done.files, 'file')} written to {done.folder}")
        if done.without_bytes:
            lines.append(f"{counted(done.without_bytes, 'row')} of stage read: there are no bytes to export")
        if done.left_out:
            lines.append(f"{counted(done.left_out, 'row')} left out by --limit")
        lines.extend(done.problems)
    lines.extend(found.problems)
    if not found.rows:
        return Text("\n".join(["no error rows", *lines]))
    shards = (
        (shard.rows, shard.shard, ", ".join(f"{name} {rows}" for name, rows in shard.classes.items()))
        for shard in found.shards[:SHOWN_SHARDS]
    )
    classes = ((one["rows"], one["stage"], one["error"]) for one in found.classes)
    tables = (_table(["rows", "stage", "error"], classes), Text(), _table(["rows", "shard", "classes"], shards))
    return Group(*tables, *map(Text, lines))


def pruned_shown(found: Pruned) -> RenderableType:
    if not found.gone:
        return Text("nothing to prune: every shard of the dataset is in the input")
    rows = [
        (gone.id, gone.shard, gone.predicted, gone.errors, "removed" if gone.removed else gone.kept or "to be removed")
        for gone in found.gone
    ]
    end = f"{counted(len(found.removed), 'shard')} removed" if found.removed else "nothing was removed"
    if found.removable:
        end += f"; --yes removes {counted(len(found.removable), 'shard')}"
    return Group(_table(["id", "shard", "rows", "errors", ""], rows), Text(end))


def rows_shown(rows: Any) -> Table:
    """The samples of a preview, a line each."""
    shown = [name for name in ("key", "label", "score", "width", "height", "error") if name in rows.column_names]
    return _table(shown, ([_cell(value) for value in row.values()] for row in rows.select(shown).to_pylist()))


def _table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> Table:
    """Columns of text. Nothing is cut off, and brackets in a value are no markup."""
    table = Table(*(Column(name, overflow="fold") for name in header), box=None)
    for row in rows:
        table.add_row(*(Text(str(value)) for value in row))
    return table


def _cell(value: Any) -> str:
    return f"{value:.3f}" if isinstance(value, float) else "" if value is None else str(value)
