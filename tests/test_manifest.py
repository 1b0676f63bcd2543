"""higen.json, version 2: round trip, wrong tables (each a typed error that names its row), the seal, and fuzzing."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import TINY
from interpreter_model import MANIFEST as MADE_UP
from sealing import edit, write

from higen import bundle
from higen.api import default_model
from higen.backends.base import RecordingBackend
from higen.bundle import MANIFEST, Bundle, FileRecord, GraphInput
from higen.errors import HigenError, IntegrityError, ManifestError, ModelError
from higen.families.higen import spec
from higen.families.higen.configuration import FewStepPreset
from higen.families.higen.spec import ModelConfig
from higen.manifest import Manifest
from higen.manifest_file import read_manifest, rewrite, write_manifest
from higen.pipeline import Pipeline
from higen.tables import Mix, NoiseRule, Windows
from higen.tokenizer import build_word_tokenizer, write_tokenizer
from higen.upgrade import upgrade

Document = dict[str, Any]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A directory of the made-up tables without graphs, of a family that nobody has installed."""
    with bundle.create_model(tmp_path / "model", MADE_UP) as folder:
        write_tokenizer(build_word_tokenizer(("a", "kite")), folder / "words.json")
    return tmp_path / "model"


def document_of(manifest: Manifest, folder: Path) -> Document:
    write_manifest(folder, manifest, {}, {})
    document: Document = json.loads((folder / MANIFEST).read_text())
    return document


# Round trip


@pytest.mark.parametrize(
    "manifest",
    [
        MADE_UP,
        spec.manifest(ModelConfig()),
        spec.manifest(TINY, plain=False),
        Bundle.open(default_model()).manifest,
        replace(
            MADE_UP,
            name="ünïcode \U0001f40b",
            loops=(
                MADE_UP.loops[0],
                replace(
                    MADE_UP.loops[1],
                    windows=Windows(8, 4),
                    noise=NoiseRule(1, mix=Mix("draft", 0.5)),
                    guidance=(1.0, 2.5),
                ),
            ),
        ),
    ],
    ids=["made up", "released", "tiny", "built in", "more"],
)
def test_tables_come_back_as_they_were_written(manifest: Manifest, tmp_path: Path) -> None:
    graphs = {"a.onnx": (GraphInput("t", "int64", ("B",)), GraphInput("x", "float32", ("B", 3)))}
    files = {"a.onnx": FileRecord(3, "0" * 64), "deep/er.bin": FileRecord(0, "f" * 64)}
    write_manifest(tmp_path, manifest, files, graphs)
    opened = read_manifest(tmp_path)
    assert opened.manifest == manifest
    assert opened.files == files
    assert opened.graphs == graphs
    assert opened.version == 2
    first = (tmp_path / MANIFEST).read_bytes()
    write_manifest(tmp_path, opened.manifest, opened.files, opened.graphs)
    assert (tmp_path / MANIFEST).read_bytes() == first


def test_higens_configuration_is_in_its_tables() -> None:
    presets = (FewStepPreset("fast", (2, 1), stretch=1.5), FewStepPreset("half", (None, 1), (None, 2.0), usual=True))
    few = replace(TINY, defaults=replace(TINY.defaults, stretch=1.25, presets=presets))
    for config in (TINY, few, ModelConfig()):
        assert spec.config(spec.manifest(config)) == config


def test_the_built_in_models_manifest_is_of_version_2() -> None:
    opened = Bundle.open(default_model())
    assert opened.version == 2
    reuse = [f"{stage}_{half}" for stage in opened.manifest.denoising for half in ("deep", "shallow")]
    assert sorted(opened.graphs) == sorted(f"{stage}.onnx" for stage in (*opened.manifest.stage_names, *reuse))
    for name in opened.files:
        opened.file(name)


# Wrong manifests


def row(document: Document, table: str, name: str) -> Document:
    found: Document = next(r for r in document[table] if r["name"] == name)
    return found


def tensor(document: Document, stage: str, name: str) -> Document:
    made: Document = next(t for t in row(document, "stages", stage)["inputs"] if t["name"] == name)
    return made


def put(document: Document, path: str, value: Any) -> None:
    """Set a value by a path such as "stages.reader.inputs.tokens.source"."""
    place: Any = document
    *keys, last = path.split(".")
    for key in keys:
        place = next(r for r in place if r["name"] == key) if isinstance(place, list) else place[key]
    if isinstance(place, list):
        place[int(last)] = value
    else:
        place[last] = value


def setting(path: str, value: Any) -> Callable[[Document], None]:
    return lambda document: put(document, path, value)


def one_frame_after_a_clip(key: str, value: Any) -> Callable[[Document], None]:
    """A change: the loop over frames runs first, and `key` of the one-frame loop becomes `value`."""

    def change(document: Document) -> None:
        for stage in ("film_two", "film_one"):
            put(document, f"stages.{stage}.inputs.still.source", "look.seen")
        document["loops"].reverse()
        put(document, "loops.draft.replaced", None)
        put(document, f"loops.draft.{key}", value)

    return change


def twice(table: str, name: str) -> Callable[[Document], None]:
    return lambda document: document[table].append(row(document, table, name))


def without(path: str) -> Callable[[Document], None]:
    def remove(document: Document) -> None:
        place: Any = document
        *keys, last = path.split(".")
        for key in keys:
            place = next(r for r in place if r["name"] == key) if isinstance(place, list) else place[key]
        del place[last]

    return remove


def state(shape: list[Any]) -> Callable[[Document], None]:
    """A change: the draft's latents get another shape in inputs and outputs."""

    def change(document: Document) -> None:
        for name in ("draft_one", "draft_two"):
            stage = row(document, "stages", name)
            for t in (*stage["inputs"], *stage["outputs"]):
                if t["name"] in ("latents", "previous"):
                    t["shape"] = shape

    return change


WRONG: list[tuple[str, Callable[[Document], object], str]] = [
    # References
    (
        "a source naming a stage that does not exist",
        setting("stages.mixer.inputs.words.source", "writer.words"),
        r"stages\.mixer\.words: source writer\.words: the stages are reader, mixer, look,",
    ),
    (
        "an output that the stage has not",
        setting("stages.mixer.inputs.words.source", "reader.letters"),
        r"stages\.mixer\.words: source reader\.letters: reader gives words",
    ),
    (
        "a circle of two",
        lambda d: row(d, "stages", "reader")["inputs"].append(
            {"name": "back", "dtype": "float32", "shape": ["B", "F", "K"], "source": "mixer.hints"}
        ),
        r"stages: the sources form a circle: (mixer <- reader <- mixer|reader <- mixer <- reader)",
    ),
    (
        "a stage that feeds itself",
        lambda d: row(d, "stages", "mixer")["inputs"].append(
            {"name": "own", "dtype": "float32", "shape": ["B", "F", "K"], "source": "mixer.hints"}
        ),
        r"stages: the sources form a circle: mixer <- mixer",
    ),
    (
        "a circle through a loop",
        lambda d: row(d, "stages", "mixer")["inputs"].append(
            {"name": "seen", "dtype": "float32", "shape": ["B", "C", "H", "W"], "source": "film.latents"}
        ),
        r"stages: the sources form a circle: .*film",
    ),
    (
        "a loop that needs a later loop",
        lambda d: d["loops"].reverse(),
        r"loops\.film: needs the latents of draft, which runs later",
    ),
    (
        "a mix with a later loop",
        setting("loops.draft.noise.mix", {"loop": "film", "scale": 1.0}),
        r"loops\.draft\.noise\.mix\.loop='film': an earlier loop|stages: the sources form a circle",
    ),
    (
        "a clip's latents mixed into a loop of one frame",
        one_frame_after_a_clip("noise", {"purpose": 3, "offset": None, "mix": {"loop": "film", "scale": 1.0}}),
        r"loops\.draft\.noise\.mix\.loop='film': has all frames of the clip, but draft has one",
    ),
    (
        "a loop of one frame replaced by a clip's latents",
        one_frame_after_a_clip("replaced", {"control": "sketch", "latents": "film.latents"}),
        r"loops\.draft\.replaced\.latents='film': has all frames of the clip, but draft has one",
    ),
    (
        "a loop of one frame that begins from a clip's latents",
        one_frame_after_a_clip("start", {"control": "sketch", "latents": "film.latents", "strength": 0.5}),
        r"loops\.draft\.start\.latents='film': has all frames of the clip, but draft has one",
    ),
    (
        "a denoising stage as a source",
        setting("stages.film_two.inputs.still.source", "draft_two.latents"),
        r"stages\.film_two\.still: .*a denoising stage is run by its loop; take LOOP\.latents",
    ),
    (
        "a loop's other output",
        setting("stages.film_two.inputs.still.source", "draft.previous"),
        r"stages\.film_two\.still: source draft\.previous: a loop gives only latents",
    ),
    (
        "a negative loop",
        setting("stages.film_two.inputs.still.source", "draft@negative.latents"),
        r"a loop gives only latents",
    ),
    (
        "no source",
        setting("stages.mixer.inputs.words.source", "reader"),
        r"stages\.mixer\.words: source='reader': state,",
    ),
    (
        "a control that is not there",
        setting("stages.mixer.inputs.shake.source", "control:quake"),
        r"stages\.mixer\.shake: source control:quake: the controls of this kind are \['shake', 'sway', ",
    ),
    (
        "a picture that is a clip",
        setting("stages.look.inputs.pixels.source", "picture:footage"),
        r"stages\.look\.pixels: source picture:footage: the controls of this kind are \['sketch'\]",
    ),
    (
        "a text control as numbers",
        lambda d: (
            d["controls"].append(
                {
                    **row(d, "controls", "glow"),
                    "name": "note",
                    "kind": "text",
                    "encoding": None,
                    "low": None,
                    "default": "",
                }
            ),
            put(d, "stages.mixer.inputs.grain.source", "control:note"),
        ),
        r"stages\.mixer\.grain: source control:note: the controls of this kind",
    ),
    ("two stages of one name", twice("stages", "reader"), r"stages: reader appears twice"),
    ("two loops of one name", twice("loops", "film"), r"stages: film appears twice"),
    ("a loop of a stage's name", setting("loops.draft.name", "reader"), r"stages: reader appears twice"),
    ("two controls of one name", twice("controls", "glow"), r"controls: glow appears twice"),
    (
        "two inputs of one name",
        lambda d: row(d, "stages", "reader")["inputs"].append(tensor(d, "reader", "tokens")),
        r"stages\.reader: \['tokens', 'tokens'\] names a tensor twice",
    ),
    ("no stages", setting("stages", []), r"stages, loops: from 1 to 100 rows each, not 0 and 2"),
    ("no loops", setting("loops", []), r"from 1 to 100 rows each, not 9 and 0"),
    (
        "too many stages",
        lambda d: d["stages"].extend({**row(d, "stages", "reader"), "name": f"s{i}"} for i in range(100)),
        r"from 1 to 100 rows each, not 109 and 2",
    ),
    # Shapes
    (
        "a symbol that nobody defines",
        setting("stages.mixer.inputs.words.shape", ["B", "M"]),
        r"stages\.mixer\.words: 'M': a size, one of B, F, N, H, W, Y, X, or a name in sizes\.symbols",
    ),
    ("a size of zero", setting("stages.mixer.inputs.words.shape", ["B", 0]), r"stages\.mixer\.words: 0: a size"),
    (
        "no axis",
        setting("stages.reader.outputs.0", {"name": "words", "shape": []}),
        r"stages\.reader\.words: at least one",
    ),
    ("a symbol of ours", setting("sizes.symbols.H", 3), r"sizes: symbols\.H: a name other than B, F, N,"),
    ("a symbol that is not a name", setting("sizes.symbols", {"a b": 3}), r"sizes: symbols\.a b: a name"),
    ("a symbol of zero", setting("sizes.symbols.K", 0), r"sizes: symbols\.K=0: a whole number from 1"),
    (
        "an encoding for another rank",
        setting("stages.mixer.inputs.shake.shape", ["B", "F", "K"]),
        r"stages\.mixer\.shake: curve gives 2 axes, not \['B', 'F', 'K'\]",
    ),
    (
        "a number as a curve",
        setting("stages.mixer.inputs.grain.shape", ["B", "F"]),
        r"stages\.mixer\.grain: number gives 1 axes, not \['B', 'F'\]",
    ),
    (
        "a sinusoid without a fixed size",
        lambda d: tensor(d, "mixer", "shake").update(source="control:sway", shape=["B", "F", "W"]),
        r"stages\.mixer\.shake: sinusoid needs a last axis of a fixed size of at most 65536, not 'W'",
    ),
    (
        "a sinusoid of gigabytes",
        lambda d: (
            tensor(d, "mixer", "shake").update(source="control:sway", shape=["B", "F", "Q"]),
            put(d, "sizes.symbols.Q", 2**31),
        ),
        r"stages\.mixer\.shake: sinusoid needs a last axis of a fixed size of at most 65536, not 'Q'",
    ),
    ("a size of 2^63", setting("stages.mixer.inputs.words.shape", ["B", 2**63]), r"stages\.mixer\.words: 9223"),
    (
        "an output with an axis that no input has",
        setting("stages.reader.outputs.0", {"name": "words", "shape": ["B", "F"]}),
        r"stages\.reader\.words: F is not an axis of any of its inputs",
    ),
    (
        "a decoder of grey pixels",
        setting("stages.paint.outputs.0", {"name": "pixels", "shape": ["N", 1, "Y", "X"]}),
        r"sizes\.decoder='paint': one input with the source state, \[N, C, H, W\] and the output \[N, 3, Y, X\], or "
        r"\[B,",
    ),
    (
        "a picture of three axes",
        setting("stages.look.inputs.pixels.shape", ["B", "Y", "X"]),
        r"stages\.look\.pixels: source picture:sketch: 4 axes, not \['B', 'Y', 'X'\]",
    ),
    (
        "tokens of another length",
        setting("stages.reader.inputs.tokens.shape", ["B", "K"]),
        r"reader\.tokens: tokens are \[B, 5\]",
    ),
    ("float tokens", setting("stages.reader.inputs.tokens.dtype", "float32"), r"reader\.tokens: tokens are int64"),
    (
        "an output of another rank",
        setting("stages.mixer.inputs.words.shape", ["B", 1, "K"]),
        r"stages\.mixer\.words: source reader\.words has 2 axes, not 3",
    ),
    (
        "latents of another rank",
        setting("stages.film_one.inputs.still.shape", ["B", "C"]),
        r"stages\.film_one\.still: source draft\.latents has 4 or 5 axes, not 2",
    ),
    ("flat latents", state(["B", "C", "H", "W"]), r"loops\.draft\.guided='draft_two': latents are \[B, C, 1, H, W\]"),
    ("latents of free channels", state(["B", "N", 1, "H", "W"]), r"latents are \[B, C, 1, H, W\], C of a fixed size"),
    ("latents of two frames", state(["B", "C", 2, "H", "W"]), r"latents are \[B, C, 1, H, W\]"),
    (
        "a column per frame",
        setting("stages.film_two.inputs.t.shape", ["B", "F"]),
        r"loops\.film\.guided='film_two': t is float32 \['B'\], not \['B', 'F'\]",
    ),
    (
        "one guidance a sample",
        setting("stages.film_two.inputs.guidance.shape", ["B"]),
        r"loops\.film\.guided='film_two': guidance is float32 \['B', 'F'\], not \['B'\]",
    ),
    (
        "whole timesteps",
        setting("stages.film_one.inputs.t.dtype", "int64"),
        r"loops\.film\.plain='film_one': t is float32",
    ),
    (
        "a condition without samples",
        lambda d: row(d, "stages", "film_one")["inputs"].append(
            {"name": "more", "dtype": "float32", "shape": ["K"], "source": "noise:3"}
        ),
        r"stages\.film_one: batch is true, but the first axes are not all B, or all N",
    ),
    # Stages of loops
    (
        "a loop's stage that is not there",
        setting("loops.film.plain", "film"),
        r"loops\.film\.plain='film': the stages are",
    ),
    (
        "a loop's stage that is not a step",
        setting("loops.film.plain", "mixer"),
        r"loops\.film\.plain='mixer': must give only latents, prev",
    ),
    (
        "a guided stage as plain",
        setting("loops.film.plain", "film_two"),
        r"loops\.film\.plain='film_two': its state inputs must be A,",
    ),
    (
        "a plain stage as guided",
        setting("loops.film.guided", "film_one"),
        r"loops\.film\.guided='film_one': its state inputs must be A,",
    ),
    (
        "a step of one sample",
        setting("stages.film_one.batch", False),
        r"loops\.film\.plain='film_one': batch must be true",
    ),
    (
        "no stage at all",
        lambda d: row(d, "loops", "film").update(guided=None, plain=None),
        r"loops\[1\]: guided, plain: at least one stage",
    ),
    ("frames of two", setting("loops.film.frames", 2), r"loops\[1\]: frames=2: 1 or 'F'"),
    ("frames of true", setting("loops.film.frames", True), r"loops\[1\]\.frames=True: a whole number or a text"),
    (
        "an unknown prediction",
        setting("loops.film.prediction", "x0"),
        r"loops\[1\]: prediction='x0': one of v, epsilon,",
    ),
    ("no solver", setting("loops.film.solvers", []), r"loops\[1\]: solvers=\[\]: at least one, each once"),
    (
        "a solver twice",
        lambda d: row(d, "loops", "film")["solvers"].append(row(d, "loops", "film")["solvers"][0]),
        r"loops\[1\]: solvers=\['ddim', .*'ddim'\]: at least one, each once",
    ),
    (
        "a solver that does not fit the schedule",
        lambda d: row(d, "loops", "film")["schedule"].update(kind="edm"),
        r"loops\[1\]: kind 'edm': prediction='epsilon': one of 'v'",
    ),
    ("steps of zero", setting("loops.film.steps", 0), r"loops\[1\]: steps=0: from 1 to 100"),
    (
        "more steps than the solver has",
        lambda d: (row(d, "loops", "film")["solvers"].reverse(), put(d, "loops.film.steps", 21)),
        r"loops\[1\]: steps=21: from 1 to 20",
    ),
    (
        "guidance below 0",
        setting("loops.film.guidance", [1.0, -1.0]),
        r"loops\[1\]: guidance=\(1\.0, -1\.0\): a number from 0",
    ),
    ("no guidance", setting("loops.film.guidance", []), r"loops\[1\]: guidance=\(\): a number from 0, or a list"),
    ("least_frames of 0", setting("loops.film.least_frames", 0), r"loops\[1\]: least_frames=0: from 1"),
    (
        "a clip that no loop makes",
        setting("loops.film.least_frames", 4),
        r"loops: a clip of 2 frames needs a last loop with frames 'F' and least_frames <= 2",
    ),
    (
        "latents of a loop that was left out",
        lambda d: put(d, "loops.draft.least_frames", 3),
        r"loops: a clip of 1 frames needs a last loop|loops\.draft: is left out for clips of",
    ),
    (
        "a window that is never reached",
        setting("loops.film.windows", {"length": 4, "stride": 5}),
        r"windows: length=4, stride=5",
    ),
    ("a purpose below 0", setting("loops.film.noise.purpose", -1), r"noise: purpose=\[-1, 23\]: whole numbers from 0"),
    ("a purpose of a row's", setting("loops.film.noise.purpose", 2**32), r"noise: purpose=\[4294967296, 23\]"),
    (
        "a scale from a control that is not a number",
        setting("loops.film.noise.offset.scale", "control:shake"),
        r"loops\.film\.noise\.offset\.scale='control:shake': a number, or one of \['control:glow', 'control:push'\]",
    ),
    (
        "a strength above 1",
        setting("loops.film.start.strength", 1.5),
        r"loops\.film\.start\.strength=1\.5: a number from 0 to 1, or one of",
    ),
    (
        "a start from an unknown picture",
        setting("loops.film.start.control", "glow"),
        r"loops\.film\.start\.control='glow': the pictures and clips are \['sketch', 'footage'\]",
    ),
    (
        "a start from unknown latents",
        setting("loops.film.start.latents", "clip:footage"),
        r"loops\.film\.start\.latents: source clip:footage: STAGE\.OUTPUT or LOOP\.latents",
    ),
    (
        "a missing stand-in",
        setting("loops.draft.replaced.latents", "look.unseen"),
        r"loops\.draft\.replaced\.latents: source look\.unseen: look gives seen",
    ),
    (
        "a stand-in of another rank",
        setting("loops.draft.replaced.latents", "reader.words"),
        r"loops\.draft\.replaced\.latents: source reader\.words has 2 axes, not 5",
    ),
    (
        "a loop's own value for an unknown control",
        setting("loops.draft.controls", {"quake": 1.0}),
        r"loops\.draft\.controls\.quake: the controls with numbers are \['shake',",
    ),
    (
        "a loop's own text",
        setting("loops.draft.controls", {"shake": "much"}),
        r"loops\.draft\.controls\.shake='much': a number",
    ),
    (
        "a loop's own value outside the range",
        setting("loops.draft.controls", {"shake": 3}),
        r"loops\.draft\.controls\.shake=3: a number from -2 to 2",
    ),
    # Controls
    (
        "a default outside its range",
        setting("controls.grain.default", 10),
        r"controls\[3\]: default=10: a whole number from 0 to 9",
    ),
    (
        "a default below its range",
        setting("controls.shake.default", -2.5),
        r"controls\[0\]: default=-2\.5: a number from -2 to 2",
    ),
    (
        "a whole default of a half",
        setting("controls.grain.default", 2.5),
        r"controls\[3\]: default=2\.5: a whole number",
    ),
    (
        "an invalid default",
        setting("controls.glow.default", None),
        r"controls\[4\]: default=None: a number needs a default",
    ),
    ("a default of true", setting("controls.glow.default", True), r"controls\[4\]: default=True: a number from 0"),
    ("a default beyond float32", setting("controls.glow.default", 1e39), r"controls\[4\]: default=1e\+39: a number"),
    (
        "an unknown choice",
        setting("controls.mood.default", "loud"),
        r"controls\[5\]: default='loud': one of 'bright',",
    ),
    ("a choice without choices", setting("controls.mood.choices", []), r"controls\[5\]: choices=\[\]"),
    (
        "choices of a number",
        setting("controls.glow.choices", ["1"]),
        r"controls\[4\]: choices=\['1'\]: for a choice, and only for a choice",
    ),
    (
        "an encoding of a picture",
        setting("controls.sketch.encoding", "curve"),
        r"controls\[7\]: encoding='curve': for kind picture",
    ),
    (
        "no encoding of a number",
        setting("controls.glow.encoding", None),
        r"controls\[4\]: encoding=None: for kind number",
    ),
    (
        "an optional number",
        setting("controls.glow.optional", True),
        r"controls\[4\]: optional: only with the encoding sinusoid or similarity",
    ),
    (
        "an empty range",
        setting("controls.shake.low", 3.0),
        r"controls\[0\]: low=3\.0, high=2\.0: low must be at most high",
    ),
    (
        "a control named as an option",
        setting("controls.glow.name", "seed"),
        r"controls\[4\]: name='seed': a name that is not reserved",
    ),
    (
        "a control that is not a name",
        setting("controls.glow.name", "a-b"),
        r"controls\[4\]: name='a-b': a name that is not reserved",
    ),
    (
        "an unknown kind",
        setting("controls.glow.kind", "sound"),
        r"controls\[4\]\.kind='sound': one of 'number', 'whole',",
    ),
    # Sizes and text
    ("an invalid multiple", setting("sizes.multiple", 5), r"sizes: multiple=5: a multiple of factor=2"),
    ("a width beside it", setting("sizes.width", 10), r"sizes: width=10: a multiple of 4 of at most 4096"),
    (
        "frames out of order",
        setting("sizes.frames", [3, 2, 9]),
        r"sizes: frames=\[3, 2, 9\]: 1 <= fewest <= default <= most",
    ),
    ("two frames", setting("sizes.frames", [1, 2]), r"sizes\.frames=\[1, 2\]"),
    ("no chunk", setting("sizes.chunk", 0), r"sizes: chunk=0: a number of frames from 1"),
    ("a negative overlap", setting("sizes.overlap", -1), r"sizes: overlap=-1: a number of frames from 0"),
    ("no decoder", setting("sizes.decoder", "unpaint"), r"sizes\.decoder='unpaint': the stages are"),
    (
        "a decoder without latents",
        setting("sizes.decoder", "mixer"),
        r"sizes\.decoder='mixer': one input with the source state",
    ),
    (
        "a text of two tokens",
        setting("text.length", 2),
        r"text: length=2, pad_id=0: length with room for start, text and end",
    ),
    ("no text to read", setting("text", None), r"stages\.reader\.tokens: source text:prompt, but text is null"),
    # Keys and types
    ("a missing key", without("licence"), r"higen\.json: has no licence"),
    ("a row's missing key", without("loops.film.windows"), r"higen\.json\.loops\[1\]: has no windows"),
    ("a missing seal", without("seal"), r"higen\.json: has no seal"),
    (
        "an unknown key",
        setting("autor", "me"),
        r"higen\.json: 'autor': unknown key; known are format, version, seal, name,",
    ),
    (
        "a row's unknown key",
        setting("loops.film.spteps", 3),
        r"higen\.json\.loops\[1\]\.spteps: unknown key; known are name,",
    ),
    ("a name of a number", setting("name", 3), r"higen\.json\.name=3: a text is wanted"),
    ("a factor of true", setting("sizes.factor", True), r"higen\.json\.sizes\.factor=True: a whole number is wanted"),
    ("sizes in a list", setting("sizes", []), r"higen\.json\.sizes: an object is wanted, not \[\]"),
    ("prompts in a text", setting("prompts", "a"), r"higen\.json\.prompts='a'"),
    (
        "a beta of 10^400",
        setting("loops.film.schedule.beta_end", 10**400),
        r"beta_end=1000.*: a finite number is wanted",
    ),
    (
        "a beta of a half",
        setting("loops.film.schedule.beta_start", 0.5),
        r"loops\[1\]\.schedule: beta_start=0\.5, beta_end=0\.04",
    ),
    ("an invalid seal", setting("seal", 7), r"seal=7: 64 hexadecimal digits \(higen upgrade --reseal\)"),
    (
        "a graph that is not a file",
        setting("graphs", {"a.onnx": {"inputs": []}}),
        r"graphs: a\.onnx: graphs must have one row for each \.onnx file",
    ),
    ("files in a list", setting("files", []), r"higen\.json: files=\[\]: an object is wanted"),
    ("NaN", setting("architecture", {"a": [float("nan")]}), r"not valid JSON: nan is not a JSON number"),
    ("half a pair", setting("licence", "\ud800"), r"not valid JSON: .*surrogates not allowed"),
]


@pytest.mark.parametrize(("change", "message"), [w[1:] for w in WRONG], ids=[w[0] for w in WRONG])
def test_what_is_wrong_is_one_error_that_names_the_row(
    model: Path, change: Callable[[Document], object], message: str
) -> None:
    edit(model, change)
    with pytest.raises(ManifestError, match=message):
        Bundle.open(model)


def test_a_number_beyond_every_float_is_not_valid_json(model: Path) -> None:
    text = (model / MANIFEST).read_text()
    (model / MANIFEST).write_text(text.replace('"architecture": {}', '"architecture": {"a": 1e999}'))
    with pytest.raises(ManifestError, match=r"not valid JSON: inf is not a JSON number"):
        Bundle.open(model)


@pytest.mark.parametrize("key", ["version", "name", "beta_end", "low"])
def test_a_key_that_appears_twice_is_refused(model: Path, key: str) -> None:
    """Some readers would take the first value, others the last."""
    text = (model / MANIFEST).read_text()
    i = text.index(f'"{key}":')
    (model / MANIFEST).write_text(f'{text[:i]}"{key}": 1, {text[i:]}')
    with pytest.raises(ManifestError, match=f"not valid JSON: '{key}' appears twice"):
        Bundle.open(model)


@pytest.mark.parametrize(("levels", "good"), [(90, True), (110, False), (900, False), (100_000, False)])
def test_deep_nesting(model: Path, levels: int, good: bool) -> None:
    """A document that can be read can also be written."""
    text = (model / MANIFEST).read_text()
    nested = '{"a":' * levels + "1" + "}" * levels
    (model / MANIFEST).write_text(text.replace('"architecture": {}', f'"architecture": {nested}'))
    if good:
        rewrite(model, lambda opened: opened, sealed=False)
        assert Bundle.open(model)
    else:
        with pytest.raises(ManifestError, match=r"not valid JSON: (nested deeper|maximum recursion)"):
            Bundle.open(model)


def test_a_manifest_of_a_newer_version(model: Path) -> None:
    edit(model, setting("version", 3))
    with pytest.raises(ManifestError, match="version=3, but this higen reads up to 2: pip install --upgrade higen"):
        Bundle.open(model)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes here")
def test_a_named_pipe_does_not_hang(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / MANIFEST)
    with pytest.raises(ManifestError, match=r"higen\.json: is not a regular file"):
        Bundle.open(tmp_path)
    with pytest.raises(ManifestError, match=r"higen\.json: is not a regular file"):
        upgrade(tmp_path)


def test_a_folder_and_a_device_in_place_of_the_manifest(tmp_path: Path) -> None:
    (tmp_path / MANIFEST).symlink_to("/dev/zero")
    with pytest.raises(ManifestError, match=r"not a regular file"):
        Bundle.open(tmp_path)
    (tmp_path / MANIFEST).unlink()
    (tmp_path / MANIFEST).mkdir()
    with pytest.raises(ManifestError, match=r"not a regular file"):
        Bundle.open(tmp_path)


# A family that nobody has


def test_a_model_of_an_unknown_family_opens_and_runs(model: Path) -> None:
    """Runtimes do not need the family; the tables are sufficient."""
    opened = Bundle.open(model)
    assert opened.manifest.family == "nobody's"
    backend = RecordingBackend(opened.manifest)
    video = Pipeline(opened, backend)("a kite", progress=False)
    assert video.frames.shape == (5, 8, 12, 3)
    assert [name for name, _ in backend.calls].count("film_two") == 3


# The seal


def test_the_seal_is_the_sha256_of_the_file_with_zeros_in_its_place(model: Path) -> None:
    data = (model / MANIFEST).read_bytes()
    seal = json.loads(data)["seal"]
    assert hashlib.sha256(data.replace(seal.encode(), b"0" * 64)).hexdigest() == seal
    assert data.count(seal.encode()) == 1


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('"beta_end": 0.04', '"beta_end": 0.03'),
        ('"meaning": "a word"', '"meaning": "a ward"'),
        ('"purpose": 22', '"purpose": 24'),
        ('"steps": 3', '"steps":  3'),
        ("\n}\n", "\n}\n\n"),
    ],
    ids=["schedule", "meaning", "stream", "space", "end"],
)
def test_an_edit_is_refused_until_it_is_accepted(model: Path, old: str, new: str) -> None:
    text = (model / MANIFEST).read_text()
    assert old in text
    (model / MANIFEST).write_text(text.replace(old, new, 1))
    with pytest.raises(IntegrityError, match=rf"tables do not fit its seal.*higen upgrade --reseal {model}$"):
        Bundle.open(model)
    with pytest.raises(IntegrityError, match="do not fit its seal"):
        upgrade(model)
    with pytest.raises(IntegrityError, match="do not fit its seal"):
        rewrite(model, lambda opened: opened)
    assert upgrade(model, reseal=True).resealed
    changed = json.loads(text.replace(old, new, 1))
    assert {**json.loads((model / MANIFEST).read_text()), "seal": ""} == {**changed, "seal": ""}
    Bundle.open(model)


@pytest.mark.parametrize("seal", ["0" * 64, "f" * 64, "F" * 64, "", "x", None])
def test_another_seal(model: Path, seal: str | None) -> None:
    text = (model / MANIFEST).read_text()
    present = json.loads(text)["seal"]
    (model / MANIFEST).write_text(text.replace(f'"{present}"', json.dumps(seal)))
    with pytest.raises(ModelError, match=r"--reseal"):
        Bundle.open(model)
    assert upgrade(model, reseal=True).resealed
    assert json.loads((model / MANIFEST).read_text())["seal"] == present


def test_an_edit_that_is_wrong_is_not_accepted(model: Path) -> None:
    text = (model / MANIFEST).read_text().replace('"beta_end": 0.04', '"beta_end": 4')
    (model / MANIFEST).write_text(text)
    with pytest.raises(ManifestError, match="beta_end=4"):
        upgrade(model, reseal=True)
    assert (model / MANIFEST).read_text() == text


# Writing


def test_a_manifest_with_a_graph_that_it_does_not_describe_is_never_written(model: Path) -> None:
    before = (model / MANIFEST).read_bytes()
    record = FileRecord(1, "0" * 64)
    for files, graphs in (({"a.onnx": record}, {}), ({}, {"a.onnx": ()}), ({"a.bin": record}, {"a.bin": ()})):
        with pytest.raises(
            ManifestError,
            match=r"graphs: a\.\w+: graphs must have one row for each \.onnx file in files, and no other rows",
        ):
            write_manifest(model, MADE_UP, files, graphs)
    assert (model / MANIFEST).read_bytes() == before


REWRITING = """
import sys
from dataclasses import replace
from pathlib import Path
from higen.manifest_file import rewrite
def change(opened):
    return replace(opened, manifest=replace(opened.manifest, name="x" * (len(opened.manifest.name) % 5000 + 1)))
print("ready", flush=True)
while True:
    rewrite(Path(sys.argv[1]), change)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="SIGKILL")
def test_a_killed_writer_leaves_the_old_or_the_new_manifest(model: Path) -> None:
    generator = random.Random(0)
    for _ in range(6):
        writer = subprocess.Popen([sys.executable, "-c", REWRITING, str(model)], stdout=subprocess.PIPE)
        assert writer.stdout is not None
        assert writer.stdout.readline() == b"ready\n"
        time.sleep(generator.uniform(0.0, 0.1))
        writer.send_signal(signal.SIGKILL)
        writer.wait()
        writer.stdout.close()
        assert Bundle.open(model).manifest.loops == MADE_UP.loops
    rewrite(model, lambda opened: opened)  # no lock is left behind


# Fuzz


def places(document: Document) -> list[tuple[Any, Any]]:
    """The container and the key of every value in nested dictionaries and lists."""
    found: list[tuple[Any, Any]] = []
    open_: list[Any] = [document]
    while open_:
        place = open_.pop()
        keys = place.keys() if isinstance(place, dict) else range(len(place))
        found += [(place, key) for key in keys]
        open_ += [place[key] for key in keys if isinstance(place[key], (dict, list))]
    return found


def nested(levels: int) -> Any:
    value: Any = 1
    for _ in range(levels):
        value = [value]
    return value


ODD: tuple[Any, ...] = (
    *(
        None,
        True,
        False,
        0,
        1,
        -1,
        2,
        3,
        4,
        7,
        64,
        2**31,
        2**63,
        -(2**64),
        10**30,
        0.0,
        -0.0,
        0.5,
        1.5,
        1e-320,
        1e39,
        1e308,
    ),
    *("", "a", "state", "F", "B", "H", "text:prompt", "control:glow", "picture:sketch", "clip:footage", "noise:1"),
    *("draft.latents", "film.latents", "mixer.hints", "mixer@negative.hints", "reader.words", "draft", "reader"),
    *("\u0000", "\ud83d", "\U0001f40b", "é" * 300, "../x", "lcm", "heun", "flow", "edm", "cosine", "v", "karras"),
    *([], {}, [None], [[]], {"": None}, [1, 2, 3], ["B"], ["B", "C", "F", "H", "W"], nested(50), nested(300)),
)


def mutated(document: Document, generator: random.Random) -> Document:
    """The document with up to three values deleted, doubled, replaced, swapped or moved."""
    made: Document = json.loads(json.dumps(document))
    for _ in range(generator.choice((1, 1, 1, 2, 3))):
        place, last = generator.choice(places(made))
        kind = generator.randrange(6)
        if kind == 0:
            del place[last]
        elif kind == 1 and isinstance(place, list):
            place.insert(last, json.loads(json.dumps(place[last])))
        elif kind == 1:
            place[generator.choice(("extra", last + "x", ""))] = place[last]
        elif kind == 2:
            other, key = generator.choice(places(made))
            place[last] = json.loads(json.dumps(other[key]))
        elif kind == 3 and isinstance(place[last], (int, float)):
            place[last] = generator.choice((place[last] + 1, place[last] * 2, -place[last], place[last] / 2))
        elif kind == 4 and isinstance(place[last], list):
            generator.shuffle(place[last])
        else:
            place[last] = generator.choice(ODD)
    return made


def survives(folder: Path) -> bool:
    """Open a model directory and, if it opens, make a video. Returns whether it opened. Typed errors are accepted."""
    try:
        opened = Bundle.open(folder)
    except HigenError:
        return False
    manifest = opened.manifest
    if manifest.sizes.width * manifest.sizes.height > 64 * 64 or manifest.sizes.frames[1] > 12:
        return True
    if sum(manifest.fixed.values()) > 1000 or any(loop.steps > 50 for loop in manifest.loops):
        return True
    with contextlib.suppress(HigenError):
        Pipeline(opened, RecordingBackend(manifest))("a kite", progress=False, warn=lambda _: None)
    return True


@pytest.mark.parametrize("seed", range(4))
def test_a_mutated_manifest_is_a_model_or_a_typed_error(model: Path, seed: int) -> None:
    """500 mutations each. A model that still opens also makes a video or raises a typed error."""
    generator = random.Random(seed)
    document = json.loads((model / MANIFEST).read_text())
    opened = 0
    for _ in range(500):
        write(model, mutated(document, generator))
        opened += survives(model)
    assert 10 < opened < 490


def test_a_damaged_file_is_a_typed_error(model: Path) -> None:
    """Bytes flipped, cut out and doubled, without a new seal."""
    generator = random.Random(0)
    data = (model / MANIFEST).read_bytes()
    for _ in range(300):
        start = generator.randrange(len(data))
        end = min(start + generator.choice((1, 1, 3, 200)), len(data))
        middle = generator.choice(
            (b"", data[start:end] * 2, bytes(generator.randrange(256) for _ in range(end - start)))
        )
        if middle == data[start:end]:
            continue
        (model / MANIFEST).write_bytes(data[:start] + middle + data[end:])
        with pytest.raises(ModelError):
            Bundle.open(model)
