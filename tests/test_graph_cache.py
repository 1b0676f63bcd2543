"""Optimised graphs that are kept between processes: results stay the same, and a bad cache never makes a load fail."""

from __future__ import annotations

import os
import platform
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
from numpy.typing import NDArray

from higen import cpu
from higen.api import default_model
from higen.backends import graph_cache
from higen.backends.graph_cache import GraphCache, cache_folder
from higen.backends.onnx import OnnxBackend
from higen.backends.options import Options
from higen.bundle import Bundle
from higen.errors import RequestError

STAGE = "spatial_unet"


@pytest.fixture(scope="module")
def bundle() -> Bundle:
    return Bundle.open(default_model())


@pytest.fixture
def graphs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The cache folder for graphs, which does not exist yet."""
    monkeypatch.setenv("HIGEN_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "graphs"


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The paths that sessions are made from."""
    session, paths = ort.InferenceSession, []

    def recorded(path: str, options: ort.SessionOptions, **rest: Any) -> ort.InferenceSession:
        paths.append(path)
        return session(path, options, **rest)

    monkeypatch.setattr(ort, "InferenceSession", recorded)
    return paths


def step(bundle: Bundle) -> NDArray[np.float32]:
    """The result of one step in a new backend; no warning is allowed."""
    random, manifest = np.random.default_rng(0), bundle.manifest
    sizes = {"B": 1, "F": 1, "H": 8, "W": 8, "T": 12, **manifest.fixed}
    given = {}
    for tensor in manifest.stage(STAGE).inputs:
        shape = [symbol if isinstance(symbol, int) else sizes[symbol] for symbol in tensor.shape]
        given[tensor.name] = random.random(shape, np.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        backend = OnnxBackend(bundle, Options("cpu", threads=1))
        outputs = backend.run(STAGE, **given)
        made = backend.to_numpy(next(iter(outputs.values()))).copy()
        backend.close()
    return made


def entries(graphs: Path) -> list[Path]:
    return sorted(graphs.glob("*.onnx"))


def test_a_kept_graph_gives_the_same_bits(
    bundle: Bundle, graphs: Path, loaded: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    graph = str(bundle.path / f"{STAGE}.onnx")
    with monkeypatch.context() as patched:
        patched.setenv("HIGEN_CACHE", "off")
        truth = step(bundle)
    assert not graphs.parent.exists()
    first = step(bundle)
    (entry,) = entries(graphs)
    second = step(bundle)
    assert loaded == [graph, graph, str(entry)]
    assert np.array_equal(first, truth)
    assert np.array_equal(second, truth)
    assert entries(graphs) == [entry] == list(graphs.iterdir())
    assert entry.stem.partition("-")[2] == sha256(entry.read_bytes()).hexdigest()
    if os.name == "posix":
        assert (graphs.stat().st_mode & 0o777, entry.stat().st_mode & 0o777) == (0o700, 0o600)


def test_a_damaged_entry_is_made_again(bundle: Bundle, graphs: Path, loaded: list[str]) -> None:
    truth = step(bundle)
    (entry,) = entries(graphs)
    whole = entry.read_bytes()
    for damaged in (whole[: len(whole) // 2], b"", bytes([whole[0] ^ 1]) + whole[1:]):
        entry.write_bytes(damaged)
        assert np.array_equal(step(bundle), truth)
        assert loaded[-1] == str(bundle.path / f"{STAGE}.onnx")
        (entry,) = entries(graphs)  # the digest changes, because ONNX Runtime does not always write the same bytes
        assert entry.stem.partition("-")[2] == sha256(entry.read_bytes()).hexdigest()
    # The digest in its name is correct, but it is not a graph.
    entry.unlink()
    wrong = entry.with_name(f"{entry.stem.partition('-')[0]}-{sha256(b'no graph').hexdigest()}.onnx")
    wrong.write_bytes(b"no graph")
    assert np.array_equal(step(bundle), truth)
    assert loaded[-2:] == [str(wrong), str(bundle.path / f"{STAGE}.onnx")]
    assert len(entries(graphs)) == 1


@pytest.mark.parametrize("what", ["file in its place", "others can write it", "cannot be made"])
def test_where_it_cannot_be_used_the_graph_is_loaded(
    bundle: Bundle, graphs: Path, loaded: list[str], what: str
) -> None:
    if what == "file in its place":
        graphs.parent.mkdir()
        graphs.write_bytes(b"mine")
    elif what == "others can write it":
        graphs.mkdir(parents=True)
        graphs.chmod(0o777)
    else:
        graphs.parent.write_bytes(b"mine")
    step(bundle)
    step(bundle)
    assert loaded == [str(bundle.path / f"{STAGE}.onnx")] * 2
    assert not graphs.is_dir() or not list(graphs.iterdir())


def test_an_entry_is_of_one_processor_and_one_build(
    bundle: Bundle, graphs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step(bundle)
    monkeypatch.setattr(cpu, "flags", lambda: frozenset({"sse2"}))
    step(bundle)
    monkeypatch.setattr(ort, "__version__", "1.0")
    step(bundle)
    assert len(entries(graphs)) == 3
    monkeypatch.setattr(cpu, "flags", lambda: None)
    monkeypatch.setattr(platform, "processor", lambda: "")
    assert GraphCache.of_user() is None


def test_files_that_were_not_checked_are_not_cached(bundle: Bundle, graphs: Path) -> None:
    OnnxBackend(bundle, Options("cpu", verify=False)).prepare(STAGE)
    assert not graphs.exists()


def test_small_graphs_and_large_models_are_not_cached(
    bundle: Bundle, graphs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    OnnxBackend(bundle, Options("cpu")).prepare("text_encoder")
    monkeypatch.setattr(graph_cache, "LARGEST", 1 << 20)
    step(bundle)
    assert not graphs.exists()


def test_the_size_is_bounded(bundle: Bundle, graphs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    graphs.mkdir(parents=True, mode=0o700)
    old, new, other = (graphs / f"{a * 64}-{b * 64}.onnx" for a, b in ("00", "11", "x2"))
    for path, age in ((old, 1), (new, 2), (other, 0)):
        path.write_bytes(bytes(1000))
        os.utime(path, (age, age))
    monkeypatch.setattr(graph_cache, "LIMIT", 20_000_000)
    step(bundle)
    assert len(entries(graphs)) == 4
    monkeypatch.setattr(graph_cache, "LIMIT", 1)
    monkeypatch.setattr(cpu, "flags", lambda: frozenset({"sse2"}))
    step(bundle)
    kept = entries(graphs)
    assert len(kept) == 2
    assert other in kept  # its name is not one of ours


def test_several_writers_at_once(bundle: Bundle, graphs: Path) -> None:
    with ThreadPoolExecutor(3) as pool:
        made = list(pool.map(lambda _: step(bundle), range(3)))
    assert all(np.array_equal(one, made[0]) for one in made)
    assert 1 <= len(entries(graphs)) <= 3
    assert entries(graphs) == sorted(graphs.iterdir())


def test_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("HIGEN_CACHE")
    for named, folder in (("", tmp_path / ".cache"), ("a/b", tmp_path / ".cache"), ("/c", Path("/c"))):
        monkeypatch.setenv("XDG_CACHE_HOME", named)
        assert cache_folder() == folder / "higen"
    monkeypatch.setenv("HIGEN_CACHE", "off")
    assert cache_folder() is None
    monkeypatch.setenv("HIGEN_CACHE", "graphs")
    with pytest.raises(RequestError, match="HIGEN_CACHE='graphs': an absolute path of a folder, or off"):
        OnnxBackend(Bundle.open(default_model()))
