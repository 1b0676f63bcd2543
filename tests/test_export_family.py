"""Export, gate, verification, quantisation and engines of a family other than HiGen, from its tables only.

Its video decoder mixes frames, so its first axis holds one sample. It needs a picture and reads no text. A choice picks
a row of a table, and one stage must compute in 32 bits.
"""

from __future__ import annotations

import shutil
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import numpy as np
import onnx
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from higen import families
from higen.axes import frames_of, limits
from higen.backends.onnx import OnnxBackend
from higen.backends.options import Options
from higen.backends.torch import BundleWeights, TorchBackend
from higen.bundle import Bundle, create_model, drop_file, graph_file
from higen.engines.model_engines import build_engines
from higen.engines.shapes import read_profile, stage_profiles
from higen.engines.targets import parse_targets
from higen.errors import BackendError, RequestError, UnknownFamily
from higen.export.model_graphs import export_model
from higen.export.parity import Parity
from higen.export.quantize import quantize, record_calls
from higen.export.shapes import checked_sizes, example_inputs, fixed_sizes, sizes_for, static_sizes, traced_sizes
from higen.export.verify import verify
from higen.manifest import Manifest
from higen.models.solver_step import SolverStep
from higen.schedule import NoiseSchedule, Solver
from higen.stages import Output, Stage
from higen.stages import Tensor as Row
from higen.tables import Control, Loop, NoiseRule, Sizes, Windows
from higen.trial import known_prompts, pictures, record

STATE = ("B", "C", "F", "H", "W")
STEP = (
    Row("latents", STATE),
    Row("previous", STATE),
    *(Row(n, ("B",)) for n in ("t", "A", "B", "C", "alpha", "sigma")),
)
GIVEN = (Row("hints", ("B", "F", "K"), source="mix.hints"), Row("ground", ("B", "C", "H", "W"), source="look.latents"))
MADE = (Output("latents", STATE), Output("previous", STATE))

STAGES = (
    Stage(
        "mix",
        "net.safetensors",
        (Row("mood", ("B",), source="control:mood"), Row("wobble", ("B", "F"), source="control:wobble")),
        (Output("hints", ("B", "F", "K")),),
    ),
    Stage(
        "look",
        "pixels.safetensors",
        (Row("pixels", ("B", 3, "Y", "X"), source="picture:scene"),),
        (Output("latents", ("B", "C", "H", "W")),),
        batch=False,
    ),
    Stage("two", "net.safetensors", (*STEP, Row("guidance", ("B", "F")), *GIVEN), MADE),
    Stage("one", "net.safetensors", (*STEP, *GIVEN), MADE),
    Stage(
        "unpack",
        "pixels.safetensors",
        (Row("latents", STATE),),
        (Output("pixels", ("B", 3, "F", "Y", "X")),),
        lowest="fp32",
        batch=False,
    ),
)

MANIFEST = Manifest(
    name="stub",
    licence="none",
    family="stub",
    architecture={"width": 16},
    prompts=(),
    sizes=Sizes(
        symbols={"C": 4, "K": 3},
        factor=2,
        multiple=4,
        width=16,
        height=8,
        fps=5,
        frames=(2, 6, 12),
        decoder="unpack",
        chunk=4,
        overlap=1,
    ),
    text=None,
    controls=(
        Control("scene", "picture", "where it happens"),
        Control("mood", "choice", "how it feels", "number", choices=("calm", "wild", "sad"), default="wild"),
        Control("wobble", "curve", "how much it shakes", "curve", low=0.0, high=2.0, default=0.5),
    ),
    stages=STAGES,
    loops=(
        Loop(
            name="film",
            guided="two",
            plain="one",
            frames="F",
            schedule=NoiseSchedule("linear", timesteps=100, beta_start=0.0001, beta_end=0.02),
            prediction="epsilon",
            solvers=(Solver("ddim", "leading", offset=1),),
            steps=4,
            guidance=3.0,
            noise=NoiseRule(7),
        ),
    ),
)


class Predictor(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.enter = nn.Conv3d(8, width, 3, padding=1)
        self.between = nn.Conv3d(width, width, 3, padding=1)
        self.leave = nn.Conv3d(width, 4, 1)
        self.hints = nn.Linear(3, width)

    def forward(
        self, x: Tensor, t: Tensor, alpha: Tensor, sigma: Tensor, conditions: dict[str, Tensor], branches: int
    ) -> Tensor:
        dtype = self.enter.weight.dtype
        ground = conditions["ground"].to(dtype)[:, :, None].expand(-1, -1, x.shape[2], -1, -1)
        h = self.enter(torch.cat([x.to(dtype), ground], dim=1))
        hints = self.hints(conditions["hints"].to(dtype)).transpose(1, 2)[..., None, None]
        return self.leave(
            torch.tanh(self.between(torch.tanh(h + hints)) + (t.to(dtype) / 100)[:, None, None, None, None])
        )


class Mix(nn.Module):
    """Takes its inputs as `*rest`. Tracing nests such inputs in another way."""

    prefix = "inner."

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Module()
        self.inner.moods = nn.Parameter(torch.randn(3, 3))

    def forward(self, mood: Tensor, *rest: Tensor) -> Tensor:
        (wobble,) = rest
        return (self.inner.moods[mood.long()][:, None] * wobble[..., None]).float()


class Look(nn.Module):
    prefix = "inner.look."

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.ModuleDict({"look": nn.Conv2d(3, 4, 2, stride=2)})

    def forward(self, pixels: Tensor) -> Tensor:
        look = self.inner["look"]
        return look(pixels.to(look.weight.dtype)).float()


class Unpack(nn.Module):
    """A frame's pixels depend on its neighbours; works for one sample only."""

    def __init__(self) -> None:
        super().__init__()
        self.unpack = nn.Conv3d(4, 3, 3, padding=1)

    def forward(self, latents: Tensor) -> Tensor:
        (sample,) = latents.to(self.unpack.weight.dtype)
        pixels = torch.tanh(self.unpack(sample))
        return pixels.repeat_interleave(2, dim=-1).repeat_interleave(2, dim=-2)[None].float()


NETWORKS = {"predictor": lambda: Predictor(16), "mix": Mix, "look": Look, "unpack": Unpack}
STORED = {"net.safetensors": ("predictor", "mix"), "pixels.safetensors": ("look", "unpack")}


def state_of(module: nn.Module) -> dict[str, Tensor]:
    """A module's tensors under their names in the weights file."""
    prefix = str(getattr(module, "prefix", ""))
    return {key.removeprefix(prefix): tensor for key, tensor in module.state_dict().items()}


class Networks:
    """What `open` in the family's module `network` returns."""

    def __init__(self, manifest: Manifest, weights: BundleWeights) -> None:
        self._manifest, self._weights, self._made = manifest, weights, dict[str, nn.Module]()

    def module(self, stage: str) -> nn.Module:
        row = self._manifest.stage(stage)
        return SolverStep(row, self._part("predictor")).eval() if row.denoises else self._part(stage)

    def _part(self, name: str) -> nn.Module:
        if name not in self._made:
            module = NETWORKS[name]()
            file = next(file for file, names in STORED.items() if name in names)
            stored, prefix = load_file(self._weights.bundle.file(file)), str(getattr(module, "prefix", ""))
            module.load_state_dict({key: stored[key.removeprefix(prefix)] for key in module.state_dict()})
            dtype = torch.float32 if name == "unpack" else self._weights.dtype
            self._made[name] = module.to(dtype).eval().requires_grad_(False)
        return self._made[name]


def install(patch: pytest.MonkeyPatch) -> None:
    """Install the family, as if an entry point named it."""
    network = ModuleType("stub_family.network")
    network.open = Networks  # type: ignore[attr-defined]
    patch.setitem(sys.modules, "stub_family", ModuleType("stub_family"))
    patch.setitem(sys.modules, "stub_family.network", network)
    patch.setattr(families, "_packages", lambda: {"stub": "stub_family"})


@pytest.fixture(autouse=True)
def stub(monkeypatch: pytest.MonkeyPatch) -> None:
    """The family is installed in every test."""
    install(monkeypatch)


def write_stub(path: Path, manifest: Manifest = MANIFEST) -> Bundle:
    torch.manual_seed(0)
    made = {name: state_of(make()) for name, make in NETWORKS.items()}
    with create_model(path, manifest) as folder:
        for file, names in STORED.items():
            save_file({key: value for name in names for key, value in made[name].items()}, folder / file)
    return Bundle.open(path)


@pytest.fixture(scope="module")
def graphs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Bundle, list[Parity]]:
    """The model with a graph of every stage, and what the gate measured."""
    with pytest.MonkeyPatch.context() as patch:
        install(patch)
        parities: list[Parity] = []
        bundle = write_stub(tmp_path_factory.mktemp("stub") / "model")
        return export_model(bundle, on_parity=parities.append), parities


@pytest.fixture
def model(graphs: tuple[Bundle, list[Parity]], tmp_path: Path) -> Bundle:
    """A copy of the model with graphs."""
    return Bundle.open(shutil.copytree(graphs[0].path, tmp_path / "model"))


def test_every_stage_passed_within_the_limits_of_its_tables(graphs: tuple[Bundle, list[Parity]]) -> None:
    bundle, parities = graphs
    shapes = {name: [p.shape for p in parities if p.stage == name] for name in MANIFEST.stage_names}
    assert all(p.passed for p in parities)
    assert shapes["unpack"] == [
        f"B=1 {shape}" for shape in ("F=3 H=4 W=8", "F=6 H=8 W=4", "F=2 H=4 W=12", "F=1 H=4 W=8", "F=6 H=4 W=8")
    ]
    assert shapes["look"] == ["B=1 Y=8 X=16", "B=1 Y=16 X=8", "B=1 Y=8 X=24"]
    assert shapes["mix"] == ["B=3 F=3", "B=1 F=8", "B=4 F=2", "B=1 F=6"]
    assert shapes["one"] == ["B=3 F=3 H=4 W=8", "B=1 F=8 H=8 W=4", "B=4 F=2 H=4 W=12", "B=1 F=6 H=4 W=8"]
    assert set(bundle.graphs) == {graph_file(name) for name in MANIFEST.stage_names}


def test_the_manifest_records_what_each_graph_takes(graphs: tuple[Bundle, list[Parity]]) -> None:
    bundle, _ = graphs
    rows = {name: {t.name: (t.dtype, t.shape) for t in inputs} for name, inputs in bundle.graphs.items()}
    assert rows["unpack.onnx"] == {
        "latents": ("float32", (1, 4, "F", "H", "W"))
    }  # one sample: the first axis is not a batch
    assert rows["look.onnx"] == {"pixels": ("float32", (1, 3, "Y", "X"))}
    assert rows["mix.onnx"] == {"mood": ("float32", ("B",)), "wobble": ("float32", ("B", "F"))}
    assert rows["two.onnx"]["guidance"] == ("float32", ("B", "F"))
    assert rows["two.onnx"].keys() - rows["one.onnx"].keys() == {"guidance"}
    for name, inputs in rows.items():
        given = onnx.load(str(bundle.path / name), load_external_data=False).graph.input
        found = {v.name: tuple(d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim) for v in given}
        assert found == {key: shape for key, (_, shape) in inputs.items()}


def test_both_steps_point_into_one_weights_file(graphs: tuple[Bundle, list[Parity]]) -> None:
    bundle, _ = graphs
    places = []
    for name in ("two", "one"):
        content = onnx.load(str(bundle.path / graph_file(name)), load_external_data=False).graph
        outside = {t.name: {e.key: e.value for e in t.external_data} for t in content.initializer if t.external_data}
        assert {where["location"] for where in outside.values()} == {"net.safetensors"}
        places.append(outside)
    assert places[0] == places[1]
    assert len(places[0]) == 8


def test_graphs_give_what_the_modules_give_for_one_sample_at_a_time(graphs: tuple[Bundle, list[Parity]]) -> None:
    bundle, _ = graphs
    latents = np.random.default_rng(0).standard_normal((1, 4, 5, 8, 4)).astype(np.float32)
    pixels = []
    for backend in (OnnxBackend(bundle, Options("cpu")), TorchBackend(bundle, Options("cpu"))):
        pixels.append(backend.to_numpy(backend.run("unpack", latents=latents)["pixels"]))
    np.testing.assert_allclose(*pixels, atol=1e-5)
    with pytest.raises(BackendError, match=r"unpack\.latents: float32 \[2, 4, 5, 8, 4\] given.*'B': 1"):
        OnnxBackend(bundle, Options("cpu")).run("unpack", latents=latents.repeat(2, axis=0))


def test_whole_videos_are_verified_without_a_text_and_with_a_made_up_picture(
    graphs: tuple[Bundle, list[Parity]],
) -> None:
    bundle, _ = graphs
    found = verify(bundle, steps=2)
    assert found.passed
    assert [p.stage for p in found.parities if p.shape in ("B=1 F=3 H=4 W=8", "B=1 Y=8 X=16")] == ["look", "unpack"]
    (loop,) = found.loops
    assert loop.video is not None
    assert loop.video.frames.shape == (6, 8, 16, 3)
    assert loop.latents < 1e-4
    assert known_prompts(MANIFEST) == ("",)
    assert {name: picture.shape for name, picture in pictures(MANIFEST, {}).items()} == {"scene": (8, 16, 3)}


def test_a_graph_of_the_plain_step_may_be_missing(model: Bundle) -> None:
    bundle = drop_file(model, graph_file("one"))
    assert verify(bundle, steps=1).passed
    calls = record(bundle, ["one", "two", "look"], ["", ""], steps=1)
    assert {stage: len(made) for stage, made in calls.items()} == {"one": 0, "two": 2, "look": 2}


def test_fewer_bits_where_a_stage_may_compute_in_them(model: Bundle) -> None:
    """`unpack` still computes in float32, with weights stored in half precision."""
    parities: list[Parity] = []
    bundle = export_model(model, ["look", "unpack"], precision="fp16", on_parity=parities.append)
    assert all(p.passed for p in parities)
    errors = {p.stage: p.error for p in parities if p.way == "module"}
    assert errors["unpack"] < 2e-5 < errors["look"]
    for name, cast in (("look", False), ("unpack", True)):
        content = onnx.load(str(bundle.path / graph_file(name, "fp16")), load_external_data=False).graph
        stored = {t.name for t in content.initializer if t.external_data}
        assert {t.data_type for t in content.initializer if t.name in stored} == {onnx.TensorProto.FLOAT16}
        assert bool([n for n in content.node if n.op_type == "Cast" and stored & set(n.input)]) == cast
    assert bundle.weights("unpack", "fp16") == "pixels.fp16.safetensors"


def test_calibration_runs_the_steps_that_are_asked_for(model: Bundle) -> None:
    """The default guidance is 3, so a second request with guidance 1 runs the plain step."""
    calls = record_calls(model, ["", ""], 4, 3)
    assert {stage: len(made) for stage, made in calls.items()} == {"two": 3, "one": 3}
    assert "guidance" not in calls["one"][0]
    made = record(model, ["two", "one"], [""], steps=4)
    assert {stage: len(found) for stage, found in made.items()} == {"two": 4, "one": 4}
    assert {float(call["guidance"].max()) for call in made["two"]} == {3.0}
    bundle = quantize(model, calls, "int8", tolerance=10.0)
    for stage in ("two", "one"):
        assert bundle.precisions(stage) == ("fp32", "int8")
        assert bundle.graphs[graph_file(stage, "int8")] == bundle.graphs[graph_file(stage)]
        content = onnx.load(str(bundle.path / graph_file(stage, "int8")), load_external_data=False).graph
        quantized = {n.name.partition(".activation")[0] for n in content.node if n.op_type == "QuantizeLinear"}
        assert {name for name in quantized if name.endswith("weight")} == {"predictor.between.weight"}


def test_engines_for_the_tables_own_chunks(model: Bundle) -> None:
    pytest.importorskip("tensorrt_rtx")
    profile = read_profile("default", MANIFEST)
    records = build_engines(model, parse_targets("rtx-sm89"), [profile])
    spans = {r.stage: {s.name: (s.smallest, s.best, s.largest) for s in r.profiles[0].spans} for r in records}
    assert list(spans) == list(MANIFEST.stage_names)
    assert spans["unpack"]["latents"] == ((1, 4, 1, 4, 8), (1, 4, 6, 4, 8), (1, 4, 6, 4, 8))
    assert spans["mix"]["wobble"] == ((1, 2), (1, 6), (1, 6))
    assert spans["two"]["guidance"] == ((1, 6), (1, 6), (1, 6))
    tensors = {r.stage: {t.name: (t.dtype, t.shape) for t in r.tensors} for r in records}
    assert tensors["two"]["t"] == ("float32", (-1,))
    assert tensors["unpack"]["latents"] == ("float32", (1, 4, -1, -1, -1))


def test_a_profile_of_many_images_still_holds_the_models_chunks(tmp_path: Path) -> None:
    path = tmp_path / "own.toml"
    path.write_text("batch = [2, 2, 4]\nframes = [2, 4, 8]\nheight = 8\nwidth = 8\nimages = 2\n")
    profile = read_profile(str(path), MANIFEST)
    (unpack,) = stage_profiles("unpack", [profile], MANIFEST)
    assert (unpack.spans[0].smallest, unpack.spans[0].largest) == ((1, 4, 1, 4, 4), (1, 4, 6, 4, 4))
    (look,) = stage_profiles("look", [profile], MANIFEST)
    assert look.spans[0].largest == (1, 3, 8, 8)
    (mix,) = stage_profiles("mix", [profile], MANIFEST)
    assert mix.spans[1].smallest == (1, 2)
    (two,) = stage_profiles("two", [profile], MANIFEST)
    assert (two.spans[0].smallest[:3], two.spans[0].largest[:3]) == ((2, 4, 2), (4, 4, 8))
    path.write_text("batch = 1\nframes = 1\nheight = 8\nwidth = 8\nimages = 2\n")
    with pytest.raises(RequestError, match="frames=1: this model makes 2 to 12"):
        read_profile(str(path), MANIFEST)


def test_an_unknown_family_names_those_that_are_installed(model: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(families, "_packages", lambda: {"other": "other_family"})
    for run in (export_model, verify):
        with pytest.raises(UnknownFamily, match="family='stub': not installed here; installed are other"):
            run(model)
    # Its graphs still run.
    OnnxBackend(model, Options("cpu")).prepare("unpack")


def test_a_module_that_gives_another_type_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Look, "forward", lambda self, pixels: self.inner["look"](pixels).double())
    bundle = write_stub(tmp_path / "model")
    with pytest.raises(BackendError, match=r"look: the graph has latents DOUBLE; the stage takes and gives"):
        export_model(bundle, ["look"])
    assert sorted(p.name for p in bundle.path.iterdir()) == ["higen.json", "net.safetensors", "pixels.safetensors"]


# Sizes


def test_the_frames_of_a_stage_follow_from_the_loops() -> None:
    assert {name: frames_of(MANIFEST, name) for name in MANIFEST.stage_names} == {
        "mix": (2, 12),
        "look": (2, 12),
        "two": (2, 12),
        "one": (2, 12),
        "unpack": (1, 6),
    }
    (film,) = MANIFEST.loops
    sizes = replace(MANIFEST.sizes, frames=(3, 6, 12))
    windowed = replace(MANIFEST, sizes=sizes, loops=(replace(film, windows=Windows(5, 3)),))
    assert frames_of(windowed, "two") == (3, 5)
    assert frames_of(windowed, "mix") == (3, 12)  # a condition is made for the whole clip
    still = replace(film, name="still", frames=1)
    first = replace(MANIFEST, loops=(still, film))
    assert frames_of(first, "mix") == (1, 12)
    assert limits(MANIFEST, "unpack")["B"] == (1, 1)


def test_the_tracer_sees_sizes_that_differ() -> None:
    for manifest in (MANIFEST, replace(MANIFEST, sizes=replace(MANIFEST.sizes, frames=(2, 2, 3)))):
        for stage in manifest.stages:
            fixed = fixed_sizes(manifest, stage, None)
            sizes = traced_sizes(manifest, stage, fixed)
            free = [sizes[n] for n in stage.free(manifest.fixed) if n not in fixed and n not in ("Y", "X")]
            assert len(set(free)) == len(free)
            assert all(n > 1 for n in free)
            low, high = frames_of(manifest, stage.name)
            assert low <= sizes["F"] <= high
            for checked in checked_sizes(manifest, stage):
                assert checked["F"] == sizes["F"] or low <= checked["F"] <= high
                assert tuple(checked[n] for n in stage.free(manifest.fixed)) != tuple(
                    sizes[n] for n in stage.free(manifest.fixed)
                )


def test_static_fixes_a_step_and_the_pixels_of_the_rest() -> None:
    static = static_sizes(MANIFEST, "2x8x8x16")
    sizes = {"H": 4, "W": 8, "Y": 8, "X": 16}
    fixed = {stage.name: fixed_sizes(MANIFEST, stage, static) for stage in MANIFEST.stages}
    assert fixed["two"] == {"B": 2, "F": 8, **sizes}
    assert fixed["mix"] == sizes
    assert fixed["unpack"] == {"B": 1, **sizes}  # its frames are those of a chunk
    assert [s["F"] for s in checked_sizes(MANIFEST, MANIFEST.stage("unpack"), static)] == [1, 2, 3]
    with pytest.raises(RequestError, match="static='1x1x8x16': at least 1 sample and 2 to 12 frames"):
        static_sizes(MANIFEST, "1x1x8x16")


def test_example_inputs_lie_in_the_controls_ranges() -> None:
    sizes = sizes_for(MANIFEST, {"B": 50, "F": 40, "N": 1, "H": 4, "W": 4})
    given = example_inputs(MANIFEST, MANIFEST.stage("mix"), sizes)
    assert set(given["mood"].tolist()) == {0.0, 1.0, 2.0}
    assert 0 <= given["wobble"].min() < 0.1 < 1.9 < given["wobble"].max() <= 2
    assert torch.equal(given["mood"], example_inputs(MANIFEST, MANIFEST.stage("mix"), sizes)["mood"])
