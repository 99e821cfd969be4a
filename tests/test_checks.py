"""The honesty checks on faces: quiet on held-out ones, each mistake found when it is planted."""

from __future__ import annotations

import io
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.spatial.distance import cdist

from core.drawn.face import draw_face
from core.prepare.geometry import resize_crop
from core.prepare.sources import open_image_source
from eval.checks.collapse import unlearned
from eval.checks.copies import duplicates, memorisation
from eval.checks.pixels import FEWEST_IMAGES, on_grid_detail, pixel_statistics
from eval.checks.verdicts import Check, Manifold, mode_collapse
from eval.features.extractors import RandomFeatures


@dataclass
class Part:
    pixels: np.ndarray
    features: np.ndarray


@dataclass
class Faces:
    train: Part
    held_out: Part
    samples: Part

    def nearest(self, features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Distance and index of the nearest training face, by scipy."""
        distance = cdist(features, self.train.features)
        return distance.min(axis=1), distance.argmin(axis=1)


def extract(pixels: np.ndarray) -> np.ndarray:
    network = RandomFeatures(torch.device("cpu"))
    blocks = [network(np.ascontiguousarray(pixels[start : start + 50])) for start in range(0, len(pixels), 50)]
    return np.concatenate(blocks).astype(np.float64)


@pytest.fixture(scope="session")
def faces(request: pytest.FixtureRequest) -> Faces:
    """600 real faces for training, 300 held out, 300 as samples of a perfect generator; drawn ones, fewer, without."""
    try:
        source = open_image_source(request.getfixturevalue("real_data") / "faces" / "celeba10k.zip")
    except pytest.skip.Exception:
        pictures, ends = [draw_face(3, index)[0] for index in range(100)], (40, 65)
    else:
        pictures, ends = [source.load(index)[0] for index in range(1200)], (600, 900)
    pixels = np.stack([np.asarray(resize_crop(picture, 64)) for picture in pictures])
    parts = zip(np.split(pixels, ends), np.split(extract(pixels), ends), strict=True)
    return Faces(*(Part(*part) for part in parts))


def noisy(pixels: np.ndarray, deviation: float = 5) -> np.ndarray:
    noise = np.random.default_rng(0).normal(0, deviation, pixels.shape)
    return (pixels + noise).round().clip(0, 255).astype(np.uint8)


def jpeg(pixels: np.ndarray, quality: int) -> np.ndarray:
    decoded = []
    for picture in pixels:
        buffer = io.BytesIO()
        Image.fromarray(picture).save(buffer, "JPEG", quality=quality)
        decoded.append(np.asarray(Image.open(buffer)))
    return np.stack(decoded)


def softened(pixels: np.ndarray) -> np.ndarray:
    small = [Image.fromarray(one).resize((32, 32), Image.Resampling.BILINEAR) for one in pixels]
    return np.stack([np.asarray(one.resize((64, 64), Image.Resampling.BILINEAR)) for one in small])


def remember(faces: Faces, samples: Part, held_out: bool = True) -> Check:
    reference = faces.nearest(faces.held_out.features) if held_out else None
    return memorisation(samples.pixels, faces.nearest(samples.features), reference, lambda i: faces.train.pixels[i])


def collapse(faces: Faces, samples: Part, *coverage: float) -> Check:
    train, compared = faces.train, pixel_statistics(samples.pixels, faces.train.pixels)
    manifold = Manifold((0.7, 0.7), coverage, "the random network") if coverage else None
    early = unlearned(samples.pixels, compared)
    return mode_collapse(samples.features, train.features, samples.pixels, train.pixels, manifold, early)


# --- quiet on held-out faces --------------------------------------------------------------------------------------


def test_held_out_faces_have_no_duplicates(faces):
    check = duplicates(faces.samples.pixels, faces.samples.features, faces.held_out.features)
    assert (check.verdict, check.pictures, check.figures["with_a_twin"]) == ("ok", None, 0)


def test_held_out_faces_are_not_memorised(faces):
    check = remember(faces, faces.samples)
    assert check.verdict == "ok"
    assert check.figures["copies"] == 0 and abs(check.figures["z"]) < 3
    assert check.pictures is not None and check.pictures.dtype == np.uint8


def test_pixels_of_held_out_faces_are_fine(faces):
    check = pixel_statistics(faces.samples.pixels, faces.train.pixels)
    assert check.verdict == "ok"
    assert check.figures["mean_R"] == pytest.approx(faces.samples.pixels[..., 0].mean())
    assert check.figures["sd_B"] == pytest.approx(faces.samples.pixels[..., 2].std())
    assert check.figures["zeros"] == pytest.approx((faces.samples.pixels == 0).mean())


def test_held_out_faces_have_all_modes(faces):
    check = collapse(faces, faces.samples, 0.93, 0.95)
    assert (check.verdict, check.pictures) == (("ok" if len(faces.samples.pixels) >= 100 else "skipped"), None)


# --- planted: copies ----------------------------------------------------------------------------------------------


def test_a_picture_twice_is_found_wherever_it_stands(faces):
    pixels, features = (np.concatenate([part, part[[4]]]) for part in (faces.samples.pixels, faces.samples.features))
    check = duplicates(pixels, features, faces.held_out.features)
    assert check.verdict == "bad" and "1 of the" in check.headline and "pixel for pixel" in check.headline
    assert (check.figures["exact_duplicates"], check.figures["with_a_twin"]) == (1, 2)
    assert np.array_equal(check.pictures[4:68, 4:68, :3], faces.samples.pixels[4])
    assert np.array_equal(check.pictures[4:68, 68:132, :3], faces.samples.pixels[4])


@pytest.mark.parametrize("with_reals", [True, False])
def test_pictures_with_small_noise_are_near_duplicates(faces, with_reals):
    again = noisy(faces.samples.pixels[:10])
    pixels = np.concatenate([faces.samples.pixels, again])
    features = np.concatenate([faces.samples.features, extract(again)])
    check = duplicates(pixels, features, faces.held_out.features if with_reals else None)
    assert check.verdict == "bad" and "look the same" in check.headline
    assert (check.figures["exact_duplicates"], check.figures["with_a_twin"]) == (0, 20)
    assert check.pictures.shape[0] == 3 * 68 + 4, "ten pairs, four a row"


def test_copied_training_images_with_small_noise_are_memorised(faces):
    copies = noisy(faces.train.pixels[:30])
    check = remember(faces, Part(copies, extract(copies)))
    assert check.verdict == "bad" and "30 of the 30 samples" in check.headline
    assert check.figures["z"] < -6 and check.figures["nearer_than_1_percent_of_held_out"] > 0.9


def test_a_few_mirrored_copies_among_good_samples_are_found_and_shown_first(faces):
    copies = np.ascontiguousarray(faces.train.pixels[:1, :, ::-1])
    pixels, original = np.concatenate([faces.samples.pixels, copies]), 0
    distance, index = faces.nearest(faces.samples.features)
    nearest = (np.append(distance, distance.max()), np.append(index, original))
    check = memorisation(pixels, nearest, (distance, index), lambda i: faces.train.pixels[i])
    assert check.figures["copies"] == 1
    assert check.verdict == ("doubt" if len(pixels) > 100 else "bad")
    assert np.array_equal(check.pictures[4:68, 4:68, :3], copies[0])
    assert np.array_equal(check.pictures[4:68, 68:132, :3], faces.train.pixels[0])


def test_without_held_out_images_memorisation_is_skipped_with_advice(faces):
    check = remember(faces, faces.samples, held_out=False)
    assert check.verdict == "skipped" and "split=train" in check.details


def test_copies_are_reported_without_held_out_images_too(faces):
    assert remember(faces, Part(faces.train.pixels[:20], faces.train.features[:20]), held_out=False).verdict == "bad"


def test_training_images_of_another_size_are_compared_at_the_samples_size(faces):
    small = np.stack([np.asarray(Image.fromarray(one).resize((32, 32))) for one in faces.train.pixels[:20]])
    index = np.arange(20)
    check = memorisation(small, (np.ones(20), index), None, lambda i: faces.train.pixels[i])
    assert check.figures["copies"] == 20


# --- planted: pixels ----------------------------------------------------------------------------------------------


def unscaled(pixels: np.ndarray) -> np.ndarray:
    return ((pixels / 127.5 - 1) * 255).clip(0, 255).astype(np.uint8)


def grey(pixels: np.ndarray) -> np.ndarray:
    return np.repeat(pixels.mean(axis=3, keepdims=True).astype(np.uint8), 3, axis=3)


def stretched(pixels: np.ndarray) -> np.ndarray:
    return ((pixels - 128.0) * 1.5 + 128).clip(0, 255).astype(np.uint8)


MISTAKES = {
    "unscaled tanh": (unscaled, "bad", "saved wrongly"),
    "zero to one": (lambda pixels: (pixels / 255).astype(np.uint8), "bad", "saved wrongly"),
    "BGR": (lambda pixels: pixels[..., ::-1], "bad", "swapped: read as BGR"),
    "GBR": (lambda pixels: pixels[..., [1, 2, 0]], "bad", "swapped: read as GBR"),
    "grey": (grey, "bad", "100% of the samples are grey"),
    "clipped": (stretched, None, "clipped"),
    "washed out": (lambda pixels: pixels // 4 + 90, "doubt", "Colours differ"),
    "JPEG 50": (lambda pixels: jpeg(pixels, 50), "bad", "were JPEG"),
    "JPEG 90": (lambda pixels: jpeg(pixels, 90), None, "were JPEG"),
    "blurred": (softened, "doubt", "softer"),
    "noise": (lambda pixels: noisy(pixels, 20), "doubt", "rougher"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_in_the_pixels_is_named(faces, mistake):
    plant, verdict, words = MISTAKES[mistake]
    check = pixel_statistics(plant(faces.samples.pixels[:100]), faces.train.pixels[:100])
    assert words in f"{check.headline} {check.details}"
    assert check.verdict == verdict or (verdict is None and check.verdict in ("doubt", "bad"))


def test_two_mistakes_are_both_told(faces):
    check = pixel_statistics(jpeg(faces.samples.pixels[:50, ..., ::-1], 50), faces.train.pixels[:50])
    assert check.verdict == "bad" and "JPEG" in check.headline and "swapped" in check.details


def test_reals_that_were_jpeg_files_are_told(faces):
    check = pixel_statistics(faces.samples.pixels[:50], jpeg(faces.train.pixels[:50], 75))
    assert check.verdict == "doubt" and "reals were JPEG" in check.headline


def test_jpeg_leaves_its_mark_on_its_own_grid_only(faces):
    decoded = jpeg(faces.samples.pixels[:30], 75)
    assert on_grid_detail(decoded) < 0.3 < 0.8 < on_grid_detail(decoded[:, 3:, 3:])


def test_too_few_pictures_are_not_judged(faces):
    few = faces.samples.pixels[: FEWEST_IMAGES - 1]
    assert pixel_statistics(few, faces.train.pixels).verdict == "skipped"


# --- planted: modes -----------------------------------------------------------------------------------------------


def repeated(faces: Faces, count: int, modes: int) -> Part:
    """The samples, the first `count` of them replaced by `modes` faces repeated with small noise."""
    if len(faces.samples.pixels) < 100:
        pytest.skip("modes need at least 100 samples: there are no real faces")
    pixels = noisy(faces.samples.pixels[np.arange(count) % modes], 4)
    return Part(
        np.concatenate([pixels, faces.samples.pixels[count:]]),
        np.concatenate([extract(pixels), faces.samples.features[count:]]),
    )


def test_one_repeated_mode_among_good_samples_is_found_and_shown(faces):
    samples = repeated(faces, 90, 1)
    check = collapse(faces, samples)
    assert check.verdict == "bad" and "One mode is repeated" in check.headline
    assert check.figures["densest_share"] == pytest.approx(0.3, abs=0.02)
    # The picture in the middle of the mode is one of its noisy repetitions.
    assert np.abs(check.pictures[2:66, 2:66, :3].astype(int) - faces.samples.pixels[0]).mean() < 5


def test_few_modes_of_equal_weight_are_found(faces):
    check = collapse(faces, repeated(faces, 300, 12), 0.2, 0.95)
    assert check.judgement == "bad: collapsed" and "mode collapse: whole kinds" in check.details
    assert check.figures["effective_number"] == pytest.approx(12, abs=0.5)


def grey_squares(pixels):
    return (126 + 0.05 * (pixels - 128.0)).round().astype(np.uint8)


@pytest.mark.parametrize("early", [grey_squares, softened], ids=["grey squares", "soft"])
def test_what_has_hardly_been_trained_is_not_called_collapsed(faces, early):
    """Both repeat themselves as far as features and thumbnails go; the pixels tell why."""
    if len(faces.samples.pixels) < 100:
        pytest.skip("modes need at least 100 samples: there are no real faces")
    pixels = early(faces.samples.pixels)
    check = collapse(faces, Part(pixels, 1e-3 * faces.samples.features), 0.01, 0.95)
    assert check.judgement == "bad: undertrained" and "has not learned enough yet" in check.details
    assert ("one colour" if early is grey_squares else "soft") in check.headline
    assert "Use an earlier checkpoint" not in check.details
