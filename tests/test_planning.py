"""What there is to do; and that groups of loose files, done in the order of the plan, never hold a file twice."""

from __future__ import annotations

import io
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import pipeline
from pipeline.backends import FileInfo
from pipeline.config import JobConfig, make_config
from pipeline.errors import ConfigError, FatalError
from pipeline.examples.digits import encode_png, load_digits_images
from pipeline.examples.tars import write_tar
from pipeline.inputs.shards import Shard, current_fingerprint, shard_id
from pipeline.outputs.commit import CommitContext, CommitTask, commit_shard
from pipeline.outputs.dataset import Dataset
from pipeline.outputs.ledger import (
    Mark,
    Standing,
    commit_hash,
)
from pipeline.outputs.schema import Footer
from pipeline.planning import Plan, Task, Vanished, compare, make_plan, refuse_a_selection, vanished_groups
from pipeline.storage import Store
from tests.support.datasets import commit_all as commit_job
from tests.support.jobs import digits_config
from tests.support.pieces import BOTH, IDENTITY, new_dataset

ROOT = "file:///in"


def tar(name: str, fingerprint: str, size: int = 10) -> Shard:
    url = f"{ROOT}/{name}"
    return Shard(url, shard_id(url), "webdataset", fingerprint, size)


def stands(fingerprint: str) -> Standing:
    return Standing((Mark("?", fingerprint, commit_hash("part", None)),), "part")


def test_new_changed_done_and_gone():
    new, changed, done = tar("new.tar", "1"), tar("changed.tar", "2", size=7), tar("done.tar", "3")
    unfinished = tar("unfinished.tar", "4")
    standing = {
        changed.id: stands("1"),
        done.id: stands("3"),
        unfinished.id: Standing((), "a part without a mark"),
        "gone": stands("5"),
    }
    plan = compare([new, changed, done, unfinished], standing)
    assert plan.tasks == [Task(new), Task(changed), Task(unfinished)]
    assert plan.done == [done.url]
    assert plan.changed == [changed.url, unfinished.url]
    assert plan.gone == ["gone"]
    assert plan.num_bytes == 27


def test_what_is_done_is_redone_for_its_error_rows():
    done, other, new, changed = (
        tar("done.tar", "1"),
        tar("other.tar", "2"),
        tar("new.tar", "3"),
        tar("changed.tar", "4"),
    )
    standing = {done.id: stands("1"), other.id: stands("2"), changed.id: stands("before")}
    plan = compare([done, other, new, changed], standing, redo={done.id, new.id, changed.id})
    mark = standing[done.id].valid_mark
    assert mark is not None
    assert plan.tasks == [Task(done, replaces=mark.commit), Task(new), Task(changed)]
    assert (plan.retried, plan.changed, plan.done) == ([done.url], [changed.url], [other.url])


def test_nothing_at_all():
    assert compare([], {}) == Plan([])


# --- Groups of loose files: the rules, one by one ---------------------------------------------------------------------


def group(begin: str, *paths: str, fingerprint: str = "now") -> Shard:
    url = f"{ROOT}#{begin}"
    members = tuple(FileInfo(f"{ROOT}/{path}", 1, "1") for path in paths)
    return Shard(url, shard_id(url), "files", fingerprint, len(paths), "", ROOT, members)


def ids(*begins: str) -> tuple[str, ...]:
    return tuple(shard_id(f"{ROOT}#{begin}") for begin in begins)


def tasks_of(
    listed: list[Shard], done: str = "", changed: str = "", vanished: tuple[str, ...] = ()
) -> dict[str, tuple[str | None, str]]:
    """The plan where groups stand, named by their first path, and vanished ones, as "bc": from path b to path c.
    First path to the first paths of `after` and of `retires`."""
    standing = {name: stands("now") for name in ids(*done)} | {name: stands("before") for name in ids(*changed)}
    plan = compare(listed, standing, [Vanished(span[0], ROOT, span[0], span[-1]) for span in vanished])
    begins = [task.shard.url.rpartition("#")[2] for task in plan.tasks]
    return {
        begin: (None if task.after is None else begins[task.after], "".join(task.retires))
        for begin, task in zip(begins, plan.tasks, strict=True)
    }


def test_a_new_group_waits_for_the_one_it_takes_its_files_from():
    assert tasks_of([group("b", "b"), group("c", "c", "d")], changed="b") == {"b": (None, ""), "c": ("b", "")}


def test_several_new_groups_wait_for_the_same_one():
    listed = [group("b", "b"), group("c", "c"), group("d", "d")]
    assert tasks_of(listed, changed="b") == {"b": (None, ""), "c": ("b", ""), "d": ("b", "")}


def test_a_new_group_does_not_wait_for_one_that_is_only_redone():
    redone, new = group("b", "b"), group("c", "c")
    plan = compare([redone, new], {redone.id: stands("now")}, redo={redone.id})
    assert [task.shard.url for task in plan.tasks] == [redone.url, new.url]
    assert [task.after for task in plan.tasks] == [None, None]


def test_a_group_that_is_redone_retires_a_vanished_one_all_the_same():
    listed = group("b", "b", "d")
    plan = compare([listed], {listed.id: stands("now")}, [Vanished("c", ROOT, "c", "c")], redo={listed.id})
    (task,) = plan.tasks
    assert task.retires == ("c",)
    assert task.replaces is not None


def test_a_new_group_does_not_wait_where_the_other_has_shrunk_already():
    assert tasks_of([group("b", "b"), group("c", "c")], done="b") == {"c": (None, "")}


def test_a_group_that_stands_waits_for_nothing():
    assert tasks_of([group("b", "b"), group("c", "c")], changed="bc") == {"b": (None, ""), "c": (None, "")}


def test_a_done_group_between_shields_a_new_one():
    listed = [group("b", "b"), group("c", "c"), group("d", "d")]
    assert tasks_of(listed, changed="b", done="c") == {"b": (None, ""), "d": (None, "")}


def test_a_group_that_takes_the_files_of_a_vanished_one_retires_it():
    assert tasks_of([group("a", "a", "d", "e")], changed="a", vanished=("cd",)) == {"a": (None, "c")}


def test_both_groups_that_take_files_of_a_vanished_one_retire_it():
    listed = [group("a", "a", "c"), group("d", "d", "e")]
    assert tasks_of(listed, changed="a", vanished=("be",)) == {"a": (None, "b"), "d": ("a", "b")}


@pytest.mark.parametrize("span", ["aa", "df"])
def test_a_vanished_group_whose_files_are_gone_too_is_left_alone(span: str):
    assert tasks_of([group("b", "b", "c")], changed="b", vanished=(span,)) == {"b": (None, "")}


def test_a_vanished_group_whose_only_file_is_gone_is_retired_where_another_reaches_over_it():
    """Else it would stand between the two later on, and hide that the other reaches further."""
    assert tasks_of([group("", "b", "d")], vanished=("aa", "cc", "ee")) == {"": (None, "ac")}


def test_several_vanished_groups_are_retired_together():
    assert tasks_of([group("c", "c", "f")], vanished=("ag", "ab", "bc", "de", "ff", "gh")) == {"c": (None, "abdf")}


def test_a_part_and_an_errors_part_may_reach_to_two_paths():
    footers = [Footer(f"{ROOT}#b", "", "", "", 1, 1, 0, last_path=path) for path in "cf"]
    assert list(vanished_groups("b", footers, [ROOT, "file:///in2"])) == [
        Vanished("b", ROOT, "b", "c"),
        Vanished("b", ROOT, "b", "f"),
    ]
    plan = compare([group("d", "d")], {}, vanished_groups("b", footers, [ROOT]))
    assert plan.tasks[0].retires == ("b",)


def test_a_vanished_group_among_the_files_of_a_done_one_is_retired():
    """A rival that planned with an older listing has written it after our commit."""
    assert tasks_of([group("b", "b", "d")], done="b", vanished=("cc",)) == {"b": (None, "c")}
    assert tasks_of([group("b", "b", "d")], done="b", vanished=("ab",)) == {"b": (None, "a")}


def test_groups_of_another_root_are_none_of_ours():
    plan = compare([group("c", "c")], {}, [Vanished("b", "file:///other", "b", "d")])
    assert plan.tasks == [Task(group("c", "c"))]
    assert list(vanished_groups("b", [Footer("file:///other#b", "", "", "", 1, 1, 0)], [ROOT])) == []


def test_a_group_ends_with_its_last_path():
    assert Task(group("b", "b", "c/d")).last_path == "c/d"
    assert Task(tar("a.tar", "1")).last_path == ""
    not_utf8 = Task(group("b", "b", "c\udcff.jpg")).last_path
    assert not_utf8.encode()
    assert "c\udcff.jpg" < not_utf8 < "d"


# --- The plan of real folders ----------------------------------------------------------------------------------------


@pytest.fixture
def folders(tmp_path: Path) -> Path:
    """An input of two tars, a Parquet file and loose images, and an output with one of the tars in it."""
    for name in ("a.tar", "b.tar", "rows.parquet", *(f"photos/{n}.jpg" for n in range(20))):
        path = tmp_path / "in" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"not to be opened")
    return tmp_path


def config(folders: Path) -> JobConfig:
    return make_config(
        {"input": {"url": str(folders / "in"), "group_size": 5}, "output": {"url": str(folders / "labels")}}
    )


def commit_all(plan: Plan, folders: Path) -> Dataset:
    """Commit an empty part for every task of a plan."""
    dataset = new_dataset(folders / "labels")
    context = CommitContext(dataset, IDENTITY, BOTH, "eager")
    for number, task in enumerate(plan.tasks):
        shard = task.shard
        commit = CommitTask(number, shard.url, shard.id, shard.fingerprint, 0, (), task.last_path, task.retires)
        commit_shard(commit, context, pytest.fail, lambda shard=shard: current_fingerprint(shard, Store()))
    return dataset


def opened_from_here_on(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    opened: list[str] = []
    real_open, store_open = io.open, Store.open

    def counted_open(file: Any, *args: Any, **more: Any) -> Any:
        opened.append(str(file))
        return real_open(file, *args, **more)

    def counted_store_open(store: Store, url: str, *args: Any, **more: Any) -> Any:
        opened.append(url)
        return store_open(store, url, *args, **more)

    monkeypatch.setattr(io, "open", counted_open)
    monkeypatch.setattr(Store, "open", counted_store_open)
    return opened


def test_a_plan_opens_no_shard_and_no_part(folders: Path, monkeypatch: pytest.MonkeyPatch):
    everything = make_plan(config(folders))
    groups = [task.shard for task in everything.tasks if task.shard.kind == "files"]
    assert len(groups) > 1
    assert sum(len(group.members) for group in groups) == 20
    commit_all(everything, folders)
    (folders / "in/b.tar").write_bytes(b"changed")
    (folders / "in/c.tar").write_bytes(b"new")
    opened = opened_from_here_on(monkeypatch)
    plan = make_plan(config(folders))
    assert opened == []
    assert [task.shard.url.rpartition("/")[2] for task in plan.tasks] == ["b.tar", "c.tar"]
    assert [url.rpartition("/")[2] for url in plan.changed] == ["b.tar"]
    assert len(plan.done) == len(everything.tasks) - 1
    assert plan.gone == []
    (folders / "in/rows.parquet").unlink()
    plan = make_plan(config(folders))
    assert [name.rpartition("-")[0] for name in plan.gone] == ["rows.parquet"]
    # It might be a group whose files another one takes: its mark tells its URL.
    assert {Path(url).parent.name for url in opened} == {"_ledger"}


def test_a_group_that_vanished_is_found_by_its_mark_or_its_part(folders: Path):
    before = make_plan(config(folders))
    dataset = commit_all(before, folders)
    groups = [task.shard for task in before.tasks if task.shard.kind == "files"]
    last = max(groups, key=lambda group: group.url)
    assert len(last.members) > 1
    Path(last.members[0].url.removeprefix("file://")).unlink()
    for marks_too in (False, True):
        if marks_too:  # as where a run died in the middle of retiring it
            next(Path(dataset.url, "_ledger").glob(f"{last.id}.*")).unlink()
        (task,) = make_plan(config(folders)).tasks
        assert task.retires == (last.id,)
    commit_all(make_plan(config(folders)), folders)
    assert last.id not in dataset.standing()
    assert make_plan(config(folders)).tasks == []


@pytest.mark.parametrize("size", [5, 1000], ids=["many groups", "one group"])
@pytest.mark.parametrize("less", ["photos/1?.jpg", "photos/3.jpg", "photos/[0-8].jpg", "photos/9.jpg", "list.txt"])
def test_an_input_that_lists_less_of_a_folder_does_not_take_rows_away(folders: Path, less: str, size: int):
    """They would leave with the group that they are in, though the files are there."""
    (folders / "in/list.txt").write_text("photos/10.jpg\nphotos/12.jpg\n")

    def job(url: str) -> JobConfig:
        return make_config(digits_config(folders / "in" / url, folders / "labels", input={"group_size": size}))

    commit_job(job("photos/*"))
    refuse_a_selection(make_plan(job("photos/*")), job("photos/*"))
    smaller = make_plan(job(less))
    with pytest.raises(ConfigError, match=r"/photos/\d+.jpg is there but not in this input.* output.url of its own"):
        refuse_a_selection(smaller, job(less))
    listed = {member.url for task in smaller.tasks for member in task.shard.members}
    for path in (folders / "in/photos").iterdir():
        if f"file://{path}" not in listed:
            path.unlink()
    refuse_a_selection(make_plan(job(less)), job(less))


def test_a_damaged_part_of_a_group_is_done_again(folders: Path):
    job = make_config(digits_config(folders / "in/photos", folders / "labels"))
    commit_job(job)
    part = max(Path(folders / "labels/data").iterdir(), key=lambda path: path.stat().st_size)
    content = np.frombuffer(part.read_bytes(), np.uint8).copy()
    content[4:2000] = 0
    part.write_bytes(content.tobytes())
    assert [task.shard.id for task in make_plan(job).tasks] == [part.stem]


@pytest.mark.parametrize("below", ["", "/labels/2026"])
@pytest.mark.parametrize("verb", [pipeline.plan, pipeline.run, pipeline.prune])
def test_a_file_in_the_place_of_the_output_is_named_at_once(verb: Callable[[Any], Any], below: str, tmp_path: Path):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "link").symlink_to("/no/such/folder")
    for name, what in (("file", "a file, not a folder"), ("link", "a link to /no/such/folder, where no folder can be")):
        config = digits_config(tmp_path / "*.tar", f"{tmp_path}/{name}{below}")
        with pytest.raises(ConfigError, match=rf"^output.url: {tmp_path}/{name} is {what}.*\. Choose another place"):
            verb(config)


# --- Error rows to be tried again ------------------------------------------------------------------------------------


@pytest.fixture
def with_errors(tmp_path: Path) -> Path:
    """Four tars: two classes of errors, one of them, another one, none; the last of these has changed since."""
    contents = {"both": [HTML, b""], "html": [HTML], "empty": [b""], "good": [GOOD], "changed": [HTML]}
    (tmp_path / "in").mkdir()
    for name, images in contents.items():
        write_tar(tmp_path / f"in/{name}.tar", [(f"{n}.png", data) for n, data in enumerate([GOOD, *images])])
    commit_job(digits_config(tmp_path / "in", tmp_path / "labels"))
    write_tar(tmp_path / "in/changed.tar", [("new.png", HTML), ("other.png", GOOD)])
    return tmp_path


HTML, GOOD = b"<html>", encode_png(load_digits_images().images[0])


def test_only_errors_parts_of_done_shards_are_opened(with_errors: Path, monkeypatch: pytest.MonkeyPatch):
    job = make_config(digits_config(with_errors / "in", with_errors / "labels"))

    def planned(classes: list[str] | str) -> tuple[list[str], set[str]]:
        """The names of what is retried, and of the files that were opened."""
        opened.clear()
        plan = make_plan(job, classes)
        assert [url for url in plan.changed if url.endswith("/changed.tar")] == plan.changed
        assert len(plan.tasks) == 1 + len(plan.retried)
        names = {Path(url).parent.name + "/" + Path(url).name.partition(".tar")[0] for url in opened}
        return [Path(url).stem for url in plan.retried], names

    opened = opened_from_here_on(monkeypatch)
    theirs = {"errors/both", "errors/html", "errors/empty"}
    assert planned([]) == ([], set())
    assert planned("not_an_image") == (["both", "html"], theirs)
    assert planned(["empty", "too_large"]) == (["both", "empty"], theirs)
    assert planned(["too_large"]) == ([], theirs)
    assert planned("all") == (["both", "empty", "html"], set()), "an errors part is there: that is enough"
    with pytest.raises(ConfigError, match=r"no error class 'emty'; did you mean empty\?"):
        planned("emty")
    assert opened == [], "nothing is listed for a misspelt class"


def test_a_damaged_errors_part_is_named(with_errors: Path):
    path = next((with_errors / "labels/errors").glob("both*"))
    stat = path.stat()
    path.write_bytes(b"x" * stat.st_size)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    job = make_config(digits_config(with_errors / "in", with_errors / "labels"))
    with pytest.raises(FatalError, match=r"errors/both.* is damaged or not ours: .*Delete it and run again"):
        make_plan(job, "empty")
    path.unlink()
    assert "both" in [Path(task.shard.url).stem for task in make_plan(job).tasks]
