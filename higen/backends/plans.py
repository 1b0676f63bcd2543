"""TensorRT engines of a model and their records: which plan fits, and why the others do not.

model/engines/<target>/<stage>.engine     the plan: an opaque file written by TensorRT
model/engines/<target>/<stage>.json       its record: sources, GPUs, TensorRT version, shapes
model/engines/<target>/<stage>.log        TensorRT's messages during the build, with the kernels it chose

This module uses neither TensorRT nor a GPU.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from higen.bundle import sha256
from higen.errors import (
    BackendUnavailable,
    EngineError,
    HigenError,
    Malformed,
    ManifestError,
    NoDevice,
    NoDriver,
    OutsideProfile,
    Stale,
    WrongArchitecture,
    quoted,
)
from higen.precision import PRECISIONS
from higen.stages import Stage
from higen.text_files import TextError, read_text
from higen.typed_json import from_json, to_json

__all__ = [
    "ENGINES",
    "EXTRAS",
    "Plan",
    "PlanProfile",
    "PlanRecord",
    "PlanTensor",
    "Span",
    "best_profile",
    "check_interface",
    "check_plan",
    "engine_file",
    "fitting_plans",
    "fitting_record",
    "log_file",
    "pending_file",
    "pending_record",
    "read_plans",
    "record_file",
    "streaming_budget",
    "validity_error",
]

ENGINES = "engines"
"""The folder of a model that holds its engines, in one subfolder per target."""

FORMAT = 1

EXTRAS = {"rtx": ("tensorrt_rtx", "rtx"), "tensorrt": ("tensorrt", "tensorrt")}
"""Python package and extra of each flavour of TensorRT."""


def engine_file(stage: str) -> str:
    """The file name of a stage's plan."""
    return f"{stage}.engine"


def record_file(stage: str) -> str:
    """The file name of the record beside it."""
    return f"{stage}.json"


def log_file(stage: str) -> str:
    """The file name of its build log."""
    return f"{stage}.log"


def pending_file(name: str) -> str:
    """The name of an engine's file while it is written; it is renamed when it is complete."""
    return f".{name}.part"


@dataclass(frozen=True)
class PlanTensor:
    """An input or output of a plan. Size -1: the profiles give the range of this axis."""

    name: str
    kind: Literal["input", "output"]
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Span:
    """The range of shapes that a profile allows for an input, and the shape it is tuned for."""

    name: str
    smallest: tuple[int, ...]
    best: tuple[int, ...]
    largest: tuple[int, ...]

    def holds(self, shape: Sequence[int]) -> bool:
        """Whether a shape is in the range."""
        return len(shape) == len(self.smallest) and all(
            low <= n <= high for low, n, high in zip(self.smallest, shape, self.largest, strict=True)
        )


@dataclass(frozen=True)
class PlanProfile:
    """A named set of shapes, with one span per input."""

    name: str
    spans: tuple[Span, ...]

    def holds(self, shapes: Mapping[str, Sequence[int]]) -> bool:
        """Whether every input's shape is in its span."""
        return all(span.holds(shapes[span.name]) for span in self.spans)

    @property
    def volume(self) -> int:
        """Number of elements of all inputs at their largest shapes."""
        return sum(math.prod(span.largest) for span in self.spans)


@dataclass(frozen=True)
class PlanRecord:
    """What is known about a plan without opening it.

    flavour        "rtx" (TensorRT for RTX) or "tensorrt"; `library` is its version, the only one that reads the plan
    architectures  compute capabilities, 89 for SM89
    options        builder options by name
    size, sha256   of the plan
    built          UTC, ISO 8601; `seconds` the build took
    """

    stage: str
    target: str
    precision: str
    flavour: Literal["rtx", "tensorrt"]
    library: str
    architectures: tuple[int, ...]
    graph: str
    graph_sha256: str
    weights: str
    weights_sha256: str
    tensors: tuple[PlanTensor, ...]
    profiles: tuple[PlanProfile, ...]
    options: dict[str, Any]
    size: int
    sha256: str
    built: str
    seconds: float
    format: int = FORMAT

    def to_text(self) -> str:
        """The record as it is stored."""
        return json.dumps(to_json(self), indent=1) + "\n"

    @classmethod
    def from_text(cls, text: str, where: str) -> PlanRecord:
        """Read a stored record. Raises Malformed."""
        try:
            data = json.loads(text)
            if isinstance(data, dict) and data.get("format") != FORMAT:
                raise Malformed(f"{where}: format={quoted(data.get('format'))}, this higen reads {FORMAT}")
            return from_json(cls, data, "record")
        except (ValueError, RecursionError, ManifestError) as error:
            raise Malformed(f"{where}: is not the record of an engine: {error}") from error


@dataclass(frozen=True)
class Plan:
    """A plan's file and its record."""

    path: Path
    record: PlanRecord

    @property
    def name(self) -> str:
        """Target and stage, for messages."""
        return f"{self.record.target}/{self.record.stage}"

    @property
    def remedy(self) -> str:
        """The command that builds the plan again. Options for its profiles must be added."""
        record = self.record
        target = record.target if record.flavour == "rtx" else "tensorrt"  # the folder's name also has the GPU
        return (
            f"higen-export build-engines {self.path.parents[2]} --target {target} --stage {record.stage} "
            f"--precision {record.precision}"
        )

    @property
    def renewal(self) -> str:
        """The commands that export the graph again and then build the plan again."""
        record = self.record
        export = "onnx" if record.precision in PRECISIONS else "quantize"
        return (
            f"higen-export {export} {self.path.parents[2]} --stage {record.stage} --precision {record.precision}, then "
            f"{self.remedy}"
        )


def read_plans(model: Path, stage: str) -> tuple[list[Plan], list[EngineError]]:
    """The plans of a stage for all targets, and an error for each record that cannot be read.

    A build renames a new plan just before its new record. Between these two steps, or if the build is killed there,
    the record of the new plan still has its temporary name. It is then read from there.
    """
    plans: list[Plan] = []
    errors: list[EngineError] = []
    for path in sorted(model.glob(f"{ENGINES}/*/{record_file(stage)}")):
        if path.parent.name.startswith("."):
            continue
        try:
            record = pending_record(path) or PlanRecord.from_text(read_text(path), str(path))
            if (record.stage, record.target) != (stage, path.parent.name):
                raise Malformed(f"{path}: is the record of another engine, {record.target}/{record.stage}")
        except (OSError, TextError) as error:
            errors.append(Malformed(f"{path}: cannot be read: {error}"))
        except EngineError as error:
            errors.append(error)
        else:
            plans.append(Plan(path.with_name(engine_file(stage)), record))
    return plans, errors


def pending_record(path: Path) -> PlanRecord | None:
    """The record that would replace the one at `path`, if it belongs to the plan in its place already."""
    return fitting_record(path.with_name(pending_file(path.name)), path.with_name(engine_file(path.stem)))


def fitting_record(part: Path, plan: Path) -> PlanRecord | None:
    """The record in the file `part`, if it belongs to the plan at `plan`."""
    try:
        record = PlanRecord.from_text(read_text(part), str(part))
        fits = plan.stat().st_size == record.size and sha256(plan) == record.sha256
    except (OSError, TextError, EngineError):
        return None
    return record if fits else None


def check_plan(
    plan: Plan, files: Mapping[str, str], architecture: int, libraries: Mapping[str, str | HigenError]
) -> None:
    """Check that a plan fits the model, the GPU and the installed TensorRT.

    files        sha256 of the model's files by name, as in its manifest
    libraries    for each flavour of TensorRT, the installed version or the error why it cannot be used

    Raises WrongArchitecture, Stale, or the error in `libraries`.
    """
    record = plan.record
    if architecture not in record.architectures:
        built = ", ".join(f"SM{a}" for a in record.architectures)
        raise WrongArchitecture(f"{plan.name}: built for {built}, this GPU is SM{architecture}")
    for name, built_from in ((record.graph, record.graph_sha256), (record.weights, record.weights_sha256)):
        if files.get(name) != built_from:
            what = "is not in the model any more" if name not in files else "has changed"
            raise Stale(f"{plan.name}: {name} {what} since it was built: {plan.remedy}")
    version = libraries[record.flavour]
    if isinstance(version, HigenError):
        raise version
    if version != record.library:
        raise Stale(
            f"{plan.name}: built by {EXTRAS[record.flavour][0]} {record.library}; the installed {version} reads only "
            "its "
            f"own: {plan.remedy}"
        )


def fitting_plans(
    stage: str,
    plans: Sequence[Plan],
    errors: Sequence[EngineError],
    files: Mapping[str, str],
    architecture: int,
    libraries: Mapping[str, str | HigenError],
) -> list[Plan]:
    """The plans of a stage that fit, the best first.

    Plans for fewer architectures come first, then classic TensorRT before RTX. `plans` and `errors` come from
    `read_plans`; the other arguments are as for `check_plan`. Raises BackendUnavailable if there is no engine at all.
    If none fits, raises the error of the most relevant one.
    """
    refused: list[HigenError] = list(errors)
    fitting: list[Plan] = []
    for plan in sorted(plans, key=lambda p: (len(p.record.architectures), p.record.flavour != "tensorrt")):
        try:
            check_plan(plan, files, architecture, libraries)
        except HigenError as error:
            refused.append(error)
        else:
            fitting.append(plan)
    if fitting:
        return fitting
    if not refused:
        raise BackendUnavailable(f"no engine of {stage} (make one: higen-export build-engines MODEL --target TARGET)")
    # Why an engine for this GPU cannot be used says more than that an engine is for another GPU.
    own = [error for error in refused if not isinstance(error, WrongArchitecture)] or refused
    raise own[0]


def check_interface(plan: Plan, stage: Stage, tensors: Sequence[PlanTensor]) -> None:
    """Check that a plan's tensors are those of its record and of the stage table. Raises Malformed.

    The record has the network's shapes. In the engine, an axis that all profiles fix has a size instead of -1.
    """
    expected = {t.name: "input" for t in stage.inputs} | dict.fromkeys(stage.graph_outputs, "output")
    found = {tensor.name: tensor.kind for tensor in tensors}
    if found != expected:
        raise Malformed(f"{plan.path}: its tensors are {found}, {stage.name} has {expected}")
    recorded = {t.name: t for t in plan.record.tensors}
    if recorded.keys() != found.keys() or not all(_alike(t, recorded[t.name]) for t in tensors):
        raise Malformed(f"{plan.path}: its tensors differ from those in its record")


def _alike(a: PlanTensor, b: PlanTensor) -> bool:
    """Whether two descriptions can be of the same tensor: -1 matches any size."""
    if (a.kind, a.dtype, len(a.shape)) != (b.kind, b.dtype, len(b.shape)):
        return False
    return all(n == m or -1 in (n, m) for n, m in zip(a.shape, b.shape, strict=True))


def best_profile(plan: Plan, shapes: Mapping[str, Sequence[int]]) -> int:
    """Index of the smallest profile that allows all inputs' shapes. Raises OutsideProfile with what does not fit."""
    profiles = plan.record.profiles
    fitting = [i for i, profile in enumerate(profiles) if profile.holds(shapes)]
    if fitting:
        return min(fitting, key=lambda i: profiles[i].volume)
    limits = []
    for profile in profiles:
        span = next(span for span in profile.spans if not span.holds(shapes[span.name]))
        limits.append(
            f"{profile.name} takes {span.name} from {list(span.smallest)} to {list(span.largest)}, "
            f"not {list(shapes[span.name])}"
        )
    raise OutsideProfile(f"{plan.name}: {'; '.join(limits)}")


def streaming_budget(streamable: int, activations: int, free: int, automatic: int) -> int:
    """Bytes of weights to keep on the GPU, for an engine that can stream them.

    All weights are kept if they and the activations leave a tenth of the free memory unused. Otherwise it is what
    TensorRT proposes (`automatic`).
    """
    return streamable if streamable + activations <= free - free // 10 else min(automatic, streamable)


_INVALID: dict[str, tuple[type[EngineError], str]] = {
    "UNSUPPORTED_CC": (WrongArchitecture, "it was not built for this GPU"),
    "VERSION_MISMATCH": (Stale, "another version of TensorRT built it"),
    "MALFORMED_ENGINE": (Malformed, "its file is not a plan"),
    "OLD_CUDA_DRIVER": (NoDriver, "the NVIDIA driver is too old for it"),
    "OLD_CUDA_RUNTIME": (NoDriver, "the CUDA runtime is too old for it"),
    "INSUFFICIENT_GPU_MEMORY": (EngineError, "the GPU has too little memory for it"),
    "CUDA_ERROR": (NoDevice, "CUDA does not work here"),
}
"""TensorRT's reasons for refusing a plan, the most likely cause first: error class and message."""


def validity_error(plan: Plan, reasons: int, members: Mapping[str, int]) -> EngineError:
    """The error for an invalid plan. `reasons`: TensorRT's sum of flags; `members`: the value of each flag by name."""
    found = [_INVALID[name] for name in _INVALID if reasons & members.get(name, 0)]
    kind = found[0][0] if found else EngineError
    return kind(
        f"{plan.name}: {'; '.join(text for _, text in found) or 'TensorRT calls it invalid and does not say why'}"
    )
