"""What a network consists of: shapes, parameters, multiplications, receptive fields and memory of its layers.

The network runs once on PyTorch's meta device, whose tensors have shapes and no values: it takes neither memory nor
time, whatever its size. Every operation is seen on its way to the kernels, so that sums, concatenations, attention and
whatever else is no layer of its own count as well.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from core.nn.fuse import drop_parametrizations

FLOAT_BYTES = 4  # of a value in fp32
Named = dict[str, Any]  # the arguments of an operation by their names
Reads = tuple[Fraction, Callable[[int], tuple[int, int]]]  # stride; first and last pixel that pixel i reads
# What a result reads of a map of this (height, width), down and across; None where it could not be followed.
Rule = Callable[[Named, tuple[int, int], Tensor], "list[Reads] | None"]


class Axis(NamedTuple):
    """What the pixels of a map see of the input along one axis, as if neither had borders.

    Pixel k sees the pixels `first[k]` to `last[k]`. The pattern repeats: `len(first)` pixels further on the map, it is
    `step` pixels further on the input.
    """

    first: tuple[int, ...]
    last: tuple[int, ...]
    step: int

    @property
    def size(self) -> int:
        """Pixels of the input that one pixel sees, at most."""
        return max(last - first + 1 for first, last in zip(self.first, self.last, strict=True))

    @property
    def stride(self) -> Fraction:
        """Pixels of the input from one pixel of the map to the next."""
        return Fraction(self.step, len(self.first))

    def seen(self, pixel: int) -> tuple[int, int]:
        """First and last pixel of the input that `pixel` sees."""
        turns, place = divmod(pixel, len(self.first))
        return self.first[place] + turns * self.step, self.last[place] + turns * self.step

    def read(self, reads: Reads) -> Axis:
        """The axis of a map that is made from this one."""
        turns = reads[0] / len(self.first)  # of the pattern, for each pixel of the new map
        ends = [reads[1](pixel) for pixel in range(turns.denominator)]
        first, last = (tuple(self.seen(pair[end])[end] for pair in ends) for end in (0, 1))
        return Axis(first, last, self.step * turns.numerator)

    def joined(self, other: Axis) -> Axis:
        """The axis of a map that combines two of the same stride, pixel by pixel."""
        period = math.lcm(len(self.first), len(other.first))
        pairs = [(self.seen(pixel), other.seen(pixel)) for pixel in range(period)]
        first, last = (tuple(pick(a[end], b[end]) for a, b in pairs) for end, pick in ((0, min), (1, max)))
        return Axis(first, last, int(self.stride * period))


class Field(NamedTuple):
    """What a map of (height, width) pixels sees, down and across."""

    axes: tuple[Axis, Axis]
    shape: tuple[int, int]


# A pixel sees all of the input; or what it sees could not be followed.
Sight = Field | Literal["all", "unknown"]


def _convolution(named: Named, sizes: tuple[int, int], out: Tensor) -> list[Reads]:
    return [
        _transposed(*numbers) if named["transposed"] else _window(*numbers)
        for numbers in zip(named["weight"].shape[2:], named["stride"], named["padding"], named["dilation"], strict=True)
    ]


def _window(kernel: int, stride: int, padding: int, dilation: int = 1) -> Reads:
    def reads(pixel: int) -> tuple[int, int]:
        start = pixel * stride - padding
        return start, start + dilation * (kernel - 1)

    return Fraction(stride), reads


def _transposed(kernel: int, stride: int, padding: int, dilation: int) -> Reads:
    def reads(pixel: int) -> tuple[int, int]:
        end = pixel + padding
        return -((dilation * (kernel - 1) - end) // stride), end // stride

    return Fraction(1, stride), reads


def _pool(named: Named, sizes: tuple[int, int], out: Tensor) -> list[Reads]:
    def pair(value: Any) -> list[int]:
        return list(value) * 2 if len(value) == 1 else list(value)

    kernel = pair(named["kernel_size"])
    numbers = kernel, pair(named["stride"] or kernel), pair(named["padding"]), pair(named.get("dilation", [1]))
    return [_window(*axis) for axis in zip(*numbers, strict=True)]


def _adaptive(named: Named, sizes: tuple[int, int], out: Tensor) -> list[Reads]:
    def along(size: int, goal: int) -> Reads:
        ratio = Fraction(size, goal)
        return ratio, lambda pixel: (math.floor(pixel * ratio), math.ceil((pixel + 1) * ratio) - 1)

    return [along(*pair) for pair in zip(sizes, out.shape[2:], strict=True)]


def _nearest(named: Named, sizes: tuple[int, int], out: Tensor) -> list[Reads]:
    def along(size: int, goal: int) -> Reads:
        ratio = Fraction(size, goal)
        return ratio, lambda pixel: (math.floor(pixel * ratio), math.floor(pixel * ratio))

    return [along(*pair) for pair in zip(sizes, out.shape[2:], strict=True)]


def _interpolation(beyond: int) -> Rule:
    """The rule of one that reads so many pixels beyond the two around a place."""

    def along(size: int, goal: int) -> Reads:
        ratio = Fraction(size, goal)

        def reads(pixel: int) -> tuple[int, int]:
            place = math.floor((pixel + Fraction(1, 2)) * ratio - Fraction(1, 2))
            return place - beyond, place + 1 + beyond

        return ratio, reads

    def rule(named: Named, sizes: tuple[int, int], out: Tensor) -> list[Reads] | None:
        return None if named["align_corners"] else [along(*pair) for pair in zip(sizes, out.shape[2:], strict=True)]

    return rule


def _shift(pixels: int, step: int = 1) -> Reads:
    return Fraction(step), lambda pixel: (pixels + pixel * step, pixels + pixel * step)


def _pad(named: Named, sizes: tuple[int, int], out: Tensor) -> list[Reads]:
    pads = [*(named["pad"] if "pad" in named else named["padding"]), 0, 0]  # left, right, top, bottom
    return [_shift(-pads[2]), _shift(-pads[0])]


def _slice(named: Named, sizes: tuple[int, int], out: Tensor) -> list[Reads]:
    start, step = named["start"] or 0, named["step"]
    return [
        _shift(start if start >= 0 else size + start, step) if named["dim"] % 4 == dim else _shift(0)
        for dim, size in zip((2, 3), sizes, strict=True)
    ]


# Operations whose pixels read others than their own; all others read pixel by pixel.
READS: dict[str, Rule] = {
    "convolution": _convolution,
    "max_pool2d_with_indices": _pool,
    "avg_pool2d": _pool,
    "_adaptive_avg_pool2d": _adaptive,
    "adaptive_max_pool2d": _adaptive,
    "upsample_nearest2d": _nearest,
    "upsample_bilinear2d": _interpolation(0),
    "upsample_bicubic2d": _interpolation(1),
    "constant_pad_nd": _pad,
    "replication_pad2d": _pad,
    "reflection_pad2d": _pad,
    "slice": _slice,
}
SUMS = {"mean", "sum", "amax", "amin", "logsumexp", "_softmax", "_safe_softmax"}
PRODUCTS = {"mm", "addmm", "bmm", "baddbmm"}


def sight_after(name: str, named: Named, sights: list[Sight], out: Tensor) -> Sight:
    """What the result of an operation sees, whose inputs see `sights`.

    A product of matrices and a sum over pixels see all. Statistics over pixels within a normalisation do not count.
    """
    if "all" in sights:
        return "all"
    field = sights[0]
    if field == "unknown" or "unknown" in sights:
        return "unknown"
    assert isinstance(field, Field)
    for other in sights[1:]:
        assert isinstance(other, Field)
        if any(a.stride != b.stride for a, b in zip(field.axes, other.axes, strict=True)):
            return "unknown"
        down, across = (a.joined(b) for a, b in zip(field.axes, other.axes, strict=True))
        field = Field((down, across), field.shape)
    source = next((value for value in named.values() if isinstance(value, Tensor)), out)
    if name in PRODUCTS or "dot_product_attention" in name:
        return "all"
    if name in SUMS and source.dim() > 2:
        dim = named.get("dim")  # None or absent for all
        dims = dim if isinstance(dim, (list, tuple)) else [dim]
        channels = {1, -1, 3} if source.dim() == 4 else {-1, source.dim() - 1}
        return field if len(dims) == 1 and dims[0] in channels else "all"
    if name in READS and source.dim() == 4 and tuple(source.shape[2:]) == field.shape:
        if name == "_adaptive_avg_pool2d" and tuple(out.shape[2:]) == (1, 1):
            return "all"
        reads = READS[name](named, field.shape, out)
        if reads is None:
            return "unknown"
        down, across = (axis.read(read) for axis, read in zip(field.axes, reads, strict=True))
        return Field((down, across), (out.shape[2], out.shape[3]))
    # Pixels that change places: shuffled into channels, say, or gathered into windows, which takes six dimensions.
    moved = (source.dim() == 6 and out.dim() < 6) or (out.dim() == 4 and _holds(source, field))
    return "unknown" if moved and not _holds(out, field) else field


def _holds(tensor: Tensor, field: Field) -> bool:
    """Whether these are maps of the field's size, with channels first or last."""
    return tensor.dim() == 4 and field.shape in (tuple(tensor.shape[2:]), tuple(tensor.shape[1:3]))


@dataclass
class Layer:
    """One call of a module, without those of the modules in it.

    Attributes:
        name, kind: path in the network, and class.
        output: shape of what it returns, without the batch.
        parameters: numbers that are learnt, where they are used first.
        multiplications: multiply-adds of convolutions, matrix products and attention, for the whole batch.
        field, stride: pixels of the input that a pixel sees, and from one to the next (down, across); None for all.
        known: False where the receptive field could not be followed.
        map_bytes: fp32 memory of the maps that it writes; layers that work in place write none.
    """

    name: str
    kind: str
    output: list[int]
    parameters: int = 0
    multiplications: int = 0
    field: list[int] | None = None
    stride: list[Fraction] | None = None
    known: bool = True
    map_bytes: int = 0


@dataclass(frozen=True)
class Inspection:
    """The layers of a network in the order of their work, and what belongs to none of them.

    Attributes:
        inputs: shape of the input, batch included.
        idle: parameters that took no part, by their names: those of modules that training alone uses, say.
    """

    inputs: list[int]
    layers: list[Layer]
    idle: dict[str, int]

    def total(self, what: str) -> int:
        """Sum of an attribute over the layers."""
        return sum(getattr(layer, what) for layer in self.layers)


class _Tracer(TorchDispatchMode):
    """Follows what tensors see, and counts for the innermost module that runs."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.names = {module: name for name, module in network.named_modules()}
        self.unused = {id(parameter): parameter.numel() for parameter in network.parameters()}
        self.running: list[Layer] = []
        self.done: list[Layer] = []
        self.sights: dict[int, tuple[Tensor, Sight]] = {}  # with the tensor, so that its number is not used again

    def see(self, tensor: Tensor, sight: Sight) -> None:
        self.sights[id(tensor)] = tensor, sight

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        layer = self.running[-1]
        for parameter in given:
            layer.parameters += self.unused.pop(id(parameter), 0)
        sights = [self.sights[id(tensor)][1] for tensor in given if id(tensor) in self.sights]
        results = [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
        if not sights or not results:
            return out
        schema = func._schema.arguments
        named = {a.name: a.default_value for a in schema if a.has_default_value()}
        named |= dict(zip((a.name for a in schema), args, strict=False)) | (kwargs or {})
        name = func._overloadpacket.__name__
        for result in results:
            self.see(result, sight_after(name.rstrip("_"), named, sights, result))
        if (count := flop_registry.get(func._overloadpacket)) is not None:
            layer.multiplications += count(*args, **(kwargs or {}), out_val=out) // 2
        # Views and results of work in place are marked as aliases; what follows the first result are statistics.
        fresh = func._schema.returns[0].alias_info is None and name != "_unsafe_view"
        if fresh and results[0].is_floating_point():
            layer.map_bytes += FLOAT_BYTES * results[0].numel()
        return out

    def begin(self, module: nn.Module, inputs: Any) -> None:
        """Before a module runs."""
        if module in self.names:
            self.running.append(Layer(self.names[module], type(module).__name__, []))

    def end(self, module: nn.Module, inputs: Any, output: Any) -> None:
        """After a module has run."""
        if module not in self.names:
            return
        layer, result = self.running.pop(), next(leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor))
        layer.output = list(result.shape[1:])
        if isinstance(module, nn.Linear) and inputs[0].dim() > 2 and id(inputs[0]) in self.sights:
            self.see(result, self.sights[id(inputs[0])][1])  # it reads each pixel by itself
        sight = self.sights[id(result)][1] if id(result) in self.sights else "unknown"
        layer.known = sight != "unknown"
        if isinstance(sight, Field):
            layer.field, layer.stride = [axis.size for axis in sight.axes], [axis.stride for axis in sight.axes]
        if layer.parameters or layer.multiplications or layer.map_bytes:
            self.done.append(layer)


@torch.no_grad()
def inspect_network(network: nn.Module, inputs: Tensor) -> Inspection:
    """Take a network apart by what it does with `inputs`, (N, C, H, W) or (N, values), on the meta device.

    Modules that neither learn, multiply nor write a map (dropout, ReLU in place) have no line; those that hold others
    have one for what they do themselves.
    """
    network = copy.deepcopy(network).eval()
    drop_parametrizations(network, computed=False)  # values do not matter here
    tracer = _Tracer(network)
    if inputs.dim() == 4:
        pixel = Axis((0,), (0,), 1)
        tracer.see(inputs, Field((pixel, pixel), (inputs.shape[2], inputs.shape[3])))
    else:
        tracer.see(inputs, "all")
    hooks = [register_module_forward_pre_hook(tracer.begin), register_module_forward_hook(tracer.end)]
    try:
        with tracer:
            network(inputs)
    finally:
        for hook in hooks:
            hook.remove()
    idle = {name: tracer.unused[id(p)] for name, p in network.named_parameters() if id(p) in tracer.unused}
    return Inspection(list(inputs.shape), tracer.done, idle)
