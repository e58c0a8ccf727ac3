"""Checkpoints as training scripts leave them."""

from __future__ import annotations

import argparse
import collections
import datetime
import pathlib

import numpy as np
import pytest
import torch
from safetensors.torch import save
from torchvision.models import resnet18

from pipeline.errors import WeightsError
from pipeline.model.keys import match_keys
from pipeline.model.weights import fill, parse
from tests.model.checkpoints import assert_is_the_network, network, saved

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


UTC = datetime.UTC
BESIDE = {
    "numbers": np.arange(6.0).reshape(2, 3),
    "none": np.array([]),
    "texts": np.array(["a", "b"]),
    "records": np.zeros(2, dtype=[("loss", "f4"), ("at", "M8[s]")]),
    "paths": argparse.Namespace(out=pathlib.PosixPath("/out"), data=[pathlib.PureWindowsPath("c:/data")]),
    "by name": {pathlib.PurePosixPath("a"): 1},
    "groups": [
        collections.defaultdict(kind, {"a": kind()}) for kind in (list, int, float, dict, set, str, bool, bytes)
    ],
    "nested": collections.defaultdict(list, a=[collections.defaultdict(int, b=1)]),
    "last": collections.deque([1, np.ones(2)], maxlen=3),
    "classes": frozenset(["a"]),
    "kinds": argparse.Namespace(type=int, container=list),
    "times": [
        datetime.datetime(2026, 1, 2, tzinfo=UTC),
        datetime.date(2026, 1, 2),
        datetime.time(3),
        datetime.datetime.max,
    ],
    "spans": (datetime.timedelta(days=1), datetime.timezone(datetime.timedelta(hours=1), "X")),
}


@pytest.mark.parametrize("is_zip", [True, False])
@pytest.mark.parametrize("beside", BESIDE)
def test_what_cannot_run_code_may_lie_beside_the_tensors(beside: str, is_zip: bool):
    checkpoint = {beside: BESIDE[beside], "state_dict": network().state_dict(), "after": BESIDE[beside]}
    assert_is_the_network(saved(checkpoint, _use_new_zipfile_serialization=is_zip))


def test_other_releases_spellings_of_what_lies_beside():
    """Of numpy 1, and of Python 3.13; protocol 2 stores a global's name as a line, so its length may change."""
    beside = {"history": np.ones(3), "path": pathlib.PosixPath("/out"), "windows": pathlib.PurePosixPath("c:/out")}
    data = saved({"state_dict": network().state_dict(), **beside}, _use_new_zipfile_serialization=False)
    for before, after in (
        (b"cnumpy._core.multiarray\n", b"cnumpy.core.multiarray\n"),
        (b"cpathlib\nPosixPath\n", b"cpathlib._local\nPosixPath\n"),
        (b"cpathlib\nPurePosixPath\n", b"cpathlib\nWindowsPath\n"),
    ):
        assert before in data
        data = data.replace(before, after)
    assert_is_the_network(data)


def test_a_network_may_lie_in_a_container_with_a_default():
    assert_is_the_network(saved(collections.defaultdict(dict, state_dict=network().state_dict())))


@pytest.mark.parametrize(
    "checkpoint",
    [
        lambda state: {"params": state, "iteration": 3},
        lambda state: {"params_ema": state},
        lambda state: {"ema": {"module": state}, "epoch": torch.tensor(3)},
        lambda state: {"state": state, "loss": torch.tensor(0.1), "rng": {"torch": torch.ones(9, dtype=torch.uint8)}},
        lambda state: {"classifier": state, **TRAINING},
        lambda state: {
            "classifier": dict(state),
            "loss": torch.tensor(0.1),
            "names": {},
            "scale": {"a": torch.ones(())},
        },
        lambda state: {**state, "ema": {"fc.bias": torch.zeros(7)}, "discriminator": {"a": torch.ones(1)}},
        lambda state: {"model": state, "ema": {"fc.bias": torch.zeros(7)}, "params": {"fc.bias": torch.zeros(7)}},
        lambda state: {"model": {"loss": torch.tensor(1)}, "params": state},
    ],
)
def test_other_wrappers_where_only_one_can_be_meant(checkpoint):
    assert_is_the_network(saved(checkpoint(network().state_dict())))


@pytest.mark.parametrize(
    ("keys", "named"),
    [
        (("params", "params_ema"), "params, params_ema"),
        (("params", "state"), "params, state"),
        (("generator", "discriminator"), "generator, discriminator"),
        (("generator", "ema"), "generator, ema"),
    ],
)
def test_where_several_networks_may_be_meant_their_keys_are_named(keys: tuple[str, ...], named: str):
    state = network().state_dict()
    with pytest.raises(WeightsError, match=f"net.pth holds tensors under several keys, {named}, any .* key state_dict"):
        parse(saved(dict.fromkeys(keys, state) | TRAINING), "net.pth")


def test_an_optimizers_tensors_are_no_network():
    optimizer = torch.optim.SGD(torch.nn.Linear(2, 2).parameters(), momentum=0.9)
    optimizer.state[optimizer.param_groups[0]["params"][0]]["momentum_buffer"] = torch.ones(2, 2)
    for checkpoint in ({"epoch": 3, "optimizer": optimizer.state_dict()}, optimizer.state_dict()):
        with pytest.raises(WeightsError, match="holds no state_dict, but the entries "):
            parse(saved(checkpoint), "net.pth")


@pytest.mark.parametrize("kept", [np.ones(2), {"a": [pathlib.PosixPath("a")]}, argparse.Namespace(kind=list)])
def test_a_module_is_given_nothing_else_than_it_has_stored(kept: object):
    """What lies beside tensors is forgotten, so it is refused where it is wanted."""
    state = {"fc.weight": torch.ones(2), "fc._extra_state": kept}
    with pytest.raises(WeightsError, match=r"holds pickled objects .* given as fc\._extra_state\.$"):
        parse(saved({"state_dict": state}), "net.pth")
    round_and_round: list[object] = [1, np.float64(0.5), {"a": (torch.ones(3),)}]
    round_and_round.append(round_and_round)
    state["fc._extra_state"] = round_and_round
    assert parse(saved(state), "net.pth")["fc._extra_state"][1] == 0.5


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


def test_a_head_that_was_replaced_by_several_layers_is_named():
    state = network().state_dict()
    state |= {"fc.1.weight": state.pop("fc.weight"), "fc.1.bias": state.pop("fc.bias")}
    with pytest.raises(WeightsError, match=r"Its fc was replaced by other layers.* a callable that builds"):
        assert_is_the_network(saved(state))
    state = network().state_dict()
    state |= {"fc.weight_orig": state["fc.weight"], "fc.weight_mask": state.pop("fc.weight")}
    with pytest.raises(WeightsError, match=r"missing in the weights: fc.weight.* Check model.name"):
        assert_is_the_network(saved(state))


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


def test_single_numbers_may_be_stored_as_vectors_of_one():
    class Scaled(torch.nn.BatchNorm2d):
        def __init__(self):
            super().__init__(2)
            self.scale = torch.nn.Parameter(torch.tensor(1.0))

    state = Scaled().state_dict() | {"scale": torch.tensor([3.0]), "num_batches_tracked": torch.tensor([7])}
    other = Scaled()
    fill(other, state, "net.pth")
    assert (other.scale.item(), other.num_batches_tracked.item()) == (3, 7)
    with pytest.raises(WeightsError, match=r"of another shape: scale \(2,\) instead of \(\)"):
        fill(other, state | {"scale": torch.ones(2)}, "net.pth")


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


class Stretching(torch.nn.Linear):
    """Its numbers depend on what it keeps besides tensors."""

    stretch = 1

    def get_extra_state(self):
        return {"stretch": self.stretch, "shape": torch.ones(3)}

    def set_extra_state(self, state):
        self.stretch = state["stretch"]

    def forward(self, x):
        return super().forward(x) * self.stretch


@pytest.mark.parametrize("prefix", ["", "module.", "model.module."])
def test_what_a_checkpoint_keeps_besides_tensors_is_given_to_the_modules_that_take_it(prefix: str):
    stored, other = (torch.nn.Sequential(Stretching(2, 2), torch.nn.ReLU()) for _ in range(2))
    stored[0].stretch = 3
    state = {prefix + key: value for key, value in stored.state_dict().items()}
    beside = {"criterion.weight": torch.ones(1)} if prefix else {}
    data = saved({"state_dict": state | beside, "lr": 0.1})
    fill(other, match_keys(parse(data, "net.pth"), other.state_dict()), "net.pth")
    torch.testing.assert_close(other(torch.eye(2)), stored(torch.eye(2)))

    plain = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.ReLU())
    fill(plain, match_keys(parse(data, "net.pth"), plain.state_dict()), "net.pth")
    assert torch.equal(plain[0].weight, stored[0].weight)


def test_a_buffer_whose_name_only_ends_like_that_may_not_be_missing():
    network = torch.nn.Linear(2, 2)
    network.register_buffer("my_extra_state", torch.ones(2))
    state = {key: value for key, value in network.state_dict().items() if key != "my_extra_state"}
    with pytest.raises(WeightsError, match="1 missing in the weights: my_extra_state"):
        fill(network, state, "net.pth")


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
