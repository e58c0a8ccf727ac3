"""Checkpoints that run code, unfold or are none: refused before anything of them is loaded."""

from __future__ import annotations

import collections
import datetime
import functools
import gzip
import io
import os
import pathlib
import pickle
import tarfile
import tracemalloc
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save

from pipeline.errors import WeightsError
from pipeline.model.spec import make_spec
from pipeline.model.weights import load_state_dict, parse
from tests.model.checkpoints import network, saved
from tests.support.web import redirecting


class Malicious:
    """Unpickling it would create a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return (os.system, (f"touch {self.path}",))


class Calling:
    """Unpickling it calls what it is made of."""

    def __init__(self, *call: object, state: object = None) -> None:
        self.call, self.state = call, state

    def __reduce__(self):
        return (self.call[0], self.call[1:], *([] if self.state is None else [self.state]))


def as_zip(trap: object) -> bytes:
    return saved({"state_dict": network().state_dict(), "args": trap})


def as_legacy(trap: object) -> bytes:
    return saved({"state_dict": network().state_dict(), "args": trap}, _use_new_zipfile_serialization=False)


def as_nested(trap: object) -> bytes:
    return saved({"model": {"state_dict": {"fc.bias": torch.ones(7), "hidden": [{"deep": (trap,)}]}}})


def as_key(trap: object) -> bytes:
    return saved(collections.OrderedDict([("fc.bias", torch.ones(7)), ("args", functools.partial(trap.__reduce__))]))


def as_array_of_objects(trap: object) -> bytes:
    return saved({"state_dict": network().state_dict(), "history": np.array([trap], dtype=object)})


def as_array_of_records(trap: object) -> bytes:
    history = np.array([(1, trap)], dtype=[("epoch", "i4"), ("what", "O")])
    return saved({"state_dict": network().state_dict(), "history": history})


def as_factory(trap: object) -> bytes:
    return saved({"state_dict": network().state_dict(), "groups": collections.defaultdict(os.getcwd, a=trap)})


def as_container(trap: object) -> bytes:
    return saved({"state_dict": network().state_dict(), "last": collections.deque([trap], maxlen=2)})


def as_path(trap: object) -> bytes:
    return saved(Calling(pathlib.PosixPath, trap))


def as_time(trap: object) -> bytes:
    return saved(Calling(datetime.timezone, Calling(datetime.timedelta, trap)))


def as_plain_pickle(trap: object) -> bytes:
    return pickle.dumps(trap)


def as_newest_pickle(trap: object) -> bytes:
    return pickle.dumps({"state_dict": trap}, protocol=pickle.HIGHEST_PROTOCOL)


def as_tar(trap: object) -> bytes:
    """As torch 0.1 saved: tarfile in memory, and a pickle in each of its files."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for name in ("sys_info", "pickle", "storages", "tensors"):
            data = pickle.dumps(trap)
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return buffer.getvalue()


def as_package(trap: object) -> bytes:
    """A torch.package, which brings code of its own."""
    buffer = io.BytesIO()
    with torch.package.PackageExporter(buffer) as exporter:
        exporter.extern("**")
        exporter.save_source_string("trap", f"import os\nos.system('touch {trap.path}')\nclass Trap: pass\n")
        exporter.save_pickle("model", "model.pkl", trap)
    return buffer.getvalue()


def as_torchscript(trap: object) -> bytes:
    buffer = io.BytesIO()
    torch.jit.save(torch.jit.script(torch.nn.Linear(1, 1)), buffer)
    changed = io.BytesIO()
    with zipfile.ZipFile(buffer) as source, zipfile.ZipFile(changed, "w") as target:
        for entry in source.infolist():
            is_data = entry.filename.endswith("data.pkl")
            target.writestr(entry.filename, pickle.dumps(trap, protocol=2) if is_data else source.read(entry))
    return changed.getvalue()


FORMATS = [
    *(as_zip, as_legacy, as_nested, as_key, as_plain_pickle, as_newest_pickle, as_tar, as_package, as_torchscript),
    *(as_array_of_objects, as_array_of_records, as_factory, as_container, as_path, as_time),
]


@pytest.fixture
def trap(tmp_path: Path) -> Iterator[Malicious]:
    """Whatever is done with it must not set it off."""
    trap = Malicious(tmp_path / "owned")
    yield trap
    assert not trap.path.exists()


def test_the_trap_works(tmp_path: Path):
    trap = Malicious(tmp_path / "owned")
    pickle.loads(as_plain_pickle(trap))
    assert trap.path.exists()
    trap.path.unlink()
    torch.load(io.BytesIO(as_nested(trap)), weights_only=False)
    assert trap.path.exists()


def test_a_pickle_that_runs_code_is_refused_with_the_way_out(trap: Malicious):
    for data in (as_zip(trap), as_legacy(trap), as_nested(trap)):
        with pytest.raises(WeightsError, match=r"holds pickled objects besides tensors.*torch.save.*posix.system"):
            parse(data, "net.pth")


@pytest.mark.parametrize("name", ["net.pth", "net.safetensors", "https://host/net.pt?x=.safetensors"])
@pytest.mark.parametrize("disguise", FORMATS)
def test_no_format_and_no_name_makes_a_pickle_run(trap: Malicious, disguise: Callable[[object], bytes], name: str):
    with pytest.raises(WeightsError):
        parse(disguise(trap), name)


REFUSED = "holds pickled objects besides tensors"


@pytest.mark.parametrize(
    "factory",
    [os.getcwd, len, eval, functools.partial(int, "1"), collections.OrderedDict.fromkeys, pathlib.Path.unlink, vars],
)
def test_only_a_builtin_type_makes_defaults(factory: Callable[..., object]):
    data = saved({"state_dict": network().state_dict(), "groups": collections.defaultdict(factory)})
    with pytest.raises(WeightsError, match=REFUSED):
        parse(data, "net.pth")


@pytest.mark.parametrize("history", [np.array([1, None]), np.zeros(2, dtype=[("a", "O")]), np.zeros(2, dtype="T")])
def test_arrays_that_may_hold_anything_are_refused(history: np.ndarray):
    with pytest.raises(WeightsError, match=f"{REFUSED}.*(Among them is a numpy array of Python objects|stringdtype)"):
        parse(saved({"state_dict": network().state_dict(), "history": history}), "net.pth")


@pytest.mark.parametrize("data", [(), (b"",), (b"short",), ([0],), (None,)])
@pytest.mark.parametrize("kind", ["V2000000000", "U500000000", "O"])
def test_a_number_that_claims_more_than_the_file_holds_is_refused(kind: str, data: tuple[object, ...]):
    with pytest.raises(WeightsError, match=f"{REFUSED}.* Among them is a numpy scalar"):
        parse(saved({"a": torch.ones(1), "best": Calling(SCALAR, np.dtype(kind), *data)}), "net.pth")


SCALAR, RECONSTRUCT = np._core.multiarray.scalar, np._core.multiarray._reconstruct
HUGE = 2**31
CLAIMS = {
    "an array of that shape": lambda: Calling(RECONSTRUCT, np.ndarray, (HUGE,), b"b"),
    "an array of that state": lambda: Calling(
        RECONSTRUCT, np.ndarray, (0,), b"b", state=(1, (HUGE,), np.dtype("f8"), False, b"")
    ),
    "an array, called itself": lambda: Calling(np.ndarray, (HUGE,)),
    "a tuple of an array": lambda: Calling(tuple, Calling(np.ndarray, (HUGE,))),
    "bytes": lambda: Calling(bytes, HUGE),
    "a deque without end": lambda: Calling(collections.deque, Calling(bytes, HUGE), HUGE),
    "a list": lambda: Calling(list, Calling(bytes, HUGE)),
    "a path": lambda: Calling(pathlib.PosixPath, *["a" * 100] * 100),
}


@pytest.mark.parametrize("claim", CLAIMS)
def test_a_small_file_takes_little_memory_whatever_it_claims(claim: str):
    data = saved({"a": torch.ones(1), "beside": [CLAIMS[claim]() for _ in range(20)]})
    assert len(data) < 30_000
    tracemalloc.start()
    try:
        assert parse(data, "net.pth").keys() == {"a"}
        assert tracemalloc.get_traced_memory()[1] < 2**24
    finally:
        tracemalloc.stop()


def test_safetensors_under_another_name_are_refused():
    with pytest.raises(WeightsError, match="net.pth is no checkpoint that torch can read"):
        parse(save(network().state_dict()), "net.pth")


def compressed(data: bytes) -> bytes:
    target = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as source, zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as archive:
        for entry in source.infolist():
            archive.writestr(entry.filename, source.read(entry))
    return target.getvalue()


def test_a_checkpoint_that_unfolds_is_refused_before_it_does(monkeypatch: pytest.MonkeyPatch):
    data = compressed(saved({"weight": torch.zeros(2**20)}))
    assert torch.load(io.BytesIO(data), weights_only=True)["weight"].shape == (2**20,), "torch would unfold it"
    monkeypatch.setattr(torch, "load", None)
    with pytest.raises(
        WeightsError, match=r"unfolds from \d+ bytes to 4\d{6}, which nothing does that torch.save writes"
    ):
        parse(data, "net.pth")
    with pytest.raises(WeightsError, match="no checkpoint that torch can read: File is not a zip file"):
        parse(b"PK" + data[2:1000], "net.pth")


def test_a_whole_pickled_network_is_refused_with_the_way_out():
    with pytest.raises(WeightsError, match=r"save its tensors alone: torch.save\(network.state_dict\(\), path\)"):
        parse(saved(network()), "net.pth")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "net.pth is no checkpoint: it is empty"),
        (b"\n<html>Not found</html>", "net.pth is no checkpoint: it is a web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "it only names a file that Git LFS keeps"),
        (gzip.compress(b"a", mtime=0), "it is compressed by gzip"),
        (b"0" * 257 + b"ustar", "it is a tar"),
        (b"nonsense", "no checkpoint that torch can read: Unsupported operand 110.$"),
        (saved({"a": torch.ones(1000)})[:700], "net.pth is no checkpoint that torch can read"),
        (saved({"epoch": 3, "optimizer": {}}), "holds no state_dict, but the entries epoch, optimizer"),
        (saved([1, 2]), "holds no state_dict, but a list"),
    ],
)
def test_other_files_are_refused(data: bytes, message: str):
    with pytest.raises(WeightsError, match=message):
        parse(data, "net.pth")


def test_another_file_than_the_pinned_one_is_never_parsed(
    job, tmp_path: Path, serve, trap: Malicious, monkeypatch: pytest.MonkeyPatch
):
    """By path, by URL, and where the URL leads elsewhere."""

    def parsed(*arguments: object) -> None:
        raise AssertionError("it was parsed")

    (tmp_path / "net.pth").write_bytes(as_zip(trap))
    elsewhere = serve(tmp_path).url
    with redirecting(f"{elsewhere}/net.pth") as url:
        places = (str(tmp_path / "net.pth"), f"{elsewhere}/net.pth", f"{url}/net.pth")
        with pytest.raises(WeightsError, match="holds pickled objects besides tensors"):
            load_state_dict(make_spec(job(name="resnet18", weights=places[-1])))
        monkeypatch.setattr("pipeline.model.weights.parse", parsed)
        monkeypatch.setattr(torch, "load", parsed)
        for place in places:
            with pytest.raises(WeightsError, match=f"expected was {'0' * 64}"):
                load_state_dict(make_spec(job(name="resnet18", weights=place, sha256="0" * 64)))
