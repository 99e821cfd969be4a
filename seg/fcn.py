"""The fully convolutional network (Long, Shelhamer & Darrell 2015) on a pretrained classifier."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from core.cli.errors import UserError
from core.nn.backbone import DEFAULT, Backbone
from core.nn.blocks import UpBlock, require_positive
from core.nn.init import init_he
from seg.network import SegmentationNetwork, bilinear_kernel, padded


class FCN(SegmentationNetwork):
    """Images (N, channels, H, W) in [-1, 1] -> logits (N, classes, H, W), for any H and W.

    1x1 convolutions score the classes on the coarsest map, and on finer ones down to `finest`. Coarse scores are doubled
    by transposed convolutions, which begin as bilinear interpolation, and added to the next finer ones (section 4.2 of
    the paper). Scores of the finer maps begin at zero, as there.

    Args:
        encoder, weights, freeze: `name`, `weights` and `frozen` of the `Backbone`.
        finest: stride of the finest map that is scored: 32, 16 or 8 for FCN-32s, -16s and -8s.

    Raises:
        UserError: an argument out of range, or an encoder that cannot be had.
    """

    margin = 128  # as in `seg.encoder.EncoderUNet`

    def __init__(
        self,
        channels: int = 3,
        classes: int = 2,
        encoder: str = DEFAULT,
        weights: str = "package",
        freeze: bool = False,
        finest: int = 8,
    ) -> None:
        super().__init__()
        require_positive(channels=channels, classes=classes)
        if finest not in (8, 16, 32):
            raise UserError(f"finest={finest} must be 8, 16 or 32")
        self.channels, self.classes, self.finest = channels, classes, finest
        self.encoder = Backbone(encoder, weights, freeze, channels, [s for s in (8, 16, 32) if s >= finest])
        self.multiple = self.encoder.strides[-1]
        linear = {"norm": None, "activation": None, "bias": False}
        self.scores = nn.ModuleList(nn.Conv2d(width, classes, 1) for width in self.encoder.widths)
        steps = [coarse // fine for fine, coarse in zip(self.encoder.strides, self.encoder.strides[1:], strict=False)]
        steps = [self.encoder.strides[0], *steps]  # fine to coarse, the first to the size of the pictures
        self.up = nn.ModuleList(UpBlock(classes, classes, 2 * step, step, step // 2, **linear) for step in steps)
        self.dropout = nn.Dropout(0.0)

    def initialise(self, seed: int) -> None:
        """Scores of the coarsest map from `seed` alone, of finer ones zero, and bilinear interpolation."""
        if self.encoder.weights == "none":
            init_he(self.encoder, seed)
        init_he(self.scores[-1], seed)
        with torch.no_grad():
            for score in self.scores[:-1]:
                score.weight.zero_()
                score.bias.zero_()
            for block in self.up:
                kernel = bilinear_kernel(block[0].stride[0])
                block[0].weight.copy_(torch.eye(self.classes)[:, :, None, None] * kernel)

    def forward(self, x: Tensor) -> Tensor:
        """Logits of the images."""
        height, width = x.shape[2:]
        maps = self.encoder(padded(x, self.multiple))
        total: Tensor | None = None
        for score, up, found in zip(reversed(self.scores), reversed(self.up), reversed(maps), strict=True):
            total = up(score(found) if total is None else score(found) + total)
        assert total is not None
        return total[:, :, :height, :width]
