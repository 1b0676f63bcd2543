"""A tiny data set and the settings of a tiny training run over it."""

from __future__ import annotations

import os
import signal
import traceback
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch
from conftest import TINY
from numpy.typing import NDArray

from higen.families.higen.spec import ModelConfig
from higen.train.loop import Loop
from higen.train.settings import Settings, read_settings
from higen.video import Video

# Without dropout, because its layers draw from the global generator, differently in each process.
MODEL: ModelConfig = replace(TINY, unet=replace(TINY.unet, dropout=0.0))
CAPTIONS = ("a blue whale swimming", "a red heart beating", "a green star")


def killed_after(steps: int, work: Callable[[], object]) -> None:
    """Train in a forked child that kills itself (SIGKILL) after this many steps, before the last step is saved.

    The child computes in one thread, because a fork loses the parent's other threads. The fixture `single` makes the
    parent compute in one thread too.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about forking with threads
        child = os.fork()
    if not child:
        code = 1
        try:
            torch.set_num_threads(1)  # the parent's threads do not exist in the child
            signal.alarm(60)
            advance, made = Loop.advance, 0

            def counted(loop: Loop) -> dict[str, torch.Tensor]:
                nonlocal made
                found = advance(loop)
                made += 1
                if made == steps:
                    os.kill(os.getpid(), signal.SIGKILL)
                return found

            Loop.advance = counted  # type: ignore[method-assign]
            work()
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


def moving_square(shade: int, frames: int = 6, height: int = 20, width: int = 28) -> NDArray[np.uint8]:
    """A bright square that moves to the right by 2 pixels per frame over a plain background."""
    clip = np.full((frames, height, width, 3), shade, np.uint8)
    for i in range(frames):
        clip[i, 4:12, 2 * i : 2 * i + 8] = (255, 60, 0)
    return clip


def write_counted(path: Path, frames: int = 96, cut: int = 0) -> Path:
    """A video at 8 frames per second. Frames show their number as seven bars; about one key frame per second.

    `cut`: the first frames are cut off as by `ffmpeg -ss ... -c copy`. MP4 then keeps the frames since the last key
    frame and hides them with an edit list.
    """
    bits = (np.arange(frames)[:, None] >> np.arange(7)) & 1
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=8)
        stream.width, stream.height, stream.pix_fmt, stream.bit_rate = 56, 16, "yuv420p", 4_000_000
        stream.gop_size, stream.max_b_frames = 12, 2
        packets = []
        for row in bits.astype(np.uint8):
            bars = np.broadcast_to(np.repeat(20 + 200 * row, 8)[None, :, None], (16, 56, 3))
            packets += stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(bars)))
        for packet in [*packets, *stream.encode()]:
            shift = round(cut / (8 * packet.time_base))
            packet.pts, packet.dts = packet.pts - shift, packet.dts - shift
            container.mux(packet)
    return path


def numbers_shown(clip: NDArray[np.uint8]) -> list[int]:
    """The frame numbers shown by a clip of `write_counted`, [F,16,56,3]."""
    shown = clip.reshape(len(clip), 16, 7, 8, 3).mean(axis=(1, 3, 4)) > 120
    return (shown @ (1 << np.arange(7))).tolist()


def write_clips(folder: Path, captions: tuple[str, ...] = CAPTIONS, fps: float = 8) -> Path:
    """A folder of lossless clips with a caption each."""
    folder.mkdir(parents=True)
    for i, caption in enumerate(captions):
        Video(moving_square(40 * i), fps).save(folder / f"clip{i}.webm")
        (folder / f"clip{i}.txt").write_text(caption)
    return folder


def write_tower(folder: Path, seed: int = 0) -> torch.nn.Module:
    """A folder with a tiny CLIP picture tower in transformers' format, and the tower."""
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    torch.manual_seed(seed)
    tower = CLIPVisionModelWithProjection(CLIPVisionConfig(**sizes, image_size=8, patch_size=4, projection_dim=6))
    tower.eval().save_pretrained(folder)
    return tower


def as_toml(sections: dict[str, dict[str, Any]]) -> str:
    """Settings as TOML."""

    def value(given: Any) -> str:
        if isinstance(given, (list, tuple)):
            return f"[{', '.join(map(value, given))}]"
        if isinstance(given, bool):
            return str(given).lower()
        return f'"{given}"' if isinstance(given, (str, Path)) else repr(given)

    return "\n".join(
        f"[{name}]\n" + "".join(f"{key} = {value(given)}\n" for key, given in keys.items())
        for name, keys in sections.items()
    )


def write_settings(file: Path, model: Path, clips: Path, **changes: Any) -> Path:
    """A TOML file for a run of 6 steps; changes are given as section__key=value."""
    sections: dict[str, dict[str, Any]] = {
        "model": {"init": model},
        "data": {"path": clips, "frames": 4, "images": 2, "videos": 2, "workers": 0},
        "cues": {},
        "objective": {},
        "optimiser": {"learning_rate": 1e-3, "warm_up": 2},
        "lora": {},
        "codec": {},
        "distil": {},
        "run": {
            "output": file.parent / "run",
            "steps": 6,
            "seed": 3,
            "log_every": 1,
            "save_every": 2,
            "tensorboard": False,
        },
    }
    for key, value in changes.items():
        section, _, name = key.partition("__")
        if value is None:
            sections[section].pop(name)
        else:
            sections[section][name] = value
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(as_toml(sections))
    return file


def make_settings(folder: Path, model: Path, clips: Path, **changes: Any) -> Settings:
    """The settings that such a file gives."""
    return read_settings(write_settings(folder / "train.toml", model, clips, **changes))
