"""The progress of a build as one number, and Ctrl-C."""

from __future__ import annotations

import os
import signal

import pytest

from higen.engines.progress import Progress, cancelled_by_ctrl_c


def test_nested_phases_are_parts_of_their_parents_step() -> None:
    seen: list[float] = []
    progress = Progress(lambda _, part: seen.append(round(part, 3)))
    progress.phase_start("build", None, 2)
    progress.phase_start("clone", "build", 4)
    for step in range(4):
        assert progress.step_complete("clone", step)
    progress.phase_finish("clone")
    assert progress.step_complete("build", 0)
    progress.phase_start("tactics", "build", 2)
    progress.step_complete("tactics", 0)
    progress.phase_finish("tactics")
    progress.step_complete("build", 1)
    progress.phase_finish("build")
    assert seen == [0.125, 0.25, 0.375, 0.5, 0.75, 1.0]


def test_it_never_falls_and_reports_nothing_twice() -> None:
    seen: list[float] = []
    progress = Progress(lambda _, part: seen.append(part))
    progress.phase_start("build", None, 1)
    progress.phase_start("many", "build", 1_000_000)
    for step in range(10_000):
        progress.step_complete("many", step)
    progress.phase_start("unknown", "never begun", 3)
    progress.phase_finish("never begun")
    assert len(seen) <= 11
    assert seen == sorted(seen)


def test_a_cancelled_build_is_asked_to_stop() -> None:
    progress = Progress()
    progress.phase_start("build", None, 3)
    assert progress.step_complete("build", 0)
    progress.cancelled = True
    assert not progress.step_complete("build", 1)


@pytest.mark.skipif(os.name == "nt", reason="needs os.kill with SIGINT")
def test_ctrl_c_waits_for_the_end_of_a_step() -> None:
    progress = Progress()
    before = signal.getsignal(signal.SIGINT)
    asked_to_stop: list[bool] = []

    def build() -> None:
        with cancelled_by_ctrl_c(progress):
            os.kill(os.getpid(), signal.SIGINT)
            asked_to_stop.append(not progress.step_complete("build", 0))

    with pytest.raises(KeyboardInterrupt):
        build()
    assert asked_to_stop == [True], "nothing is raised inside of TensorRT"
    assert signal.getsignal(signal.SIGINT) is before
