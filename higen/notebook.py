"""Generation in a notebook: previews while it runs, and a form with a model's controls (extra `notebook`)."""

from __future__ import annotations

import html
import io
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from higen.errors import HigenError, MissingExtra, RequestError, quoted
from higen.events import Stream
from higen.progress import Progress, Shown, in_notebook
from higen.sampler import Step
from higen.tables import VISUAL, Control
from higen.video import Video, Videos, strip

if TYPE_CHECKING:
    from higen.pipeline import Pipeline

__all__ = ["Studio", "watched"]


def watched(stream: Stream, shown: Shown) -> Videos:
    """Read a stream to its end and return its videos, with bars and previews as `shown` says."""
    bars = Progress(stream.loops, shown)
    preview = _Preview() if shown == "previews" and in_notebook() else None
    try:
        for event in stream:
            bars.reached(event.index + 1 if isinstance(event, Step) else event.done)
            if preview is not None and isinstance(event, Step):
                preview.show(stream.preview())
        return stream.videos
    finally:
        stream.close()
        bars.close()
        if preview is not None:
            preview.close()


class _Preview:
    """A picture below a notebook's cell. It is updated in place and removed at the end."""

    def __init__(self) -> None:
        self._handle: Any = None

    def show(self, frames: NDArray[np.uint8]) -> None:
        """Show the estimates of all videos, uint8 [B,f,H,W,3], one below the other."""
        from IPython.display import Image, display

        picture = Image(data=png(frames), format="png")
        if self._handle is None:
            self._handle = display(picture, display_id=True)
        else:
            self._handle.update(picture)

    def close(self) -> None:
        from IPython.display import HTML

        if self._handle is not None:
            self._handle.update(HTML(""))


def png(frames: NDArray[np.uint8]) -> bytes:
    """Frames [B,f,H,W,3] as a PNG: a row for each of the first 8 videos."""
    from PIL import Image

    rows = [strip(video)[0] for video in frames[:8]]
    sheet = Image.new("RGB", (rows[0].width, sum(row.height for row in rows)))
    for place, row in enumerate(rows):
        sheet.paste(row, (0, place * row.height))
    file = io.BytesIO()
    sheet.save(file, "PNG")
    return file.getvalue()


class Studio:
    """A form for one model in a notebook: `pipe.widget()`.

    fields  the inputs, by their names in a call; their `value` may be set
    videos  all videos made so far, the newest last
    error   why the last request failed, or None
    """

    def __init__(self, pipeline: Pipeline) -> None:
        """Raises MissingExtra if ipywidgets is not installed."""
        try:
            import ipywidgets
        except ModuleNotFoundError as error:
            raise MissingExtra(error.name or "ipywidgets", "notebook", "pipe.widget()") from error
        self._pipeline = pipeline
        self._stream: Stream | None = None
        self._thread: threading.Thread | None = None
        self._stopped = False
        self._readers: dict[str, Callable[[], Any]] = {}
        self.fields: dict[str, Any] = {}
        self.videos = Videos()
        self.error: Exception | None = None
        w = self._widgets = ipywidgets
        common, more = self._common(), self._settings()
        controls = [self._control(control) for control in pipeline.controls]
        self._go = w.Button(description="Make video", button_style="primary")
        self._halt = w.Button(description="Stop", disabled=True)
        self._go.on_click(lambda _: self.make())
        self._halt.on_click(lambda _: self.stop())
        self._bar = w.IntProgress(layout=w.Layout(width="20em"))
        self._said = w.Label()
        self._picture = w.Image(format="png", layout=w.Layout(display="none"))
        self._result = w.HTML()
        settings = w.Accordion([w.VBox(more)], titles=("More settings",))
        form = w.VBox([*common, *controls, settings, w.HBox([self._go, self._halt])])
        shown = w.VBox([w.HBox([self._bar, self._said]), self._picture, self._result])
        self.view = w.HBox([form, shown], layout=w.Layout(flex_flow="row wrap"))

    def _repr_mimebundle_(self, **options: Any) -> Any:
        """For notebooks: the form."""
        return self.view._repr_mimebundle_(**options)

    @property
    def video(self) -> Video | None:
        """The newest video."""
        return self.videos[-1] if self.videos else None

    def make(self) -> None:
        """Start, as the button does. Errors are shown in the form. Call `wait` to wait for the end."""
        if self._thread is not None and self._thread.is_alive():
            return
        self.error, self._said.value, self._result.value, self._stopped = None, "", "", False
        try:
            with ExitStack() as files:  # the request reads the files
                self._stream = self._pipeline.stream(**self._options(files), warn=self._warn)
        except HigenError as error:
            self._failed(error)
            return
        self._go.disabled, self._halt.disabled = True, False
        self._thread = threading.Thread(target=self._run, args=(self._stream,), name="higen widget", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Stop after the current step."""
        self._stopped = True
        if self._stream is not None:
            self._stream.close()

    def wait(self, seconds: float | None = None) -> None:
        """Wait until no request is running."""
        if self._thread is not None:
            self._thread.join(seconds)

    def _run(self, stream: Stream) -> None:
        """Read a stream to its end, in a separate thread, so that the kernel can react to the button Stop."""
        self._bar.max = sum(length for _, length in stream.loops)
        self._bar.value = done = 0
        try:
            for event in stream:
                if isinstance(event, Step):
                    self._said.value = f"{event.loop}, step {event.index + 1} of {event.total}"
                    self._picture.value = png(stream.preview())
                    self._picture.layout.display = ""
                    done += 1
                else:
                    done += len(event.frames)
                self._bar.value = done
            if self._stopped:
                self._said.value = "stopped"
                return
            self.videos += stream.videos
            self._result.value += self.videos[-1]._repr_html_()
            self._said.value = f"seed {self.videos[-1].metadata['seed']}"
        except Exception as error:  # nobody would see the thread's traceback
            self._failed(error)
        finally:
            stream.close()
            self._picture.layout.display = "none"
            self._go.disabled, self._halt.disabled = False, True

    def _warn(self, warning: Warning) -> None:
        self._result.value += f"<p>{html.escape(str(warning))}</p>"

    def _failed(self, error: Exception) -> None:
        self.error = error
        self._said.value = ""
        name = "" if isinstance(error, HigenError) else f"{type(error).__name__}: "
        self._result.value = f"<p>{html.escape(name + str(error))}</p>"

    # The inputs.

    def _add(self, name: str, made: Any, read: Callable[[], Any] | None = None) -> Any:
        """Add an input and its reader. If a reader returns None, the option is not given: the default reader does so
        while the input is unchanged.
        """
        made.style.description_width = "9em"
        made.layout.width = "26em"
        self.fields[name] = made
        self._readers[name] = read or _changed(made)
        return made

    def _common(self) -> list[Any]:
        w, sizes, prompts = self._widgets, self._pipeline.manifest.sizes, self._pipeline.manifest.prompts
        prompt = w.Textarea(value=prompts[0] if prompts else "", description="Prompt", rows=2)
        self._add("prompt", prompt, lambda: prompt.value)
        examples = w.Dropdown(options=["", *prompts], description="Examples", style=prompt.style, layout=prompt.layout)

        def chosen(change: Mapping[str, Any]) -> None:
            prompt.value = change["new"] or prompt.value

        examples.observe(chosen, "value")
        fewest, default, most = sizes.frames
        frames = self._add("frames", w.IntSlider(default, fewest, most, description="Frames"))
        seed = self._add("seed", w.Text(placeholder="random", description="Seed"))
        self._readers["seed"] = lambda: _whole("seed", seed.value) if seed.value.strip() else "random"
        return [prompt, *([examples] if prompts else []), seed, frames]

    def _settings(self) -> list[Any]:
        w, manifest = self._widgets, self._pipeline.manifest
        sizes, loops = manifest.sizes, manifest.loops
        rows = [self._add("negative_prompt", w.Text(description="Not to be shown"))]
        for name in ("width", "height"):
            side = w.BoundedIntText(
                getattr(sizes, name), sizes.multiple, 4096, sizes.multiple, description=titled(name)
            )
            rows.append(self._add(name, side))
        rows.append(self._add("fps", w.BoundedIntText(sizes.fps, 1, 240, description="Frames/second")))
        for name, kind in (("steps", w.IntText), ("guidance", w.FloatText)):
            inputs = [kind(getattr(loop, name), description=f"{titled(name)}, {loop.name}") for loop in loops]
            rows += [self._add(f"{name}, {loop.name}", made) for loop, made in zip(loops, inputs, strict=True)]
            for loop in loops:
                del self._readers[f"{name}, {loop.name}"]
            self._readers[name] = partial(_values, [_changed(made) for made in inputs])
        if manifest.presets:
            names = ["", *(preset.name for preset in manifest.presets)]
            rows.append(self._add("preset", w.Dropdown(options=names, value="", description="Preset")))
        return rows

    def _control(self, control: Control) -> Any:
        """The input for a control, according to its kind."""
        w, name = self._widgets, control.name
        meaning = f"{control.meaning}; here the first one" if control.kind == "frames" else control.meaning
        label = {"description": titled(name), "tooltip": meaning}
        if control.kind == "curve":
            shown = "the model's choice" if control.default is None else f"{control.default:g}"
            made = self._add(name, w.Text(placeholder=f"{shown}; or 300; or 0, 300, 100 over time", **label))
            self._readers[name] = lambda: curve(name, made.value, self.fields["frames"].value)
            return made
        if control.kind in ("number", "whole"):
            made = w.IntText if control.kind == "whole" else w.FloatText
            return self._add(name, made(control.default, **label))
        if control.kind == "choice":
            return self._add(name, w.Dropdown(options=control.choices, value=control.default, **label))
        if control.kind == "text":
            return self._add(name, w.Textarea(value=control.default or "", rows=2, **label))
        accept = "image/*" if control.kind in ("picture", "frames") else "video/*,image/*"
        return self._add(name, w.FileUpload(accept=accept, multiple=False, **label))

    def _options(self, files: ExitStack) -> dict[str, Any]:
        """The options of a call. Uploads are written to files that exist until `files` is closed."""
        options = {name: read() for name, read in self._readers.items()}
        for control in self._pipeline.controls:
            if control.kind in VISUAL:
                given = options.pop(control.name)
                if given:
                    path = files.enter_context(_written(given[0]))
                    options[control.name] = {0: path} if control.kind == "frames" else path
        return {name: value for name, value in options.items() if value is not None}


@contextmanager
def _written(upload: Mapping[str, Any]) -> Iterator[Path]:
    """An upload as a file, because the reader of clips needs a path."""
    suffix = Path(str(upload["name"])).suffix
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, f"upload{suffix if suffix[1:].isalnum() else ''}")
        path.write_bytes(bytes(upload["content"]))
        yield path


def titled(name: str) -> str:
    """A control's name as it is shown in the form."""
    return name.replace("_", " ").capitalize()


def curve(name: str, text: str, frames: int) -> float | list[float] | None:
    """One number, or several that are spread evenly over a clip and interpolated linearly; None for an empty text.
    Raises RequestError.
    """
    if not text.strip():
        return None
    try:
        values = [float(part) for part in text.replace(",", " ").split()]
    except ValueError:
        raise RequestError(f"{name}={quoted(text)}: a number, or numbers over time as 0, 300, 100") from None
    if len(values) == 1:
        return values[0]
    places = np.linspace(0, len(values) - 1, frames)
    return [float(value) for value in np.interp(places, np.arange(len(values)), values)]


def _changed(made: Any) -> Callable[[], Any]:
    """A reader of an input: None while its value is the first one."""
    first = made.value
    return lambda: None if made.value == first else made.value


def _values(readers: Sequence[Callable[[], Any]]) -> list[Any] | None:
    """One value per loop, None for the loop's default; None if all have their defaults."""
    values = [read() for read in readers]
    return values if any(value is not None for value in values) else None


def _whole(name: str, text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise RequestError(f"{name}={quoted(text)}: a whole number, or nothing for a random one") from None
