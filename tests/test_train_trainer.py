"""The training loop: closed forms of its parts, exact resume, precision, new architectures, bad input."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import TINY, full_disk, write_tiny_model
from PIL import Image
from safetensors.torch import load_file
from training_run import CAPTIONS, MODEL, as_toml, make_settings, write_clips, write_tower

import higen
from higen.bundle import Bundle, file_record, rewrite
from higen.errors import ModelError, PromptWarning, SettingsError, TrainingError
from higen.families.higen import spec
from higen.families.higen.cues import appearance_cue, motion_cue
from higen.families.higen.reference_names import reference_names
from higen.families.higen.spec import ModelConfig, UNetConfig
from higen.families.higen.unet import Denoiser
from higen.locks import claim
from higen.schedule import alphas_cumprod
from higen.tokenizer import PromptTokenizer, build_word_tokenizer, write_tokenizer
from higen.train.batches import Batches
from higen.train.checkpoints import Checkpoints
from higen.train.data import IMAGE, VIDEO, candidates
from higen.train.gradients import scale_gradients
from higen.train.latents import Encoded
from higen.train.networks import spatial_names
from higen.train.optimise import ema_decay, learning_rate
from higen.train.reader import Sample
from higen.train.record import Record, read_losses
from higen.train.settings import CueSettings, ObjectiveSettings, OptimiserSettings, Settings
from higen.train.trainer import Trainer, export, train
from higen.typed_json import to_json


@pytest.fixture(scope="module")
def model(training_model: Path) -> Path:
    return training_model


@pytest.fixture(scope="module")
def clips(training_clips: Path) -> Path:
    return training_clips


@contextmanager
def trainer(settings: Settings) -> Iterator[Trainer]:
    made = Trainer(settings)
    try:
        yield made
    finally:
        made.close()


def losses(settings: Settings) -> list[dict[str, float]]:
    return read_losses(Path(settings.run.output, "losses.jsonl"))


# Closed forms.


def test_the_rate_warms_up_stays_and_falls_as_a_cosine() -> None:
    options = OptimiserSettings(learning_rate=2.0, warm_up=4, decay_part=0.5)
    rates = [learning_rate(options, step, 100) for step in range(100)]
    assert rates[:5] == [0.5, 1.0, 1.5, 2.0, 2.0]
    assert rates[50] == 2.0
    assert rates[75] == pytest.approx(1.0)
    assert rates[60] == pytest.approx(1 + math.cos(math.pi * 0.2))
    assert rates[99] == pytest.approx(1 + math.cos(math.pi * 0.98))
    constant = OptimiserSettings(learning_rate=2.0, warm_up=0, decay_part=0.0)
    assert {learning_rate(constant, step, 100) for step in range(100)} == {2.0}


def test_the_average_is_the_recursion_of_its_decays(tmp_path: Path, model: Path, clips: Path) -> None:
    assert [ema_decay(0.9, step) for step in (1, 8, 1000)] == [2 / 11, 0.5, 0.9]
    with trainer(make_settings(tmp_path, model, clips, optimiser__ema=0.25)) as made:
        name, parameter = next((n, p) for n, p in made.gradients.trained.items() if p.dim() > 1)
        expected = parameter.detach().double().clone()
        for decay in (2 / 11, 0.25, 0.25):
            made.loop.advance()
            expected = decay * expected + (1 - decay) * parameter.detach().double()
        torch.testing.assert_close(made.optimiser.average[name].double(), expected, rtol=1e-6, atol=1e-6)


def test_spatial_parameters_are_those_of_the_still_picture_network(reference: Path) -> None:
    """For the released model, these are exactly the 682 keys that it shares with Stable Diffusion 2.1."""
    names = reference_names(UNetConfig())
    lines = (reference / "full_state_dict_keys.tsv").read_text().splitlines()
    column = lines[0].split("\t").index("in_sd_keys_json")
    shared = {line.split("\t")[0] for line in lines[1:] if line.split("\t")[column] == "1"}
    assert {names[name] for name in spatial_names(UNetConfig())} == shared
    assert len(shared) == 682


def test_only_the_spatial_gradients_are_scaled(tmp_path: Path, model: Path, clips: Path) -> None:
    def gradients(factor: float) -> dict[str, torch.Tensor]:
        settings = make_settings(tmp_path, model, clips, optimiser__spatial_gradient=factor, optimiser__clip=0.0)
        with trainer(settings) as made:
            made.loop.advance()
            return {name: p.grad.clone() for name, p in made.gradients.trained.items() if p.grad is not None}

    plain, scaled = gradients(1.0), gradients(0.5)
    spatial = {f"denoiser.{name}" for name in spatial_names(MODEL.unet)}
    assert plain.keys() == scaled.keys() > spatial
    assert {"denoiser.unet.time.1.weight", "denoiser.unet.prior.weight"} <= plain.keys() - spatial
    for name, gradient in plain.items():
        assert torch.equal(scaled[name], gradient * (0.5 if name in spatial else 1.0)), name


def test_micro_batches_and_recomputed_activations_make_the_same_steps(
    tmp_path: Path, model: Path, clips: Path, whole_run: Settings
) -> None:
    for key, value in {"micro_batches": 2, "recompute": True, "losses_in_turn": True}.items():
        settings = make_settings(tmp_path / key, model, clips, **{f"run__{key}": value})
        train(settings)
        for ours, whole in zip(losses(settings), losses(whole_run), strict=True):
            assert ours == pytest.approx(whole, rel=2e-5, abs=1e-6), key


def test_micro_batches_that_do_not_divide(tmp_path: Path, model: Path, clips: Path) -> None:
    with pytest.raises(SettingsError, match=r"run.micro_batches=3: does not divide the 2 data.images of a process"):
        Trainer(make_settings(tmp_path, model, clips, run__micro_batches=3))


def test_scaling_leaves_what_has_no_gradient() -> None:
    parameters = [torch.nn.Parameter(torch.ones(2)) for _ in range(2)]
    parameters[0].grad = torch.tensor([2.0, 4.0])
    scale_gradients(parameters, 0.25)
    assert parameters[0].grad.tolist() == [0.5, 1.0]
    assert parameters[1].grad is None


def test_the_gradient_is_clipped_to_its_norm(tmp_path: Path, model: Path, clips: Path) -> None:
    with trainer(make_settings(tmp_path, model, clips, optimiser__clip=0.01)) as made:
        norm = float(made.loop.advance()["gradient"])
        clipped = torch.stack([p.grad.norm() for p in made.gradients.trained.values() if p.grad is not None]).norm()
    assert norm > 0.5
    assert float(clipped) == pytest.approx(0.01, rel=1e-3)


# Batches.


def batches(config: ModelConfig = MODEL, cues: CueSettings | None = None, **objective: Any) -> Batches:
    words = " ".join(CAPTIONS).split()
    tokenizer = PromptTokenizer(build_word_tokenizer(words), config.text.rules)
    return Batches(config, tokenizer, cues or CueSettings(), ObjectiveSettings(**objective), seed=0)


def clip(seed: int = 0, frames: int = 5) -> Sample:
    random = torch.Generator().manual_seed(seed)
    return Sample("a blue whale", Encoded(torch.randn(4, frames, 4, 6, generator=random)))


def test_text_is_dropped_at_its_rate_to_the_empty_prompt() -> None:
    many, count = batches(text_dropout=0.3), 2000
    batch = many.batch([Sample("a blue whale", Encoded(torch.zeros(1, 1, 1, 1)))] * count, IMAGE, 0, range(count))
    empty = torch.from_numpy(many.tokenizer.encode([""])[0])
    told = torch.from_numpy(many.tokenizer.encode(["a blue whale"])[0])
    dropped = (batch.tokens == empty).all(dim=1)
    assert ((batch.tokens == told).all(dim=1) | dropped).all()
    assert float(dropped.float().mean()) == pytest.approx(0.3, abs=4 * math.sqrt(0.3 * 0.7 / count))
    # Timesteps are uniform over the whole schedule. The noise has unit variance plus the offset noise's variance.
    assert int(batch.t.min()) < 10
    assert int(batch.t.max()) > 989
    assert float(batch.t.double().mean()) == pytest.approx(499.5, abs=4 * 289 / math.sqrt(count))
    assert float(batch.noise.var()) == pytest.approx(1.01, abs=0.15)


def test_a_caption_of_unknown_words_is_reported_once() -> None:
    many = batches(text_dropout=0.0)
    samples = [replace(clip(frames=1), caption=caption) for caption in ("a blue zebra", "a red yak")]
    with pytest.warns(PromptWarning, match="caption 'a blue zebra': .*'zebra'.*other captions are not") as caught:
        many.batch(samples, IMAGE, 0, range(2))
    assert len(caught) == 1


def test_offset_noise_is_constant_over_a_frames_pixels() -> None:
    with_offset = batches(offset_noise=0.5).batch([clip()], VIDEO, 3, range(1)).noise
    without = batches(offset_noise=0.0).batch([clip()], VIDEO, 3, range(1)).noise
    offset = with_offset - without
    torch.testing.assert_close(offset, offset[..., :1, :1].expand_as(offset), atol=1e-6, rtol=0)
    assert float(offset[..., 0, 0].std()) == pytest.approx(0.5, abs=0.2)


def test_cues_are_measured_from_the_clip_as_the_reference_does() -> None:
    sample = clip()
    x0 = sample.encoded.mean
    batch = batches().batch([sample], VIDEO, 0, range(1))
    motion = [int(10 * float((x0[:, i + 1] - x0[:, i]).norm())) for i in range(4)]
    flat = x0.transpose(0, 1).flatten(1)
    unit = flat / flat.norm(dim=1, keepdim=True)
    similarity = 5 * unit @ unit.T - 4
    torch.testing.assert_close(batch.prior[0], x0[:, 2])  # frame f // 2
    torch.testing.assert_close(batch.motion[0], torch.from_numpy(motion_cue(motion, 5, 32)))
    torch.testing.assert_close(batch.appearance[0], torch.from_numpy(appearance_cue(similarity.numpy(), 5, 32)))
    # Features of another encoder replace the latents.
    features = torch.eye(5)
    other = batches().batch([replace(sample, encoded=Encoded(x0, None, features))], VIDEO, 0, range(1))
    torch.testing.assert_close(other.appearance[0, 0, 0], torch.tensor(1.0))
    torch.testing.assert_close(other.appearance[0, 0, -1], torch.tensor(-4.0))


def test_pictures_have_no_prior_no_motion_and_the_same_appearance() -> None:
    batch = batches().batch([clip(frames=1)], IMAGE, 0, range(1))
    assert not batch.prior.any()
    torch.testing.assert_close(batch.motion[0], torch.from_numpy(motion_cue(0.0, 1, 32)))
    assert torch.equal(batch.appearance, torch.ones(1, 1, 32))


def test_cues_are_left_out_and_flattened_at_their_rates() -> None:
    count, sample = 1500, clip(frames=3)
    config = replace(MODEL, optional_cues=True)
    many = batches(config, CueSettings(dropout=0.4, as_numbers=0.5)).batch([sample] * count, VIDEO, 0, range(count))
    without_motion = (many.motion == 0).flatten(1).all(dim=1)
    unspecified = torch.from_numpy(appearance_cue(None, 3, 32))
    without_appearance = (many.appearance == unspecified).flatten(1).all(dim=1)
    near = 4 * math.sqrt(0.25 / count)
    assert float(without_motion.float().mean()) == pytest.approx(0.4, abs=near)
    assert float(without_appearance.float().mean()) == pytest.approx(0.4, abs=near)
    assert float((without_motion & without_appearance).float().mean()) == pytest.approx(0.16, abs=near)
    told = many.motion[~without_motion]
    flattened = (told[:, 0] == told[:, -1]).all(dim=1)
    assert float(flattened.float().mean()) == pytest.approx(0.5, abs=2 * near)
    with pytest.raises(SettingsError, match=r"cues\.dropout=0\.4: tiny takes no unspecified cues"):
        batches(cues=CueSettings(dropout=0.4))


def test_a_sample_draws_the_same_whatever_is_beside_it() -> None:
    samples = [clip(i) for i in range(4)]
    whole = batches().batch(samples, VIDEO, 7, range(4))
    half = batches().batch(samples[2:], VIDEO, 7, range(2, 4))
    for name in ("x0", "noise", "t", "tokens"):
        assert torch.equal(getattr(whole, name)[2:], getattr(half, name))
    assert not torch.equal(whole.noise[0], whole.noise[1])
    assert not torch.equal(batches().batch(samples, VIDEO, 8, range(4)).noise, whole.noise)


# The loss.


def test_the_losses_are_the_mean_squared_errors_of_v(tmp_path: Path, model: Path, clips: Path) -> None:
    with trainer(make_settings(tmp_path, model, clips)) as made:
        found = []
        for kind in (IMAGE, VIDEO):
            batch = made.source.batch(kind, 0)
            assert batch is not None
            abar = torch.from_numpy(alphas_cumprod(MODEL.schedule))[batch.t].float().reshape(-1, 1, 1, 1, 1)
            noisy = abar.sqrt() * batch.x0 + (1 - abar).sqrt() * batch.noise
            target = abar.sqrt() * batch.noise - (1 - abar).sqrt() * batch.x0
            with torch.no_grad():
                hidden = made.networks.text(input_ids=batch.tokens).last_hidden_state
                context, embedding = made.networks.denoiser.conditioner(hidden, batch.motion, batch.appearance)
                # At one frame the temporal layers are the identity: the whole network must agree with the spatial one.
                unet = made.networks.denoiser.unet if kind == VIDEO else made.networks.denoiser.spatial_unet()
                v = unet(noisy, batch.t, context, embedding, batch.prior)
            found.append(float((v - target).pow(2).mean()))
        values = made.loop.advance()
        assert [float(values["image"]), float(values["video"])] == pytest.approx(found, rel=1e-5)


def test_every_part_of_the_denoiser_learns(tmp_path: Path, preconditioned_model: Path, clips: Path) -> None:
    """Also with prior preconditioning, cue dropout, random crops and a trained text encoder, in bf16."""
    settings = make_settings(
        tmp_path,
        preconditioned_model,
        clips,
        cues__dropout=0.3,
        data__crop="random",
        data__start="random",
        optimiser__train_text=True,
        run__precision="bf16",
        run__steps=2,
    )
    with trainer(settings) as made:
        before = {name: p.detach().clone() for name, p in made.gradients.trained.items()}
        for _ in range(2):
            values = made.loop.advance()
        assert all(p.dtype == torch.float32 for p in made.gradients.trained.values())
        unchanged = [name for name, p in made.gradients.trained.items() if torch.equal(p, before[name])]
    assert math.isfinite(float(values["video"]))
    # Key biases cancel in the softmax. The words next to [PAD] in the vocabulary do not occur.
    assert [name for name in unchanged if "k_proj.bias" not in name] == []
    assert any(name.startswith("text.") for name in before)


def test_bf16_is_near_fp32_and_not_it(tmp_path: Path, model: Path, clips: Path) -> None:
    first = []
    for precision in ("fp32", "bf16"):
        with trainer(make_settings(tmp_path, model, clips, run__precision=precision)) as made:
            first.append({name: float(value) for name, value in made.loop.advance().items()})
    for name in ("image", "video"):
        assert first[0][name] == pytest.approx(first[1][name], rel=0.03)
        assert first[0][name] != first[1][name]


# Runs.


def test_a_run_leaves_a_model_its_losses_and_its_last_checkpoints(whole_run: Settings, model: Path) -> None:
    output = Path(whole_run.run.output)
    assert [line["step"] for line in losses(whole_run)] == [1, 2, 3, 4, 5, 6]
    assert [p.name for p in Checkpoints(output / "checkpoints", 3).paths()] == [
        f"step-{step:08d}.pt" for step in (2, 4, 6)
    ]
    assert sorted(p.name for p in output.iterdir()) == ["checkpoints", "losses.jsonl", "model"]
    average = torch.load(output / "checkpoints" / "step-00000006.pt", weights_only=True)["average"]
    written = load_file(output / "model" / spec.UNET)
    assert {f"denoiser.{name}" for name in written} == average.keys()
    assert all(torch.equal(written[name.removeprefix("denoiser.")], tensor) for name, tensor in average.items())
    before, after = Bundle.open(model), Bundle.open(output / "model")
    own = {"name": "run", "licence": "fine-tuned from tiny (Apache-2.0)", "prompts": CAPTIONS}
    assert spec.config(after.manifest) == replace(spec.config(before.manifest), **own)
    assert {name for name in before.files if before.files[name] != after.files[name]} == {spec.UNET}
    with higen.load(output / "model") as pipe:
        assert pipe("a red heart", steps=2).frames.shape == (4, 16, 24, 3)


@pytest.mark.parametrize("stop", [1, 5])
def test_a_run_continues_bit_for_bit(tmp_path: Path, model: Path, clips: Path, whole_run: Settings, stop: int) -> None:
    settings = make_settings(tmp_path, model, clips)
    with trainer(settings) as made:
        made.start()
        for _ in range(stop):
            values = made.loop.advance()
            made.record.log(made.loop.step, {name: float(v) for name, v in values.items()})  # type: ignore[union-attr]
            if made.loop.step % 2 == 0:
                made.loop.save()
    said: list[str] = []
    train(settings, say=said.append)
    saved = stop // 2 * 2
    first = 0 if saved else next(i for i, line in enumerate(said) if line.startswith("step"))
    assert said[first].startswith(f"continuing after step {saved} of 6" if saved else "step 1 of 6")
    assert said[0].startswith("appearance is measured on the latents: if tiny learnt it with OpenCLIP") == (not saved)
    assert losses(settings) == losses(whole_run)
    ours, theirs = (Path(s.run.output, "model", spec.UNET).read_bytes() for s in (settings, whole_run))
    assert ours == theirs


def test_the_cache_changes_no_number(tmp_path: Path, model: Path, clips: Path, whole_run: Settings) -> None:
    for name in ("filling", "full"):
        settings = make_settings(tmp_path / name, model, clips, data__cache=tmp_path / "cache", data__workers=2)
        train(settings)
        assert losses(settings) == losses(whole_run)
    assert len(list((tmp_path / "cache").rglob("*.safetensors"))) == 6  # three clips and three key frames


def test_fresh_starts_again_and_resume_requires_a_checkpoint(tmp_path: Path, model: Path, clips: Path) -> None:
    settings = make_settings(tmp_path, model, clips, run__steps=2)
    with pytest.raises(TrainingError, match="no checkpoint to continue from"):
        train(settings, resume=True)
    train(settings)
    said: list[str] = []
    train(settings, resume=True, say=said.append)
    assert said == ["continuing after step 2 of 2"]
    train(settings, resume=False, say=said.append)
    assert said[1].startswith("appearance is measured")
    assert [line[:11] for line in said if line.startswith("step")] == ["step 1 of 2", "step 2 of 2"]
    assert [line["step"] for line in losses(settings)] == [1, 2]


def test_another_configuration_is_refused_by_name(tmp_path: Path, model: Path, clips: Path) -> None:
    train(make_settings(tmp_path, model, clips, run__steps=1))
    kept = losses(make_settings(tmp_path, model, clips, run__steps=1))

    def again(**changes: Any) -> Settings:
        return make_settings(tmp_path, model, clips, **{"run__steps": 1, **changes})

    other = write_clips(tmp_path / "other", (*CAPTIONS[:2], "a green whale"))
    for changes, key in (
        ({"optimiser__learning_rate": 2e-3}, r"optimiser\.learning_rate was 0\.001 and is now 0\.002"),
        ({"data__path": other}, r"data\.path \(names and captions\) has changed"),
        ({"model__init": write_tiny_model(tmp_path / "b", MODEL, seed=1).path}, r"model \(autoencoder\) has changed"),
    ):
        with pytest.raises(SettingsError, match=f"of another configuration: {key}") as caught:
            train(again(**changes))
        assert "--fresh" in str(caught.value)
    with pytest.raises(SettingsError, match="another configuration"):
        export(again(run__seed=8), tmp_path / "model")
    assert losses(again()) == kept
    # Settings that do not affect learning may change.
    train(again(run__keep=1, run__log_every=3, data__workers=1))


def test_a_finished_run_may_become_longer_and_no_other(tmp_path: Path, model: Path, clips: Path) -> None:
    def settings(steps: int, output: str = "run") -> Settings:
        return make_settings(tmp_path, model, clips, run__steps=steps, run__output=tmp_path / output)

    train(settings(3))
    first = losses(settings(3))
    train(settings(6))
    longer = losses(settings(6))
    assert longer[:3] == first
    # The run continues with the learning rates of a run of the new length.
    rates = [learning_rate(settings(6).optimiser, step, 6) for step in range(3, 6)]
    assert [line["rate"] for line in longer[3:]] == pytest.approx(rates)
    train(settings(6))  # from now on it is a run of six steps
    for steps in (5, 3):
        with pytest.raises(SettingsError, match=rf"run\.steps was 6 and is now {steps}"):
            train(settings(steps))
    with trainer(settings(4, "other")) as made:  # an unfinished run
        made.start()
        made.loop.advance()
        made.loop.save()
    with pytest.raises(SettingsError, match=r"run\.steps was 4 and is now 8"):
        train(settings(8, "other"))


def test_another_tower_or_tokenizer_is_refused_and_a_moved_one_is_not(tmp_path: Path, model: Path, clips: Path) -> None:
    def settings(tower: str, output: str = "run", init: Path = model) -> Settings:
        return make_settings(
            tmp_path, init, clips, run__steps=1, run__output=tmp_path / output, data__cache=tmp_path / "cache",
            cues__appearance="openclip", cues__openclip=tmp_path / tower,
        )  # fmt: skip

    def kept() -> int:
        return len(list((tmp_path / "cache").rglob("*.safetensors")))

    write_tower(tmp_path / "tower")
    train(settings("tower"))
    full = kept()
    (tmp_path / "tower").rename(tmp_path / "moved")
    train(settings("moved"))
    train(settings("moved", "fresh"))
    assert kept() == full
    # A model with other words in its tokenizer, and otherwise the same.
    shutil.copytree(model, tmp_path / "words")
    write_tokenizer(build_word_tokenizer(("a", "blue", "whale", "yak")), tmp_path / "words" / spec.TOKENIZER)
    rewrite(
        tmp_path / "words",
        lambda opened: replace(
            opened, files={**opened.files, spec.TOKENIZER: file_record(tmp_path / "words" / spec.TOKENIZER)}
        ),
    )
    with pytest.raises(SettingsError, match=r"model \(tokenizer\) has changed"):
        train(settings("moved", init=tmp_path / "words"))
    # Another tower at the first tower's path. Its features differ from those in the cache.
    write_tower(tmp_path / "tower", seed=1)
    for again in (train, lambda run: export(run, tmp_path / "exported")):
        with pytest.raises(SettingsError, match=r"cues\.openclip \(configuration and weights\) has changed"):
            again(settings("tower"))
    train(settings("tower", "other"))
    assert kept() == 2 * full


def test_a_checkpoint_with_fewer_keys_is_resumed(tmp_path: Path, model: Path, clips: Path) -> None:
    """For example a checkpoint of an earlier version, which has no hash of the tokenizer."""
    settings = make_settings(tmp_path, model, clips, run__steps=1)
    with trainer(settings) as made:
        made.loop.advance()
        del made.identity["model (tokenizer)"]
        made.loop.save()
    train(settings, resume=True)


def test_export_writes_the_averages_on_demand(tmp_path: Path, whole_run: Settings, model: Path, clips: Path) -> None:
    half = replace(whole_run, run=replace(whole_run.run, weights="fp16"))
    exported = load_file(export(half, tmp_path / "exported").path / spec.UNET)
    final = load_file(Path(whole_run.run.output, "model", spec.UNET))
    assert all(torch.equal(tensor, final[name].half()) for name, tensor in exported.items())
    with pytest.raises(ModelError, match="exists already; --overwrite"):
        export(whole_run, tmp_path / "exported")
    with pytest.raises(TrainingError, match="no checkpoint to export"):
        export(make_settings(tmp_path, model, clips), tmp_path / "again")


def test_sheets_scalars_and_skipped_files_are_written(tmp_path: Path, model: Path) -> None:
    pytest.importorskip("tensorboard")
    folder = write_clips(tmp_path / "clips")
    (folder / "broken.mp4").write_bytes(b"nothing")
    (folder / "broken.txt").write_text("a star")
    settings = make_settings(
        tmp_path,
        model,
        folder,
        run__steps=2,
        run__sample_every=2,
        run__sample_prompts=["a blue whale", "a star"],
        run__tensorboard=True,
    )
    said: list[str] = []
    train(settings, say=said.append)
    output = Path(settings.run.output)
    with Image.open(output / "samples" / "step-00000002.png") as sheet:
        assert np.asarray(sheet).std() > 1
        assert sheet.width == 4 * 26 - 2
    assert [p.name for p in output.iterdir() if p.name.startswith(".")] == []
    assert said[-1] == f"1 file skipped (1 cannot be read); see {output / 'skipped.jsonl'}"
    (line,) = (output / "skipped.jsonl").read_text().splitlines()
    assert json.loads(line)["file"] == "broken.mp4"
    assert b"video" in next((output / "tensorboard").iterdir()).read_bytes()


# New architectures.


def architecture(tmp_path: Path, **changes: Any) -> Path:
    """A file with the tiny model's network and `changes`; text and autoencoder are left out."""
    data = {"name": "new", "unet": {**to_json(MODEL.unet), **changes}, "defaults": to_json(MODEL.defaults)}
    file = tmp_path / "architecture.json"
    file.write_text(json.dumps(data))
    return file


def test_an_architecture_starts_with_its_own_words(tmp_path: Path, model: Path, clips: Path) -> None:
    settings = make_settings(
        tmp_path,
        model,
        clips,
        model__init=None,
        model__architecture=architecture(tmp_path, blocks_per_level=2, prior_preconditioning=True),
        model__companions=model,
        model__tokenizer="captions",
        model__licence="CC0",
        optimiser__train_text=True,
        run__steps=2,
        run__precision="bf16",
    )
    bundle = train(settings)
    assert (bundle.manifest.name, bundle.manifest.licence) == ("new", "CC0")
    assert spec.config(bundle.manifest).unet.blocks_per_level == 2
    words = sorted({word for caption in CAPTIONS for word in caption.split()})
    assert spec.config(bundle.manifest).text.clip["vocab_size"] == len(words) + 4
    with higen.load(bundle.path) as pipe:
        assert pipe._tokenizer.encode([words[0]])[0, 1] == 4
        pipe("a green whale beating", steps=1)
    # The same seed makes the same new weights.
    twin = replace(settings, run=replace(settings.run, output=str(tmp_path / "twin")))
    train(twin)
    assert losses(twin) == losses(settings)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"in_channels": 8}, r"unet\.in_channels is 8, but its companions have 4"),
        ({"text_dim": 64}, r"unet\.text_dim is 64, but its companions have 32"),
        ({"widht": 64}, r"architecture\.json\.unet\.widht: unknown key"),
    ],
)
def test_an_architecture_that_does_not_fit_is_refused(
    tmp_path: Path, model: Path, clips: Path, changes: dict[str, Any], message: str
) -> None:
    file = architecture(tmp_path, **changes)
    settings = make_settings(
        tmp_path, model, clips, model__init=None, model__architecture=file, model__companions=model
    )
    with pytest.raises(SettingsError, match=f"model.architecture.*{message}"):
        train(settings)


def test_an_architecture_may_be_toml(tmp_path: Path, model: Path, clips: Path) -> None:
    file = tmp_path / "architecture.toml"
    file.write_text(as_toml({"unet": to_json(TINY.unet)}))
    settings = make_settings(
        tmp_path, model, clips, model__init=None, model__architecture=file, model__companions=model,
        data__width=24, data__height=16,
    )  # fmt: skip
    with trainer(settings) as made:
        assert made.networks.config.unet == TINY.unet
        assert made.networks.config.text == MODEL.text
        fresh = Denoiser(TINY.unet).state_dict()
        assert made.networks.denoiser.state_dict().keys() == fresh.keys()


# Bad input and system failures.


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data__width": 21}, r"data\.width=21: a multiple of 4"),
        ({"data__frames": 60}, r"data\.frames=60: from 2 to 40"),
        ({"cues__dropout": 0.1}, r"cues\.dropout=0\.1: tiny takes no unspecified cues"),
    ],
)
def test_settings_that_do_not_fit_the_model_are_refused(
    tmp_path: Path, model: Path, clips: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(SettingsError, match=message):
        train(make_settings(tmp_path, model, clips, **changes))


def test_a_full_disk_leaves_the_last_good_checkpoint(
    tmp_path: Path, model: Path, clips: Path, whole_run: Settings
) -> None:
    settings = make_settings(tmp_path, model, clips)
    with trainer(settings) as made:
        made.start()
        for _ in range(2):
            made.loop.advance()
        made.loop.save()
        good = made.checkpoints.paths()[0]
        made.loop.advance()
        with full_disk(good.stat().st_size // 2), pytest.raises(TrainingError) as caught:
            made.loop.save()
    assert str(caught.value) == (
        f"{good.with_name('step-00000003.pt')} cannot be written: [Errno 27] File too large; "
        f"the last good checkpoint is {good}"
    )
    assert [p.name for p in good.parent.iterdir()] == [good.name]
    train(settings)  # nothing was logged before the checkpoint
    assert losses(settings) == losses(whole_run)[2:]


def test_a_full_disk_under_the_logs_is_one_error(tmp_path: Path, model: Path, clips: Path) -> None:
    settings = make_settings(tmp_path, model, clips)
    with full_disk(64), pytest.raises(TrainingError, match="File too large"):
        train(settings)


def test_a_full_disk_under_a_model_directory_is_one_error(tmp_path: Path, whole_run: Settings) -> None:
    """The disk fills while the model is written at the end, on demand, or for a contact sheet."""
    output = Path(whole_run.run.output)
    before, small = Bundle.open(output / "model"), (output / "model" / spec.UNET).stat().st_size // 2
    with full_disk(small), pytest.raises(ModelError, match=r"run/model: cannot be written: .*File too large"):
        train(whole_run)
    assert Bundle.open(output / "model") == before
    with full_disk(small), pytest.raises(ModelError, match=r"exported: cannot be written: .*File too large"):
        export(whole_run, tmp_path / "exported")
    assert list(tmp_path.iterdir()) == []
    with trainer(whole_run) as made, full_disk(small), pytest.raises(ModelError, match="File too large"):
        made._sample()
    assert sorted(p.name for p in output.iterdir()) == ["checkpoints", "losses.jsonl", "model"]


def test_the_largest_seed_serves(tmp_path: Path, model: Path, clips: Path) -> None:
    with trainer(make_settings(tmp_path, model, clips, run__seed=2**32 - 1)) as made:
        assert math.isfinite(float(made.loop.advance()["gradient"]))


def test_checkpoints_keep_the_last_and_name_a_broken_one(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path / "checkpoints", keep=2)
    assert checkpoints.load() is None
    checkpoints.folder.mkdir()
    (checkpoints.folder / "step-00000004.part").write_bytes(b"of a process that was killed")
    for step in (5, 10, 100):
        checkpoints.save(step, {"step": step, "x": torch.full((3,), float(step))})
    assert [p.name for p in checkpoints.paths()] == ["step-00000010.pt", "step-00000100.pt"]
    assert sorted(checkpoints.folder.iterdir()) == checkpoints.paths()
    state = checkpoints.load()
    assert state is not None
    assert state["x"].tolist() == [100.0] * 3
    newest = checkpoints.paths()[-1]
    newest.write_bytes(newest.read_bytes()[:100])
    with pytest.raises(TrainingError, match=r"step-00000100\.pt cannot be read: .*continue from step-00000010\.pt"):
        checkpoints.load()
    for content in (b"\x80\x02garbage", b"no checkpoint at all"):
        newest.write_bytes(content)
        with pytest.raises(TrainingError, match=r"step-00000100\.pt cannot be read: ") as caught:
            checkpoints.load()
        assert "weights_only" not in str(caught.value)  # PyTorch's advice to load it in the way that runs its code
    torch.save({"version": 99}, newest)
    with pytest.raises(TrainingError, match="version 99"):
        checkpoints.load()
    checkpoints.clear()
    assert list(checkpoints.folder.iterdir()) == []


def test_a_gradient_that_is_not_finite_stops_the_run(tmp_path: Path, model: Path, clips: Path) -> None:
    with trainer(make_settings(tmp_path, model, clips)) as made:
        with torch.no_grad():
            made.gradients.trained["denoiser.unet.conv_in.weight"][0] = math.inf
        with pytest.raises(TrainingError, match="step 1: the gradient is not finite"):
            made.loop.advance()
        assert made.loop.step == 0


def test_a_log_takes_back_what_came_after_the_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "losses.jsonl").write_text('{"step": 1, "x": 0.5}\n{"step": 2, "x": 0.25}\n{"step": 3, "x"')
    record = Record(tmp_path, 1, tensorboard=False)
    record.log(2, {"x": 0.1})
    record.close()
    assert (tmp_path / "losses.jsonl").read_text() == '{"step": 1, "x": 0.5}\n{"step": 2, "x": 0.1}\n'


def test_files_skipped_before_a_resume_are_counted(tmp_path: Path, model: Path) -> None:
    """A resumed process reads other files. Each step takes one of four clips; the broken clip is in the first step."""
    folder = write_clips(tmp_path / "clips")
    first = next(candidates(3, VIDEO, 0, 4))  # the clip that the seed puts into the first step
    names = ["clip0.webm", "clip1.webm", "clip2.webm", "clip3.mp4"]
    (folder / "clip3.mp4").write_bytes((folder / "clip2.webm").read_bytes())
    (folder / "clip3.txt").write_text("a star")
    (folder / names[first]).write_bytes(b"nothing")

    def settings(**changes: Any) -> Settings:
        return make_settings(tmp_path, model, folder, run__steps=2, data__images=0, data__videos=1, **changes)

    with trainer(settings()) as made:
        made.start()
        made.loop.advance()
        made.loop.save()
    file = tmp_path / "run" / "skipped.jsonl"
    before = file.read_text()
    for _ in range(2):  # first a run that continues, then a run that is already finished
        said: list[str] = []
        train(settings(), say=said.append)
        assert said[-1] == f"1 file skipped (1 cannot be read); see {file}"
        assert file.read_text() == before
    (folder / names[first]).write_bytes((folder / names[first - 1]).read_bytes())
    train(settings(), resume=False)
    assert not file.exists()


def test_a_folder_has_one_trainer(tmp_path: Path, model: Path, clips: Path) -> None:
    settings = make_settings(tmp_path, model, clips)
    held = claim(Path(settings.run.output))
    assert held is not None
    with pytest.raises(TrainingError, match="another process is training there"):
        train(settings)
