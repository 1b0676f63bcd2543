"""Composing two models: tables, files, and the same numbers as running the two models one after the other."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from interpreter_model import FORMULAS, MANIFEST, Formulas, changed
from safetensors.numpy import save_file

from higen.bundle import Bundle, create_model, put_file
from higen.cli import main
from higen.compose import compose as compose_folders
from higen.errors import IntegrityError, ManifestError, ModelError, RequestError
from higen.families.composed.checkpoint import convert, recognise
from higen.families.composed.spec import compose
from higen.manifest import Manifest
from higen.pipeline import Pipeline
from higen.stages import Output, Stage, Tensor, source
from higen.tables import Control, Mix, NoiseRule, Replaced
from higen.tokenizer import build_word_tokenizer, write_tokenizer

FIRST = replace(MANIFEST, name="draws", licence="one licence")


def needing_a_picture() -> Manifest:
    """The made-up model with only its film, which always starts from the latents of a picture."""
    film = replace(MANIFEST.loops[1], least_frames=1, noise=NoiseRule(21))
    stages = tuple(
        replace(
            row, inputs=tuple(replace(t, source=t.source.replace("draft.latents", "look.seen")) for t in row.inputs)
        )
        for row in MANIFEST.stages
        if not row.name.startswith("draft")
    )
    return replace(MANIFEST, name="films", licence="another", stages=stages, loops=(film,))


SECOND = needing_a_picture()


def write(manifest: Manifest, folder: Path, words: tuple[str, ...] = ("a", "red", "kite")) -> Bundle:
    """A model directory of these tables with made-up weights."""
    with create_model(folder, manifest) as inside:
        for name in manifest.weights:
            save_file({"w": np.full(3, len(manifest.name), np.float32)}, inside / name)
        if manifest.text is not None:
            write_tokenizer(build_word_tokenizer(words), inside / manifest.text.tokenizer)
    return Bundle.open(folder)


def formulas(manifest: Manifest) -> Mapping[str, Any]:
    """Each stage's formula, also for renamed stages."""
    return {name: FORMULAS[name.removeprefix("second_").removeprefix("second_")] for name in manifest.stage_names}


def pipeline(bundle: Bundle) -> tuple[Pipeline, Formulas]:
    backend = Formulas(bundle.manifest, formulas(bundle.manifest))
    return Pipeline(bundle, backend), backend


@pytest.mark.parametrize("second", [SECOND, replace(MANIFEST, name="films")], ids=["needs one", "may have one"])
@pytest.mark.parametrize("frames", [2, 5])
def test_a_composed_model_equals_the_two_in_sequence(tmp_path: Path, second: Manifest, frames: int) -> None:
    """The second model needs a picture, or a picture replaces one of its loops."""
    # Both models have a stream of noise of the same number, so the composed model renumbers one.
    renamed = replace(second, loops=(*second.loops[:-1], replace(second.loops[-1], noise=NoiseRule(22))))
    one, two, by_hand = (write(m, tmp_path / n) for m, n in ((FIRST, "one"), (second, "two"), (renamed, "by hand")))
    both, backend = pipeline(compose_folders(one.path, two.path, tmp_path / "both"))
    options: dict[str, Any] = {"seed": 5, "width": 8, "height": 12}
    picture = pipeline(one)[0].image("a kite", **options, shake=1.0)
    clip = pipeline(by_hand if second is SECOND else two)[0]
    wanted = clip("a kite", **options, frames=frames, sketch=picture, shake=0.25, grain=4).frames
    got = both("a kite", **options, frames=frames, shake=1.0, second_shake=0.25, second_grain=4)
    assert np.array_equal(got.frames, wanted)
    assert got.metadata["licence"] == both.manifest.licence
    # Each sample's picture is drawn only once.
    assert len(backend.of("paint")) == 1


def test_a_batch_is_its_samples(tmp_path: Path) -> None:
    write(FIRST, tmp_path / "one"), write(SECOND, tmp_path / "two")
    both, _ = pipeline(compose_folders(tmp_path / "one", tmp_path / "two", tmp_path / "both"))
    prompts, seeds = ["a kite", "red", "a red"], [1, 2, 3]
    together = both(prompts, seed=seeds, frames=3)
    for prompt, seed, video in zip(prompts, seeds, together, strict=True):
        assert np.array_equal(both(prompt, seed=seed, frames=3).frames, video.frames)


def test_the_first_models_picture_still_may_be_given(tmp_path: Path) -> None:
    """A control of the first model keeps its meaning. Here a picture replaces the first model's loop."""
    write(FIRST, tmp_path / "one"), write(SECOND, tmp_path / "two")
    both, backend = pipeline(compose_folders(tmp_path / "one", tmp_path / "two", tmp_path / "both"))
    picture = np.random.default_rng(0).integers(0, 256, (8, 12, 3), np.uint8)
    both("a kite", frames=2, sketch=picture)
    assert not backend.of("draft_two")
    assert len(backend.of("film_two")) == 3


def test_tables() -> None:
    made = compose(FIRST, SECOND, same_tokenizer=True)
    assert made.name == "draws + films"
    assert made.licence == "one licence; then another"
    assert [loop.name for loop in made.loops] == ["draft", "film"]
    assert made.sizes.decoder == "second_paint"
    assert made.stage("paint").inputs[0].source == "draft.latents"
    assert made.stage("second_look").inputs[0].source == "picture:paint.pixels"
    assert made.stage("look").inputs[0].source == "picture:sketch"
    # The second model's picture control is dropped.
    controls = [control.name for control in made.controls]
    assert "footage" in controls
    assert "second_sketch" not in controls
    assert {"shake", "second_shake", "grain", "second_grain"} < set(controls)
    assert made.loops[1].noise.purpose != made.loops[0].noise.purpose
    assert made.stage("second_mixer").weights == "second_w.safetensors"


def test_composing_again() -> None:
    """A composed model may be the first part of another composed model."""
    both = compose(FIRST, SECOND, same_tokenizer=True)
    again = compose(both, replace(SECOND, name="third"), same_tokenizer=True)
    assert len(again.loops) == 3
    assert [loop.frames for loop in again.loops] == [1, 1, "F"]
    assert len({loop.noise.purpose for loop in again.loops}) == 3
    assert again.sizes.decoder == "second_second_paint"


def test_symbols_of_another_size_are_renamed() -> None:
    wide = replace(SECOND, sizes=replace(SECOND.sizes, symbols={**SECOND.sizes.symbols, "K": 7}))
    made = compose(FIRST, wide, same_tokenizer=True)
    assert made.fixed["K"] == 3
    assert made.fixed["second_K"] == 7
    assert made.stage("second_mixer").outputs[0].shape == ("B", "F", "second_K")
    assert made.stage("second_look").outputs[0].shape == ("B", "C", "H", "W")


def test_sizes_are_those_of_both() -> None:
    sizes = replace(SECOND.sizes, multiple=6, width=12, height=18)
    made = compose(FIRST, replace(SECOND, sizes=sizes), same_tokenizer=True)
    assert (made.sizes.multiple, made.sizes.width, made.sizes.height) == (12, 12, 12)
    assert made.sizes.frames == SECOND.sizes.frames
    optional = compose(FIRST, replace(MANIFEST, name="films"), same_tokenizer=True)
    assert optional.sizes.frames == (2, 5, 24)  # with one frame, only the replaced loop would be left


def _scarf(manifest: Manifest) -> Manifest:
    scarf = Stage(
        "scarf",
        "w.safetensors",
        (Tensor("pixels", ("B", 3, "Y", "X"), source="picture:scarf"),),
        (Output("seen", ("B", "C", "H", "W")),),
    )
    steps = tuple(
        replace(row, inputs=(*row.inputs, Tensor("worn", ("B", "C", "H", "W"), source="scarf.seen")))
        if row.denoises
        else row
        for row in manifest.stages
    )
    return replace(manifest, stages=(*steps, scarf), controls=(*manifest.controls, Control("scarf", "picture", "more")))


MIXED = replace(MANIFEST.loops[1], noise=NoiseRule(22, mix=Mix("draft", 0.5)))
FITS: dict[str, tuple[Manifest, Manifest, str]] = {
    "frames": (replace(FIRST, sizes=replace(FIRST.sizes, frames=(2, 5, 24))), SECOND, "2 frames or more"),
    "factor": (replace(FIRST, sizes=replace(FIRST.sizes, factor=4)), SECOND, "4 pixels per latent cell"),
    "multiple": (
        replace(FIRST, sizes=replace(FIRST.sizes, multiple=4094, width=4094, height=4094)),
        SECOND,
        "multiples of 4094",
    ),
    "text": (
        FIRST,
        replace(SECOND, text=replace(SECOND.text, pad_id=7)) if SECOND.text else SECOND,
        "one tokenizer",
    ),
    "no picture": (
        FIRST,
        replace(MANIFEST, name="films", loops=MANIFEST.loops[:1], sizes=replace(MANIFEST.sizes, frames=(1, 1, 1))),
        "no loop is left",
    ),
    "two pictures": (FIRST, _scarf(SECOND), "takes 2 pictures, "),
    "mixed": (FIRST, replace(MANIFEST, loops=(MANIFEST.loops[0], MIXED)), "is mixed with draft"),
    "no use": (
        FIRST,
        changed(replace(MANIFEST, name="films"), "draft", replaced=Replaced("footage", "watch.seen")),
        "does not make a clip from a picture",
    ),
}


@pytest.mark.parametrize("case", FITS)
def test_models_that_do_not_fit(tmp_path: Path, case: str) -> None:
    first, second, said = FITS[case]
    one, two = write(first, tmp_path / "one"), write(second, tmp_path / "two")
    with pytest.raises(ModelError, match=said):
        compose_folders(one.path, two.path, tmp_path / "both")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one", "two"]


def test_other_words_are_another_tokenizer(tmp_path: Path) -> None:
    write(FIRST, tmp_path / "one"), write(SECOND, tmp_path / "two", words=("other", "words"))
    with pytest.raises(ModelError, match="one tokenizer"):
        compose_folders(tmp_path / "one", tmp_path / "two", tmp_path / "both")


# Files.


def test_files_are_links_and_lie_there_once(tmp_path: Path) -> None:
    one, two = write(FIRST, tmp_path / "one"), write(SECOND, tmp_path / "two")
    both = compose_folders(one.path, two.path, tmp_path / "both")
    assert sorted(both.files) == [
        "p.safetensors",
        "second_p.safetensors",
        "second_w.safetensors",
        "w.safetensors",
        "words.json",
    ]
    for own, here in (("w", "second_w"), ("p", "second_p")):
        assert (two.path / f"{own}.safetensors").samefile(both.path / f"{here}.safetensors")
        assert both.files[f"{here}.safetensors"] == two.files[f"{own}.safetensors"]
    for name in both.files:
        both.file(name, verify=True)


def test_files_are_copied_where_there_are_no_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one, two = write(FIRST, tmp_path / "one"), write(SECOND, tmp_path / "two")

    def refuse(*_: object) -> None:
        raise OSError("no links here")

    monkeypatch.setattr(os, "link", refuse)
    both = compose_folders(one.path, two.path, tmp_path / "both")
    assert not (one.path / "w.safetensors").samefile(both.path / "w.safetensors")
    for name in both.files:
        both.file(name, verify=True)


def test_a_damaged_file_leaves_nothing_behind(tmp_path: Path) -> None:
    one, two = write(FIRST, tmp_path / "one"), write(SECOND, tmp_path / "two")
    weights = two.path / "p.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x55")
    with pytest.raises(IntegrityError, match=r"p\.safetensors"):
        compose_folders(one.path, two.path, tmp_path / "both")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one", "two"]


def test_a_weights_file_with_the_name_of_the_others_variant(tmp_path: Path) -> None:
    """Weights should not be named like a precision. If a model has such a name anyway, nothing is overwritten."""
    odd = replace(SECOND, stages=tuple(replace(row, weights="w.fp16.safetensors") for row in SECOND.stages))
    one, two = write(FIRST, tmp_path / "one"), write(odd, tmp_path / "two")
    save_file({"w": np.zeros(3, np.float16)}, one.path / ".half")
    put_file(one, one.path / ".half", "w.fp16.safetensors")
    with pytest.raises(ModelError, match=r"w\.fp16\.safetensors"):
        compose_folders(one.path, two.path, tmp_path / "both")
    assert not (tmp_path / "both").exists()


def test_an_output_that_cannot_be_written(tmp_path: Path) -> None:
    one, two = write(FIRST, tmp_path / "one"), write(SECOND, tmp_path / "two")
    with pytest.raises(ModelError, match="exists already"):
        compose_folders(one.path, two.path, one.path)
    with pytest.raises(ModelError, match="is one of the two models"):
        compose_folders(one.path, two.path, one.path, overwrite=True)
    with pytest.raises(ManifestError, match="not a model directory"):
        compose_folders(tmp_path, two.path, tmp_path / "both")
    compose_folders(one.path, two.path, tmp_path / "both")
    compose_folders(one.path, two.path, tmp_path / "both", overwrite=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["both", "one", "two"]


def test_the_command(tmp_path: Path) -> None:
    write(FIRST, tmp_path / "one"), write(SECOND, tmp_path / "two")
    arguments = ["compose", *(str(tmp_path / name) for name in ("one", "two", "both"))]
    result = CliRunner().invoke(main, [*arguments, "--json"])
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["model"] == str(tmp_path / "both")
    assert "one licence; then another" in result.stderr
    again = CliRunner().invoke(main, arguments)
    assert again.exit_code != 0
    assert "exists already" in again.output


def test_no_checkpoint_is_a_composed_model(tmp_path: Path) -> None:
    assert not recognise(tmp_path)
    with pytest.raises(ModelError, match="higen compose"):
        convert([tmp_path])


# The source.


def test_a_stages_pixels_as_a_source() -> None:
    found = source("picture:paint.pixels:clip")
    assert (found.kind, found.name, found.output, found.shown, found.resampled) == (
        "made",
        "paint",
        "pixels",
        True,
        True,
    )
    for wrong in ("picture:paint.pixels:", "picture:.pixels", "picture:paint@negative.pixels", "picture:a.b.c"):
        with pytest.raises(ManifestError, match=r"picture:STAGE\.OUTPUT"):
            source(wrong)


@pytest.mark.parametrize(
    ("text", "shape", "said"),
    [
        ("picture:nobody.pixels", ("B", 3, "Y", "X"), "the stages are"),
        ("picture:reader.pixels", ("B", 3, "Y", "X"), "reader gives words"),
        ("picture:reader.words", ("B", 3, "Y", "X"), "is wanted, not"),
        ("picture:watch.seen", ("B", 3, "Y", "X"), "is wanted, not"),
        ("picture:paint.pixels", ("B", 3, "F", "Y", "X"), "4 axes"),
        ("picture:film.latents", ("B", 3, "Y", "X"), "the stages are"),
    ],
)
def test_a_source_that_shows_no_picture(text: str, shape: tuple[int | str, ...], said: str) -> None:
    with pytest.raises(ManifestError, match=said):
        changed(MANIFEST, "look", inputs=(Tensor("pixels", shape, source=text),))


def test_latents_that_replace_a_loop_are_not_a_picture() -> None:
    with pytest.raises(ManifestError, match=r"STAGE\.OUTPUT or LOOP\.latents"):
        changed(MANIFEST, "draft", replaced=Replaced("sketch", "picture:paint.pixels"))


def test_a_request_of_the_second_models_picture_is_refused(tmp_path: Path) -> None:
    write(FIRST, tmp_path / "one"), write(SECOND, tmp_path / "two")
    both, _ = pipeline(compose_folders(tmp_path / "one", tmp_path / "two", tmp_path / "both"))
    with pytest.raises(RequestError, match="second_sketch: unknown"):
        both.request("a kite", second_sketch=np.zeros((8, 12, 3), np.uint8))
