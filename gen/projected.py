"""A discriminator that looks at images through a frozen pretrained network (Projected GAN: Sauer et al. 2021,
https://arxiv.org/abs/2111.01007), so that it need not learn what pictures are made of.

Unlike in the paper, the frozen part is any network that has feature maps, each projected map is scaled to a second
moment of 1, and an ordinary discriminator of the pixels may be added, which sees what the frozen network overlooks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.nn import functional as F

from core.cli.errors import UserError
from core.nn.backbone import DEFAULT, STRIDES, Backbone
from core.nn.blocks import ConvBlock, require_positive
from core.nn.fuse import fold_foreign
from core.nn.init import apply_spectral_norm, init_he
from gen.dcgan import Discriminator as PixelDiscriminator
from gen.losses import image_logits

Projections = Literal["none", "channels", "scales"]
COARSE = 16  # side in pixels of the images for the coarse discriminator
COARSEST = 4  # side in pixels down to which a head halves its map
SPREAD = (49471, 37345)  # of 2^16: multiples of these two fill the unit square evenly (the R2 sequence, Roberts 2018)
NOISE_SIDES = (4, 8, 16, 32, 64)  # of the noise at which the maps are scaled
NOISE_IMAGES = 16


class FrozenFeatures(nn.Module):
    """Images (N, 3, H, W) in [-1, 1] -> projected feature maps, fine to coarse; nothing in it is trained.

    The projections are random and stay as they are drawn (section 3.2 of the paper): a 1x1 convolution mixes the
    channels of each map; then, from coarse to fine, the map below is enlarged, put through a 3x3 convolution and added.
    """

    def __init__(self, backbone: Backbone, resolution: int, projections: Projections) -> None:
        super().__init__()
        self.backbone, self.resolution = backbone, resolution
        self.backbone_sha256 = backbone.weights_sha256  # of the weights as they were read
        fold_foreign(backbone.network)
        widths = backbone.widths
        conv = partial(nn.Conv2d, bias=False)
        mix = widths if projections != "none" else ()
        self.channels = nn.ModuleList(conv(width, width, 1) for width in mix)
        coarser = zip(widths[1:], widths, strict=False) if projections == "scales" else ()
        self.scales = nn.ModuleList(conv(wide, narrow, 3, padding=1) for wide, narrow in coarser)
        self.requires_grad_(False).eval()

    def forward(self, images: Tensor) -> list[Tensor]:
        """The maps of the images, which are first resized to `resolution`."""
        if images.shape[-1] != self.resolution:
            size = (self.resolution, self.resolution)
            images = F.interpolate(images, size, mode="bilinear", antialias=self.resolution < images.shape[-1])
        maps = self.backbone(images)
        maps = [mix(found) for mix, found in zip(self.channels, maps, strict=True)] if self.channels else maps
        for place in reversed(range(len(self.scales))):
            below = F.interpolate(maps[place + 1], maps[place].shape[2:], mode="bilinear")
            maps[place] = maps[place] + self.scales[place](below)
        return maps


class Discriminator(nn.Module):
    """Images (N, 3, image_size, image_size) in [-1, 1] -> logits (N,), positive for "real": the mean over the heads.

    `forward_all` gives the logits of each head, on which losses are summed: a small network with spectral normalisation
    judges each map of the frozen one. The frozen network and its projections are no submodules: they are not among the
    parameters and not in the state, and copies share them.

    Args:
        image_size: H = W.
        backbone, weights: see `core.nn.backbone.Backbone`.
        resolution: side in pixels to which images are resized for the frozen network.
        strides: of the maps that get a head.
        projections: `none`, `channels` (1x1 convolutions) or `scales` (these, then from coarse to fine).
        head_width: channels of each head.
        minibatch_deviation: give the heads the mean standard deviation over the batch as one more channel (Karras et
            al. 2018, section 3). Images are then no longer judged each by itself.
        pixel_width: `width` of a `gen.dcgan.Discriminator` of the pixels; 0 for none.
        coarse_width: channels of an ordinary discriminator of the images at 16 pixels, which also sees their deviation
            over the batch; 0 for none. Only a seventh of the gradient that comes through the frozen network is about
            areas of 8 pixels or more, and backgrounds are of two or three kinds for lack of it.
        pixel_gain: factor of the gradient of the logits of both with respect to the images. At 1 that of the pixels is
            a tenth of those of the heads, so that G hardly hears of textures to which the frozen network is blind.
        jitter: in training, the frozen network sees all images of a batch moved by up to so many pixels, mirrored at
            the edges. Its strides otherwise leave stripes and grids in the samples.

    Attributes:
        pretrained: name and SHA-256 of the frozen network, for model files.

    Raises:
        UserError: an argument out of range; errors of the backbone; in `load_state_dict` a state that belongs to other
            weights of the backbone.
    """

    judges_pixels = False
    backbone_sha256: Tensor
    scale: Tensor
    passes: Tensor

    def __init__(
        self,
        image_size: int = 64,
        backbone: str = DEFAULT,
        weights: str = "package",
        resolution: int = 64,
        strides: Sequence[int] = STRIDES,
        projections: Projections = "scales",
        head_width: int = 64,
        minibatch_deviation: bool = False,
        pixel_width: int = 16,
        coarse_width: int = 0,
        pixel_gain: float = 10.0,
        jitter: int = 4,
    ) -> None:
        super().__init__()
        require_positive(head_width=head_width, resolution=resolution)
        if not isinstance(jitter, int) or not 0 <= jitter < image_size:
            raise UserError(f"jitter={jitter} must be a whole number from 0 to {image_size - 1}")
        if not 0 < pixel_gain < math.inf:
            raise UserError(f"pixel_gain={pixel_gain} must be above 0")
        if projections not in get_args(Projections):
            raise UserError(f"projections={projections!r} is unknown: use one of {', '.join(get_args(Projections))}")
        network = Backbone(backbone, weights, strides=strides)
        self.frozen = _Apart(FrozenFeatures(network, resolution, projections))
        self.pretrained = {"network": backbone, "sha256": self.frozen.module.backbone_sha256}
        digest = bytes.fromhex(self.frozen.module.backbone_sha256 or "")
        self.register_buffer("backbone_sha256", torch.tensor(list(digest), dtype=torch.uint8))
        self.register_buffer("scale", torch.ones(len(network.widths)))
        self.register_buffer("passes", torch.zeros((), dtype=torch.int64))  # in training
        self.pixel_gain, self.jitter = pixel_gain, jitter
        self.heads = nn.ModuleList(
            _head(channels, resolution // stride, head_width, minibatch_deviation)
            for channels, stride in zip(network.widths, network.strides, strict=True)
        )
        self.coarse = _coarse(coarse_width) if coarse_width else None
        apply_spectral_norm(self)
        self.pixels = PixelDiscriminator(image_size, pixel_width, norm="spectral") if pixel_width else None

    @torch.no_grad()
    def initialise(self, seed: int) -> None:
        """Draw projections and weights from `seed` alone, and scale the maps by those of smooth random pictures."""
        frozen = self.frozen.module
        init_he(nn.ModuleList([frozen.channels, frozen.scales, self]), seed)
        if frozen.backbone.weights == "none":
            init_he(frozen.backbone, seed)
        hooks = [conv.register_forward_hook(_level) for conv in (*frozen.channels, *frozen.scales)]
        maps = frozen(_noise(seed, frozen.resolution))
        for hook in hooks:
            hook.remove()
        self.scale.copy_(torch.stack([found.square().mean().rsqrt() for found in maps]))

    def forward(self, images: Tensor) -> Tensor:
        """Logits of the images (N,)."""
        return image_logits(self.forward_all(images))

    def forward_all(self, images: Tensor) -> tuple[Tensor, ...]:
        """Logits of each head at the places of its map (N, H', W'), fine to coarse, then of the ordinary ones (N,)."""
        maps = self.frozen.module(self._moved(images))
        judged = [head(found * scale) for head, found, scale in zip(self.heads, maps, self.scale, strict=True)]
        images = _Gain.apply(images, self.pixel_gain)
        on_coarse = [] if self.coarse is None else [self.coarse(F.interpolate(images, (COARSE, COARSE), mode="area"))]
        on_pixels = [] if self.pixels is None else [self.pixels(images)]
        return (*(logits.squeeze(1) for logits in judged), *on_coarse, *on_pixels)

    def _moved(self, images: Tensor) -> Tensor:
        """The images, in training moved by at most `jitter` pixels, all ways alike."""
        if not (self.training and self.jitter):
            return images
        # Computed, not drawn: a run that continues goes on where it was, and no device has to wait.
        down, right = (self.passes * factor % 2**16 * (2 * self.jitter + 1) // 2**16 for factor in SPREAD)
        self.passes += 1
        rows, columns = (torch.arange(size, device=images.device) for size in images.shape[2:])
        mirrored = F.pad(images, [self.jitter] * 4, mode="reflect")
        return mirrored.index_select(2, rows + down).index_select(3, columns + right)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Discriminator:
        """Move the frozen part along: `to` ends here."""
        self.frozen.module._apply(fn, recurse)
        return super()._apply(fn, recurse)

    def _load_from_state_dict(self, state: dict[str, Any], prefix: str, *others: Any) -> None:
        digests = state[f"{prefix}backbone_sha256"], self.backbone_sha256
        was, now = (bytes(digest.tolist()).hex() for digest in digests)
        if was != now:
            raise UserError(
                f"the weights of {self.frozen.module.backbone.name} are not those that this run began with (sha256 "
                f"{now[:12] or 'none'} instead of {was[:12] or 'none'}): restore them, or use another name=..."
            )
        super()._load_from_state_dict(state, prefix, *others)


class _Gain(Function):
    """The images; their gradient is multiplied."""

    @staticmethod
    def forward(ctx: Any, images: Tensor, gain: float) -> Tensor:
        ctx.gain = gain
        return images.view_as(images)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return ctx.gain * grad, None


class _Apart:
    """Holds a module that does not belong to the one that uses it: not to its parameters, state or copies."""

    def __init__(self, module: FrozenFeatures) -> None:
        self.module = module

    def __deepcopy__(self, memo: dict[int, Any]) -> _Apart:
        return self


class _MinibatchDeviation(nn.Module):
    """Adds a channel that holds the standard deviation over the batch, averaged over channels and pixels."""

    def forward(self, x: Tensor) -> Tensor:
        deviation = (x.float().var(0, correction=0) + 1e-8).sqrt().mean()
        return torch.cat([x, deviation.to(x.dtype).expand(len(x), 1, *x.shape[2:])], dim=1)


def _level(conv: nn.Module, _: Any, out: Tensor) -> Tensor:
    """Scale a projection so that the second moment of its map is 1, or what is coarse would drown what is fine.

    By a power of 2: machines that round differently still get the same weights.
    """
    gain = out.square().mean().rsqrt().log2().round().exp2()
    conv.weight.mul_(gain)  # type: ignore[operator]
    return out * gain


def _head(channels: int, side: int, width: int, minibatch_deviation: bool) -> nn.Sequential:
    """A network from a map of `side` pixels to one logit for each place of at most 4x4."""
    block = partial(ConvBlock, padding=1, norm=None, activation=partial(nn.LeakyReLU, 0.2, inplace=True))
    layers: list[nn.Module] = [block(channels, width)]
    while side > COARSEST:
        layers.append(block(width, width, kernel=4, stride=2))
        side //= 2
    if minibatch_deviation:
        layers.append(_MinibatchDeviation())
    last = ConvBlock(width, 1, kernel=1, norm=None, activation=None)
    return nn.Sequential(*layers, block(width + minibatch_deviation, width), last)


def _coarse(width: int) -> nn.Sequential:
    """Images (N, 3, 16, 16) and how much they differ -> logits (N,)."""
    require_positive(coarse_width=width)
    block = partial(ConvBlock, padding=1, norm=None, activation=partial(nn.LeakyReLU, 0.2, inplace=True))
    return nn.Sequential(
        block(3, width),
        block(width, 2 * width, kernel=4, stride=2),
        block(2 * width, 4 * width, kernel=4, stride=2),
        _MinibatchDeviation(),
        block(4 * width + 1, 4 * width),
        ConvBlock(4 * width, 1, kernel=4, norm=None, activation=None),
        nn.Flatten(0),
    )


def _noise(seed: int, resolution: int) -> Tensor:
    """Random pictures (16, 3, resolution, resolution) in [-1, 1] as smooth as photographs: equal noise at each size."""
    generator = torch.Generator().manual_seed(seed)
    layers = (torch.randn(NOISE_IMAGES, 3, side, side, generator=generator) for side in NOISE_SIDES)
    size = (resolution, resolution)
    return torch.stack([F.interpolate(layer, size, mode="bilinear") for layer in layers]).sum(0).div(4).clamp(-1, 1)
