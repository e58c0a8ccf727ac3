"""Where the bytes of weights come from: local files, URLs and torchvision."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import torch
from torchvision.models import get_weight, resnet18

from pipeline.errors import WeightsError
from pipeline.model.spec import make_spec
from pipeline.model.weights import load_state_dict, load_torchvision
from tests.model.checkpoints import network, saved
from tests.model.helpers import output_of, python
from tests.support.web import redirecting


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


def test_a_url_that_leads_to_a_local_file_is_refused(job, tmp_path: Path):
    (tmp_path / "net.pth").write_bytes(saved(network().state_dict()))
    with (
        redirecting(f"file://{tmp_path}/net.pth") as url,
        pytest.raises(WeightsError, match="cannot fetch the weights: .*Check the URL"),  # at once, since it stays so
    ):
        make_spec(job(name="resnet18", weights=f"{url}/net.pth"))


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
    server = serve(tmp_path, delay_s=0.3)
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
