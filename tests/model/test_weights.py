"""Checkpoints as training scripts leave them, and files that must not be loaded."""

from __future__ import annotations

import argparse
import collections
import contextlib
import functools
import gzip
import hashlib
import http.server
import io
import os
import pickle
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save
from torchvision.models import get_weight, resnet18

from pipeline.errors import WeightsError
from pipeline.model.spec import make_spec
from pipeline.model.weights import StateDict, fill, load_state_dict, load_torchvision, match_keys, parse
from tests.model.helpers import output_of, python
from tests.support.web import serving


@functools.cache
def network() -> torch.nn.Module:
    torch.manual_seed(1)
    return resnet18(num_classes=7)


def saved(checkpoint: object, **options: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(checkpoint, buffer, **options)
    return buffer.getvalue()


def assert_is_the_network(data: bytes, source: str = "net.pth") -> None:
    """The bytes fill a fresh network with exactly the parameters of `network()`."""
    other = resnet18(num_classes=7)
    fill(other, match_keys(parse(data, source), other.state_dict()), source)
    for name, value in network().state_dict().items():
        assert torch.equal(other.state_dict()[name], value), name


def prefixed(prefix: str) -> dict[str, torch.Tensor]:
    return {prefix + key: value for key, value in network().state_dict().items()}


TRAINING = {"epoch": 3, "arch": "resnet18", "optimizer": {"state": {0: {"momentum_buffer": torch.ones(2)}}}}


@pytest.mark.parametrize(
    "checkpoint",
    [
        lambda state: state,
        dict,
        lambda state: {"state_dict": state, **TRAINING, "best_acc1": np.float64(71.3), "seen": np.int64(9)},
        lambda state: {
            "best": np.float32(0.5),
            "model": state,
            **TRAINING,
            "args": argparse.Namespace(lr=0.1, amp=True),
        },
        lambda state: {"model_state_dict": state, "loss": torch.tensor(0.1), **TRAINING},
        lambda state: {"model": {"name": "resnet18", "network": {}}, "weights": state, **TRAINING},
        lambda state: {"model": {"state_dict": state}, "model_ema": {"module.x": torch.ones(1)}, **TRAINING},
        lambda state: {"state_dict": state, "state_dict_ema": {}, "order": collections.OrderedDict(a=1)},
    ],
)
def test_wrappers_with_other_entries_beside(checkpoint):
    assert_is_the_network(saved(checkpoint(network().state_dict())))


def test_the_older_file_format_and_numpys_older_names():
    assert_is_the_network(saved(network().state_dict(), _use_new_zipfile_serialization=False))
    data = saved({"state_dict": network().state_dict(), "acc": np.float64(1)}, _use_new_zipfile_serialization=False)
    # The text form that numpy 1 wrote; protocol 2 stores a global's name as a line, so its length may change.
    older = data.replace(b"cnumpy._core.multiarray\n", b"cnumpy.core.multiarray\n")
    assert b"_core" not in older
    assert_is_the_network(older)


def test_safetensors():
    assert_is_the_network(save(network().state_dict()), "https://host/net.safetensors?signature=x")
    with pytest.raises(WeightsError, match=r"host/net.safetensors is not a safetensors file"):
        parse(b"nothing of the kind", "https://host/net.safetensors?signature=x")


@pytest.mark.parametrize(
    "prefix",
    [
        *(
            "module.",
            "_orig_mod.",
            "model.",
            "module._orig_mod.",
            "_orig_mod.module.",
            "module.module.",
            "model.module.",
        ),
        *("net.", "network.", "module.net.", "backbone.", "model.encoder.", "resnet."),
    ],
)
def test_prefixes_of_wrappers_come_off(prefix: str):
    assert_is_the_network(saved({"state_dict": prefixed(prefix)}))


def test_what_lies_beside_a_prefix_is_left_out_where_the_network_lies_under_it(caplog: pytest.LogCaptureFixture):
    """Lightning stores the loss's tensors as well."""
    beside = {"criterion.weight": torch.ones(7), "metrics.total": torch.ones(1)}
    assert_is_the_network(saved({"state_dict": prefixed("model.") | beside}))
    assert "left out; 2 beside it: criterion.weight, metrics.total" in caplog.text
    for state in (network().state_dict() | beside, prefixed("model.") | {"classifier.bias": torch.ones(7)}):
        state.pop("model.fc.bias", None)
        with pytest.raises(WeightsError, match="unknown to the network: (criterion.weight|classifier.bias)"):
            assert_is_the_network(saved(state))
    own = {"a.weight", "head.weight"}
    state = StateDict({"model.a.weight": torch.ones(1), "head.weight": torch.ones(1)})
    assert match_keys(state, own).keys() == own


@pytest.mark.parametrize(
    "inserted", ["module", "_forward_module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"]
)
def test_what_torch_puts_around_modules_inside_comes_off(inserted: str):
    state = {
        "module." + key.replace("layer1.", f"layer1.{inserted}."): value
        for key, value in network().state_dict().items()
    }
    assert any(f".{inserted}." in key for key in state)
    assert_is_the_network(saved(state))
    own = {f"a.{inserted}.weight", f"my{inserted}.weight"}
    for prefix in ("", "module.", "_orig_mod.module."):
        assert match_keys(StateDict({prefix + key: torch.ones(1) for key in own}), own).keys() == own


class Versioned(torch.nn.Linear):
    """Stores twice the weight since version 2, as a converter of older weights tells from the version."""

    _version = 2

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, *args):
        if local_metadata.get("version") != 2:
            state_dict[prefix + "weight"] = state_dict[prefix + "weight"] * 2
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *args)


def test_modules_are_told_the_version_that_has_written_them():
    stored, empty = torch.nn.Sequential(Versioned(2, 2)), torch.nn.Sequential(Versioned(2, 2))
    for wrapped in (stored, torch.nn.DataParallel(stored), torch.nn.Sequential(collections.OrderedDict(net=stored))):
        state = match_keys(parse(saved({"model": wrapped.state_dict()}), "net.pth"), empty.state_dict())
        fill(empty, state, "net.pth")
        assert torch.equal(empty[0].weight, stored[0].weight)
    fill(empty, match_keys(parse(save(stored.state_dict()), "a.safetensors"), empty.state_dict()), "a.safetensors")
    assert torch.equal(empty[0].weight, 2 * stored[0].weight)  # that format keeps no versions


class Renamed(torch.nn.Linear):
    """Its weight was called `kernel` once."""

    def _load_from_state_dict(self, state_dict, prefix, *args):
        if f"{prefix}kernel" in state_dict:
            state_dict[f"{prefix}weight"] = state_dict.pop(f"{prefix}kernel")
        super()._load_from_state_dict(state_dict, prefix, *args)


def test_names_that_the_networks_modules_know_as_older_ones_of_theirs_are_taken():
    old = torch.nn.utils.weight_norm(torch.nn.Linear(3, 2))
    new = torch.nn.Sequential(torch.nn.utils.parametrizations.weight_norm(torch.nn.Linear(3, 2)))
    fill(new, {f"0.{key}": value for key, value in old.state_dict().items()}, "net.pth")
    torch.testing.assert_close(new(torch.eye(3)), old(torch.eye(3)))
    renamed = torch.nn.Sequential(Renamed(2, 2))
    fill(renamed, {"0.kernel": torch.ones(2, 2), "0.bias": torch.ones(2)}, "net.pth")
    assert torch.equal(renamed[0].weight, torch.ones(2, 2))
    with pytest.raises(WeightsError, match="1 missing in the weights: 0.weight; 1 unknown to the network: 0.kernels"):
        fill(renamed, {"0.kernels": torch.ones(2, 2), "0.bias": torch.ones(2)}, "net.pth")


def test_a_network_that_does_not_say_what_it_took_is_held_to_its_names():
    class Silent(torch.nn.Linear):
        def load_state_dict(self, *args, **options):
            super().load_state_dict(*args, **options)

    fill(Silent(2, 2), torch.nn.Linear(2, 2).state_dict(), "net.pth")
    with pytest.raises(WeightsError, match="1 missing in the weights: bias; 1 unknown to the network: extra"):
        fill(Silent(2, 2), {"weight": torch.ones(2, 2), "extra": torch.ones(2)}, "net.pth")


def test_of_what_lies_beside_a_state_dict_only_versions_are_taken():
    state = torch.nn.Linear(2, 2).state_dict()
    state._metadata[""] |= {"assign_to_params_buffers": True}
    assert parse(saved(state), "net.pth")._metadata == {"": {"version": 1}}


def test_a_checkpoint_that_holds_itself_is_refused():
    round_and_round: dict[str, object] = {}
    round_and_round["model"] = round_and_round
    with pytest.raises(WeightsError, match="holds no state_dict"):
        parse(saved(round_and_round), "net.pth")


def test_a_network_that_does_not_take_its_weights():
    class Odd(torch.nn.Linear):
        def _load_from_state_dict(self, *args):
            raise ValueError("not by me")

    with pytest.raises(WeightsError, match="does not take the weights net.pth: .*not by me"):
        fill(Odd(2, 2), torch.nn.Linear(2, 2).state_dict(), "net.pth")


def test_prefixes_that_are_the_networks_own_stay():
    own = {"model.weight", "model.bias"}
    values = {"weight": torch.ones(1), "bias": torch.zeros(1)}
    for prefix in ("model.", "module.model.", "model.model.", "_orig_mod.module.model."):
        state = StateDict({prefix + key: value for key, value in values.items()})
        assert match_keys(state, own).keys() == own
    assert match_keys(StateDict({"module.a": torch.ones(1), "a": torch.ones(1)}), {"a"}).keys() == {"module.a", "a"}


def test_counters_and_second_names_of_tensors_may_be_left_out_or_too_many():
    tied = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Linear(3, 3))
    tied[1].weight = tied[0].weight
    state = {key: torch.rand_like(value) for key, value in tied.state_dict().items() if key != "1.weight"}
    fill(tied, state | {"n_averaged": torch.tensor(3), "2.num_batches_tracked": torch.tensor(1)}, "net.safetensors")
    assert torch.equal(tied[1].weight, state["0.weight"])
    with pytest.raises(WeightsError, match="1 missing in the weights: 1.bias"):
        fill(tied, {key: value for key, value in state.items() if key != "1.bias"}, "net.safetensors")


def test_old_checkpoints_without_batch_counters_fit():
    state = {key: value for key, value in network().state_dict().items() if "num_batches_tracked" not in key}
    other = resnet18(num_classes=7)
    fill(other, state, "net.pth")
    assert torch.equal(other.fc.weight, network().fc.weight)


def test_what_a_network_keeps_besides_tensors_is_its_own_affair():
    class Keeping(torch.nn.Linear):
        def get_extra_state(self):
            return {"version": 3}

        def set_extra_state(self, state):
            self.version = state["version"]

    state = {key: value + 1 for key, value in Keeping(2, 2).state_dict().items() if isinstance(value, torch.Tensor)}
    other = Keeping(2, 2)
    fill(other, state, "net.pth")
    assert torch.equal(other.weight, state["weight"])


@pytest.mark.parametrize(
    "stored",
    [
        torch.ones(2, 2, dtype=torch.int8),
        torch.ones(2, 2, dtype=torch.complex64),
        torch.ones(2, 2).to_sparse(),
        torch.ones(2, 2, device="meta"),
    ],
    ids=["int8", "complex", "sparse", "meta"],
)
def test_numbers_that_would_be_taken_for_others_are_refused(stored: torch.Tensor):
    with pytest.raises(WeightsError, match=r"not stored as plain numbers; 1 that are something else: weight "):
        fill(torch.nn.Linear(2, 2), {"weight": stored, "bias": torch.ones(2)}, "net.pth")


def test_what_does_not_fit_says_what_differs():
    state = network().state_dict()
    state = {key: value for key, value in state.items() if not key.startswith("layer4.1.")}
    state |= {f"extra.{number}": torch.ones(1) for number in range(12)}
    with pytest.raises(WeightsError) as caught:
        fill(resnet18(num_classes=9), state, "https://key:secret@host/net.pth?signature=x")
    text = str(caught.value)
    assert text.startswith(
        "the weights https://host/net.pth do not fit the network; 10 missing in the weights: layer4.1.conv1"
    )
    assert "; 12 unknown to the network: extra.0, " in text
    assert "extra.9, …; " in text
    assert "extra.10" not in text
    assert "; 2 of another shape: fc.weight (7, 512) instead of (9, 512), fc.bias (7,) instead of (9,)." in text


class Malicious:
    """Unpickling it would create a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return (os.system, (f"touch {self.path}",))


def as_zip(trap: object) -> bytes:
    return saved({"state_dict": network().state_dict(), "args": trap})


def as_legacy(trap: object) -> bytes:
    return saved({"state_dict": network().state_dict(), "args": trap}, _use_new_zipfile_serialization=False)


def as_nested(trap: object) -> bytes:
    return saved({"model": {"state_dict": {"fc.bias": torch.ones(7), "hidden": [{"deep": (trap,)}]}}})


def as_key(trap: object) -> bytes:
    return saved(collections.OrderedDict([("fc.bias", torch.ones(7)), ("args", functools.partial(trap.__reduce__))]))


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
        (gzip.compress(b"a"), "it is compressed by gzip"),
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


# Where the bytes come from.


def test_a_local_file_is_read_in_place_and_verified(job, tmp_path: Path, cache: Path):
    (tmp_path / "net.pth").write_bytes(saved(network().state_dict()))
    spec = make_spec(job(name="resnet18", weights=str(tmp_path / "net.pth")))
    assert load_state_dict(spec).keys() == network().state_dict().keys()
    assert not (cache / "weights").exists()
    (tmp_path / "net.pth").write_bytes(saved(resnet18().state_dict()))
    with pytest.raises(WeightsError, match=rf"net.pth have the sha256 .*, expected was {spec.weights.sha256}"):
        load_state_dict(spec)
    (tmp_path / "net.pth").unlink()
    with pytest.raises(
        WeightsError, match=r"cannot read the weights .*net.pth on node .*A path must exist on every node"
    ):
        load_state_dict(spec)


def test_a_wrong_sha256_in_the_config_is_found_on_the_worker(job, tmp_path: Path, serve):
    (tmp_path / "net.pth").write_bytes(saved(network().state_dict()))
    for place in (str(tmp_path / "net.pth"), f"{serve(tmp_path).url}/net.pth"):
        with pytest.raises(WeightsError, match=f"expected was {'0' * 64}"):
            load_state_dict(make_spec(job(name="resnet18", weights=place, sha256="0" * 64)))


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


def test_a_url_that_leads_to_a_local_file_is_refused(job, tmp_path: Path):
    (tmp_path / "net.pth").write_bytes(saved(network().state_dict()))
    with (
        redirecting(f"file://{tmp_path}/net.pth") as url,
        pytest.raises(WeightsError, match="cannot fetch the weights: .*Check the URL"),  # at once, since it stays so
    ):
        make_spec(job(name="resnet18", weights=f"{url}/net.pth"))


@contextlib.contextmanager
def redirecting(target: str) -> Iterator[str]:
    """A server that sends everybody on."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(302)
            self.send_header("Location", target)
            self.send_header("Content-Length", "0")
            self.end_headers()

        do_HEAD = do_GET

        def log_message(self, *arguments: object) -> None:
            pass

    with serving(http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)) as server:
        yield f"http://127.0.0.1:{server.server_port}"


def test_a_server_that_sends_without_end_is_left(job, tmp_path: Path, cache: Path, serve, monkeypatch):
    (tmp_path / "net.pth").write_bytes(saved(network().state_dict()))
    monkeypatch.setattr("pipeline.model.cache.MAX_WEIGHTS_BYTES", 10**6)
    with pytest.raises(WeightsError, match=r"net.pth sends more than 1000000 bytes. Or download them"):
        make_spec(job(name="resnet18", weights=f"{serve(tmp_path).url}/net.pth"))
    assert list((cache / "weights").iterdir()) == []


def test_a_url_is_fetched_once_for_driver_and_workers(job, tmp_path: Path, serve):
    (tmp_path / "net.pth").write_bytes(saved(network().state_dict()))
    server = serve(tmp_path)
    spec = make_spec(job(name="resnet18", weights=f"{server.url}/net.pth"))
    server.downloads.clear()
    assert torch.equal(load_state_dict(spec)["fc.bias"], network().fc.bias)
    assert server.downloads == []


FULL_NAME = "ResNet18_Weights.IMAGENET1K_V1"
TORCHVISION = f"""
import sys
from torchvision.models import {FULL_NAME.partition(".")[0]}
from pipeline.model.weights import load_torchvision
{FULL_NAME}.value.url = sys.argv[1]
print(load_torchvision("{FULL_NAME}")["fc.bias"].tolist())
"""


def test_two_processes_fetch_torchvisions_weights_once(tmp_path: Path, serve):
    data = saved(network().state_dict())
    name = f"resnet18-{hashlib.sha256(data).hexdigest()[:8]}.pth"
    (tmp_path / name).write_bytes(data)
    server = serve(tmp_path)
    both = [python(TORCHVISION, f"{server.url}/{name}", TORCH_HOME=str(tmp_path / "home")) for _ in range(2)]
    # stdout holds the result alone, though torch.hub announces its download there
    assert [output_of(process) for process in both] == [str(network().fc.bias.tolist())] * 2
    assert server.downloads == [f"/{name}"]


@pytest.mark.parametrize(
    ("name", "sha256", "message"),
    [
        ("resnet18-11111111.pth", None, "cannot fetch {full} from {url}: HTTP Error 404.* put it at {home}/{name}[.]$"),
        (
            "resnet18-00000000.pth",
            None,
            "cannot fetch {full} from {url}: invalid hash value.* put it at {home}/{name}[.]$",
        ),
        ("resnet18.pth", "0" * 64, "the weights {url} have the sha256 .*, expected was 000"),
    ],
)
def test_torchvisions_weights_that_are_not_to_be_had(tmp_path: Path, serve, monkeypatch, name, sha256, message):
    for served in ("resnet18-00000000.pth", "resnet18.pth"):
        (tmp_path / served).write_bytes(saved(network().state_dict()))
    url = f"{serve(tmp_path).url}/{name}"
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(get_weight(FULL_NAME).value, "url", url)
    expected = message.format(full=FULL_NAME, url=url, name=name, home=tmp_path / "home/hub/checkpoints")
    with pytest.raises(WeightsError, match=expected):
        load_torchvision(FULL_NAME, sha256)
