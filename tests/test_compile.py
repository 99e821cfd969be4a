"""compile=true: the same training but for rounding, and files that do not know of it."""

import pytest
import torch
from mask_data import run as run_seg
from test_train import assert_equal, no_plots, outcome, run  # noqa: F401 (a fixture)

from core.cli.errors import UserError
from core.nn.model_file import load_model


@pytest.fixture(autouse=True)
def compiled(monkeypatch):
    """Types of the networks compiled in a test: traced as always, but not built, which would take a minute each."""
    networks = []
    usual = torch.nn.Module.compile

    def compile_eagerly(network, backend="aot_eager"):
        networks.append(type(network).__name__)
        usual(network, backend=backend)

    monkeypatch.setattr(torch.nn.Module, "compile", compile_eagerly)
    yield networks
    torch._dynamo.reset()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (
            {"model": "dcgan_plus", "loss": "hinge", "mixed_precision": "bf16"},
            ["Generator", "DiscriminatorWrapper", "DiscriminatorWrapper"],
        ),
        ({"model.norm": "none", "regularize.r1": 1}, ["Generator", "DiscriminatorWrapper"]),
    ],
)
def test_a_compiled_run_is_the_run(prepared, tmp_path, compiled, settings, expected):
    plain, plain_rows = outcome(run(prepared, tmp_path / "plain", total_images=24, **settings))
    assert not compiled
    state, rows = outcome(run(prepared, tmp_path / "fused", total_images=24, compile="true", **settings))
    assert compiled == expected
    assert [row.keys() for row in rows] == [row.keys() for row in plain_rows]
    for row, plain_row in zip(rows, plain_rows, strict=True):
        assert row == pytest.approx(plain_row, rel=1e-3, abs=1e-4)
    assert state["ema"].keys() == plain["ema"].keys()
    for name, value in state["ema"].items():
        torch.testing.assert_close(value, plain["ema"][name], rtol=1e-3, atol=1e-3)


@pytest.mark.slow
def test_a_compiled_run_continues_bit_by_bit(prepared, tmp_path):
    straight = outcome(run(prepared, tmp_path / "straight", total_images=24, compile="true"))
    run(prepared, tmp_path, total_images=8, compile="true")
    with pytest.raises(UserError, match=r"compile \(True -> False\)"):
        run(prepared, tmp_path, total_images=24)
    assert_equal(outcome(run(prepared, tmp_path, total_images=24, compile="true")), straight)


@pytest.mark.slow
def test_a_segmenter_compiles(discs, tmp_path, compiled):
    folders = [
        run_seg(discs, tmp_path, "total_images=8", f"compile={choice}", name=f"'{choice}'")
        for choice in ("false", "true")
    ]
    assert compiled == ["UNet"]
    plain, fused = (load_model(folder.path / "last.safetensors")[0].state_dict() for folder in folders)
    for name, value in fused.items():
        torch.testing.assert_close(value, plain[name], rtol=1e-3, atol=1e-3)


def broken_compiler(graph, inputs):
    raise OSError("no compiler here")


def broken_code(graph, inputs):
    def run_graph(*values):
        raise AssertionError("expected size 512==512, stride 16==1 at dim=1\nError in op: convolution_backward")

    return run_graph


@pytest.mark.parametrize(
    ("backend", "reason"),
    [(broken_compiler, "no compiler here"), (broken_code, r"stride 16==1 at dim=1 Error in op: convolution_backward")],
)
def test_a_failure_of_the_compiler_or_of_its_code_is_one_line(prepared, tmp_path, monkeypatch, backend, reason):
    usual = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda network: usual(network, backend=backend))
    with pytest.raises(UserError, match=rf"compile=true failed \(.*{reason}.*compile=false"):
        run(prepared, tmp_path, total_images=8, compile="true")
