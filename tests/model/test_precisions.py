"""int8 against fp32 with a trained network, and what a node keeps so that an actor needs neither torch nor NNCF."""

from __future__ import annotations

import functools
import hashlib
import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline.config import Storage
from pipeline.errors import ConfigError, WeightsError
from pipeline.examples.digits import load_digits_images
from pipeline.model.engines import Engine, load_engine
from pipeline.model.openvino_engine import packed, unpacked
from pipeline.model.quantised import agreement, quantise
from pipeline.model.spec import ModelSpec, Quantised, make_spec
from pipeline.model.zoo import cache_key, resolve
from tests.model.helpers import make_job, output_of, python
from tests.support.jobs import NETWORK, TRANSFORM, WEIGHTS

BATCH_SIZE = 16
NUM_CALIBRATED = 64  # the other digits are compared


@functools.cache
def digits() -> np.ndarray:
    """uint8 (320, 32, 32, 3)."""
    enlarged = np.kron(load_digits_images().images[:320], np.ones((4, 4), np.uint8))
    return np.repeat(enlarged[..., np.newaxis], 3, axis=-1)


def digits_spec(precision: str) -> ModelSpec:
    return make_spec(make_job(name=NETWORK, weights=WEIGHTS, transform=TRANSFORM, precision=precision))


def stored(network: bytes, folder: Path) -> ModelSpec:
    """The spec of an int8 network that lies in a folder."""
    path = folder / "network.zip"
    path.write_bytes(network)
    return digits_spec("int8").calibrated(Quantised(str(path), hashlib.sha256(network).hexdigest(), Storage()))


@functools.cache
def calibrated(darkened_by: int = 1) -> bytes:
    """The digits' network in int8. Badly so where it has seen dark images only: what is brighter is cut off."""
    return packed(quantise(digits_spec("int8"), list(digits()[:NUM_CALIBRATED] // darkened_by)))


def load(spec: ModelSpec, batch_size: int = BATCH_SIZE) -> Engine:
    return load_engine("openvino", spec, resolve(spec), "cpu", batch_size)


def results(engine: Engine, pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    parts = [engine(pixels[start : start + BATCH_SIZE]) for start in range(0, len(pixels), BATCH_SIZE)]
    return np.concatenate([logits for logits, _ in parts]), np.concatenate([rows for _, rows in parts])


def compared(spec: ModelSpec) -> tuple[float, float]:
    """Top-1 agreement with fp32 and p1 of the centred cosine, over the digits that were not calibrated on."""
    pixels = digits()[NUM_CALIBRATED:]
    (wanted, reference), (logits, embeddings) = (results(load(s), pixels) for s in (digits_spec("float32"), spec))
    assert len(np.unique(wanted.argmax(axis=1))) == 10
    a, b = reference - reference.mean(axis=0), embeddings - reference.mean(axis=0)
    cosines = (a * b).sum(axis=1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
    top1 = (logits.argmax(axis=1) == wanted.argmax(axis=1)).mean()
    return float(top1), float(np.quantile(cosines, 0.01))


def test_int8_gives_the_numbers_of_fp32_with_a_trained_network(tmp_path: Path):
    top1, cosine = compared(stored(calibrated(), tmp_path))
    assert top1 >= 0.99
    assert 0.99 <= cosine < 0.99999


def test_a_bad_calibration_would_be_noticed(tmp_path: Path):
    top1, cosine = compared(stored(calibrated(darkened_by=8), tmp_path))
    assert top1 < 0.9
    assert cosine < 0.9


def test_agreement_tells_a_good_calibration_from_a_bad_one(tmp_path: Path):
    images = list(digits()[:NUM_CALIBRATED])
    found = []
    for network in (calibrated(), calibrated(darkened_by=8)):
        (tmp_path / "network.zip").write_bytes(network)
        found.append(agreement(digits_spec("int8"), unpacked(tmp_path / "network.zip"), images))
    assert found[0] >= 0.99
    assert found[1] < 0.9


@pytest.mark.parametrize("batch_size", [1, 7, 16])
def test_an_int8_row_does_not_depend_on_its_neighbours_or_its_place(tmp_path: Path, batch_size: int):
    engine = load(stored(calibrated(), tmp_path), batch_size)
    pixels, others = digits()[:batch_size], digits()[-batch_size:]
    expected = engine(pixels)
    places = np.arange(batch_size)
    for shift, neighbours, kept in (
        (1, others, places >= 0),  # only moved
        (3, np.zeros_like(others), places % 2 == 0),
        (batch_size - 1, others, places == batch_size - 1),
    ):
        moved = np.roll(places, shift)
        batch = np.where(kept[:, None, None, None], pixels[moved], neighbours)
        for found, rows in zip(engine(batch), expected, strict=True):
            assert found[kept].tobytes() == rows[moved][kept].tobytes()


def test_int8_without_a_network_is_refused():
    with pytest.raises(ConfigError, match=r"int8 needs a network that is calibrated .* Do the run first"):
        load(digits_spec("int8"))


def test_a_network_that_is_not_the_datasets_is_refused(tmp_path: Path):
    spec = stored(calibrated(), tmp_path)
    (tmp_path / "network.zip").write_bytes(b"something else")
    with pytest.raises(WeightsError, match=r"network\.zip have the sha256 .*, expected was"):
        load(spec)
    (tmp_path / "network.zip").unlink()
    with pytest.raises(WeightsError, match=r"cannot fetch .* restore it, or begin a new one"):
        load(spec)
    with pytest.raises(WeightsError, match=r"is no network that this OpenVINO reads"):
        load(stored(b"no zip at all", tmp_path))


# Without torch.

WATCH = """
import sys
def report(event, args):
    if event in ("socket.connect", "socket.getaddrinfo", "socket.sendto", "os.fork"):
        print(event, args)
sys.addaudithook(report)
"""
LOAD = f"""{WATCH}
import hashlib, pickle
from pathlib import Path
import numpy as np
from pipeline.model.engines import load_engine
spec, info = pickle.loads(Path(sys.argv[1]).read_bytes())
logits, embeddings = load_engine("openvino", spec, info, "cpu", 16)(np.load(sys.argv[2]))
print(hashlib.sha256(logits.tobytes() + embeddings.tobytes()).hexdigest(), {{"torch", "nncf"}} & set(sys.modules))
"""
CALIBRATE = f"""{WATCH}
import json
import numpy as np
from pipeline.config import make_config
from pipeline.model.quantised import quantise
from pipeline.model.spec import make_spec
quantise(make_spec(make_config(json.loads(sys.argv[1]))), list(np.load(sys.argv[2])))
"""


def in_a_fresh_process(spec: ModelSpec, pixels: np.ndarray, folder: Path) -> str:
    """What it calls outside, the hash of the results, and which of torch and NNCF were imported for them."""
    (folder / "spec").write_bytes(pickle.dumps((spec, resolve(spec))))
    np.save(folder / "pixels.npy", pixels)
    return output_of(python(LOAD, folder / "spec", folder / "pixels.npy", HOME=str(folder)))


def hashed(results: tuple[np.ndarray, np.ndarray]) -> str:
    return hashlib.sha256(b"".join(rows.tobytes() for rows in results)).hexdigest()


def test_an_actor_loads_int8_with_neither_torch_nor_nncf_and_calls_nobody(tmp_path: Path):
    """OpenVINO would send usage statistics as soon as it is imported."""
    spec, pixels = stored(calibrated(), tmp_path), digits()[:16]
    assert in_a_fresh_process(spec, pixels, tmp_path) == f"{hashed(load(spec)(pixels))} set()"
    assert not (tmp_path / "intel").exists()


@pytest.mark.slow
def test_nncf_calls_nobody_either_and_leaves_stdout_alone(tmp_path: Path):
    load(digits_spec("float32"))  # converted
    np.save(tmp_path / "pixels.npy", digits()[:4])
    config = make_job(name=NETWORK, weights=WEIGHTS, transform=TRANSFORM, precision="int8").model_dump_json()
    assert output_of(python(CALIBRATE, config, tmp_path / "pixels.npy", HOME=str(tmp_path))) == ""
    assert not (tmp_path / "intel").exists()


# A network of one's own is converted once per node, too.

OWN = """
import math
import numpy
from torch import nn
from layers import convolution

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.fc = convolution(), nn.Linear(4, 5)
    def forward(self, x):
        return self.fc(self.conv(x).mean((2, 3)))
"""
LAYERS = "from torch import nn\ndef convolution():\n    return nn.Conv2d(3, 4, 3)\n"


def own_spec(folder: Path, text: str = OWN, layers: str = LAYERS, weights: str = "net.pth") -> ModelSpec:
    (folder / "net.py").write_text(text)
    (folder / "layers.py").write_text(layers)
    if not (folder / "net.pth").exists():
        conv, linear = torch.nn.Conv2d(3, 4, 3), torch.nn.Linear(4, 5)
        state = {f"{name}.{key}": value for name, module in (("conv", conv), ("fc", linear))
                 for key, value in module.state_dict().items()}  # fmt: skip
        torch.save(state, folder / "net.pth")
    transform = {"resize": None, "crop": 32}
    return make_spec(make_job(name="net:Net", weights=weights, transform=transform, directory=folder))


def test_a_network_of_ones_own_is_converted_once_per_node(tmp_path: Path, cache: Path):
    spec, pixels = own_spec(tmp_path), digits()[:16]
    expected = hashed(load(spec)(pixels))
    assert len(list((cache / "openvino").iterdir())) == 1
    assert in_a_fresh_process(spec, pixels, tmp_path) == f"{expected} set()"


def test_what_was_made_of_a_network_is_made_anew_when_it_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def key(**changes: str) -> str | None:
        return cache_key(own_spec(tmp_path, **changes), "torch")

    before = key()
    assert before is not None
    assert before == key()
    assert key(layers=LAYERS.replace("3, 4, 3", "3, 4, 3, padding=1")) not in (None, before)
    torch.save({}, tmp_path / "net.pth")
    assert key() not in (None, before)
    for name in ("site", "usersite"):
        before = key()
        folder = tmp_path / name
        (folder / "timm-2.0.dist-info").mkdir(parents=True)
        found = [str(folder)] if name == "site" else str(folder)
        monkeypatch.setattr(f"site.get{name}packages", lambda found=found: found)
        assert key() not in (None, before)


@pytest.mark.parametrize(
    "layers",
    [
        "import beside\n",  # from a folder on the path: who knows what lies there tomorrow
        "import importlib\nbeside = importlib.import_module('beside')\n",
        "channels = int(open('/etc/channels').read())\n",
        "import os\nchannels = os.environ['CHANNELS']\n",
        "import sys\nchannels = int(sys.argv[1])\n",
        "import configparser as settings\nfound = settings.ConfigParser()\n",
        "import pkgutil\nchannels = int(pkgutil.get_data('layers', 'channels'))\n",
        "from zipfile import ZipFile\nfound = ZipFile('/etc/channels.zip')\n",
        "import numpy as h5py\nfound = h5py.File('/etc/channels')\n",
        "import numpy as cv2\nfound = cv2.imread('/etc/channels.png')\n",
        "from scipy.io import loadmat\nfound = loadmat('/etc/channels')\n",
        *(f"import pandas\nfound = pandas.read_{kind}('/etc/channels')\n" for kind in ("json", "parquet", "pickle")),
    ],
)
def test_what_may_change_unseen_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, layers: str):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "beside.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path / "elsewhere")
    assert cache_key(own_spec(tmp_path, layers=layers + LAYERS), "torch") is None


def test_weights_as_the_callable_leaves_them_are_not_kept(tmp_path: Path):
    assert cache_key(own_spec(tmp_path, weights="random"), "torch") is None


def test_the_fingerprint_names_the_calibration(tmp_path: Path):
    before, after = digits_spec("int8"), stored(calibrated(), tmp_path)
    assert before.needs_calibration
    assert not after.needs_calibration
    assert after.identity == before.identity | {"calibration": f"sha256:{hashlib.sha256(calibrated()).hexdigest()}"}
    assert len({before.fingerprint, after.fingerprint, digits_spec("float32").fingerprint}) == 3
    assert json.loads(json.dumps(after.identity)) == after.identity
