"""Training in real processes: killed at any moment, stopped by Ctrl-C, and two of them sharing a batch."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from conftest import write_tiny_model
from safetensors.torch import load_file
from training_run import make_settings, write_clips, write_settings

import higen
from higen.bundle import Bundle
from higen.cli import main
from higen.errors import SettingsError
from higen.families.higen import spec
from higen.families.higen.spec import ModelConfig
from higen.train.loop import Loop
from higen.train.processes import shares
from higen.train.record import read_losses
from higen.train.settings import Settings, read_settings
from higen.train.trainer import train

ENVIRONMENT = {
    **os.environ,
    "PYTHONPATH": os.pathsep.join([str(Path(higen.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]),
    "OMP_NUM_THREADS": str(torch.get_num_threads()),
}

# Run in a separate process, which kills itself either halfway through its second checkpoint, or right after the fifth
# step of its optimiser, before anything is logged or averaged.
KILLED = """
import io, os, signal, sys, torch
from higen.cli import main

def killing(function, at):
    def call(*arguments):
        call.count += 1
        if call.count < at:
            return function(*arguments)
        if function is torch.save:
            whole = io.BytesIO()
            function(arguments[0], whole)
            arguments[1].write(whole.getvalue()[: whole.tell() // 2])
            arguments[1].flush()
        else:
            function(*arguments)
        os.kill(os.getpid(), signal.SIGKILL)
    call.count = 0
    return call

if sys.argv[1] == "checkpoint":
    torch.save = killing(torch.save, 2)
else:
    step = torch.optim.AdamW.step
    torch.optim.AdamW.step = killing(step, 5)
main(["train", sys.argv[2]])
"""


@pytest.fixture(scope="module")
def model(training_model: Path) -> Path:
    return training_model


@pytest.fixture(scope="module")
def clips(training_clips: Path) -> Path:
    return training_clips


@pytest.fixture(scope="module")
def whole(whole_run: Settings) -> Path:
    """The folder of a run of 6 steps that was never stopped."""
    return Path(whole_run.run.output)


def same_run(output: Path, whole: Path) -> None:
    assert (output / "losses.jsonl").read_bytes() == (whole / "losses.jsonl").read_bytes()
    assert (output / "model" / spec.UNET).read_bytes() == (whole / "model" / spec.UNET).read_bytes()
    assert [p.name for p in sorted((output / "checkpoints").glob("*.pt"))] == [
        f"step-{step:08d}.pt" for step in (2, 4, 6)
    ]


@pytest.mark.parametrize(
    ("moment", "left"),
    [("checkpoint", ["step-00000002.pt"]), ("step", ["step-00000002.pt", "step-00000004.pt"])],
)
def test_a_killed_run_continues_bit_for_bit(
    tmp_path: Path, model: Path, clips: Path, whole: Path, moment: str, left: list[str]
) -> None:
    config = write_settings(tmp_path / "train.toml", model, clips)
    killed = subprocess.run(
        [sys.executable, "-c", KILLED, moment, str(config)], env=ENVIRONMENT, capture_output=True, text=True
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    output = tmp_path / "run"
    names = sorted(p.name for p in (output / "checkpoints").iterdir())
    assert [name for name in names if not name.startswith(".higen-")] == left
    assert [line["step"] for line in read_losses(output / "losses.jsonl")] == [1, 2, 3, 4]
    result = CliRunner().invoke(main, ["train", str(config), "--resume"])
    assert result.exit_code == 0, result.output
    assert result.stdout == f"{output / 'model'}\n"
    assert f"continuing after step {2 if moment == 'checkpoint' else 4} of 6" in result.stderr
    same_run(output, whole)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_saves_after_the_step_and_exits_with_130(
    tmp_path: Path, model: Path, clips: Path, whole: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    config = write_settings(tmp_path / "train.toml", model, clips)
    advance = Loop.advance

    def interrupted(self: Loop) -> Any:
        if self.step == 2:
            signal.raise_signal(number)
        return advance(self)

    before = signal.getsignal(number)
    with monkeypatch.context() as patch:
        patch.setattr(Loop, "advance", interrupted)
        result = CliRunner().invoke(main, ["train", str(config)])
    assert result.exit_code == 130
    assert "stopped" in result.stderr
    assert signal.getsignal(number) == before
    checkpoints = tmp_path / "run" / "checkpoints"
    assert sorted(p.name for p in checkpoints.iterdir()) == ["step-00000002.pt", "step-00000003.pt"]
    (checkpoints / "step-00000002.pt").unlink()
    assert CliRunner().invoke(main, ["train", str(config)]).exit_code == 0
    (checkpoints / "step-00000003.pt").rename(checkpoints / "step-00000002.pt")
    same_run(tmp_path / "run", whole)


def test_two_processes_make_the_loss_curve_of_one(tmp_path: Path, preconditioned_model: Path) -> None:
    """Two real gloo processes, each with half the batch. Only one of them meets the unreadable file."""
    folder = write_clips(tmp_path / "clips")
    (folder / "broken.mp4").write_bytes(b"nothing")
    (folder / "broken.txt").write_text("a star")
    changes: dict[str, Any] = {"run__steps": 5, "data__images": 4, "data__videos": 4, "optimiser__train_text": True}
    changes |= {"optimiser__spatial_gradient": 0.5, "cues__dropout": 0.3, "data__workers": 1, "run__keep": 1}
    # This model without its dropout layers, because they draw independently in each process.
    plain = write_tiny_model(tmp_path / "plain", _without_dropout(preconditioned_model)).path
    one = make_settings(tmp_path / "one", plain, folder, **changes)
    train(one)
    config = write_settings(tmp_path / "two" / "train.toml", plain, folder, **changes)
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "higen"]
    done = subprocess.run(
        [sys.executable, *launcher, "train", str(config)], env=ENVIRONMENT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    two = read_settings(config)
    assert done.stdout == f"{Path(two.run.output, 'model')}\n"
    assert "1 file skipped (1 cannot be read)" in done.stderr
    curves = [read_losses(Path(s.run.output, "losses.jsonl")) for s in (one, two)]
    assert len(curves[0]) == 5
    for ours, theirs in zip(*curves, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4)
    # Adam makes full-size steps even for gradients that are rounding errors, so compare with the distance travelled.
    folders = (plain, *(Path(s.run.output, "model") for s in (one, two)))
    start, *ends = (torch.cat([w.flatten() for w in load_file(f / spec.UNET).values()]) for f in folders)
    assert float((ends[0] - ends[1]).norm()) < 0.01 * float((ends[0] - start).norm())


def _without_dropout(model: Path) -> ModelConfig:
    config = spec.config(Bundle.open(model).manifest)
    return replace(config, unet=replace(config.unet, dropout=0.0))


def test_a_batch_that_the_processes_cannot_share_is_refused(tmp_path: Path, model: Path, clips: Path) -> None:
    settings = make_settings(tmp_path, model, clips, data__images=3)
    with pytest.raises(SettingsError, match=r"data\.images=3: a multiple of the 2 processes"):
        shares(settings, 2, 0)
    halves = [shares(make_settings(tmp_path, model, clips, data__images=6), 2, i) for i in (0, 1)]
    assert [list(half[0]) for half in halves] == [[0, 1, 2], [3, 4, 5]]
