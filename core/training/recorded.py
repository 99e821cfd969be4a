"""Training steps recorded as CUDA graphs: a GPU gets a step of thousands of small kernels at once.

Launching them one by one takes the CPU longer than running them takes the GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields, is_dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.optim import Optimizer

from core.cli.errors import UserError

T = TypeVar("T")
PLAIN_STEPS = 3  # before recording: they choose kernels and make the optimisers' state


def map_tensors(value: T, function: Callable[[Tensor], Tensor]) -> T:
    """A copy of nested lists, mappings and data classes in which the function has replaced each tensor."""
    result: Any = value
    if isinstance(value, Tensor):
        result = function(value)
    elif isinstance(value, (list, tuple)):
        result = type(value)(map_tensors(inner, function) for inner in value)
    elif isinstance(value, Mapping):
        result = {key: map_tensors(inner, function) for key, inner in value.items()}
    elif is_dataclass(value) and not isinstance(value, type):
        named = {field.name: getattr(value, field.name) for field in fields(value)}
        result = replace(value, **{name: map_tensors(inner, function) for name, inner in named.items()})
    return result


def tensors_in(value: object) -> list[Tensor]:
    """The tensors in nested lists, mappings and data classes, always in the same order."""
    found: list[Tensor] = []

    def note(tensor: Tensor) -> Tensor:
        found.append(tensor)
        return tensor

    map_tensors(value, note)
    return found


def can_record(optimizers: Sequence[Optimizer]) -> bool:
    """Whether these optimisers can be part of a CUDA graph: fused ones keep all of their state on the GPU."""
    return torch.cuda.is_available() and all(
        group.get("fused") and value.is_cuda
        for optimizer in optimizers
        for group in optimizer.param_groups
        for value in group["params"]
    )


class Recorded:
    """Work on a GPU that is the same each time but for the tensors it gets and learning rates.

    The first calls run it as it is; then it is recorded, once, and replayed on copies of what it gets. So its kernels
    and their order are the same. It must not wait for the GPU, nor depend on numbers that change from call to call.

    Args:
        optimizers: those that step in it, all fused.
    """

    def __init__(self, optimizers: Sequence[Optimizer]) -> None:
        self.calls = 0
        self.groups = [group for optimizer in optimizers for group in optimizer.param_groups]
        self.graph: torch.cuda.CUDAGraph | None = None

    def __call__(self, work: Callable[..., dict[str, Tensor]], *inputs: object) -> dict[str, Tensor]:
        """The scalars of one more call of the same `work`: from nested tensors to named scalars on the GPU.

        Raises UserError where it cannot be recorded.
        """
        if self.graph is None:
            self.calls += 1
            if self.calls <= PLAIN_STEPS:
                return work(*inputs)
            self._record(work, inputs)
        assert self.graph is not None
        torch._foreach_copy_(self.buffers, tensors_in(inputs))
        for rate, group in zip(self.rates, self.groups, strict=True):
            rate.fill_(group["lr"])
        self.graph.replay()
        return dict(zip(self.names, self.results.clone().unbind(), strict=True))

    def _record(self, work: Callable[..., dict[str, Tensor]], inputs: tuple[object, ...]) -> None:
        self.inputs = map_tensors(inputs, torch.clone)
        self.buffers = tensors_in(self.inputs)
        device = self.buffers[0].device
        self.rates = [torch.full((), group["lr"], device=device) for group in self.groups]
        graph = torch.cuda.CUDAGraph()
        try:
            with self._on_device(), torch.cuda.graph(graph):
                row = work(*self.inputs)
                self.results = torch.stack([value.float() for value in row.values()])
        except torch.cuda.OutOfMemoryError:
            raise
        except RuntimeError as error:
            first: BaseException = error  # ending the recording raises once more
            while isinstance(first.__context__, RuntimeError):
                first = first.__context__
            reason = str(first).splitlines()[0]
            raise UserError(f"the step cannot be recorded as a CUDA graph ({reason}): use cuda_graph=false") from error
        self.names, self.graph = list(row), graph

    @contextmanager
    def _on_device(self) -> Iterator[None]:
        """Let the optimisers read their rates on the GPU."""
        before = [dict(group) for group in self.groups]
        for rate, group in zip(self.rates, self.groups, strict=True):
            group |= {"lr": rate, "capturable": True}
        try:
            yield
        finally:
            for old, group in zip(before, self.groups, strict=True):
                group.clear()
                group |= old
