"""Batch norm folded into the convolution before it, for networks that are trained already."""

from __future__ import annotations

import copy
import itertools
from typing import Any, TypeVar

import torch
from torch import nn
from torch.nn.utils import parametrize
from torch.nn.utils.fusion import fuse_conv_bn_eval

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
    """A copy in eval mode whose `ConvBlock`s have no batch norm: scale and shift are in weights and bias.

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
    return network


@torch.no_grad()
def fold_neighbours(network: nn.Module) -> None:
    """Fold, in place, each batch norm into the convolution right before it among the children of a module.

    For networks in eval mode that run these children one after another, as timm's EfficientNets do; the activation that
    is part of timm's batch norms stays.
    """
    for parent in network.modules():
        for (before, conv), (after, norm) in itertools.pairwise(list(parent.named_children())):
            if isinstance(conv, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
                setattr(parent, before, fuse_conv_bn_eval(conv, norm))
                setattr(parent, after, getattr(norm, "act", nn.Identity()))
