"""Known frames through Triton, the HTTP server and the command line: each makes the same request to the pipeline."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path
from typing import Any, cast

import numpy as np
import PIL.Image
import pytest
from click.testing import CliRunner

from higen.api import default_model
from higen.bundle import Bundle
from higen.cli import main
from higen.engines.triton.client import request_tensors
from higen.engines.triton.interface import inputs, read_request
from higen.errors import RequestError
from higen.images import load_picture
from higen.request import Request, make_request
from higen.video import Video

MANIFEST = Bundle.open(default_model()).manifest
PICTURES = [np.random.default_rng(i).integers(0, 256, (128, 128, 3), np.uint8) for i in range(2)]
MASK = np.zeros((1, 128, 128, 3), np.uint8)
MASK[:, :, 64:] = 255


def png(picture: np.ndarray) -> bytes:
    file = io.BytesIO()
    PIL.Image.fromarray(picture).save(file, "png")
    return file.getvalue()


def made(**options: Any) -> Request:
    return make_request(MANIFEST, "a whale", controls=options, load=load_picture)


def of_triton(**options: Any) -> dict[str, Any]:
    """The server's request for the request of a Triton client."""
    tensors = {name: array for name, (_, array) in request_tensors("a whale", **options).items()}
    kinds = {field.name: (field.kind, field.dims) for field in inputs(MANIFEST)}
    for name, (kind, array) in request_tensors("a whale", **options).items():
        assert kind.replace("BYTES", "STRING") == kinds[name][0]
        assert len(kinds[name][1]) == array.ndim
    values, _ = read_request(MANIFEST, tensors)
    values.pop("prompt")
    return values


def same(one: Request, other: Request) -> None:
    for name in ("keyframes", "mask"):
        for ours, theirs in zip(one.controls[name], other.controls[name], strict=True):
            np.testing.assert_array_equal(ours.pixels, theirs.pixels)
            assert ours.places == theirs.places


@pytest.mark.parametrize("pictures", [PICTURES, [png(one) for one in PICTURES]], ids=["arrays", "files"])
def test_triton(pictures: list[Any]) -> None:
    asked = of_triton(keyframes={0: pictures[0], -2: pictures[1]}, mask=MASK)
    same(made(**asked), made(keyframes={0: PICTURES[0], 14: PICTURES[1]}, mask=MASK[0]))


def test_triton_refuses() -> None:
    frames, index = np.stack(PICTURES), np.array([0, 3], np.int32)
    for tensors, message in (
        ({"keyframes": frames}, "one index for each picture is wanted, not 2 pictures, 0 in keyframes_index"),
        ({"keyframes_index": index}, "not 0 pictures, 2 in keyframes_index"),
        ({"keyframes": frames[:1], "keyframes_index": index}, "not 1 pictures, 2 in keyframes_index"),
        ({"keyframes": frames, "keyframes_index": index * 0}, r"keyframes_index=\[0, 0\]: each frame once"),
        ({"keyframes_file": np.array([b"no", b"picture"], object), "keyframes_index": index}, r"keyframes_file\[0\]: "),
    ):
        with pytest.raises(RequestError, match=message):
            read_request(MANIFEST, {"prompt": np.array([b"a whale"], object), **tensors})
    with pytest.raises(RequestError, match="keyframes: a picture for each index: files, or arrays"):
        request_tensors("a whale", keyframes={0: PICTURES[0], 1: PICTURES[1][:5]})


def test_the_http_server() -> None:
    pytest.importorskip("fastapi", reason="higen[serve] is not installed")
    from higen.serve.asks import check, opened, schema_of
    from higen.serve.fields import Fields
    from higen.serve.results import Results
    from higen.serve.settings import Limits

    def asked(**controls: Any) -> Any:
        return check(MANIFEST, Fields({"prompt": "a whale", "controls": controls}), Limits(), cast("Results", None))

    urls = ["data:image/png;base64," + base64.b64encode(png(one)).decode() for one in (*PICTURES, MASK[0])]
    good = asked(keyframes={"0": urls[0], "-2": urls[1]}, mask=urls[2])
    assert sorted(good.uploads) == ["keyframes[-2]", "keyframes[0]", "mask"]
    assert good.arguments["controls"] == {}
    assert json.dumps(good.arguments)
    with opened(MANIFEST, good.uploads, Limits(), cast("Results", None)) as files:
        same(made(**files), made(keyframes={0: PICTURES[0], -2: PICTURES[1]}, mask=MASK[0]))
    for controls, message in (
        ({"keyframes": {"16": urls[0]}}, "keyframes: frame 16: the clip has 16 frames"),
        ({"keyframes": {"15": urls[0], "-1": urls[0]}}, "frame 15 is given twice|frame -1: frame 15"),
        ({"keyframes": {"first": urls[0]}}, "controls.keyframes: frame 'first': the index of a frame"),
        ({"keyframes": urls[0]}, "an object of frames' indices and data URLs"),
        ({"keyframes": {"0": "http://here/a.png"}}, "no address is fetched"),
        ({"keyframes": {"0": "data:image/png;base64,"}}, "the file is empty"),
        ({"keyframes": {"0": "data:image/png;base64,AAAA"}}, r"keyframes\[0\]: cannot be read as a PNG"),
        ({"mask": urls[2]}, "mask: no frames are known: give keyframes as well"),
    ):
        with pytest.raises(RequestError, match=message):
            asked(**controls)
    schema = schema_of(MANIFEST)["properties"]
    assert schema["keyframes"]["type"] == "object"
    assert [*schema["keyframes"]["patternProperties"]] == [r"^-?\d{1,6}$"]
    assert schema["mask"]["contentMediaType"] == "image/*"


def test_the_command_line(tmp_path: Path) -> None:
    for i, picture in enumerate(PICTURES):
        PIL.Image.fromarray(picture[:64, :64]).save(tmp_path / f"{i}.png")
    PIL.Image.fromarray(MASK[0, :64, 32:96]).save(tmp_path / "mask.png")
    sizes = ["--frames", "3", "--width", "64", "--height", "64", "--steps", "1", "--backend", "onnx"]
    known = ["--keyframe", f"0={tmp_path / '0.png'}", "--keyframe", f"-1={tmp_path / '1.png'}"]
    command = ["generate", "a whale", *sizes, *known, "--mask", str(tmp_path / "mask.png"), "--json"]
    result = CliRunner().invoke(main, [*command, "-o", str(tmp_path / "v.npy")])
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["keyframes"] == [0, 2]
    frames = Video.open(tmp_path / "v.npy").frames
    assert frames.shape == (3, 64, 64, 3)
    again = ["generate", "a whale", *sizes, "-o", str(tmp_path / "w.npy"), "--keyframe"]
    for word, message in (("0", "INDEX=FILE"), ("3=x.png", "frame 3: the clip has 3 frames"), ("0=x.png", "x.png")):
        result = CliRunner().invoke(main, [*again, word])
        assert result.exit_code != 0
        assert message in result.output
    twice = ["--keyframe", f"1={tmp_path / '0.png'}", "--keyframe", f"1={tmp_path / '1.png'}"]
    result = CliRunner().invoke(main, [*again[:-1], *twice])
    assert "each frame once" in result.output
    assert not (tmp_path / "w.npy").exists()
