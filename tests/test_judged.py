"""A generator that was trained against a pretrained network: its report says so and lets other networks speak."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from page_facts import score
from scipy.spatial.distance import cdist
from test_report import RECIPE, config, data, run  # noqa: F401 (fixtures)

from core.cli.config import compose, typed
from core.nn.init import init_normal
from core.nn.model_file import build_model, save_model
from eval import report
from eval.features.extractors import RandomFeatures
from eval.features.reference import random_rows
from eval.judged import flattery
from eval.page.page import render_page
from eval.page.text import verdict
from eval.report import build, summary
from eval.score import FidConfig, score_source
from gen.sample import generate

JUDGE = {"network": "tf_efficientnet_lite0.in1k", "sha256": "ab"}


class Stand(RandomFeatures):
    """The random network under the name of the one that was trained against."""

    name, metric = "efficientnet", "fd_efficientnet"


@pytest.fixture(scope="module")
def judged(tmp_path_factory):
    folder = tmp_path_factory.mktemp("judged")
    network = build_model(RECIPE)
    init_normal(network, std=0.2, seed=1)
    save_model(folder / "model.safetensors", network, RECIPE, {"images_seen": 7_000, "judged_by": JUDGE})
    (folder / "config.yaml").write_text("split: train\nloss: hinge\nmodel:\n  name: projected\n")
    return folder


def test_a_score_through_the_same_network_says_so_first_and_another_is_beside_it(
    judged,
    data,  # noqa: F811
    tmp_path,
    monkeypatch,
):
    monkeypatch.setattr(report, "make_features", lambda name, section, device, ranks: Stand(on_cpu()))
    found, pictures = build(config(judged, data, "features=efficientnet"), tmp_path)
    judge = found["judge"]
    assert judge["same"] and judge["network"] == "EfficientNet-Lite0" and judge["sha256"] == "ab"
    own, other = judge["views"]
    assert (own["metric"], own["same"]) == ("fd_efficientnet", True)
    assert (other["metric"], other["same"]) == ("fd_random", False)
    # The distance is the one of eval.fid on the random network, against the same random reals
    words = [f"source={judged}", f"data={data}", "features=random", "n=20", "sets=1", "reference_count=50"]
    alone = score_source(typed(compose("fid", [*words, "floor=true", "floor_sets=1"]), FidConfig))
    assert other["value"] == pytest.approx(alone["mean"], rel=1e-6)
    assert other["floor"] == pytest.approx(alone["floor"]["mean"], rel=1e-6)
    assert other["recall"] == recall(np.load(data / "images.npy"), generate(judged, range(20)))
    tone, words = verdict(found)
    assert tone == "bad" or tone == "doubt"
    assert words.startswith("This score looks through EfficientNet-Lite0, the very network")
    assert any("very network" in line for line in found["limits"])
    lines = summary(found)
    assert lines[0].startswith("trained against EfficientNet-Lite0, the very network of this score")
    assert lines[2].startswith("  fd_random ") and "recall" in lines[2]
    page = render_page(found, pictures)
    assert "What other networks say" in page and "took no part" in page
    assert "after 7,000 training images" in page and "model.name=projected, loss=hinge, split=train" in page
    assert "<h3>Kernel distance</h3>" in page and "on EfficientNet-Lite0" in page and ">KID<" not in page


def on_cpu():
    return torch.device("cpu")


def recall(reals, drawn):
    """Share of 20 random reals within the distance of a sample to its fifth neighbour, by SciPy."""
    look = RandomFeatures(on_cpu())
    real, fake = look(reals[random_rows(np.arange(120), 50, 0)[:20]]), look(drawn)
    radii = np.sort(cdist(fake, fake), axis=1)[:, 5]
    return float((cdist(real, fake) <= radii).any(axis=1).mean())


def test_other_generators_have_no_such_table(run, data, tmp_path):  # noqa: F811
    found, pictures = build(config(run, data), tmp_path)
    assert found["judge"] is None and "What other networks say" not in render_page(found, pictures)
    assert not any("flatter" in line for line in found["limits"])


@pytest.mark.parametrize(
    ("judge", "features", "words"),
    [
        (JUDGE, "efficientnet", "the very network"),
        ({"network": "resnet18"}, "resnet18.a1_in1k", "the very network"),
        (JUDGE, "inception", "was trained against EfficientNet-Lite0"),
        ({"network": "torchvision:alexnet"}, "efficientnet", "was trained against torchvision:alexnet"),
        (JUDGE, "random", None),
        (None, "efficientnet", None),
        ("damaged", "efficientnet", None),
    ],
)
def test_scores_on_pretrained_features_warn_of_their_bias(judge, features, words):
    warning = flattery(SimpleNamespace(facts={"judged_by": judge}), SimpleNamespace(name=features))
    assert warning is None if words is None else words in warning


def test_another_pretrained_network_is_told_last_and_a_random_one_not_at_all():
    judge = {"network": "EfficientNet-Lite0", "same": False}
    tone, words = verdict({"metric": "FID", "checks": [], "scores": [score()], "judge": judge})
    assert words.endswith("the score flatters it beside generators that were not.") and tone == "plain"
    assert "trained against" not in verdict({"metric": "fd_random", "scores": [score()], "judge": judge})[1]
