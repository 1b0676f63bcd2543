"""The Triton model `higen` without Triton: requests in, events out."""

from __future__ import annotations

import base64
import io
import json
import threading
import warnings
import zlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
from made_up_model import MANIFEST, write_made_up_model
from row_backend import RowBackend

from higen.backends.onnx import OnnxBackend
from higen.backends.options import Options
from higen.bundle import Bundle
from higen.engines.triton.client import request_tensors
from higen.engines.triton.config import orchestrator_config
from higen.engines.triton.interface import COMMON_INPUTS, OUTPUTS, inputs, read_request
from higen.engines.triton.service import Limits, Meter, Service
from higen.errors import BackendError, Cancelled, HigenError, ModelError, PromptWarning, RequestError, RetryLater
from higen.pipeline import Pipeline
from higen.presets import Preset, Stretch
from higen.request import MAX_PROMPT
from higen.sampler import Step
from higen.stages import Tensor
from higen.tables import COMMON, Control

STAGES = ("text_encoder", "conditioner", "spatial_unet", "temporal_unet", "vae_decoder", "vae_encoder")
PLAIN_STAGES = ("spatial_unet_plain", "temporal_unet_plain")
LIMITS = Limits(slots=4, line=8, rows=dict.fromkeys((*STAGES, *PLAIN_STAGES), 4))


class Client:
    """A reply that records what it is sent."""

    def __init__(self) -> None:
        self.events: list[dict[str, Any]] = []
        self.error: HigenError | None = None
        self.gone = False
        self.ended = threading.Event()
        self.hold: threading.Event | None = None

    def send(self, event: dict[str, np.ndarray]) -> None:
        assert not self.ended.is_set()
        self.events.append({name: read(name, array) for name, array in event.items()})
        if self.hold is not None:
            assert self.hold.wait(30)

    def finish(self) -> None:
        assert not self.ended.is_set()
        self.ended.set()

    def fail(self, error: HigenError) -> None:
        self.error = error
        self.finish()

    def cancelled(self) -> bool:
        return self.gone

    def of(self, kind: str) -> list[dict[str, Any]]:
        return [event for event in self.events if event["event"] == kind]


def read(name: str, array: np.ndarray) -> Any:
    """An output as a client reads it; checks that its type and rank match the table."""
    field = next(field for field in OUTPUTS if field.name == name)
    assert array.ndim == len(field.dims)
    kinds = {"STRING": "O", "INT32": "int32", "UINT8": "uint8", "FP32": "float32"}
    assert array.dtype == np.dtype(kinds[field.kind])
    if array.shape == (1,):
        return array[0].decode() if field.kind == "STRING" and name != "images" else array.tolist()[0]
    return array


@pytest.fixture
def pipeline(tiny_model: Path) -> Pipeline:
    bundle = Bundle.open(tiny_model)
    return Pipeline(bundle, RowBackend(bundle.manifest))


@pytest.fixture
def service(pipeline: Pipeline) -> Iterator[Service]:
    made = Service(pipeline, pipeline.backend, LIMITS)
    yield made
    made.close()


def ask(service: Service, prompt: str = "a blue whale", **options: Any) -> Client:
    client = Client()
    service.accept({name: array for name, (_, array) in request_tensors(prompt, **options).items()}, client)
    return client


def answered(client: Client) -> Client:
    assert client.ended.wait(30)
    return client


def test_the_events_of_a_request(service: Service, pipeline: Pipeline) -> None:
    client = answered(ask(service, seed=2**64 - 1, steps=[2, 3], frames=5, motion=[1, 2, 3, 4], return_latents=True))
    assert client.error is None
    place = [(e["loop"], e["stage"], e["step"], e["total"]) for e in client.of("progress")]
    assert place == [
        *(("spatial", "spatial_unet", i, 2) for i in (1, 2)),
        *(("temporal", "temporal_unet", i, 3) for i in (1, 2, 3)),
    ]
    chunks = client.of("frames")
    assert [event["first"] for event in chunks] == [0, 2, 4]
    expected = pipeline.stream("a blue whale", seed=2**64 - 1, steps=[2, 3], frames=5, motion=[1, 2, 3, 4])
    last = [event for event in expected if isinstance(event, Step)][-1]
    np.testing.assert_array_equal(np.concatenate([event["frames"] for event in chunks]), expected.videos[0].frames)
    done = client.events[-1]
    assert done["event"] == "done"
    np.testing.assert_array_equal(done["latents"], last.latents[0])
    about = json.loads(done["metadata"])
    assert (about["seed"], about["steps"], about["motion"]) == (2**64 - 1, [2, 3], [1, 2, 3, 4])
    assert (about["frames"], about["width"], about["height"], about["warnings"]) == (5, 24, 16, [])


def test_previews_come_when_asked_for(service: Service) -> None:
    client = answered(ask(service, steps=[4, 5], preview_every=2))
    previews = client.of("preview")
    assert [(e["loop"], e["step"]) for e in previews] == [
        ("spatial", 2),
        ("spatial", 4),
        ("temporal", 2),
        ("temporal", 4),
    ]
    assert [e["frames"].shape for e in previews] == [(1, 16, 24, 3)] * 2 + [(4, 16, 24, 3)] * 2
    assert client.of("frames")


def test_pictures_as_png(service: Service) -> None:
    raw, png = (answered(ask(service, steps=1, encoding=encoding)) for encoding in ("raw", "png"))
    assert not any("frames" in event for event in png.events)
    images = [image for event in png.of("frames") for image in event["images"]]
    decoded = [np.asarray(PIL.Image.open(io.BytesIO(base64.b64decode(image)))) for image in images]
    np.testing.assert_array_equal(np.stack(decoded), np.concatenate([event["frames"] for event in raw.of("frames")]))


def test_a_picture_from_the_user_replaces_stage_one(service: Service, pipeline: Pipeline) -> None:
    image = np.random.default_rng(0).integers(0, 256, (16, 24, 3), np.uint8)
    client = answered(ask(service, image=image, steps=2))
    assert {event["loop"] for event in client.of("progress")} == {"temporal"}
    video = pipeline("a blue whale", image=image, steps=2)
    np.testing.assert_array_equal(np.concatenate([e["frames"] for e in client.of("frames")]), video.frames)


def test_unknown_words_are_reported_to_their_own_client(service: Service) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", PromptWarning)  # warnings must go into the metadata only
        clients = [ask(service, prompt, steps=2) for prompt in ("a blue zebra", "a blue whale", "a red gnu")]
        told = [json.loads(answered(client).events[-1]["metadata"])["warnings"] for client in clients]
    assert [len(texts) for texts in told] == [1, 0, 1]
    assert "'zebra'" in told[0][0]
    assert "'gnu'" in told[2][0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "steps=0: a whole number from 1 to 1000"),
        ({"steps": [1, 2, 3]}, r"steps=.*one value, or 2 \(one per loop: spatial, temporal\)"),
        ({"guidance": float("nan")}, "guidance=nan: a finite number"),
        ({"seed": [1, 2]}, r"seed has 2 entries"),
        ({"frames": [2, 3]}, "frames=.*a whole number"),
        ({"frames": []}, "frames is empty"),
        ({"width": 23}, "width=23: a multiple of 4"),
        ({"motion": [1.0, 2.0]}, "motion has shape"),
        ({"motion": [[1.0], [2.0]]}, "motion_matrix: unknown; a request takes prompt"),
        ({"motion": "unspecified"}, "motion='unspecified': tiny was not trained without it"),
        ({"colour": "red"}, "colour: unknown; a request takes prompt"),
        ({"offset_noise": [0.1, 0.2]}, "offset_noise="),
        ({"solver": "euler"}, "solver='euler'"),
        ({"encoding": "gif"}, "encoding='gif': one of 'raw', 'png'"),
        ({"preview_every": -1}, "preview_every=-1"),
        ({"return_latents": [True, False]}, "return_latents="),
        ({"prompt": " "}, "prompt=' '"),
        ({"prompt": "a " * MAX_PROMPT}, f"prompt has {2 * MAX_PROMPT} characters: at most {MAX_PROMPT}"),
        ({"negative_prompt": "a" * 5 * MAX_PROMPT}, f"negative_prompt has {5 * MAX_PROMPT} bytes: at most"),
        ({"image": np.zeros((0, 0, 3), np.uint8)}, "image is uint8"),
        ({"image": b"GIF89a"}, "image_file: one PNG or JPEG file, or its base64 text"),
        ({"image": b"\x89PNG\r\n\x1a\nand no more"}, "image_file: cannot be read as a picture"),
    ],
)
def test_a_wrong_request_is_refused_at_once(service: Service, options: dict[str, Any], message: str) -> None:
    client = answered(ask(service, **options))
    assert client.events == []
    assert service.shared.batches == 0  # refused before any work
    assert isinstance(client.error, RequestError)
    with pytest.raises(RequestError, match=message):
        raise client.error
    assert service.shared.load == (0, 0)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({}, "prompt: one text is wanted"),
        (
            {name: np.zeros((2, 2, 3), np.uint8) for name in ("sketch", "sketch_file")},
            "sketch, sketch_file: one of them",
        ),
        ({"drift": np.zeros(2, np.float32), "drift_matrix": np.zeros((6, 8), np.float32)}, "drift, drift_matrix: one"),
        ({"sketch_file": np.array([b"", b""], object)}, "sketch_file: one PNG or JPEG file"),
        ({"grain": np.zeros(0, np.float32)}, "grain is empty"),
        ({"prompt": np.array([b"a", b"b"], object)}, "prompt: one text is wanted"),
        ({"prompt": np.array([b"\xff"], object)}, "prompt: not valid UTF-8"),
        (
            {"prompt": np.array([b"a"], object), "colour": np.array([b"red"], object)},
            "colour: unknown; a request takes",
        ),
    ],
)
def test_malformed_inputs_are_refused(tensors: dict[str, np.ndarray], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        read_request(MANIFEST, tensors)


def test_the_table_has_every_option_of_a_request() -> None:
    fields = {field.name: (field.kind, field.dims) for field in inputs(MANIFEST)}
    assert set(fields) >= {*COMMON, "preview_every", "encoding", "return_latents"}
    assert {name: fields[name] for name in fields if name not in {f.name for f in COMMON_INPUTS}} == {
        "wobble": ("FP32", (-1,)),
        "drift": ("FP32", (-1,)),
        "drift_matrix": ("FP32", (-1, -1)),
        "grain": ("FP32", (-1,)),
        "mood": ("STRING", (-1,)),
        "sketch": ("UINT8", (-1, -1, 3)),
        "sketch_file": ("STRING", (-1,)),
    }
    clip = replace(MANIFEST, controls=(*MANIFEST.controls, Control("scene", "clip", "a clip"), _words("note")))
    more = {field.name: (field.kind, field.dims) for field in inputs(clip)}
    assert (more["scene"], more["note"]) == (("UINT8", (-1, -1, -1, 3)), ("STRING", (-1,)))


def _words(name: str) -> Control:
    return Control(name, "text", "words", default="")


def test_a_model_that_reads_no_text_needs_no_prompt() -> None:
    tokens = Tensor("tokens", ("B",), source="control:grain")
    stages = tuple(replace(s, inputs=(tokens,)) if s.name == "reader" else s for s in MANIFEST.stages)
    silent = replace(MANIFEST, text=None, stages=stages)
    assert read_request(silent, {})[0] == {"prompt": ""}
    for manifest, needed in ((silent, 0), (MANIFEST, 1)):
        text = orchestrator_config(manifest, LIMITS, {})
        assert text.count("input {") - text.count("optional: true") == needed


@pytest.mark.parametrize("name", ["encoding", "sketch_file", "drift_matrix"])
def test_a_control_with_the_name_of_another_input_is_refused(name: str) -> None:
    with pytest.raises(ModelError, match=f"{name} is the name of another input"):
        inputs(replace(MANIFEST, controls=(*MANIFEST.controls, _words(name))))


@pytest.mark.parametrize(
    "options",
    [
        {"steps": "many"},
        {"steps": 2.7},
        {"steps": [[1, 2], [3]]},
        {"seed": -1},
        {"seed": np.int64(-1)},
        {"seed": 1.0},
        {"seed": 2**64},
        {"frames": 2**40},
        {"frames": np.int64(2**33 + 5)},
        {"guidance": "strong"},
        {"motion": True},
        {"motion": 2**24 + 1},
        {"motion": [[1.0, 2.0], [3.0]]},
        {"return_latents": "no"},
        {"return_latents": 1},
        {"image": np.zeros((16, 24, 3))},
        {"image": np.full((16, 24, 3), 300)},
        {"image": np.zeros((16, 24), np.uint8)},
        {"image": np.zeros((16, 24, 4), np.uint8)},
        {"image": Path("nowhere.png")},
        {"solver": 3},
        {"prompt": "\udc80"},
    ],
)
def test_a_client_cannot_send_what_the_protocol_cannot_hold(options: dict[str, Any]) -> None:
    with pytest.raises(RequestError, match=next(iter(options))):
        request_tensors(**{"prompt": "a whale", **options})


def test_a_client_sends_what_it_is_given(service: Service) -> None:
    given = {"seed": np.uint64(2**64 - 1), "steps": np.array([2, 3]), "guidance": 4, "image": np.full((16, 24, 3), 255)}
    sent = request_tensors("a whale", solver=None, frames=None, motion="unspecified", return_latents=np.True_, **given)
    assert sent["prompt"][1].tolist() == [b"a whale"]
    assert "solver" not in sent
    assert "frames" not in sent
    assert sent["motion"][1].size == 0
    for name, value in given.items():
        np.testing.assert_array_equal(sent[name][1].reshape(np.shape(value)), value)
    kinds = {field.name: field.kind for field in inputs(service._pipeline.manifest)}
    assert all(kind == kinds[name] for name, (kind, _) in sent.items() if name != "prompt")
    sent = request_tensors("", drift=np.eye(3), grain=3, wobble=[1, 2.5], mood="dark", sketch=b"file", motion=None)
    assert {name: (kind, array.shape) for name, (kind, array) in sent.items()} == {
        "prompt": ("BYTES", (1,)),
        "drift_matrix": ("FP32", (3, 3)),
        "grain": ("FP32", (1,)),
        "wobble": ("FP32", (2,)),
        "mood": ("BYTES", (1,)),
        "sketch_file": ("BYTES", (1,)),
    }
    with pytest.raises(RequestError, match="prompt"):
        request_tensors(None)  # type: ignore[arg-type]


def test_a_failure_in_the_work_reaches_only_its_client(service: Service) -> None:
    bad = ask(service, guidance=RowBackend.POISON)
    good = ask(service, seed=3)
    assert isinstance(answered(bad).error, BackendError)
    assert answered(good).error is None
    assert service.shared.load == (0, 0)


def test_a_client_that_goes_away_frees_its_slot(service: Service) -> None:
    held = [Client() for _ in range(LIMITS.slots)]
    for client in held:
        client.hold = threading.Event()
        service.accept({"prompt": np.array([b"a whale"], object), "steps": np.array([500], np.int32)}, client)
    late = ask(service, steps=1)
    assert service.shared.load == (LIMITS.slots, 1)
    held[0].gone = True
    held[0].hold.set()
    assert answered(late).error is None
    assert isinstance(answered(held[0]).error, Cancelled)
    assert len(held[0].events) < 500
    for client in held[1:]:
        client.gone = True
        client.hold.set()
        answered(client)


def test_too_many_are_told_to_try_again(service: Service) -> None:
    held = [Client() for _ in range(LIMITS.slots + LIMITS.line)]
    release = threading.Event()
    for client in held:
        client.hold = release
        service.accept({"prompt": np.array([b"a whale"], object), "steps": np.array([2], np.int32)}, client)
    refused = ask(service)
    assert refused.ended.is_set()  # at once
    assert isinstance(refused.error, RetryLater)
    release.set()
    assert [answered(client).error for client in held] == [None] * len(held)


def test_closing_fails_what_is_open_with_an_error_to_retry_on(pipeline: Pipeline) -> None:
    made = Service(pipeline, pipeline.backend, LIMITS)
    client = Client()
    client.hold = threading.Event()
    made.accept({"prompt": np.array([b"a whale"], object), "steps": np.array([500], np.int32)}, client)
    closing = threading.Thread(target=made.close)
    closing.start()
    client.hold.set()
    closing.join(30)
    assert isinstance(answered(client).error, RetryLater)
    assert isinstance(answered(ask(made)).error, RetryLater)


class Counted(Meter):
    """Records the meter's values."""

    def __init__(self) -> None:
        self.outcomes: list[str] = []
        self.loads: list[tuple[int, int]] = []
        self.sent = 0

    def ended(self, outcome: str) -> None:
        self.outcomes.append(outcome)

    def load(self, active: int, waiting: int) -> None:
        self.loads.append((active, waiting))

    def frames(self, count: int) -> None:
        self.sent += count


def test_a_meter_counts_every_request(pipeline: Pipeline) -> None:
    meter = Counted()
    made = Service(pipeline, pipeline.backend, LIMITS, meter)
    good = answered(ask(made))
    answered(ask(made, steps=0))
    answered(ask(made, guidance=RowBackend.POISON))
    left = Client()
    left.gone = True
    made.accept({"prompt": np.array([b"a whale"], object), "steps": np.array([500], np.int32)}, left)
    answered(left)
    made.close()
    answered(ask(made))
    assert meter.outcomes == ["done", "refused", "failed", "cancelled", "full"]
    assert meter.sent == sum(len(event["frames"]) for event in good.of("frames"))
    assert meter.loads[0] == (1, 0)
    assert meter.loads[-1] == (0, 0)


def test_limits_as_text() -> None:
    assert Limits.from_json(LIMITS.to_json()) == LIMITS


@pytest.fixture(scope="module")
def made_up(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """A service for a made-up model, which belongs to no family. Runs its ONNX graphs."""
    bundle = write_made_up_model(tmp_path_factory.mktemp("models") / "made-up")
    backend = OnnxBackend(bundle, Options("cpu", threads=1))
    rows = {stage.name: 4 for stage in bundle.manifest.stages if stage.batch}
    made = Service(Pipeline(bundle, backend), backend, Limits(slots=4, line=8, rows=rows))
    yield made
    made.close()


def picture(kind: str) -> bytes:
    """A small picture file."""
    file = io.BytesIO()
    pixels = np.random.default_rng(1).integers(0, 256, (20, 30, 3), np.uint8)
    PIL.Image.fromarray(pixels).save(file, kind)
    return file.getvalue()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"wobble": [1, -1, 0, 0, 2], "grain": 7, "mood": "dark"},
        {"drift": 0.5, "guidance": [2.0, 1.0]},
        {"drift": "unspecified", "frames": 3},
        {"drift": np.linspace(0, 1, 48).reshape(6, 8)},
        {"frames": 1, "guidance": 1.0, "solver": "ddim"},
        {"solver": ["ddim", "euler_ancestral"], "steps": [1, 5], "negative_prompt": "green"},
    ],
)
def test_the_controls_of_any_model(made_up: Service, options: dict[str, Any]) -> None:
    client = answered(ask(made_up, "a red kite climbs", seed=4, **options))
    assert client.error is None
    expected = made_up._pipeline("a red kite climbs", seed=4, **options)
    frames = np.concatenate([event["frames"] for event in client.of("frames")])
    np.testing.assert_array_equal(frames, expected.frames)
    about = json.loads(client.events[-1]["metadata"])
    for name in ("wobble", "grain", "mood", "guidance", "steps", "solver"):
        assert about[name] == expected.metadata[name]
    assert (about["drift"] is None) == (expected.metadata["drift"] is None)


def test_a_preset_gives_pythons_frames(made_up: Service) -> None:
    plain = made_up._pipeline
    draft, film = MANIFEST.loops
    fast = Preset("fast", (2, 1), (1.0, 1.0), (None, 1.5), usual=True)
    manifest = replace(MANIFEST, loops=(draft, replace(film, stretch=Stretch("draft"))), presets=(fast,))
    own = Pipeline(replace(plain.bundle, manifest=manifest), plain.backend)
    rows = {stage.name: 4 for stage in manifest.stages if stage.batch}
    service = Service(own, own.backend, Limits(slots=4, line=8, rows=rows))
    client, refused = (answered(ask(service, "a kite", frames=3, preset=name)) for name in ("fast", "slow"))
    usual, chosen = (answered(ask(service, "a kite", frames=3, **options)) for options in ({}, {"solver": "ddim"}))
    service.close()
    assert json.loads(usual.events[-1]["metadata"])["preset"] == "fast"
    assert "preset" not in json.loads(chosen.events[-1]["metadata"])
    for one, other in zip(usual.of("frames"), client.of("frames"), strict=True):
        np.testing.assert_array_equal(one["frames"], other["frames"])
    assert client.error is None
    frames = np.concatenate([event["frames"] for event in client.of("frames")])
    np.testing.assert_array_equal(frames, own("a kite", frames=3, preset="fast", progress=False).frames)
    assert np.ptp(frames.astype(int) - plain("a kite", frames=3, steps=(2, 1), guidance=1, progress=False).frames) > 5
    assert json.loads(client.events[-1]["metadata"])["preset"] == "fast"
    assert "preset='slow': the presets of made-up are 'fast'" in str(refused.error)


def test_a_picture_may_be_sent_as_a_file(made_up: Service, tmp_path: Path) -> None:
    for kind in ("png", "jpeg"):
        data = picture(kind)
        path = tmp_path / kind
        path.write_bytes(data)
        expected = made_up._pipeline("a red kite", sketch=PIL.Image.open(path), seed=1).frames
        pixels = np.asarray(PIL.Image.open(path))
        for sent in (data, base64.b64encode(data), path, pixels, pixels.tolist()):
            client = answered(ask(made_up, "a red kite", sketch=sent, seed=1))
            assert client.error is None
            assert {event["loop"] for event in client.of("progress")} == {"film"}
            frames = np.concatenate([event["frames"] for event in client.of("frames")])
            np.testing.assert_array_equal(frames, expected)


def test_a_picture_of_too_many_pixels_is_refused(made_up: Service) -> None:
    """A PNG file of a few bytes may claim any size."""
    header = b"IHDR" + (2**15).to_bytes(4, "big") * 2 + b"\x08\x02\x00\x00\x00"
    file = b"\x89PNG\r\n\x1a\n" + (13).to_bytes(4, "big") + header + zlib.crc32(header).to_bytes(4, "big")
    client = answered(ask(made_up, sketch=file))
    assert isinstance(client.error, RequestError)
    assert "sketch_file" in str(client.error)
