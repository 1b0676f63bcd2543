"""What the Triton model `higen` does, without Triton: requests in, events out."""

from __future__ import annotations

import base64
import io
import json
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
from row_backend import RowBackend

from higen.bundle import Bundle
from higen.engines.triton.interface import INPUTS, OUTPUTS, read_request, request_tensors
from higen.engines.triton.service import Limits, Service
from higen.errors import BackendError, Cancelled, HigenError, PromptWarning, RequestError, RetryLater
from higen.pipeline import Pipeline
from higen.request import OPTIONS
from higen.stages import STAGES

LIMITS = Limits(slots=4, line=8, rows=dict.fromkeys(STAGES, 4))


class Client:
    """A reply that keeps what it is sent."""

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
    """An output as a client reads it; its type and rank are those of the table."""
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
    return Pipeline(bundle, RowBackend(bundle.config))


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
    place = [(e["stage"], e["step"], e["total"]) for e in client.of("progress")]
    assert place == [("spatial", 1, 2), ("spatial", 2, 2), *(("temporal", i, 3) for i in (1, 2, 3))]
    chunks = client.of("frames")
    assert [event["first"] for event in chunks] == [0, 2, 4]
    expected = pipeline.stream("a blue whale", seed=2**64 - 1, steps=[2, 3], frames=5, motion=[1, 2, 3, 4])
    last = list(expected)[-1]
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
    assert [(e["stage"], e["step"]) for e in previews] == [
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
    assert {event["stage"] for event in client.of("progress")} == {"temporal"}
    video = pipeline("a blue whale", image=image, steps=2)
    np.testing.assert_array_equal(np.concatenate([e["frames"] for e in client.of("frames")]), video.frames)


def test_unknown_words_are_told_to_their_own_client(service: Service) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("always", PromptWarning)
        clients = [ask(service, prompt, steps=2) for prompt in ("a blue zebra", "a blue whale", "a red gnu")]
        told = [json.loads(answered(client).events[-1]["metadata"])["warnings"] for client in clients]
    assert [len(texts) for texts in told] == [1, 0, 1]
    assert "'zebra'" in told[0][0]
    assert "'gnu'" in told[2][0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "steps=0: a whole number from 1 to 1000"),
        ({"steps": [1, 2, 3]}, "steps=.*one value, or two"),
        ({"guidance": float("nan")}, "guidance=nan: a finite number"),
        ({"seed": [1, 2]}, r"seed has 2 entries"),
        ({"frames": [2, 3]}, "frames=.*a whole number"),
        ({"frames": []}, "frames is empty"),
        ({"width": 23}, "width=23: a multiple of 4"),
        ({"motion": [1.0, 2.0]}, "motion has shape"),
        ({"motion": None}, "motion=None: tiny was not trained without this cue"),
        ({"solver": "euler"}, "solver='euler'"),
        ({"encoding": "gif"}, "encoding='gif': one of 'raw', 'png'"),
        ({"preview_every": -1}, "preview_every=-1"),
        ({"return_latents": [True, False]}, "return_latents="),
        ({"prompt": " "}, "prompt=' '"),
        ({"image": np.zeros((0, 0, 3), np.uint8)}, "image is uint8"),
    ],
)
def test_a_wrong_request_is_refused_at_once(service: Service, options: dict[str, Any], message: str) -> None:
    client = ask(service, **options)
    assert client.ended.is_set()  # before any work
    assert client.events == []
    assert isinstance(client.error, RequestError)
    with pytest.raises(RequestError, match=message):
        raise client.error
    assert service.shared.load == (0, 0)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({}, "prompt: one text is wanted"),
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
        read_request(tensors)


def test_the_table_has_every_option_of_a_request() -> None:
    assert {field.name for field in INPUTS} >= {"prompt", "image", *OPTIONS}


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
        {"motion": "fast"},
        {"motion": True},
        {"return_latents": "no"},
        {"return_latents": 1},
        {"image": np.zeros((16, 24, 3))},
        {"image": np.full((16, 24, 3), 300)},
        {"solver": 3},
        {"colour": "red"},
    ],
)
def test_a_client_cannot_send_what_the_protocol_cannot_hold(options: dict[str, Any]) -> None:
    with pytest.raises(RequestError, match=next(iter(options))):
        request_tensors("a whale", **options)


def test_a_client_sends_what_it_is_given(service: Service) -> None:
    given = {"seed": np.uint64(2**64 - 1), "steps": np.array([2, 3]), "guidance": 4, "image": np.full((16, 24, 3), 255)}
    sent = request_tensors("a whale", solver=None, frames=None, motion=None, return_latents=np.True_, **given)
    assert sent["prompt"][1].tolist() == [b"a whale"]
    assert "solver" not in sent
    assert "frames" not in sent
    assert sent["motion"][1].size == 0
    for name, value in given.items():
        np.testing.assert_array_equal(sent[name][1].reshape(np.shape(value)), value)
    kinds = {field.name: field.kind for field in INPUTS}
    assert all(kind == kinds[name] for name, (kind, _) in sent.items() if name != "prompt")
    with pytest.raises(RequestError, match="prompt"):
        request_tensors(None)  # type: ignore[arg-type]


def test_a_failure_in_the_work_reaches_its_client_alone(service: Service) -> None:
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
    assert refused.ended.is_set()
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


def test_limits_as_text() -> None:
    assert Limits.from_json(LIMITS.to_json()) == LIMITS
