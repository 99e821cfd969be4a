"""What the page of `facet play` shows of a model, without Gradio."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import ImageOps
from torch import Tensor, nn

from core.cli.errors import UserError
from core.data.decode import reason_of
from core.data.mask_pictures import overlay
from core.data.movie import write_movie
from core.nn.model_file import FILE_NAME, model_file, read_recipe
from gen.directions import directions
from gen.latents import sample_latents
from gen.sample import load_generator, render, slerp
from gen.walk import walk
from seg.masks import masks_of
from seg.predict import Segmenter, load_segmenter, read_picture

DIRECTIONS = 8  # sliders
WALK_FPS = 15


@dataclass(frozen=True)
class Faces:
    """A generator, and the pictures that the page shows of it, uint8 (H, W, 3) each.

    Seeds give the faces of `facet sample`; for `truncation` see `gen.latents.sample_latents`.

    Attributes:
        name, facts: for people.
        directions: unit vectors (DIRECTIONS, latent_dim), see `gen.directions`; none where there are none, for the
            reason `lacking`.
    """

    name: str
    facts: str
    model: nn.Module
    directions: Tensor
    lacking: str = ""

    def latents(self, seeds: Sequence[int], truncation: float | None) -> Tensor:
        """Latents of seeds (len(seeds), latent_dim)."""
        return sample_latents(seeds, int(self.model.latent_dim), truncation)  # type: ignore[arg-type]

    def several(self, seeds: Sequence[int], truncation: float | None = None) -> np.ndarray:
        """The faces of seeds (N, H, W, 3)."""
        return render(self.model, self.latents(seeds, truncation))

    def moved(self, seed: int, steps: Sequence[float], truncation: float | None = None) -> np.ndarray:
        """The face of a seed, moved by `steps` along the directions."""
        z = self.latents([seed], truncation)
        return render(self.model, z + torch.tensor(steps, dtype=torch.float32) @ self.directions[: len(steps)])[0]

    def mixed(self, seeds: tuple[int, int], share: float, truncation: float | None = None) -> np.ndarray:
        """Two faces and what is `share` of the way from the first to the second: (3, H, W, 3), that in the middle."""
        first, second = self.latents(seeds, truncation)
        between = first if seeds[0] == seeds[1] else slerp(first, second, torch.tensor([float(share)]))[0]
        return render(self.model, torch.stack([first, between, second]))

    def write_walk(self, path: Path, seed: int, seconds: float, truncation: float | None = None) -> None:
        """Write a closed walk of eight faces as GIF, WebP or MP4."""
        write_movie(path, walk(self.model, seed, round(seconds * WALK_FPS), seconds, truncation), WALK_FPS)


@dataclass(frozen=True)
class Masks:
    """A segmenter, and what the page shows of it."""

    name: str
    facts: str
    segmenter: Segmenter

    def of(self, file: Path) -> tuple[np.ndarray, np.ndarray, list[tuple[str, str, float]]]:
        """Overlay and mask in class colours, uint8 (H, W, 3), of a picture, and the classes.

        It is decoded as by `facet predict`, but turned as cameras say in EXIF, for so a browser shows it.

        Returns:
            Both, and number and name, colour (#rrggbb) and share of each class, the most frequent first.

        Raises:
            UserError: the picture cannot be read, or it or its prediction does not fit into memory.
        """
        try:
            decoded = read_picture(file, self.segmenter.value_range)
            picture = np.array(ImageOps.exif_transpose(decoded))
        except Exception as error:  # decoders raise nearly anything for damaged files
            raise UserError(f"cannot read the picture: {reason_of(error)}") from error
        mask, palette = masks_of(self.segmenter, picture), self.segmenter.palette
        assert isinstance(mask, np.ndarray)
        shares = np.bincount(mask.reshape(-1), minlength=len(palette)) / mask.size
        order = np.argsort(-shares, kind="stable")
        colours = ["#" + bytes(colour).hex() for colour in palette]
        classes = [
            (f"{index} {self.segmenter.classes[index]}", colours[index], float(shares[index])) for index in order
        ]
        return overlay(picture, mask, palette), np.array(palette, np.uint8)[mask], classes


def load(run_or_file: str | Path, device: str = "auto") -> Faces | Masks:
    """The generator or segmenter of a run folder or model file.

    Raises:
        UserError: no model, a damaged one, one that neither generates nor segments, or no such device.
    """
    file = model_file(run_or_file)
    recipe, _ = read_recipe(file)
    resolved = file.resolve()
    name = resolved.parent.name if resolved.name == FILE_NAME else resolved.stem
    if str(recipe.get("_target_")).startswith("seg."):
        segmenter = load_segmenter(file, device)
        return Masks(name, f"{len(segmenter.classes)} classes; {segmenter.reason}", segmenter)
    model, info = load_generator(file, device)
    latent_dim = int(model.latent_dim)  # type: ignore[arg-type]
    kind = str(recipe["_target_"]).removeprefix("gen.").removesuffix(".Generator")  # as `model` names it: dcgan
    facts = f"{kind}, {latent_dim} latent components"
    facts += f", {info['images_seen']:,} images seen" if isinstance(info.get("images_seen"), int) else ""
    try:
        return Faces(name, facts, model, directions(model, DIRECTIONS))
    except UserError as error:
        return Faces(name, facts, model, torch.empty(0, latent_dim), str(error))
