"""The torch backend: one copy of the weights; inputs, files, device and precision are checked."""

from __future__ import annotations

import gc
import shutil
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import TINY, write_tiny_model
from safetensors.torch import load_file, save_file

from higen.backends import Backend
from higen.backends.options import Options
from higen.backends.torch import TorchBackend
from higen.bundle import Bundle, file_record, rewrite
from higen.errors import BackendError, BackendUnavailable, IntegrityError, ManifestError, RequestError
from higen.families.higen import spec
from higen.families.higen.network import load_denoiser

TABLES = spec.manifest(TINY)
STAGES = {stage.name: stage for stage in TABLES.stages}
SIZES = {**TABLES.fixed, "B": 2, "N": 3, "F": 3, "H": 4, "W": 6, "Y": 8, "X": 12}


def inputs(stage: str, dtype: str = "float32") -> dict[str, Any]:
    """Random inputs for a stage."""
    random = np.random.default_rng(0)
    tensors: dict[str, Any] = {}
    for tensor in STAGES[stage].inputs:
        shape = [n if isinstance(n, int) else SIZES[n] for n in tensor.shape]
        if tensor.dtype == "int64":
            tensors[tensor.name] = random.integers(0, 14, shape)
        else:
            tensors[tensor.name] = random.standard_normal(shape).astype(dtype)
    return tensors


@pytest.fixture(scope="module")
def backend(tiny_model: Path) -> TorchBackend:
    return TorchBackend(Bundle.open(tiny_model), Options(device="cpu"))


@pytest.fixture
def copy(tiny_model: Path, tmp_path: Path) -> Path:
    """A tiny model that may be changed."""
    return Path(shutil.copytree(tiny_model, tmp_path / "model"))


def alter(model: Path, name: str, change: Callable[[Path], object], record: bool = False) -> Bundle:
    """Change a file of a model; `record` also writes its new hash into the manifest."""
    change(model / name)
    if record:
        rewrite(model, lambda opened: replace(opened, files={**opened.files, name: file_record(model / name)}))
    return Bundle.open(model)


# Weights


def test_it_is_a_backend(backend: TorchBackend) -> None:
    assert isinstance(backend, Backend)
    assert backend.name == "torch"


def test_both_networks_share_the_very_same_tensors(backend: TorchBackend) -> None:
    spatial = dict(backend.module("spatial_unet").named_parameters())
    temporal = dict(backend.module("temporal_unet").named_parameters())
    assert set(spatial) < set(temporal)
    assert all(parameter is temporal[name] for name, parameter in spatial.items())
    assert not any("temporal" in name for name in spatial)
    pointers = {p.data_ptr() for p in temporal.values()}
    assert {p.data_ptr() for p in spatial.values()} < pointers


def test_decoder_and_encoder_are_one_autoencoder(backend: TorchBackend) -> None:
    decoder, encoder = backend.module("vae_decoder"), backend.module("vae_encoder")
    assert decoder.autoencoder is encoder.autoencoder


def test_nothing_is_left_to_train_or_drop(backend: TorchBackend) -> None:
    for stage in STAGES:
        module = backend.module(stage)
        assert not module.training
        assert not any(part.training for part in module.modules())
        assert not any(p.requires_grad or p.is_meta for p in module.parameters())


# Running


@pytest.mark.parametrize("stage", STAGES)
def test_every_stage_returns_what_the_table_says(backend: TorchBackend, stage: str) -> None:
    made = backend.run(stage, **inputs(stage))
    assert list(made) == [t.name for t in STAGES[stage].outputs]
    for tensor in STAGES[stage].outputs:
        value = backend.to_numpy(made[tensor.name])
        assert value.shape == tuple(n if isinstance(n, int) else SIZES[n] for n in tensor.shape)
        assert value.dtype == tensor.dtype
        assert np.isfinite(value).all()


@pytest.mark.parametrize("stage", STAGES)
def test_a_sample_does_not_depend_on_its_batch(backend: TorchBackend, stage: str) -> None:
    given = inputs(stage)
    together = backend.run(stage, **given)
    for i in range(len(next(iter(given.values())))):
        alone = backend.run(stage, **{name: value[i : i + 1] for name, value in given.items()})
        for name, value in alone.items():
            np.testing.assert_array_equal(backend.to_numpy(value)[0], backend.to_numpy(together[name])[i])


def test_columns_are_per_sample(backend: TorchBackend) -> None:
    """A server may batch requests that are at different steps."""
    given = inputs("temporal_unet")
    changed = {
        **given,
        "t": np.array([given["t"][0], 900], np.float32),
        "guidance": np.stack([given["guidance"][0], np.full(3, 9, np.float32)]),
    }
    before, after = backend.run("temporal_unet", **given), backend.run("temporal_unet", **changed)
    np.testing.assert_array_equal(before["latents"][0], after["latents"][0])
    assert (before["latents"][1] - after["latents"][1]).abs().max() > 1e-3


def test_results_may_be_fed_back_and_leave_by_to_numpy(backend: TorchBackend) -> None:
    given = inputs("temporal_unet")
    made = backend.run("temporal_unet", **given)
    assert isinstance(made["latents"], torch.Tensor)
    again = backend.run("temporal_unet", **{**given, **made})
    by_hand = {name: backend.to_numpy(value) for name, value in made.items()}
    np.testing.assert_array_equal(
        backend.to_numpy(again["latents"]),
        backend.to_numpy(backend.run("temporal_unet", **{**given, **by_hand})["latents"]),
    )


@pytest.mark.parametrize("stage", STAGES)
def test_wrong_inputs_are_refused(backend: TorchBackend, stage: str) -> None:
    given = inputs(stage)
    first = STAGES[stage].inputs[0].name
    for wrong in (given | {first: given[first][..., None]}, given | {"seed": given[first]}, {}):
        with pytest.raises(BackendError, match=f"^{stage}"):
            backend.run(stage, **wrong)


def test_guidance_and_update_are_the_stages_arithmetic(backend: TorchBackend) -> None:
    """v = v_e + g (v_c - v_e); x0 = alpha x - sigma v; x' = A x + B v + C previous: this is linear in g, A, B and C."""
    given = inputs("spatial_unet")
    zeros = {name: np.zeros(2, np.float32) for name in ("A", "B", "C")}
    ones = np.ones(2, np.float32)

    def latents(**change: Any) -> torch.Tensor:
        made: torch.Tensor = backend.run("spatial_unet", **{**given, **zeros, **change})["latents"]
        return made

    assert not latents().any()
    np.testing.assert_array_equal(latents(A=ones), given["latents"])
    np.testing.assert_array_equal(latents(C=ones), given["previous"])
    v0, v1, v5 = (latents(B=ones, guidance=g * ones[:, None]) for g in (0, 1, 5))
    np.testing.assert_allclose(v5, v0 + 5 * (v1 - v0), atol=1e-5)
    x0 = backend.run("spatial_unet", **{**given, "guidance": ones[:, None]})["previous"]
    alpha, sigma = (given[name].reshape(2, 1, 1, 1, 1) for name in ("alpha", "sigma"))
    np.testing.assert_allclose(x0, alpha * given["latents"] - sigma * v1.numpy(), atol=1e-6)
    same = latents(B=ones, guidance=7 * ones[:, None], empty_context=given["context"])
    np.testing.assert_allclose(same, v1, atol=1e-5)


def test_one_frame_of_the_spatial_network_ignores_the_temporal_weights(tiny_model: Path, copy: Path) -> None:
    def noise(path: Path) -> None:
        state = load_file(path)
        save_file({n: t + 1 if "temporal" in n else t for n, t in state.items()}, path)

    changed = TorchBackend(alter(copy, spec.UNET, noise, record=True), Options(device="cpu"))
    plain = TorchBackend(Bundle.open(tiny_model), Options(device="cpu"))
    for stage, same in (("spatial_unet", True), ("temporal_unet", False)):
        one, two = (b.run(stage, **inputs(stage))["latents"] for b in (plain, changed))
        assert torch.equal(one, two) is same


@pytest.mark.parametrize(
    ("precision", "dtype", "tolerance"),
    [("bf16", "bfloat16", 0.1), ("fp16", "float16", 0.02), ("int8.fp16", "float16", 0.02)],
)
def test_less_precision(backend: TorchBackend, tiny_model: Path, precision: str, dtype: str, tolerance: float) -> None:
    """PyTorch computes in 16 bits or more, so a quantised precision uses its base precision."""
    less = TorchBackend(Bundle.open(tiny_model), Options(device="cpu", precision=precision))
    given = inputs("temporal_unet")
    made, exact = less.run("temporal_unet", **given)["latents"], backend.run("temporal_unet", **given)["latents"]
    assert made.dtype == torch.float32
    assert next(less.module("temporal_unet").parameters()).dtype == getattr(torch, dtype)
    assert 0 < (made - exact).abs().max() < tolerance * exact.abs().max()


@pytest.mark.parametrize(("native", "said"), [(False, True), (True, False), (None, False)])
def test_bf16_says_where_it_is_slow(
    tiny_model: Path, native: bool | None, said: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("higen.backends.torch.has_bf16", lambda: native)
    slow = TorchBackend(Bundle.open(tiny_model), Options(device="cpu", precision="bf16"))
    assert ("many times faster" in slow.describe("conditioner")) is said
    assert TorchBackend(Bundle.open(tiny_model), Options(device="cpu")).describe("conditioner") == "cpu, fp32"


def test_closing_frees_the_networks(tiny_model: Path) -> None:
    backend = TorchBackend(Bundle.open(tiny_model), Options(device="cpu"))
    assert backend.choices == {}
    for stage in STAGES:
        backend.prepare(stage)
    held = weakref.ref(next(backend.module("temporal_unet").parameters()))
    assert {name: choice.details for name, choice in backend.choices.items()} == dict.fromkeys(STAGES, "cpu, fp32")
    backend.close()
    gc.collect()
    assert backend.choices == {}
    assert held() is None
    backend.close()


# Wrong files, devices and precisions


@pytest.mark.parametrize(
    ("name", "stage"),
    [(spec.UNET, "temporal_unet"), (spec.TEXT_ENCODER, "text_encoder"), (spec.AUTOENCODER, "vae_decoder")],
)
def test_altered_weights(copy: Path, name: str, stage: str) -> None:
    def flip(path: Path) -> None:
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        path.write_bytes(content)

    opened = alter(copy, name, flip)
    with pytest.raises(IntegrityError, match=rf"{name}: its content does not match the sha256"):
        TorchBackend(opened, Options(device="cpu")).prepare(stage)
    TorchBackend(opened, Options(device="cpu", verify=False)).prepare(stage)


@pytest.mark.parametrize(
    ("name", "stage"),
    [(spec.UNET, "spatial_unet"), (spec.TEXT_ENCODER, "text_encoder"), (spec.AUTOENCODER, "vae_encoder")],
)
def test_weights_of_another_architecture(copy: Path, name: str, stage: str) -> None:
    def other(path: Path) -> None:
        state = load_file(path)
        first, second, *_ = sorted(n for n in state if state[n].ndim > 1)
        state["stranger"] = torch.zeros(3)
        state[first] = torch.zeros(5, 7)
        del state[second]
        save_file(state, path)

    backend = TorchBackend(alter(copy, name, other, record=True), Options(device="cpu"))
    with pytest.raises(
        IntegrityError, match=r"3 tensors do not fit(.|\n)*missing (.|\n)*extra stranger \[3\](.|\n)*\[5, 7\]"
    ):
        backend.prepare(stage)


def test_a_file_that_is_not_safetensors(copy: Path) -> None:
    opened = alter(copy, spec.UNET, lambda path: path.write_bytes(b"PK\x03\x04" * 9), record=True)
    with pytest.raises(IntegrityError, match=r"unet\.safetensors: cannot be read as safetensors"):
        load_denoiser(opened.file(spec.UNET), TINY.unet, torch.device("cpu"))


def test_a_companion_that_its_library_refuses(tmp_path: Path) -> None:
    opened = write_tiny_model(tmp_path / "model")
    config = replace(TINY, autoencoder=replace(TINY.autoencoder, arguments={"block_out_channels": "wide"}))
    with pytest.raises(ManifestError, match=r"autoencoder\.arguments=.*diffusers refuses it"):
        TorchBackend(replace(opened, manifest=spec.manifest(config)), Options(device="cpu")).prepare("vae_decoder")


@pytest.mark.parametrize("device", ["gpu", "", "cpu:x", "cuda:99", "mps", "xla", "meta", "vulkan"])
def test_a_device_that_is_not_there(tiny_model: Path, device: str) -> None:
    with pytest.raises(BackendError, match=f"^device={device!r}"):
        TorchBackend(Bundle.open(tiny_model), Options(device=device))


@pytest.mark.parametrize("precision", ["int4", "float16", "", "float64"])
def test_a_precision_that_is_unknown(precision: str) -> None:
    with pytest.raises(RequestError, match=f"^precision={precision!r}: one of 'fp32', 'fp16', 'bf16'"):
        Options(device="cpu", precision=precision)


def test_a_family_that_is_not_installed(tiny_model: Path) -> None:
    opened = Bundle.open(tiny_model)
    stranger = replace(opened, manifest=replace(opened.manifest, family="stranger"))
    with pytest.raises(BackendUnavailable, match=r"^family='stranger': not installed here; installed are .*higen"):
        TorchBackend(stranger, Options(device="cpu"))


class Whole(torch.nn.Module):
    """Records the number of samples of each call."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[int] = []

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        self.seen.append(len(tokens))
        return torch.zeros(len(tokens), SIZES["L"], SIZES["Dt"])


@pytest.mark.parametrize(("batch", "seen"), [(True, [1, 1]), (False, [2])])
def test_a_stage_that_may_not_be_batched_is_run_as_given(tiny_model: Path, batch: bool, seen: list[int]) -> None:
    opened = Bundle.open(tiny_model)
    stages = tuple(replace(s, batch=batch) if s.name == "text_encoder" else s for s in opened.manifest.stages)
    backend = TorchBackend(replace(opened, manifest=replace(opened.manifest, stages=stages)), Options(device="cpu"))
    module = backend._modules["text_encoder"] = Whole()
    backend.run("text_encoder", tokens=np.zeros((2, SIZES["L"]), np.int64))
    assert module.seen == seen


def test_a_step_with_one_branch_is_the_guided_one_at_1(backend: TorchBackend) -> None:
    for name in ("spatial_unet", "temporal_unet"):
        given = inputs(name)
        given["guidance"] = np.ones_like(given["guidance"])
        guided = backend.run(name, **given)
        one = {key: value for key, value in given.items() if key not in ("guidance", "empty_context")}
        plain = backend.run(f"{name}_plain", **one)
        for key, value in guided.items():
            assert (plain[key] - value).abs().max() < 2e-6 * value.abs().max()
