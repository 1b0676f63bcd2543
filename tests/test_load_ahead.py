"""Stages that are loaded in the background."""

from __future__ import annotations

import shutil
import threading
from pathlib import Path

import numpy as np
import pytest

from higen.api import default_model
from higen.backends.ahead import Ahead
from higen.backends.base import RecordingBackend
from higen.backends.onnx import OnnxBackend
from higen.backends.options import Options
from higen.backends.select import StageRouter, select_backend
from higen.bundle import Bundle, graph_file
from higen.errors import IntegrityError, OutputError
from higen.pipeline import Pipeline
from higen.video_writer import import_codecs

SMALL = [("text_encoder",), ("conditioner",)]


def threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "higen-ahead"]


def test_a_result_is_waited_for_or_left_to_the_taker() -> None:
    begun, go = threading.Event(), threading.Event()

    def make(name: str) -> str:
        begun.set()
        go.wait(60)
        return name.upper()

    ahead = Ahead(make, ["a", "b", "c"])
    assert begun.wait(60)
    assert ahead.take("b") is None  # not begun yet
    go.set()
    assert ahead.take("a") == "A"
    assert ahead.take("a") is None  # each result once
    ahead.stop()
    assert not ahead.running
    assert ahead.take("b") is None
    assert ahead.take("c") is None


def test_an_error_is_raised_where_the_result_is_taken() -> None:
    def make(name: str) -> int:
        raise MemoryError(name)

    ahead = Ahead(make, ["a"])
    ahead._thread.join(60)
    with pytest.raises(MemoryError, match="a"):
        ahead.take("a")
    assert ahead.take("a") is None


def test_sessions_made_in_the_background_give_the_same_and_no_thread_is_left() -> None:
    bundle = Bundle.open(default_model())
    tokens = np.arange(24, dtype=np.int64)[None]
    given = {t.name: tokens for t in bundle.manifest.stage("text_encoder").inputs}
    results = []
    for ahead in (False, True):
        router = select_backend(bundle, "auto", Options(device="cpu", threads=1))
        if ahead:
            router.load_ahead(SMALL)
            for thread in threads():
                thread.join(60)  # all is made there
        for names in SMALL:
            assert router.choose(*names) == names[0]
        outputs = router.run("text_encoder", **given)
        results.append({name: router.to_numpy(value) for name, value in outputs.items()})
        router.close()
        assert not threads()
        router.close()
    assert results[0].keys() == results[1].keys()
    for name, value in results[0].items():
        np.testing.assert_array_equal(value, results[1][name])


def test_a_damaged_graph_is_the_same_error_as_without(tmp_path: Path) -> None:
    model = shutil.copytree(default_model(), tmp_path / "model")
    graph = model / graph_file("conditioner")
    content = bytearray(graph.read_bytes())
    content[len(content) // 2] ^= 1
    graph.write_bytes(content)
    messages = []
    for ahead in (False, True):
        backend = OnnxBackend(Bundle.open(model), Options(device="cpu"))
        if ahead:
            backend.load_ahead([("conditioner",)])
            for thread in threads():
                thread.join(60)
        with pytest.raises(IntegrityError, match="does not match the sha256") as caught:
            backend.choose("conditioner")
        messages.append(str(caught.value))
        backend.close()
        assert not threads()
    assert messages[0] == messages[1]


def test_only_the_backend_that_will_run_the_stages_loads_them(monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = Bundle.open(default_model())
    plain = RecordingBackend(bundle.manifest)  # cannot load ahead
    onnx = OnnxBackend(bundle, Options(device="cpu"))
    asked: list[object] = []
    monkeypatch.setattr(onnx, "load_ahead", asked.append)
    makers = {"tensorrt": lambda: plain, "onnx": lambda: onnx}
    for idle, expected in ((("tensorrt",), [SMALL]), ((), []), (("tensorrt", "onnx"), [])):
        asked.clear()
        StageRouter(bundle, makers, {}, idle=idle).load_ahead(SMALL)
        assert asked == expected
    Pipeline(bundle, plain).load_ahead()
    onnx.close()


def test_a_large_model_is_loaded_stage_by_stage(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("higen.backends.onnx.LARGEST_AHEAD", 1000)
    backend = OnnxBackend(Bundle.open(default_model()), Options(device="cpu"))
    backend.load_ahead(SMALL)
    assert backend._ahead is None
    backend.close()
    backend.load_ahead(SMALL)  # after the end it is no error, and nothing begins
    assert not threads()


def test_a_film_library_that_does_not_load_is_found_before_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "av.video.reformatter", None)
    import_codecs(Path("a.gif"))
    with pytest.raises(OutputError, match=r"a\.mp4: cannot be written"):
        import_codecs(Path("a.mp4"))
