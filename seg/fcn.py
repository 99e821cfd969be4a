"""The fully convolutional network (Long, Shelhamer & Darrell 2015) on a pretrained classifier."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from core.cli.errors import UserError
from core.nn.backbone import Backbone
from core.nn.blocks import require_positive
from core.nn.init import init_he
from seg.network import EncoderConfig, SegmentationNetwork, bilinear_kernel, encoder_maps


class FCN(SegmentationNetwork):
    """Images (N, channels, H, W) in [-1, 1] -> logits (N, classes, H, W), for any H and W.

    1x1 convolutions score the classes on the coarsest map, and on finer ones down to `finest`. Coarse scores are
    doubled by transposed convolutions, which begin as bilinear interpolation, and added to the next finer ones (section
    4.2 of the paper). Scores of the finer maps begin at zero, as there.

    Args:
        encoder: the fields of `seg.network.EncoderConfig`.
        finest: stride of the finest map that is scored: 32, 16 or 8 for FCN-32s, -16s and -8s.

    Raises:
        UserError: an argument out of range, or an encoder that cannot be had.
    """

    encoder: Backbone
    margin = 256  # as in `seg.encoder.EncoderUNet`

    def __init__(
        self,
        channels: int = 3,
        classes: int = 2,
        encoder: Mapping[str, Any] = MappingProxyType({}),
        finest: int = 8,
    ) -> None:
        super().__init__()
        require_positive(channels=channels, classes=classes)
        if finest not in (8, 16, 32):
            raise UserError(f"finest={finest} must be 8, 16 or 32")
        self.channels, self.classes, self.finest = channels, classes, finest
        self.encoder = EncoderConfig(**encoder).build(channels, [s for s in (8, 16, 32) if s >= finest])
        self.multiple = self.encoder.strides[-1]
        self.scores = nn.ModuleList(nn.Conv2d(width, classes, 1) for width in self.encoder.widths)
        # Fine to coarse; the first one leads to the size of the pictures.
        self.steps = [coarse // fine for fine, coarse in itertools.pairwise([1, *self.encoder.strides])]
        self.up = nn.ModuleList(
            nn.ConvTranspose2d(classes, classes, 2 * step, step, step // 2, bias=False) for step in self.steps
        )
        self.dropout = nn.Dropout(0.0)

    def initialise(self, seed: int) -> None:
        """Scores of the coarsest map from `seed` alone, of finer ones zero, and bilinear interpolation."""
        if self.encoder.weights == "none":
            init_he(self.encoder, seed)
        init_he(self.scores[-1], seed)
        with torch.no_grad():
            for score in list(self.scores)[:-1]:
                for parameter in score.parameters():
                    parameter.zero_()
            for up, step in zip(self.up, self.steps, strict=True):
                each = torch.eye(self.classes)[:, :, None, None]
                for kernel in up.parameters():
                    kernel.copy_(each * bilinear_kernel(step))

    def forward(self, x: Tensor) -> Tensor:
        """Logits of the images."""
        height, width = x.shape[2:]
        maps = list(encoder_maps(self.encoder, x).values())
        total: Tensor | None = None
        for score, up, found in zip(reversed(self.scores), reversed(self.up), reversed(maps), strict=True):
            total = up(score(found) if total is None else score(found) + total)
        assert total is not None
        return total[:, :, :height, :width]
