"""From prompts to videos on the tiny model: a seed always gives the same bytes; a batch equals single generations."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
from numpy.typing import NDArray

import higen
from higen.backends import RecordingBackend
from higen.backends.options import Options
from higen.backends.torch import TorchBackend
from higen.bundle import Bundle
from higen.errors import BackendError, PromptWarning, RequestError
from higen.events import Frames
from higen.pipeline import Pipeline
from higen.sampler import Step
from higen.video import Video

PROMPTS = ["a blue whale swimming", "a red heart beating", "a green star"]


def torch_pipeline(model: Path) -> Pipeline:
    bundle = Bundle.open(model)
    return Pipeline(bundle, TorchBackend(bundle, Options(device="cpu")))


@pytest.fixture(scope="module")
def pipe(tiny_model: Path) -> Iterator[Pipeline]:
    with torch_pipeline(tiny_model) as pipeline:
        yield pipeline


@pytest.fixture(scope="module")
def preconditioned(preconditioned_model: Path) -> Iterator[Pipeline]:
    with torch_pipeline(preconditioned_model) as pipeline:
        yield pipeline


@pytest.fixture
def recorded(tiny_model: Path) -> tuple[Pipeline, RecordingBackend]:
    bundle = Bundle.open(tiny_model)
    backend = RecordingBackend(bundle.manifest)
    return Pipeline(bundle, backend), backend


def steps_of(pipeline: Pipeline, prompt: str | list[str], **options: Any) -> list[Step]:
    """Every step of a video, without its frames."""
    return [event for event in pipeline.stream(prompt, **options) if isinstance(event, Step)]


def latents(pipeline: Pipeline, prompt: str | list[str], **options: Any) -> NDArray[np.float32]:
    """The latents after the last step, [B, C, F, H, W]."""
    return pipeline.backend.to_numpy(steps_of(pipeline, prompt, **options)[-1].latents)


# Seeds and batches


def test_a_video_has_the_models_defaults(pipe: Pipeline) -> None:
    video = pipe("a whale", progress=False)
    assert isinstance(video, Video)
    assert video.frames.shape == (4, 16, 24, 3)
    assert video.fps == 8
    assert np.ptp(video.frames) > 50


def test_the_same_seed_gives_the_same_bytes(pipe: Pipeline, tiny_model: Path) -> None:
    first = pipe("a whale", seed=5).frames
    assert first.tobytes() == pipe("a whale", seed=5).frames.tobytes()
    assert latents(pipe, "a whale", seed=5).tobytes() == latents(pipe, "a whale", seed=5).tobytes()
    with torch_pipeline(tiny_model) as again:
        assert first.tobytes() == again("a whale", seed=5).frames.tobytes()


def test_seed_and_prompt_change_the_video(pipe: Pipeline) -> None:
    first = latents(pipe, "a whale", seed=5)
    assert np.abs(first - latents(pipe, "a whale", seed=6)).max() > 0.1
    assert np.abs(first - latents(pipe, "a star", seed=5)).max() > 1e-3


@pytest.mark.parametrize("options", [{}, {"solver": "dpm++2m", "frames": 3, "motion": [10, 20]}], ids=["plain", "more"])
@pytest.mark.parametrize("name", ["pipe", "preconditioned"])
def test_a_batch_is_its_prompts_one_by_one(name: str, options: dict[str, Any], request: pytest.FixtureRequest) -> None:
    pipeline: Pipeline = request.getfixturevalue(name)
    seeds = [3, 1, 2**64 - 1]
    batch = latents(pipeline, PROMPTS, seed=seeds, **options)
    assert batch.dtype == np.float32
    for i, seed in enumerate(seeds):
        alone = latents(pipeline, PROMPTS[i], seed=seed, **options)
        assert np.abs(batch[i] - alone[0]).max() <= 1e-5


def test_high_guidance_and_few_steps_do_not_break_that(pipe: Pipeline) -> None:
    """Both magnify rounding. If the kernels computed the whole batch at once, the difference would be 4e-5."""
    batch = latents(pipe, PROMPTS, guidance=12.0)
    for i, prompt in enumerate(PROMPTS):
        assert np.abs(batch[i] - latents(pipe, prompt, guidance=12.0)[0]).max() <= 1e-5


def test_a_list_of_prompts_gives_a_list_of_videos(pipe: Pipeline) -> None:
    videos = pipe(PROMPTS[:2], seed=[1, 2])
    assert [video.prompt for video in videos] == PROMPTS[:2]
    assert [video.metadata["seed"] for video in videos] == [1, 2]
    assert isinstance(pipe([PROMPTS[0]]), list)
    np.testing.assert_array_equal(videos[1].frames, pipe(PROMPTS[1], seed=2).frames)


# The request's values reach the stages


def calls(backend: RecordingBackend) -> list[str]:
    return [stage for stage, _ in backend.calls]


def test_the_stages_of_a_video_in_order(recorded: tuple[Pipeline, RecordingBackend]) -> None:
    pipeline, backend = recorded
    pipeline(PROMPTS, steps=(2, 3), frames=5)
    expected = [
        *["text_encoder", "conditioner"] * 4,  # three prompts and the empty one, each in its own call
        *["spatial_unet"] * 2,
        *["conditioner"] * 4,
        *["temporal_unet"] * 3,
        *["vae_decoder"] * 9,
    ]
    expected = [
        *["text_encoder", "conditioner", "text_encoder", "conditioner"],
        *["text_encoder", "conditioner"] * 2,
        *["spatial_unet"] * 2,
        *["conditioner"] * 4,
        *["temporal_unet"] * 3,
        *["vae_decoder"] * 9,
    ]
    assert calls(backend) == expected
    by_stage = dict(backend.calls)
    assert by_stage["spatial_unet"]["latents"] == (3, 4, 1, 8, 12)
    assert by_stage["temporal_unet"]["latents"] == (3, 4, 5, 8, 12)
    assert by_stage["temporal_unet"]["prior"] == (3, 4, 8, 12)
    assert all(given["tokens"] == (1, 12) for stage, given in backend.calls if stage == "text_encoder")


def test_one_frame_needs_no_temporal_stage(recorded: tuple[Pipeline, RecordingBackend], pipe: Pipeline) -> None:
    pipeline, backend = recorded
    assert pipeline("a whale", frames=1).frames.shape == (1, 16, 24, 3)
    assert "temporal_unet" not in calls(backend)
    np.testing.assert_array_equal(pipe("a whale", frames=1, seed=4).frames[0], pipe.image("a whale", seed=4))


def test_a_picture_replaces_the_spatial_stage(recorded: tuple[Pipeline, RecordingBackend]) -> None:
    pipeline, backend = recorded
    pipeline(PROMPTS, image=np.zeros((16, 24, 3), np.uint8))
    assert "spatial_unet" not in calls(backend)
    assert backend.calls[calls(backend).index("vae_encoder")][1] == {"pixels": (1, 3, 16, 24)}
    assert dict(backend.calls)["temporal_unet"]["prior"] == (3, 4, 8, 12)


def test_decoding_is_in_chunks(recorded: tuple[Pipeline, RecordingBackend]) -> None:
    pipeline, backend = recorded
    pipeline("a whale", frames=7)
    sizes = [given["latents"][0] for stage, given in backend.calls if stage == "vae_decoder"]
    assert sum(sizes) == 7
    assert max(sizes) == pipeline.manifest.sizes.chunk == 2


def test_decoding_in_chunks_is_decoding_at_once(pipe: Pipeline) -> None:
    z = np.random.default_rng(0).standard_normal((2, 4, 5, 8, 12)).astype(np.float32)
    request = pipe.request(["a whale", "a star"], frames=5)
    in_chunks = pipe.decode(z, request)
    assert in_chunks.shape == (2, 5, 16, 24, 3)
    sizes = replace(pipe.manifest.sizes, chunk=100)
    whole = Pipeline(replace(pipe.bundle, manifest=replace(pipe.manifest, sizes=sizes)), pipe.backend)
    assert np.abs(in_chunks.astype(int) - whole.decode(z, request)).max() <= 1
    np.testing.assert_array_equal(in_chunks[1], pipe.decode(z[1:], pipe.request("a star", frames=5))[0])


def test_frames_are_reported_as_they_are_decoded(pipe: Pipeline) -> None:
    stream = pipe.stream(["a whale", "a star"], frames=5, steps=1)
    frames = [event for event in stream if isinstance(event, Frames)]
    assert [(f.video, f.first, len(f.frames)) for f in frames] == [
        *((0, 0, 2), (0, 2, 2), (0, 4, 1)),
        *((1, 0, 2), (1, 2, 2), (1, 4, 1)),
    ]
    assert [(f.done, f.total) for f in frames] == [(2, 10), (4, 10), (5, 10), (7, 10), (9, 10), (10, 10)]
    for i, video in enumerate(stream.videos):
        np.testing.assert_array_equal(np.concatenate([f.frames for f in frames if f.video == i]), video.frames)


class Taps(TorchBackend):
    """The torch backend, which records the inputs of each stage."""

    def __init__(self, bundle: Bundle) -> None:
        super().__init__(bundle, Options(device="cpu"))
        self.given: list[tuple[str, dict[str, Any]]] = []

    def run(self, stage: str, /, **tensors: Any) -> Mapping[str, Any]:
        self.given.append((stage, {name: self.to_numpy(value) for name, value in tensors.items()}))
        return super().run(stage, **tensors)

    def of(self, stage: str) -> list[dict[str, Any]]:
        return [tensors for name, tensors in self.given if name == stage]


@pytest.fixture
def tapped(tiny_model: Path) -> tuple[Pipeline, Taps]:
    bundle = Bundle.open(tiny_model)
    backend = Taps(bundle)
    return Pipeline(bundle, backend), backend


def test_steps_and_guidance_of_each_stage(tapped: tuple[Pipeline, Taps]) -> None:
    pipeline, backend = tapped
    steps = steps_of(pipeline, "a whale", steps=(2, 3), guidance=(1.5, 0))
    assert [(s.loop, s.stage, s.index, s.total) for s in steps] == [
        *[("spatial", "spatial_unet", i, 2) for i in range(2)],
        *[("temporal", "temporal_unet", i, 3) for i in range(3)],
    ]
    assert [given["guidance"].tolist() for given in backend.of("spatial_unet")] == [[[1.5]]] * 2
    assert [given["guidance"].tolist() for given in backend.of("temporal_unet")] == [[[0.0] * 4]] * 3


def test_guidance_one_uses_only_the_prompt(pipe: Pipeline) -> None:
    """At guidance 1 the branch of the negative prompt has weight 0."""
    plain = latents(pipe, "a whale", guidance=1.0)
    np.testing.assert_allclose(plain, latents(pipe, "a whale", guidance=1.0, negative_prompt="a star"), atol=1e-5)
    assert np.abs(plain - latents(pipe, "a whale", guidance=3.0)).max() > 1e-3
    pushed = latents(pipe, "a whale", guidance=3.0, negative_prompt="a star")
    assert np.abs(pushed - latents(pipe, "a whale", guidance=3.0)).max() > 1e-3


def test_the_key_frame_is_the_prior_and_the_cues_are_given(tapped: tuple[Pipeline, Taps]) -> None:
    pipeline, backend = tapped
    matrix = np.linspace(-1, 1, 4 * 32).reshape(4, 32)
    steps = steps_of(pipeline, PROMPTS[:2], motion=[10, 20, 30], appearance=matrix)
    key_frame = backend.to_numpy(steps[3].latents)[:, :, 0]
    for given in backend.of("temporal_unet"):
        np.testing.assert_array_equal(given["prior"], key_frame)
    spatial, _, _, temporal, _, other = backend.of("conditioner")
    assert spatial["appearance"].shape == (1, 1, 32)
    assert (spatial["appearance"] == 1).all()
    assert spatial["motion"][0, 0].tolist() == [1.0] * 16 + [0.0] * 16  # cosines and sines of motion 0
    for given in (temporal, other):
        np.testing.assert_array_equal(given["appearance"], matrix.astype(np.float32)[None])


@pytest.mark.parametrize("motion", [20, [10, 20, 30], (10, 20, 30, 40), np.array([1.0, 2.0, 3.0])])
def test_every_form_of_motion(pipe: Pipeline, motion: Any) -> None:
    made = latents(pipe, "a whale", motion=motion)
    assert np.isfinite(made).all()
    assert np.abs(made - latents(pipe, "a whale", motion=900)).max() > 1e-4


@pytest.mark.parametrize("appearance", [0, [0, 0.5, 0.7, 1], np.zeros((4, 32)), np.eye(4).tolist()])
def test_every_form_of_appearance(pipe: Pipeline, appearance: Any) -> None:
    made = latents(pipe, "a whale", appearance=appearance)
    assert np.isfinite(made).all()
    assert np.abs(made - latents(pipe, "a whale", appearance=1.0)).max() > 1e-4


def test_one_number_is_that_number_everywhere(pipe: Pipeline) -> None:
    np.testing.assert_array_equal(latents(pipe, "a whale", motion=20), latents(pipe, "a whale", motion=[20] * 3))
    np.testing.assert_array_equal(
        latents(pipe, "a whale", appearance=0.5), latents(pipe, "a whale", appearance=[0.5] * 4)
    )


@pytest.mark.parametrize("solver", ["ddim", "dpm++2m"])
def test_the_solvers(pipe: Pipeline, solver: str) -> None:
    video = pipe("a whale", solver=solver, steps=3)
    assert video.metadata["solver"] == solver
    assert np.ptp(video.frames) > 50


def test_other_sizes(pipe: Pipeline) -> None:
    assert pipe("a whale", width=8, height=28, frames=9).frames.shape == (9, 28, 8, 3)


# Pictures from the user


def picture(mode: str = "RGB") -> PIL.Image.Image:
    return PIL.Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 30, 3), np.uint8)).convert(mode)


def test_a_picture_is_a_path_or_pil_or_an_array(pipe: Pipeline, tmp_path: Path) -> None:
    picture().save(tmp_path / "picture.png")
    forms = [tmp_path / "picture.png", str(tmp_path / "picture.png"), picture(), np.asarray(picture())]
    made = [pipe("a whale", image=form).frames for form in forms]
    for frames in made[1:]:
        np.testing.assert_array_equal(made[0], frames)
    assert made[0].tobytes() != pipe("a whale", image=np.zeros((16, 24, 3), np.uint8)).frames.tobytes()


@pytest.mark.parametrize("mode", ["L", "1", "P", "CMYK", "RGBA", "LA"])
def test_pictures_of_every_kind(pipe: Pipeline, mode: str) -> None:
    assert pipe("a whale", image=picture(mode)).frames.shape == (4, 16, 24, 3)


def test_what_is_transparent_is_white(tapped: tuple[Pipeline, Taps]) -> None:
    pipeline, backend = tapped
    clear = PIL.Image.new("RGBA", (24, 16), (255, 0, 0, 0))
    list(pipeline.stream("a whale", image=clear))
    (given,) = backend.of("vae_encoder")
    assert (given["pixels"] == 1.0).all()


def test_a_picture_is_cropped_and_never_squeezed(tapped: tuple[Pipeline, Taps]) -> None:
    pipeline, backend = tapped
    wide = np.zeros((16, 72, 3), np.uint8)
    wide[:, 24:48] = 255  # the middle third is what a 24x16 video shows
    list(pipeline.stream("a whale", image=wide))
    (given,) = backend.of("vae_encoder")
    assert (given["pixels"] == 1.0).all()


def bad_pictures(folder: Path) -> dict[str, Any]:
    (folder / "text.png").write_text("no picture")
    picture().save(folder / "whole.png")
    (folder / "cut.png").write_bytes((folder / "whole.png").read_bytes()[:200])
    return {
        "missing": folder / "nowhere.png",
        "a folder": folder,
        "no picture": folder / "text.png",
        "truncated": str(folder / "cut.png"),
        "floats": np.full((16, 24, 3), 127.0),
        "not a number": np.full((16, 24, 3), np.nan),
        "whole numbers": np.zeros((16, 24, 3), np.int64),
        "truth values": np.zeros((16, 24, 3), bool),
        "channels of a tensor": torch.zeros(3, 16, 24),
        "grey": np.zeros((16, 24), np.uint8),
        "channels": np.zeros((3, 16, 24), np.uint8),
        "four channels": np.zeros((16, 24, 4), np.uint8),
        "empty": np.zeros((0, 24, 3), np.uint8),
        "number": 7,
        "list": [picture(), picture()],
        "bytes": b"\x89PNG",
        "no pixels": PIL.Image.new("RGB", (0, 0)),
        "a null": "a\0b.png",
    }


def test_invalid_pictures(recorded: tuple[Pipeline, RecordingBackend], tmp_path: Path) -> None:
    pipeline, backend = recorded
    for name, bad in bad_pictures(tmp_path).items():
        with pytest.raises(RequestError, match=r"^image"):
            pytest.fail(f"{name} was taken: {pipeline.stream('a whale', image=bad)}")
    assert backend.calls == []


def test_a_picture_file_that_pil_opened_and_cannot_read(
    recorded: tuple[Pipeline, RecordingBackend], tmp_path: Path
) -> None:
    bad_pictures(tmp_path)
    with PIL.Image.open(tmp_path / "cut.png") as lazy, pytest.raises(RequestError, match=r"cannot be read"):
        recorded[0].stream("a whale", image=lazy)


def test_the_key_frame_alone(pipe: Pipeline) -> None:
    one = pipe.image("a whale", seed=3)
    assert one.shape == (16, 24, 3)
    assert one.dtype == np.uint8
    several = pipe.image(PROMPTS, seed=[3, 4, 5], steps=2)
    assert [image.shape for image in several] == [(16, 24, 3)] * 3
    stream = pipe.stream("a whale", steps=1, seed=3)
    first = next(stream)
    assert isinstance(first, Step)
    np.testing.assert_array_equal(
        pipe.image("a whale", seed=3, steps=1), pipe.decode(first.latents, stream.request)[0, 0]
    )


def test_the_key_frame_takes_a_videos_options_and_checks_them(pipe: Pipeline) -> None:
    assert pipe.image("a whale", width=12, height=20, frames=9).shape == (20, 12, 3)
    with pytest.raises(RequestError, match="steps=0"):
        pipe.image("a whale", steps=0)


# Streams


def test_a_stream_gives_every_step_then_the_frames_then_the_videos(pipe: Pipeline) -> None:
    stream = pipe.stream(PROMPTS[:2], seed=3)
    assert stream.loops == [("spatial", 4), ("temporal", 4), ("decode", 8)]
    with pytest.raises(RequestError, match="no step has been made"):
        stream.preview()
    with pytest.raises(RequestError, match="not been read to its end"):
        _ = stream.videos
    shapes, kinds = [], []
    for event in stream:
        kinds.append(type(event))
        preview = stream.preview()
        assert preview.dtype == np.uint8
        if isinstance(event, Step):
            np.testing.assert_array_equal(preview, pipe.decode(event.previous, stream.request))
            shapes.append(preview.shape)
    assert kinds == [Step] * 8 + [Frames] * 4
    assert shapes == [(2, 1, 16, 24, 3)] * 4 + [(2, 4, 16, 24, 3)] * 4
    called = pipe(PROMPTS[:2], seed=3)
    for streamed, made in zip(stream.videos, called, strict=True):
        np.testing.assert_array_equal(streamed.frames, made.frames)
    assert list(stream) == []
    assert len(stream.videos) == 2


def test_reading_the_stream_does_not_change_the_result(pipe: Pipeline) -> None:
    looked = pipe.stream("a whale")
    for _ in looked:
        looked.preview()
    np.testing.assert_array_equal(looked.videos[0].frames, pipe("a whale").frames)


def test_a_stream_left_early_stops_the_work(recorded: tuple[Pipeline, RecordingBackend]) -> None:
    pipeline, backend = recorded
    stream = pipeline.stream("a whale", steps=(10, 10))
    for event in stream:
        if isinstance(event, Step) and event.index == 2:
            break
    stream.close()
    assert calls(backend).count("spatial_unet") == 3
    assert list(stream) == []
    with pytest.raises(RequestError, match="not been read to its end"):
        _ = stream.videos
    assert len(pipeline("a whale").frames) == 4


def test_two_streams_at_once_do_not_mix(pipe: Pipeline) -> None:
    one, two = pipe.stream("a whale", seed=1), pipe.stream("a star", seed=2)
    for _ in zip(one, two, strict=True):
        pass
    np.testing.assert_array_equal(one.videos[0].frames, pipe("a whale", seed=1).frames)
    np.testing.assert_array_equal(two.videos[0].frames, pipe("a star", seed=2).frames)


def test_a_stream_is_checked_when_it_is_made(recorded: tuple[Pipeline, RecordingBackend]) -> None:
    with pytest.raises(RequestError, match="steps=0"):
        recorded[0].stream("a whale", steps=0)


class Interrupted(RecordingBackend):
    """Raises KeyboardInterrupt once, at call number `at`."""

    at = 0

    def run(self, stage: str, /, **tensors: Any) -> Mapping[str, Any]:
        if len(self.calls) == self.at:
            self.at = -1
            raise KeyboardInterrupt
        return super().run(stage, **tensors)


@pytest.mark.parametrize("at", [0, 3, 5, 10, 14], ids=["text", "conditioner", "spatial", "temporal", "decode"])
def test_ctrl_c_ends_the_work_and_not_the_pipeline(tiny_model: Path, at: int) -> None:
    bundle = Bundle.open(tiny_model)
    backend = Interrupted(bundle.manifest)
    backend.at = at
    pipeline = Pipeline(bundle, backend)
    with pytest.raises(KeyboardInterrupt):
        pipeline("a whale")
    assert len(backend.calls) == at
    assert pipeline("a whale").frames.shape == (4, 16, 24, 3)


# Errors and warnings


@pytest.mark.parametrize(
    "options",
    [
        {"steps": 0},
        {"guidance": float("nan")},
        {"width": 25},
        {"frames": 10_000},
        {"motion": [1, 2]},
        {"solver": "euler"},
        {"prompt": ""},
        {"negative_prompt": 3},
        {"seed": [1, 2]},
        {"step": 50},
        {"num_frames": 3},
        {"progres": True},
    ],
)
def test_a_wrong_argument_is_refused_before_any_work(
    recorded: tuple[Pipeline, RecordingBackend], options: dict[str, Any]
) -> None:
    pipeline, backend = recorded
    for make in (pipeline, pipeline.stream, pipeline.image):
        with pytest.raises(RequestError, match=str([*options][-1])):
            make(**{"prompt": "a whale", **options})
    assert backend.calls == []


def test_an_unknown_option_is_named_and_the_known_are_listed(pipe: Pipeline) -> None:
    with pytest.raises(RequestError, match=r"num_frames: unknown; a request takes .*seed.*frames"):
        pipe("a whale", num_frames=3)


def test_a_prompt_that_is_too_long_is_cut_with_a_warning(pipe: Pipeline) -> None:
    long = "a blue whale swimming , a red heart beating , a green star"
    with pytest.warns(PromptWarning, match=r"13 tokens, but the model reads 10; words cut off: 'a', 'green', 'star'"):
        cut = latents(pipe, long)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        np.testing.assert_array_equal(cut, latents(pipe, "a blue whale swimming , a red heart beating ,"))


def test_an_unknown_word_is_a_warning(pipe: Pipeline) -> None:
    with pytest.warns(PromptWarning, match="does not know 'submarine'"):
        pipe("a blue submarine")


def test_values_that_are_not_numbers_are_an_error(tiny_model: Path) -> None:
    class Broken(RecordingBackend):
        def run(self, stage: str, /, **tensors: Any) -> Mapping[str, Any]:
            return {name: value + np.nan for name, value in super().run(stage, **tensors).items()}

    bundle = Bundle.open(tiny_model)
    with pytest.raises(BackendError, match="NaN"):
        Pipeline(bundle, Broken(bundle.manifest))("a whale")


# Metadata and progress


def test_the_metadata_says_how_a_video_was_made(pipe: Pipeline) -> None:
    options = {
        "negative_prompt": "a star",
        "steps": [2, 3],
        "guidance": [1.0, 2.0],
        "solver": "dpm++2m",
        "motion": [1.0, 2.0, 3.0],
        "appearance": np.ones((4, 32)).tolist(),
        "offset_noise": 0.0,
        "strength": 0.5,
    }
    video = pipe("a whale", seed=9, **options)
    metadata = json.loads(json.dumps(dict(video.metadata), allow_nan=False))
    seconds = metadata.pop("seconds")
    assert sorted(seconds) == ["decode", "spatial", "temporal", "text"]
    assert all(0 <= value < 60 for value in seconds.values())
    assert metadata == {
        "prompt": "a whale",
        "seed": 9,
        **options,
        "model": "tiny",
        "licence": "Apache-2.0",
        "versions": {"higen": higen.__version__, "backend": "torch"},
    }
    again = pipe(metadata["prompt"], seed=metadata["seed"], **{name: metadata[name] for name in options})
    np.testing.assert_array_equal(again.frames, video.frames)


def test_cues_that_are_not_given_are_null(preconditioned: Pipeline) -> None:
    metadata = preconditioned("a whale").metadata
    assert metadata["motion"] is None
    assert metadata["appearance"] is None


def test_a_bar_for_each_loop(pipe: Pipeline, capsys: pytest.CaptureFixture[str]) -> None:
    pipe("a whale", progress=True, steps=(2, 3))
    lines = [line.rpartition("\r")[2] for line in capsys.readouterr().err.strip().split("\n")]
    assert [line.split(":")[0].strip() for line in lines] == ["spatial", "temporal", "decode"]
    for line, total in zip(lines, ("2/2", "3/3", "4/4"), strict=True):
        assert total in line
        assert "100%" in line
    pipe("a whale", progress=True, image=picture(), frames=1)
    assert capsys.readouterr().err.count("decode") >= 1


@pytest.mark.parametrize("progress", [None, False])
def test_no_bars_without_a_terminal(pipe: Pipeline, capsys: pytest.CaptureFixture[str], progress: bool | None) -> None:
    pipe("a whale", progress=progress)
    assert capsys.readouterr().err == ""


# The public functions


@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_load(tiny_model: Path, pipe: Pipeline, backend: str) -> None:
    with higen.load(tiny_model, backend, device="cpu", precision="fp32") as loaded:
        np.testing.assert_array_equal(loaded("a whale", seed=1).frames, pipe("a whale", seed=1).frames)


def test_load_refuses_what_is_unknown(tiny_model: Path) -> None:
    with pytest.raises(RequestError, match=r"backend='cuda': one of 'auto', .*'torch'"):
        higen.load(tiny_model, backend="cuda")
    with pytest.raises(RequestError, match="backend='tpu'"):
        higen.generate("a whale", backend="tpu")


def test_generate_loads_the_default_model_once(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from higen import api

    opened: list[Path] = []
    load: Callable[..., Pipeline] = api.load

    def counted(*args: Any, **options: Any) -> Pipeline:
        opened.append(tiny_model)
        return load(tiny_model, *args, **options)

    monkeypatch.setattr(api, "load", counted)
    api._default_pipeline.cache_clear()
    try:
        first, second = (higen.generate("a whale", seed=2, frames=2) for _ in range(2))
    finally:
        api._default_pipeline.cache_clear()
    assert opened == [tiny_model]
    np.testing.assert_array_equal(first.frames, second.frames)
