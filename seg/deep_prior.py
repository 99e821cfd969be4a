"""Inpainting by a network fitted to one damaged picture (Ulyanov et al. 2018), and by diffusion, to compare with."""

from __future__ import annotations

import math

import numpy as np
import torch
from scipy import sparse
from scipy.sparse.linalg import spsolve
from torch import Tensor, nn

from core.cli.errors import UserError
from core.data.images import MEMORY_FORMAT, to_float, to_uint8
from core.nn.blocks import DoubleConv
from seg.network import padded
from seg.unet import UNet

LEAST = 16  # pixels of a side
CODES = 32  # channels of the noise that the network turns into the picture
CODE_SCALE = 0.1  # it is uniform from 0 to this
CODE_NOISE = 0.03  # standard deviation of what each step adds to it
RATE = 0.01
KEEP = 0.98  # of the running mean of the last pictures, with each step


class Hourglass(UNet):
    """A `UNet` without its skip connections: codes (N, CODES, H, W) -> pictures (N, 3, H, W) in [-1, 1].

    Skips would let the noise of the finest level into large holes, where the structure of the network alone decides
    (the paper's settings for region inpainting: no skips, up-sampling by interpolation).
    """

    def __init__(self, widths: list[int]) -> None:
        super().__init__(CODES, 3, widths, up="bilinear", norm="batch")
        self.merge = nn.ModuleList(DoubleConv(width, width, norm=nn.BatchNorm2d) for width in reversed(widths[:-1]))

    @classmethod
    def for_picture(cls, height: int, width: int) -> Hourglass:
        """Levels down to about 8 pixels, which see across any hole that surroundings can fill."""
        doublings = max(2, round(math.log2(min(height, width) / 8)))
        return cls([16, 32, *[64] * (doublings - 1)])

    def forward(self, x: Tensor) -> Tensor:
        """The pictures."""
        height, width = x.shape[2:]
        x = padded(x, self.multiple)
        for level, block in enumerate(self.down):
            x = block(self.pool(x) if level else x)
        for up, merge in zip(self.up, self.merge, strict=True):
            x = merge(up(x))
        return torch.tanh(self.head(x)[:, :, :height, :width])


def require_fillable(missing: np.ndarray) -> None:
    """Refuse masks, bool (H, W), with nothing to fill or nothing to fill it from; a UserError."""
    if min(missing.shape) < LEAST:
        raise UserError(
            f"a picture of {missing.shape[1]}x{missing.shape[0]} is too small: each side needs {LEAST} pixels"
        )
    if not missing.any():
        raise UserError("the mask is black: nothing is missing (white marks what is)")
    if missing.all():
        raise UserError("the mask is white: everything is missing, and nothing is left to fill it from")


class DeepPrior:
    """A network that is fitted to the known pixels of one picture, step by step.

    What it shows is the running mean of its last outputs, which is better than any one of them: fresh noise in the
    codes and Adam's steps scatter them (section 3 of the paper, "denoising").

    Args:
        pixels: uint8 (H, W, 3); what it has at missing pixels is not read.
        missing: bool (H, W).
        seed: of weights and noise.

    Raises:
        UserError: nothing to fill, nothing to fill it from, or too small a picture.
    """

    def __init__(
        self, pixels: np.ndarray, missing: np.ndarray, seed: int = 0, device: torch.device | None = None
    ) -> None:
        require_fillable(missing)
        self.pixels, self.missing, self.steps = pixels, missing, 0
        device = device or torch.device("cpu")
        self.generator = torch.Generator().manual_seed(seed)
        # PyTorch's own initial weights, smaller than He's: before a norm, that makes Adam's steps relatively larger.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            network = Hourglass.for_picture(*missing.shape)
        self.network = network.to(device).to(memory_format=MEMORY_FORMAT)
        self.optimizer = torch.optim.Adam(self.network.parameters(), RATE)
        self.known = torch.from_numpy(~missing).to(device).float()
        self.target = to_float(torch.tensor(pixels[None], device=device)) * self.known
        self.codes = CODE_SCALE * torch.rand(1, CODES, *missing.shape, generator=self.generator)
        self.mean = torch.zeros_like(self.target)

    def step(self) -> float:
        """One step of Adam; the loss before it: the mean square over the known pixels, of values from -1 to 1."""
        noise = CODE_NOISE * torch.randn(self.codes.shape, generator=self.generator)
        shown = self.network((self.codes + noise).to(self.known.device))
        loss = ((shown * self.known - self.target) ** 2).sum() / (3 * self.known.sum())
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.mean.lerp_(shown.detach(), 1 - KEEP)
        self.steps += 1
        return loss.item()

    def picture(self) -> np.ndarray:
        """The picture, uint8 (H, W, 3), with the known pixels as they were; after at least one step."""
        # Divided as Adam's means are, or the start at 0 would pull it towards grey.
        shown = to_uint8(self.mean / (1 - KEEP**self.steps))[0].cpu().numpy()
        return np.where(self.missing[..., None], shown, self.pixels)


def diffuse(pixels: np.ndarray, missing: np.ndarray) -> np.ndarray:
    """Missing pixels as the mean of their neighbours: the solution of Laplace's equation, what heat would settle to.

    No heat flows across the border of the picture.

    Args:
        pixels: (H, W, C), any real type.
        missing: bool (H, W), not all of them.

    Returns:
        float64 (H, W, C); known pixels as they were.
    """
    count = int(missing.sum())
    number = np.full(missing.shape, -1)
    number[missing] = np.arange(count)
    filled = pixels.astype(np.float64)
    rows, columns, neighbours, sums = [], [], np.zeros(count), np.zeros((count, pixels.shape[2]))
    for axis in (0, 1):
        first, last = np.delete(number, -1, axis), np.delete(number, 0, axis)
        before, after = np.delete(filled, -1, axis), np.delete(filled, 0, axis)
        for own, other, values in ((first, last, after), (last, first, before)):
            inside, edge = (own >= 0) & (other >= 0), (own >= 0) & (other < 0)
            rows.append(own[inside])
            columns.append(other[inside])
            np.add.at(neighbours, own[own >= 0], 1)
            np.add.at(sums, own[edge], values[edge])
    place = np.concatenate(rows), np.concatenate(columns)
    among = sparse.csc_matrix((np.ones(len(place[0])), place), (count, count))
    filled[missing] = spsolve(sparse.diags(neighbours, format="csc") - among, sums).reshape(count, -1)
    return filled


def psnr(picture: np.ndarray, original: np.ndarray, where: np.ndarray) -> float:
    """Peak signal-to-noise ratio in dB of uint8 pictures (H, W, 3) over the pixels `where`, bool (H, W)."""
    error = np.mean((picture[where].astype(np.float64) - original[where]) ** 2)
    return math.inf if error == 0 else 10 * math.log10(255**2 / error)
