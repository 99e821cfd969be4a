"""Settings of the game: what cannot work is refused, and runs that were started before a setting existed continue."""

import shutil

import pytest
from test_train import assert_equal, no_plots, outcome, run  # noqa: F401 (a fixture)

from core.cli.config import compose, typed
from core.cli.errors import UserError
from core.training.checkpoint import Checkpoints
from gen import trainer
from gen.augment import AdaptiveProbability
from gen.dcgan import Discriminator, Generator
from gen.settings import TrainConfig, check_networks
from gen.trainer import Trainer


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"loss": "hing"}, "loss='hing' is unknown"),
        ({"loss": "wasserstein", "model": "r3gan"}, r"wasserstein needs regularize\.gradient_penalty"),
        ({"regularize.r1": 1}, r"regularize\.r1 needs a D .* batch norm: use another model, or model\.norm=none"),
        ({"regularize.gradient_penalty": 1}, r"regularize\.gradient_penalty needs a D"),
        ({"regularize.r2": -1}, r"regularize\.r2=-1 must be a number from 0 up"),
        ({"regularize.cutmix": 1, "model": "resnet"}, r"regularize\.cutmix needs a D that judges pixels"),
        ({"regularize.schedule": "null"}, r"regularize\.schedule needs end and over"),
        ({"eval._target_": "nope.X", "eval.every": 8}, r"eval\._target_=nope\.X names no callback"),
        ({"regularize.schedule.end": 0.1}, r"regularize\.schedule: end=0\.1 over=0"),
        ({"lr_schedule.over": 100}, r"lr_schedule: end=1 over=100"),
        ({"lr_schedule.end": "nan"}, r"lr_schedule\.end=nan"),
        ({"n_critic": 0}, "n_critic=0 must be at least 1"),
        ({"accumulate": 0}, "accumulate=0 must be at least 1"),
        ({"accumulate": 3}, "accumulate=3 must divide the 8 images"),
        ({"accumulate": 8}, "accumulate=8 must divide the 8 images"),
        ({"d_lr_factor": 0}, "d_lr_factor=0"),
        ({"d_lr_factor": "inf"}, "d_lr_factor=inf"),
        ({"diffaug.p": 1.5}, r"diffaug\.p=1\.5 must be a number from 0 to 1 or adaptive"),
        ({"diffaug.p": "adaptiv"}, r"diffaug\.p=adaptiv must be"),
        ({"diffaug.ada_target": 2}, r"diffaug\.ada_target=2"),
        ({"diffaug.ada_images": 0}, r"diffaug\.ada_images=0"),
        ({"regularize.schedule.end": 0.1, "regularize.schedule.over": 9}, r"regularize\.schedule changes r1 and r2"),
        ({"model.discriminator.image_size": 64}, r"model\.discriminator cannot read \(2, 3, 32, 32\)"),
        ({"+model.generator.channels": 1}, r"model\.generator makes \(2, 1, 32, 32\)"),
        ({"optim.lr": 0}, r"optim\.lr=0\.?0? must be above 0"),
        ({"optim.fused": "abc"}, r"optim\.fused=abc must be true, false or null"),
        ({"optim.fused": "true", "+optim.foreach": "true"}, "optim: .*fused"),
        ({"optim.betas": "[0.5]"}, "optim: "),
        ({"model.discriminator._target_": "gen.dcgan.Generator"}, "is a Generator, not a discriminator"),
    ],
)
def test_settings_that_cannot_work_leave_nothing_behind(prepared, tmp_path, settings, message):
    with pytest.raises(UserError, match=message):
        run(prepared, tmp_path, **({"total_images": 8} | settings))
    assert not list(tmp_path.iterdir())


def test_penalties_with_a_d_without_batch_norm_are_taken(prepared, tmp_path):
    run(prepared, tmp_path, total_images=8, **{"regularize.r1": 1, "model.norm": "none"})


@pytest.mark.parametrize("more", [{"model": "resnet"}, {"model.norm": "none", "regularize.r1": 1}])
def test_a_critic_with_another_bound_is_taken(prepared, tmp_path, more):
    run(prepared, tmp_path, total_images=8, loss="wasserstein", **more)


def test_a_d_for_smaller_images_is_refused():
    """At 64 pixels one for 32 gives 25 logits an image, whose means would train all the same."""
    config = typed(compose("gen", ["data=x", "name=y", "model.width=4"]), TrainConfig)
    with pytest.raises(
        UserError, match=r"model\.discriminator makes \(50,\) of \(2, 3, 64, 64\), but \(2,\) is needed"
    ):
        check_networks(config, Generator(width=4), Discriminator(image_size=32, width=4))


def test_a_run_that_failed_before_its_first_checkpoint_may_start_anew(prepared, tmp_path, monkeypatch):
    def fail(self):
        raise UserError("no such luck")

    with monkeypatch.context() as patch, pytest.raises(UserError, match="no such luck"):
        patch.setattr(Trainer, "step", fail)
        run(prepared, tmp_path, total_images=8)
    assert (tmp_path / "t" / "config.yaml").exists()
    folder = run(prepared, tmp_path, total_images=8, loss="hinge")
    assert "loss: hinge" in folder.config.read_text()
    shutil.rmtree(folder.state)  # its weights alone are worth keeping
    with pytest.raises(UserError, match=r"started with other settings: loss \('hinge' -> 'least_squares'\)"):
        run(prepared, tmp_path, total_images=8, loss="least_squares")


@pytest.mark.parametrize(("loss", "target"), [("non_saturating", 0.6), ("relativistic", 0.77)])
def test_augmentation_is_held_at_what_suits_the_loss(prepared, tmp_path, loss, target, monkeypatch):
    seen = []

    class Watched(AdaptiveProbability):
        def __init__(self, *args, **more):
            seen.append(args)
            super().__init__(*args, **more)

    monkeypatch.setattr(trainer, "AdaptiveProbability", Watched)
    run(prepared, tmp_path, total_images=8, loss=loss, **{"diffaug.p": "adaptive"})
    assert seen == [(target, 500_000)]


def test_what_has_no_effect_without_adaptive_augmentation_may_differ(prepared, tmp_path):
    settings = {"diffaug.ada_target": 0.6, "diffaug.ada_images": 100}
    run(prepared, tmp_path, total_images=8, **settings)
    run(prepared, tmp_path, total_images=16)
    adaptive = {"diffaug.p": "adaptive"}
    run(prepared, tmp_path / "a", total_images=8, **adaptive, **settings)
    with pytest.raises(UserError, match=r"diffaug\.ada_images \(100 -> 500000\), diffaug\.ada_target \(0\.6 -> None\)"):
        run(prepared, tmp_path / "a", total_images=16, **adaptive)


def test_a_setting_cannot_be_changed_back_to_its_default(prepared, tmp_path):
    run(prepared, tmp_path, total_images=8, **{"diffaug.p": 0.5})
    with pytest.raises(UserError, match=r"diffaug\.p \(0\.5 -> 0\.0\)"):
        run(prepared, tmp_path, total_images=16)


def test_divergence_is_placed_in_the_right_step_of_d(prepared, tmp_path):
    run(prepared, tmp_path, total_images=16, n_critic=2)
    state = Checkpoints(tmp_path / "t" / "state").load_newest()
    state["generator"]["layers.0.0.weight"][:] = float("nan")
    Checkpoints(tmp_path / "t" / "state").save(16, state)
    with pytest.raises(UserError, match="24 images"):
        run(prepared, tmp_path, total_images=80, n_critic=2)
