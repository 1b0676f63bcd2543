"""Sources: every kind against plain numpy for one sample, one run of a stage per distinct input, and caching."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.pipelines.stable_video_diffusion.pipeline_stable_video_diffusion import _resize_with_antialiasing
from interpreter_model import MANIFEST, Formulas, changed, mixer, reader, see
from numpy.typing import NDArray

from higen.bounded_cache import BoundedCache
from higen.conditioning import resample_in_time, similarity_rows, sinusoid
from higen.errors import BackendError, RequestError
from higen.images import load_picture
from higen.manifest import Manifest
from higen.request import Request, make_request
from higen.sources import Kept, Place, Sources, as_video
from higen.stages import Output, Stage, Tensor
from higen.tables import COMMON
from higen.video import to_uint8

DRAFT, FILM = MANIFEST.loops
PICTURES = [np.random.default_rng(i).integers(0, 256, (16, 24, 3), np.uint8) for i in range(3)]
CLIP = np.random.default_rng(9).integers(0, 256, (7, 8, 12, 3), np.uint8)


def request_of(prompt: Any = "a", manifest: Manifest = MANIFEST, **options: Any) -> Request:
    common = {name: options.pop(name) for name in COMMON if name in options}
    return make_request(manifest, prompt, **common, controls=options, load=load_picture)


def tokens_of(text: str) -> NDArray[np.int64]:
    return np.array([[1, *(ord(c) for c in text[:3].ljust(3)), 2]])


def sources_of(request: Request, backend: Formulas | None = None, kept: Kept | None = None) -> Sources:
    backend = backend or Formulas()
    texts = {text: tokens_of(text) for text in (*request.prompts, request.negative_prompt)}
    return Sources(backend.manifest, backend, request, texts, BoundedCache(8) if kept is None else kept)


def probe(shape: tuple[int | str, ...], source: str, dtype: Any = "float32") -> Stage:
    """A stage with one input."""
    return Stage("probe", "w", (Tensor("x", shape, dtype, source),), (Output("y", ("B",)),))


def value(sources: Sources, shape: tuple[int | str, ...], source: str, place: Place, dtype: Any = "float32") -> Any:
    return sources.inputs(probe(shape, source, dtype), place)["x"]


# Texts


def test_texts_are_the_samples_own_and_the_negative_one_is_common() -> None:
    sources = sources_of(request_of(["ab", "cd"], negative_prompt="no"))
    for sample, text in enumerate(("ab", "cd")):
        for negative, source, wanted in (
            (False, "text:prompt", text),
            (False, "text:negative", "no"),
            (True, "text:prompt", "no"),
            (True, "text:negative", "no"),
        ):
            made = value(sources, ("B", "L"), source, Place(sample, 5, FILM, negative), "int64")
            np.testing.assert_array_equal(made, tokens_of(wanted))
            assert made.dtype == np.int64


# Controls


def test_numbers() -> None:
    sources = sources_of(request_of(grain=7, glow=0.5, mood="dark", fps=9))
    place = Place(0, 5, FILM)
    for source, shape, wanted in (
        ("control:grain", ("B",), [7]),
        ("control:mood", ("B",), [2]),
        ("control:fps", ("B",), [9]),
        ("control:glow", ("B", "F"), [[0.5] * 5]),
        ("control:fps", ("B", "F"), [[9] * 5]),
    ):
        made = value(sources, shape, source, place)
        assert made.dtype == np.float32
        assert made.tolist() == wanted


@pytest.mark.parametrize(("given", "wanted"), [(1.5, [1.5] * 5), ([0, 1, 2, 1, 0], [0, 1, 2, 1, 0])])
def test_a_curve_of_numbers(given: Any, wanted: list[float]) -> None:
    made = value(sources_of(request_of(shake=given)), ("B", "F"), "control:shake", Place(0, 5, FILM))
    assert made.dtype == np.float32
    assert made.tolist() == [wanted]


def test_a_curve_per_pair_is_resampled() -> None:
    made = value(sources_of(request_of(shake=[0, 1, 2, 1])), ("B", "F"), "control:shake", Place(0, 5, FILM))
    wanted = resample_in_time(np.float32([[0], [1], [2], [1]]), 5)[:, 0]
    np.testing.assert_array_equal(made, wanted[None])


def test_sinusoids_are_resampled_after_the_sinusoid() -> None:
    curve = [0.0, 500.0, 100.0, 20.0]
    made = value(sources_of(request_of(sway=curve)), ("B", "F", "Q"), "control:sway", Place(0, 5, FILM))
    np.testing.assert_array_equal(made, resample_in_time(sinusoid(curve, 4), 5)[None])
    none = value(sources_of(request_of(sway="unspecified")), ("B", "F", 10), "control:sway", Place(0, 5, FILM))
    assert none.shape == (1, 5, 10)
    assert not none.any()


def test_similarities() -> None:
    i, k = np.arange(5)[:, None] / 4, np.arange(6) / 5
    for given, wanted in ((0.5, 1 - 0.5 * abs(i - k)), ("unspecified", -abs(i - k)), (None, -abs(i - k))):
        made = value(sources_of(request_of(drift=given)), ("B", "F", "R"), "control:drift", Place(0, 5, FILM))
        np.testing.assert_allclose(made, wanted[None], atol=1e-6)
        assert made.dtype == np.float32
    matrix = np.random.default_rng(0).random((5, 5))
    made = value(sources_of(request_of(drift=matrix)), ("B", "F", "R"), "control:drift", Place(0, 5, FILM))
    np.testing.assert_array_equal(made[0], similarity_rows("drift", matrix, 5, 6))


def test_a_loops_own_value_of_a_control_holds_only_in_that_loop() -> None:
    sources = sources_of(request_of(shake=2))
    for place, wanted in ((Place(0, 1, DRAFT), [[0.0]]), (Place(0, 5, FILM), [[2.0] * 5]), (Place(0, 5), [[2.0] * 5])):
        assert value(sources, ("B", "F"), "control:shake", place).tolist() == wanted
    backend = Formulas()
    sources = sources_of(request_of(shake=2), backend)
    sources.batch(MANIFEST.stage("draft_one"), DRAFT)
    sources.inputs(MANIFEST.stage("draft_one"), Place(0, 1, FILM))
    assert [given["shake"].tolist() for given in backend.of("mixer")] == [[[0.0]], [[2.0]]]


# Pictures and clips


def test_a_picture_is_the_samples_own() -> None:
    sources = sources_of(request_of(["a", "b"], sketch=PICTURES[:2]))
    for sample in (0, 1):
        made = value(sources, ("B", 3, "Y", "X"), "picture:sketch", Place(sample, 1, DRAFT))
        assert made.shape == (1, 3, 8, 12)
        wanted = load_picture(MANIFEST.control("sketch"), PICTURES[sample], 1, 12, 8).pixels
        np.testing.assert_array_equal(made[0], wanted)


@pytest.mark.parametrize("size", [(3, 4), (16, 5), (8, 12)])
def test_a_resampled_picture_equals_diffusers(size: tuple[int, int]) -> None:
    request = request_of(sketch=PICTURES[0])
    made = value(sources_of(request), ("B", 3, *size), "picture:sketch:clip", Place(0, 1, DRAFT))
    pixels = torch.from_numpy(request.controls["sketch"][0].pixels)[None]
    np.testing.assert_allclose(made, _resize_with_antialiasing(pixels, size).numpy(), atol=5e-5, rtol=0)
    assert made.dtype == np.float32


def test_a_picture_may_be_resampled_to_sizes_of_the_request() -> None:
    made = value(sources_of(request_of(sketch=PICTURES[0])), ("B", 3, "H", "W"), "picture:sketch:clip", Place(0, 5))
    assert made.shape == (1, 3, 4, 6)
    symbol = replace(MANIFEST, sizes=replace(MANIFEST.sizes, symbols={**MANIFEST.fixed, "S": 7}))
    sources = sources_of(request_of(sketch=PICTURES[0], manifest=symbol), Formulas(symbol))
    assert value(sources, ("B", 3, "S", "S"), "picture:sketch:clip", Place(0, 5)).shape == (1, 3, 7, 7)


def test_pixels_of_a_stage_are_a_picture_as_if_they_had_been_saved() -> None:
    """Pixels become bytes and are read again, resampled to the input's own size. A clip gives its first frame."""
    noisy = Tensor("dots", ("N", 3, "Y", "X"), source="noise:5")
    clip = Tensor("dots", ("B", 3, "F", "Y", "X"), source="noise:6")
    brush = Stage("brush", "w.safetensors", (noisy,), (Output("pixels", noisy.shape),))
    reel = Stage("reel", "w.safetensors", (clip,), (Output("pixels", clip.shape),))
    manifest = replace(MANIFEST, stages=(*MANIFEST.stages, brush, reel))
    backend = Formulas(manifest, {name: lambda dots: {"pixels": dots} for name in ("brush", "reel")})
    sources = sources_of(request_of(manifest=manifest), backend)
    place = Place(0, 3, FILM)
    made = value(sources, ("B", 3, "Y", "X"), "picture:brush.pixels", place)
    dots = backend.of("brush")[0]["dots"]
    assert np.abs(dots).max() > 1  # values beyond 1 are clamped
    saved = to_uint8(dots)[0]
    wanted = load_picture(MANIFEST.control("sketch"), saved, 1, 12, 8).pixels
    np.testing.assert_array_equal(made[0], wanted)
    small = value(sources, ("B", 3, 3, 4), "picture:brush.pixels:clip", place)
    given = sources_of(request_of(sketch=saved))
    np.testing.assert_array_equal(small, value(given, ("B", 3, 3, 4), "picture:sketch:clip", Place(0, 1, DRAFT)))
    first = value(sources, ("B", 3, "Y", "X"), "picture:reel.pixels", place)
    np.testing.assert_array_equal(
        first[0],
        load_picture(MANIFEST.control("sketch"), to_uint8(backend.of("reel")[0]["dots"][:, :, 0])[0], 1, 12, 8).pixels,
    )
    assert len(backend.of("brush")) == 1


def test_pixels_that_are_not_numbers_are_refused() -> None:
    noisy = Tensor("dots", ("N", 3, "Y", "X"), source="noise:5")
    brush = Stage("brush", "w.safetensors", (noisy,), (Output("pixels", noisy.shape),))
    manifest = replace(MANIFEST, stages=(*MANIFEST.stages, brush))
    backend = Formulas(manifest, {"brush": lambda dots: {"pixels": dots * np.nan}})
    with pytest.raises(BackendError, match="NaN"):
        value(
            sources_of(request_of(manifest=manifest), backend), noisy.shape, "picture:brush.pixels", Place(0, 1, DRAFT)
        )


def test_a_clip_as_a_video_and_as_frames() -> None:
    request = request_of(footage=CLIP)
    pixels = request.controls["footage"][0].pixels
    sources = sources_of(request)
    video = value(sources, ("B", 3, "F", "Y", "X"), "clip:footage", Place(0, 5, FILM))
    assert video.shape == (1, 3, 5, 8, 12)
    np.testing.assert_array_equal(video[0], pixels)
    frames = value(sources, ("N", 3, "Y", "X"), "clip:footage", Place(0, 5, FILM))
    np.testing.assert_array_equal(frames, pixels.swapaxes(0, 1))
    first = value(sources, ("N", 3, "Y", "X"), "clip:footage", Place(0, 1, DRAFT))
    np.testing.assert_array_equal(first, frames[:1])  # the number of frames of the loop that asks


def test_a_stage_that_takes_frames_one_by_one_is_given_chunks() -> None:
    backend = Formulas()
    request = request_of(footage=CLIP)
    made = sources_of(request, backend).made("watch.seen", FILM)
    assert [len(given["pixels"]) for given in backend.of("watch")] == [2, 2, 1]
    pixels = request.controls["footage"][0].pixels.swapaxes(0, 1)
    np.testing.assert_array_equal(made, see(pixels)["seen"].swapaxes(0, 1)[None].astype(np.float32))
    assert made.shape == (1, 2, 5, 4, 6)


def test_latents_of_single_frames_as_those_of_a_clip() -> None:
    frames = np.arange(2 * 3 * 4 * 5).reshape(2, 3, 4, 5)
    video = as_video(frames)
    assert video.shape == (1, 3, 2, 4, 5)
    for frame in range(2):
        np.testing.assert_array_equal(video[0, :, frame], frames[frame])


# Noise


def philox(seed: int, purpose: int, count: int) -> NDArray[np.float32]:
    """The contract of higen/noise.py in plain numpy."""
    raw = np.random.Philox(key=np.array([seed, purpose], np.uint64)).random_raw(count + count % 2) >> np.uint64(11)
    radius = np.sqrt(-2 * np.log((raw[::2].astype(float) + 1) * 2.0**-53))
    angle = 2 * np.pi * raw[1::2].astype(float) * 2.0**-53
    return np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1).ravel()[:count].astype(np.float32)


def test_noise_is_philox_in_the_inputs_shape() -> None:
    sources = sources_of(request_of(["a", "b"], seed=[7, 2**64 - 1]))
    for sample, seed in enumerate((7, 2**64 - 1)):
        place = Place(sample, 5, FILM)
        flat = value(sources, ("B", "C", 3, "K"), "noise:77", place)
        np.testing.assert_array_equal(flat, philox(seed, 77, 18).reshape(1, 2, 3, 3))
        by_frame = value(sources, ("B", "C", "F", "H", "W"), "noise:78", place)
        drawn = philox(seed, 78, 5 * 2 * 4 * 6).reshape(5, 1, 2, 4, 6)
        np.testing.assert_array_equal(by_frame, np.moveaxis(drawn, 0, 2))
        pixels = value(sources, ("N", 3, "Y", "X"), "noise:79", place)
        np.testing.assert_array_equal(pixels, philox(seed, 79, 3 * 8 * 12).reshape(1, 3, 8, 12))


# Results of stages and loops


def test_a_stages_output_and_its_negative_branch() -> None:
    sources = sources_of(request_of(["ab", "cd"], negative_prompt="no", shake=1, grain=4))
    for sample, text in enumerate(("ab", "cd")):
        place = Place(sample, 5, FILM)
        for source, read in (("mixer.hints", text), ("mixer@negative.hints", "no")):
            words = reader(tokens_of(read))["words"].astype(np.float32)
            wanted = mixer(words, np.full((1, 5), 1, np.float32), np.full(1, 4, np.float32))["hints"]
            made = value(sources, ("B", "F", "K"), source, place)
            np.testing.assert_allclose(made, wanted, atol=1e-6)


def test_each_stage_is_run_once_per_distinct_input() -> None:
    backend = Formulas()
    sources = sources_of(request_of(["a", "b", "a"], negative_prompt="a", seed=[1, 2, 3]), backend)
    film = MANIFEST.stage("film_two")
    draft = MANIFEST.stage("draft_two")
    sources.batch(draft, DRAFT)
    sources.finish(DRAFT, np.zeros((3, 2, 1, 4, 6), np.float32))
    sources.batch(film, FILM)
    sources.batch(film, FILM)
    assert backend.names == ["reader", "mixer", "reader", "mixer", "mixer", "mixer"]
    assert [given["shake"].shape for given in backend.of("mixer")] == [(1, 1), (1, 1), (1, 5), (1, 5)]


def test_pictures_that_are_equal_are_encoded_once() -> None:
    backend = Formulas()
    sources = sources_of(request_of(["a", "b", "c"], sketch=[PICTURES[0], PICTURES[1], PICTURES[0].copy()]), backend)
    made = sources.made("look.seen", DRAFT)
    assert made.shape == (3, 2, 1, 4, 6)
    assert backend.names == ["look", "look"]
    np.testing.assert_array_equal(made[0], made[2])
    assert np.abs(made[0] - made[1]).max() > 0.1


def test_samples_are_joined_along_the_first_axis() -> None:
    sources = sources_of(request_of(["a", "b"]))
    latents = np.random.default_rng(0).random((2, 2, 1, 4, 6), np.float32)
    sources.finish(DRAFT, latents)
    batch = sources.batch(MANIFEST.stage("film_one"), FILM)
    assert {name: array.shape for name, array in batch.items()} == {"hints": (2, 5, 3), "still": (2, 2, 4, 6)}
    np.testing.assert_array_equal(batch["still"], latents[:, :, 0])


def test_latents_of_an_earlier_loop() -> None:
    sources = sources_of(request_of(["a", "b"]))
    latents = np.random.default_rng(0).random((2, 2, 5, 4, 6), np.float32)
    sources.finish(DRAFT, latents)
    assert sources.latents("draft") is latents
    for sample in (0, 1):
        place = Place(sample, 5, FILM)
        frame = value(sources, ("B", "C", "H", "W"), "draft.latents", place)
        np.testing.assert_array_equal(frame, latents[sample : sample + 1, :, 0])
        whole = value(sources, ("B", "C", "F", "H", "W"), "draft.latents", place)
        np.testing.assert_array_equal(whole, latents[sample : sample + 1])
    np.testing.assert_array_equal(sources.made("draft.latents", FILM), latents)


def test_a_long_chain_of_stages_that_each_feed_the_next_twice_is_run_once() -> None:
    """There are 2^60 paths through the chain. Each stage is visited and run only once."""
    chain = tuple(
        Stage(
            f"s{i}",
            "w.safetensors",
            (
                Tensor("a", ("B", "K"), source=f"s{i - 1}.x" if i else "reader.words"),
                Tensor("b", ("B", "K"), source=f"s{i - 1}.x" if i else "reader@negative.words"),
            ),
            (Output("x", ("B", "K")),),
        )
        for i in range(60)
    )
    manifest = replace(MANIFEST, stages=(*MANIFEST.stages, *chain))
    backend = Formulas(manifest, {f"s{i}": lambda a, b: {"x": (a + b) / 2} for i in range(60)})
    sources = sources_of(request_of("ab", manifest, negative_prompt="no"), backend)
    made = value(sources, ("B", "K"), "s59.x", Place(0, 5, FILM))
    words = [reader(tokens_of(text))["words"] for text in ("ab", "no")]
    np.testing.assert_allclose(made, (words[0] + words[1]) / 2, atol=1e-6)
    assert backend.names == ["reader", "reader", *(f"s{i}" for i in range(60))]


# What is kept between requests


def test_results_from_only_texts_and_numbers_are_kept() -> None:
    backend, kept = Formulas(), BoundedCache[dict[str, Any]](8)
    draft = MANIFEST.stage("draft_two")
    first = sources_of(request_of("a", seed=1), backend, kept).batch(draft, DRAFT)
    again = sources_of(request_of("a", seed=2, fps=3), backend, kept).batch(draft, DRAFT)
    assert backend.names == ["reader", "mixer"] * 2  # the prompt and the empty text, each once
    for name, array in first.items():
        np.testing.assert_array_equal(array, again[name])
    sources_of(request_of("a", grain=9), backend, kept).batch(draft, DRAFT)
    assert backend.names == ["reader", "mixer"] * 2 + ["mixer"] * 2


@pytest.mark.parametrize("source", ["picture:sketch", "noise:5", "clip:footage"])
def test_results_from_pictures_or_noise_are_not_kept(source: str) -> None:
    shape = ("N", 3, "Y", "X") if source == "clip:footage" else ("B", 3, "Y", "X")
    extra = Tensor("more", shape, source=source)
    manifest = changed(MANIFEST, "mixer", inputs=(*MANIFEST.stage("mixer").inputs, extra), batch=False)
    kept: Kept = BoundedCache(8)
    backend = Formulas(manifest, {"mixer": lambda more, **rest: mixer(**rest)})
    for _ in range(2):
        sources = sources_of(request_of(manifest=manifest, sketch=PICTURES[0], footage=CLIP), backend, kept)
        sources.finish(DRAFT, np.zeros((1, 2, 1, 4, 6), np.float32))
        for _ in range(2):
            sources.inputs(manifest.stage("film_one"), Place(0, 1, FILM))
    assert backend.names == ["reader", "mixer", "mixer"]
    assert len(kept) == 1  # the text


def test_a_picture_that_is_not_given_is_refused_before_it_is_asked_for() -> None:
    manifest = changed(MANIFEST, "mixer", inputs=(*MANIFEST.stage("mixer").inputs, MANIFEST.stage("look").inputs[0]))
    with pytest.raises(RequestError, match=r"^sketch: the loop draft needs one"):
        request_of(manifest=manifest)
