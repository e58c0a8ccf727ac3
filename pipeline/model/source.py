"""Custom networks, `package.module:callable`: found without importing them, and carried to the workers.

The driver must not import a network's module, since that imports torch. So the module is looked up on the path
and its text is read. Its Python files travel to the workers: the whole top-level package, or for a single file
that file and its neighbours. What is installed or is part of this program is expected on every node instead, though
the driver's files of an installed package tell which network it is.
"""

from __future__ import annotations

import ast
import hashlib
import importlib
import site
import sys
import sysconfig
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache, reduce
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path, PurePosixPath
from types import ModuleType
from typing import Any

import pipeline
from pipeline.config import digest
from pipeline.errors import ConfigError, PipelineError, clean
from pipeline.model.cache import cache_directory, cache_path, lock, new_folder

OWN_FOLDER = Path(pipeline.__file__).parent.parent
# Of these a network counts by its one file: their releases may not change what the same weights mean.
BY_FILE = {pipeline.__name__, "torch", "torchvision"}

# What a network's code may read, apart from its own files and the packages that it imports by name.
OPAQUE = {"__import__", "environ", "eval", "exec", "getenv", "importlib", "open", "read_bytes", "read_text"}
OPAQUE |= {"from_pretrained", "fromfile", "genfromtxt", "load", "load_file", "loadtxt", "memmap", "read_csv"}
OPAQUE |= {"load_model", "load_state_dict_from_url", "safe_open", "urlopen", "urlretrieve", "get_data", "configparser"}
OPAQUE |= {"File", "ZipFile", "argv", "imread", "loadmat", "read_json", "read_parquet", "read_pickle"}


@dataclass(frozen=True)
class Source:
    """A custom network's code. `files` (relative path, content) is empty where the module is installed.

    `meaning` is the sha256 of the module's text and of the modules of its package (of a single file: of its folder, if
    that is shipped) that it imports, directly or not.
    """

    module: str
    callable: str
    found_in: str  # the folder on the path
    files: tuple[tuple[str, bytes], ...]
    meaning: str

    @property
    def is_own(self) -> bool:
        """Part of this program."""
        return self.module.partition(".")[0] == pipeline.__name__


def locate(name: str, directory: Path | None) -> Source:
    """The code behind `package.module:callable`, looked for beside the config, in the cwd, then on `sys.path`.

    Raises ConfigError that says where was searched if there is no such module, or what the module does define.
    """
    module, _, attribute = name.partition(":")
    if not all(part.isidentifier() for part in [*module.split("."), *attribute.split(".")]):
        raise ConfigError(f"model.name: {name!r} must read package.module:callable.")
    path = _find(module, directory)
    try:
        text = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"model.name: cannot read {path}: {clean(error)}.") from error
    _check_defines(text, path, attribute.split(".")[0])
    folder = _folder(path, module)
    files = _files(path, module)
    start = path.relative_to(folder).as_posix()
    meaning = _meaning({**files, start: text}, start)
    shipped = {} if _is_installed(path) else files
    return Source(module, attribute, str(folder), tuple(sorted(shipped.items())), meaning)


def load_callable(source: Source) -> Callable[..., Any]:
    """Import a custom network's module on this node, from the shipped files if there are any."""
    name = f"{source.module}:{source.callable}"
    root = _install(source) if source.files else None
    try:
        module = importlib.import_module(source.module)
        if root is not None and not _origin(module).is_relative_to(root):
            raise ConfigError(
                f"model.name: {source.module} is also the name of an installed module, {_origin(module)}, which this"
                " process uses already. Rename yours."
            )
        found = reduce(getattr, source.callable.split("."), module)
    except PipelineError:
        raise
    except SystemExit as error:
        raise ConfigError(
            f"model.name: cannot import {name}: its module ends the process as it is imported (argparse at module"
            " level?). Put that under if __name__ == '__main__'."
        ) from error
    except Exception as error:  # whatever a module does as it is imported
        raise ConfigError(
            f"model.name: cannot import {name} on this node: {clean(error)}. Only the .py files of its own package"
            " (or of its folder, for a single file) travel; install what else it needs on every node."
        ) from error
    if not callable(found):
        raise ConfigError(f"model.name: {name} is a {type(found).__name__}, not a function or a class.")
    return found


@lru_cache(maxsize=8)  # a large package takes a second
def is_closed(source: Source) -> bool:
    """Whether the network's code depends on nothing but its own files, and packages that are installed here.

    Else, as for an import from a folder on the path, nobody notices when what it builds becomes another.
    """
    if source.module.partition(".")[0] in BY_FILE and not source.files:
        return True
    files = dict(source.files) or _files(_find(source.module, None), source.module)
    stem = source.module.replace(".", "/")
    start = next((path for path in (f"{stem}.py", f"{stem}/__init__.py") if path in files), None)
    if start is None:
        return False
    imported: set[str] = set()
    for path in _closure(files, start):
        tree = _parse(files[path], path)
        nodes = list(ast.walk(tree))
        used = {node.id for node in nodes if isinstance(node, ast.Name)}
        used |= {node.attr for node in nodes if isinstance(node, ast.Attribute)}
        used |= {node.name.rpartition(".")[2] for node in nodes if isinstance(node, ast.alias)}
        if used & OPAQUE:  # as some file of a large package's is, early
            return False
        imported |= {name.partition(".")[0] for name in _imported_names(tree, path)}
    return not imported & OPAQUE and all(_is_fixed(name, files) for name in imported - {""})


def _is_fixed(top: str, files: Mapping[str, bytes]) -> bool:
    """Whether a top-level module is shipped, Python's own, or installed here."""
    if top in sys.stdlib_module_names or any(PurePosixPath(path).parts[0] in (top, f"{top}.py") for path in files):
        return True
    found = PathFinder.find_spec(top)
    return found is not None and found.origin is not None and _is_installed(Path(found.origin))


def installed_packages() -> list[str]:
    """Every installed package with its version, as the folders of their metadata are named."""
    roots = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    roots |= {*site.getsitepackages(), site.getusersitepackages()}
    return sorted(path.name for root in roots for path in Path(root).glob("*-info"))


def _install(source: Source) -> Path:
    """Unpack the shipped files once per node and put them first on `sys.path`."""
    key = digest([(path, content.hex()) for path, content in source.files], 32)
    root = cache_directory("source") / key
    if not root.is_dir():
        with lock(str(root)):
            if not root.is_dir():
                with new_folder(root) as folder:
                    for path, content in source.files:
                        (folder / path).parent.mkdir(parents=True, exist_ok=True)
                        (folder / path).write_bytes(content)
    if sys.path[0] != str(root):
        sys.path.insert(0, str(root))
    importlib.invalidate_caches()
    _forget_others(source, root)
    return root


def _forget_others(source: Source, root: Path) -> None:
    """Drop modules of the same names that this process (a notebook, a test) has imported from another version."""
    names = {PurePosixPath(path).parts[0].removesuffix(".py") for path, _ in source.files}
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] in names:
            origin = _origin(module)
            if not origin.is_relative_to(root) and not _is_installed(origin):
                del sys.modules[name]


def _origin(module: ModuleType) -> Path:
    """Where a module's text lies; for a package without `__init__` its folder."""
    folders = list(getattr(module, "__path__", []))
    return Path(getattr(module, "__file__", None) or (folders[0] if folders else sys.prefix))


def _find(module: str, directory: Path | None) -> Path:
    """The file of a module, found step by step from its top-level package; nothing is imported."""
    top, *rest = module.split(".")
    beside = [str(folder) for folder in (directory, Path.cwd()) if folder is not None]
    shipped = cache_path("source")  # copies that this process imported earlier
    path = [entry for entry in sys.path if not Path(entry).is_relative_to(shipped)]
    places = [str(OWN_FOLDER)] if top == pipeline.__name__ else [*beside, *path]
    found = PathFinder.find_spec(top, places) or _find_editable(top)
    for part in rest:
        folders = list(found.submodule_search_locations or []) if found else []
        found = PathFinder.find_spec(part, folders) if folders else None
    if found is None or found.origin is None or not Path(found.origin).is_file():
        raise ConfigError(
            f"model.name: there is no module {module}. Put it beside the config or into the current folder, or install"
            f" it on every node. Searched: {', '.join(dict.fromkeys(filter(None, places)))}."
        )
    return Path(found.origin).absolute()


def _find_editable(top: str) -> ModuleSpec | None:
    """Editable installs may put a finder of their own beside the path."""
    others = [finder for finder in sys.meta_path if finder is not PathFinder]
    return next(filter(None, (finder.find_spec(top, None) for finder in others)), None)


def _is_installed(path: Path) -> bool:
    roots = [sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")]
    roots += [*site.getsitepackages(), site.getusersitepackages(), str(OWN_FOLDER / pipeline.__name__)]
    return any(path.is_relative_to(root) for root in roots)


def _folder(path: Path, module: str) -> Path:
    """The folder on the path that a module's file was found in."""
    return path.parents[len(module.split(".")) - (path.name != "__init__.py")]


def _files(path: Path, module: str) -> dict[str, bytes]:
    """Relative path → content: the top-level package's .py files, or a single-file module's folder's. That of what is
    installed is everybody's."""
    folder, name = _folder(path, module), module.partition(".")[0]
    if _is_installed(path) and (name in BY_FILE or folder == path.parent):
        found: Iterable[Path] = [path]
    else:
        found = (folder / name).rglob("*.py") if folder != path.parent else folder.glob("*.py")
    relative = [file.relative_to(folder) for file in found]
    contents = {file: _content(folder / file) for file in relative if not any(p.startswith(".") for p in file.parts)}
    return {file.as_posix(): content for file, content in contents.items() if content is not None}


def _content(path: Path) -> bytes | None:
    """None for what is no file, and for what this user may not read, a neighbour's script: a network that imports it
    says so then."""
    with suppress(PermissionError):
        return path.read_bytes() if path.is_file() else None
    return None


def _check_defines(text: bytes, path: Path, name: str) -> None:
    """ConfigError unless the module binds `name` at its top level (a star import may bind anything)."""
    bound = set(_bound_names(_parse(text, path).body))
    if not bound & {name, "*", "__getattr__"}:
        public = sorted(found for found in bound if not found.startswith("_"))
        raise ConfigError(f"model.name: {path} defines no {name}. It defines: {', '.join(public) or 'nothing'}.")


def _bound_names(body: list[ast.stmt]) -> Iterator[str]:
    for statement in body:
        if isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield statement.name
            continue
        for node in ast.walk(statement):
            if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                yield node.id
            elif isinstance(node, ast.FunctionDef | ast.ClassDef):
                yield node.name
            elif isinstance(node, ast.alias):
                yield (node.asname or node.name).partition(".")[0]


def _parse(text: bytes, path: Path | str) -> ast.Module:
    try:
        return ast.parse(text)
    except (SyntaxError, ValueError) as error:
        raise ConfigError(f"model.name: {path} is not Python that this version reads: {clean(error)}.") from error


def _meaning(files: Mapping[str, bytes], start: str) -> str:
    """The sha256 over a module and whatever it imports of `files`."""
    return digest(_closure(files, start), 64)


def _closure(files: Mapping[str, bytes], start: str) -> dict[str, str]:
    """A module and whatever it imports of `files`, directly or through others, with their sha256."""
    seen: dict[str, str] = {}
    todo = [start]
    while todo:
        path = todo.pop()
        if path not in seen:
            seen[path] = hashlib.sha256(files[path]).hexdigest()
            todo.extend(_imported(files, path))
    return seen


def _imported(files: Mapping[str, bytes], path: str) -> Iterator[str]:
    """Those of `files` that the module at `path` imports; a package's `__init__` is imported with its modules."""
    for name in _imported_names(_parse(files[path], path), path):
        parts = name.split(".")
        for length in range(1, len(parts) + 1):
            stem = "/".join(parts[:length])
            yield from (file for file in (f"{stem}.py", f"{stem}/__init__.py") if file in files)


def _imported_names(tree: ast.Module, path: str) -> Iterator[str]:
    package = PurePosixPath(path).parent.parts
    yield ".".join(package)
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else ()
            base = ".".join([*above, *([node.module] if node.module else [])])
            yield from (f"{base}.{alias.name}".strip(".") for alias in node.names)
