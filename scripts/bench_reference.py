"""What the benchmark compares with: plain loops as tutorials have them, in fp32, eager, channel planes (NCHW).

They use PyTorch's defaults throughout, so on a GPU cuDNN may take TF32 in convolutions. Under `accelerate launch` their
networks are wrapped in `DistributedDataParallel`, as a user would do it.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from pytorch_fid.fid_score import get_activations
from scipy import linalg
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Sampler
from torchvision import transforms
from torchvision.datasets import ImageFolder
from torchvision.utils import save_image

from core.nn.blocks import doublings
from core.nn.init import init_normal

LATENT_DIM = 100
LOADER_WORKERS = 2  # of the tutorial


def generator(size: int, width: int) -> nn.Sequential:
    """Latents (N, 100, 1, 1) -> images (N, 3, size, size), the DCGAN of `gen.dcgan` in plain layers."""
    widths = [width << level for level in reversed(range(doublings(size)))]
    layers = [nn.ConvTranspose2d(LATENT_DIM, widths[0], 4, 1, 0, bias=False), nn.BatchNorm2d(widths[0]), nn.ReLU(True)]
    for wide, narrow in pairwise(widths):
        layers += [nn.ConvTranspose2d(wide, narrow, 4, 2, 1, bias=False), nn.BatchNorm2d(narrow), nn.ReLU(True)]
    return nn.Sequential(*layers, nn.ConvTranspose2d(width, 3, 4, 2, 1, bias=False), nn.Tanh())


def discriminator(size: int, width: int) -> nn.Sequential:
    """Images (N, 3, size, size) -> probabilities (N, 1, 1, 1)."""
    widths = [width << level for level in range(doublings(size))]
    layers: list[nn.Module] = [nn.Conv2d(3, width, 4, 2, 1, bias=False), nn.LeakyReLU(0.2, True)]
    for narrow, wide in pairwise(widths):
        layers += [nn.Conv2d(narrow, wide, 4, 2, 1, bias=False), nn.BatchNorm2d(wide), nn.LeakyReLU(0.2, True)]
    return nn.Sequential(*layers, nn.Conv2d(widths[-1], 1, 4, 1, 0, bias=False), nn.Sigmoid())


class GanLoop:
    """The common DCGAN recipe: D on real and on generated images with a backward pass each, then G through D."""

    def __init__(self, size: int, width: int, device: torch.device, ranks: int) -> None:
        networks = [generator(size, width), discriminator(size, width)]
        for seed, network in enumerate(networks):
            init_normal(network, seed=seed)
        self.device = device
        self.generator, self.discriminator = (wrapped(network.to(device), device, ranks) for network in networks)
        self.loss = nn.BCELoss()
        adam = {"lr": 2e-4, "betas": (0.5, 0.999)}
        self.g_optimizer = torch.optim.Adam(self.generator.parameters(), **adam)  # type: ignore[arg-type]
        self.d_optimizer = torch.optim.Adam(self.discriminator.parameters(), **adam)  # type: ignore[arg-type]
        self.history: list[float] = []

    def step(self, real: Tensor) -> None:
        """One step of D and one of G on images (N, 3, H, W) in [-1, 1]; reads its statistics back, as tutorials do."""
        self.discriminator.zero_grad()
        ones, zeros = torch.ones(len(real), device=self.device), torch.zeros(len(real), device=self.device)
        on_real = self.discriminator(real).view(-1)
        real_loss = self.loss(on_real, ones)
        real_loss.backward()
        fake = self.generator(torch.randn(len(real), LATENT_DIM, 1, 1, device=self.device))
        on_fake = self.discriminator(fake.detach()).view(-1)
        fake_loss = self.loss(on_fake, zeros)
        fake_loss.backward()
        self.d_optimizer.step()
        self.generator.zero_grad()
        fooled = self.discriminator(fake).view(-1)
        g_loss = self.loss(fooled, ones)  # D's weights get gradients here too; the next step clears them
        g_loss.backward()
        self.g_optimizer.step()
        means = on_real.mean().item(), on_fake.mean().item(), fooled.mean().item()
        self.history = [*means, (real_loss + fake_loss).item(), g_loss.item()]


class PlainUNet(nn.Module):
    """A U-Net of 3x3 convolutions with batch norm and ReLU: images (N, 3, H, W) -> logits (N, classes, H, W)."""

    def __init__(self, widths: Sequence[int], classes: int) -> None:
        super().__init__()
        self.down = nn.ModuleList(self._double(narrow, wide) for narrow, wide in pairwise((3, *widths)))
        upwards = list(pairwise(reversed(widths)))
        self.up = nn.ModuleList(nn.ConvTranspose2d(wide, narrow, 2, 2) for wide, narrow in upwards)
        self.merge = nn.ModuleList(self._double(2 * narrow, narrow) for _, narrow in upwards)
        self.head = nn.Conv2d(widths[0], classes, 1)

    @staticmethod
    def _double(before: int, after: int) -> nn.Sequential:
        layers: list[nn.Module] = []
        for channels in (before, after):
            layers += [nn.Conv2d(channels, after, 3, padding=1), nn.BatchNorm2d(after), nn.ReLU(True)]
        return nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        """Logits of the images, whose sides must be divisible by 2 to the number of poolings."""
        skips = []
        for level, block in enumerate(self.down):
            x = block(nn.functional.max_pool2d(x, 2) if level else x)
            skips.append(x)
        for up, merge, skip in zip(self.up, self.merge, reversed(skips[:-1]), strict=True):
            x = merge(torch.cat([skip, up(x)], 1))
        return self.head(x)


class UNetLoop:
    """Cross-entropy and Adam, with the loss read back in every step."""

    def __init__(self, widths: Sequence[int], classes: int, device: torch.device, ranks: int) -> None:
        self.network = wrapped(PlainUNet(widths, classes).to(device), device, ranks)
        self.optimizer = torch.optim.Adam(self.network.parameters(), lr=1e-3)
        self.history: list[float] = []

    def step(self, images: Tensor, masks: Tensor) -> None:
        """One step on images (N, 3, H, W) in [-1, 1] and int64 masks (N, H, W) with 255 = ignore."""
        self.optimizer.zero_grad()
        loss = nn.functional.cross_entropy(self.network(images), masks, ignore_index=255)
        loss.backward()
        self.optimizer.step()
        self.history = [loss.item()]


def wrapped(network: nn.Module, device: torch.device, ranks: int) -> nn.Module:
    """The network as it is on one process, else ready to exchange gradients."""
    if ranks == 1:
        return network
    return DistributedDataParallel(network, device_ids=[device] if device.type == "cuda" else None)


class Draws(Sampler[int]):
    """As many random files as `count` says when a pass begins."""

    def __init__(self, files: int, seed: int) -> None:
        self.files, self.count, self.rng = files, 0, np.random.default_rng(seed)

    def __iter__(self) -> Iterator[int]:
        return iter(self.rng.integers(0, self.files, self.count).tolist())


class FolderLoader:
    """Batches from a folder of JPEG files, decoded, resized and cropped by two workers as they are needed.

    The workers stay between two calls, and do nothing then: what is measured in between is not disturbed.
    """

    def __init__(self, folder: Path, size: int, batch: int, seed: int) -> None:
        steps = [transforms.Resize(size), transforms.CenterCrop(size), transforms.ToTensor()]
        pictures = ImageFolder(str(folder), transforms.Compose([*steps, transforms.Normalize((0.5,) * 3, (0.5,) * 3)]))
        self.batch, self.draws = batch, Draws(len(pictures), seed)
        self.loader: DataLoader = DataLoader(
            pictures, batch, sampler=self.draws, num_workers=LOADER_WORKERS, persistent_workers=True
        )

    def batches(self, count: int) -> Iterator[Tensor]:
        """`count` batches, float (batch, 3, size, size) in [-1, 1]."""
        self.draws.count = count * self.batch
        for images, _ in self.loader:
            yield images


@torch.no_grad()
def save_samples(network: nn.Module, count: int, folder: Path, device: torch.device) -> None:
    """`count` PNG files, made and saved one at a time by torchvision."""
    folder.mkdir(parents=True, exist_ok=True)
    for index in range(count):
        image = network(torch.randn(1, LATENT_DIM, 1, 1, device=device))
        save_image(image, folder / f"{index}.png", normalize=True, value_range=(-1, 1))


def published_features(files: list[Path], network: nn.Module, dims: int, device: torch.device, cores: int) -> None:
    """pytorch-fid's own loop with the settings of its command line: batches of 50, up to 8 workers."""
    with contextlib.redirect_stderr(io.StringIO()):  # its progress bar
        get_activations(files, network, min(50, len(files)), dims, device, min(cores, 8))


def frechet_by_sqrtm(a: np.ndarray, b: np.ndarray) -> float:
    """The distance of two sets of features (n, D), from the matrix root of the product of the covariances."""
    first, second = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    difference = a.mean(axis=0) - b.mean(axis=0)
    root = linalg.sqrtm(first @ second)
    return float(difference @ difference + np.trace(first + second - 2 * root.real))


def prepare_one_by_one(folder: Path, size: int, out: Path) -> int:
    """Decode, resize and crop all JPEG files in a loop, and save them as one array; returns their number."""
    change = transforms.Compose([transforms.Resize(size), transforms.CenterCrop(size)])
    files = sorted(folder.rglob("*.jpg"))
    np.save(out, np.stack([np.asarray(change(Image.open(file).convert("RGB"))) for file in files]))
    return len(files)
