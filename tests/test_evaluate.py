"""`higen evaluate` on made-up emoji: an honest model passes every measure, and each cheat fails the right one."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import fields, make_dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from conftest import full_disk
from numpy.typing import NDArray

from higen.cli import main
from higen.errors import PromptWarning, SettingsError, TrainingError
from higen.locks import claimed
from higen.measures.statistics import frechet_distance
from higen.pipeline import Pipeline
from higen.train.emoji.evaluation import card
from higen.train.emoji.evaluation.evaluate import Result, evaluate
from higen.train.emoji.evaluation.figures import ColumnFigures, CueFigures, KnownCase, KnownFigures, Measures
from higen.train.emoji.evaluation.frechet import alike_draws
from higen.train.emoji.evaluation.journal import Journal
from higen.train.emoji.evaluation.judges import NOTHING, Judges, _Pictures
from higen.train.emoji.evaluation.plan import Row, Shot, plan
from higen.train.emoji.evaluation.real_clips import RealClips
from higen.train.emoji.evaluation.report import as_text, write
from higen.train.emoji.packs import background
from higen.train.emoji.subjects import BACKGROUNDS, KEY_INDEX, SUBJECTS, is_held_out, subjects_named
from higen.typed_json import from_json, to_json

Frames = NDArray[np.uint8]
SIDE, LOOP = 64, 48
SEEDS = 1
Change = Callable[[Frames, Shot], Frames]


def emoji(index: int) -> Frames:
    """A loop of a drawn shape: a beating disc, a turning bar, a swinging triangle, a see-saw of two discs."""
    y, x = (v / SIDE * 2 - 1 for v in np.mgrid[:SIDE, :SIDE].astype(float))
    frames = []
    for i in range(LOOP):
        turn = 2 * np.pi * i / LOOP
        if index == 0:
            inside, colour = 0.45 + 0.2 * np.sin(turn) - np.hypot(x, y), (220, 60, 60)
        elif index == 1:
            along, across = x * np.cos(turn / 2) + y * np.sin(turn / 2), y * np.cos(turn / 2) - x * np.sin(turn / 2)
            inside, colour = np.minimum(0.75 - abs(along), 0.2 - abs(across)), (60, 60, 220)
        elif index == 2:
            lean = x - 0.4 * np.sin(turn) * (y - 0.6)
            inside, colour = np.minimum(0.6 - y, (y + 0.7) / 2 - abs(lean)), (240, 200, 40)
        else:
            up = 0.35 * np.sin(turn)
            discs = (np.hypot(x - 0.35, y - up), np.hypot(x + 0.35, y + up))
            inside, colour = 0.3 - np.minimum(*discs), (120, 220, 120)
        alpha = np.clip(inside * SIDE / 2 + 0.5, 0, 1)
        frames.append(np.dstack([*(np.full_like(x, c) for c in colour), 255 * alpha]))
    return np.rint(np.stack(frames)).astype(np.uint8)


class Lossless:
    """A codec that only rearranges pixels into 8x8 latents."""

    def encode(self, clip: Frames) -> NDArray[np.float32]:
        blocks = clip.reshape(len(clip), 8, SIDE // 8, 8, SIDE // 8, 3).transpose(2, 4, 5, 0, 1, 3)
        latents: NDArray[np.float32] = blocks.reshape(-1, len(clip), 8, 8).astype(np.float32) / 127.5 - 1
        return latents

    def decode(self, latents: NDArray[np.float32]) -> Frames:
        frames = latents.shape[1]
        blocks = np.rint((latents + 1) * 127.5).reshape(SIDE // 8, SIDE // 8, 3, frames, 8, 8)
        clip: Frames = blocks.transpose(3, 4, 0, 5, 1, 2).reshape(frames, SIDE, SIDE, 3).astype(np.uint8)
        return clip


class Model:
    """Makes the next shot's real clip, as soft as a decoder's output and changed by a cheat."""

    def __init__(self, real: RealClips, shots: list[Shot], change: Change) -> None:
        self.real, self.shots, self.change = real, list(shots), change

    def __call__(self, prompt: str, seed: int, motion: float | None, appearance: float | None) -> Frames:
        shot = self.shots.pop(0)
        assert (prompt, seed) == (shot.prompt, shot.seed)
        assert (motion is not None) == (shot.kind == "motion")
        assert (appearance is not None) == (shot.kind == "appearance")
        clip = self.real.clip(shot.subject, shot.background, shot.factor).astype(float)
        soft = clip + 1.5 * np.sin(np.arange(SIDE) / 5 + seed)[:, None]
        return self.change(np.clip(np.rint(soft), 0, 255).astype(np.uint8), shot)


@pytest.fixture(scope="module")
def real() -> RealClips:
    return RealClips([emoji(i) for i in range(4)], [0, 6, 12, 3], [background(b.name, SIDE) for b in BACKGROUNDS])


@pytest.fixture(scope="module")
def judges(real: RealClips, tmp_path_factory: pytest.TempPathFactory) -> Judges:
    return Judges(real, tmp_path_factory.mktemp("judges"), steps=(50, 80))


@pytest.fixture(scope="module")
def run(real: RealClips, judges: Judges) -> Callable[..., Result]:
    def evaluated(change: Change, kinds: tuple[str, ...] = ("text", "still")) -> Result:
        shots = [shot for shot in plan(range(4), SEEDS) if shot.kind in kinds and shot.group == "held-out"]
        return evaluate(Model(real, shots, change), Lossless(), real, judges, shots)

    return evaluated


@pytest.fixture(scope="module")
def honest(run: Callable[..., Result]) -> Result:
    return run(lambda clip, shot: clip, ("text", "still", "motion", "appearance"))


def held_out(result: Result, column: str = "generated") -> ColumnFigures:
    found: ColumnFigures = getattr(result.measures.groups["held-out"], column)
    return found


def repeated(clip: Frames, shot: Shot) -> Frames:
    return np.repeat(clip[KEY_INDEX : KEY_INDEX + 1], len(clip), axis=0)


def speckled(clip: Frames, shot: Shot) -> Frames:
    """Coloured blobs over the repeated key frame, with a strength proportional to the requested motion."""
    noise = np.random.default_rng(shot.seed).normal(0, 12 * shot.factor, (len(clip), 16, 16, 3))
    return np.clip(repeated(clip, shot) + noise.repeat(4, 1).repeat(4, 2), 0, 255).astype(np.uint8)


# What is sampled


def test_the_plan_is_what_the_docstring_says() -> None:
    shots = plan(range(len(SUBJECTS)), 8)
    text = [s for s in shots if s.kind == "text" and s.group == "held-out"]
    assert len(text) == len(SUBJECTS) * (8 + 4)
    assert all(len({t.speed for t in text if t.subject == s}) == 3 for s in range(len(SUBJECTS)))
    assert {s.speed for s in text} == {0, 1, 2}
    assert all(is_held_out(s.subject, s.background) == (s.group == "held-out") for s in shots)
    assert {s.subject for s in text} == set(range(len(SUBJECTS)))
    assert len([s for s in shots if s.kind == "text" and s.group == "trained"]) == len(SUBJECTS) * (2 + 1)
    assert {s.requested for s in shots if s.kind == "motion"} == {0.0, 0.5, 1.0, 1.5, 2.0}
    assert [s.background for s in shots] == sorted(s.background for s in shots)
    assert len(set(shots)) == len(shots)
    assert len(plan(range(len(SUBJECTS)), 1, quick=True)) < len(shots) / 10


@pytest.mark.parametrize("seeds", [0, -3])
def test_less_than_one_seed_is_refused(seeds: int) -> None:
    with pytest.raises(SettingsError, match=f"seeds={seeds}: a whole number from 1"):
        plan([0], seeds)


def test_a_models_subjects_are_those_its_prompts_name() -> None:
    assert subjects_named([f"{SUBJECTS[5].caption} on a blue sky", "something else"]) == (5,)
    with pytest.raises(SettingsError, match="only its models"):
        subjects_named(["a cat on a mat"])


# An honest model


def test_a_correct_model_passes_every_measure(honest: Result) -> None:
    found = held_out(honest)
    assert found.identity >= 0.95
    assert found.template == found.background == found.beats_copy == found.beats_mean == 1
    assert found.template_relative > 0.98
    assert found.psnr > 35 > 30 > found.psnr_copy
    assert found.speckle < 1
    assert found.flicker == 0
    assert found.motion_ratio == pytest.approx(1, abs=0.05)
    assert found.still == 0
    control = honest.measures.control
    assert control["motion"].spearman > 0.95
    assert control["motion"].spearman_moving > 0.9
    assert control["appearance"].spearman > 0.85
    assert control["motion"].zero_part == 0
    frechet = honest.measures.groups["held-out"].frechet
    assert frechet.ratio < 3
    assert frechet.floor > 0
    assert frechet.alike.real == pytest.approx(frechet.alike.floor, rel=0.5)
    assert frechet.asked.codec == 0
    assert frechet.asked.generated < frechet.alike.floor


def test_paired_sets_have_the_requested_composition_and_share_no_clip() -> None:
    asked = [(0, 7, 1.0)] * 8 + [(0, 7, 2.0)] * 4 + [(1, 4, 1.0)] * 3
    first, second = alike_draws(asked, 10, np.random.default_rng(0))
    assert not set(first) & set(second)
    for draw in (first, second):
        assert [(s, speed) for s, _, speed, _ in draw] == [(s, speed) for s, _, speed in asked]
        assert len({(s, b, speed) for s, b, speed, _ in draw}) == 3  # one background per subject and speed
        assert len(set(draw[8:12])) == 4  # no offset is repeated before all were used
        assert {abs(offset) for *_, offset in draw} <= {0, 1, 2, 3}


def test_real_clips_are_the_bound_and_a_lossless_codec_loses_nothing(honest: Result) -> None:
    assert held_out(honest, "codec") == held_out(honest, "real")
    found = held_out(honest, "real")
    assert found.psnr == 100
    assert found.template == found.background == found.beats_copy == found.sharpness == 1
    assert found.speckle == found.flicker == 0
    assert found.psnr_copy == found.psnr_real_copy


def test_a_lossless_codec_follows_every_motion_number(honest: Result) -> None:
    control = honest.measures.control["motion"]
    assert control.codec == pytest.approx(1)
    assert control.codec_pooled == pytest.approx(1)


def test_the_same_seeds_give_the_same_numbers(honest: Result, run: Callable[..., Result]) -> None:
    again = run(lambda clip, shot: clip)
    assert again.measures.groups == honest.measures.groups


# Cheats


def test_a_repeated_key_frame_is_detected(run: Callable[..., Result]) -> None:
    found = held_out(run(repeated))
    assert found.identity >= 0.95  # the subject is right
    assert found.template == found.background == 1
    assert found.beats_copy == found.beats_mean == 0
    assert found.motion_ratio == 0


def test_coloured_speckle_that_follows_the_motion_factor_is_detected(run: Callable[..., Result]) -> None:
    result = run(speckled, ("text", "motion"))
    assert result.measures.control["motion"].spearman > 0.9  # so this measure is worthless without the others
    found, bound = held_out(result), held_out(result, "codec")
    assert found.speckle > 3 + bound.speckle
    assert found.flicker > 3 + bound.flicker
    assert found.beats_mean == 0


def test_another_subject_is_detected(run: Callable[..., Result], real: RealClips) -> None:
    result = run(lambda clip, shot: real.clip((shot.subject + 1) % 4, shot.background, shot.factor))
    found = held_out(result)
    assert found.identity <= 0.05
    assert found.template == 0
    assert found.background == 1


def test_another_background_is_detected(run: Callable[..., Result], real: RealClips) -> None:
    result = run(lambda clip, shot: real.clip(shot.subject, (shot.background + 1) % 10, shot.factor))
    assert held_out(result).background == 0
    assert held_out(result).identity >= 0.9


def test_a_missing_subject_is_detected(run: Callable[..., Result], real: RealClips, judges: Judges) -> None:
    def empty(clip: Frames, shot: Shot) -> Frames:
        return np.repeat(real.pictures[shot.background][None], len(clip), axis=0)

    found = held_out(run(empty))
    assert found.template == 0
    assert found.identity < 0.3
    assert judges.subject(np.repeat(real.pictures[0][None], 16, axis=0)) == NOTHING


def test_frames_in_another_order_are_detected(run: Callable[..., Result]) -> None:
    order = np.random.default_rng(0).permutation(16)
    found = held_out(run(lambda clip, shot: clip[order]))
    assert found.identity >= 0.95
    assert found.beats_mean < 0.5


@pytest.fixture(scope="module")
def distance(real: RealClips, judges: Judges) -> Callable[[Change], float]:
    """Frechet distance of changed real clips from other real clips, divided by that of the unchanged clips."""
    random = np.random.default_rng(0)
    shots = [
        Shot("trained", "motion", s, b, requested=float(random.choice([0.5, 1.0, 2.0])), seed=b)
        for s in range(4)
        for b in range(10)
    ]
    clips = [real.clip(shot.subject, shot.background, shot.factor, random.integers(-3, 4)) for shot in shots]
    others = judges.real_features(
        [
            (s, b, float(random.choice([0.5, 1.0, 2.0])), int(random.integers(-3, 4)))
            for s in range(4)
            for b in range(10)
        ]
    )
    floor = frechet_distance(judges.features(clips), others)

    def over_the_floor(change: Change) -> float:
        changed = [change(clip, shot) for clip, shot in zip(clips, shots, strict=True)]
        return frechet_distance(judges.features(changed), others) / floor

    return over_the_floor


def test_the_frechet_distance_sees_what_other_measures_miss(distance: Callable[[Change], float]) -> None:
    order = np.random.default_rng(0).permutation(16)
    assert distance(lambda clip, shot: clip[order]) > 1.3
    assert distance(repeated) > 1.3
    assert distance(speckled) > 2
    assert distance(lambda clip, shot: clip // 2) > 2
    assert distance(lambda clip, shot: clip) == 1


def test_features_of_real_clips_are_the_same_by_either_way(real: RealClips, judges: Judges) -> None:
    conditions = [(1, 3, 1.0, 2), (2, 0, 0.5, -1)]
    one = judges.features([real.clip(*condition) for condition in conditions])
    np.testing.assert_allclose(one, judges.real_features(conditions), atol=0.05 * np.abs(one).max())


def test_a_model_that_only_knows_when_to_stand_still_is_detected(run: Callable[..., Result], real: RealClips) -> None:
    order = {0.5: 2.0, 1.0: 1.0, 1.5: 0.5, 2.0: 1.5}  # no correct order: rank correlation 0 or below

    def obeys_zero(clip: Frames, shot: Shot) -> Frames:
        return real.clip(shot.subject, shot.background, order.get(shot.factor, 0.0))

    motion = run(obeys_zero, ("text", "motion")).measures.control["motion"]
    assert 0.2 < motion.spearman < 0.6
    assert motion.spearman_moving < 0.1


def test_a_model_that_moves_when_it_should_stand_still_is_detected(run: Callable[..., Result], real: RealClips) -> None:
    def restless(clip: Frames, shot: Shot) -> Frames:
        return real.clip(shot.subject, shot.background, 1.0)

    result = run(restless, ("text", "still", "motion"))
    assert held_out(result).still > 0.5
    assert result.measures.control["motion"].spearman == 0
    assert result.measures.control["motion"].zero_part == pytest.approx(1, abs=0.1)


# Sources and outputs


def test_a_word_the_model_does_not_know_stops_it(real: RealClips, judges: Judges) -> None:
    shots = plan([0], 1)[:1]

    def make(prompt: str, seed: int, motion: float | None, appearance: float | None) -> Frames:
        import warnings

        warnings.warn("unknown: whale", PromptWarning, stacklevel=1)
        raise AssertionError

    with pytest.raises(TrainingError, match="does not know what it should draw: unknown: whale"):
        evaluate(make, Lossless(), real, judges, shots)


def test_a_stopped_run_continues(real: RealClips, judges: Judges, tmp_path: Path) -> None:
    shots = [Shot("held-out", "text", s, 0, 2, seed) for s in range(3) for seed in range(2)]
    made: list[str] = []

    class Stopping(Model):
        left = 4

        def __call__(self, *request: Any) -> Frames:
            if not self.left:
                raise KeyboardInterrupt
            self.left -= 1
            made.append(request[0])
            return super().__call__(*request)

    whole = evaluate(Model(real, shots, repeated), Lossless(), real, judges, shots)
    with pytest.raises(KeyboardInterrupt):
        evaluate(
            Stopping(real, shots, repeated), Lossless(), real, judges, shots, journal=Journal(tmp_path / "clips", {})
        )
    with (tmp_path / "clips").open("a") as file:
        file.write('[{"group": "held-')  # a line cut off by a crash
    rest = shots[4:]
    journal = Journal(tmp_path / "clips", {})
    again = evaluate(Model(real, rest, repeated), Lossless(), real, judges, shots, journal=journal)
    assert again.rows == whole.rows
    assert again.measures == whole.measures
    assert len(made) == 4
    assert all(Journal(tmp_path / "clips", {}).find(shot) is not None for shot in shots)
    assert all(Journal(tmp_path / "clips", {"model": "another"}).find(shot) is None for shot in shots)


def test_rows_of_other_measures_are_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shot, path = Shot("held-out", "text", 0, 0), tmp_path / "clips"
    row = Row(**dict.fromkeys(Row.__dataclass_fields__, 0.0))  # type: ignore[arg-type]
    fewer = make_dataclass("Row", list(Row.__dataclass_fields__)[1:])
    with monkeypatch.context() as other:
        other.setattr("higen.train.emoji.evaluation.journal.Row", fewer)
        Journal(path, {}).add(shot, fewer(*range(len(fewer.__dataclass_fields__))), np.zeros(2))
        assert Journal(path, {}).find(shot) is not None
    journal = Journal(path, {})
    assert journal.find(shot) is None
    journal.add(shot, row, np.zeros(2))
    found = Journal(path, {}).find(shot)
    assert found is not None
    assert found[0] == row
    monkeypatch.setattr("higen.train.emoji.evaluation.journal.MEASURES_VERSION", -1)
    assert Journal(path, {}).find(shot) is None


def test_the_judges_depend_on_the_data_and_not_on_the_threads(real: RealClips) -> None:
    threads, found = torch.get_num_threads(), []
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            found.append(_Pictures(real).fingerprint)
    finally:
        torch.set_num_threads(threads)
    assert found[0] == found[1] == found[2]
    assert all(isinstance(total, int) for total in found[0][:-1])  # exact sums


def test_the_judges_are_kept(real: RealClips, judges: Judges, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = Judges(real, tmp_path, steps=(2, 1))
    monkeypatch.setattr("higen.train.emoji.evaluation.judges.fit", None)  # training would fail
    again = Judges(real, tmp_path, steps=(2, 1))
    clips = [real.clip(0, 0, 1.0)]
    np.testing.assert_array_equal(first.features(clips), again.features(clips))
    with pytest.raises(TypeError):
        Judges(RealClips(real.loops[::-1], real.key_frames, real.pictures), tmp_path, steps=(2, 1))


def test_it_writes_the_measures_and_the_sheets(honest: Result, real: RealClips, tmp_path: Path) -> None:
    shots = list(honest.shots)
    write(honest, real, lambda prompt, *_: real.clip(0, 0, 1.0), tmp_path / "new")
    assert sorted(p.name for p in (tmp_path / "new").iterdir()) == [
        "measures.json",
        "per_subject.json",
        "sheet.png",
        "worst.png",
    ]
    measures = json.loads((tmp_path / "new" / "measures.json").read_text())
    assert measures["groups"]["held-out"]["clips"] == 4 * 2
    assert set(measures["control"]["motion"]) == {field.name for field in fields(CueFigures)}
    assert "zero" not in measures["control"]["appearance"]
    assert from_json(Measures, measures) == replace(honest.measures, subjects={})
    per_subject = json.loads((tmp_path / "new" / "per_subject.json").read_text())
    assert set(per_subject) == {SUBJECTS[i].name for i in range(4)}
    assert per_subject["whale"]["motion_spearman"] > 0.9
    text = as_text(honest.measures)
    assert "held-out combinations, 8 clips" in text
    assert "Spearman" in text
    assert shots == honest.shots


def test_the_card_has_a_column_for_each_preset(honest: Result, tmp_path: Path) -> None:
    one = honest.measures
    alone, both = card.table({"": one}).splitlines(), card.table({"fast": one, "full": one}).splitlines()
    groups = list(one.groups)
    assert alone[0] == f"| | {' | '.join(groups)} | codec | real |"
    assert (
        both[0]
        == f"| | {' | '.join(f'{group}, `{name}`' for name in ('fast', 'full') for group in groups)} | codec | real |"
    )
    assert {line.count("|") for line in both} == {2 * len(groups) + 4}
    assert len(alone) == len(both)
    found = card.control({"fast": one, "full": one})
    assert "| | `fast` | `full` | codec |" in found
    value = f"{one.control['motion'].spearman:.2f}"
    assert f"| motion factor, within a subject | {value} | {value} | " in found
    (tmp_path / "m.json").write_text(json.dumps(to_json(replace(one, subjects={}))), encoding="utf-8")
    assert card.named(f"fast={tmp_path / 'm.json'}")[0] == "fast"
    assert card.named(str(tmp_path / "m.json")) == ("", replace(one, subjects={}))


def test_the_card_names_the_best_baseline_of_known_frames() -> None:
    values = {"model": 24.0, "text": 21.0, "held": 22.5, "codec": 30.0}
    row = KnownCase(
        clips=1, psnr=values, inside=values, gain=1.5, inside_gain=1.5, given=30, given_codec=30, motion=0.9, seam=1
    )
    figures = KnownFigures(ends={"normal": row}, second={}, prefix={"fast": row}, end=1.0, subjects=1)
    lines = card.known_frames(figures).splitlines()
    assert lines[2] == "| ends | normal | 24.0 dB | 22.5 dB, held | 30.0 dB | 24.0 dB | 22.5 dB, held | 0.90 |"
    assert [line.split("|")[1].strip() for line in lines[2:]] == ["ends", "prefix"]


def cli(*arguments: str | Path) -> Any:
    return CliRunner().invoke(main, ["evaluate", *map(str, arguments)], catch_exceptions=False)


@pytest.fixture
def stand_ins(real: RealClips, judges: Judges, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that makes the real clips replaces the built-in one. The rest is the command's own code."""
    shots = [shot for shot in plan([0, 1], 1) if shot.kind in ("text", "motion") and shot.group == "held-out"]
    again = [shot for shot in shots if shot.kind == "text"]  # at most twelve worst clips, two per subject
    made = Model(real, shots, lambda clip, shot: clip)

    class Maker(Lossless):
        def __init__(self, pipeline: Pipeline, options: dict[str, str]) -> None:
            assert pipeline.manifest.name
            assert options in ({}, {"preset": "fast"})

        def __call__(self, *request: Any) -> Frames:
            return made(*request) if made.shots else real.clip(again[0].subject, 0, 1.0)

    module = "higen.train.emoji.evaluation.command"
    monkeypatch.setattr(f"{module}.fetch", lambda folder, download: None)
    monkeypatch.setattr(f"{module}.plan", lambda subjects, seeds, quick: shots)
    monkeypatch.setattr(f"{module}.Judges", lambda *given, **options: judges)
    monkeypatch.setattr(f"{module}.known_measures.PipelineThrough", Maker)
    monkeypatch.setattr(RealClips, "read", lambda folder: real)


@pytest.mark.usefixtures("stand_ins")
def test_the_command_prints_and_writes_what_it_measured(tmp_path: Path) -> None:
    options = ("--seeds", "1", "--precision", "fp32", "--preset", "fast", "--json")
    result = cli("--data", tmp_path, "--output", tmp_path / "out", *options)
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["model"]["preset"] == "fast"
    assert found["groups"]["held-out"]["generated"]["beats_copy"] == 1
    assert found["model"]["seeds"] == 1
    assert found["model"]["precision"] == "fp32"
    assert "unet.safetensors" in found["model"]["files"]
    written = json.loads((tmp_path / "out" / "measures.json").read_text())
    assert written == {key: value for key, value in found.items() if key != "subjects"}
    assert (tmp_path / "out" / "worst.png").exists()
    assert np.float32(1e-40) * np.float32(1.0) > 0, "denormal numbers are flushed inside only"


@pytest.mark.usefixtures("stand_ins")
@pytest.mark.parametrize(("room", "there"), [(100, "clips.jsonl"), (40_000, "sheet.png")])
def test_a_full_disk_is_one_error(tmp_path: Path, room: int, there: str) -> None:
    """The disk fills while clips are measured, or while the sheets are drawn."""
    with full_disk(room):
        result = cli("--data", tmp_path, "--output", tmp_path / "out", "--seeds", "1")
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr == f"OutputError: {tmp_path / 'out'}: cannot be written: File too large\n"
    assert (tmp_path / "out" / there).exists()
    assert not (tmp_path / "out" / "worst.png").exists()


def test_a_folder_has_one_evaluation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("higen.train.emoji.evaluation.command.fetch", None)  # this is never called
    with claimed(tmp_path / "out"):
        result = cli("--data", tmp_path / "data", "--output", tmp_path / "out")
    assert result.exit_code == 1
    assert result.stderr == f"TrainingError: {tmp_path / 'out'}: another process is evaluating there\n"


def test_a_model_of_another_kind_is_refused_before_any_work(tiny_model: Path, tmp_path: Path) -> None:
    result = cli(tiny_model, "--data", tmp_path / "data", "--output", tmp_path / "out", "--json")
    assert result.exit_code == 2
    assert json.loads(result.stdout)["error"] == "SettingsError"
    assert not list(tmp_path.iterdir())


def test_wrong_arguments_are_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = ("--data", tmp_path / "data", "--output", tmp_path / "out")
    result = cli(*options, "--precision", "int9")
    assert result.exit_code == 2
    assert "precision='int9': one of 'fp32'" in result.stderr
    result = cli(*options, "--preset", "slow")
    assert result.exit_code == 2
    assert re.search(r"preset='slow': the presets of .* are 'fast', 'full'", result.stderr)
    result = cli(*options, "--seeds", "0")
    assert result.exit_code == 2
    assert "seeds=0: a whole number from 1" in result.stderr
    result = cli(tmp_path / "nothing", *options)
    assert result.exit_code == 2
    (tmp_path / "file").write_text("")
    result = cli("--data", tmp_path / "data", "--output", tmp_path / "file")
    assert result.exit_code == 2
    assert "no folder can be made" in result.stderr
    result = cli(*options)
    assert result.exit_code == 1
    assert re.fullmatch(r"TrainingError: .*: the emoji are not there, .*4 npm .*700 MB.*--fetch` .*\n", result.stderr)
    assert not (tmp_path / "data").exists()
    monkeypatch.setenv("PATH", "")  # no npm
    result = cli(*options, "--fetch")
    assert result.exit_code == 1
    assert "npm is not installed" in result.stderr
    assert result.stderr.count("\n") == 1


def test_a_shot_knows_its_prompt_and_its_real_clip() -> None:
    shot = Shot("held-out", "text", 0, 7, speed=2)
    assert shot.prompt == "a whale flapping its tail in the snow, fast"
    assert shot.factor == 2
    assert replace(shot, kind="motion", requested=0.5).factor == 0.5
