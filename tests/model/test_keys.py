"""Which of a checkpoint's keys are the network's."""

from __future__ import annotations

import pytest
import torch
from torchvision.models import resnet18

from pipeline.errors import WeightsError
from pipeline.model.keys import StateDict, match_keys
from pipeline.model.weights import fill, parse
from tests.model.checkpoints import assert_is_the_network, network, prefixed, saved


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


def test_a_network_under_any_one_name_is_found(caplog: pytest.LogCaptureFixture):
    assert_is_the_network(saved({"state_dict": prefixed("cnn.")}))
    assert_is_the_network(saved({"state_dict": prefixed("model.image.trunk.") | {"loss.weight": torch.ones(7)}}))
    assert "left out; 1 beside it: loss.weight" in caplog.text
    with pytest.raises(WeightsError, match=r"hold the network several times, under student\., teacher\."):
        assert_is_the_network(saved({"state_dict": prefixed("student.") | prefixed("teacher.")}))
    with pytest.raises(WeightsError, match="missing in the weights"):
        assert_is_the_network(saved({"state_dict": {f"cnn.{k}": v for k, v in list(prefixed("").items())[3:]}}))


def filled(state: dict[str, torch.Tensor]) -> tuple[torch.nn.Module, str | None]:
    """A network with these weights, and the layer that they lack."""
    other = resnet18(num_classes=7)
    return other, fill(other, match_keys(parse(saved({"state_dict": state}), "a.pth"), other.state_dict()), "a.pth")


@pytest.mark.parametrize("prefix", ["backbone.", "cnn."])
@pytest.mark.parametrize(
    ("name", "shape", "is_head"),
    [
        ("classifier.weight", (10, 7), True),
        ("classifier.weight", (10, 512), True),
        ("teacher.layer4.0.conv1.weight", (512, 1024, 1, 1), False),
        ("head.kernel", (512, 10), True),
        ("classifier.parametrizations.weight.original1", (10, 512), True),
        ("criterion.weight", (7,), False),
        ("criterion.confusion", (3, 3), False),
        ("average.module.fc.weight", (7, 512), False),
        ("teacher.fc.weight", (7, 512), False),
        ("model_ema.fcweight", (7, 512), False),
    ],
)
def test_a_layer_that_may_be_the_trained_head_leaves_no_predictions(
    prefix: str, name: str, shape: tuple[int, ...], is_head: bool, caplog: pytest.LogCaptureFixture
):
    """Lightning, with a whole network as backbone and a layer behind it, or in place of its own; or with a copy."""
    other, lacks = filled(prefixed(prefix) | {name: torch.ones(shape)})
    assert lacks == ("fc" if is_head else None)
    assert (f"{name} may be the head that was trained, so fc is left out" in caplog.text) == is_head
    assert torch.equal(other.state_dict()["conv1.weight"], network().state_dict()["conv1.weight"])


@pytest.mark.parametrize("prefix", ["backbone.", "cnn."])
def test_what_self_supervision_leaves_beside_a_backbone_is_left_out(prefix: str):
    backbone = {key: value for key, value in prefixed(prefix).items() if ".fc." not in key}
    beside = {"projector.0.weight": torch.ones(64, 512), "projector.0.bias": torch.ones(64)}
    assert filled(backbone | beside)[1] == "fc"
    incomplete = {key: value for key, value in backbone.items() if "layer2.0.conv1" not in key}
    with pytest.raises(WeightsError, match="do not fit the network"):
        filled(incomplete | beside)


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


def test_prefixes_that_are_the_networks_own_stay():
    own = {"model.weight", "model.bias"}
    values = {"weight": torch.ones(1), "bias": torch.zeros(1)}
    for prefix in ("model.", "module.model.", "model.model.", "_orig_mod.module.model."):
        state = StateDict({prefix + key: value for key, value in values.items()})
        assert match_keys(state, own).keys() == own
    assert match_keys(StateDict({"module.a": torch.ones(1), "a": torch.ones(1)}), {"a"}).keys() == {"module.a", "a"}


def test_only_a_whole_networks_last_layer_may_be_the_wrong_head():
    """In the order of the network's own layers: a file may have another."""
    own = ["conv.weight", "squeeze.weight", "fc.weight"]
    stored = {
        "fc.weight": torch.ones(7, 32),
        "squeeze.weight": torch.ones(4, 32),
        "conv.weight": torch.ones(32, 3, 3, 3),
    }
    beside = {"head.weight": torch.ones(10, 32)}
    whole = StateDict({f"backbone.{key}": value for key, value in stored.items()} | beside)
    assert match_keys(whole, own).keys() == {"conv.weight", "squeeze.weight"}
    headless = StateDict({key: value for key, value in whole.items() if "fc" not in key})
    assert match_keys(headless, own).keys() == {"conv.weight", "squeeze.weight"}
