"""The table of stages is the only list of tensor names; `check_inputs` holds every backend to it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from conftest import TINY

from higen.backends import Backend, RecordingBackend
from higen.config import ModelConfig
from higen.errors import BackendError
from higen.stages import STAGES, STEP_COLUMNS, Stage, check_inputs, dimensions

FIXED = dimensions(TINY)
FREE = {"B": 2, "N": 3, "F": 5, "H": 8, "W": 12, "Y": 16, "X": 24}


def inputs(stage: str, **sizes: int) -> dict[str, np.ndarray[Any, Any]]:
    known = {**FREE, **FIXED, **sizes}
    return {
        t.name: np.zeros([n if isinstance(n, int) else known[n] for n in t.shape], t.dtype)
        for t in STAGES[stage].inputs
    }


def test_the_stages_of_the_design() -> None:
    assert list(STAGES) == [
        "text_encoder",
        "conditioner",
        "spatial_unet",
        "temporal_unet",
        "vae_decoder",
        "vae_encoder",
    ]
    assert all(stage.name == name for name, stage in STAGES.items())


def test_a_denoising_stage_takes_a_row_and_returns_its_state() -> None:
    for name in ("spatial_unet", "temporal_unet"):
        stage = STAGES[name]
        names = [t.name for t in stage.inputs]
        assert names[:2] == [t.name for t in stage.outputs] == ["latents", "previous"]
        assert tuple(names[2:9]) == STEP_COLUMNS
        assert all(t.shape == ("B",) for t in stage.inputs[2:9])
        assert stage.inputs[0].shape == stage.outputs[0].shape
    extra = {t.name for t in STAGES["temporal_unet"].inputs} - {t.name for t in STAGES["spatial_unet"].inputs}
    assert extra == {"prior"}


def test_a_symbol_means_one_thing_in_all_stages() -> None:
    """What one stage returns the next accepts: equal names have equal shapes, the single frame apart."""
    shapes: dict[str, set[tuple[str | int, ...]]] = {}
    for stage in STAGES.values():
        for tensor in (*stage.inputs, *stage.outputs):
            shape = tuple("F" if (n == 1) else n for n in tensor.shape)
            if not stage.name.startswith("vae"):
                shapes.setdefault(tensor.name, set()).add(shape)
    assert all(len(found) == 1 for found in shapes.values()), shapes
    used = {n for found in shapes.values() for shape in found for n in shape}
    assert used <= {"B", "F", "H", "W", *FIXED}


def test_dimensions_of_the_released_model() -> None:
    assert dimensions(ModelConfig()) == {
        "L": 77, "C": 4, "Dt": 1024, "D": 320, "R": 32, "K": 16, "Dc": 1024, "E": 1280,
    }  # fmt: skip


@pytest.mark.parametrize("stage", STAGES)
def test_good_inputs_give_every_symbol(stage: str) -> None:
    sizes = check_inputs(STAGES[stage], inputs(stage), FIXED)
    wanted = {n for t in STAGES[stage].inputs for n in t.shape if isinstance(n, str)}
    assert {name: sizes[name] for name in wanted} == {name: {**FREE, **FIXED}[name] for name in wanted}


@pytest.mark.parametrize("stage", STAGES)
def test_tensors_of_torch_and_of_less_precision_are_accepted(stage: str) -> None:
    tensors = {name: torch.from_numpy(value) for name, value in inputs(stage).items()}
    check_inputs(STAGES[stage], tensors, FIXED)
    for dtype in (torch.float16, torch.bfloat16):
        less = {name: value.to(dtype) if value.is_floating_point() else value for name, value in tensors.items()}
        check_inputs(STAGES[stage], less, FIXED)


@pytest.mark.parametrize("stage", STAGES)
def test_every_wrong_input_is_named(stage: str) -> None:
    spec = STAGES[stage]
    for tensor in spec.inputs:
        good = inputs(stage)
        for bad in (
            good[tensor.name][None],
            good[tensor.name].astype(np.complex64),
            good[tensor.name].astype(np.int32),
        ):
            with pytest.raises(BackendError, match=rf"^{stage}\.{tensor.name}: .* given, .* wanted"):
                check_inputs(spec, {**good, tensor.name: bad}, FIXED)
        without = {name: value for name, value in good.items() if name != tensor.name}
        with pytest.raises(BackendError, match=rf"{stage}: missing or unknown inputs \['{tensor.name}'\]; it takes"):
            check_inputs(spec, without, FIXED)
    with pytest.raises(BackendError, match=r"missing or unknown inputs \['noise'\]"):
        check_inputs(spec, {**inputs(stage), "noise": np.zeros(1)}, FIXED)


def test_sizes_must_agree_between_tensors() -> None:
    spec = STAGES["temporal_unet"]
    good = inputs("temporal_unet")
    for name, other in (("t", {"B": 3}), ("prior", {"H": 4}), ("frame_embedding", {"F": 4}), ("previous", {"W": 4})):
        with pytest.raises(BackendError, match=f"temporal_unet.{name}: "):
            check_inputs(spec, {**good, name: inputs("temporal_unet", **other)[name]}, FIXED)


def test_sizes_that_the_model_fixes() -> None:
    with pytest.raises(BackendError, match=r"text_encoder\.tokens: int64 \[2, 13\] given, int64 \['B', 'L'\] wanted"):
        check_inputs(STAGES["text_encoder"], {"tokens": np.zeros((2, 13), np.int64)}, FIXED)
    with pytest.raises(BackendError, match=r"vae_encoder\.pixels"):
        check_inputs(STAGES["vae_encoder"], {"pixels": np.zeros((1, 4, 8, 8), np.float32)}, FIXED)


def output_shapes(stage: Stage) -> dict[str, tuple[int, ...]]:
    known = {**FREE, **FIXED}
    return {t.name: tuple(n if isinstance(n, int) else known[n] for n in t.shape) for t in stage.outputs}


@pytest.mark.parametrize("stage", STAGES)
def test_the_recording_backend_keeps_the_contract(stage: str) -> None:
    backend = RecordingBackend(TINY)
    assert isinstance(backend, Backend)
    given = inputs(stage)
    made = backend.run(stage, **given)
    assert {name: value.shape for name, value in made.items()} == output_shapes(STAGES[stage])
    assert backend.calls == [(stage, {name: value.shape for name, value in given.items()})]
    with pytest.raises(BackendError):
        backend.run(stage)
    assert len(backend.calls) == 1
