"""Builds the engines of a model, one target after the other. All checks come before the first build."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any

from higen.backends.cuda import Cuda
from higen.backends.external_data import graph_files
from higen.backends.plans import PlanRecord
from higen.backends.tensorrt_api import library
from higen.bundle import Bundle, graph_file
from higen.engines.build import PLAIN, Options, build_plan
from higen.engines.graph_facts import check_fixed, read_graph
from higen.engines.progress import Progress
from higen.engines.shapes import Profile, stage_profiles
from higen.engines.store import EngineStore, difference
from higen.engines.targets import Target, check_precision
from higen.errors import IntegrityError, ModelError, RequestError
from higen.precision import precision_named

__all__ = ["Event", "build_engines"]

MARGIN = 2**24
"""Bytes on disk for a plan's kernels, record and log, in addition to its weights."""


@dataclass(frozen=True)
class Event:
    """Progress of a build. `state` is "waiting" (for another builder of the target), "kept" (the engine fits already),
    "building" or "built". `part` goes from 0 to 1 while building. `replaced`: the valid engine that the new one
    replaces.
    """

    target: str
    stage: str
    state: str
    part: float = 0.0
    reason: str = ""
    record: PlanRecord | None = None
    replaced: PlanRecord | None = None


def build_engines(
    bundle: Bundle,
    targets: Sequence[Target],
    profiles: Sequence[Profile],
    stages: Sequence[str] | None = None,
    precision: str = "fp32",
    options: Options = PLAIN,
    *,
    on_event: Callable[[Event], None] = lambda _: None,
) -> list[PlanRecord]:
    """Build the engines of a model that are not there yet, and return the records of all.

    stages    by name; None: every stage of the model, except optional stages (plain steps, variants) without a graph

    A stage's plan is kept if it fits graph, weights, profiles, options and library, so an interrupted build continues
    where it stopped. Two builders of one target wait for each other.

    Raises before anything is built: RequestError (stage, precision, a profile that does not match a graph's fixed
    shape), IntegrityError (an altered graph), ModelError (no graph, or no denoiser graph in a quantised precision),
    MissingExtra, NoDriver and NoDevice (classic TensorRT without a GPU), OutputError (disk). Raises EngineError if
    TensorRT fails or does not load.
    """
    known = (*bundle.manifest.stage_names, *bundle.manifest.variants)
    names = _default_stages(bundle, precision) if stages is None else tuple(stages)
    for name in names:
        if name not in known:
            raise RequestError(f"stage={name!r}: one of {', '.join(known)}")
    resolved = [_on_this_machine(target) for target in targets]
    for target in resolved:
        check_precision(precision, target.architectures)
    if missing := bundle.not_quantized(precision):
        raise ModelError(missing)
    libraries = {flavour: library(flavour, f"engines for {names}") for flavour, names in _flavours(resolved).items()}
    wanted = [
        [_wanted(bundle, target, stage, precision, profiles, options, libraries[target.flavour]) for stage in names]
        for target in resolved
    ]
    stores = [EngineStore(bundle.path, target.name) for target in resolved]
    plans = [(store, record) for store, records in zip(stores, wanted, strict=True) for record in records]
    stores[0].check_space(_space(plans))  # all are on one disk
    return [
        record
        for target, records in zip(resolved, wanted, strict=True)
        for record in _build_target(bundle, target, records, options, libraries[target.flavour], on_event)
    ]


def _default_stages(bundle: Bundle, precision: str) -> tuple[str, ...]:
    """Every stage, except optional ones (plain stages, variants) without a graph: another stage can do their work."""
    spared = {plain for loop in bundle.manifest.loops for guided, plain in loop.pairs if guided is not None}
    serving = {*precision_named(precision).stand_ins}
    spared |= {*bundle.manifest.variants}
    names = (*bundle.manifest.stage_names, *bundle.manifest.variants)
    return tuple(name for name in names if name not in spared or serving.intersection(bundle.precisions(name)))


def _on_this_machine(target: Target) -> Target:
    """The target with architectures; none means this machine's GPU. Raises NoDriver or NoDevice without a GPU."""
    if target.architectures:
        return target
    cuda = Cuda.open()
    try:
        architecture = cuda.architecture
    finally:
        cuda.close()
    return replace(target, name=f"{target.name}-sm{architecture}", architectures=(architecture,))


def _flavours(targets: Sequence[Target]) -> dict[str, str]:
    """Names of the targets by flavour."""
    found: dict[str, list[str]] = {}
    for target in targets:
        found.setdefault(target.flavour, []).append(target.name)
    return {flavour: ", ".join(names) for flavour, names in found.items()}


def _wanted(
    bundle: Bundle,
    target: Target,
    stage: str,
    precision: str,
    profiles: Sequence[Profile],
    options: Options,
    trt: Any,
) -> PlanRecord:
    """The record that a plan would have if it were built now, without the fields that only the build can fill. Its size
    is an estimate of the plan's size. Raises RequestError if a profile does not match a graph's fixed shape.
    """
    there, serving = bundle.precisions(stage), precision_named(precision).stand_ins
    found = next((p for p in serving if p in there), None)
    if found is None:
        plain = serving[-1]
        raise ModelError(
            f"{bundle.path}: no {graph_file(stage, plain)} (make it: higen-export onnx {bundle.path} --stage {stage} "
            f"--precision {plain})"
        )
    graph, precision = graph_file(stage, found), found
    weights = bundle.weights(stage, precision)
    facts = read_graph(bundle.file(graph), precision, target.flavour)
    spans = stage_profiles(stage, profiles, bundle.manifest, facts.inputs)
    check_fixed(stage, graph, facts, spans)
    return PlanRecord(
        stage=stage,
        target=target.name,
        precision=precision,
        flavour=target.flavour,
        library=str(trt.__version__),
        architectures=target.architectures,
        graph=graph,
        graph_sha256=bundle.files[graph].sha256,
        weights=weights,
        weights_sha256=bundle.files[weights].sha256,
        tensors=(),
        profiles=spans,
        options=options.as_json(),
        size=facts.size,
        sha256="",
        built="",
        seconds=0.0,
    )


def _reason(store: EngineStore, stored: PlanRecord | None, wanted: PlanRecord) -> str | None:
    """Why a stage must be built; None if the stored plan is the wanted one."""
    if stored is None:
        return "plan or record is truncated or changed" if store.holds(wanted.stage) else "not built yet"
    return difference(stored, wanted)


def _space(plans: Sequence[tuple[EngineStore, PlanRecord]]) -> int:
    """Bytes that must be free for the plans to build. Each new plan is written before the old one is removed."""
    held = most = 0
    for store, wanted in plans:
        stored = store.stored(wanted.stage, verify=False)
        if _reason(store, stored, wanted) is None:
            continue
        # The size of the last build is a better estimate than the size of the weights.
        alike = stored is not None and stored.precision == wanted.precision
        held += (stored.size if stored is not None and alike else wanted.size) + MARGIN
        most = max(most, held)
        held -= store.plan_size(wanted.stage)
    return most


def _build_target(
    bundle: Bundle,
    target: Target,
    wanted: Sequence[PlanRecord],
    options: Options,
    trt: Any,
    on_event: Callable[[Event], None],
) -> list[PlanRecord]:
    store = EngineStore(bundle.path, target.name)
    records = []
    with store.building(lambda: on_event(Event(target.name, "", "waiting"))):
        for record in wanted:
            stored = store.stored(record.stage)
            reason = _reason(store, stored, record)
            if reason is None:
                assert stored is not None
                records.append(stored)
                on_event(Event(target.name, record.stage, "kept", 1.0, record=stored))
                continue
            # Check the files now: an engine of altered files must not be recorded with the original hashes.
            bundle.file(record.graph)
            if others := {*graph_files(bundle, record.graph)} - {record.graph, record.weights}:
                raise IntegrityError(
                    f"{bundle.path / record.graph}: takes tensors from {', '.join(sorted(others))}, and the weights of "
                    f"{record.stage} are {record.weights}; export the graph again"
                )
            bundle.file(record.weights)
            records.append(_build_stage(bundle, store, record, options, trt, reason, stored, on_event))
    return records


def _build_stage(
    bundle: Bundle,
    store: EngineStore,
    wanted: PlanRecord,
    options: Options,
    trt: Any,
    reason: str,
    replaced: PlanRecord | None,
    on_event: Callable[[Event], None],
) -> PlanRecord:
    def part(_: str, done: float) -> None:
        on_event(Event(wanted.target, wanted.stage, "building", done, reason, replaced=replaced))

    started = time.perf_counter()
    part("", 0.0)
    built = build_plan(
        trt,
        bundle.path / wanted.graph,
        bundle.manifest.stage(wanted.stage),
        wanted.profiles,
        wanted.architectures,
        options,
        Progress(part),
    )
    for name in (wanted.graph, wanted.weights):
        bundle.file(name, verify=False)  # checked again if they changed during the build
    plan = memoryview(built.data)
    record = replace(
        wanted,
        tensors=built.tensors,
        size=plan.nbytes,
        sha256=hashlib.sha256(plan).hexdigest(),
        built=datetime.now(UTC).isoformat(timespec="seconds"),
        seconds=round(time.perf_counter() - started, 1),
    )
    store.write(plan, record, built.log)
    on_event(Event(wanted.target, wanted.stage, "built", 1.0, reason, record))
    return record
