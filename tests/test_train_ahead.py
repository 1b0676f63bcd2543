"""Batches that worker processes make ahead of time, and the loss term for fine detail."""

from __future__ import annotations

import multiprocessing
import os
import time

import pytest
import torch
from torch import Tensor

from higen.errors import SettingsError, TrainingError
from higen.train.ahead import Ahead
from higen.train.batches import Batch, GainBatch, StepBatches
from higen.train.codec_loss import detail_loss

HOST = torch.device("cpu")


def column(*shape: int) -> Tensor:
    return torch.zeros(shape)


class Numbered:
    """Each batch has its step's number and the process that made it as tokens."""

    closed = False

    def batches(self, step: int) -> StepBatches:
        tokens = torch.tensor([[step, os.getpid()]])
        clips = Batch(
            column(1, 2, 3, 4, 4), column(1, 2, 3, 4, 4), torch.tensor([5]), None, *[column(1, 3, 2)] * 2, tokens
        )
        return StepBatches(videos=clips, gains=GainBatch(*[column(1, 3, 2)] * 2, column(1, 3), tokens))

    def close(self) -> None:
        self.closed = True


def told(batches: StepBatches) -> list[int]:
    assert batches.images is None
    assert batches.videos is not None
    assert batches.videos.prior is None
    assert batches.gains is not None
    assert torch.equal(batches.gains.tokens, batches.videos.tokens)
    return batches.videos.tokens[0].tolist()


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_come_in_the_order_of_the_steps_and_from_any_step(workers: int) -> None:
    source = Numbered()
    ahead = Ahead(source, 9, HOST, workers)
    found = [told(ahead.batches(step)) for step in (0, 1, 2, 5, 6, 1, 2)]
    assert [step for step, _ in found] == [0, 1, 2, 5, 6, 1, 2]
    own = [process == os.getpid() for _, process in found]
    assert all(own) if workers == 0 else not any(own)
    assert told(ahead.batches(8))[0] == 8
    ahead.close()
    assert source.closed


class Failing(Numbered):
    def batches(self, step: int) -> StepBatches:
        if step == 2:
            raise SettingsError("no clip is long enough")
        return super().batches(step)


def test_an_error_of_a_worker_is_told_in_one_line_and_ends_the_workers() -> None:
    ahead = Ahead(Failing(), 9, HOST, workers=2)
    assert [told(ahead.batches(step))[0] for step in (0, 1)] == [0, 1]
    with pytest.raises(TrainingError) as raised:
        ahead.batches(2)
    assert "step 2" in str(raised.value)
    assert str(raised.value).endswith("no clip is long enough")
    assert "\n" not in str(raised.value)
    deadline = time.monotonic() + 30
    while multiprocessing.active_children() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not multiprocessing.active_children(), "while the error is kept"
    with pytest.raises(SettingsError, match="no clip is long enough"):
        Ahead(Failing(), 9, HOST).batches(2)


def test_wrong_steps_and_workers_are_named() -> None:
    with pytest.raises(SettingsError, match="workers=-1: 0 or more"):
        Ahead(Numbered(), 9, HOST, -1)
    with pytest.raises(ValueError, match="step=9: the run has 9 steps"):
        Ahead(Numbered(), 9, HOST).batches(9)


def test_the_loss_of_detail_asks_for_its_amount_and_not_its_place() -> None:
    rows = torch.arange(512)  # wide, because the borders differ
    sharp = (2.0 * (rows % 8 < 4) - 1.0).expand(1, 3, 32, 512)  # edges in some columns, flat in the others
    shifted = sharp.roll(2, dims=-1)  # a wrong picture with the same detail
    soft = 0.5 * sharp
    assert float(detail_loss(sharp, sharp)) == 0
    assert float(detail_loss(shifted, sharp)) < 0.1 * float(detail_loss(soft, sharp))
    # The deviation of the detail of half the contrast is half as large.
    whole = float(detail_loss(torch.zeros_like(sharp), sharp))
    assert float(detail_loss(soft, sharp)) == pytest.approx(whole / 2, rel=0.01)


def test_detail_is_wanted_in_its_own_block_of_8_pixels() -> None:
    x, y = torch.meshgrid(torch.arange(64), torch.arange(64), indexing="xy")
    blocks = ((x // 8 + y // 8) % 2).float()  # detail in every second block
    detailed = (blocks * (2.0 * (x % 2) - 1.0)).expand(1, 3, 64, 64)
    elsewhere = detailed.roll(8, dims=-1)
    nothing = float(detail_loss(torch.zeros_like(detailed), detailed))
    assert float(detail_loss(elsewhere, detailed)) > 1.5 * nothing


def test_detail_is_the_difference_from_the_mean_over_3_pixels() -> None:
    edge = torch.ones(1, 3, 8, 8)
    edge[..., :4] = -1
    # Only the two columns at the edge differ from their mean, by 2/3: a deviation of 1/3 over 8 columns.
    assert float(detail_loss(edge, torch.zeros_like(edge))) == pytest.approx(1 / 3, abs=2e-3)


def test_a_flat_picture_has_a_finite_gradient() -> None:
    flat = torch.zeros(1, 3, 16, 16, requires_grad=True)
    detail_loss(flat, torch.rand(1, 3, 16, 16)).backward()
    assert flat.grad is not None
    assert bool(torch.isfinite(flat.grad).all())
