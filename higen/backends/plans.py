"""TensorRT engines of a model and the records beside them: which plan fits, and why the others do not.

model/engines/<target>/<stage>.engine     the plan, opaque, written by TensorRT
model/engines/<target>/<stage>.json       its record: what it was built from, for which GPUs, by what, for which shapes
model/engines/<target>/<stage>.log        what TensorRT said while it built, with the kernels it chose

Everything here is a decision on values; no TensorRT, no GPU.
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
"""The folder of a model that holds its engines, one folder for each target."""

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
    """The name under which a file of an engine is written before it takes its place."""
    return f".{name}.part"


@dataclass(frozen=True)
class PlanTensor:
    """An input or output of a plan; -1 is an axis whose size the profiles limit."""

    name: str
    kind: Literal["input", "output"]
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Span:
    """The shapes that a profile allows an input, and the one it is tuned for."""

    name: str
    smallest: tuple[int, ...]
    best: tuple[int, ...]
    largest: tuple[int, ...]

    def holds(self, shape: Sequence[int]) -> bool:
        """Whether a shape lies inside."""
        return len(shape) == len(self.smallest) and all(
            low <= n <= high for low, n, high in zip(self.smallest, shape, self.largest, strict=True)
        )


@dataclass(frozen=True)
class PlanProfile:
    """A named set of shapes, one span for each input."""

    name: str
    spans: tuple[Span, ...]

    def holds(self, shapes: Mapping[str, Sequence[int]]) -> bool:
        """Whether every input lies inside."""
        return all(span.holds(shapes[span.name]) for span in self.spans)

    @property
    def volume(self) -> int:
        """Elements of all inputs at their largest."""
        return sum(math.prod(span.largest) for span in self.spans)


@dataclass(frozen=True)
class PlanRecord:
    """What is known of a plan without opening it.

    flavour        "rtx" (TensorRT for RTX) or "tensorrt"; `library` is its version, which alone can read the plan
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
            raise Malformed(f"{where}: no record of an engine: {error}") from error


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
        """The command that builds it again, for its profiles if they are given too."""
        record = self.record
        target = record.target if record.flavour == "rtx" else "tensorrt"  # the folder names the GPU besides
        return (
            f"higen-export build-engines {self.path.parents[2]} --target {target} --stage {record.stage} "
            f"--precision {record.precision}"
        )

    @property
    def renewal(self) -> str:
        """The commands that export its graph again and then build it again."""
        record = self.record
        export = "onnx" if record.precision in PRECISIONS else "quantize"
        return (
            f"higen-export {export} {self.path.parents[2]} --stage {record.stage} --precision {record.precision}, then "
            f"{self.remedy}"
        )


def read_plans(model: Path, stage: str) -> tuple[list[Plan], list[EngineError]]:
    """The plans of a stage over all targets, and what is wrong with records that cannot be read.

    A new plan takes its place right before its record does. In between, and after a kill there, the record that waits
    is the plan's own, and is taken.
    """
    plans: list[Plan] = []
    errors: list[EngineError] = []
    for path in sorted(model.glob(f"{ENGINES}/*/{record_file(stage)}")):
        if path.parent.name.startswith("."):
            continue
        try:
            record = pending_record(path) or PlanRecord.from_text(read_text(path), str(path))
            if (record.stage, record.target) != (stage, path.parent.name):
                raise Malformed(f"{path}: is the record of {record.target}/{record.stage}")
        except (OSError, TextError) as error:
            errors.append(Malformed(f"{path}: cannot be read: {error}"))
        except EngineError as error:
            errors.append(error)
        else:
            plans.append(Plan(path.with_name(engine_file(stage)), record))
    return plans, errors


def pending_record(path: Path) -> PlanRecord | None:
    """The record that waits to take the place of the one at `path`, if it is that of the plan that is there."""
    return fitting_record(path.with_name(pending_file(path.name)), path.with_name(engine_file(path.stem)))


def fitting_record(part: Path, plan: Path) -> PlanRecord | None:
    """The record in the file `part`, if it is that of the plan at `plan`."""
    try:
        record = PlanRecord.from_text(read_text(part), str(part))
        fits = plan.stat().st_size == record.size and sha256(plan) == record.sha256
    except (OSError, TextError, EngineError):
        return None
    return record if fits else None


def check_plan(
    plan: Plan, files: Mapping[str, str], architecture: int, libraries: Mapping[str, str | HigenError]
) -> None:
    """Whether a plan fits the model, the GPU and the TensorRT here.

    files        sha256 of the model's files by name, as its manifest has them
    libraries    version of each flavour of TensorRT here, or why it cannot be used

    Raises WrongArchitecture, Stale, or what `libraries` has.
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
            f"{plan.name}: built by {EXTRAS[record.flavour][0]} {record.library}, {version} is here and reads only its "
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
    """The plans of a stage that fit, the best first: built for this GPU alone before a portable one, classic TensorRT
    before RTX.

    `plans` and `errors` come from `read_plans`, the rest is as for `check_plan`. Raises BackendUnavailable where there
    is no engine at all, else why the likeliest of them does not fit.
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
    # An engine made for this very GPU that cannot be used says more than one that was made for another.
    own = [error for error in refused if not isinstance(error, WrongArchitecture)] or refused
    raise own[0]


def check_interface(plan: Plan, stage: Stage, tensors: Sequence[PlanTensor]) -> None:
    """Whether a plan's tensors are those of its record and of the stage table. Raises Malformed.

    The record has the network's shapes. An engine may know more: an axis that its profiles fix has a size there.
    """
    expected = {t.name: "input" for t in stage.inputs} | dict.fromkeys(stage.graph_outputs, "output")
    found = {tensor.name: tensor.kind for tensor in tensors}
    if found != expected:
        raise Malformed(f"{plan.path}: its tensors are {found}, {stage.name} has {expected}")
    recorded = {t.name: t for t in plan.record.tensors}
    if recorded.keys() != found.keys() or not all(_alike(t, recorded[t.name]) for t in tensors):
        raise Malformed(f"{plan.path}: its tensors are not those of the record beside it")


def _alike(a: PlanTensor, b: PlanTensor) -> bool:
    """Whether two descriptions may be of one tensor: -1 goes with any size."""
    if (a.kind, a.dtype, len(a.shape)) != (b.kind, b.dtype, len(b.shape)):
        return False
    return all(n == m or -1 in (n, m) for n, m in zip(a.shape, b.shape, strict=True))


def best_profile(plan: Plan, shapes: Mapping[str, Sequence[int]]) -> int:
    """Index of the narrowest profile that holds all inputs' shapes. Raises OutsideProfile naming what does not fit."""
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
    """Bytes of weights to keep on the GPU, of an engine that can stream them: all if they fit beside the activations
    with a tenth of the memory to spare, else what TensorRT proposes (`automatic`).
    """
    return streamable if streamable + activations <= free - free // 10 else min(automatic, streamable)


_INVALID: dict[str, tuple[type[EngineError], str]] = {
    "UNSUPPORTED_CC": (WrongArchitecture, "it was not built for this GPU"),
    "VERSION_MISMATCH": (Stale, "another version of TensorRT built it"),
    "MALFORMED_ENGINE": (Malformed, "its file is no plan"),
    "OLD_CUDA_DRIVER": (NoDriver, "the NVIDIA driver is too old for it"),
    "OLD_CUDA_RUNTIME": (NoDriver, "the CUDA runtime is too old for it"),
    "INSUFFICIENT_GPU_MEMORY": (EngineError, "the GPU has too little memory for it"),
    "CUDA_ERROR": (NoDevice, "CUDA does not work here"),
}
"""What TensorRT says of a plan that it will not load, the likeliest cause first."""


def validity_error(plan: Plan, reasons: int, members: Mapping[str, int]) -> EngineError:
    """The error for the reasons (a sum of flags; `members` are their values) why TensorRT calls a plan invalid."""
    found = [_INVALID[name] for name in _INVALID if reasons & members.get(name, 0)]
    kind = found[0][0] if found else EngineError
    return kind(
        f"{plan.name}: {'; '.join(text for _, text in found) or 'TensorRT calls it invalid and does not say why'}"
    )
