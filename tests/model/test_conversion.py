"""Networks of your own in OpenVINO, in channels_last and in reduced precision: torch's numbers, or refused."""

from __future__ import annotations

import pickle
import textwrap
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline.errors import ConfigError, FatalError, WeightsError
from pipeline.model.engines import OutOfMemory, Unconvertible, find_engine, load_engine
from pipeline.model.openvino_engine import OpenVinoEngine, _agree, converted
from pipeline.model.zoo import build, resolve
from tests.model.helpers import FUNCTIONAL, PIXELS, computed, normalised, output_of, python


@pytest.mark.parametrize("engine", ["eager", "openvino"])
def test_networks_that_view_their_maps_as_they_lie_in_memory(custom, engine: str):
    spec = custom("""
        def Net():
            class View(nn.Module):
                def forward(self, x):
                    return x.view(x.size(0), -1)
            return nn.Sequential(nn.Conv2d(3, 6, 3, stride=16), nn.ReLU(), View(), nn.Linear(96, 5))
    """)
    assert resolve(spec).embedding_dim == 96
    found = load_engine(engine, spec, resolve(spec), "cpu", 3)(PIXELS)
    for rows, expected in zip(found, computed(spec), strict=True):
        np.testing.assert_allclose(rows, expected, rtol=1e-4, atol=1e-4)
    body = build(spec).body
    with torch.inference_mode():
        plain = body(normalised(PIXELS))
    np.testing.assert_allclose(found[0], plain.numpy(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "forward",
    [
        "return self.fc(self.features(x).view(len(x), -1))",
        "y = self.conv(x)\n        return self.fc(y.view(len(x), 6, -1).mean(2))",
    ],
)
def test_a_number_of_images_that_tracing_froze_is_noticed(custom, forward: str):
    spec = custom(f"class Net(Base):\n    def forward(self, x):\n        {forward}\n")
    with pytest.raises(ConfigError, match="OpenVINO does not compute what torch does .* the number of the images"):
        load_engine("openvino", spec, resolve(spec), "cpu", 8)
    assert np.isfinite(load_engine("eager", spec, resolve(spec), "cpu", 3)(PIXELS)[0]).all()


@pytest.mark.parametrize(
    ("forward", "size"),
    [
        ("x = F.avg_pool2d(x, x.size()[3])", None),
        ("x = x - x.mean((2, 3), keepdim=True) if x.mean() > 0.3 else x", 64),
    ],
    ids=["pools by its size", "depends on brightness"],
)
def test_what_tracing_froze_besides_is_noticed_as_well(custom, forward: str, size: int | None):
    before, after = ("F.relu(self.conv(x))", "x") if size is None else ("x", "self.conv(x)")
    text = f"""
        class Net(Base):
            def forward(self, x):
                x = {before}
                {forward}
                return self.fc({after}.mean((2, 3)))
    """
    spec = custom(text, transform={"resize": None, "crop": size})
    with pytest.raises(ConfigError, match="OpenVINO does not compute what torch does"):
        load_engine("openvino", spec, resolve(spec), "cpu", 8)


@pytest.mark.parametrize(
    "body",
    [
        "return self.fc(F.avg_pool2d(y.clamp(min=1e-6) ** 3, (y.size(-2), y.size(-1))).flatten(1))",
        "return self.fc(F.adaptive_avg_pool2d(F.group_norm(y, 2), 1).flatten(1))",
    ],
    ids=["generalised mean", "group norm"],
)
def test_networks_that_need_their_size_to_be_converted(custom, body: str):
    text = f"class Net(Base):\n    def forward(self, x):\n        y = F.relu(self.conv(x))\n        {body}\n"
    spec = custom(text)
    found = load_engine("openvino", spec, resolve(spec), "cpu", 3)(PIXELS)
    for rows, expected in zip(found, computed(spec), strict=True):
        np.testing.assert_allclose(rows, expected, rtol=1e-4, atol=1e-4)


def test_a_resnet_with_group_norms_is_compiled(custom):
    """In a process of its own: OpenVINO crashed."""
    text = "def make():\n    from torchvision.models import resnet18\n    return resnet18(norm_layer=lambda c: nn.GroupNorm(32, c))"
    spec = custom(text, "net:make")
    code = """
import pickle, sys
from pipeline.model.engines import OutOfMemory, Unconvertible, load_engine
from pipeline.model.zoo import resolve
spec = pickle.loads(bytes.fromhex(sys.argv[1]))
print(load_engine("openvino", spec, resolve(spec), "cpu", 2).streams)
"""
    assert output_of(python(code, pickle.dumps(spec).hex())) == "2"


@pytest.mark.parametrize("precision", ["half", "double"])
def test_a_network_in_another_precision_is_computed_in_float32(custom, precision: str):
    spec = custom(f"def make():\n    return Net().{precision}()\n{FUNCTIONAL}", "net:make")
    assert computed(spec)[0].dtype == np.float32


def test_a_network_that_minds_its_precision_itself_is_left_alone(custom):
    text = """
        class Net(Base):
            def forward(self, x):
                return self.fc(self.features(x.double())).float()
        def make():
            return Net().double()
    """
    assert next(build(custom(text, "net:make")).body.parameters()).dtype == torch.float64


def test_a_network_that_looks_at_how_its_weights_lie_runs_as_it_is(custom, caplog: pytest.LogCaptureFixture):
    text = """
        class Net(Base):
            def forward(self, x):
                weight = self.conv.weight / self.conv.weight.view(6, -1).std(dim=1).view(-1, 1, 1, 1)
                return self.fc(F.conv2d(x, weight, self.conv.bias, stride=2).mean((2, 3)))
    """
    spec = custom(text)
    logits, _ = load_engine("eager", spec, resolve(spec), "cpu", 3)(PIXELS)
    np.testing.assert_allclose(logits, computed(spec)[0], rtol=1e-5)
    assert "net:Net is computed as it is" in caplog.text


@pytest.mark.parametrize(
    "line",
    [
        "assert self.conv.weight.is_contiguous(), 'not as it was'",
        "x = x if self.conv.weight.is_contiguous() else [].no_such",
        "x = x if self.conv.weight.is_contiguous() else F.relu(None)",
    ],
)
def test_whatever_a_network_raises_about_how_its_weights_lie_it_runs_as_it_is(custom, caplog, line: str):
    spec = custom(f"""
        class Net(Base):
            def forward(self, x):
                {line}
                return self.fc(self.features(x))
    """)
    logits, _ = load_engine("eager", spec, resolve(spec), "cpu", 3)(PIXELS)
    np.testing.assert_allclose(logits, computed(spec)[0], rtol=1e-5)
    assert "net:Net is computed as it is" in caplog.text


def test_a_network_that_does_not_run_where_it_must_is_a_sentence(custom):
    """As one that makes its tensors on the CPU does on a GPU: it is built and tried on a CPU, in float32."""
    text = """
        class Net(Base):
            def forward(self, x):
                assert not torch.is_autocast_enabled("cpu"), "not on this device"
                return self.fc(self.features(x))
    """
    spec = custom(text, precision="bfloat16")
    with pytest.raises(FatalError, match=r"net:Net does not run on cpu in bfloat16: .*not on this device.*its tensors"):
        load_engine("eager", spec, resolve(spec), "cpu", 3)


@pytest.mark.parametrize("engine", ["eager", "compile"])
def test_a_device_in_trouble_is_not_taken_for_the_networks_fault(custom, engine: str):
    """Neither is it said to be, nor is the network tried again as it is: another day may do better."""
    text = """
        class Net(Base):
            tried = 0
            def forward(self, x):
                if torch.is_autocast_enabled("cpu"):
                    Net.tried += 1
                    raise torch.AcceleratorError(f"CUDA error: device busy, {Net.tried}")
                return self.fc(self.features(x))
    """
    spec = custom(text, precision="bfloat16")
    with pytest.raises(torch.AcceleratorError, match="device busy, 1$"):
        load_engine(engine, spec, resolve(spec), "cpu", 3)


def test_memory_that_does_not_suffice_is_no_reason_to_load_a_network_again(custom):
    spec = custom("""
        class Net(Base):
            def forward(self, x):
                if not self.conv.weight.is_contiguous():
                    raise torch.OutOfMemoryError("none left")
                return self.fc(self.features(x))
    """)
    with pytest.raises(OutOfMemory, match="none left"):
        load_engine("eager", spec, resolve(spec), "cpu", 3)


def test_networks_that_squeeze_a_single_image(custom):
    spec = custom("""
        class Net(Base):
            def forward(self, x):
                return self.fc(F.adaptive_avg_pool2d(self.conv(x), 1).squeeze())
    """)
    for size in (1, 3):
        found = load_engine("eager", spec, resolve(spec), "cpu", size)(PIXELS[:size])
        for rows, expected in zip(found, computed(spec), strict=True):
            np.testing.assert_allclose(rows, expected[:size], rtol=1e-4, atol=1e-5)
    with pytest.raises(Unconvertible, match=r"With runtime.engine=eager it is computed\."):
        load_engine("openvino", spec, resolve(spec), "cpu", 1)
    with pytest.raises(Unconvertible, match=r"In int8 nothing else computes it: use another model.precision\."):
        converted(replace(spec, precision="int8"))


def test_weights_that_cannot_lie_in_channels_last_are_left_as_they_are(custom, caplog: pytest.LogCaptureFixture):
    spec = custom("""
        class Net(Base):
            def __init__(self):
                super().__init__()
                self.experts = nn.Parameter(torch.rand(4, 6, 3, 3, 3))
            def forward(self, x):
                return self.fc(F.conv2d(x, self.experts.mean(0), stride=2).mean((2, 3)))
    """)
    logits, _ = load_engine("eager", spec, resolve(spec), "cpu", 3)(PIXELS)
    np.testing.assert_allclose(logits, computed(spec)[0], rtol=1e-5)
    assert "net:Net is computed as it is" in caplog.text


def test_a_network_that_asserts_its_size_is_converted_for_that(custom):
    text = """
        class Net(Base):
            def forward(self, x):
                assert x.shape[2] == x.shape[3] == 224
                return self.fc(self.features(x))
    """
    spec = custom(text, transform={"resize": None, "crop": None})
    assert load_engine("openvino", spec, resolve(spec), "cpu", 1).streams == 1


def test_weights_that_have_diverged_are_not_blamed_on_openvino(custom, tmp_path: Path):
    state = {"conv.weight": torch.rand(6, 3, 3, 3), "conv.bias": torch.full((6,), torch.nan)}
    torch.save(state | {"fc.weight": torch.rand(3, 6), "fc.bias": torch.rand(3)}, tmp_path / "nan.pth")
    spec = custom(FUNCTIONAL, weights="nan.pth")
    with pytest.raises(WeightsError, match=r"not finite, in torch as well: its weights .*nan.pth"):
        load_engine("openvino", spec, resolve(spec), "cpu", 1)


@pytest.mark.parametrize("odd", ["(y - y) / (y - y)", "1 / (y - y)"], ids=["not a number", "infinite"])
def test_a_network_whose_numbers_are_not_finite_for_some_images_is_used(custom, odd: str):
    """By the engine that agrees with torch on the others, or by torch: the image becomes an error row."""
    spec = custom(f"""
        class Net(Base):
            def forward(self, x):
                y = self.features(x)
                return self.fc(torch.where((x.mean((1, 2, 3)) > 0.7)[:, None], {odd}, y))
    """)
    pixels = PIXELS.copy()
    pixels[1] = 250
    expected = computed(spec, pixels)
    assert np.isfinite(expected[0]).all(axis=1).tolist() == [True, False, True]
    found = load_engine(find_engine("auto", "cpu", spec), spec, resolve(spec), "cpu", 3)(pixels)
    for rows, wanted in zip(found, expected, strict=True):
        assert (np.isfinite(rows) == np.isfinite(wanted)).all()
        np.testing.assert_allclose(rows[[0, 2]], wanted[[0, 2]], rtol=1e-4, atol=1e-4)


def test_a_network_that_openvino_finds_finite_where_torch_does_not_is_left_to_torch(custom, monkeypatch):
    """A row that is an error row by one engine is one by the other."""
    spec = custom("""
        class Net(Base):
            def forward(self, x):
                y = self.features(x)
                return self.fc(torch.where((x.mean((1, 2, 3)) > 0.7)[:, None], (y - y) / (y - y), y))
    """)
    compute = OpenVinoEngine.__call__
    monkeypatch.setattr(OpenVinoEngine, "__call__", lambda *call: [np.nan_to_num(rows) for rows in compute(*call)])
    with pytest.raises(Unconvertible, match="OpenVINO does not compute what torch does"):
        converted(spec)
    assert find_engine("auto", "cpu", spec) == "eager"


NAN, INF = np.nan, np.inf


@pytest.mark.parametrize(
    ("found", "wanted", "agrees"),
    [
        ([1, NAN], [1, NAN], True),
        ([1, INF], [1, NAN], True),
        ([1, NAN], [1, 2], False),
        ([1, 2], [1, NAN], False),
        ([NAN, 1], [1, NAN], False),
        ([2, NAN], [1, NAN], False),
        ([1.0001, 5, NAN], [1, 5, INF], True),
        ([NAN, INF], [INF, NAN], True),
        ([NAN], [1], False),
        ([1, 2], [1], False),
    ],
)
def test_numbers_agree_that_are_finite_in_the_same_places(found: list[float], wanted: list[float], agrees: bool):
    assert _agree(np.array([found], np.float32), np.array([wanted], np.float32)) is agrees


def test_heads_that_switch_autocast_off_run_in_reduced_precision(custom):
    spec = custom(
        """
        class Net(Base):
            def forward(self, x):
                x = self.features(x)
                with torch.autocast("cpu", enabled=False):
                    return self.fc(x.float())
        """,
        precision="bfloat16",
    )
    logits, _ = load_engine("eager", spec, resolve(spec), "cpu", 3)(PIXELS)
    np.testing.assert_allclose(logits, computed(spec)[0], atol=0.05)


def test_what_a_networks_code_sets_for_training_does_not_hold_for_its_results(custom):
    text = """
        def hasten():
            torch.backends.cudnn.allow_tf32 = torch.backends.cudnn.benchmark = True
            torch.backends.cudnn.deterministic = False
            torch.backends.mkldnn.conv.fp32_precision = "bf16"
            torch.backends.cudnn.fp32_precision = "tf32"
            torch.backends.cuda.matmul.allow_fp16_accumulation = True
            torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = True
            torch.set_float32_matmul_precision("medium")
            torch.set_num_threads(3)
        hasten()
        def make():
            hasten()
            return Net()
    """
    spec = custom(textwrap.dedent(text) + FUNCTIONAL, "net:make")
    info = resolve(spec)
    for engine in ("openvino", "eager"):  # which is what compile begins with
        load_engine(engine, spec, info, "cpu", 3)
        cudnn = torch.backends.cudnn
        assert engine == "openvino" or torch.get_num_threads() == 2
        assert torch.get_float32_matmul_precision() == "highest"
        assert (cudnn.allow_tf32, cudnn.benchmark, cudnn.deterministic) == (False, False, True)
        assert torch.backends.mkldnn.conv.fp32_precision == "none"
        matmul = torch.backends.cuda.matmul
        assert not matmul.allow_fp16_accumulation
        assert not matmul.allow_bf16_reduced_precision_reduction
        assert not matmul.allow_fp16_reduced_precision_reduction
