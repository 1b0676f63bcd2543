"""Shared fixtures: the folder of the reference, and a tiny model directory with random weights."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import hypothesis
import pytest
import torch
from safetensors.torch import save_file

from higen import bundle
from higen.bundle import Bundle
from higen.families.higen import spec
from higen.families.higen.spec import AutoencoderConfig, Defaults, ModelConfig, TextConfig, UNetConfig
from higen.families.higen.unet import Denoiser
from higen.models.companions import autoencoder, text_encoder
from higen.tokenizer import build_word_tokenizer
from higen.train.settings import Settings

# No cache is kept between test runs. Processes that tests start inherit this setting.
os.environ["HIGEN_CACHE"] = "off"

# The first gradient starts the threads of autograd. After an export there is a device that has such threads, and then a
# forked child cannot train any more (training_run.killed_after).
torch.ones(1, requires_grad=True).sum().backward()

# Use the same examples everywhere and no time limit, so that results do not depend on the machine's speed.
hypothesis.settings.register_profile(
    "higen", deadline=None, derandomize=True, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("higen")

LONGEST = (
    *("test_engine_topology.py", "test_cpp.py", "test_engine_stages.py", "test_animatediff.py", "test_modelscope.py"),
    *("test_svd.py", "test_vgen.py", "test_stable_diffusion.py"),
)
"""The files that take longest. They start first, so that no worker of pytest-xdist ends long after the others."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: LONGEST.index(item.path.name) if item.path.name in LONGEST else len(LONGEST))


WORDS = ("a", "blue", "whale", "red", "heart", "green", "star", "swimming", "beating", ",")

TINY = ModelConfig(
    name="tiny",
    unet=UNetConfig(
        base_channels=32,
        channel_multipliers=(1, 2),
        blocks_per_level=1,
        attention_levels=(True, False),
        head_dim=16,
        first_temporal_heads=2,
        text_dim=32,
        context_dim=32,
        context_tokens=4,
        context_depth=1,
        context_heads=4,
    ),
    text=TextConfig(
        clip={
            "vocab_size": len(WORDS) + 4,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "max_position_embeddings": 12,
            "projection_dim": 32,
        },
        context_length=12,
        clean=False,
    ),
    autoencoder=AutoencoderConfig(
        arguments={
            "block_out_channels": [32, 32],
            "down_block_types": ["DownEncoderBlock2D"] * 2,
            "up_block_types": ["UpDecoderBlock2D"] * 2,
            "latent_channels": 4,
            "layers_per_block": 1,
        },
        factor=2,
        scale=(0.5,),
    ),
    defaults=Defaults(frames=4, width=24, height=16, steps=(4, 4), guidance=(3.0, 3.0), motion=60.0),
    max_frames=40,
    prompts=("a blue whale swimming", "a red heart beating"),
)


def write_tiny_model(path: Path, config: ModelConfig = TINY, seed: int = 0) -> Bundle:
    """A model directory with random weights, including the layers that training initialises with zeros."""
    torch.manual_seed(seed)
    denoiser = Denoiser(config.unet)
    for parameter in denoiser.parameters():
        if not parameter.detach().any():
            torch.nn.init.normal_(parameter, std=0.05)
    with bundle.create_model(path, spec.manifest(config)) as folder:
        save_file(denoiser.state_dict(), folder / spec.UNET)
        save_file(text_encoder(config.text.clip).state_dict(), folder / spec.TEXT_ENCODER)
        save_file(
            autoencoder(config.autoencoder.kind, config.autoencoder.arguments).state_dict(), folder / spec.AUTOENCODER
        )
        build_word_tokenizer(WORDS).save(str(folder / spec.TOKENIZER))
    return Bundle.open(path)


@contextmanager
def full_disk(room: int) -> Iterator[None]:
    """Inside the block, no file of this process can grow beyond `room` bytes: writing fails with EFBIG."""
    import resource  # Unix only

    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model directory; read it, do not change it."""
    return write_tiny_model(tmp_path_factory.mktemp("models") / "tiny").path


@pytest.fixture(scope="session")
def preconditioned_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`tiny_model` with prior preconditioning, a pooled context and optional cues, as the default model has."""
    unet = replace(TINY.unet, prior_preconditioning=True, pooled_context=True)
    config = replace(TINY, unet=unet, optional_cues=True, defaults=replace(TINY.defaults, motion=None, appearance=None))
    return write_tiny_model(tmp_path_factory.mktemp("models") / "preconditioned", config).path


@pytest.fixture(scope="session")
def training_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model that the training tests start from; read it, do not change it."""
    from training_run import MODEL  # a late import, because it imports this module

    return write_tiny_model(tmp_path_factory.mktemp("training") / "tiny", MODEL).path


@pytest.fixture(scope="session")
def training_clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three clips with captions; read them, do not change them."""
    from training_run import write_clips

    return write_clips(tmp_path_factory.mktemp("training") / "clips")


@pytest.fixture(scope="session")
def whole_run(tmp_path_factory: pytest.TempPathFactory, training_model: Path, training_clips: Path) -> Settings:
    """An uninterrupted run of 6 steps on `training_clips`; read its files, do not change them."""
    from training_run import make_settings

    from higen.train.trainer import train

    settings = make_settings(tmp_path_factory.mktemp("whole"), training_model, training_clips)
    train(settings)
    return settings


@pytest.fixture(scope="session")
def reference() -> Path:
    """The whole public reference. Tests that need it are skipped if the folder does not exist."""
    folder = Path(__file__).resolve().parents[2] / "shared" / "reference"
    if not folder.is_dir():
        pytest.skip("../shared/reference is not here; tests/reference is a subset of it")
    return folder


@pytest.fixture
def single() -> Iterator[None]:
    """Compute in one thread, as a forked child does."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
