"""Writes a Triton model repository: one model per stage, and `higen`, which runs requests on them.

    REPO/<stage>/config.pbtxt   1/model.onnx + weights, or 1/model.plan
    REPO/higen/config.pbtxt     1/model.py   1/model/higen.json + tokenizer.json

A loop's plain stage is left out if the model has no graph of it, or if plain and guided stage would run on different
Triton backends. The guided stage then runs all rows of a request.

ONNX Runtime refuses weights outside the graph's own folder, also through a symbolic link. So weights are hard links:
every stage has them beside its graph, and the disk holds them once. A model on another file system is copied once. A
model's files are replaced, never rewritten (higen/bundle.py), so later changes to the model do not change a repository.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from higen.axes import limits, most_rows
from higen.backends.plans import ENGINES, Plan, check_plan, engine_file, read_plans, record_file
from higen.bundle import Bundle, FileRecord, create_model, file_record, graph_file, staged
from higen.engines.triton.config import orchestrator_config, stage_config
from higen.engines.triton.service import Limits
from higen.errors import EngineError, IntegrityError, Malformed, ManifestError, ModelError, RequestError
from higen.manifest import Manifest
from higen.precision import QUANTIZED, check_precision
from higen.stages import Stage

__all__ = ["Settings", "write_repository"]

MODEL_PY = '''"""The model `higen`; the package higen must be importable in the server's Python."""

from higen.engines.triton.model import TritonPythonModel

__all__ = ["TritonPythonModel"]
'''


_DEVICE = r"cpu|(gpu|cuda)(:(0|[1-9][0-9]{0,2}))?"


@dataclass(frozen=True)
class Settings:
    """How a repository is run.

    device     "cpu", "gpu" or "cuda" (every GPU), "gpu:N" or "cuda:N" (that one, from 0)
    max_batch  samples in a denoising batch
    slots      requests that run at once. If they are more than max_batch, they form several batches
    line       requests that may wait for a slot; further ones are refused and may be sent again
    instances  copies of each stage on the device, and the number of batches that run at the same time
    threads    number of threads of a stage on a CPU; None: ONNX Runtime's choice
    precision  of the graphs: "fp32", "fp16" or "bf16"
    engines    folder in the model's engines/ with the TensorRT engines to use; stages without an engine use graphs
    """

    device: str = "cpu"
    precision: str = "fp32"
    max_batch: int = 8
    slots: int = 16
    line: int = 256
    instances: int = 1
    threads: int | None = None
    engines: str | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.device, str) or not re.fullmatch(_DEVICE, self.device):
            raise RequestError(
                f"device={self.device!r}: one of 'cpu', 'gpu' (every GPU), 'gpu:N' (the one of this number, from 0); "
                "'cuda' is another name of 'gpu'"
            )
        check_precision(self.precision)
        for name in ("max_batch", "slots", "instances"):
            _check_whole(name, getattr(self, name), 1)
        _check_whole("line", self.line, 0)
        if self.threads is not None:
            _check_whole("threads", self.threads, 1)
        if self.engines is not None and self.device == "cpu":
            raise RequestError(f"engines={self.engines!r} with device={self.device!r}: TensorRT runs on a GPU")

    def rows(self, manifest: Manifest, stage: Stage) -> int:
        """The largest batch of a stage."""
        return most_rows(manifest, stage, self.max_batch)

    def limits(self, manifest: Manifest) -> Limits:
        """The limits that `higen` applies."""
        rows = {stage.name: self.rows(manifest, stage) for stage in manifest.all_stages if stage.batch}
        return Limits(self.slots, self.line, rows, self.instances)


@dataclass(frozen=True)
class _Model:
    """A stage as a Triton model: its backend, its files by name, its fixed sizes, and the profiles of an engine."""

    stage: Stage
    backend: str
    files: Mapping[str, Path]
    fixed: Mapping[str, int]
    profiles: Sequence[int] = ()


def write_repository(bundle: Bundle, target: str | os.PathLike[str], settings: Settings) -> dict[str, str]:
    """Write the repository of a model directory to `target`; returns the Triton backend of each model.

    It is written to a temporary folder and then moved: it appears complete or not at all, and a failure leaves nothing
    behind. Raises RequestError (a setting), ManifestError (version 1), ModelError (`target` exists or cannot be
    written, no such engines), EngineError (an engine that Triton cannot use) or IntegrityError (a stage without a
    graph, a graph of an older step contract or with fixed shapes, a file that does not match its sha256).
    """
    if bundle.version == 1:
        raise ManifestError(f"{bundle.path}: its manifest is of version 1, Triton reads 2: higen upgrade {bundle.path}")
    models = _models(bundle, settings)
    backends = {name: model.backend for name, model in models.items()}
    manifest = bundle.manifest
    config = orchestrator_config(manifest, settings.limits(manifest), backends)
    with staged(target) as folder:
        link = _Links()
        for name, model in models.items():
            version = folder / name / "1"
            version.mkdir(parents=True)
            for file, source in model.files.items():
                link(source, version / file)
            text = stage_config(
                model.stage,
                model.fixed,
                backend=model.backend,
                device=settings.device,
                max_batch=settings.rows(manifest, model.stage),
                instances=settings.instances,
                threads=settings.threads if model.backend == "onnxruntime" else None,
                profiles=model.profiles,
            )
            (folder / name / "config.pbtxt").write_text(text, encoding="utf-8")
        version = folder / "higen" / "1"
        version.mkdir(parents=True)
        (version / "model.py").write_text(MODEL_PY, encoding="utf-8")
        (folder / "higen" / "config.pbtxt").write_text(config, encoding="utf-8")
        with create_model(version / "model", manifest) as inner:
            if manifest.text is not None:  # a copy: `create` sets its permissions
                shutil.copyfile(bundle.file(manifest.text.tokenizer), inner / manifest.text.tokenizer)
    return {**backends, "higen": "python"}


def _models(bundle: Bundle, settings: Settings) -> dict[str, _Model]:
    """A model for each stage that requests can use, in the table's order."""
    manifest, precision = bundle.manifest, settings.precision
    engines = _engines(bundle, settings)
    graphs = [name for name in manifest.stage_names if precision in bundle.precisions(name)]
    partners = {plain: guided for loop in manifest.loops for guided, plain in loop.pairs if plain and guided}
    needed = [name for name in manifest.stage_names if name not in partners]
    if missing := [name for name in needed if name not in engines and name not in graphs]:
        raise IntegrityError(
            f"{bundle.path}: no graph in {precision} of {', '.join(missing)}: {_export_command(bundle, precision)}"
        )
    models = {}
    for name in manifest.stage_names:
        partner = partners.get(name)
        if name in engines and (partner is None or partner in engines):
            models[name] = engines[name]
        elif name in graphs and (partner is None or partner not in engines):
            models[name] = _graph(bundle, manifest.stage(name), precision)
    for name in manifest.variants:  # for `reuse`, if they exist
        if name in engines:
            models[name] = engines[name]
        elif precision in bundle.precisions(name):
            models[name] = _graph(bundle, manifest.stage(name), precision)
    return models


def _graph(bundle: Bundle, stage: Stage, precision: str) -> _Model:
    """A stage that ONNX Runtime runs. Raises IntegrityError."""
    graph, weights = graph_file(stage.name, precision), bundle.weights(stage.name, precision)
    fixed = _fixed_sizes(bundle, stage, graph, precision)
    return _Model(stage, "onnxruntime", {"model.onnx": bundle.file(graph), weights: bundle.file(weights)}, fixed)


def _fixed_sizes(bundle: Bundle, stage: Stage, file: str, precision: str) -> dict[str, int]:
    """The sizes of a graph's fixed symbols: sizes that the model fixes, and axes that no request varies.

    Raises IntegrityError for a graph of an older step contract, and for one that fixes an axis that requests vary.
    """
    fixed, free = dict(bundle.manifest.fixed), limits(bundle.manifest, stage.name)
    taken = {tensor.name: tensor for tensor in bundle.graphs.get(file, ())}
    wrong = [
        f"only one of the graph and the stage has the input {name}"
        for name in sorted({t.name for t in stage.inputs} ^ set(taken))
    ]
    for tensor in stage.inputs if not wrong else ():
        own = taken[tensor.name]
        if (own.dtype, len(own.shape)) != (tensor.dtype, len(tensor.shape)):
            wrong.append(
                f"an older export: it takes {own.name} as {own.dtype} {list(own.shape)}, not {tensor.dtype} "
                f"{list(tensor.shape)}"
            )
            continue
        for symbol, size in zip(tensor.shape, own.shape, strict=True):
            if isinstance(symbol, str) and isinstance(size, int):
                if symbol not in fixed and free.get(symbol) != (size, size):
                    wrong.append(f"{own.name} has a fixed size {symbol}={size} (--static), but requests vary it")
                fixed[symbol] = size
    if wrong:
        raise IntegrityError(f"{bundle.path / file}: {wrong[0]}: {_export_command(bundle, precision)}")
    return fixed


def _export_command(bundle: Bundle, precision: str) -> str:
    kind = "quantize" if precision in QUANTIZED else "onnx"
    return f"higen-export {kind} {bundle.path} --precision {precision}"


def _engines(bundle: Bundle, settings: Settings) -> dict[str, _Model]:
    """The engine of each stage that has one in the folder `settings.engines`, with the profiles that fit."""
    if settings.engines is None:
        return {}
    found = {}
    folder = bundle.path / ENGINES / settings.engines
    for stage in bundle.manifest.all_stages:
        name = stage.name
        plans, errors = read_plans(bundle.path, name)
        for plan in plans:
            if plan.record.target == settings.engines:
                found[name] = _engine(bundle, stage, plan, settings)
        if name not in found and any((folder / file).exists() for file in (engine_file(name), record_file(name))):
            reasons = [error for error in errors if str(folder) in str(error)]
            raise reasons[0] if reasons else Malformed(f"{folder / engine_file(name)}: has no record")
    if not found:
        known = sorted(p.name for p in folder.parent.iterdir() if p.is_dir()) if folder.parent.is_dir() else []
        raise ModelError(
            f"engines={settings.engines!r}: no engine of any stage; "
            f"{folder.parent} has {', '.join(known) or 'nothing'} "
            f"(make them: higen-export build-engines {bundle.path} --target tensorrt)"
        )
    return found


def _engine(bundle: Bundle, stage: Stage, plan: Plan, settings: Settings) -> _Model:
    """A stage that TensorRT runs.

    Raises EngineError for a plan that Triton could not load or that belongs to another model, IntegrityError if the
    graph of the plan does not fit, and RequestError if no profile allows `max_batch`.
    """
    record = plan.record
    if record.flavour != "tensorrt":
        raise EngineError(
            f"{plan.name}: is an engine of TensorRT for RTX, but Triton reads those of classic TensorRT: "
            f"higen-export build-engines {bundle.path} --target tensorrt"
        )
    hashes = {name: file.sha256 for name, file in bundle.files.items()}
    check_plan(plan, hashes, record.architectures[0], {record.flavour: record.library})
    if not plan.path.is_file() or file_record(plan.path) != FileRecord(record.size, record.sha256):
        raise Malformed(f"{plan.path}: is not the plan that its record describes; build it again")
    fixed = _fixed_sizes(bundle, stage, record.graph, record.precision)
    return _Model(stage, "tensorrt", {"model.plan": plan.path}, fixed, _profiles(bundle, stage, plan, settings))


def _profiles(bundle: Bundle, stage: Stage, plan: Plan, settings: Settings) -> list[int]:
    """Indices of the plan's profiles that take batches from one sample to the limit; all if the stage is not batched.

    Raises RequestError if there is none.
    """
    profiles = plan.record.profiles
    if not stage.batch:
        return list(range(len(profiles)))
    rows = settings.rows(bundle.manifest, stage)
    ranges = [(min(s.smallest[0] for s in p.spans), max(s.largest[0] for s in p.spans)) for p in profiles]
    fitting = [i for i, (least, most) in enumerate(ranges) if least <= 1 and rows <= most]
    if not fitting:
        built = ", ".join(f"{least} to {most}" for least, most in ranges)
        raise RequestError(
            f"max_batch={settings.max_batch}: {plan.name} would be given 1 to {rows} samples, but is built for {built}"
        )
    return fitting


def _check_whole(name: str, value: object, least: int) -> None:
    if type(value) is not int or value < least:
        raise RequestError(f"{name}={value!r}: a whole number from {least}")


class _Links:
    """Makes hard links. If the source is on another file system, links to one copy of it."""

    def __init__(self) -> None:
        self._copies: dict[Path, Path] = {}

    def __call__(self, source: Path, to: Path) -> None:
        source = source.resolve()
        try:
            os.link(self._copies.get(source, source), to)
        except OSError:  # another file system, or one without links
            shutil.copyfile(source, to)
            self._copies[source] = to
