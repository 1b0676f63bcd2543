"""Writes a Triton model repository: a model per stage, and `higen`, which runs requests on them.

    REPO/<stage>/config.pbtxt   1/model.onnx + weights, or 1/model.plan
    REPO/higen/config.pbtxt     1/model.py   1/model/higen.json + tokenizer.json

ONNX Runtime refuses weights that lie outside the graph's own folder, also behind a symbolic link. So weights are hard
links: every stage has them beside its graph, and the disk has them once. A model on another file system is copied,
once. The model's files are replaced, never rewritten (higen/bundle.py), so a repository keeps what it was made of.
"""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from higen import bundle as files
from higen.backends.plans import ENGINES, Plan, check_plan, engine_file, read_plans, record_file
from higen.bundle import Bundle, FileRecord, check_precision, file_record, graph_file, staged
from higen.engines.triton.config import KINDS, orchestrator_config, stage_config
from higen.engines.triton.service import Limits
from higen.errors import EngineError, IntegrityError, Malformed, ModelError, RequestError
from higen.pipeline import DECODE_CHUNK
from higen.stages import STAGES, dimensions

__all__ = ["Settings", "write_repository"]

MODEL_PY = '''"""The model `higen`; the package higen must be importable in the server's Python."""

from higen.engines.triton.model import TritonPythonModel

__all__ = ["TritonPythonModel"]
'''


@dataclass(frozen=True)
class Settings:
    """How a repository is to be run.

    max_batch  samples in a denoising batch
    slots      requests at work at once; more than max_batch give batches to further instances
    line       requests that may wait for a slot; further ones are refused and may be sent again
    instances  copies of each stage on the device, and batches that run at once: one may decode while another denoises
    threads    of a stage on a CPU; None: ONNX Runtime's choice
    precision  of the graphs: "fp32", "fp16" or "bf16"
    engines    name of the folder in the model's engines/ whose TensorRT engines are used; other stages use graphs
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
        if self.device not in KINDS:
            raise RequestError(f"device={self.device!r}: one of {', '.join(map(repr, KINDS))}")
        check_precision(self.precision)
        for name in ("max_batch", "slots", "instances"):
            _check_whole(name, getattr(self, name), 1)
        _check_whole("line", self.line, 0)
        if self.threads is not None:
            _check_whole("threads", self.threads, 1)
        if self.engines is not None and self.device != "gpu":
            raise RequestError(f"engines={self.engines!r} with device={self.device!r}: TensorRT runs on a GPU")

    def rows(self, stage: str) -> int:
        """The largest batch of a stage; a decoder is given a few frames of one video at a time."""
        return max(self.max_batch, DECODE_CHUNK) if stage.startswith("vae") else self.max_batch

    @property
    def limits(self) -> Limits:
        """What `higen` goes by."""
        return Limits(self.slots, self.line, {stage: self.rows(stage) for stage in STAGES}, self.instances)


def write_repository(bundle: Bundle, target: str | os.PathLike[str], settings: Settings) -> dict[str, str]:
    """Write the repository of a model directory to `target`; returns the Triton backend of each model.

    It is written aside and moved: nothing appears before everything is there, and nothing stays behind on a failure.
    Raises RequestError (a setting), ModelError (`target` exists or cannot be written, no such engines), EngineError
    (an engine that Triton cannot use) or IntegrityError (no graph of a stage; a file unlike its sha256).
    """
    engines = _engines(bundle, settings)
    precision = settings.precision
    missing = [stage for stage in STAGES if stage not in engines and precision not in bundle.precisions(stage)]
    if missing:
        raise IntegrityError(
            f"{bundle.path}: no graph in {precision} of {', '.join(missing)}: "
            f"higen-export onnx {bundle.path} --precision {precision}"
        )
    for name in STAGES:
        if name not in engines:
            _check_dynamic(bundle, name, precision)
    with staged(target) as folder:
        link = _Links()
        for name, stage in STAGES.items():
            version = folder / name / "1"
            version.mkdir(parents=True)
            if name in engines:
                link(engines[name][0].path, version / "model.plan")
            else:
                weights = bundle.weights(name, precision)
                link(bundle.file(graph_file(name, precision)), version / "model.onnx")
                link(bundle.file(weights), version / weights)
            config = stage_config(
                stage,
                dimensions(bundle.config),
                backend="tensorrt" if name in engines else "onnxruntime",
                device=settings.device,
                max_batch=settings.rows(name),
                instances=settings.instances,
                threads=None if name in engines else settings.threads,
                profiles=engines[name][1] if name in engines else (),
            )
            (folder / name / "config.pbtxt").write_text(config, encoding="utf-8")
        version = folder / "higen" / "1"
        version.mkdir(parents=True)
        (version / "model.py").write_text(MODEL_PY, encoding="utf-8")
        (folder / "higen" / "config.pbtxt").write_text(orchestrator_config(settings.limits), encoding="utf-8")
        with files.create(version / "model", bundle.config) as inner:
            link(bundle.file(files.TOKENIZER), inner / files.TOKENIZER)
    return {**{name: "tensorrt" if name in engines else "onnxruntime" for name in STAGES}, "higen": "python"}


def _engines(bundle: Bundle, settings: Settings) -> dict[str, tuple[Plan, list[int]]]:
    """The engine of each stage that has one in the folder that is asked for, and the profiles of it that fit."""
    if settings.engines is None:
        return {}
    found = {}
    folder = bundle.path / ENGINES / settings.engines
    for stage in STAGES:
        plans, errors = read_plans(bundle.path, stage)
        for plan in plans:
            if plan.record.target == settings.engines:
                found[stage] = plan, _profiles(bundle, plan, settings)
        if stage not in found and any((folder / name).exists() for name in (engine_file(stage), record_file(stage))):
            reasons = [error for error in errors if str(folder) in str(error)]
            raise reasons[0] if reasons else Malformed(f"{folder / engine_file(stage)}: has no record beside it")
    if not found:
        known = sorted(p.name for p in folder.parent.iterdir() if p.is_dir()) if folder.parent.is_dir() else []
        raise ModelError(
            f"engines={settings.engines!r}: no engine of any stage; "
            f"{folder.parent} has {', '.join(known) or 'nothing'} "
            f"(make them: higen-export build-engines {bundle.path} --target tensorrt)"
        )
    return found


def _profiles(bundle: Bundle, plan: Plan, settings: Settings) -> list[int]:
    """Indices of the plan's profiles that take batches from one sample to the limit.

    Raises EngineError for a plan that Triton could not load or that is not of this model, RequestError for the limit.
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
        raise Malformed(f"{plan.path}: is not the plan of its record; build it again")
    rows = settings.rows(record.stage)
    limits = [(min(s.smallest[0] for s in p.spans), max(s.largest[0] for s in p.spans)) for p in record.profiles]
    fitting = [i for i, (least, most) in enumerate(limits) if least <= 1 and rows <= most]
    if not fitting:
        ranges = ", ".join(f"{least} to {most}" for least, most in limits)
        raise RequestError(
            f"max_batch={settings.max_batch}: {plan.name} would be given 1 to {rows} samples, but is built for {ranges}"
        )
    return fitting


def _check_dynamic(bundle: Bundle, stage: str, precision: str) -> None:
    """Raise IntegrityError for a graph of fixed shapes, into which no batch fits. Without `onnx` Triton finds out."""
    try:
        import onnx
    except ImportError:
        return
    path = bundle.file(graph_file(stage, precision))
    inputs = onnx.load(path, load_external_data=False).graph.input
    if fixed := [i.name for i in inputs if i.type.tensor_type.shape.dim[0].HasField("dim_value")]:
        raise IntegrityError(
            f"{path}: {fixed[0]} has a fixed batch (--static), and batches vary here: "
            f"higen-export onnx {bundle.path} --precision {precision}"
        )


def _check_whole(name: str, value: object, least: int) -> None:
    if type(value) is not int or value < least:
        raise RequestError(f"{name}={value!r}: a whole number from {least}")


class _Links:
    """Hard links, or where the source lies on another file system, links to one copy of it."""

    def __init__(self) -> None:
        self._copies: dict[Path, Path] = {}

    def __call__(self, source: Path, to: Path) -> None:
        source = source.resolve()
        try:
            os.link(self._copies.get(source, source), to)
        except OSError:  # another file system, or one without links
            shutil.copyfile(source, to)
            self._copies[source] = to
