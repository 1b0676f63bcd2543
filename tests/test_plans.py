"""The choice of a plan from the records only, without TensorRT."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from test_engine_store import RECORD

from higen.backends.plans import (
    Plan,
    PlanProfile,
    PlanTensor,
    Span,
    best_profile,
    check_interface,
    fitting_plans,
    streaming_budget,
)
from higen.errors import (
    BackendUnavailable,
    EngineError,
    HigenError,
    Malformed,
    MissingExtra,
    OutsideProfile,
    Stale,
    WrongArchitecture,
)
from higen.stages import Output, Stage, Tensor

DECODER = Stage(
    "vae_decoder",
    "vae.safetensors",
    (Tensor("latents", ("N", "C", "H", "W")),),
    (Output("pixels", ("N", 3, "Y", "X")),),
)

FILES = {RECORD.graph: RECORD.graph_sha256, RECORD.weights: RECORD.weights_sha256}
HERE: dict[str, str | HigenError] = {
    "rtx": "1.7.1",
    "tensorrt": MissingExtra("tensorrt", "tensorrt", "the engine tensorrt-sm89/vae_decoder"),
}


def plan(**changes: Any) -> Plan:
    record = replace(RECORD, **changes)
    return Plan(Path("model", "engines", record.target, "vae_decoder.engine"), record)


def chosen(
    *plans: Plan,
    errors: tuple[EngineError, ...] = (),
    files: dict[str, str] = FILES,
    architecture: int = 89,
    libraries: dict[str, str | HigenError] = HERE,
) -> str:
    return fitting_plans("vae_decoder", plans, errors, files, architecture, libraries)[0].record.target


PORTABLE = {"target": "rtx", "architectures": (80, 86, 89, 120)}
CLASSIC = {"target": "tensorrt-sm89", "flavour": "tensorrt", "library": "10.13.3"}


def test_a_plan_for_only_this_gpu_comes_before_a_portable_one() -> None:
    assert chosen(plan(**PORTABLE), plan()) == "rtx-sm89"
    assert chosen(plan(**PORTABLE), plan(), architecture=86) == "rtx"


def test_classic_tensorrt_comes_first_where_it_is_installed() -> None:
    assert chosen(plan(), plan(**CLASSIC)) == "rtx-sm89"
    assert chosen(plan(), plan(**CLASSIC), libraries={"rtx": "1.7.1", "tensorrt": "10.13.3"}) == "tensorrt-sm89"


@pytest.mark.parametrize(
    ("plans", "changes", "error", "message"),
    [
        ([], {}, BackendUnavailable, "no engine of vae_decoder"),
        ([plan()], {"architecture": 86}, WrongArchitecture, "rtx-sm89/vae_decoder: built for SM89, this GPU is SM86"),
        ([plan()], {"files": FILES | {RECORD.weights: "5" * 64}}, Stale, "vae.safetensors has changed since"),
        ([plan()], {"files": FILES | {RECORD.graph: "5" * 64}}, Stale, "vae_decoder.onnx has changed since"),
        ([plan()], {"files": {RECORD.graph: RECORD.graph_sha256}}, Stale, "vae.safetensors is not in the model any"),
        ([plan()], {"libraries": {"rtx": "1.8.0"}}, Stale, r"built by tensorrt_rtx 1\.7\.1, 1\.8\.0 is here"),
        ([plan()], {"libraries": {"rtx": EngineError("is broken")}}, EngineError, "is broken"),
        ([plan(**CLASSIC)], {}, MissingExtra, r"'tensorrt': pip install 'higen\[tensorrt\]'"),
        ([plan()], {"architecture": 86, "files": {}}, WrongArchitecture, "this GPU is SM86"),
        # With several plans, the error is that of the plan for this GPU.
        ([plan(target="rtx-sm86", architectures=(86,)), plan()], {"files": {}}, Stale, "rtx-sm89/vae_decoder"),
        ([plan()], {"architecture": 86, "errors": (Malformed("cut"),)}, Malformed, "cut"),
    ],
    ids=range(11),
)
def test_why_no_plan_fits(plans: list[Plan], changes: dict[str, Any], error: type[HigenError], message: str) -> None:
    with pytest.raises(error, match=message):
        chosen(*plans, **changes)


def test_the_command_that_repairs_an_engine_can_be_run() -> None:
    """A target's folder name can differ from its name on the command line."""
    model = Path("model")
    for made, target in ((plan(), "rtx-sm89"), (plan(**PORTABLE), "rtx"), (plan(**CLASSIC), "tensorrt")):
        command = f"higen-export build-engines {model} --target {target} --stage vae_decoder --precision fp32"
        assert made.remedy == command
        with pytest.raises(Stale, match=f"has changed since it was built: {command}$"):
            fitting_plans("vae_decoder", [made], (), FILES | {RECORD.weights: ""}, 89, HERE | {"tensorrt": "10.13.3"})


def test_every_plan_that_fits_is_given_the_best_first() -> None:
    found = fitting_plans("vae_decoder", [plan(**PORTABLE), plan(), plan(library="1.6")], (), FILES, 89, HERE)
    assert [p.record.target for p in found] == ["rtx-sm89", "rtx"]


def test_a_broken_record_does_not_hide_a_good_plan() -> None:
    assert chosen(plan(), errors=(Malformed("cut"),)) == "rtx-sm89"


def test_a_plans_tensors_are_the_tables() -> None:
    stage, tensors = DECODER, RECORD.tensors
    check_interface(plan(), stage, tensors)
    with pytest.raises(Malformed, match="its tensors are"):
        check_interface(plan(), stage, tensors[:1])
    with pytest.raises(Malformed, match="its tensors are"):
        check_interface(plan(), stage, (replace(tensors[0], kind="output"), tensors[1]))
    for changed in (
        PlanTensor("pixels", "output", "float16", (-1, 3, -1, -1)),
        PlanTensor("pixels", "output", "float32", (-1, 4, -1, -1)),
        PlanTensor("pixels", "output", "float32", (-1, 3, -1)),
    ):
        with pytest.raises(Malformed, match="differ from those in its record"):
            check_interface(plan(), stage, (tensors[0], changed))


def test_an_engine_may_know_the_sizes_that_its_profiles_fix() -> None:
    """If smallest and largest size are equal, an axis that is free in the network may be fixed in the engine."""
    fixed = (PlanTensor("latents", "input", "float32", (2, 4, 8, 8)), RECORD.tensors[1])
    check_interface(plan(), DECODER, fixed)


def profiles(*limits: tuple[str, int, int]) -> Plan:
    """A plan with profiles for one input with one axis."""
    made = [PlanProfile(name, (Span("latents", (low,), (low,), (high,)),)) for name, low, high in limits]
    return plan(profiles=tuple(made))


@pytest.mark.parametrize(("size", "index"), [(1, 0), (2, 0), (3, 1), (8, 1), (9, 2), (16, 2)])
def test_the_narrowest_profile_that_holds_the_shapes(size: int, index: int) -> None:
    assert best_profile(profiles(("a", 1, 2), ("b", 2, 8), ("c", 1, 16)), {"latents": (size,)}) == index


def test_a_shape_outside_names_every_profile() -> None:
    with pytest.raises(OutsideProfile, match=r"a takes latents from \[1\] to \[2\], not \[20\]; b takes"):
        best_profile(profiles(("a", 1, 2), ("b", 2, 8)), {"latents": (20,)})
    with pytest.raises(OutsideProfile):
        best_profile(profiles(("a", 1, 2)), {"latents": (1, 1)})


@pytest.mark.parametrize(
    ("streamable", "activations", "free", "budget"),
    [(100, 50, 1000, 100), (100, 50, 166, 100), (100, 50, 165, 30), (20, 50, 40, 20), (0, 0, 0, 0)],
)
def test_weights_are_streamed_only_where_they_do_not_fit(
    streamable: int, activations: int, free: int, budget: int
) -> None:
    assert streaming_budget(streamable, activations, free, automatic=30) == budget
