"""One list of error classes: the documentation, the code that raises them and what a user may choose agree with it."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import pipeline
from pipeline.error_classes import ERROR_CLASSES, choose_classes
from pipeline.errors import ConfigError

ROOT = Path(__file__).parents[1]
RAISERS = {"Reject": 1, "broken": 0, "rejected": 0}  # which argument is the class


def raised() -> Iterator[str]:
    """Every class that is spelled out where an error row is made."""
    for path in Path(pipeline.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in RAISERS:
                argument = node.args[RAISERS[node.func.id]]
                if isinstance(argument, ast.Constant):
                    yield argument.value


def test_the_documentation_has_each_class_and_no_other():
    documented = re.findall(r"^\| `(\w+)` \|", (ROOT / "docs/errors.md").read_text(), re.MULTILINE)
    assert set(documented) == set(ERROR_CLASSES)


def test_what_is_raised_is_in_the_list_and_each_of_the_list_is_raised():
    assert set(raised()) == set(ERROR_CLASSES)


def test_classes_are_chosen_by_name_several_at_once_or_all():
    assert choose_classes(()) == frozenset()
    assert choose_classes("empty") == {"empty"}
    assert choose_classes(["empty,truncated", " corrupt ,"]) == {"empty", "truncated", "corrupt"}
    assert choose_classes(["empty", "all"]) == set(ERROR_CLASSES)


def test_an_unknown_class_is_refused_with_the_nearest():
    with pytest.raises(ConfigError, match=r"no error class 'trunkated'; did you mean truncated\?"):
        choose_classes(["empty,trunkated"])
    with pytest.raises(ConfigError, match=r"no error class 'xyz'; there are truncated_shard, .*, and `all`\."):
        choose_classes("xyz")
