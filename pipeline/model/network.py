"""One forward pass from pixels to logits and the pooled embedding, around any classifier. Imports torch.

Shapes: N images, H and W pixels, C classes, D the width of the pooled embedding.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.config import Transform
from pipeline.errors import ConfigError, clean
from pipeline.model.spec import PROBE_SIZES

Executed = list[tuple[nn.Linear, Any]]  # each with its input, in order

ROW_TOLERANCE = 1e-3  # of the greatest value of a row; some 1e-6 is usual
SUM_TOLERANCE = 1e-4  # of the sum of a row of probabilities


@dataclass(frozen=True)
class Head:
    """The last linear layer that a network executes: its input is the pooled embedding."""

    linear: nn.Linear
    name: str  # within the network
    num_classes: int  # C, of what the whole network returns
    embedding_dim: int  # D
    input_size: int  # height and width that the network ran with
    is_contiguous: bool = False  # whether the network insists on NCHW in memory, as `view` may
    is_filled: bool = True  # with numbers from the weights, which may be those of a backbone alone


class Network(nn.Module):
    """uint8 pixels (N, H, W, 3) to float32 logits (N, C) and float32 embedding (N, D).

    Normalises on its device. The embedding is what the head was given, the last time that it was executed. Raises
    ValueError where it was not, or where there is not a row for each image; else what the network itself raises.
    """

    mean: Tensor | None
    std: Tensor | None

    def __init__(self, body: nn.Module, head: Head, transform: Transform) -> None:
        super().__init__()
        self.body, self.head = body, head
        self.register_buffer("mean", _channels(transform.mean))
        self.register_buffer("std", _channels(transform.std))
        self._inputs: list[Tensor] = []
        head.linear.register_forward_pre_hook(self._keep, with_kwargs=True)

    def forward(self, pixels_NHWC: Tensor) -> tuple[Tensor, Tensor]:
        # A permuted NHWC tensor is channels_last, so nothing is copied here but the conversion itself.
        x = pixels_NHWC.permute(0, 3, 1, 2).to(torch.float32) / 255
        if self.mean is not None:
            x = x - self.mean
        if self.std is not None:
            x = x / self.std
        if self.head.is_contiguous:
            x = x.contiguous()
        self._inputs.clear()
        logits = self.body(x)
        if not self._inputs:
            raise ValueError(f"{self.head.name}, its last nn.Linear, was not executed")
        embedding = self._inputs[-1]
        self._inputs.clear()
        if len(x) == 1:  # `squeeze` takes that dimension away as well
            logits, embedding = (rows[None] if rows.ndim == 1 else rows for rows in (logits, embedding))
        if not len(logits) == len(embedding) == len(x):
            raise ValueError(
                f"it made {len(logits)} rows of logits and {len(embedding)} of features of {len(x)} images"
            )
        return logits.to(torch.float32), embedding.to(torch.float32)

    def _keep(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._inputs.append(args[0] if args else kwargs["input"])


def _channels(values: list[float] | None) -> Tensor | None:
    return None if values is None else torch.tensor(values, dtype=torch.float32).view(3, 1, 1)


def find_head(body: nn.Module, input_size: int | None, name: str) -> Head:
    """Run the network, in eval mode, on two black images, and see which `nn.Linear` is executed last.

    Raises ConfigError if the network does not run, executes no such layer, gives it or returns anything else than
    one row per image.
    """
    (size, is_contiguous), output, executed = _probe(body, (input_size,) if input_size else PROBE_SIZES, name)
    if not executed:
        raise ConfigError(
            f"the network {name} executes no nn.Linear, so it has no pooled embedding: the input of its last one is"
            " what is stored. Let it end in one."
        )
    linear, embedding = executed[-1]
    linear_name = next(found for found, module in body.named_modules() if module is linear)
    num_classes = _width(output, f"the network {name} returns")
    embedding_dim = _width(embedding, f"the network {name} gives its last nn.Linear, {linear_name},")
    return Head(linear, linear_name, num_classes, embedding_dim, size, is_contiguous)


def set_arithmetic() -> None:
    """Have torch compute in fp32 where it says so (no TF32, no bfloat16), and the same on every run: in all of this
    process, since torch keeps it so. After a network's own code has run, which may have set what is faster."""
    backends: Any = torch.backends
    for backend in (backends, backends.mkldnn, backends.mkldnn.conv, backends.cudnn, backends.cudnn.rnn):
        backend.fp32_precision = "none"  # which goes before what is set below
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cuda.matmul.allow_fp16_accumulation = False
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    torch.backends.cudnn.benchmark = False
    torch.backends.cudnn.deterministic = True


def ends_in_softmax(logits: Tensor) -> bool:
    """Whether what a network returns for images of noise (N, C) is probabilities."""
    return logits.shape[1] > 1 and bool((logits >= 0).all() and ((logits.sum(1) - 1).abs() < SUM_TOLERANCE).all())


def check_rows(network: Network, name: str) -> Tensor:
    """The logits of three images of noise. ConfigError where an image's results depend on the images beside it, or on
    chance: they would change with how images are batched."""
    noise = _noise(network.head, 4)
    try:
        with torch.inference_mode():
            # Of two rows, each would be one standard deviation away.
            beside = [network(noise[[0, 1, other]]) for other in (2, 3)]
    except Exception as error:
        raise ConfigError(
            f"the network {name} fails with three images of noise, where it runs with two black ones: {clean(error)}."
            " It must make a row for every image, whatever is in them and however many there are, and execute its last"
            " nn.Linear."
        ) from error
    for one, two in zip(*beside, strict=True):
        difference = (one[0] - two[0]).abs().max()
        if difference > ROW_TOLERANCE * one[0].abs().max():
            raise ConfigError(
                f"the network {name} gives an image other numbers beside other images, or by chance. Give its batch"
                " norms running statistics (track_running_stats=True), and let dropout depend on self.training."
            )
    logits: Tensor = beside[0][0]
    return logits


def depends_on_head(network: Network) -> bool:
    """Whether other weights of the head give images of noise another embedding, as where it is executed twice."""
    noise = _noise(network.head, 2)
    tensors = [value for value in network.head.linear.state_dict().values() if isinstance(value, Tensor)]
    before = [value.clone() for value in tensors]
    with torch.inference_mode():
        with _attributes_kept(network.body):
            own = network(noise)[1]
        try:
            for value in tensors:
                # Not one number for all, which a norm behind the head would take away.
                value.copy_(torch.randn(value.shape, generator=torch.Generator().manual_seed(1)))
            with _attributes_kept(network.body):
                other = network(noise)[1]
        finally:
            for value, kept in zip(tensors, before, strict=True):
                value.copy_(kept)
    return not torch.allclose(own, other, rtol=ROW_TOLERANCE, atol=0, equal_nan=True)


def _noise(head: Head, count: int) -> Tensor:
    """uint8 (count, H, W, 3), the same every time."""
    shape = (count, head.input_size, head.input_size, 3)
    return torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(0)).to(torch.uint8)


def _width(found: Any, what: str) -> int:
    if _is_row_each(found):
        return int(found.shape[1])
    shown = f"the shape {tuple(found.shape)}" if isinstance(found, Tensor) else f"a {type(found).__name__}"
    raise ConfigError(
        f"{what} {shown} for 2 images, where a tensor of the shape (2, width) is needed: one row of logits and one"
        " pooled vector per image."
    )


def _is_row_each(found: Any) -> bool:
    return isinstance(found, Tensor) and found.ndim == 2 and found.shape[0] == 2


def _probe(body: nn.Module, sizes: Sequence[int], name: str) -> tuple[tuple[int, bool], Any, Executed]:
    """The first of `sizes`, and whether contiguous, that the network makes a row for each image of, or at least runs
    with; its output, and the linear layers that it executed."""
    failure: Exception | None = None
    ran: tuple[tuple[int, bool], Any, Executed] | None = None
    for size, is_contiguous in product(sizes, (False, True)):
        images = torch.zeros(2, size, size, 3).permute(0, 3, 1, 2)  # as `Network.forward` gives them
        with torch.inference_mode(), _attributes_kept(body), _recorded_linears(body) as executed:
            try:
                output = body(images.contiguous() if is_contiguous else images)
            except Exception as error:  # noqa: BLE001 - a custom network may raise anything; reported below
                failure = failure or error
                continue
        ran = ran or ((size, is_contiguous), output, executed)
        if _is_row_each(output) and executed and _is_row_each(executed[-1][1]):
            return (size, is_contiguous), output, executed
    if ran is not None:
        return ran
    advice = (
        "It must take 3 channels, for images are RGB"
        if "but got 3 channels" in str(failure)
        else "Set model.transform.resize and model.transform.crop to the size that it takes"
    )
    tried = " or ".join(map(str, sizes))
    raise ConfigError(
        f"the network {name} does not run on images of {tried} pixels: {clean(failure)}. {advice}."
    ) from failure


@contextmanager
def _attributes_kept(body: nn.Module) -> Iterator[None]:
    """What modules keep of a run as plain attributes, such as a grid, would not follow them to another device."""
    before = [(module, dict(module.__dict__)) for module in body.modules()]
    try:
        yield
    finally:
        for module, attributes in before:
            module.__dict__.clear()
            module.__dict__.update(attributes)


@contextmanager
def _recorded_linears(body: nn.Module) -> Iterator[Executed]:
    executed: Executed = []

    def record(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        assert isinstance(module, nn.Linear)
        executed.append((module, args[0] if args else kwargs.get("input")))

    hooks = [
        module.register_forward_pre_hook(record, with_kwargs=True)
        for module in body.modules()
        if isinstance(module, nn.Linear)
    ]
    try:
        yield executed
    finally:
        for hook in hooks:
            hook.remove()
