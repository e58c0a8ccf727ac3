"""Checkpoints as training scripts leave them, and files that must not be loaded."""

from __future__ import annotations

import argparse
import collections
import functools
import hashlib
import io
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save
from torchvision.models import get_weight, resnet18

from pipeline.errors import WeightsError
from pipeline.model.spec import make_spec
from pipeline.model.weights import fill, load_state_dict, load_torchvision, match_keys, parse
from tests.model.helpers import output_of, python


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
    ["module.", "_orig_mod.", "model.", "module._orig_mod.", "_orig_mod.module.", "module.module.", "model.module."],
)
def test_prefixes_of_wrappers_come_off(prefix: str):
    assert_is_the_network(saved({"state_dict": prefixed(prefix)}))


def test_prefixes_that_are_the_networks_own_stay():
    own = {"model.weight", "model.bias"}
    values = {"weight": torch.ones(1), "bias": torch.zeros(1)}
    for prefix in ("model.", "module.model.", "model.model.", "_orig_mod.module.model."):
        state = {prefix + key: value for key, value in values.items()}
        assert match_keys(state, own).keys() == own
    assert match_keys({"module.a": torch.ones(1), "a": torch.ones(1)}, {"a"}).keys() == {"module.a", "a"}


def test_old_checkpoints_without_batch_counters_fit():
    state = {key: value for key, value in network().state_dict().items() if "num_batches_tracked" not in key}
    other = resnet18(num_classes=7)
    fill(other, state, "net.pth")
    assert torch.equal(other.fc.weight, network().fc.weight)


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


def test_a_pickle_that_runs_code_is_refused_and_does_not_run(tmp_path: Path):
    for options in ({}, {"_use_new_zipfile_serialization": False}):
        data = saved({"state_dict": network().state_dict(), "args": Malicious(tmp_path / "owned")}, **options)
        with pytest.raises(WeightsError, match=r"holds pickled objects besides tensors.*torch.save.*posix.system"):
            parse(data, "net.pth")
    assert not (tmp_path / "owned").exists()


def test_a_whole_pickled_network_is_refused_with_the_way_out():
    with pytest.raises(WeightsError, match=r"save its tensors alone: torch.save\(network.state_dict\(\), path\)"):
        parse(saved(network()), "net.pth")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "net.pth is no checkpoint that torch can read"),
        (b"<html>Not found</html>", "net.pth is no checkpoint that torch can read"),
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
