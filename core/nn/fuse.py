"""Batch norm folded into the convolution before it, for networks that are trained already."""

from __future__ import annotations

import copy
from typing import Any, TypeVar

import torch
from torch import fx, nn
from torch.nn.utils import parametrize
from torch.nn.utils.fusion import fuse_conv_bn_eval

from core.nn.backbone import Backbone
from core.nn.blocks import ConvBlock

Network = TypeVar("Network", bound=nn.Module)


@torch.no_grad()
def drop_parametrizations(network: nn.Module, computed: bool = True) -> None:
    """Make tensors of a copied network that are computed from others (spectral norm, say) parameters of their own.

    They keep their values, or without `computed` those that they are computed from. torch's own
    `remove_parametrizations` changes the class of a layer, which a copy shares with the original.
    """
    for layer in list(network.modules()):
        if parametrize.is_parametrized(layer):
            lists: Any = layer.parametrizations
            values = {name: getattr(layer, name) if computed else lists[name].original for name in lists}
            layer.__class__ = parametrize.type_before_parametrizations(layer)
            del layer.parametrizations
            for name, value in values.items():
                layer.register_parameter(name, nn.Parameter(value))


@torch.no_grad()
def fold_batch_norm(network: Network) -> Network:
    """A copy in eval mode whose `ConvBlock`s and pretrained parts have their batch norm in weights and biases.

    With stored statistics batch norm is a linear map of each channel, y = a x + b, so conv then norm is one convolution
    (Jacob et al. 2018, section 3.2). Equal but for rounding; it saves a pass over each map. Weights that are computed
    from others (standardised ones, say) are kept as they come out.
    """
    network = copy.deepcopy(network).eval()
    drop_parametrizations(network)
    for block in network.modules():
        if not isinstance(block, ConvBlock) or len(block) < 2 or not isinstance(block[1], nn.BatchNorm2d):
            continue
        conv: Any = block[0]
        if block.transposed and conv.groups > 1:  # PyTorch's fusion takes the channels of one group for all
            continue
        block[0] = fuse_conv_bn_eval(conv, block[1], transpose=block.transposed)
        del block[1]
    for part in network.modules():
        if isinstance(part, Backbone):
            fold_foreign(part.network)
    return network


@torch.no_grad()
def fold_foreign(network: nn.Module) -> None:
    """Fold, in place, batch norm into the convolution before it in any network that is in eval mode.

    Where nothing else reads that convolution, which tracing the network shows; one that cannot be traced stays as it
    is.
    """
    for convolution, norm in _pairs(network):
        conv: Any = network.get_submodule(convolution)
        bn: Any = network.get_submodule(norm)
        replace(network, convolution, fuse_conv_bn_eval(conv, bn))
        # timm's batch norm contains the activation.
        replace(network, norm, nn.Sequential(bn.drop, bn.act) if hasattr(bn, "act") else nn.Identity())


class _Tracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Do not look into the layers that matter here, of which timm has its own kinds."""
        return isinstance(m, (nn.Conv2d, nn.BatchNorm2d)) or super().is_leaf_module(m, module_qualified_name)


def _pairs(network: nn.Module) -> list[tuple[str, str]]:
    """The names of each convolution and the batch norm that alone reads it; none where the network cannot be traced."""
    modules = dict(network.named_modules())
    if not any(isinstance(module, nn.BatchNorm2d) for module in modules.values()):
        return []
    try:
        calls = [node for node in _Tracer().trace(network).nodes if node.op == "call_module"]
    except Exception:  # whatever code with branches that depend on values ends in
        return []
    found = []
    for node in calls:
        before = node.args[0]
        alone = before in calls and len(before.users) == 1
        if alone and isinstance(modules[node.target], nn.BatchNorm2d) and isinstance(modules[before.target], nn.Conv2d):
            found.append((before.target, node.target))
    return found


def replace(network: nn.Module, name: str, module: nn.Module) -> None:
    """Put `module`, in eval mode, in the place of the one called `name`."""
    parent, _, child = name.rpartition(".")
    setattr(network.get_submodule(parent), child, module.eval())
