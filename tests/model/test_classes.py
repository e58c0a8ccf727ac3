from __future__ import annotations

import json
from pathlib import Path

import pytest

from pipeline.config import Storage
from pipeline.errors import ConfigError
from pipeline.model.classes import class_names


def names(given, directory: Path | None = None):
    return class_names(given, directory, Storage())


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("c.txt", "great shark\ncoucal\n"),
        ("c.txt", "\ufeffgreat shark\r\ncoucal\r\n\r\n"),
        ("c.json", json.dumps(["great shark", "coucal"])),
        ("c.json", json.dumps({"1": "coucal", "0": "great shark"})),
        ("c.JSON", json.dumps(["great shark", "coucal"], indent=1)),
        ("c.json", json.dumps({"coucal": 1, "great shark": 0})),
        ("config.json", json.dumps({"model_type": "resnet", "id2label": {"0": "great shark", "1": "coucal"}})),
        ("c.json", json.dumps({"0": ["n01484850", "great shark"], "1": ["n02018795", "coucal"]})),
    ],
)
def test_every_form_of_a_names_file(tmp_path: Path, file: str, content: str):
    (tmp_path / file).write_text(content, encoding="utf-8", newline="")
    assert names(str(tmp_path / file)) == ("great shark", "coucal")


def test_a_path_that_cannot_be_looked_for_is_a_sentence():
    with pytest.raises(ConfigError, match=r"model.classes: cannot look for .*name too long"):
        names(", ".join(["cat", "dog"] * 50))


def test_a_list_is_taken_as_it_is():
    assert names(["crane", "crane"]) == ("crane", "crane")  # ImageNet has two of them
    assert names(None) is None


def test_ids_order_names_as_numbers(tmp_path: Path):
    (tmp_path / "c.json").write_text(json.dumps({str(i): f"name {i}" for i in sorted(range(12), key=str)}))
    assert names(str(tmp_path / "c.json")) == tuple(f"name {i}" for i in range(12))


def test_a_relative_path_starts_at_the_config_then_at_the_current_directory(tmp_path, monkeypatch):
    for folder in ("config", "cwd"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "c.txt").write_text(folder)
    monkeypatch.chdir(tmp_path / "cwd")
    assert names("c.txt", tmp_path / "config") == ("config",)
    (tmp_path / "config" / "c.txt").unlink()
    assert names("c.txt", tmp_path / "config") == ("cwd",)
    with pytest.raises(ConfigError, match=rf"model.classes: there is no file {tmp_path}/config/d.txt or .*/cwd/d.txt"):
        names("d.txt", tmp_path / "config")


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("c.txt", "a\n\nb\n", "line 2 of .* is empty"),
        ("c.txt", "\n", "holds no names"),
        ("c.json", "[1", "is not JSON"),
        ("c.json", '{"a": 0, "b": 2}', "must be the class ids 0 to 1, as text, or its values, as numbers"),
        ("c.json", '{"a": 0, "b": true}', "must be the class ids 0 to 1"),
        ("c.json", r'["a", "\ud83d"]', r"the name of class 1 .* is '\\ud83d', not text"),
        ("c.json", '["a", 3]', "the name of class 1 .* is 3, not text"),
        ("c.json", '{"1": "a"}', "must be the class ids 0 to 0"),
        ("c.json", '"a"', "must hold a list of names or a mapping"),
    ],
)
def test_files_that_would_shift_or_lose_names_are_refused(tmp_path, file, content, message):
    (tmp_path / file).write_text(content)
    with pytest.raises(ConfigError, match=message):
        names(str(tmp_path / file))


def test_a_url_is_read_through_the_store(tmp_path, serve):
    (tmp_path / "c.txt").write_text("a\nb")
    assert names(f"{serve(tmp_path).url}/c.txt") == ("a", "b")
