"""The ablation's variants: each network gets the right cues, and nothing else differs."""

from __future__ import annotations

import json
import shutil
from contextlib import nullcontext
from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import TINY
from safetensors.torch import save_file

from higen.backends.base import RecordingBackend
from higen.bundle import Bundle
from higen.errors import SettingsError
from higen.families.higen.cues import appearance_cue
from higen.train.checkpoints import Checkpoints
from higen.train.emoji import ablation, autoencoder
from higen.train.emoji.ablation import LIVELY, NETWORK, VARIANTS, OneStage, fit, measure, table
from higen.train.emoji.clips import Clips, Pictured, Selection
from higen.train.emoji.configuration import recipe
from higen.train.emoji.denoiser import make_loop, networks_of
from higen.train.emoji.evaluation.evaluate import Result
from higen.train.emoji.evaluation.figures import ColumnFigures, CueFigures, FrechetFigures, GroupFigures, Measures
from higen.train.emoji.subjects import FRAMES, SUBJECTS
from higen.train.settings import Settings
from higen.typed_json import to_json

TWO = (0, 3)


@pytest.fixture(scope="module")
def latents(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache of two subjects only."""
    random, path = torch.Generator().manual_seed(0), tmp_path_factory.mktemp("state") / "latents.safetensors"
    loops = {f"latents/{SUBJECTS[s].name}": torch.randn((10, 72, 32, 8, 8), generator=random).half() for s in TWO}
    save_file(loops, path)
    return path


def settings(**changes: Any) -> Settings:
    """The recipe's settings with some of [run] changed."""
    return replace(recipe(), run=replace(recipe().run, **changes))


def window(latents: Path, **given: bool) -> Pictured:
    return Clips(latents, NETWORK, Selection(TWO, **given)).windows(torch.Generator().manual_seed(5), 0.9)


def test_variants_have_six_moving_subjects_and_differ_in_one_switch() -> None:
    assert len(LIVELY) == 6
    assert [v.prior + v.motion + v.appearance for v in VARIANTS] == [3, 2, 2, 2]


def test_variants_see_the_same_clips_and_only_their_cue_is_missing(latents: Path) -> None:
    everything = window(latents)
    for given in ("motion", "appearance"):
        without = window(latents, **{given: False})
        pairs = zip(without.captions, everything.captions, strict=True)
        # A given cue may replace the words for the speed, which come last.
        assert all(a.startswith(b) for a, b in pairs)
        for name in ("x0", "prior", *({"motion", "appearance"} - {given})):
            assert torch.equal(getattr(without, name), getattr(everything, name))
        assert not torch.equal(getattr(without, given), getattr(everything, given))
    assert not window(latents, motion=False).motion.any()
    place = torch.from_numpy(appearance_cue(None, FRAMES, NETWORK.appearance_columns))
    rows = window(latents, appearance=False).appearance.flatten(0, 1)
    assert all(any(torch.equal(row, wanted) for wanted in place) for row in rows)


def test_a_network_without_preconditioning_never_sees_the_prior(
    latents: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    network = replace(NETWORK, channel_multipliers=(1, 1), prior_preconditioning=False)
    clips = Clips(latents, network, Selection(TWO), settings(steps=2))
    loop, windows = make_loop(networks_of(network, 0), clips, Checkpoints(tmp_path, 1)), clips.windows
    poisoned = lambda *given: replace(windows(*given), prior=torch.full_like(windows(*given).prior, torch.nan))  # noqa: E731
    monkeypatch.setattr(clips, "windows", poisoned)
    assert all(value.isfinite() for value in loop.advance().values())
    assert all(p.isfinite().all() for p in loop.optimiser.parameters.values())


def test_one_stage_draws_no_key_frame(preconditioned_model: Path) -> None:
    bundle = Bundle.open(preconditioned_model)
    backend = RecordingBackend(bundle.manifest)
    OneStage(bundle, backend)("a blue whale", steps=(1, 5), guidance=(1.0, 4.0), progress=False)
    stages = [stage for stage, _ in backend.calls]
    assert stages.count("temporal_unet") == 5
    assert "spatial_unet" not in stages
    height, width = TINY.defaults.height // 2, TINY.defaults.width // 2
    assert dict(backend.calls)["temporal_unet"]["prior"] == (1, 4, height, width)


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of the recipe with an untrained codec."""
    folder, random = tmp_path_factory.mktemp("work"), torch.Generator().manual_seed(0)
    loops = {f"latents/{SUBJECTS[s].name}": torch.randn((10, 72, 32, 8, 8), generator=random).half() for s in LIVELY}
    save_file({**loops, "mean": torch.zeros(32), "std": torch.ones(32)}, folder / "latents.safetensors")
    save_file(autoencoder.build().state_dict(), folder / "autoencoder.safetensors")
    (folder / "autoencoder.json").write_text(json.dumps(vars(autoencoder.CodecConfig())))
    return folder


def test_a_variant_that_was_trained_another_way_is_refused(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ablation, "NETWORK", replace(NETWORK, channel_multipliers=(1, 1)))
    model = fit(VARIANTS[0], work, settings(steps=1))
    one = Bundle.open(model).files
    assert Bundle.open(fit(VARIANTS[0], work, settings(steps=1))).files == one
    for other, found in (
        (settings(steps=2), "run.steps was 1 and is now 2"),
        (settings(steps=1, precision="bf16"), "run.precision"),
    ):
        with pytest.raises(SettingsError, match=found):
            fit(VARIANTS[0], work, other)
    shutil.rmtree(model.parent / "checkpoints")  # the remedy that the error names
    assert Bundle.open(fit(VARIANTS[0], work, settings(steps=2))).files["unet.safetensors"] != one["unet.safetensors"]


def test_measures_are_kept_for_the_weights_and_the_seeds(
    tiny_model: Path, preconditioned_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = []

    def evaluated(*given: Any, **_: Any) -> Result:
        made.append(len(given[4]))
        return Result([], [], Measures(groups={}, control={}), [])

    monkeypatch.setattr(ablation, "load", lambda *_: nullcontext())
    monkeypatch.setattr(ablation, "evaluate", evaluated)
    monkeypatch.setattr(
        ablation,
        "write",
        lambda result, *given: (given[-1] / "measures.json").write_text(json.dumps(to_json(result.measures))),
    )
    monkeypatch.setattr(ablation, "as_text", str)
    model, judges = tmp_path / "model", SimpleNamespace(key={"version": 1, "steps": (1, 2)})

    def count(seeds: int) -> int:
        found = measure(VARIANTS[0], model, None, judges, seeds)  # type: ignore[arg-type]
        assert found.model["seeds"] == seeds
        return len(made)

    shutil.copytree(tiny_model, model)
    assert [count(2), count(2), count(4), count(4)] == [1, 1, 2, 2]
    assert made[0] < made[1]
    shutil.rmtree(model)
    shutil.copytree(preconditioned_model, model)
    assert [count(4), count(4)] == [3, 3]
    judges.key["version"] = 2
    assert count(4) == 4


def test_the_table_has_a_column_for_each_variant() -> None:
    def all_fields(kind: type[Any], value: float, **others: Any) -> Any:
        return kind(**{field.name: value for field in fields(kind)} | others)

    def measures(value: float) -> Measures:
        cue = all_fields(CueFigures, value, codec=1.0, codec_pooled=1.0, zero_part=0.05)
        group = GroupFigures(
            clips=1,
            generated=all_fields(ColumnFigures, value),
            codec=all_fields(ColumnFigures, 1.0),
            real=all_fields(ColumnFigures, 1.0),
            by_speed={},
            frechet=all_fields(FrechetFigures, 0.0),
        )
        return Measures(groups={"held-out": group}, control={"motion": cue, "appearance": cue})

    text = table({"everything": measures(0.5), "no prior": measures(0.25)})
    lines = text.splitlines()
    assert lines[0] == "| held-out combinations | everything | no prior | codec's bound |"
    assert len({line.count("|") for line in lines}) == 1
    assert "| subject right, by a classifier | 50% | 25% | 100% |" in lines
    assert "| Spearman, motion factor, over all clips | 0.50 | 0.25 | 1.00 |" in lines
