"""What a notebook shows: a list of videos as a grid, previews while one is made, and the form of `pipe.widget()`."""

from __future__ import annotations

import base64
import io
import pickle
import re
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest

import higen
from higen.errors import MissingExtra, RequestError
from higen.notebook import curve, png
from higen.pipeline import Pipeline
from higen.video import Video, Videos

QUICK = "frames=4, width=64, height=64, steps=(3, 1)"
CELLS = (
    "import higen\npipe = higen.load(prepare=False)",
    f'video = pipe("a whale", {QUICK}, progress="previews")',
    f'pipe(["a whale", "a heart"], {QUICK})',
    "pipe.widget()",
)


@pytest.fixture(scope="module")
def pipe() -> Iterator[Pipeline]:
    with higen.load(prepare=False) as made:
        yield made


def test_a_list_of_videos_is_a_list_that_shows_itself_as_a_grid() -> None:
    frames = np.zeros((2, 16, 16, 3), np.uint8)
    clips = [Video(frames, 8, {"prompt": f"<b>{number}"}) for number in range(26)]
    videos = Videos(clips)
    assert videos == clips
    assert isinstance(videos, list)
    assert pickle.loads(pickle.dumps(videos))[3].prompt == "<b>3"
    shown = videos._repr_html_()
    assert (shown.count("<video"), shown.count("&lt;b&gt;"), shown.count("<b>")) == (24, 24, 0)
    assert "and 2 more" in shown


def test_a_batch_gives_such_a_list(pipe: Pipeline) -> None:
    made = pipe(["a whale", "a heart"], frames=1, width=32, height=32, steps=(1, 1), progress=False)
    assert type(made) is Videos
    assert [video.prompt for video in made] == ["a whale", "a heart"]


def test_progress_must_be_a_known_word(pipe: Pipeline) -> None:
    with pytest.raises(RequestError, match="progress='yes': True, False, None or 'previews'"):
        pipe("a whale", progress="yes")  # type: ignore[call-overload]


def test_a_preview_has_a_row_for_each_video() -> None:
    frames = np.arange(2 * 12 * 4 * 6 * 3, dtype=np.uint8).reshape(2, 12, 4, 6, 3)
    found = np.asarray(PIL.Image.open(io.BytesIO(png(frames))))
    places = np.linspace(0, 11, 8).round().astype(int)
    assert np.array_equal(found, np.concatenate([np.concatenate(list(video[places]), axis=1) for video in frames]))


@pytest.mark.parametrize(
    ("text", "value"),
    [("", None), (" 300 ", 300.0), ("0, 300", [0.0, 100.0, 200.0, 300.0]), ("0 30 0", [0.0, 20.0, 20.0, 0.0])],
)
def test_numbers_over_time_are_spread_over_the_clip(text: str, value: Any) -> None:
    assert curve("motion", text, 4) == (value if value is None else pytest.approx(value))


def test_a_curve_of_words_is_refused() -> None:
    with pytest.raises(RequestError, match="motion='fast': a number"):
        curve("motion", "fast", 4)


def test_the_form_makes_what_a_call_makes(pipe: Pipeline) -> None:
    pytest.importorskip("ipywidgets")
    form = pipe.widget()
    assert {control.name for control in pipe.controls} <= set(form.fields)
    quick = {"frames": 4, "width": 64, "height": 64, "steps, spatial": 2, "steps, temporal": 1}
    for name, value in {**quick, "prompt": "a whale", "seed": "7", "motion": "0, 300"}.items():
        form.fields[name].value = value
    form._go.click()
    form.wait(60)
    assert form.error is None
    options = {"frames": 4, "width": 64, "height": 64, "steps": (2, 1), "seed": 7, "motion": [0, 100, 200, 300]}
    truth = pipe("a whale", progress=False, **options)
    assert form.video is not None
    assert np.array_equal(form.video.frames, truth.frames)
    assert form._bar.value == form._bar.max == 2 + 1 + 4
    assert PIL.Image.open(io.BytesIO(form._picture.value)).size[1] == 64

    file = io.BytesIO()
    PIL.Image.new("RGB", (64, 64), (200, 30, 30)).save(file, "PNG")
    upload = {"name": "../a.png", "type": "image/png", "size": 1, "content": memoryview(file.getvalue())}
    form.fields["image"].value = ({**upload, "last_modified": datetime.now(UTC)},)
    form.make()
    form.wait(60)
    truth = pipe("a whale", image=PIL.Image.open(file), progress=False, **options)
    assert np.array_equal(form.video.frames, truth.frames)


def test_the_form_sends_only_what_was_changed(pipe: Pipeline) -> None:
    """So a form in which nothing was chosen has the model's usual preset, as a call has."""
    pytest.importorskip("ipywidgets")
    form = pipe.widget()

    def options() -> dict[str, Any]:
        with ExitStack() as files:
            return form._options(files)

    assert options() == {"prompt": pipe.manifest.prompts[0], "seed": "random"}
    assert pipe.request(**options()).settings.preset == "fast"
    form.fields["preset"].value = "full"
    assert options()["preset"] == "full"
    form.fields["preset"].value = ""
    form.fields["steps, temporal"].value = 2
    form.fields["offset_noise"].value += 0.25
    assert (options()["steps"], "guidance" in options(), "offset_noise" in options()) == ([None, 2], False, True)


def test_the_form_shows_what_is_wrong(pipe: Pipeline) -> None:
    pytest.importorskip("ipywidgets")
    form = pipe.widget()
    form.fields["seed"].value = "<b>"
    form.make()
    assert isinstance(form.error, RequestError)
    assert "seed=&#x27;&lt;b&gt;&#x27;" in form._result.value
    form.fields["seed"].value = "1"
    form.fields["frames"].value = 64
    form.make()
    form.stop()
    form.wait(60)
    assert (form.video, form.error, form._said.value, form._go.disabled) == (None, None, "stopped", False)


def test_a_form_names_its_extra(pipe: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ipywidgets", None)
    with pytest.raises(MissingExtra, match=r"higen\[notebook\]"):
        pipe.widget()


@pytest.mark.filterwarnings("ignore")
def test_a_real_kernel_shows_bars_previews_a_grid_and_the_form(tmp_path: Path) -> None:
    nbformat = pytest.importorskip("nbformat")
    nbclient = pytest.importorskip("nbclient")
    for name in ("ipykernel", "ipywidgets"):
        pytest.importorskip(name)
    seen: list[dict[str, Any]] = []

    class Client(nbclient.NotebookClient):  # type: ignore[misc,name-defined]
        """Records every picture, because in a notebook each update replaces the previous picture."""

        def process_message(self, message: dict[str, Any], *where: Any) -> Any:
            seen.append(message)
            return super().process_message(message, *where)

    cells = [nbformat.v4.new_code_cell(text) for text in CELLS]
    book = nbformat.v4.new_notebook(cells=cells)
    Client(book, timeout=120, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}).execute()
    shown = [
        m["content"]["data"] for m in seen if m["msg_type"] in ("display_data", "update_display_data")
    ]  # progress bars are text
    strips = [PIL.Image.open(io.BytesIO(base64.b64decode(data["image/png"]))) for data in shown if "image/png" in data]
    assert [strip.size for strip in strips] == [(64, 64)] * 3 + [(256, 64)]  # key frame: 3 steps; clip: 1 step
    assert shown[len(strips)]["text/html"] == ""
    said = "".join(output.get("text", "") for output in cells[1].outputs)
    assert re.search(r"spatial *: 100%.*3/3", said)
    assert cells[2].outputs[-1]["data"]["text/html"].count("<video") == 2
    assert "application/vnd.jupyter.widget-view+json" in cells[3].outputs[-1]["data"]
