"""What training prints before it starts, and the name and licence of the trained model."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import write_tiny_model
from PIL import Image
from torch import nn
from training_run import CAPTIONS, MODEL, make_settings, write_clips

from higen import cpu
from higen.api import default_model
from higen.bundle import Bundle
from higen.cli import main
from higen.families.higen import spec
from higen.models.companion_stages import EncoderStage
from higen.tokenizer import PromptTokenizer, build_word_tokenizer
from higen.train import notices
from higen.train.data import Item, Listing, list_items
from higen.train.networks import _some, build
from higen.train.reader import Frame
from higen.train.trainer import Trainer, train

FRAME = Frame(4, 24, 16, 8)
TOKENIZER = PromptTokenizer(build_word_tokenizer(" ".join(CAPTIONS).split()), MODEL.text.rules)


class Halving(nn.Module):
    """An autoencoder that loses every other pixel of a row (or nothing), with latents like those of AutoencoderDC."""

    def __init__(self, loses: bool = True) -> None:
        super().__init__()
        self.loses, self.weight = loses, nn.Parameter(torch.ones(()))

    def encode(self, pixels: torch.Tensor, return_dict: bool) -> tuple[torch.Tensor]:
        return (pixels[..., ::2] if self.loses else pixels,)

    def decode(self, latents: torch.Tensor, return_dict: bool) -> tuple[torch.Tensor]:
        return (latents.repeat_interleave(2, dim=-1) if self.loses else latents,)


def stripes(folder: Path, step: int) -> list[Item]:
    """A picture whose columns alternate between 100 and 100 + step."""
    folder.mkdir()
    columns = np.where(np.arange(24) % 2, 100 + step, 100).astype(np.uint8)
    Image.fromarray(np.broadcast_to(columns[None, :, None], (16, 24, 3)).copy()).save(folder / "a.png")
    (folder / "a.txt").write_text("a blue whale")
    return list_items(folder).items


def test_what_the_autoencoder_loses_is_measured_on_the_data_set(tmp_path: Path) -> None:
    """Half the pixels are off by the step, so the PSNR is 20 log10(255 / step) + 10 log10(2)."""
    encoder = EncoderStage(Halving(), (0.5,), (3.0,))
    for step in (10, 40):
        items = stripes(tmp_path / str(step), step)
        expected = 20 * np.log10(255 / step) + 10 * np.log10(2)
        assert notices.codec_psnr(encoder, items, FRAME) == pytest.approx(expected, abs=0.05)
    whole = notices.codec_psnr(EncoderStage(Halving(loses=False), (0.0,), (1.0,)), items, FRAME)
    assert whole is not None
    assert whole > 100
    assert notices.codec_psnr(encoder, [Item(tmp_path / "absent.png", "absent.png", "", False)], FRAME) is None


def test_frames_that_the_autoencoder_cannot_show_are_reported_with_their_psnr(tmp_path: Path) -> None:
    encoder = EncoderStage(Halving(), (0.0,), (1.0,))
    fine, coarse = (Listing(stripes(tmp_path / str(step), step)) for step in (10, 60))
    assert list(notices.notices(fine, FRAME, encoder, TOKENIZER, bfloat16=False)) == []
    (line,) = notices.notices(coarse, FRAME, encoder, TOKENIZER, bfloat16=False)
    assert line.startswith("the autoencoder, which is not trained, shows frames of this data set with a PSNR of 15.6 ")


def test_slow_bfloat16_is_reported_only_where_it_is_slow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    listing, encoder = Listing(stripes(tmp_path / "s", 1)), EncoderStage(Halving(), (0.0,), (1.0,))
    for flags, lines in ((frozenset({"avx2"}), 1), (frozenset({"avx512_bf16"}), 0), (None, 0)):
        monkeypatch.setattr(cpu, "flags", lambda flags=flags: flags)
        said = list(notices.notices(listing, FRAME, encoder, TOKENIZER, bfloat16=True))
        assert len(said) == lines
        assert all("ten times" in line and line.endswith("run.precision = 'fp32'") for line in said)


def test_captions_that_are_changed_when_read_are_counted(tmp_path: Path) -> None:
    encoder = EncoderStage(Halving(), (0.0,), (1.0,))
    item = stripes(tmp_path / "s", 1)[0]
    captions = ("a blue whale", "a blue zebra", "a red heart " * 200, "", "a blue zebra")
    listing = Listing(
        [replace(item, caption=caption) for caption in captions], {"b.txt": "its caption cannot be used: x"}
    )
    left_out, line = notices.notices(listing, FRAME, encoder, TOKENIZER, bfloat16=False)
    assert left_out.startswith("left out of the data set: 1 file skipped (1 its caption cannot be used); b.txt: ")
    assert line.startswith("2 of 4 captions are changed when they are read; the first is 'a blue zebra': ")
    assert "does not know 'zebra'" in line
    assert line.endswith("; some captions are empty")
    assert "\n" not in line


def test_notices_are_printed_once_before_the_first_step(tmp_path: Path) -> None:
    model = write_tiny_model(tmp_path / "tiny", MODEL).path
    clips = write_clips(tmp_path / "clips", captions=("a blue whale", "a zebra"))
    settings = make_settings(tmp_path, model, clips, run__steps=1)
    said: list[str] = []
    train(settings, say=said.append)
    kinds = [line.split()[0:2] for line in said]
    assert kinds[1:] == [["1", "of"], ["the", "autoencoder,"], ["step", "1"]]
    said.clear()
    train(settings, say=said.append)
    assert [line.split()[0] for line in said] == ["continuing"]


# A fine-tuned model is a different model.


def tuned(folder: Path, model: Path, clips: Path, **changes: Any) -> spec.ModelConfig:
    """The configuration that a run's model would get, without a training step."""
    settings = make_settings(folder, model, clips, **changes)
    own = build(settings, (item.caption for item in list_items(clips).items)).own
    assert own is not None
    return own


def test_a_model_tuned_from_the_built_in_one_has_its_own_name(tmp_path: Path) -> None:
    theirs, clips = Bundle.open(default_model()).manifest, write_clips(tmp_path / "clips")
    own = tuned(tmp_path, default_model(), clips, run__output=tmp_path / "seabirds")
    assert own.name == "seabirds"
    assert own.licence == f"fine-tuned from {theirs.name} ({theirs.licence})"
    assert own.prompts == CAPTIONS
    own = tuned(
        tmp_path,
        default_model(),
        clips,
        model__name="gulls",
        model__licence="CC0",
        run__sample_every=5,
        run__sample_prompts=["a gull"],
    )
    assert (own.name, own.licence, own.prompts) == ("gulls", "CC0", ("a gull",))


def test_evaluate_does_not_mistake_it_for_a_model_of_the_recipe(tmp_path: Path, tiny_model: Path) -> None:
    from click.testing import CliRunner

    train(make_settings(tmp_path, tiny_model, write_clips(tmp_path / "clips"), run__steps=1))
    options = ["--data", str(tmp_path / "data"), "--output", str(tmp_path / "out")]
    result = CliRunner().invoke(main, ["evaluate", str(tmp_path / "run" / "model"), *options])
    assert result.exit_code == 2
    assert "no prompt of the default recipe" in result.stderr


def test_prompts_are_a_few_short_captions_of_all_the_data() -> None:
    tokenizer = PromptTokenizer(build_word_tokenizer(["caption", *map(str, range(1, 100))]), MODEL.text.rules)
    captions = [f"caption {i}" for i in range(100)] + ["x" * 500, "two\nlines", "", "caption 0"]
    assert _some(captions, tokenizer) == tuple(f"caption {i}" for i in range(13, 100, 13))  # 0 is an unknown word
    assert _some([], tokenizer) == ()


def test_a_moved_run_and_a_run_from_an_earlier_version_continue(tmp_path: Path) -> None:
    model, clips = write_tiny_model(tmp_path / "tiny", MODEL).path, write_clips(tmp_path / "clips")
    settings = make_settings(tmp_path, model, clips, run__steps=2)
    train(settings)
    moved = replace(settings, run=replace(settings.run, output=str(tmp_path / "moved")))
    shutil.move(settings.run.output, moved.run.output)
    made = Trainer(moved)
    try:
        state = made.checkpoints.load()
        assert state is not None
        state["identity"]["model (architecture)"] |= {"name": "x", "licence": "y", "prompts": []}
        file = Path(moved.run.output, "checkpoints", "step-00000002.pt")
        torch.save(state | torch.load(file, weights_only=True) | {"identity": state["identity"]}, file)
        made.start(resume=True)
        assert made.loop.step == 2
    finally:
        made.close()
    assert train(moved).manifest.name == "moved"
