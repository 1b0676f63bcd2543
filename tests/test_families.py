"""Families: how they are found, HiGen's tables, and the solver step against a plain computation."""

from __future__ import annotations

import importlib.metadata
import json
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import TINY
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from higen import families
from higen.errors import ManifestError, UnknownFamily
from higen.families.higen import spec
from higen.families.higen.version_1 import graph_inputs, read, upgraded
from higen.manifest import Manifest
from higen.models.solver_step import SolverStep
from higen.schedule import NoiseSchedule, Solver
from higen.stages import Output, Stage
from higen.stages import Tensor as Row
from higen.typed_json import from_json, to_json

# Entry points


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A second family is installed: a package with the same modules under another name."""
    stranger = importlib.metadata.EntryPoint("stranger", "higen.families.higen", families.GROUP)
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: [stranger] if group == families.GROUP else [])
    families._packages.cache_clear()
    yield
    families._packages.cache_clear()


def test_the_first_family_is_always_there() -> None:
    assert families.FIRST in families.installed()
    assert families.network(families.FIRST).open is not None
    assert families.checkpoint(families.FIRST).recognise is not None


def test_this_distribution_declares_its_families() -> None:
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert project["entry-points"][families.GROUP] == {
        name: f"higen.families.{name}"
        for name in ("animatediff", "composed", "higen", "modelscope", "stable_diffusion", "svd")
    }


@pytest.mark.usefixtures("installed")
def test_whoever_installs_an_entry_point_adds_a_family() -> None:
    own = ("animatediff", "composed", "higen", "modelscope", "stable_diffusion", "stranger", "svd")
    assert families.installed() == own
    assert families.network("stranger") is families.network("higen")


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize("find", [families.network, families.checkpoint])
def test_an_unknown_family_names_what_is_installed(find: Any) -> None:
    with pytest.raises(
        UnknownFamily,
        match=r"^family='marsh': not installed here; installed are animatediff, composed, higen, .*stranger",
    ):
        find("marsh")


# HiGen's tables

CONFIGS = {
    "tiny": TINY,
    "released": spec.ModelConfig(),
    "optional": replace(
        TINY, optional_cues=True, defaults=replace(TINY.defaults, motion=None, appearance=None, solver="dpm++2m")
    ),
    "other schedule": replace(TINY, schedule=NoiseSchedule(timesteps=400, zero_terminal_snr=False)),
}


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("plain", [True, False])
def test_tables_say_all_of_a_configuration(name: str, plain: bool) -> None:
    tables = spec.manifest(CONFIGS[name], plain)
    assert spec.config(tables) == CONFIGS[name]
    written = json.loads(json.dumps(to_json(tables), allow_nan=False))
    assert from_json(Manifest, written, whole=True) == tables


def test_a_configuration_is_read_as_it_is_written() -> None:
    for config in CONFIGS.values():
        assert spec.read_config(json.loads(json.dumps(spec.write_config(config)))) == config
    assert spec.read_config({}) == spec.ModelConfig()
    assert spec.read_config({"schedule": {"timesteps": 500}}).schedule == NoiseSchedule(
        "scaled_linear", 500, zero_terminal_snr=True
    )


def test_symbols_are_the_sizes_of_the_released_model() -> None:
    tables = spec.manifest(spec.ModelConfig())
    assert tables.fixed == {
        "L": 77, "C": 4, "Dt": 1024, "D": 320, "R": 32, "K": 16, "Dc": 1024, "E": 1280,
    }  # fmt: skip
    assert (tables.sizes.factor, tables.sizes.multiple, tables.sizes.frames) == (8, 64, (1, 32, 256))
    assert (tables.sizes.decoder, tables.sizes.chunk, tables.sizes.overlap) == ("vae_decoder", 2, 0)


def test_nothing_is_stored_twice() -> None:
    """A number in `sizes.symbols` is not repeated in `architecture`."""
    tables = spec.manifest(TINY)
    assert set(tables.architecture) == {"unet", "clip", "autoencoder"}
    names = set(vars(TINY.unet)) - set(tables.architecture["unet"])
    assert names == {
        "in_channels", "text_dim", "base_channels", "appearance_columns", "context_tokens", "context_dim",
        "known_frames", "known_layers",  # left out if they are false
    }  # fmt: skip
    assert set(tables.architecture["autoencoder"]) == {"kind", "arguments", "shift", "scale"}


def test_stages_and_their_sources() -> None:
    tables = spec.manifest(TINY)
    assert tables.stage_names == (
        "text_encoder", "conditioner", "spatial_unet", "spatial_unet_plain", "temporal_unet", "temporal_unet_plain",
        "vae_decoder", "vae_encoder",
    )  # fmt: skip
    assert tables.denoising == ("spatial_unet", "spatial_unet_plain", "temporal_unet", "temporal_unet_plain")
    sources = {s.name: {t.name: t.source for t in s.conditions} for s in tables.stages}
    assert sources["text_encoder"] == {"tokens": "text:prompt"}
    assert sources["conditioner"] == {
        "hidden": "text_encoder.hidden", "motion": "control:motion", "appearance": "control:appearance",
    }  # fmt: skip
    assert sources["temporal_unet"] == {
        "context": "conditioner.context",
        "empty_context": "conditioner@negative.context",
        "frame_embedding": "conditioner.frame_embedding",
        "prior": "spatial.latents",
    }
    assert sources["spatial_unet"] == {k: v for k, v in sources["temporal_unet"].items() if k != "prior"}
    assert sources["vae_encoder"] == {"pixels": "picture:image"}
    assert sources["vae_decoder"] == {}
    for name in ("spatial_unet", "temporal_unet"):
        guided, plain = tables.stage(name), tables.stage(f"{name}_plain")
        assert guided.guided
        assert not plain.guided
        assert {t.name for t in guided.inputs} - {t.name for t in plain.inputs} == {"guidance", "empty_context"}
        assert guided.outputs == plain.outputs
        assert {t.dtype for t in guided.inputs} == {"float32"}
    assert tables.stage("spatial_unet").input("guidance").shape == ("B", 1)
    assert tables.stage("temporal_unet").input("guidance").shape == ("B", "F")


def test_loops() -> None:
    spatial, temporal = spec.manifest(TINY).loops
    assert (spatial.name, spatial.guided, spatial.plain, spatial.frames) == (
        "spatial", "spatial_unet", "spatial_unet_plain", 1,
    )  # fmt: skip
    assert (temporal.name, temporal.frames, temporal.least_frames) == ("temporal", "F", 2)
    assert (spatial.noise.purpose, temporal.noise.purpose) == (0, 1)
    assert temporal.noise.offset is not None
    assert (temporal.noise.offset.purpose, temporal.noise.offset.scale) == (2, "control:offset_noise")
    assert spatial.controls == {"motion": 0.0, "appearance": 0.0}
    assert spatial.replaced is not None
    assert (spatial.replaced.control, spatial.replaced.latents) == ("image", "vae_encoder.latents")
    for loop in (spatial, temporal):
        assert (loop.prediction, loop.schedule.kind) == ("v", "scaled_linear")
        assert loop.solvers == (
            Solver("ddim", "leading-floor", offset=1, final="first"),
            Solver("dpm++2m", "trailing-ceil", final="zero"),
        )
    other = spec.manifest(CONFIGS["optional"]).loops[0]
    assert [solver.name for solver in other.solvers] == ["dpm++2m", "ddim"]
    assert [loop.plain for loop in spec.manifest(TINY, plain=False).loops] == [None, None]


def test_controls() -> None:
    controls = {control.name: control for control in spec.manifest(TINY).controls}
    more = ["keyframes", "mask", "video", "strength"]
    assert list(controls) == ["motion", "appearance", "offset_noise", "image", *more]
    kinds = {name: (c.kind, c.encoding, c.low, c.default, c.optional) for name, c in controls.items()}
    assert kinds == {
        "motion": ("curve", "sinusoid", 0.0, 60.0, False),
        "appearance": ("curve", "similarity", None, 1.0, False),
        "offset_noise": ("number", "number", 0.0, 0.1, False),
        "image": ("picture", None, None, None, False),
        "keyframes": ("frames", None, None, None, False),
        "mask": ("mask", None, None, None, False),
        "video": ("clip", None, None, None, False),
        "strength": ("number", "number", 0.0, 0.6, False),
    }
    optional = spec.manifest(CONFIGS["optional"]).controls
    assert [(c.name, c.default) for c in optional if c.optional] == [("motion", None), ("appearance", None)]


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"family": "stranger"}, "family='stranger': higen is wanted here"),
        ({"architecture": {}}, "architecture: has no unet, clip, autoencoder"),
        ({"text": None}, "text"),
        ({"loops": "clip"}, "temporal missing"),
        ({"symbols": {"E": 5}}, r"sizes\.symbols\.E=5: must be 4 times D, 128"),
        ({"symbols": {"R": None}}, r"sizes\.symbols: has no R"),
        ({"unet": {"in_channels": 4}}, r"architecture\.unet\.in_channels: is already in sizes\.symbols"),
        ({"unet": {"head_dim": 7}}, "head_dim=7 does not divide"),
        ({"guidance": (1.0, 3.0)}, r"loops\.temporal\.guidance=\[1\.0, 3\.0\]: one number"),
    ],
)
def test_tables_of_another_kind_are_refused(change: Mapping[str, Any], match: str) -> None:
    tables = spec.manifest(TINY, plain=False)
    ((key, value),) = change.items()
    if key == "symbols":
        symbols = {name: size for name, size in {**tables.fixed, **value}.items() if size is not None}
        stages = tables.stages
        if None in value.values():  # without a size, no stage may use the symbol
            fixed = {"R": tables.fixed["R"]}
            stages = tuple(
                replace(
                    stage,
                    inputs=tuple(replace(t, shape=tuple(fixed.get(n, n) for n in t.shape)) for t in stage.inputs),  # type: ignore[arg-type]
                )
                for stage in stages
            )
        tables = replace(tables, sizes=replace(tables.sizes, symbols=symbols), stages=stages)
    elif key == "unet":
        architecture = {**tables.architecture, "unet": {**tables.architecture["unet"], **value}}
        tables = replace(tables, architecture=architecture)
    elif key == "loops":
        tables = replace(tables, loops=(tables.loops[0], replace(tables.loops[1], name=value)))
    elif key == "guidance":
        tables = replace(tables, loops=(tables.loops[0], replace(tables.loops[1], guidance=value)))
    elif key == "text":
        with pytest.raises(ManifestError, match=match):
            replace(tables, text=None)
        return
    else:
        tables = replace(tables, **{key: value})
    with pytest.raises(ManifestError, match=match):
        spec.config(tables)


def test_an_unknown_default_solver_is_refused() -> None:
    with pytest.raises(ManifestError, match=r"^defaults\.solver='heun': one of 'ddim', 'dpm\+\+2m'"):
        spec.manifest(replace(TINY, defaults=replace(TINY.defaults, solver="heun")))


# Version 1


def test_version_1_is_read_as_tables_without_plain_stages() -> None:
    data = json.loads(json.dumps(spec.write_config(TINY)))
    assert read(data) == families.read_version_1(data) == spec.manifest(TINY, plain=False)
    assert upgraded(read(data)) == families.upgraded_version_1(read(data)) == spec.manifest(TINY)
    stage = read(data).stage("temporal_unet")
    assert [(t.name, t.dtype, t.shape) for t in graph_inputs(stage) if t.name in ("t", "guidance")] == [
        ("t", "int64", ("B",)), ("guidance", "float32", ("B",)),
    ]  # fmt: skip
    assert [t.name for t in graph_inputs(stage)] == [t.name for t in stage.inputs]


@pytest.mark.parametrize(
    ("data", "match"),
    [
        ({"unet": {"base_channels": 48}}, "a level of 48 channels"),
        ({"unet": {"base": 64}}, r"model\.unet\.base: unknown key"),
        ({"schedule": {"kind": "linear"}}, r"model\.schedule\.kind: unknown key"),
        ({"schedule": []}, r"model\.schedule: an object is wanted"),
        ({"schedule": {"beta_start": 1.0}}, "0 < beta_start < beta_end < 1"),
        ({"defaults": {"width": 100}}, "width=100: a multiple of 64"),
        ({"max_frames": 3}, r"frames=\[1, 32, 3\]"),
        ({"strange": 1}, r"model\.strange: unknown key"),
    ],
)
def test_version_1_is_checked_key_by_key(data: Mapping[str, Any], match: str) -> None:
    with pytest.raises(ManifestError, match=match):
        read(data)


# The solver step

F, H, W = 3, 2, 5


class Affine(nn.Module):
    """An m that depends on every argument. A missing argument, or one of the other branch, changes the result."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[int] = []

    def forward(
        self, x: Tensor, t: Tensor, alpha: Tensor, sigma: Tensor, conditions: Mapping[str, Tensor], branches: int
    ) -> Tensor:
        self.seen.append(branches)
        column = (t / 1000 + 2 * alpha + 3 * sigma)[:, None, None, None, None]
        extra = sum((k + 1) * conditions[name].mean(dim=-1) for k, name in enumerate(sorted(conditions)))
        return x.square() * column + extra[:, None, None, None, None]


def step_stage(guided: bool, frames: int | str = "F") -> Stage:
    """A denoising stage that belongs to no family. `voice` has an input for the other branch, `depth` does not."""
    state = ("B", "C", frames, "H", "W")
    inputs = [Row("depth", ("B", 4), source="control:depth"), Row("voice", ("B", 6), source="reader.voice")]
    inputs += [Row("latents", state), Row("previous", state)]
    inputs += [Row(name, ("B",)) for name in ("sigma", "alpha", "C", "B", "A", "t")]
    if guided:
        inputs += [Row("empty_voice", ("B", 6), source="reader@negative.voice"), Row("guidance", ("B", frames))]
    return Stage("step", "net.safetensors", tuple(inputs), (Output("latents", state), Output("previous", state)))


def arguments(stage: Stage, batch: int, seed: int) -> dict[str, np.ndarray[Any, np.dtype[np.float32]]]:
    random, sizes = np.random.default_rng(seed), {"B": batch, "C": 2, "F": F, "H": H, "W": W}
    return {
        t.name: random.standard_normal([n if isinstance(n, int) else sizes[n] for n in t.shape]).astype(np.float32)
        for t in stage.inputs
    }


def plain_step(values: Mapping[str, Any]) -> tuple[Any, Any]:
    """The step in numpy, float64, one sample at a time (docs/manifest.md, "loops")."""
    x = {name: value.astype(np.float64) for name, value in values.items()}
    stepped, estimates = [], []
    for i in range(len(x["latents"])):
        z, previous = x["latents"][i], x["previous"][i]

        def predict(voice: Any, i: int = i, z: Any = z) -> Any:
            column = x["t"][i] / 1000 + 2 * x["alpha"][i] + 3 * x["sigma"][i]
            return z**2 * column + x["depth"][i].mean() + 2 * voice.mean()

        m = predict(x["voice"][i])
        if "guidance" in x:
            empty = predict(x["empty_voice"][i])
            m = empty + x["guidance"][i][None, :, None, None] * (m - empty)
        estimates.append(x["alpha"][i] * z - x["sigma"][i] * m)
        stepped.append(x["A"][i] * z + x["B"][i] * m + x["C"][i] * previous)
    return np.stack(stepped), np.stack(estimates)


@settings(max_examples=30, deadline=None)
@given(guided=st.booleans(), batch=st.integers(1, 3), frames=st.sampled_from(["F", 1]), seed=st.integers(0, 2**16))
def test_a_step_does_the_arithmetic_of_the_contract(guided: bool, batch: int, frames: int | str, seed: int) -> None:
    stage, predictor = step_stage(guided, frames), Affine()
    values = arguments(stage, batch, seed)
    made = SolverStep(stage, predictor)(*(torch.from_numpy(values[t.name]) for t in stage.inputs))
    for ours, theirs in zip(made, plain_step(values), strict=True):
        assert ours.dtype == torch.float32
        np.testing.assert_allclose(ours.numpy(), theirs, rtol=2e-5, atol=2e-5 * float(np.abs(theirs).max()))
    assert predictor.seen == [2 if guided else 1]


def test_guidance_has_a_value_per_frame() -> None:
    stage = step_stage(guided=True)
    values = arguments(stage, 2, 0)
    step = SolverStep(stage, Affine())

    def latents(guidance: Any) -> Tensor:
        given = {**values, "guidance": np.asarray(guidance, np.float32)}
        made: Tensor = step(*(torch.from_numpy(given[t.name]) for t in stage.inputs))[0]
        return made

    one = latents([[1, 1, 1], [4, 4, 4]])
    mixed = latents([[1, 7, 1], [4, 4, 0]])
    assert torch.equal(one[0, :, [0, 2]], mixed[0, :, [0, 2]])
    assert torch.equal(one[1, :, :2], mixed[1, :, :2])
    assert not torch.equal(one[0, :, 1], mixed[0, :, 1])
    assert not torch.equal(one[1, :, 2], mixed[1, :, 2])


def test_without_a_twin_both_branches_share_a_condition() -> None:
    """If nothing else differs between the branches, guidance has no effect."""
    stage = step_stage(guided=True)
    values = arguments(stage, 2, 3)
    values["empty_voice"] = values["voice"]
    step = SolverStep(stage, Affine())
    for other in (0.0, 30.0):
        given = {**values, "guidance": np.full_like(values["guidance"], other)}
        made = step(*(torch.from_numpy(given[t.name]) for t in stage.inputs))
        for ours, theirs in zip(made, plain_step(values), strict=True):
            np.testing.assert_allclose(ours.numpy(), theirs, rtol=1e-4, atol=1e-4)


def test_the_mix_is_in_float32_whatever_the_network_computes_in() -> None:
    class Half(Affine):
        def forward(self, *given: Any) -> Tensor:
            return super().forward(*given).half()

    stage = step_stage(guided=True)
    values = arguments(stage, 1, 1)
    values["guidance"] = np.full_like(values["guidance"], 1e5)  # too large for float16
    made = SolverStep(stage, Half())(*(torch.from_numpy(values[t.name]) for t in stage.inputs))
    assert all(tensor.dtype == torch.float32 and tensor.isfinite().all() for tensor in made)
