"""The foreign family behind a real Triton server, in the environment of tests/test_triton_server.py.

PyTorch and the family are not installed: the server needs only the model directory. tests/test_outside_family.py
leaves it in the folder that HIGEN_OUTSIDE_MODEL names. Both test files need the variable.
"""

from __future__ import annotations

import importlib.util
import io
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest

MISSING = [name for name in ("pytriton", "tritonclient", "grpc") if importlib.util.find_spec(name) is None]
if MISSING:
    pytest.skip(f"needs {', '.join(MISSING)}: pip install 'higen[triton]'", allow_module_level=True)
MODEL = os.environ.get("HIGEN_OUTSIDE_MODEL")
if MODEL is None:
    pytest.skip("needs HIGEN_OUTSIDE_MODEL: the model that test_outside_family.py exports", allow_module_level=True)

from higen import families  # noqa: E402
from higen.backends.onnx import OnnxBackend  # noqa: E402
from higen.backends.options import Options  # noqa: E402
from higen.bundle import Bundle  # noqa: E402
from higen.engines.triton.client import stream  # noqa: E402
from higen.engines.triton.interface import inputs  # noqa: E402
from higen.engines.triton.repository import Settings, write_repository  # noqa: E402
from higen.engines.triton.server import Server, running  # noqa: E402
from higen.errors import RequestError  # noqa: E402
from higen.pipeline import Pipeline  # noqa: E402
from higen.sampler import Step  # noqa: E402

PROMPT = "a crab waits"

Result = tuple[np.ndarray, np.ndarray]


def pixels(seed: int, *shape: int) -> np.ndarray:
    """A picture [20,33,3], or a clip of such pictures, of coarse colours."""
    coarse = np.random.default_rng(seed).integers(0, 256, (*shape, 5, 11, 3), dtype=np.uint8)
    return coarse.repeat(4, axis=-3).repeat(3, axis=-2)


def png(picture: np.ndarray) -> bytes:
    file = io.BytesIO()
    PIL.Image.fromarray(picture).save(file, "png")
    return file.getvalue()


PALETTE = pixels(1)

CASES: dict[str, dict[str, Any]] = {
    "defaults": {},
    "windows": {"frames": 11, "seed": 2**64 - 1, "swell": [0.25 * i - 1 for i in range(11)], "drift": 0.7},
    "matrix": {"frames": 4, "drift": np.cos(np.arange(16.0)).reshape(4, 4)},
    "curve": {"frames": 9, "current": [1.5 * i for i in range(8)], "negative_prompt": "grey kelp"},
    "lcm": {"frames": 4, "solver": ["euler", "lcm"], "steps": [2, 3], "seed": 5, "weather": "storm", "depth": 8},
    "ddim": {"frames": 3, "solver": ["heun", "ddim"], "steps": [1, 5], "current": "unspecified", "guidance": [3, 2.5]},
    "plain": {"frames": 7, "guidance": [1, 1], "fps": 12},
    "snapshot": {"snapshot": pixels(2), "carry": 0.9, "seed": 3},
    "footage": {"frames": 6, "footage": pixels(3, 6), "keep": 0.75, "steps": [2, 5]},
    "frame": {"frames": 1, "width": 40, "height": 24, "seed": 9},
}


@pytest.fixture(scope="module")
def pipeline() -> Iterator[Pipeline]:
    bundle = Bundle.open(str(MODEL))
    assert bundle.manifest.family not in families.installed()
    with Pipeline(bundle, OnnxBackend(bundle, Options("cpu", threads=1))) as made:
        yield made


@pytest.fixture(scope="module")
def server(pipeline: Pipeline, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    target: Path = tmp_path_factory.mktemp("triton") / "repository"
    write_repository(pipeline.bundle, target, Settings(slots=4, line=8, threads=1))
    with running(target, exit_timeout=1) as made:
        yield made
        assert made.process.poll() is None, made.last_words()


def served(server: Server, prompt: str = PROMPT, **options: Any) -> Result:
    given = {"palette": PALETTE, **options}
    events = list(stream(server.grpc, prompt, timeout=120, return_latents=True, **given))
    return events[-1]["latents"], np.concatenate([e["frames"] for e in events if e["event"] == "frames"])


def alone(pipeline: Pipeline, prompt: str = PROMPT, **options: Any) -> Result:
    steps = pipeline.stream(prompt, **{"palette": PALETTE, **options})
    last = [event for event in steps if isinstance(event, Step)][-1]
    return pipeline.backend.to_numpy(last.latents)[0], steps.videos[0].frames


def assert_same(found: Result, expected: Result) -> None:
    assert np.abs(found[0] - expected[0]).max() < 1e-4
    assert found[1].shape == expected[1].shape
    assert np.ptp(found[1]) > 100
    assert np.abs(found[1].astype(int) - expected[1]).max() <= 1


@pytest.mark.parametrize("case", CASES)
def test_frames_equal_pythons(server: Server, pipeline: Pipeline, case: str) -> None:
    assert_same(served(server, **CASES[case]), alone(pipeline, **CASES[case]))


def test_several_at_once_equal_single_requests(server: Server, pipeline: Pipeline) -> None:
    """Steps of several requests share batches. The decoder and the encoders get one sample at a time."""
    requests = [{**CASES[name], "seed": 70 + i} for i, name in enumerate(CASES)]
    with ThreadPoolExecutor(len(requests)) as threads:
        found = list(threads.map(lambda request: served(server, **request), requests))
    for together, request in zip(found, requests, strict=True):
        assert_same(together, alone(pipeline, **request))


def test_a_picture_may_be_a_file(server: Server, pipeline: Pipeline) -> None:
    found = served(server, palette=png(PALETTE), snapshot=png(pixels(2)))
    assert_same(found, alone(pipeline, snapshot=pixels(2)))


def test_the_inputs_are_the_models_controls(server: Server, pipeline: Pipeline) -> None:
    import tritonclient.grpc as grpc

    with grpc.InferenceServerClient(server.grpc) as client:
        taken = [tensor.name for tensor in client.get_model_metadata("higen").inputs]
    assert taken == [field.name for field in inputs(pipeline.manifest)]
    assert {control.name for control in pipeline.controls} <= set(taken)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"palette": None}, "palette: the loop surge needs one"),
        ({"swell": 3.0}, "swell=3.0"),
        ({"weather": "fog"}, "weather='fog': one of 'calm', 'storm'"),
        ({"motion": 1.0}, "unexpected inference input 'motion'"),
    ],
)
def test_wrong_requests_get_a_clear_error(server: Server, options: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError) as caught:
        served(server, **options)
    assert message in str(caught.value)
