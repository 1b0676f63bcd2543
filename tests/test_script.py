"""Scene scripts: they are checked before any work, each scene equals a single request, and finished scenes are kept."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image
from sounds import beats, write_wav

import higen
from higen import Pipeline, Video
from higen.cli import main
from higen.errors import BackendError, MediaWarning, RequestError
from higen.film import KeptScenes, make_film, scene_requests
from higen.media.sound import energy, read_sound
from higen.script import make_script, read_script

SCENES: list[dict[str, Any]] = [
    {"prompt": "a blue whale swimming", "seconds": 0.5, "motion": ["slow", "fast", "still"], "seed": 3},
    {"prompt": "a red heart beating", "seconds": 0.75, "transition": "crossfade", "fade": 0.25, "appearance": 0.5},
    {"prompt": "a green star", "seconds": 0.5, "motion": 20, "steps": 1, "windows": [2, 1]},
]


@pytest.fixture(scope="module")
def pipe(tiny_model: Path) -> Iterator[Pipeline]:
    with higen.load(tiny_model, device="cpu") as pipeline:
        yield pipeline


def script(*scenes: dict[str, Any], **shared: Any) -> dict[str, Any]:
    return {"scenes": list(scenes or SCENES), "steps": 2, **shared}


def test_each_scene_equals_its_single_request(pipe: Pipeline) -> None:
    made = make_script(script(), pipe.manifest)
    video, paths = make_film(pipe, made)
    first = pipe("a blue whale swimming", frames=4, steps=2, seed=3, motion=[36, 96, 0])  # in the range 0 to 120
    second = pipe("a red heart beating", frames=6, steps=2, appearance=0.5)
    third = pipe("a green star", frames=4, steps=1, motion=20, windows=(2, 1))
    assert (len(video), made.frames, video.fps, paths) == (12, 12, 8, [])
    np.testing.assert_array_equal(video.frames[:2], first.frames[:2])
    np.testing.assert_array_equal(video.frames[4:8], second.frames[2:])
    np.testing.assert_array_equal(video.frames[8:], third.frames)
    before, after = first.frames[2:].astype(float), second.frames[:2].astype(float)
    faded = np.stack([(2 * before[0] + after[0]) / 3, (before[1] + 2 * after[1]) / 3])
    np.testing.assert_allclose(video.frames[2:4], faded, atol=0.5 + 1e-9)
    places = [(scene["first"], scene["frames"], scene["prompt"]) for scene in video.metadata["scenes"]]
    assert places == [(0, 4, SCENES[0]["prompt"]), (2, 6, SCENES[1]["prompt"]), (8, 4, SCENES[2]["prompt"])]


def test_a_scene_continues_from_the_last_frame_of_the_one_before(pipe: Pipeline, tmp_path: Path) -> None:
    Image.fromarray(pipe("a green star", frames=1, steps=1).frames[0]).save(tmp_path / "end.png")
    rows = ({"transition": "continue"}, {"transition": "continue", "keyframes": {"-1": "end.png"}, "seed": 4})
    scenes = [SCENES[0], *({"prompt": "a red heart", "seconds": 0.5, **row} for row in rows)]
    made = make_script(script(*scenes), pipe.manifest, tmp_path)
    video, _ = make_film(pipe, made)
    first = pipe(SCENES[0]["prompt"], frames=4, steps=2, seed=3, motion=[36, 96, 0])
    second = pipe("a red heart", frames=4, steps=2, keyframes={0: first.frames[-1]})
    ends = {0: second.frames[-1], -1: tmp_path / "end.png"}
    third = pipe("a red heart", frames=4, steps=2, seed=4, keyframes=ends)
    assert len(video) == made.frames == 10
    np.testing.assert_array_equal(video.frames, np.concatenate([first.frames, second.frames[1:], third.frames[1:]]))
    assert [scene["first"] for scene in video.metadata["scenes"]] == [0, 3, 6]


def test_curves_in_words_and_numbers_spread_over_the_scene(pipe: Pipeline) -> None:
    rows: list[Any] = ["very fast", ["still", "fast"], [0, 60], [5, 5, 5, 5, 5, 5, 5], "medium", 7]
    made = make_script(script(*({"prompt": "a", "seconds": 1, "motion": row} for row in rows)), pipe.manifest)
    wanted: list[Any] = [120, [0, 0, 0, 0, 96, 96, 96], [0, 10, 20, 30, 40, 50, 60], [5] * 7, 60, 7]
    for scene, value in zip(made.scenes, wanted, strict=True):
        assert scene.options["motion"] == pytest.approx(value)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        ([], "an object with the key scenes"),
        ({"scenes": []}, "a list of 1 to 1000 scenes"),
        (script({"prompt": "a"}, title="x"), "'title': unknown key; known are scenes"),
        (script({"prompt": "a", "pace": 1}), r"scenes\[0\]: 'pace': unknown key; known are prompt"),
        (script({"seconds": 1}), r"scenes\[0\]: prompt=None: a text"),
        (
            script({"prompt": "a"}, {"prompt": "a", "seconds": 6}),
            r"scenes\[1\]: seconds=6: 48 frames at 8 a second; tiny",
        ),
        (script({"prompt": "a", "seconds": 0}), "seconds=0: a number above 0"),
        (script({"prompt": "a", "seconds": True}), "seconds=True: a number above 0"),
        (script({"prompt": "a", "seconds": float("nan")}), "seconds=nan: a number above 0"),
        (script({"prompt": "a", "seed": -1}), "seed=-1: a whole number from 0"),
        (
            script({"prompt": "a", "transition": "cut"}, {"prompt": "a", "transition": "wipe"}),
            "transition='wipe': one of",
        ),
        (script({"prompt": "a", "transition": "crossfade"}), "the first scene has none before it"),
        (script({"prompt": "a", "fade": 1}), "only for transition='crossfade', not 'cut'"),
        (
            script({"prompt": "a"}, {"prompt": "a", "transition": "continue", "seconds": 0.1}),
            r"scenes\[1\]: transition='continue': needs a scene of at least 2 frames",
        ),
        (
            script({"prompt": "a"}, {"prompt": "a", "transition": "crossfade", "fade": 9}),
            "fade=9: seconds, at most 0.5",
        ),
        (
            script({"prompt": "a"}, *[{"prompt": "a", "transition": "crossfade", "fade": 0.4}] * 2),
            r"scenes\[1\]: 4 frames are fewer than its two crossfades",
        ),
        (script({"prompt": "a", "motion": "quick"}), "motion='quick': a number, numbers, still, very slow"),
        (script({"prompt": "a", "motion": ["slow", "quick"]}), "motion='quick': one of 'still'"),
        (script({"prompt": "a", "motion": ["slow"] * 4}), "motion has 4 words: at most 3"),
        (script({"prompt": "a", "motion": "a.wav"}), "no files are allowed here"),
        (script({"prompt": "a", "image": "a.png"}), "no files are allowed here"),
        (script({"prompt": "a"}, fps=0), "fps=0: a whole number from 1 to 240"),
    ],
)
def test_a_wrong_script_names_its_key_and_what_is_allowed(pipe: Pipeline, data: Any, reason: str) -> None:
    with pytest.raises(RequestError, match=reason):
        make_script(data, pipe.manifest)


@pytest.mark.parametrize(
    ("scene", "reason"),
    [
        ({"prompt": " "}, r"scenes\[1\]: prompt=' ': a prompt with at least one word"),
        ({"prompt": "a", "motion": -1}, r"scenes\[1\]: motion=-1"),
        ({"prompt": "a", "steps": 0}, r"scenes\[1\]: steps=0"),
        (
            {"prompt": "a", "transition": "continue", "keyframes": {"-4": "a.png"}, "seconds": 0.5},
            r"scenes\[1\]: keyframes: frame 0 is already given by transition='continue'; leave it out",
        ),
    ],
)
def test_what_a_request_refuses_is_refused_before_the_first_scene(
    pipe: Pipeline, tmp_path: Path, scene: dict[str, Any], reason: str
) -> None:
    Image.new("RGB", (24, 16)).save(tmp_path / "a.png")
    with pytest.raises(RequestError, match=reason):
        scene_requests(pipe, make_script(script(SCENES[0], scene), pipe.manifest, tmp_path))


def test_finished_scenes_are_kept_and_not_made_again(
    pipe: Pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = make_script(script(), pipe.manifest)
    whole, _ = make_film(pipe, made)
    kept, calls, make = KeptScenes(tmp_path / "f.scenes"), [], Pipeline.make

    def failing(self: Pipeline, request: Any, progress: bool | None = None) -> list[Video]:
        calls.append(request.prompts[0])
        if len(calls) == 3:
            raise BackendError("out of luck")
        return make(self, request, progress)

    monkeypatch.setattr(Pipeline, "make", failing)
    with pytest.raises(BackendError, match="out of luck"):
        make_film(pipe, made, kept)
    assert len(list(kept.folder.iterdir())) == 2
    ready: list[tuple[int, bool]] = []
    video, paths = make_film(pipe, made, kept, on_scene=lambda place, again: ready.append((place, again)))
    assert ready == [(0, True), (1, True), (2, False)]
    np.testing.assert_array_equal(video.frames, whole.frames)
    paths[0].write_bytes(b"broken")
    changed = make_script(script({**SCENES[0], "seed": 4}, *SCENES[1:]), pipe.manifest)
    make_film(pipe, changed, kept, on_scene=lambda place, again: ready.append((place, again)))
    assert ready[3:] == [(0, False), (1, True), (2, True)]
    (kept.folder / "mine.txt").touch()
    kept.remove(paths)
    assert len(list(kept.folder.iterdir())) == 2  # the changed scene and the foreign file


def test_the_command_makes_one_video_with_its_sound(tmp_path: Path, tiny_model: Path) -> None:
    write_wav(tmp_path / "a.wav", beats(1, (0.1, 0.6)))
    scenes = [{**SCENES[0], "motion": "a.wav"}, {**SCENES[2], "motion": "a.wav"}]
    file, out = tmp_path / "s.json", tmp_path / "f.mp4"
    file.write_text(json.dumps(script(*scenes, audio="a.wav")))
    options = ["generate", "--model", str(tiny_model), "--script", str(file), "-o", str(out)]
    result = CliRunner().invoke(main, [*options, "--json"])
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert (found["frames"], len(found["scenes"])) == (8, 2)
    later = 120 * energy(read_sound(tmp_path / "a.wav", 0.5, 0.5), 3, 8)  # from the scene's start in the film
    assert found["scenes"][1]["motion"] == pytest.approx(later.tolist(), rel=1e-5)
    assert read_sound(out).seconds == pytest.approx(1, abs=0.03)
    assert {path.name for path in tmp_path.iterdir()} == {"a.wav", "s.json", "f.mp4"}
    for wrong in (["a whale"], ["--motion", "3"], ["--seed", "1"]):
        refused = CliRunner().invoke(main, [*options, *wrong])
        assert refused.exit_code == 2, refused.output
        assert "the script says what is made" in refused.stderr


def test_a_script_that_cannot_be_read_names_its_file(pipe: Pipeline, tmp_path: Path) -> None:
    for content, reason in ((b"{", "not JSON"), (b'{"fps": 1, "fps": 2}', "twice"), (b"\xff\xfe", "UTF-16")):
        (tmp_path / "s.json").write_bytes(content)
        with pytest.raises(RequestError, match=f"s.json.*{reason}"):
            read_script(tmp_path / "s.json", pipe.manifest)
    with pytest.raises(RequestError, match="No such file"):
        read_script(tmp_path / "no.json", pipe.manifest)
    (tmp_path / "s.json").write_text(json.dumps(script({"prompt": "a", "seconds": 99})))
    with pytest.raises(RequestError, match=r"s\.json: scenes\[0\]: seconds=99"):
        read_script(tmp_path / "s.json", pipe.manifest)


def test_a_scene_says_that_its_sound_ends(pipe: Pipeline, tmp_path: Path) -> None:
    write_wav(tmp_path / "a.wav", beats(0.25, (0.0,)))
    made = make_script(script({"prompt": "a", "motion": "a.wav"}), pipe.manifest, tmp_path)
    with pytest.warns(MediaWarning, match="the rest is silence"):
        scene_requests(pipe, made)
