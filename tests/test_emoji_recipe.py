"""The built-in model's recipe: its captions, its pictures, and a start from other weights."""

from __future__ import annotations

import io
import os
import re
import shutil
import signal
import sys
import tarfile
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import full_disk
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from training_run import killed_after

from higen import cpu
from higen.api import default_model
from higen.bundle import Bundle
from higen.errors import ModelError, SettingsError, TrainingError
from higen.families.higen import spec
from higen.families.higen.cues import appearance_cue
from higen.families.higen.spec import UNetConfig
from higen.locks import claimed
from higen.tokenizer import build_word_tokenizer
from higen.train.batches import StepBatches
from higen.train.checkpoints import Checkpoints
from higen.train.emoji import autoencoder, denoiser, few_steps, known_frames, latent_cache
from higen.train.emoji import clips as clips_module
from higen.train.emoji import packs as data
from higen.train.emoji import run as recipe
from higen.train.emoji.clips import Clips, EmojiSource, Selection
from higen.train.emoji.configuration import KNOWN_FRAMES, architecture
from higen.train.emoji.configuration import recipe as recipe_settings
from higen.train.emoji.denoiser import make_loop, networks_of, train
from higen.train.emoji.further import Where, held_out
from higen.train.emoji.packs import background, clip_indices, compose, fetch
from higen.train.emoji.subjects import (
    BACKGROUNDS,
    FRAMES,
    KEY_INDEX,
    SPEEDS,
    STYLES,
    SUBJECTS,
    caption,
    is_held_out,
    vocabulary,
    with_article,
)
from higen.train.emoji.warm_start import start_from
from higen.train.loop import Loop
from higen.train.settings import Settings

UNET = architecture().unet
PAIRS = [(s, b) for s in range(len(SUBJECTS)) for b in range(len(BACKGROUNDS))]


def settings(**changes: Any) -> Settings:
    """The recipe's settings with some of [run] changed."""
    return replace(recipe_settings(), run=replace(recipe_settings().run, **changes))


def test_subjects_are_distinguished() -> None:
    assert len(SUBJECTS) >= 24
    for field in ("codepoint", "name", "caption"):
        assert len({getattr(subject, field) for subject in SUBJECTS}) == len(SUBJECTS)


def test_one_combination_in_ten_is_held_out_but_every_part_is_seen() -> None:
    trained = [pair for pair in PAIRS if not is_held_out(*pair)]
    assert len(PAIRS) - len(trained) == len(SUBJECTS)
    assert {s for s, _ in trained} == set(range(len(SUBJECTS)))
    assert {b for _, b in trained} == set(range(len(BACKGROUNDS)))


@pytest.mark.parametrize(
    ("speed", "style", "text"),
    [
        (1, 0, "a whale flapping its tail at night"),
        (0, 0, "a whale flapping its tail at night, slowly"),
        (2, 1, "a whale flapping its tail at night, quickly"),
        (3, 0, "a whale at night, standing still"),
        (1, 2, "a whale at night"),
        (0, 3, "a whale flapping its tail, slowly"),
        (0, 4, "a whale, in slow motion"),
    ],
)
def test_captions(speed: int, style: int, text: str) -> None:
    assert caption(SUBJECTS[0], BACKGROUNDS[6], SPEEDS[speed], STYLES[style]) == text


def test_every_caption_is_made_of_the_vocabulary() -> None:
    words = set(vocabulary())
    assert {"whale", "standing", "an", "eagle"} <= words
    assert with_article("eagle") == "an eagle"


@pytest.mark.parametrize(("speed", "first"), [(0.0, [24, 24, 24]), (1.0, [0, 3, 6]), (0.5, [12, 14, 15])])
def test_a_clip_always_shows_the_key_frame_at_its_place(speed: float, first: list[int]) -> None:
    indices = clip_indices(72, 24, speed)
    assert indices[KEY_INDEX] == 24
    assert indices[:3].tolist() == first
    assert indices.min() >= 0
    assert clip_indices(20, 10, 2.0).max() < 20  # the clip loops


def test_backgrounds_are_ten_different_pictures() -> None:
    pictures = [background(b.name).astype(int) for b in BACKGROUNDS]
    assert all(picture.shape == (128, 128, 3) for picture in pictures)
    for i, one in enumerate(pictures):
        assert np.array_equal(one, background(BACKGROUNDS[i].name))
        assert all(np.abs(one - other).mean() > 8 for other in pictures[:i])


def test_composing_is_the_over_operator() -> None:
    loop = np.zeros((1, 1, 3, 4), np.uint8)
    loop[0, 0] = [[200, 100, 0, 255], [200, 100, 0, 0], [200, 100, 0, 51]]
    picture = np.full((1, 3, 3), 50, np.uint8)
    assert compose(loop, picture)[0, 0].tolist() == [[200, 100, 0], [50, 50, 50], [80, 60, 40]]


def test_a_start_from_another_model_takes_its_weights_and_its_words() -> None:
    networks, model = networks_of(UNET, seed=1), Bundle.open(default_model())
    own = networks.text.get_parameter("embeddings.token_embedding.weight").detach().clone()
    tokenizer = build_word_tokenizer(("novelty", *vocabulary(), ","))  # one more word, so every token id moves
    ids = tokenizer.get_vocab()
    with torch.no_grad():
        networks.text.embeddings.token_embedding.weight = torch.nn.Parameter(torch.cat([own, own[:1]]))  # type: ignore[assignment, union-attr]
    kept = start_from(networks.text, networks.denoiser, tokenizer, model)
    assert kept == []
    unet = load_file(model.file(spec.UNET))
    for name, parameter in networks.denoiser.named_parameters():
        assert torch.equal(parameter, unet[name].float()), name
    table = networks.text.get_parameter("embeddings.token_embedding.weight")
    theirs = load_file(model.file(spec.TEXT_ENCODER))["embeddings.token_embedding.weight"].float()
    known = Tokenizer.from_file(str(model.file(spec.TOKENIZER))).get_vocab()
    assert torch.equal(table[ids["whale"]], theirs[known["whale"]])
    assert torch.equal(table[ids["novelty"]], torch.cat([own, own[:1]])[ids["novelty"]])


def test_without_npm_it_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(RuntimeError, match=r"npm is not installed: install Node\.js, or put the archive"):
        fetch(tmp_path / "data")


def package(path: Path, files: dict[str, bytes]) -> bytes:
    """Write an archive as npm packs it; returns its bytes."""
    with tarfile.open(path, "w:gz") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(f"package/assets/{name}")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path.read_bytes()


@pytest.mark.parametrize("part", [0.0, 0.5, 0.99])
def test_a_broken_archive_is_named_and_fetched_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, part: float
) -> None:
    content = {f"{s.codepoint}.webp": np.random.default_rng(i).bytes(2000) for i, s in enumerate(SUBJECTS)}
    archive = tmp_path / "lobehub-fluent-emoji-anim-1-1.0.0.tgz"
    whole = package(archive, content)
    archive.write_bytes(whole[: int(part * len(whole))])
    with pytest.raises(RuntimeError, match=rf"{re.escape(str(archive))}: is broken and was removed; run again"):
        fetch(tmp_path)
    monkeypatch.setattr(data, "_npm_pack", lambda package, folder: archive.write_bytes(whole))
    fetch(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.glob("*.webp")} == content


def test_a_full_disk_leaves_no_partial_loop(tmp_path: Path) -> None:
    archive = tmp_path / "lobehub-fluent-emoji-anim-1-1.0.0.tgz"
    package(archive, {f"{SUBJECTS[0].codepoint}.webp": bytes(5000)})
    with full_disk(1000), pytest.raises(TrainingError, match=r"1f40b\.webp cannot be written: .*File too large"):
        fetch(tmp_path)
    assert list(tmp_path.iterdir()) == [archive]


def test_new_subjects_are_drawn_twice_as_often_at_first(tmp_path: Path) -> None:
    loops = {f"latents/{SUBJECTS[s].name}": torch.zeros((10, 72, 32, 8, 8)).half() for s in (0, 1)}
    save_file(loops, tmp_path / "latents")
    clips = Clips(tmp_path / "latents", UNET, Selection(subjects=(0, 1), new=(1,)))

    def share(progress: float) -> float:
        random = torch.Generator().manual_seed(0)
        captions = [text for _ in range(100) for text in clips.images(random, progress).captions if text]
        return sum("penguin" in text for text in captions) / len(captions)

    assert share(0.2) == pytest.approx(2 / 3, abs=0.05)
    assert share(0.8) == pytest.approx(1 / 2, abs=0.05)


def test_held_out_batches_have_only_held_out_pairs(tmp_path: Path) -> None:
    """Each pair's latents are its own number, which tells where a batch comes from."""
    loops = {}
    for s in (0, 1):
        numbers = (10 * s + torch.arange(10.0)).half()
        loops[f"latents/{SUBJECTS[s].name}"] = numbers[:, None, None, None, None].expand(10, 72, 32, 8, 8).contiguous()
    save_file(loops, tmp_path / "latents")
    clips = Clips(tmp_path / "latents", UNET, Selection(subjects=(0, 1)), settings(steps=100))
    source = EmojiSource(clips, networks_of(UNET, 0).tokenizer, 1000)

    def pairs(batches: StepBatches) -> set[tuple[int, int]]:
        assert batches.images is not None
        assert batches.videos is not None
        found = torch.cat([batches.images.x0[:, 0, 0, 0, 0], batches.videos.x0[:, 0, 0, 0, 0]])
        return {divmod(int(number), 10) for number in found}

    held = {(s, b) for s in (0, 1) for b in range(10) if is_held_out(s, b)}
    assert pairs(held_out(clips, source)) == held
    assert not pairs(source.batches(0)) & held


@pytest.mark.parametrize("module", [known_frames, few_steps])
def test_an_output_that_cannot_be_written_is_named_before_the_training(tmp_path: Path, module: Any) -> None:
    (tmp_path / "busy").mkdir()
    (tmp_path / "busy" / "notes.txt").touch()
    with pytest.raises(ModelError, match="busy: exists already and is not a model directory"):
        module.train(Bundle.open(default_model()), tmp_path / "state", tmp_path / "busy")
    assert not (tmp_path / "state").exists()


@pytest.mark.parametrize(
    ("option", "value"),
    [("--workers", "-1"), ("--rate", "nan"), ("--threads", "0"), ("--clips", "0"), ("--rate", "-1")],
)
def test_a_wrong_option_of_the_known_frames_command_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], option: str, value: str
) -> None:
    needed = ["--model", "m", "--state", "s", "--output", "o"]
    monkeypatch.setattr(sys, "argv", ["known_frames", *needed, f"{option}={value}"])
    with pytest.raises(SystemExit) as ended:
        known_frames.main()
    assert ended.value.code == 2
    assert f"argument {option}: '{value}': " in capsys.readouterr().err


def test_bfloat16_trains_as_float32_does(tmp_path: Path) -> None:
    random = torch.Generator().manual_seed(0)
    loops = {f"latents/{SUBJECTS[s].name}": torch.randn((10, 72, 32, 8, 8), generator=random).half() for s in (0, 1)}
    save_file(loops, tmp_path / "latents")
    config = replace(UNET, channel_multipliers=(1, 1))
    losses = []
    for precision in ("fp32", "bf16"):
        chosen = settings(steps=4, precision=precision)
        clips = Clips(tmp_path / "latents", config, Selection(subjects=(0, 1)), chosen)
        loop = make_loop(networks_of(config, 0), clips, Checkpoints(tmp_path / "c", 1))
        losses.append(
            [[float(made[name]) for name in ("image", "video")] for made in (loop.advance() for _ in range(3))]
        )
    assert losses[0] != losses[1]
    np.testing.assert_allclose(losses[1], losses[0], rtol=2e-3)


@pytest.mark.usefixtures("single")
def test_a_stopped_run_continues_as_if_never_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    random = torch.Generator().manual_seed(0)
    save_file({f"latents/{SUBJECTS[0].name}": torch.randn((10, 72, 32, 8, 8), generator=random).half()}, tmp_path / "l")
    config = replace(UNET, channel_multipliers=(1, 1))
    clips = Clips(tmp_path / "l", config, Selection(subjects=(0,)), settings(steps=4, save_every=2))
    advance = Loop.advance

    def interrupted(loop: Loop) -> Any:
        if loop.step == 1:
            os.kill(os.getpid(), signal.SIGINT)
        return advance(loop)

    for folder in ("whole", "stopped", "killed"):
        (tmp_path / folder).mkdir()
    train(tmp_path / "whole", clips)
    killed_after(3, lambda: train(tmp_path / "killed", clips))
    assert [p.name for p in (tmp_path / "killed" / "checkpoints").iterdir()] == ["step-00000002.pt"]
    train(tmp_path / "killed", clips)
    monkeypatch.setattr(Loop, "advance", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "stopped", clips)
    assert [p.name for p in (tmp_path / "stopped" / "checkpoints").iterdir()] == ["step-00000002.pt"]
    train(tmp_path / "stopped", clips)
    whole = Checkpoints(tmp_path / "whole" / "checkpoints", 2).load()
    assert whole is not None
    for folder in ("stopped", "killed"):
        found = Checkpoints(tmp_path / folder / "checkpoints", 2).load()
        assert found is not None
        assert whole["step"] == found["step"] == 4
        for part in ("weights", "average"):
            assert all(torch.equal(tensor, found[part][name]) for name, tensor in whole[part].items())


def test_only_a_cue_replaces_words(tmp_path: Path) -> None:
    random = torch.Generator().manual_seed(0)
    save_file({f"latents/{SUBJECTS[0].name}": torch.randn((10, 72, 32, 8, 8), generator=random).half()}, tmp_path / "l")
    clips = Clips(tmp_path / "l", UNET, Selection(subjects=(0,)))
    batches = [clips.windows(torch.Generator().manual_seed(seed), 0.1) for seed in range(200)]
    places = torch.from_numpy(appearance_cue(None, FRAMES, UNET.appearance_columns)).tolist()
    moving = re.compile("slow|fast|quick|still")
    # A window of equal frames stands still. Without a cue, its caption must say so.
    said: dict[tuple[bool, bool], set[bool]] = {}
    for batch in batches:
        for motion, rows, x, text in zip(batch.motion, batch.appearance, batch.x0, batch.captions, strict=True):
            if text and (x == x[:, :1]).all():
                given = bool(motion.any()), rows[0].tolist() not in places
                said.setdefault(given, set()).add(bool(moving.search(text)))
    assert said.pop((False, False)) == {True}
    assert said == {key: {True, False} for key in ((True, False), (False, True), (True, True))}


def test_a_clip_whose_speed_has_no_name_has_a_cue(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    random = torch.Generator().manual_seed(0)
    save_file({f"latents/{SUBJECTS[0].name}": torch.randn((10, 72, 32, 8, 8), generator=random).half()}, tmp_path / "l")
    clips = Clips(tmp_path / "l", UNET, Selection(subjects=(0,)))
    monkeypatch.setattr(clips_module, "SPEED_PARTS", (0.0, 0.0, 0.0, 0.0, 1.0))
    places = torch.from_numpy(appearance_cue(None, FRAMES, UNET.appearance_columns)).tolist()
    given = {
        (bool(motion.any()), rows[0].tolist() not in places)
        for seed in range(20)
        for batch in [clips.windows(torch.Generator().manual_seed(seed), 0.1)]
        for motion, rows in zip(batch.motion, batch.appearance, strict=True)
    }
    assert given == {(True, False), (False, True), (True, True)}


def test_a_run_continues_only_with_its_own_configuration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = {f"latents/{SUBJECTS[s].name}": torch.zeros((10, 72, 32, 8, 8)).half() for s in (0, 1)}
    save_file(cache, tmp_path / "l")
    config, both = replace(UNET, channel_multipliers=(1, 1)), Selection(subjects=(0, 1))
    state, one, other = tmp_path / "state", settings(steps=1), recipe_settings()

    def again(chosen: Settings = one, config: UNetConfig = config, selection: Selection = both) -> None:
        train(state, Clips(tmp_path / "l", config, selection, chosen))

    again()
    again(settings(steps=1, save_every=1))
    monkeypatch.setattr(Loop, "advance", None)  # no step is made
    for wrong, found in (
        ((settings(steps=2),), "run.steps was 1 and is now 2"),
        ((settings(steps=1, precision="bf16"),), "run.precision was 'fp32' and is now 'bf16'"),
        ((replace(one, optimiser=replace(other.optimiser, ema=0.5)),), "optimiser.ema was 0.998 and is now 0.5"),
        ((replace(one, objective=replace(other.objective, prior_noise=0.0)),), "objective.prior_noise was 0.05 and"),
        ((one, replace(config, dropout=0.5)), "unet.dropout was 0.0 and is now 0.5"),
        ((one, config, replace(both, motion=False)), "selection.motion was True and is now False"),
        ((one, config, Selection(subjects=(0,))), "subject penguin was {"),
        ((one, config, replace(both, new=(1,))), "subject penguin was {"),
    ):
        with pytest.raises(SettingsError) as caught:
            again(*wrong)
        assert f"{state} holds a run of another configuration: {found}" in str(caught.value)
        assert str(caught.value).endswith(f"; put it back, or remove {state / 'checkpoints'} to start over")


def test_a_cache_without_a_wanted_subject_is_one_error(tmp_path: Path) -> None:
    save_file({f"latents/{SUBJECTS[0].name}": torch.zeros((10, 72, 32, 8, 8)).half()}, tmp_path / "l")
    with pytest.raises(TrainingError, match="no latents of penguin, monkey; remove it"):
        Clips(tmp_path / "l", UNET, Selection(subjects=(0, 1, 2)))


# The codec


@pytest.fixture
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Codec training without pictures."""
    monkeypatch.setattr(autoencoder, "psnr", lambda *_: 30.0)
    monkeypatch.setattr(autoencoder, "Pictures", lambda *_: SimpleNamespace(training=[], validation=[]))


@pytest.mark.usefixtures("no_pictures")
def test_a_stopped_codec_run_has_the_given_time_in_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the test's clock a step takes one minute; a checkpoint is saved every two minutes."""
    clock, parts = [0.0], list[float]()

    def step(loop: Loop) -> dict[str, torch.Tensor]:
        if len(parts) == 5:
            raise KeyboardInterrupt  # killed: nothing is saved
        clock[0] += 60
        parts.append(loop.optimiser.seconds / loop.optimiser.time)
        loop.optimiser.step += 1
        return {"loss": torch.zeros(()), "rate": torch.zeros(())}

    monkeypatch.setattr("higen.train.loop.time", SimpleNamespace(monotonic=lambda: clock[0]))
    monkeypatch.setattr(Loop, "advance", step)
    with pytest.raises(KeyboardInterrupt):
        autoencoder.train(tmp_path, tmp_path, 600)
    assert parts == [0.0, 0.1, 0.2, 0.3, 0.4]
    assert autoencoder.seconds_spent(tmp_path) == 240
    parts.clear()
    with pytest.raises(KeyboardInterrupt):
        autoencoder.train(tmp_path, tmp_path, 600)
    assert parts == pytest.approx([0.4, 0.5, 0.6, 0.7, 0.8])
    for left in ([0.8, 0.9], []):
        parts.clear()
        autoencoder.train(tmp_path, tmp_path, 600)
        assert parts == pytest.approx(left)


@pytest.mark.usefixtures("single")
def test_a_stopped_codec_run_continues_as_if_never_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The run ends after a number of steps, because two runs by the clock are never equal."""
    loop = np.zeros((40, 128, 128, 4), np.uint8)
    loop[:, 30:90, 40:80] = (200, 90, 10, 255)

    class Square(autoencoder.Pictures):
        def __init__(self, folder: Path) -> None:
            self.loops = [torch.from_numpy(loop)]
            self.backgrounds = torch.from_numpy(np.stack([background(b.name) for b in BACKGROUNDS]))
            self.training = self.validation = [(0, b) for b in range(len(BACKGROUNDS))]

    monkeypatch.setattr(autoencoder, "Pictures", Square)
    monkeypatch.setattr(autoencoder, "psnr", lambda *_: 30.0)
    settings = replace(autoencoder.CODEC, steps=3, batch=2, save_seconds=0.0)  # save after each step
    autoencoder.train(tmp_path, tmp_path / "whole", 0, settings=settings)
    gradients = autoencoder.CodecGradients.__call__

    def interrupted(*given: Any) -> Any:
        os.kill(os.getpid(), signal.SIGTERM)
        return gradients(*given)

    with monkeypatch.context() as patch:
        patch.setattr(autoencoder.CodecGradients, "__call__", interrupted)
        with pytest.raises(KeyboardInterrupt):
            autoencoder.train(tmp_path, tmp_path / "stopped", 0, settings=settings)
    assert [p.name for p in (tmp_path / "stopped").iterdir()] == ["autoencoder"]
    autoencoder.train(tmp_path, tmp_path / "stopped", 0, settings=settings)
    whole, stopped = (load_file(tmp_path / name / "autoencoder.safetensors") for name in ("whole", "stopped"))
    assert all(torch.equal(tensor, stopped[name]) for name, tensor in whole.items())
    killed_after(2, lambda: autoencoder.train(tmp_path, tmp_path / "killed", 0, settings=settings))
    assert [p.name for p in (tmp_path / "killed" / "autoencoder").iterdir()] == ["step-00000001.pt"]
    autoencoder.train(tmp_path, tmp_path / "killed", 0, settings=settings)
    killed = load_file(tmp_path / "killed" / "autoencoder.safetensors")
    assert all(torch.equal(tensor, killed[name]) for name, tensor in whole.items())


def test_an_earlier_versions_codec_checkpoint_is_named(tmp_path: Path) -> None:
    (tmp_path / "autoencoder.ckpt").touch()
    with pytest.raises(TrainingError, match=r"autoencoder\.ckpt: a checkpoint of an earlier version; remove it"):
        autoencoder.train(tmp_path, tmp_path, 60)


def test_zero_seconds_write_the_codec_of_the_start_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = Bundle.open(default_model())
    monkeypatch.setattr(autoencoder, "Pictures", lambda folder: None)
    autoencoder.train(tmp_path, tmp_path / "state", 0, model)
    theirs = load_file(model.file(spec.AUTOENCODER))
    written = autoencoder.load(tmp_path / "state").state_dict()
    assert written.keys() == theirs.keys()
    assert all(torch.equal(tensor, theirs[name].float()) for name, tensor in written.items())


def test_a_codec_is_written_completely_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    codec = autoencoder.build().state_dict()

    def killed(*_: object, **__: object) -> str:
        raise KeyboardInterrupt

    for name in ("json.dumps", "save_file"):
        with monkeypatch.context() as patch:
            patch.setattr(f"higen.train.emoji.autoencoder.{name}", killed)
            with pytest.raises(KeyboardInterrupt):
                autoencoder.export(codec, autoencoder.CodecConfig(), tmp_path)
        assert {p.name for p in tmp_path.iterdir()} <= {"autoencoder.json"}  # the recipe looks for the weights
    autoencoder.export(codec, autoencoder.CodecConfig(), tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {"autoencoder.json", "autoencoder.safetensors"}


def test_a_full_disk_leaves_the_codecs_files_as_they_were(tmp_path: Path) -> None:
    codec, path = autoencoder.build().state_dict(), tmp_path / "autoencoder.safetensors"
    autoencoder.export(codec, autoencoder.CodecConfig(), tmp_path)
    before = path.read_bytes()
    message = f"{path.name} cannot be written: .*too large"
    with full_disk(len(before) // 2), pytest.raises(TrainingError, match=message):
        autoencoder.export(codec, autoencoder.CodecConfig(), tmp_path)
    assert path.read_bytes() == before
    assert {p.name for p in tmp_path.iterdir()} == {path.name, "autoencoder.json"}


def test_a_full_disk_leaves_the_earlier_latents(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    random = torch.Generator().manual_seed(0)
    monkeypatch.setattr(latent_cache, "load", lambda folder: None)
    monkeypatch.setattr(latent_cache, "Pictures", lambda folder: None)
    monkeypatch.setattr(latent_cache, "encode_subject", lambda *_: torch.randn((2, 3, 32, 8, 8), generator=random))
    latent_cache.write(tmp_path, tmp_path)
    path = tmp_path / "latents.safetensors"
    before = path.read_bytes()
    with full_disk(len(before) // 2), pytest.raises(TrainingError, match=r"latents\.safetensors cannot be written: .*"):
        latent_cache.write(tmp_path, tmp_path)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_the_recipe_holds_its_folder_from_beginning_to_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    parts = []

    def part(name: str) -> Any:
        def held(*_: object, **__: object) -> None:
            parts.append(name)
            with pytest.raises(TrainingError, match="another process is training there"), claimed(tmp_path):
                pass

        return held

    monkeypatch.setattr(denoiser, "Clips", lambda *_: None)
    for module, name in (
        (recipe, "fetch"),
        (recipe.autoencoder, "train"),
        (recipe.latent_cache, "write"),
        (recipe, "train"),
        (recipe.decoder, "draw"),
        (recipe.decoder, "train"),
        (recipe, "assemble"),
        (recipe.known_frames, "train"),
        (recipe.few_steps, "train"),
    ):
        monkeypatch.setattr(module, name, part(name))
    with claimed(tmp_path), pytest.raises(TrainingError, match="another process is training there"):
        recipe.run(tmp_path, tmp_path / "model")
    assert parts == []
    monkeypatch.setattr(cpu, "flags", lambda: frozenset({"avx2"}))
    recipe.run(tmp_path, tmp_path / "model", bf16=True)
    assert "ten times as long as in float32: leave --bf16 out" in capsys.readouterr().out
    recipe.run(tmp_path, tmp_path / "model", few=tmp_path / "few")
    assert capsys.readouterr().out == f"4 npm packages are fetched into {tmp_path / 'data'}, about 700 MB in all four\n"
    whole = ["fetch", "train", "write", "train", "assemble", "draw", "train", "assemble", "train"]
    assert parts == [*whole, *whole, "train"]
    with pytest.raises(SettingsError, match="another directory than --output"):
        recipe.run(tmp_path, tmp_path / "model", few=tmp_path / "model")


def test_layers_for_known_frames_are_trained_on_their_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """On random latents. Only these layers change, a run continues only with its own configuration, and processes that
    make its batches change nothing."""
    random = torch.Generator().manual_seed(0)
    latents = {f"latents/{s.name}": torch.randn((10, 16, 32, 8, 8), generator=random).half() for s in SUBJECTS}
    save_file(latents, tmp_path / "latents.safetensors")
    known = replace(KNOWN_FRAMES, steps=2, videos=1, save_every=1, measure_every=0)
    model = Bundle.open(default_model())
    made = known_frames.train(model, tmp_path, tmp_path / "made", known)
    assert "held-out latents, above the blend: ends " in capsys.readouterr().out
    assert made.manifest == model.manifest
    before, after = (load_file(bundle.file(spec.UNET)) for bundle in (model, made))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed
    assert all(name.startswith("known.") for name in changed)
    with pytest.raises(SettingsError, match=r"known_frames holds a run of another configuration: .*videos"):
        known_frames.train(model, tmp_path, tmp_path / "made", replace(known, videos=2))
    again = known_frames.train(model, tmp_path, tmp_path / "again", known)  # it is finished
    shutil.rmtree(tmp_path / "known_frames")
    ahead = known_frames.train(model, tmp_path, tmp_path / "ahead", known, Where(workers=1))
    for other in (again, ahead):
        assert all(torch.equal(tensor, after[name]) for name, tensor in load_file(other.file(spec.UNET)).items())
