"""What the benchmark compares with: plain loops as in tutorials, in fp32, eager, NCHW, with PyTorch's defaults.

The networks are ours, which consist of PyTorch's own layers; on a GPU the defaults let cuDNN use TF32. Under
`accelerate launch` the networks are wrapped in `DistributedDataParallel`.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from pytorch_fid.fid_score import get_activations
from scipy import linalg
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from torchvision import transforms
from torchvision.datasets import ImageFolder
from torchvision.utils import save_image

from core.nn.init import init_normal
from core.nn.model_file import build_model

LATENT_DIM = 100
WORKERS = 2  # of the loader, as in the tutorial


class GanLoop:
    """The usual DCGAN recipe, for a model of conf/model: D on real and on generated images, then G through D."""

    def __init__(self, model: dict[str, Any], device: torch.device, ranks: int) -> None:
        networks = [build_model(model["generator"]), build_model(model["discriminator"])]
        for seed, network in enumerate(networks):
            init_normal(network, seed=seed)
        self.device = device
        self.generator, self.discriminator = (_wrapped(network.to(device), device, ranks) for network in networks)
        self.loss = nn.BCELoss()
        self.g_optimizer = torch.optim.Adam(self.generator.parameters(), 2e-4, (0.5, 0.999))
        self.d_optimizer = torch.optim.Adam(self.discriminator.parameters(), 2e-4, (0.5, 0.999))
        self.history: list[float] = []

    def step(self, real: Tensor) -> None:
        """One step of D and one of G on images (N, 3, H, W) in [-1, 1]; reads five statistics back."""
        self.discriminator.zero_grad()
        ones, zeros = torch.ones(len(real), device=self.device), torch.zeros(len(real), device=self.device)
        on_real = self.discriminator(real).sigmoid()
        real_loss = self.loss(on_real, ones)
        real_loss.backward()
        fake = self.generator(torch.randn(len(real), LATENT_DIM, device=self.device))
        on_fake = self.discriminator(fake.detach()).sigmoid()
        fake_loss = self.loss(on_fake, zeros)
        fake_loss.backward()
        self.d_optimizer.step()
        self.generator.zero_grad()
        fooled = self.discriminator(fake).sigmoid()
        g_loss = self.loss(fooled, ones)  # also leaves gradients in D, which the next step clears
        g_loss.backward()
        self.g_optimizer.step()
        means = on_real.mean().item(), on_fake.mean().item(), fooled.mean().item()
        self.history = [*means, (real_loss + fake_loss).item(), g_loss.item()]


class UNetLoop:
    """Cross-entropy and Adam; the loss is read back in every step."""

    def __init__(self, recipe: dict[str, Any], device: torch.device, ranks: int) -> None:
        self.network = _wrapped(build_model(recipe).to(device), device, ranks)
        self.optimizer = torch.optim.Adam(self.network.parameters(), lr=1e-3)
        self.history: list[float] = []

    def step(self, images: Tensor, masks: Tensor) -> None:
        """One step on images (N, 3, H, W) in [-1, 1] and int64 masks (N, H, W) with 255 = ignore."""
        self.optimizer.zero_grad()
        loss = nn.functional.cross_entropy(self.network(images), masks, ignore_index=255)
        loss.backward()
        self.optimizer.step()
        self.history = [loss.item()]


def _wrapped(network: nn.Module, device: torch.device, ranks: int) -> nn.Module:
    devices = [device] if device.type == "cuda" else None
    return DistributedDataParallel(network, device_ids=devices) if ranks > 1 else network


class FolderLoader:
    """Batches from a folder of JPEG files, decoded, resized and cropped by two workers, which idle between calls."""

    def __init__(self, folder: Path, size: int, batch: int, seed: int) -> None:
        steps = [transforms.Resize(size), transforms.CenterCrop(size), transforms.ToTensor()]
        pictures = ImageFolder(str(folder), transforms.Compose([*steps, transforms.Normalize((0.5,) * 3, (0.5,) * 3)]))
        self.files, self.batch, self.rng = len(pictures), batch, np.random.default_rng(seed)
        self.rows: list[int] = []  # what the loader goes through on its next pass
        self.loader = DataLoader(pictures, batch, sampler=self.rows, num_workers=WORKERS, persistent_workers=True)

    def batches(self, count: int) -> Iterator[Tensor]:
        """`count` batches of random files, float (batch, 3, size, size) in [-1, 1]."""
        self.rows[:] = self.rng.integers(0, self.files, count * self.batch).tolist()
        for images, _ in self.loader:
            yield images


@torch.no_grad()
def save_samples(network: nn.Module, count: int, folder: Path, device: torch.device) -> None:
    """Make `count` pictures and save them as PNG with torchvision, one at a time."""
    folder.mkdir(parents=True, exist_ok=True)
    for index in range(count):
        image = network(torch.randn(1, LATENT_DIM, device=device))
        save_image(image, folder / f"{index}.png", normalize=True, value_range=(-1, 1))


def published_features(files: list[Path], network: nn.Module, dims: int, device: torch.device, cores: int) -> None:
    """pytorch-fid's own loop with the defaults of its command line: batches of 50, up to 8 workers."""
    with contextlib.redirect_stderr(io.StringIO()):  # its progress bar
        get_activations(files, network, min(50, len(files)), dims, device, min(cores, 8))


def frechet_by_sqrtm(a: np.ndarray, b: np.ndarray) -> float:
    """The Frechet distance of two sets of features (n, D), with SciPy's matrix root."""
    first, second = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    difference = a.mean(axis=0) - b.mean(axis=0)
    root = linalg.sqrtm(first @ second)
    return float(difference @ difference + np.trace(first + second - 2 * root.real))


def prepare_one_by_one(folder: Path, size: int, out: Path) -> int:
    """Decode, resize and crop all JPEG files in a loop and save them as one array; returns their number."""
    change = transforms.Compose([transforms.Resize(size), transforms.CenterCrop(size)])
    files = sorted(folder.rglob("*.jpg"))
    np.save(out, np.stack([np.asarray(change(Image.open(file).convert("RGB"))) for file in files]))
    return len(files)
