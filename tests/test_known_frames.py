"""Known frames and their masks, compared with a computation in numpy; refused input."""

from __future__ import annotations

import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
from interpreter_model import COLUMNS, FORMULAS, Formulas, changed, linear
from known_model import MANIFEST, cells, told, told_step
from numpy.typing import NDArray

from higen import bundle as files
from higen import noise
from higen.bundle import Bundle
from higen.errors import ManifestError, PictureWarning, RequestError
from higen.manifest import Manifest
from higen.pipeline import Pipeline
from higen.sampler import Step
from higen.schedule import solver_table
from higen.stages import Tensor
from higen.tables import Control, Known, Variant, Windows
from higen.tokenizer import build_word_tokenizer, write_tokenizer
from higen.trial import ways

PICTURES = [np.random.default_rng(i).integers(0, 256, (8, 12, 3), np.uint8) for i in range(5)]
KEYS: dict[Any, Any] = {0: PICTURES[0], -2: PICTURES[1]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "known"
    with files.create_model(path, MANIFEST) as inside:
        write_tokenizer(build_word_tokenizer(("a", "red", "kite", "climbs")), inside / "words.json")
    return path


def pipeline_of(folder: Path, manifest: Manifest = MANIFEST, **formulas: Any) -> tuple[Pipeline, Formulas]:
    backend = Formulas(manifest, {**FORMULAS, **formulas})
    return Pipeline(replace(Bundle.open(folder), manifest=manifest), backend), backend


def film(pipeline: Pipeline, **options: Any) -> list[Step]:
    events = pipeline.stream("a red kite", seed=11, **{"frames": 5, "shake": 1.5, **options})
    return [event for event in events if isinstance(event, Step) and event.loop == "film"]


def by_hand(
    backend: Formulas,
    known: NDArray[Any],
    mask: NDArray[Any],
    solver: str,
    told: float = 0.0,
    rows: int = 3,
    stage: str = "film_two",
) -> NDArray[Any]:
    """The latents as docs/manifest.md defines them: x0 is edited, then the step uses the m that gives the new x0.

    Computed in float64 from the pipeline's conditions.
    """
    loop = MANIFEST.loop("film")
    table = solver_table(loop.schedule, "epsilon", loop.solver(solver), rows)
    first = backend.of(stage)[0]
    draw = lambda purpose: noise.normal(11, purpose, 5 * 2 * 24).astype(float).reshape(5, 2, 4, 6).swapaxes(0, 1)[None]  # noqa: E731
    offset = noise.normal(11, 23, 5 * 2).astype(float).reshape(5, 2).T[None, :, :, None, None]
    x = table.initial * draw(22) + 0.25 * offset
    previous = np.zeros_like(x)
    scale = np.linspace(1, 3, 5)[None, None, :, None, None]
    for i in range(rows):
        A, B, C, alpha, sigma = (float(getattr(table, name)[i]) for name in COLUMNS[1:])
        if table.noise[i]:
            previous = draw(noise.row_purpose(22, i))
        given, empty = (
            linear(x, table.t[i], first[name].astype(float)) + told * mask * known for name in ("hints", "empty_hints")
        )
        m = empty + scale * (given - empty)
        x0 = alpha * x - sigma * m
        wanted = x0 + mask * (known - x0)
        m = (alpha * x - wanted) / sigma
        x, previous = A * x + B * m + C * previous, wanted
    return np.where(mask == 1, known, x)


def test_a_variant_for_known_frames_is_used_for_whole_frames(folder: Path) -> None:
    names = ("film_two", "film_one")
    rows = (replace(told(MANIFEST, flat=True).stage(name), name=f"told_{name}") for name in names)
    variant = Variant("keyframes", *(f"told_{name}" for name in names))
    manifest = changed(replace(MANIFEST, stages=(*MANIFEST.stages, *rows)), "film", variant=variant)
    mask = np.zeros((8, 12), np.uint8)
    mask[:, 6:] = 255
    for options, used in (
        ({}, "film_two"),
        ({"keyframes": KEYS}, "told_film_two"),
        ({"keyframes": KEYS, "mask": mask}, "film_two"),
    ):
        pipeline, backend = pipeline_of(
            folder, manifest, **dict.fromkeys(("told_film_two", "told_film_one"), told_step)
        )
        made = film(pipeline, **options)[-1].latents
        assert {name for name in ("film_two", "told_film_two") if backend.of(name)} == {used}
        if used == "told_film_two":
            wanted = by_hand(backend, *known_and_mask(), "ddim", 0.2, stage=used)
            np.testing.assert_allclose(made, wanted, atol=3e-5)
    asked = [pipeline.request("a red kite", **way) for way in ways(manifest, {})]  # as quantisation and warm-up ask
    stages = {pair[0] for request in asked for pair in pipeline.stages(request)}
    assert {*manifest.denoising} <= stages


def known_and_mask() -> tuple[NDArray[Any], NDArray[Any]]:
    known, mask = np.zeros((1, 2, 5, 4, 6)), np.zeros((1, 1, 5, 1, 1))
    for frame, picture in ((0, PICTURES[0]), (3, PICTURES[1])):
        known[0, :, frame], mask[0, 0, frame] = cells(picture), 1
    return known, mask


@pytest.mark.parametrize("solver", ["ddim", "euler_ancestral", "lcm"])
def test_a_film_passes_through_its_known_frames(folder: Path, solver: str) -> None:
    pipeline, backend = pipeline_of(folder)
    made = film(pipeline, keyframes=KEYS, solver=("ddim", solver))
    known, mask = known_and_mask()
    np.testing.assert_allclose(made[-1].latents, by_hand(backend, known, mask, solver), atol=3e-5)
    for step in made:  # in every row the estimate equals the known frames
        np.testing.assert_allclose(step.previous[:, :, [0, 3]], known[:, :, [0, 3]], atol=1e-6)
    np.testing.assert_allclose(made[-1].latents[:, :, [0, 3]], known[:, :, [0, 3]], atol=1e-6)
    free = film(pipeline, solver=("ddim", solver))[-1].latents
    assert np.abs(made[-1].latents - free)[:, :, [0, 3]].max() > 0.1
    # The network treats each frame separately.
    np.testing.assert_allclose(made[-1].latents[:, :, [1, 2, 4]], free[:, :, [1, 2, 4]], atol=1e-6)


def test_a_mask_keeps_a_part(folder: Path) -> None:
    """The mask's mean over a cell is the fraction that is redrawn. A clip of masks has one mask per frame."""
    masks = np.zeros((5, 8, 12), np.uint8)
    masks[:, :, 6:] = 255  # three columns of cells
    masks[3, 0, 0] = 255  # a quarter of one cell
    pipeline, backend = pipeline_of(folder)
    made = film(pipeline, keyframes=KEYS, mask=masks)[-1].latents
    known, mask = known_and_mask()
    cell = np.ones((5, 4, 6))
    cell[:, :, 3:] = 0
    cell[3, 0, 0] = 0.75
    mask = mask * cell[None, None]
    np.testing.assert_allclose(made, by_hand(backend, known, mask, "ddim"), atol=3e-5)
    one = film(pipeline, keyframes=KEYS, mask=masks[0])[-1].latents
    np.testing.assert_allclose(one[:, :, 0], made[:, :, 0], atol=1e-6)
    np.testing.assert_array_equal(film(pipeline, keyframes=KEYS, mask=masks[0] > 0)[-1].latents, one)
    np.testing.assert_array_equal(film(pipeline, keyframes=KEYS, mask=masks[0] / 255)[-1].latents, one)
    picture = PIL.Image.fromarray(masks[0])
    np.testing.assert_array_equal(film(pipeline, keyframes=KEYS, mask=picture)[-1].latents, one)


@pytest.mark.parametrize("flat", [True, False])
def test_a_stage_with_these_inputs_gets_the_known_frames(folder: Path, flat: bool) -> None:
    manifest = told(MANIFEST, flat)
    pipeline, backend = pipeline_of(folder, manifest, film_one=told_step, film_two=told_step)
    made = film(pipeline, keyframes=KEYS)[-1].latents
    known, mask = known_and_mask()
    given = backend.of("film_two")[0]
    np.testing.assert_allclose(given["known"], known, atol=1e-6)
    np.testing.assert_array_equal(
        given["mask"], mask[0, :, :, 0, 0] if flat else np.broadcast_to(mask, (1, 1, 5, 4, 6))
    )
    np.testing.assert_allclose(made, by_hand(backend, known, mask, "ddim", told=0.2), atol=3e-5)
    backend.given.clear()
    film(pipeline)
    assert not any(given[name].any() for given in backend.of("film_two") for name in ("known", "mask"))


def test_samples_have_their_own_known_frames(folder: Path) -> None:
    pipeline, _ = pipeline_of(folder)
    keys = [{0: PICTURES[0]}, {1: PICTURES[2], 4: PICTURES[3]}]
    batch = pipeline(["a kite", "a red kite"], seed=[1, 2], keyframes=keys)
    for i, prompt in enumerate(("a kite", "a red kite")):
        alone = pipeline(prompt, seed=i + 1, keyframes=keys[i])
        np.testing.assert_array_equal(batch[i].frames, alone.frames)
    assert [video.metadata["keyframes"] for video in batch] == [[0], [1, 4]]
    both = pipeline(["a kite", "a kite"], seed=1, keyframes=keys[0])
    np.testing.assert_array_equal(both[0].frames, both[1].frames)


def test_windows_are_mixed_before_the_edit(folder: Path) -> None:
    """If a linear network treats frames separately, windows change nothing, with or without known-frame inputs."""
    for manifest, own in ((MANIFEST, {}), (told(MANIFEST, True), {"film_one": told_step, "film_two": told_step})):
        whole = film(pipeline_of(folder, manifest, **own)[0], keyframes=KEYS)[-1].latents
        windowed = changed(manifest, "film", windows=Windows(3, 2))
        parts = film(pipeline_of(folder, windowed, **own)[0], keyframes=KEYS)[-1].latents
        np.testing.assert_allclose(parts, whole, atol=1e-5)


def test_known_frames_are_read_as_pictures_and_resized(folder: Path, tmp_path: Path) -> None:
    pipeline, _ = pipeline_of(folder)
    PIL.Image.fromarray(PICTURES[0]).save(tmp_path / "first.png")
    from_file = film(pipeline, keyframes={"0": str(tmp_path / "first.png"), "-2": PICTURES[1]})[-1].latents
    np.testing.assert_array_equal(from_file, film(pipeline, keyframes=KEYS)[-1].latents)
    large = PIL.Image.fromarray(PICTURES[0]).resize((24, 16), PIL.Image.Resampling.NEAREST)
    with pytest.warns(PictureWarning, match=r"^keyframes\[4\] has 24x16 pixels: scaled to cover 12x8, and cropped"):
        film(pipeline, keyframes={4: large})
    said: list[Warning] = []
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        film(pipeline, keyframes=KEYS, mask=np.zeros((16, 24), np.uint8), warn=said.append)
    assert [str(warning) for warning in said] == ["mask has 24x16 pixels: scaled to cover 12x8, and cropped"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"keyframes": {5: PICTURES[0]}}, r"^keyframes: frame 5: the clip has 5 frames: 0 to 4, or -1 to -5"),
        ({"keyframes": {-6: PICTURES[0]}}, r"^keyframes: frame -6: the clip has 5 frames"),
        ({"keyframes": {4: PICTURES[0], -1: PICTURES[1]}}, r"^keyframes: frame -1: frame 4 is given twice"),
        ({"keyframes": {"last": PICTURES[0]}}, r"^keyframes: frame 'last': the index of a frame, a whole number"),
        ({"keyframes": {True: PICTURES[0]}}, r"^keyframes: frame True: the index of a frame"),
        ({"keyframes": {1.5: PICTURES[0]}}, r"^keyframes: frame 1.5: the index of a frame"),
        ({"keyframes": {}}, r"^keyframes={}: a picture for each known frame, by its index"),
        ({"keyframes": "a.png"}, r"^keyframes='a.png': cannot be read as a picture \(.*or as a clip"),
        ({"keyframes": PICTURES[0]}, r"^keyframes is one picture: say for which frame, {0: picture}"),
        ({"keyframes": np.zeros((0, 8, 12, 3), np.uint8)}, "^keyframes has 0 frames"),
        ({"keyframes": ""}, "^keyframes=.*: a path is wanted"),
        ({"keyframes": {0: "nowhere.png"}}, r"^keyframes\[0\]='nowhere.png': cannot be read as a picture"),
        ({"keyframes": {0: 3}}, r"^keyframes\[0\] is a int"),
        ({"keyframes": [KEYS, KEYS]}, r"^keyframes has 2 entries: one picture, or one per prompt \(1\)"),
        ({"mask": np.zeros((8, 12), np.uint8)}, r"^mask: no frames are known: give keyframes as well"),
        (
            {"keyframes": KEYS, "mask": np.zeros((4, 8, 12), np.uint8)},
            r"^mask has 4 frames: one picture, or the clip's 5",
        ),
        ({"keyframes": KEYS, "mask": np.zeros(8, np.uint8)}, r"^mask is uint8 \[8, 3\]"),
        ({"keyframes": KEYS, "mask": np.full((8, 12), 2.0)}, r"^mask has values from 2 to 2"),
        (
            {"keyframes": KEYS, "mask": "nowhere.png"},
            r"^mask='nowhere.png': cannot be read as a picture \(.*or as a clip",
        ),
        (
            {"keyframes": {0: PICTURES[0]}, "frames": 1},
            r"^keyframes: a request for 1 frames takes no pictures by index",
        ),
    ],
)
def test_what_is_refused(folder: Path, options: dict[str, Any], message: str) -> None:
    pipeline, backend = pipeline_of(folder)
    with pytest.raises(RequestError, match=message):
        pipeline("a kite", **options)
    assert not backend.given


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (Known("sketch", "watch@sketch.seen"), r"loops.film.known.control='sketch': a control of kind frames"),
        (Known("keyframes", "watch.seen"), r"loops.film.known.latents='watch.seen': STAGE@keyframes.OUTPUT"),
        (Known("keyframes", "look@keyframes.seen"), r"known.latents: .* look takes no pixels \[N, 3, Y, X\]"),
        (Known("keyframes", "watch@keyframes.lost"), r"known.latents: source watch.lost: watch gives seen"),
        (Known("keyframes", "watch@keyframes.seen", "sketch"), r"known.mask='sketch': null, or a control of kind mask"),
    ],
)
def test_invalid_tables(row: Known, message: str) -> None:
    with pytest.raises(ManifestError, match=message):
        changed(MANIFEST, "film", known=row)


@pytest.mark.parametrize(
    ("tensor", "said"),
    [
        (Tensor("x", ("B", 3, "F", "Y", "X"), source="frames:sketch"), "the controls of kind frames are"),
        (Tensor("x", ("B", 3, "F", "H", "W"), source="frames:keyframes"), r"float32 \[B, 3, F, Y, X\], not"),
        (Tensor("x", ("B", 2, "F", "Y", "X"), source="frames:keyframes"), r"float32 \[B, 3, F, Y, X\], not"),
        (Tensor("x", ("B", 1, "F"), source="places:keyframes"), r"float32 \[B, F\], not"),
        (Tensor("x", ("B", 2, "H", "W"), source="watch@keyframes.seen"), r"is \[B, C, F, H, W\], not"),
    ],
)
def test_invalid_inputs_of_frames(tensor: Tensor, said: str) -> None:
    stage = MANIFEST.stage("film_two")
    rows = [replace(row, inputs=(*row.inputs, tensor)) if row is stage else row for row in MANIFEST.stages]
    with pytest.raises(ManifestError, match=f"film_two.x: .*{said}"):
        replace(MANIFEST, stages=tuple(rows))


def test_more_invalid_tables() -> None:
    with pytest.raises(ManifestError, match=r"loops.film.known=null: a stage of it takes known:latents, known:mask"):
        changed(told(MANIFEST, True), "film", known=None)
    with pytest.raises(ManifestError, match=r"loops.draft.known: draft has one frame"):
        changed(MANIFEST, "draft", known=MANIFEST.loop("film").known)
    with pytest.raises(ManifestError, match="default=3: none, or a text"):
        Control("keyframes", "frames", "", default=3)
    with pytest.raises(ManifestError, match="name='negative': a name that is not reserved"):
        Control("negative", "frames", "")
