"""A U-Net whose contracting path is a pretrained network."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from core.cli.errors import UserError
from core.nn.backbone import Backbone
from core.nn.blocks import ConvBlock, Norm, Upsampling, doubling_block, norm_layer, require_positive
from core.nn.init import init_he
from seg.levels import Block, level_of
from seg.network import EncoderConfig, SegmentationNetwork, encoder_maps

ALL_STRIDES = (2, 4, 8, 16, 32)


class EncoderUNet(SegmentationNetwork):
    """Images (N, channels, H, W) in [-1, 1] -> logits (N, classes, H, W), for any H and W.

    The maps of a `Backbone` take the place of the U-Net's contracting path (Ronneberger et al. 2015). From the coarsest
    one, each level of the decoder doubles the size and takes in the backbone's map of that size, where it has one.

    Args:
        encoder: the fields of `seg.network.EncoderConfig`.
        widths: channels of the decoder's levels, coarse to fine, one for each doubling. Doublings without a level are
            bilinear interpolation of the logits, which at the size of the pictures saves most of the decoder's time.
        up, norm, block: of the decoder, as for `seg.unet.UNet`.
        dropout: probability before the last layer.

    Attributes:
        margin: as far as pixels were found to matter (docs/segmentation.md); most encoders see farther, and those with
            squeeze and excitation the whole picture.

    Raises:
        UserError: an argument out of range, or an encoder that cannot be had.
    """

    margin = 256
    encoder: Backbone

    def __init__(
        self,
        channels: int = 3,
        classes: int = 2,
        encoder: Mapping[str, Any] = MappingProxyType({}),
        widths: Sequence[int] = (128, 64, 48, 32),
        up: Upsampling = "nearest",
        norm: Norm = "batch",
        block: Block = "plain",
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        require_positive(channels=channels, classes=classes)
        self.channels, self.classes = channels, classes
        self.encoder = EncoderConfig(**encoder).build(channels, ALL_STRIDES)
        self.multiple = self.encoder.strides[-1]
        levels = self.multiple.bit_length() - 1
        if not 1 <= len(widths) <= levels:
            raise UserError(
                f"widths={list(widths)} must hold 1 to {levels} numbers: {self.encoder.name} halves pictures that often"
            )
        skips = dict(zip(self.encoder.strides, self.encoder.widths, strict=True))
        self.up, self.merge = nn.ModuleList(), nn.ModuleList()
        make, layer, before = level_of(block), norm_layer(norm), self.encoder.widths[-1]
        for level, width in enumerate(widths, 1):
            require_positive(widths=width)
            self.up.append(doubling_block(up, before, width))
            self.merge.append(make(width + skips.get(self.multiple >> level, 0), width, 1, layer))
            before = width
        self.dropout = nn.Dropout(dropout)
        self.head = ConvBlock(before, classes, padding=1, norm=None, activation=None)

    def initialise(self, seed: int) -> None:
        """Draw the decoder's weights, and the encoder's where they are not pretrained, from `seed` alone."""
        for part in (self.up, self.merge, self.head, *([self.encoder] if self.encoder.weights == "none" else [])):
            init_he(part, seed)

    def forward(self, x: Tensor) -> Tensor:
        """Logits of the images."""
        height, width = x.shape[2:]
        maps, stride = encoder_maps(self.encoder, x), self.multiple
        x = maps[stride]
        for up, merge in zip(self.up, self.merge, strict=True):
            x, stride = up(x), stride // 2
            x = merge(torch.cat([maps[stride], x], dim=1) if stride in maps else x)
        logits: Tensor = self.head(self.dropout(x))
        if stride > 1:
            logits = F.interpolate(logits, scale_factor=stride, mode="bilinear", align_corners=False)
        return logits[:, :, :height, :width]
