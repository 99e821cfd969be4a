import hashlib
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from core.drawn.face import CLASSES, PALETTE, SIZE, draw_face

INDEX = {name: number for number, name in enumerate(CLASSES)}
COUNT = 60


def arrays(seed: int, index: int) -> tuple[np.ndarray, np.ndarray]:
    picture, mask = draw_face(seed, index)
    return np.asarray(picture), np.asarray(mask)


def digest(seed: int, index: int) -> str:
    picture, mask = draw_face(seed, index)
    return hashlib.sha256(picture.tobytes() + mask.tobytes()).hexdigest()


@pytest.fixture(scope="module")
def crowd() -> tuple[np.ndarray, np.ndarray]:
    pictures, masks = zip(*(arrays(11, index) for index in range(COUNT)), strict=True)
    return np.stack(pictures), np.stack(masks)


def test_contract_of_classes_and_palette() -> None:
    assert CLASSES == ("background", "skin", "hair", "brows", "eyes", "nose", "mouth", "glasses")
    assert SIZE == (178, 218)
    assert len(PALETTE) == len(CLASSES) == len(set(PALETTE))
    assert all(len(colour) == 3 and all(0 <= channel <= 255 for channel in colour) for colour in PALETTE)
    distances = [np.abs(np.subtract(a, b)).sum() for i, a in enumerate(PALETTE) for b in PALETTE[:i]]
    assert min(distances) > 80


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 2**63), index=st.integers(0, 10**9))
def test_any_seed_and_index_give_a_complete_face(seed: int, index: int) -> None:
    picture, mask = draw_face(seed, index)
    assert (picture.mode, mask.mode) == ("RGB", "L")
    assert picture.size == mask.size == SIZE
    labels = np.asarray(mask)
    assert labels.max() < len(CLASSES)
    assert {INDEX[name] for name in ("background", "skin", "brows", "eyes", "nose", "mouth")} <= set(np.unique(labels))


def test_same_numbers_same_bytes_whatever_was_drawn_before() -> None:
    first = digest(5, 3)
    np.random.default_rng(0)
    others = {digest(5, 4), digest(6, 3), digest(3, 5)}
    assert digest(5, 3) == first
    assert first not in others
    assert len(others) == 3


def test_a_fresh_process_draws_the_same_bytes() -> None:
    program = (
        "import hashlib; from core.drawn.face import draw_face; p, m = draw_face(2, 9); "
        "print(hashlib.sha256(p.tobytes() + m.tobytes()).hexdigest())"
    )
    output = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert output.strip() == digest(2, 9)


def test_parts_have_plausible_areas(crowd: tuple[np.ndarray, np.ndarray]) -> None:
    _, masks = crowd
    share = {name: (masks == number).mean(axis=(1, 2)) for name, number in INDEX.items()}
    bounds = {
        "background": (0.15, 0.9),
        "skin": (0.06, 0.45),
        "brows": (0.001, 0.02),
        "eyes": (0.0015, 0.015),
        "nose": (0.005, 0.03),
        "mouth": (0.002, 0.03),
    }
    for name, (low, high) in bounds.items():
        assert low < share[name].min(), name
        assert share[name].max() < high, name
    assert np.median(share["hair"]) > 0.05


def test_eyes_sit_where_aligned_celeba_has_them(crowd: tuple[np.ndarray, np.ndarray]) -> None:
    _, masks = crowd
    left, right = [], []
    for mask in masks:
        y, x = np.nonzero(mask == INDEX["eyes"])
        left.append((x[x < 89].mean(), y[x < 89].mean()))
        right.append((x[x >= 89].mean(), y[x >= 89].mean()))
    for found, expected in ((left, (69, 111)), (right, (109, 111))):
        offset = np.array(found) - expected
        assert np.abs(offset).max() < 7
        assert np.abs(offset.mean(0)).max() < 2


def test_features_are_in_order_and_inside_the_training_crop(crowd: tuple[np.ndarray, np.ndarray]) -> None:
    _, masks = crowd
    for mask in masks:
        rows = {name: np.nonzero(mask == INDEX[name])[0] for name in ("brows", "eyes", "nose", "mouth")}
        middles = [rows[name].mean() for name in ("brows", "eyes", "nose", "mouth")]
        assert middles == sorted(middles)
        assert min(r.min() for r in rows.values()) > 20
        assert max(r.max() for r in rows.values()) < 198


def test_some_but_not_most_wear_glasses(crowd: tuple[np.ndarray, np.ndarray]) -> None:
    _, masks = crowd
    wearers = (masks == INDEX["glasses"]).any(axis=(1, 2)).mean()
    assert 0.05 < wearers < 0.5


def test_the_crowd_is_varied(crowd: tuple[np.ndarray, np.ndarray]) -> None:
    pictures, masks = crowd
    small = pictures[:, 29:189:8, 9:169:8].astype(np.float32)
    differences = [np.abs(a - b).mean() for i, a in enumerate(small) for b in small[:i]]
    assert np.mean(differences) > 35
    assert min(differences) > 8
    haired = [i for i in range(COUNT) if (masks[i] == INDEX["hair"]).sum() > 1500]
    hair = np.array([np.median(pictures[i][masks[i] == INDEX["hair"]], axis=0) for i in haired])
    skin = np.array([np.median(pictures[i][masks[i] == INDEX["skin"]], axis=0) for i in range(COUNT)])
    assert len(np.unique(hair // 32, axis=0)) >= 12
    assert len(np.unique(skin // 32, axis=0)) >= 12
    assert np.ptp(skin.mean(1)) > 80


def test_masks_follow_the_colours(crowd: tuple[np.ndarray, np.ndarray]) -> None:
    pictures, masks = crowd
    # Chromaticity, so that light and shade do not count.
    hue = pictures / (pictures.sum(-1, keepdims=True) + 1.0)
    skin = np.array([h[m == INDEX["skin"]].std(0).mean() for h, m in zip(hue, masks, strict=True)])
    whole = np.array([h.reshape(-1, 3).std(0).mean() for h in hue])
    assert np.mean(skin < whole) > 0.9
    redder = [
        h[m == INDEX["mouth"]][:, 0].mean() - h[m == INDEX["eyes"]][:, 0].mean()
        for h, m in zip(hue, masks, strict=True)
    ]
    assert np.mean(np.array(redder) > 0) > 0.9


def test_mask_edges_are_picture_edges() -> None:
    # Moving the mask against the picture must make the classes' colours less uniform.
    for index in range(5):
        picture, mask = arrays(4, index)
        spread = []
        for shift in (0, 12):
            moved = np.roll(mask, shift, axis=1)
            parts = [picture[moved == c].astype(float) for c in range(len(CLASSES)) if (moved == c).any()]
            spread.append(sum(((part - part.mean(0)) ** 2).sum() for part in parts))
        assert spread[0] < spread[1]
