"""Networks of your own: their heads and classes found, and those refused whose numbers would be wrong."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline.config import Output
from pipeline.errors import ConfigError, WeightsError
from pipeline.model.source import load_callable
from pipeline.model.spec import make_spec, result_columns
from pipeline.model.zoo import build, cache_key, resolve
from tests.model.helpers import FUNCTIONAL, PIXELS, computed, normalised

HEADS = {
    "functional pooling": (FUNCTIONAL, 6),
    "pooling by mean, differently named head": (
        """
        class Net(Base):
            def __init__(self):
                super().__init__()
                self.zz_first_by_name_last_by_use = nn.Sequential(nn.Dropout(0.5), nn.Linear(6, 5, bias=False))
            def forward(self, x):
                return self.zz_first_by_name_last_by_use(F.relu(self.conv(x)).mean((2, 3)))
        """,
        6,
    ),
    "two linear layers, dropout, the last one defined first": (
        """
        class Net(Base):
            def __init__(self):
                super().__init__()
                self.fc = nn.Linear(9, 5)
                self.hidden = nn.Linear(6, 9)
            def forward(self, x):
                return self.fc(F.dropout(F.relu(self.hidden(self.features(x))), 0.5, self.training))
        """,
        9,
    ),
    "one linear layer used twice": (
        """
        class Net(Base):
            def __init__(self):
                super().__init__()
                self.fc = nn.Linear(6, 6)
            def forward(self, x):
                return self.fc(input=F.relu(self.fc(self.features(x))))
        """,
        6,
    ),
    "an unused linear layer and work after the head": (
        """
        class Net(Base):
            def __init__(self):
                super().__init__()
                self.unused = nn.Linear(3, 3)
                self.scale = 2.0
            def forward(self, x):
                return self.fc(self.features(x)) * self.scale
        """,
        6,
    ),
}


@pytest.mark.parametrize("case", HEADS)
def test_the_embedding_is_the_input_of_the_last_linear_layer(custom, case: str):
    text, width = HEADS[case]
    spec = custom(text)
    network = build(spec)
    with torch.inference_mode():
        logits, embeddings = network(torch.from_numpy(PIXELS))
        head = network.head.linear
        expected = torch.nn.functional.linear(embeddings, head.weight, head.bias)
    assert embeddings.shape == (3, width) == (3, resolve(spec).embedding_dim)
    torch.testing.assert_close(logits, expected * getattr(network.body, "scale", 1.0))
    assert len({row.tobytes() for row in embeddings.numpy()}) == 3


@pytest.mark.parametrize(
    ("forward", "message"),
    [
        ("return self.features(x)", "executes no nn.Linear, so it has no pooled embedding"),
        ("return F.linear(self.features(x), self.fc.weight)", "executes no nn.Linear"),
        ("return self.fc(self.features(x)).unsqueeze(1)", r"returns the shape \(2, 1, 5\) for 2 images"),
        (
            "return self.fc(self.conv(x).flatten(2).mT).mean(1)",
            r"gives its last nn.Linear, fc, the shape \(2, 961, 6\)",
        ),
        ("return {'logits': self.fc(self.features(x))}", "returns a dict for 2 images"),
        ("return self.fc(self.features(x))[:1]", r"returns the shape \(1, 5\) for 2 images"),
        (
            "raise KeyError('broken')",
            "does not run on images of 64 pixels: 'broken'. Set model.transform.resize and model.transform.crop",
        ),
        ("return self.fc(nn.Conv2d(1, 6, 3)(x).mean((2, 3)))", "It must take 3 channels, for images are RGB"),
    ],
)
def test_networks_without_logits_or_embedding_are_refused(custom, forward: str, message: str):
    spec = custom(f"class Net(Base):\n    def forward(self, x):\n        {forward}\n")
    with pytest.raises(ConfigError, match=message):
        build(spec)


def test_a_custom_networks_class_count(custom, tmp_path: Path):
    assert resolve(custom(FUNCTIONAL)).num_classes == 5
    assert resolve(custom(FUNCTIONAL, num_classes=8)).num_classes == 8
    assert resolve(custom(FUNCTIONAL, classes=["a", "b"])).num_classes == 2
    through = FUNCTIONAL + "\ndef make(**options):\n    return Net(**options)\n"
    assert resolve(custom(through, "net:make", num_classes=8)).num_classes == 8
    fixed = FUNCTIONAL + "\ndef make():\n    return Net()\n"
    with pytest.raises(ConfigError, match=r"model.num_classes is 8, but the network net:make has 5 classes"):
        resolve(custom(fixed, "net:make", num_classes=8))
    state = {"conv.weight": torch.rand(6, 3, 3, 3), "conv.bias": torch.rand(6)}
    torch.save(state | {"fc.weight": torch.rand(3, 6), "fc.bias": torch.rand(3)}, tmp_path / "three.pth")
    assert resolve(custom(FUNCTIONAL, weights="three.pth")).num_classes == 3
    with pytest.raises(WeightsError, match=r"of another shape: fc.weight"):
        resolve(custom(fixed, "net:make", weights="three.pth"))


def test_a_callable_that_must_be_told_its_classes_is_told_those_of_the_checkpoint(custom, tmp_path: Path):
    state = {"conv.weight": torch.rand(6, 3, 3, 3), "conv.bias": torch.rand(6)}
    torch.save(state | {"fc.weight": torch.rand(3, 6), "fc.bias": torch.rand(3)}, tmp_path / "three.pth.tar")
    must = FUNCTIONAL + "\ndef make(num_classes):\n    return Net(num_classes)\n"
    assert resolve(custom(must, "net:make", weights="three.pth.tar")).num_classes == 3
    assert resolve(custom(must, "net:make", weights="three.pth.tar", num_classes=3)).num_classes == 3


def test_weights_are_in_place_before_a_network_derives_anything_from_them(custom, tmp_path: Path):
    text = """
        class Net(Base):
            def __init__(self):
                super().__init__()
                self.more = nn.Parameter(torch.ones(5, 6))
                self.cached = None
            def train(self, mode=True):
                if not mode and self.training:
                    self.fc.weight.data += self.more.data
                return super().train(mode)
            def forward(self, x):
                if self.cached is None:
                    self.cached = F.normalize(self.more)
                return self.fc(self.features(x)) + self.cached.sum()
    """
    state = {"conv.weight": torch.rand(6, 3, 3, 3), "conv.bias": torch.rand(6), "more": torch.rand(5, 6)}
    torch.save(state | {"fc.weight": torch.rand(5, 6), "fc.bias": torch.rand(5)}, tmp_path / "net.pth")
    spec = custom(text, weights="net.pth")
    body = load_callable(spec.source)()
    body.load_state_dict(torch.load(tmp_path / "net.pth"))
    with torch.inference_mode():
        expected = body.eval()(normalised(PIXELS))
    np.testing.assert_allclose(computed(spec)[0], expected.numpy(), rtol=1e-5)


@pytest.mark.parametrize("wrap", ["nn.DataParallel", "torch.compile"])
def test_what_parallelises_or_compiles_a_network_is_taken_off(custom, tmp_path: Path, wrap: str):
    torch.save(build(custom(FUNCTIONAL)).body.state_dict(), tmp_path / "net.pth")
    spec = custom(f"{FUNCTIONAL}\ndef make():\n    return {wrap}(Net())\n", "net:make", weights="net.pth")
    assert type(build(spec).body).__name__ == "Net"


def test_random_weights_are_the_same_everywhere_whoever_draws_them(custom):
    spec = custom("""
        import random
        import numpy as np
        def Net():
            net = Base()
            net.conv.weight.data *= random.random()
            net.conv.bias.data = torch.from_numpy(np.random.randn(6)).float()
            net.forward = lambda x: net.fc(net.features(x))
            return net
    """)
    before = np.random.get_state()[1].tolist()
    one, other = computed(spec), computed(spec)
    assert np.array_equal(one[0], other[0])
    assert np.random.get_state()[1].tolist() == before


def test_a_network_that_fails_with_other_images_is_refused(custom):
    text = """
        class Net(Base):
            def forward(self, x):
                if x.std() > 0.1:
                    return x.mean((1, 2))
                return self.fc(self.features(x))
    """
    with pytest.raises(ConfigError, match="net:Net fails with three images of noise.*fc, its last nn.Linear, was not"):
        resolve(custom(text))


def test_the_classes_of_a_head_whose_weight_is_stored_in_two_parts(custom, tmp_path: Path):
    text = """
        class Net(Base):
            def __init__(self, num_classes=5):
                super().__init__(num_classes)
                nn.utils.parametrizations.weight_norm(self.fc)
            def forward(self, x):
                return self.fc(self.features(x))
    """
    torch.save(build(custom(text, num_classes=3)).body.state_dict(), tmp_path / "net.pth")
    assert resolve(custom(text, weights="net.pth")).num_classes == 3


def test_what_a_network_keeps_of_a_run_is_not_that_of_the_search_for_its_head(custom):
    text = """
        class Net(Base):
            kept = None
            def forward(self, x):
                if self.kept is None:
                    self.kept = x.mean()
                return self.fc(self.features(x) + self.kept)
    """
    assert build(custom(text)).body.kept is None


def test_of_several_sizes_that_counts_which_gives_a_row_for_each_image(custom):
    text = """
        class Net(Base):
            def forward(self, x):
                return self.fc(F.avg_pool2d(self.conv(x), 15).reshape(-1, 6))
    """
    spec = custom(text, transform={"resize": None, "crop": None})
    assert build(spec).head.input_size == 32
    with pytest.raises(ValueError, match="rows of logits and .* of 3 images"):
        computed(spec)


@pytest.mark.parametrize(
    "line",
    ["x = F.dropout(x, 0.5)", "x = (x - x.mean(0)) / x.std(0)"],
    ids=lambda line: line[4:13],
)
def test_rows_that_depend_on_their_neighbours_or_on_chance_are_refused(custom, line: str):
    text = "class Net(Base):\n    def forward(self, x):\n        x = self.features(x)\n        {}\n        return self.fc(x)\n"
    assert resolve(custom(text.format("pass"))).num_classes == 5
    with pytest.raises(ConfigError, match=r"other numbers beside other images, or by chance"):
        resolve(custom(text.format(line)))


def test_a_last_linear_layer_that_is_no_head_is_said(custom, caplog: pytest.LogCaptureFixture):
    text = """
        class Net(Base):
            def forward(self, x):
                x = F.relu(self.conv(x))
                x = x * torch.sigmoid(self.fc(x.mean((2, 3)))).mean(1)[:, None, None, None]
                return x.mean((2, 3)) @ torch.ones(6, 7)
    """
    assert resolve(custom(text)).num_classes == 7
    assert "the embedding is what fc is given, the last nn.Linear that net:Net executes" in caplog.text
    caplog.clear()
    resolve(custom(FUNCTIONAL))
    assert caplog.text == ""


def test_one_class_is_no_prediction(custom):
    info = resolve(custom(FUNCTIONAL, num_classes=1))
    with pytest.raises(ConfigError, match=r"one class, so every image would be of it.*output.predictions=false"):
        result_columns(Output(url="out"), info)
    assert result_columns(Output(url="out", predictions=False), info).embedding_dim == 6


def test_a_backbone_stored_without_its_head_gives_embeddings_alone(custom, tmp_path: Path):
    """As self-supervised ones are. What lacks another layer fits nothing."""
    two_layers = """
        class Net(Base):
            def __init__(self, num_classes=5):
                super().__init__(num_classes)
                self.hidden = nn.Linear(6, 6)
            def forward(self, x):
                return self.fc(self.hidden(self.features(x)))
    """
    whole = build(custom(two_layers, num_classes=3)).body
    state = whole.state_dict()
    torch.save({key: value for key, value in state.items() if not key.startswith("fc.")}, tmp_path / "backbone.pth")
    spec = custom(two_layers, weights="backbone.pth")
    info = resolve(spec)
    with pytest.raises(ConfigError, match=r"those of a backbone, without the head.*output.predictions=false"):
        result_columns(Output(url="out"), info)
    assert result_columns(Output(url="out", predictions=False), info).embedding_dim == 6
    with torch.inference_mode():
        expected = whole.hidden(whole.features(normalised(PIXELS)))
    np.testing.assert_allclose(computed(spec)[1], expected.numpy(), rtol=1e-5, atol=1e-6)
    assert np.array_equal(computed(spec)[0], computed(spec)[0])

    torch.save({key: value for key, value in state.items() if not key.startswith("hidden.")}, tmp_path / "torn.pth")
    with pytest.raises(WeightsError, match=r"2 missing in the weights: hidden.weight, hidden.bias\. Check"):
        resolve(custom(two_layers, weights="torn.pth"))
    torch.save({key: value for key, value in state.items() if key != "fc.bias"}, tmp_path / "torn.pth")
    with pytest.raises(WeightsError, match=r"1 missing in the weights: fc.bias\. Check"):
        resolve(custom(two_layers, weights="torn.pth", num_classes=3))


@pytest.mark.parametrize("line", ["F.relu(self.fc(f))", "F.layer_norm(self.fc(f), (6,))", "f @ self.fc.weight"])
def test_a_head_that_the_embedding_is_made_with_may_not_be_missing(custom, tmp_path: Path, line: str):
    text = """
        class Net(Base):
            def __init__(self):
                super().__init__(6)
            def forward(self, x):
                f = self.features(x)
                return self.fc({})
    """
    state = build(custom(text.format("f"))).body.state_dict()
    torch.save({key: state[key] for key in ("conv.weight", "conv.bias")}, tmp_path / "backbone.pth")
    assert not resolve(custom(text.format("f"), weights="backbone.pth")).has_head
    with pytest.raises(WeightsError, match="2 missing in the weights: fc.weight, fc.bias"):
        resolve(custom(text.format(line), weights="backbone.pth"))


def test_probabilities_are_no_logits(custom):
    text = """
        class Net(Base):
            def forward(self, x):
                return {}
    """
    info = resolve(custom(text.format("self.fc(self.features(x)).softmax(1)")))
    with pytest.raises(ConfigError, match=r"probabilities where logits are needed.*output.predictions=false"):
        result_columns(Output(url="out"), info)
    assert result_columns(Output(url="out", predictions=False), info).embedding_dim == 6
    for logits in ("self.fc(self.features(x))", "self.fc(self.features(x)).log_softmax(1)"):
        assert result_columns(Output(url="out"), resolve(custom(text.format(logits)))).top_k


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("raise KeyError('A_VARIABLE')\ndef Net():\n    pass", "cannot import net:Net on this node: .*A_VARIABLE"),
        ("def Net():\n    return nn.Sequential(nn.Flatten(), nn.LazyLinear(3))", "has lazy layers"),
        (
            "raise SystemExit(2)\ndef Net(): ...",
            "its module ends the process as it is imported.*__name__ == '__main__'",
        ),
        ("def Net():\n    raise SystemExit(2)", r"net:Net ends the process as it is called \(argparse\?\)"),
        ("def Net(depth):\n    return Base()", "calling net:Net failed with TypeError: .*missing 1 required"),
        ("def Net():\n    return 3", "returned a int, not an nn.Module"),
        ("def Net():\n    return Base().no_such", "calling net:Net failed with AttributeError"),
        ("def Net():\n    open('own.pth')", "FileNotFoundError: .*own.pth.*only Python's travel.*model.weights"),
    ],
)
def test_callables_that_give_no_network_are_refused(custom, text: str, message: str):
    with pytest.raises(ConfigError, match=message):
        build(custom(text))


def test_dropout_and_batch_norm_are_in_inference_mode(custom):
    text = """
        def Net():
            layers = nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout()
            return nn.Sequential(*layers, nn.Linear(6, 5)).train()
    """
    spec = custom(text)
    network = build(spec)
    assert int(network.body[1].num_batches_tracked) == 0  # looking for the head has trained nothing
    assert np.array_equal(computed(spec)[0], computed(spec)[0])


@pytest.mark.parametrize(
    ("mean", "std"), [(None, None), ([0.5] * 3, None), (None, [0.25] * 3), ([0.1, 0.2, 0.3], [1.0] * 3)]
)
def test_normalisation_belongs_to_the_network(custom, mean, std):
    text = "def Net():\n    return nn.Sequential(nn.Flatten(), nn.Linear(3 * 64 * 64, 2))"
    spec = custom(text, transform={"resize": None, "crop": 64, "mean": mean, "std": std})
    expected = PIXELS.astype(np.float32).transpose(0, 3, 1, 2) / 255
    expected = (expected - np.reshape(mean or [0] * 3, (3, 1, 1))) / np.reshape(std or [1] * 3, (3, 1, 1))
    np.testing.assert_allclose(computed(spec)[1], expected.reshape(3, -1), atol=1e-6)


def test_without_a_size_the_network_is_tried_at_several(custom):
    """One that takes 32 pixels alone, as CIFAR networks with fixed pooling do."""
    text = "def Net():\n    return nn.Sequential(nn.Conv2d(3, 4, 1), nn.AvgPool2d(32), nn.Flatten(), nn.Linear(4, 5))"
    network = build(custom(text, transform={"resize": None, "crop": None}))
    assert (network.head.input_size, network.head.embedding_dim) == (32, 4)


def test_what_can_change_unseen_is_not_remembered(custom, job, cache: Path):
    spec = custom(FUNCTIONAL)
    resolve(spec)
    assert cache_key(spec, "torch") is None
    assert not (cache / "info").exists()
    own = make_spec(job(name="pipeline.examples.network:digits_resnet20", weights="random"))
    assert cache_key(own, "torch") != cache_key(make_spec(job(weights="random")), "torch")
