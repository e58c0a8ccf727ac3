"""What the model tests share: photographs, a network that tells them apart, a counting file server, fresh processes."""

from __future__ import annotations

import functools
import http.server
import io
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from pipeline.config import JobConfig, make_config
from pipeline.model.spec import ModelSpec
from pipeline.model.zoo import build

ROOT = Path(__file__).parents[2]
SIZE = 112  # pixels; half the usual size keeps the tests short
NUM_CLASSES = 40
PIXELS = np.random.default_rng(0).integers(0, 256, (3, 64, 64, 3), np.uint8)

PRELUDE = """
import torch
from torch import nn
from torch.nn import functional as F

class Base(nn.Module):
    def __init__(self, num_classes=5):
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3, stride=2)
        self.fc = nn.Linear(6, num_classes)
    def features(self, x):
        return F.adaptive_avg_pool2d(F.relu(self.conv(x)), 1).flatten(1)
"""
# A network of one's own, as the text of its module below the prelude.
FUNCTIONAL = """
class Net(Base):
    def forward(self, x):
        return self.fc(self.features(x))
"""


def make_job(*, engine: str = "auto", output: dict[str, Any] | None = None, **model: Any) -> JobConfig:
    """`make_job(name="resnet18", engine="eager", directory=…)`: a config with that model."""
    directory = model.pop("directory", None)
    sections = {"model": model, "output": {"url": "out", **(output or {})}, "runtime": {"engine": engine}}
    return make_config({"input": {"url": "in"}, **sections}, directory)


def computed(spec: ModelSpec, pixels: np.ndarray = PIXELS) -> list[np.ndarray]:
    """Logits and embeddings by the network of a spec, in torch."""
    import torch

    with torch.inference_mode():
        return [rows.numpy() for rows in build(spec)(torch.from_numpy(pixels))]


@functools.cache
def photographs() -> np.ndarray:
    """uint8 (48, 112, 112, 3): three crops of different scale from each of the photographs that skimage ships."""
    from pipeline.examples.photos import load_photos

    rng = np.random.default_rng(0)
    crops = []
    for _, data in load_photos():
        image = Image.open(io.BytesIO(data)).convert("RGB")
        for share in (0.3, 0.6, 1.0):
            side = int(min(image.size) * share)
            left, top = (int(rng.integers(0, length - side + 1)) for length in image.size)
            box = (left, top, left + side, top + side)
            crops.append(np.asarray(image.resize((SIZE, SIZE), Image.Resampling.BILINEAR, box=box)))
    return np.stack(crops)


@functools.cache
def discriminating_state() -> dict[str, Any]:
    """Parameters of a ResNet-18 that predicts many classes: a fresh one predicts the same for every photograph.

    Batch-norm statistics are those of the photographs, and the head is random and centred on their mean embedding.
    """
    import torch
    from torchvision.models import resnet18

    torch.manual_seed(0)
    network = resnet18(num_classes=NUM_CLASSES)
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = None  # the plain average over what it sees
    images = normalised(photographs())
    with torch.no_grad():
        network.train()
        network(images)
        network.eval()
        head, network.fc = network.fc, torch.nn.Identity()
        embeddings = network(images)
        network.fc = head
        torch.nn.init.normal_(head.weight)
        head.bias.copy_(-head.weight @ embeddings.mean(0))
    return network.state_dict()


def normalised(pixels: np.ndarray) -> Any:
    """What torchvision's preset does after cropping: uint8 (N, H, W, 3) to float32 (N, 3, H, W)."""
    import torch
    from torchvision.transforms import functional

    images = torch.stack([functional.to_tensor(image) for image in pixels])
    return functional.normalize(images, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225])


class FileServer(http.server.ThreadingHTTPServer):
    """Serves a folder on loopback, and remembers every download. With a delay, two clients meet."""

    def __init__(self, folder: Path, delay_s: float) -> None:
        super().__init__(("127.0.0.1", 0), functools.partial(_Handler, directory=str(folder)))
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.downloads: list[str] = []
        self.delay_s = delay_s


class _Handler(http.server.SimpleHTTPRequestHandler):
    server: FileServer

    def do_GET(self) -> None:
        self.server.downloads.append(self.path)
        time.sleep(self.server.delay_s)
        path = Path(self.translate_path(self.path))
        wanted = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        if wanted is None or not path.is_file():
            return super().do_GET()
        first, last = int(wanted[1]), min(int(wanted[2]), path.stat().st_size - 1)
        self.send_response(206)
        self.send_header("Content-Range", f"bytes {first}-{last}/{path.stat().st_size}")
        self.send_header("Content-Length", str(last - first + 1))
        self.end_headers()
        self.wfile.write(path.read_bytes()[first : last + 1])
        return None

    def log_message(self, *args: object) -> None:
        pass


def python(code: str, *args: object, **environment: str) -> subprocess.Popen[str]:
    """A fresh interpreter that runs `code` in the repository, with its output captured."""
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, args)],
        cwd=ROOT,
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def output_of(process: subprocess.Popen[str]) -> str:
    stdout, stderr = process.communicate(timeout=120)
    assert process.returncode == 0, stderr
    return stdout.strip()
