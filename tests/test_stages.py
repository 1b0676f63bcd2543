"""The manifest's table of stages is the only list of tensor names; `check_inputs` holds every backend to it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import TINY
from interpreter_model import MANIFEST

from higen.backends import Backend, RecordingBackend
from higen.errors import BackendError, ManifestError
from higen.families.higen import spec
from higen.families.higen.spec import ModelConfig
from higen.manifest import Manifest
from higen.stages import STEP_COLUMNS, Output, Source, Stage, Tensor, check_inputs, source

HIGEN = spec.manifest(TINY)
STAGES = {stage.name: stage for stage in HIGEN.stages}
FIXED = HIGEN.fixed
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
        "spatial_unet_plain",
        "temporal_unet",
        "temporal_unet_plain",
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
        assert all(t.shape == ("B",) and t.dtype == "float32" for t in stage.inputs[2:8])
        assert stage.inputs[0].shape == stage.outputs[0].shape
        assert stage.inputs[8].shape == ("B", stage.inputs[0].shape[2])  # guidance
        plain = STAGES[f"{name}_plain"]
        assert [t.name for t in plain.inputs] == [n for n in names if n != "guidance" and not n.startswith("empty_")]
        assert stage.denoises
        assert plain.denoises
        assert (stage.guided, plain.guided) == (True, False)
        assert stage.outputs == plain.outputs
        assert stage.weights == plain.weights
    extra = {t.name for t in STAGES["temporal_unet"].inputs} - {t.name for t in STAGES["spatial_unet"].inputs}
    assert extra == {"prior"}


def test_a_symbol_means_one_thing_in_all_stages() -> None:
    """A stage accepts what another one returns: equal names have equal shapes, except for a single frame."""
    shapes: dict[str, set[tuple[str | int, ...]]] = {}
    for stage in STAGES.values():
        for tensor in (*stage.inputs, *stage.outputs):
            shape = tuple("F" if (n == 1) else n for n in tensor.shape)
            if not stage.name.startswith("vae") and tensor.name != "guidance":
                shapes.setdefault(tensor.name, set()).add(shape)
    assert all(len(found) == 1 for found in shapes.values()), shapes
    used = {n for found in shapes.values() for shape in found for n in shape}
    assert used <= {"B", "F", "H", "W", *FIXED}


def test_dimensions_of_the_released_model() -> None:
    assert spec.manifest(ModelConfig()).fixed == {
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
    row = STAGES[stage]
    for tensor in row.inputs:
        good = inputs(stage)
        for bad in (
            good[tensor.name][None],
            good[tensor.name].astype(np.complex64),
            good[tensor.name].astype(np.int32),
        ):
            with pytest.raises(BackendError, match=rf"^{stage}\.{tensor.name}: .* given, .* wanted"):
                check_inputs(row, {**good, tensor.name: bad}, FIXED)
        without = {name: value for name, value in good.items() if name != tensor.name}
        with pytest.raises(BackendError, match=rf"{stage}: missing or unknown inputs \['{tensor.name}'\]; it takes"):
            check_inputs(row, without, FIXED)
    with pytest.raises(BackendError, match=r"missing or unknown inputs \['noise'\]"):
        check_inputs(row, {**inputs(stage), "noise": np.zeros(1)}, FIXED)


def test_sizes_must_agree_between_tensors() -> None:
    row = STAGES["temporal_unet"]
    good = inputs("temporal_unet")
    for name, other in (("t", {"B": 3}), ("prior", {"H": 4}), ("frame_embedding", {"F": 4}), ("previous", {"W": 4})):
        with pytest.raises(BackendError, match=f"temporal_unet.{name}: "):
            check_inputs(row, {**good, name: inputs("temporal_unet", **other)[name]}, FIXED)


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
    backend = RecordingBackend(HIGEN)
    assert isinstance(backend, Backend)
    given = inputs(stage)
    made = backend.run(stage, **given)
    assert {name: value.shape for name, value in made.items()} == output_shapes(STAGES[stage])
    assert backend.calls == [(stage, {name: value.shape for name, value in given.items()})]
    with pytest.raises(BackendError):
        backend.run(stage)
    assert len(backend.calls) == 1


# Sources and rows of the table


@pytest.mark.parametrize(
    ("text", "read"),
    [
        ("state", Source("state", "state")),
        ("control:motion_2", Source("control", "motion_2")),
        ("text:prompt", Source("text", "prompt")),
        ("text:negative", Source("text", "negative")),
        ("picture:image", Source("picture", "image")),
        ("picture:image:clip", Source("picture", "image", resampled=True)),
        ("clip:film", Source("clip", "film")),
        ("noise:7", Source("noise", "7")),
        ("mixer.hints", Source("made", "mixer", "hints")),
        ("mixer@negative.hints", Source("made", "mixer", "hints", negative=True)),
        ("state.latents", Source("made", "state", "latents")),
    ],
)
def test_every_source(text: str, read: Source) -> None:
    assert source(text) == read


@pytest.mark.parametrize(
    "text",
    [
        *("", "State", "state ", " state", "text:", "text:other", "control:", "control:a b", "control:a.b", "noise:"),
        *("noise:-1", "noise:1.5", "noise:12345678901", "picture:image:CLIP", "clip:film:clip", "a.b.c", "a@.c", "."),
        *("a.", ".b", "mixer@negative", "state\n", "x" * 10_000),
    ],
)
def test_invalid_sources(text: str) -> None:
    with pytest.raises(ManifestError, match=r"^source=.*: state, control:NAME, text:prompt, .*LOOP\.latents$"):
        source(text)


def test_the_outputs_of_a_graph_that_are_fed_back_have_other_names() -> None:
    stage = MANIFEST.stage("film_two")
    assert stage.graph_outputs == ("next_latents", "next_previous")
    assert MANIFEST.stage("reader").graph_outputs == ("words",)
    mixed = Stage("m", "w", (Tensor("a", ("B",)), Tensor("b", ("B",))), (Output("b", ("B",)), Output("c", ("B",))))
    assert mixed.graph_outputs == ("next_b", "c")
    assert not mixed.denoises


def test_the_conditions_and_free_axes_of_a_stage() -> None:
    stage = MANIFEST.stage("film_two")
    assert [t.name for t in stage.conditions] == ["hints", "empty_hints", "still"]
    assert stage.free(MANIFEST.fixed) == ("B", "F", "H", "W")
    assert stage.input("still").source == "draft.latents"
    with pytest.raises(KeyError, match="film_two has no input prior"):
        stage.input("prior")


def test_the_stages_that_feed_others_come_before_them() -> None:
    def names(manifest: Manifest, *stages: str) -> list[str]:
        return list(manifest.feeding(*stages))

    assert names(HIGEN, "temporal_unet") == ["text_encoder", "conditioner", "temporal_unet"]
    assert names(HIGEN, "temporal_unet_plain", "vae_decoder")[-2:] == ["temporal_unet_plain", "vae_decoder"]
    assert names(MANIFEST, "watch", "film_two") == ["watch", "reader", "mixer", "film_two"]
    assert names(MANIFEST, "film") == []  # a loop, not a stage
    assert MANIFEST.pictures_of("film_two", "draft_one") == ()
    assert MANIFEST.pictures_of("watch", "look") == ("footage", "sketch")


def test_a_chain_of_stages_that_each_feed_the_next_twice_is_walked_once() -> None:
    """There are 2^60 paths through the chain."""
    chain = tuple(
        Stage(
            f"s{i}",
            "w",
            (
                Tensor("a", ("B",), source=f"s{i - 1}.x" if i else "noise:1"),
                Tensor("b", ("B",), source=f"s{i - 1}.x" if i else "noise:2"),
            ),
            (Output("x", ("B",)),),
        )
        for i in range(60)
    )
    long = replace(MANIFEST, stages=(*MANIFEST.stages, *chain))
    assert long.feeding("s59") == tuple(f"s{i}" for i in range(60))
