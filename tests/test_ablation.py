"""The ablation's variants: what each network is given, and that nothing else differs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY
from safetensors.torch import save_file

from higen.backends.base import RecordingBackend
from higen.bundle import Bundle
from higen.conditioning import appearance_cue
from higen.train.recipes.default.ablation import LIVELY, NETWORK, VARIANTS, OneStage, table
from higen.train.recipes.default.clips import Batch, Clips, Selection
from higen.train.recipes.default.denoiser import Run, Trainer
from higen.train.recipes.default.subjects import FRAMES, SUBJECTS

TWO = (0, 3)


@pytest.fixture(scope="module")
def latents(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache of two subjects only."""
    random, path = torch.Generator().manual_seed(0), tmp_path_factory.mktemp("state") / "latents.safetensors"
    loops = {f"latents/{SUBJECTS[s].name}": torch.randn((10, 72, 32, 8, 8), generator=random).half() for s in TWO}
    save_file(loops, path)
    return path


def window(latents: Path, **given: bool) -> Batch:
    return Clips(latents, NETWORK, Selection(TWO, **given)).windows(torch.Generator().manual_seed(5), 0.9)


def test_six_lively_subjects_and_one_switch_each() -> None:
    assert len(LIVELY) == 6
    assert [v.prior + v.motion + v.appearance for v in VARIANTS] == [3, 2, 2, 2]


def test_variants_see_the_same_clips_and_only_their_cue_is_missing(latents: Path) -> None:
    everything = window(latents)
    for given in ("motion", "appearance"):
        without = window(latents, **{given: False})
        pairs = zip(without.captions, everything.captions, strict=True)
        # A motion cue may stand in for the words that name the speed, which are last.
        assert all(a == b or (given == "motion" and a.startswith(b)) for a, b in pairs)
        for name in ("x0", "prior", *({"motion", "appearance"} - {given})):
            assert torch.equal(getattr(without, name), getattr(everything, name))
        assert not torch.equal(getattr(without, given), getattr(everything, given))
    assert not window(latents, motion=False).motion.any()
    place = torch.from_numpy(appearance_cue(None, FRAMES, NETWORK.appearance_columns))
    rows = window(latents, appearance=False).appearance.flatten(0, 1)
    assert all(any(torch.equal(row, wanted) for wanted in place) for row in rows)


def test_a_network_without_preconditioning_never_sees_the_prior(latents: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    network = replace(NETWORK, channel_multipliers=(1, 1), prior_preconditioning=False)
    clips = Clips(latents, network, Selection(TWO))
    trainer, windows = Trainer(clips, Run(steps=2)), clips.windows
    poisoned = lambda *given: replace(windows(*given), prior=torch.full_like(windows(*given).prior, torch.nan))  # noqa: E731
    monkeypatch.setattr(clips, "windows", poisoned)
    assert all(np.isfinite(loss) for loss in trainer.advance())
    assert all(p.isfinite().all() for p in trainer.networks.parameters())


def test_one_stage_draws_no_key_frame(preconditioned_model: Path) -> None:
    bundle = Bundle.open(preconditioned_model)
    backend = RecordingBackend(bundle.config)
    OneStage(bundle, backend)("a blue whale", steps=(1, 5), guidance=(1.0, 4.0), progress=False)
    stages = [stage for stage, _ in backend.calls]
    assert stages.count("temporal_unet") == 5
    assert "spatial_unet" not in stages
    height, width = TINY.defaults.height // 2, TINY.defaults.width // 2
    assert dict(backend.calls)["temporal_unet"]["prior"] == (1, 4, height, width)


def test_the_table_has_a_column_for_each_variant() -> None:
    keys = ("identity", "template", "background", "psnr", "psnr_copy", "beats_copy", "beats_mean", "motion_ratio",
            "flicker", "speckle", "still")  # fmt: skip

    def measures(value: float) -> dict[str, object]:
        frechet = {"generated": 4 * value, "codec": 2.0, "real": 1.0, "floor": 1.0, "ratio": 4 * value}
        cue = {"spearman": value, "spearman_pooled": value, "codec": 1.0, "codec_pooled": 1.0, "zero_part": 0.05}
        control = dict.fromkeys(("motion", "appearance"), cue)
        group = {"generated": dict.fromkeys(keys, value), "codec": dict.fromkeys(keys, 1.0), "frechet": frechet}
        return {"groups": {"held-out": group}, "control": control}

    text = table({"everything": measures(0.5), "no prior": measures(0.25)})
    lines = text.splitlines()
    assert lines[0] == "| held-out combinations | everything | no prior | codec's bound |"
    assert len({line.count("|") for line in lines}) == 1
    assert "| subject right, by a classifier | 50% | 25% | 100% |" in lines
    assert "| Spearman, motion factor, over all clips | 0.50 | 0.25 | 1.00 |" in lines
    assert "| Frechet distance over real against real | 2.0 | 1.0 | 2.0 |" in lines
