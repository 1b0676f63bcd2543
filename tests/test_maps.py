"""Maps of a request: the loop's stages for maps, their inputs, windows and tiles, and refused input."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
from interpreter_model import FORMULAS, Array, Formula, Formulas, changed, linear, step
from interpreter_model import MANIFEST as PLAIN

from higen import bundle as files
from higen.bundle import Bundle
from higen.edges import edges
from higen.engines.triton.interface import inputs, read_request
from higen.errors import ManifestError, PictureWarning, RequestError
from higen.export.graphs import _free_axes
from higen.families.composed.spec import compose
from higen.manifest import Manifest
from higen.pipeline import Pipeline
from higen.sampler import Step
from higen.serve.asks import schema_of
from higen.stages import Tensor
from higen.tables import Control, Tiles, Variant, Windows
from higen.tokenizer import build_word_tokenizer, write_tokenizer
from higen.trial import ways
from higen.video import Video

SHOWN = np.random.default_rng(3).integers(0, 256, (6, 8, 12, 3), np.uint8)
STEPS = ("film_two", "film_one")


def mapped(encoding: Any = None, loop: str = "film", frames: int | str = "F") -> Manifest:
    """`interpreter_model` with additional stages for a map in the film or in another loop."""
    more = (
        Tensor("plot", ("B", 3, frames, "Y", "X"), source="clip:plot"),
        Tensor("hold", ("B", frames), source="control:hold"),
    )
    steps = [f"{loop}_two", f"{loop}_one"]
    rows = [PLAIN.stage(name) for name in steps]
    controls = (
        Control("plot", "map", "a plot for each frame", encoding),
        Control("hold", "curve", "strength of the plot", "curve", low=0.0, default=1.0),
    )
    manifest = replace(
        PLAIN,
        controls=(*PLAIN.controls, *controls),
        stages=(*PLAIN.stages, *(replace(row, name=f"plot_{row.name}", inputs=(*row.inputs, *more)) for row in rows)),
    )
    return changed(manifest, loop, variant=Variant("plot", *(f"plot_{name}" for name in steps)))


MANIFEST = mapped()


def cells(pixels: Array) -> Array:
    """The mean of the first colour over each cell: [B,3,F,Y,X] -> [B,1,F,Y/2,X/2]."""
    b, _, f, height, width = pixels.shape
    means: Array = pixels[:, 0].reshape(b, f, height // 2, 2, width // 2, 2).mean(axis=(3, 5))[:, None]
    return means


def plotted(**given: Array) -> dict[str, Array]:
    """A step of `linear` plus the map's cells, weighted by `hold`."""
    shown = given["hold"][:, None, :, None, None] * cells(given["plot"].astype(np.float64))
    own: Formula = step(lambda x, t, hints: linear(x, t, hints) + shown)
    return own(**{name: value for name, value in given.items() if name not in ("plot", "hold")})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "mapped"
    with files.create_model(path, MANIFEST) as inside:
        write_tokenizer(build_word_tokenizer(("a", "red", "kite")), inside / "words.json")
    return path


def pipeline_of(folder: Path, manifest: Manifest = MANIFEST, **more: Any) -> tuple[Pipeline, Formulas]:
    backend = Formulas(manifest, {**FORMULAS, **{f"plot_{name}": plotted for name in STEPS}}, **more)
    return Pipeline(replace(Bundle.open(folder), manifest=manifest), backend), backend


def film(pipeline: Pipeline, **options: Any) -> Array:
    """The last latents of the film."""
    events = pipeline.stream("a red kite", seed=11, **{"frames": 5, **options})
    latents = [event.latents for event in events if isinstance(event, Step) and event.loop == "film"]
    return np.asarray(latents[-1])


def test_a_map_chooses_the_loops_other_stages(folder: Path) -> None:
    pipeline, backend = pipeline_of(folder)
    request = pipeline.request("a red kite", frames=5, plot=SHOWN)
    assert [ways for ways in pipeline.stages(request) if "film" in ways[0]] == [("plot_film_two",)]
    assert [ways for ways in pipeline.stages(pipeline.request("a")) if "film" in ways[0]] == [("film_two",)]
    given = film(pipeline, plot=SHOWN, hold=[0, 0.5, 1, 2, 0])
    assert backend.names.count("plot_film_two") == 3
    assert "film_two" not in backend.names
    fed = backend.of("plot_film_two")[0]
    np.testing.assert_allclose(fed["plot"][0].transpose(1, 2, 3, 0), SHOWN[:5] / 127.5 - 1, atol=1e-6)
    np.testing.assert_array_equal(fed["hold"], [[0, 0.5, 1, 2, 0]])
    free = film(pipeline)
    assert "film_two" in backend.names
    apart = np.abs(given - free).max(axis=(0, 1, 3, 4))
    assert (apart[[0, 4]] < 1e-6).all()  # the network treats frames separately
    assert (apart[1:4] > 0.1).all()
    film(pipeline, plot=SHOWN, guidance=1)
    assert "plot_film_one" in backend.names
    film(pipeline, plot=SHOWN, guidance=3, guidance_interval=[[0, 1], [0.4, 0.7]])
    assert backend.names[-8:].count("plot_film_one") == 2


def test_windows_and_tiles_cut_the_map(folder: Path) -> None:
    """The network treats each cell separately, so cutting the map changes only rounding."""
    whole = film(pipeline_of(folder)[0], plot=SHOWN, hold=[0, 0.5, 1, 2, 0])
    cut = changed(MANIFEST, "film", windows=Windows(3, 2), tiles=Tiles(3, 4, 2))
    pipeline, backend = pipeline_of(folder, cut)
    np.testing.assert_allclose(film(pipeline, plot=SHOWN, hold=[0, 0.5, 1, 2, 0]), whole, atol=1e-5)
    shapes = {given["plot"].shape for given in backend.of("plot_film_two")}
    assert shapes == {(1, 3, 3, 6, 8)}


def test_a_map_in_every_form(folder: Path, tmp_path: Path) -> None:
    pipeline, backend = pipeline_of(folder)
    pictures = tmp_path / "maps"
    pictures.mkdir()
    for i, frame in enumerate(SHOWN):  # numeric order: 2 before 10
        PIL.Image.fromarray(frame).save(pictures / f"{i * 2}.png")
    (pictures / "notes.txt").write_text("no picture")
    np.save(tmp_path / "clip.npy", SHOWN)
    wanted = film(pipeline, plot=SHOWN)
    forms = (
        pictures,
        str(tmp_path / "clip.npy"),
        Video(SHOWN, 8),
        [*SHOWN],
        [PIL.Image.fromarray(one) for one in SHOWN],
    )
    for form in (*forms, SHOWN.astype(np.float64) / 255):
        np.testing.assert_array_equal(film(pipeline, plot=form), wanted)
    one = film(pipeline, plot=SHOWN[2])
    fed = backend.of("plot_film_two")[-1]["plot"]
    np.testing.assert_array_equal(fed, np.repeat(fed[:, :, :1], 5, axis=2))
    np.testing.assert_array_equal(film(pipeline, plot=pictures / "4.png"), one)
    grey = SHOWN[:, :, :, 0]  # a depth map, for example
    np.testing.assert_array_equal(film(pipeline, plot=grey), film(pipeline, plot=grey[..., None].repeat(3, axis=3)))


def test_edges_are_found_at_the_requests_size(folder: Path) -> None:
    pipeline, backend = pipeline_of(folder, mapped("edges"))
    film(pipeline, plot=SHOWN)
    wanted = np.stack([edges(frame) for frame in SHOWN[:5]])
    assert 0 < wanted.mean() < 255
    fed = backend.of("plot_film_two")[0]["plot"][0].transpose(1, 2, 3, 0)
    np.testing.assert_allclose(fed, wanted / 127.5 - 1, atol=1e-6)
    with pytest.warns(PictureWarning, match="plot has 6x4 pixels: scaled to cover 12x8"):
        film(pipeline, plot=SHOWN[0, :4, :6])


@pytest.mark.parametrize(
    ("plot", "said"),
    [
        (SHOWN[:4], r"plot has 4 frames: one picture, or the clip's 5"),
        ("nowhere.png", r"plot='nowhere\.png': cannot be read as a picture"),
        (7, r"plot is a int: a path"),
        ([], r"plot is a list: a path"),
        (np.zeros((8, 12, 3), np.int32), r"plot is int32"),
        (np.full((8, 12, 3), 3.0), r"plot has values from 3 to 3"),
        (np.zeros((0, 8, 12, 3), np.uint8), r"plot has 0 frames"),
    ],
)
def test_invalid_maps(folder: Path, plot: Any, said: str) -> None:
    with pytest.raises(RequestError, match=said):
        pipeline_of(folder)[0].request("a kite", frames=5, plot=plot)


def test_a_folder_without_pictures_and_a_loop_without_use(folder: Path, tmp_path: Path) -> None:
    pipeline, _ = pipeline_of(folder)
    with pytest.raises(RequestError, match="no pictures in it"):
        pipeline.request("a kite", plot=tmp_path)
    with pytest.raises(RequestError, match="plot: no loop of this request takes it"):
        pipeline.request("a kite", frames=1, plot=SHOWN)


@pytest.mark.parametrize(
    ("variant", "said"),
    [
        (Variant("footage", "plot_film_two", "plot_film_one"), r"variant\.control='footage': the controls of kind map"),
        (
            Variant("plot", "plot_film_two", None),
            r"variant\.plain=None: null if and only if the loop's own plain is null",
        ),
        (Variant("plot", "paint", "plot_film_one"), r"variant\.guided='paint': gives latents, previous"),
        (
            Variant("plot", "plot_film_one", "plot_film_two"),
            r"variant\.guided='plot_film_one': its state inputs must be",
        ),
    ],
)
def test_a_variant_that_does_not_fit(variant: Variant, said: str) -> None:
    with pytest.raises(ManifestError, match=said):
        changed(MANIFEST, "film", variant=variant)


def test_pixels_and_cells_are_one_free_axis_of_a_graph() -> None:
    stage = MANIFEST.stage("plot_film_one")
    axes = dict(
        zip((tensor.name for tensor in stage.inputs), _free_axes(MANIFEST, stage, {*MANIFEST.fixed}), strict=True)
    )
    for cell, pixel in ((3, 3), (4, 4)):
        names = {str(axes[name][axis]).rpartition("*")[2] for name, axis in (("latents", cell), ("plot", pixel))}
        assert len(names) == 1


def test_servers_take_maps() -> None:
    row = schema_of(MANIFEST)["properties"]["plot"]
    assert (row["type"], row["x-kind"], row["contentMediaType"]) == ("string", "map", "image/*")
    fields = {field.name: (field.kind, field.dims) for field in inputs(MANIFEST) if field.argument == "plot"}
    assert fields == {"plot": ("UINT8", (-1, -1, -1, 3)), "plot_file": ("STRING", (-1,))}
    pictures = []
    for frame in SHOWN[:2]:
        file = io.BytesIO()
        PIL.Image.fromarray(frame).save(file, "png")
        pictures.append(file.getvalue())
    text = np.array([b"a kite"], dtype=np.object_)
    given, _ = read_request(MANIFEST, {"prompt": text, "plot_file": np.array(pictures, dtype=np.object_)})
    np.testing.assert_array_equal(np.stack([np.asarray(one) for one in given["plot"]]), SHOWN[:2])


def test_trial_requests_run_the_variants_stages(folder: Path) -> None:
    pipeline, _ = pipeline_of(folder)
    requests = [pipeline.request("a red kite", **way) for way in ways(MANIFEST, {})]
    called = {ways_of[0] for request in requests for ways_of in pipeline.stages(request)}
    assert {*MANIFEST.denoising} <= called


def test_both_models_of_a_composed_one_keep_their_maps(folder: Path) -> None:
    """The first loop has one frame and gets the map's first picture."""
    both = compose(mapped(loop="draft", frames=1), replace(MANIFEST, name="films"), same_tokenizer=True)
    assert [loop.variant for loop in both.loops] == [
        Variant("plot", "plot_draft_two", "plot_draft_one"),
        Variant("second_plot", "plot_film_two", "plot_film_one"),
    ]
    made = {name: FORMULAS.get(name.removeprefix("second_"), plotted) for name in both.stage_names}
    backend = Formulas(both, made)
    pipeline = Pipeline(replace(Bundle.open(folder), manifest=both), backend)
    events = [*pipeline.stream("a red kite", seed=1, frames=5, plot=SHOWN, second_plot=SHOWN[::-1])]
    assert {e.stage for e in events if isinstance(e, Step)} == {"plot_draft_two", "plot_film_two"}
    (first,) = backend.of("plot_draft_two")[0]["plot"].transpose(0, 2, 3, 4, 1)
    np.testing.assert_allclose(first[0], SHOWN[0] / 127.5 - 1, atol=1e-6)
    np.testing.assert_allclose(
        backend.of("plot_film_two")[0]["plot"][0].transpose(1, 2, 3, 0), SHOWN[::-1][:5] / 127.5 - 1, atol=1e-6
    )
