"""Custom networks: found without importing them, shipped, and imported from what was shipped."""

from __future__ import annotations

import importlib
import pickle
import shutil
import site
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline.errors import ConfigError
from pipeline.model.source import Source, is_closed, load_callable, locate
from tests.model.helpers import output_of, python


@pytest.fixture(autouse=True)
def _own_imports(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What a test puts on `sys.path` and imports is gone after it."""
    before = set(sys.modules)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield
    for name in set(sys.modules) - before:
        del sys.modules[name]


def write(folder: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(textwrap.dedent(text))
    return folder


PACKAGE = {
    "nets/__init__.py": "",
    "nets/small/__init__.py": "",
    "nets/small/resnet.py": "from ..blocks import width\ndef build():\n    return width()\n",
    "nets/blocks.py": "from nets import sizes\ndef width():\n    return sizes.WIDTH\n",
    "nets/sizes.py": "WIDTH = 7\n",
    "nets/training.py": "EPOCHS = 3\n",
    "other.py": "",
}


def test_a_package_travels_whole_and_its_relative_imports_work(tmp_path: Path):
    source = locate("nets.small.resnet:build", write(tmp_path / "here", PACKAGE))
    assert [path for path, _ in source.files] == sorted(path for path in PACKAGE if path.startswith("nets/"))
    shutil.rmtree(tmp_path / "here")
    assert load_callable(pickle.loads(pickle.dumps(source)))() == 7
    assert "imported" not in sys.modules


def test_a_file_travels_with_its_neighbours(tmp_path: Path):
    files = {"net.py": "import blocks_of_net\nbuild = blocks_of_net.make\n", "blocks_of_net.py": "make = dict\n"}
    source = locate("net:build", write(tmp_path / "here", files | {"sub/far.py": "", ".hidden.py": ""}))
    assert [path for path, _ in source.files] == ["blocks_of_net.py", "net.py"]
    shutil.rmtree(tmp_path / "here")
    assert load_callable(source) is dict


def test_a_folder_without_init_is_a_package_too(tmp_path: Path):
    write(tmp_path / "here", {"networks/net.py": "from .parts import build\n", "networks/parts.py": "build = dict\n"})
    source = locate("networks.net:build", tmp_path / "here")
    shutil.rmtree(tmp_path / "here")
    assert load_callable(source) is dict


def test_nothing_is_imported_to_find_it(tmp_path: Path):
    explodes = "raise RuntimeError('imported')\n"
    write(tmp_path, {"loud/__init__.py": explodes, "loud/net.py": explodes + "def build(): ...\n"})
    assert locate("loud.net:build", tmp_path).callable == "build"


def test_the_config_goes_before_the_current_directory_and_that_before_the_path(tmp_path: Path, monkeypatch):
    for place in ("config", "cwd", "path"):
        write(tmp_path / place, {"net.py": f"def build():\n    return {place!r}\n"})
    monkeypatch.chdir(tmp_path / "cwd")
    monkeypatch.syspath_prepend(tmp_path / "path")
    for place in ("config", "cwd", "path"):
        source = locate("net:build", tmp_path / "config")
        assert source.found_in == str(tmp_path / place)
        assert load_callable(source)() == place  # though the module of that name was another one a moment ago
        (tmp_path / place / "net.py").unlink()


def test_a_module_that_is_nowhere_is_refused_with_the_places_searched(tmp_path: Path, monkeypatch):
    write(tmp_path, {"nets/__init__.py": ""})
    monkeypatch.chdir(tmp_path)
    for name in ("nowhere:build", "nets.nowhere:build", "nets.a.b.c:build"):
        with pytest.raises(ConfigError, match=rf"no module {name[:-6]}\. Put it .* Searched: {tmp_path}, .*python3"):
            locate(name, tmp_path)


def test_a_callable_that_is_not_there_is_refused_with_those_that_are(tmp_path: Path):
    text = """\
        import os
        from m import a as b
        class Net: ...
        if True:
            def build(): ...
        def _hidden():
            inner = 1
    """
    write(tmp_path, {"net.py": text})
    with pytest.raises(ConfigError, match=r"net.py defines no inner. It defines: Net, b, build, os\."):
        locate("net:inner", tmp_path)
    for name in ("Net", "b", "build", "Net.make"):
        assert locate(f"net:{name}", tmp_path).callable == name
    write(tmp_path, {"star.py": "from m import *\n"})
    assert locate("star:anything", tmp_path).callable == "anything"


@pytest.mark.parametrize("name", ["net:", ":build", "a b:c", "net:build:x", "../net:build"])
def test_what_is_no_name_is_refused(name: str):
    with pytest.raises(ConfigError, match=r"must read package.module:callable"):
        locate(name, None)


def test_a_file_that_is_no_python_is_refused(tmp_path: Path):
    write(tmp_path, {"net.py": "def build(:\n"})
    with pytest.raises(ConfigError, match=r"net.py is not Python that this version reads"):
        locate("net:build", tmp_path)


def test_installed_modules_and_our_own_do_not_travel():
    assert locate("torchvision.models.resnet:resnet18", None).files == ()
    assert locate("http.server:HTTPServer", None).files == ()
    own = locate("pipeline.examples.network:digits_resnet20", None)
    assert own.files == ()
    assert own.is_own


def test_a_package_named_like_ours_does_not_hide_ours(tmp_path: Path):
    write(tmp_path, {"pipeline/__init__.py": "", "pipeline/net.py": "def build(): ...\n"})
    with pytest.raises(ConfigError, match=r"no module pipeline\.net"):
        locate("pipeline.net:build", tmp_path)


def test_the_meaning_follows_what_is_imported_and_nothing_else(tmp_path: Path):
    def meaning() -> str:
        return locate("nets.small.resnet:build", tmp_path).meaning

    first = write(tmp_path, PACKAGE) and meaning()
    for path in ("nets/training.py", "other.py"):
        write(tmp_path, {path: "EPOCHS = 4\n"})
        assert meaning() == first
    seen = {first}
    for path in ("nets/sizes.py", "nets/blocks.py", "nets/small/resnet.py", "nets/__init__.py"):
        write(tmp_path, {path: PACKAGE[path] + "# changed\n"})
        seen.add(meaning())
    assert len(seen) == 5


def test_an_installed_package_counts_by_what_is_imported_of_it(tmp_path: Path, monkeypatch):
    def found(**changed: str) -> Source:
        text = {"resnet": "import numpy\ndef resnet20(): ...\n", "blocks": "", **changed}
        package = {f"mynets/{name}.py": content for name, content in text.items()}
        write(tmp_path, package | {"mynets/__init__.py": "from .resnet import resnet20\n"})
        return locate("mynets:resnet20", None)

    roots = site.getsitepackages()
    monkeypatch.setattr(site, "getsitepackages", lambda: [str(tmp_path), *roots])
    monkeypatch.syspath_prepend(tmp_path)
    first = found()
    assert first.files == ()
    assert found(blocks="CHANGED = 1\n").meaning == first.meaning
    changed = found(resnet="import os\ndef resnet20():\n    return os.environ['DEPTH']\n")
    assert changed.meaning != first.meaning
    assert not is_closed(changed)
    found()
    assert is_closed(first)
    write(tmp_path, {"alone.py": "def build(): ...\n"})
    alone = locate("alone:build", None)
    assert alone.files == ()
    assert is_closed(alone)


def test_a_changed_file_is_imported_anew_in_the_same_process(tmp_path: Path):
    for width in (7, 8):
        write(tmp_path, PACKAGE | {"nets/sizes.py": f"WIDTH = {width}\n"})
        assert load_callable(locate("nets.small.resnet:build", tmp_path))() == width


def test_what_does_not_travel_is_named_when_it_is_missing(tmp_path: Path):
    source = locate("net:build", write(tmp_path, {"net.py": "import not_installed_here\ndef build(): ...\n"}))
    with pytest.raises(ConfigError, match=r"cannot import net:build .*No module named 'not_installed_here'"):
        load_callable(source)
    source = locate("net:build", write(tmp_path, {"net.py": "build = 3\n"}))
    with pytest.raises(ConfigError, match=r"net:build is a int, not a function"):
        load_callable(source)


def test_another_process_imports_what_was_shipped(tmp_path: Path):
    source = locate("nets.small.resnet:build", write(tmp_path / "here", PACKAGE))
    shutil.rmtree(tmp_path / "here")
    (tmp_path / "source").write_bytes(pickle.dumps(source))
    code = """
import pickle, sys
from pipeline.model.source import load_callable
print(load_callable(pickle.load(open(sys.argv[1], "rb")))())
"""
    both = [python(code, tmp_path / "source") for _ in range(2)]
    assert [output_of(process) for process in both] == ["7", "7"]


def test_the_name_of_an_installed_module_is_refused_where_that_is_in_use(tmp_path: Path):
    importlib.import_module("wave")  # of the standard library
    source = locate("wave:build", write(tmp_path, {"wave.py": "def build(): ...\n"}))
    with pytest.raises(ConfigError, match=r"wave is also the name of an installed module, .*/wave.py.*Rename yours"):
        load_callable(source)


def test_what_a_module_draws_as_it_is_imported_is_the_same_in_every_process(custom, tmp_path: Path):
    spec = custom("""
        DRAWN = torch.randn(6)
        class Net(Base):
            def forward(self, x):
                return self.fc(self.features(x) * DRAWN)
    """)
    code = """
import pickle, sys
from pathlib import Path
from tests.model.helpers import computed
print(computed(pickle.loads(Path(sys.argv[1]).read_bytes()))[1].tobytes().hex())
"""
    (tmp_path / "spec").write_bytes(pickle.dumps(spec))
    one, other = (python(code, tmp_path / "spec") for _ in range(2))
    assert output_of(one) == output_of(other)
