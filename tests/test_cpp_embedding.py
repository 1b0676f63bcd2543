"""The C++ runtime embedded in other programs: closing, files that change, pictures, videos, packages."""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import cpp_build
import numpy as np
import onnx
import PIL.Image
import PIL.ImageOps
import pytest
from cpp_build import done
from made_up_model import write_made_up_model
from test_cpp import SANITIZERS, ask, compare, higen_run, made_up, pipelines, resealed
from test_manifest import WRONG, model

from higen.bundle import MANIFEST, Bundle, graph_file, put_file
from higen.errors import ManifestError
from higen.pipeline import Pipeline
from higen.version import __version__
from higen.video import Video

__all__ = ["ask", "made_up", "model", "pipelines"]  # fixtures

built, onnxruntime_root = cpp_build.built, cpp_build.onnxruntime_root  # fixtures

Ask = Callable[[Sequence[dict[str, Any]]], list[Any]]
PROMPT = 'a red kite; it\'s = "x" #1 日本'


def test_stopping_and_closing_a_hundred_times(built: Path, made_up: Path) -> None:
    done(built / "tests" / "lifecycle_tests", made_up, 100, timeout=600)


def test_every_table_that_python_refuses_is_refused(ask: Ask, model: Path, tmp_path: Path) -> None:
    """The wrong manifests of test_manifest.py. Each differs from a valid manifest by one change."""
    good = json.loads((model / MANIFEST).read_text(encoding="utf-8"))
    jobs = []
    for i, (_, change, _) in enumerate([("none", lambda document: None, ""), *WRONG]):
        folder = Path(shutil.copytree(model, tmp_path / str(i)))
        document = json.loads(json.dumps(good))
        change(document)
        text = resealed(document) if document.get("seal") == good["seal"] else json.dumps(document)
        (folder / MANIFEST).write_text(text, encoding="utf-8")
        jobs.append({"op": "bundle", "path": str(folder)})
    accepted, *refused = ask(jobs)
    assert accepted == good["name"]
    missing = [name for (name, _, _), found in zip(WRONG, refused, strict=True) if not isinstance(found, dict)]
    assert missing == []


@pytest.mark.parametrize("size", [0, -1, "", 1.5])
def test_a_graph_has_sizes_from_one(ask: Ask, made_up: Path, tmp_path: Path, size: object) -> None:
    folder = Path(shutil.copytree(made_up, tmp_path / "model"))
    document = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    next(iter(document["graphs"].values()))["inputs"][0]["shape"][0] = size
    (folder / MANIFEST).write_text(resealed(document), encoding="utf-8")
    (found,) = ask([{"op": "bundle", "path": str(folder)}])
    assert "shape[0]" in found["message"]
    with pytest.raises(ManifestError, match="shape"):
        Bundle.open(folder)


def test_weights_in_a_file_that_nobody_checked_are_refused(built: Path, tmp_path: Path) -> None:
    made = write_made_up_model(tmp_path / "model")
    name = graph_file("reader")
    graph = onnx.load(str(made.path / name), load_external_data=False)
    (tmp_path / "model" / "other.bin").write_bytes(bytes(4))
    tensor = onnx.TensorProto(name="aside", data_type=onnx.TensorProto.FLOAT, dims=[1], data_location=1)
    tensor.external_data.add(key="location", value="other.bin")
    graph.graph.initializer.append(tensor)
    (made.path / ".graph").write_bytes(graph.SerializeToString())
    put_file(made, made.path / ".graph", name, made.graphs[name])
    result = higen_run(built, made.path, "--info", check=False)
    assert result.returncode == 1
    assert "its weights lie in other.bin, which higen.json does not list" in result.stderr


def test_a_pipe_in_place_of_a_file_is_refused_without_waiting(built: Path, made_up: Path, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / MANIFEST)
    assert (
        "higen.json cannot be read: is not a regular file" in higen_run(built, tmp_path, "--info", check=False).stderr
    )
    os.mkfifo(tmp_path / "pipe.npy")
    for option in ("-o", "--picture=sketch=", "--matrix=drift="):
        given = [option, tmp_path / "pipe.npy"] if option == "-o" else [f"{option}{tmp_path / 'pipe.npy'}", "-ox.npy"]
        result = higen_run(built, made_up, "a kite", *given, check=False)
        assert result.returncode != 0
    result = higen_run(built, made_up, "a kite", "-o", tmp_path / "pipe.npy", check=False)
    assert "not a regular file" in result.stderr


def test_a_full_standard_output_is_an_error(built: Path, made_up: Path) -> None:
    for arguments in (["--info"], ["a kite", "-o", "-"], ["--help"]):
        with Path("/dev/full").open("wb") as full:
            result = subprocess.run([built / "higen-run", made_up, *arguments], stdout=full, stderr=subprocess.PIPE)
        assert result.returncode == 1
        assert b"No space left on device" in result.stderr


# Pictures


def file_of(picture: PIL.Image.Image, kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    picture.save(file, kind, **options)
    return file.getvalue()


def turned(way: int) -> PIL.Image.Exif:
    exif = PIL.Image.Exif()
    exif[0x0112] = way
    return exif


def pictures() -> dict[str, bytes]:
    """Picture files of all common kinds, 13 x 9 pixels."""
    random = np.random.default_rng(4)
    rgb = PIL.Image.fromarray(random.integers(0, 256, (9, 13, 3), np.uint8))
    smooth = PIL.Image.linear_gradient("L").resize((13, 9)).convert("RGB")
    rgba = PIL.Image.fromarray(random.integers(0, 256, (9, 13, 4), np.uint8))
    grey = rgb.convert("L")
    palette = rgb.quantize(16)
    found = {
        "rgb.png": file_of(rgb, "png"),
        "rgba.png": file_of(rgba, "png"),
        "grey.png": file_of(grey, "png"),
        "grey-alpha.png": file_of(rgba.convert("LA"), "png"),
        "bits.png": file_of(grey.convert("1"), "png"),
        "palette.png": file_of(palette, "png"),
        "palette-transparent.png": file_of(palette, "png", transparency=3),
        "key.png": file_of(rgb, "png", transparency=rgb.getpixel((0, 0))),
        "grey.jpg": file_of(grey, "jpeg", quality=95),
        "rgb.jpg": file_of(smooth, "jpeg", quality=95),
        "progressive.jpg": file_of(smooth, "jpeg", progressive=True),
        "cmyk.jpg": file_of(smooth.convert("CMYK"), "jpeg", quality=95),
        "rgb.ppm": file_of(rgb, "ppm"),
    }
    for way in range(1, 9):
        found[f"turned-{way}.jpg"] = file_of(smooth, "jpeg", quality=95, exif=turned(way))
        found[f"turned-{way}.png"] = file_of(rgb, "png", exif=turned(way))
    return found


def as_python_sees_it(path: Path) -> np.ndarray:
    upright = PIL.ImageOps.exif_transpose(PIL.Image.open(path)).convert("RGBA")
    white = PIL.Image.new("RGBA", upright.size, "white")
    return np.asarray(PIL.Image.alpha_composite(white, upright).convert("RGB"))


def test_pictures_from_files_equal_pythons(ask: Ask, built: Path, tmp_path: Path) -> None:
    made = pictures()
    for name, data in made.items():
        (tmp_path / name).write_bytes(data)
    # 16-bit grey, which Pillow 13 clips to white. The expected value is the high byte.
    deep = np.random.default_rng(5).integers(0, 2**16, (9, 13), np.uint16)
    PIL.Image.fromarray(deep).save(tmp_path / "deep.png")
    for name, found in zip(
        [*made, "deep.png"], ask([{"op": "image", "path": str(tmp_path / n)} for n in [*made, "deep.png"]]), strict=True
    ):
        if isinstance(found, dict) and found.get("error") == "HIGEN_ERROR_UNAVAILABLE":
            library = "libpng" if name.endswith("png") else "libjpeg"
            assert f"built without {library}" in found["message"]
            continue
        wanted = (deep / 257)[..., None] if name == "deep.png" else as_python_sees_it(tmp_path / name)
        pixels = np.reshape(found["rgb"], (found["height"], found["width"], 3)).astype(float)
        assert pixels.shape[:2] == wanted.shape[:2], name
        # Pillow's own libjpeg may round differently from the system's.
        assert np.abs(pixels - wanted).max() <= (3 if name.endswith("jpg") else 1), name


def test_broken_pictures_are_refused(ask: Ask, tmp_path: Path) -> None:
    made = pictures()
    cases = {name: made[name][: len(made[name]) // 2] for name in ("rgb.png", "rgb.jpg", "rgb.ppm")}
    cases |= {
        "empty.png": b"",
        "page.jpg": b"<!DOCTYPE html>",
        "clip.gif": b"GIF89a",
        "head.ppm": b"P6\n99999 1\n255\n",
    }
    jobs = []
    for name, data in cases.items():
        (tmp_path / name).write_bytes(data)
        jobs.append({"op": "image", "path": str(tmp_path / name)})
    (tmp_path / "folder.png").mkdir()
    for name in ("folder.png", "none.png"):
        jobs.append({"op": "image", "path": str(tmp_path / name)})
    for job, found in zip(jobs, ask(jobs), strict=True):
        assert found["error"] in ("HIGEN_ERROR_REQUEST", "HIGEN_ERROR_UNAVAILABLE"), job
        assert found["message"].startswith(job["path"])


def test_a_key_frame_from_a_file(
    built: Path, pipelines: Callable[[Path], Pipeline], made_up: Path, tmp_path: Path
) -> None:
    picture = np.arange(24 * 40 * 3, dtype=np.uint8).reshape(24, 40, 3)
    PIL.Image.fromarray(picture).save(tmp_path / "s.png")
    given = f"--picture=sketch={tmp_path / 's.png'}"
    tried = higen_run(built, made_up, "a kite", "-o", tmp_path / "t.npy", given, check=False)
    if "built without libpng" in tried.stderr:
        pytest.skip("no libpng: apt-get install libpng-dev")
    case = {"prompt": "a red kite climbs", "sketch": picture, "frames": 3, "size": (2, 4)}
    compare(built, pipelines(made_up), case, tmp_path / "v.npy", given)


@pytest.mark.parametrize("kind", ["npy", "csv"])
def test_a_matrix_from_a_file(
    built: Path, pipelines: Callable[[Path], Pipeline], made_up: Path, kind: str, tmp_path: Path
) -> None:
    matrix, path = np.linspace(-1, 1, 48).reshape(6, 8), tmp_path / f"m.{kind}"
    if kind == "npy":
        np.save(path, matrix.astype(np.float32))
    else:
        path.write_bytes(b"\xef\xbb\xbf" + "\r\n".join(", ".join(map(repr, row)) for row in matrix.tolist()).encode())
    case = {"prompt": "a red kite climbs", "drift": matrix, "frames": 6, "size": (2, 4)}
    compare(built, pipelines(made_up), case, tmp_path / "v.npy", f"--matrix=drift={path}")
    path.write_bytes(b"1 2\n3\n")
    result = higen_run(built, made_up, "a kite", "-o", tmp_path / "x.npy", f"--matrix=drift={path}", check=False)
    assert f"{path}: has rows of 2 and of 1 numbers" in result.stderr


# Files of frames


def test_a_file_is_replaced_where_its_owner_allows_it(built: Path, made_up: Path, tmp_path: Path) -> None:
    kept = tmp_path / "kept.npy"
    kept.write_bytes(b"mine")
    kept.chmod(0o444)
    result = higen_run(built, made_up, "a kite", "-o", kept, check=False)
    assert (result.returncode, kept.read_bytes()) == (1, b"mine")
    assert "is read-only: make it writable, or choose another name" in result.stderr
    (tmp_path / "out.npy.part").write_bytes(b"another's")
    (tmp_path / "there").mkdir()
    (tmp_path / "link.npy").symlink_to("there/target.npy")
    higen_run(built, made_up, "a kite", "-q", "-o", tmp_path / "out.npy")
    higen_run(built, made_up, "a kite", "-q", "-o", tmp_path / "link.npy")
    assert (tmp_path / "out.npy.part").read_bytes() == b"another's"
    assert (tmp_path / "link.npy").is_symlink()
    assert (tmp_path / "there" / "target.npy").read_bytes() == (tmp_path / "out.npy").read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["kept.npy", "link.npy", "out.npy", "out.npy.part", "there"]


def test_files_of_a_killed_run_are_removed_by_the_next(built: Path, made_up: Path, tmp_path: Path) -> None:
    """The next run is this program or Python. Files that only look similar are not touched."""
    command = [built / "higen-run", made_up, "a kite", "-o", tmp_path / "x.npy", "--steps=100", "--width=256"]
    for sweeper in ("c++", "python"):
        with subprocess.Popen(list(map(str, command)), stderr=subprocess.PIPE) as process:
            assert process.stderr is not None
            assert process.stderr.read(6) == b"\rdraft"
            process.kill()
        (left,) = tmp_path.iterdir()
        assert left.name.startswith(".higen-")
        foreign = tmp_path / ".higen-0123456789ab01234567"
        foreign.mkdir()
        if sweeper == "c++":
            higen_run(built, made_up, "a kite", "-q", "-o", tmp_path / "y.npy")
        else:
            Video(np.zeros((1, 8, 8, 3), np.uint8), 8).save(tmp_path / "y.npy")
        assert {p.name for p in tmp_path.iterdir()} == {foreign.name, "y.npy"}
        foreign.rmdir()
        (tmp_path / "y.npy").unlink()


def fake_ffmpeg(folder: Path, script: str) -> dict[str, str]:
    """An environment with a script as ffmpeg. The rest of PATH is only /usr/bin and /bin."""
    folder.mkdir()
    (folder / "ffmpeg").write_text(f"#!/bin/sh\n{script}\n")
    (folder / "ffmpeg").chmod(0o755)
    return {**os.environ, "PATH": f"{folder}:/usr/bin:/bin"}


def run_in(environment: dict[str, str], *command: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(list(map(str, command)), capture_output=True, text=True, env=environment, timeout=120)


def test_without_ffmpeg_a_video_says_what_to_install(built: Path, made_up: Path, tmp_path: Path) -> None:
    run = (built / "higen-run", made_up, "a kite", "-o", tmp_path / "v.mp4")
    result = run_in({**os.environ, "PATH": str(tmp_path)}, *run)
    assert result.returncode == 1
    assert "apt-get install ffmpeg; .y4m, .npy and .rgb need no other program" in result.stderr
    assert "draft" not in result.stderr  # the error comes before any work
    result = run_in(fake_ffmpeg(tmp_path / "bare", "exit 1"), *run)
    assert "needs an ffmpeg with the encoder libx264" in result.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["bare"]


def test_a_video_that_ffmpeg_cannot_write_leaves_nothing_behind(built: Path, made_up: Path, tmp_path: Path) -> None:
    """ffmpeg fails at once or after the last frame."""
    for name, fails in (
        ("early", 'echo "disk is full" >&2; exit 1'),
        ("late", 'cat >/dev/null; echo "no index" >&2; exit 1'),
    ):
        script = f'case "$*" in *null*) exit 0;; esac\n{fails}'
        target = tmp_path / "v.mp4"
        target.write_bytes(b"older")
        result = run_in(fake_ffmpeg(tmp_path / name, script), built / "higen-run", made_up, "a kite", "-o", target)
        assert result.returncode == 1
        assert f"ffmpeg failed: {'disk is full' if name == 'early' else 'no index'}" in result.stderr
        assert target.read_bytes() == b"older"
        shutil.rmtree(tmp_path / name)
        assert [p.name for p in tmp_path.iterdir()] == ["v.mp4"]


def test_ffmpeg_is_given_the_frames(built: Path, made_up: Path, tmp_path: Path) -> None:
    script = f'case "$*" in *null*) exit 0;; esac\nfor last; do :; done; cat >"$last"; echo "$@" >{tmp_path}/words'
    run = (built / "higen-run", made_up, "a kite", "-q", "--seed=3", "--width=8", "--height=8")
    result = run_in(fake_ffmpeg(tmp_path / "bin", script), *run, "-o", tmp_path / "v.mp4")
    assert result.returncode == 0, result.stderr
    done(*run, "-o", tmp_path / "v.rgb")
    assert (tmp_path / "v.mp4").read_bytes() == (tmp_path / "v.rgb").read_bytes()
    words = (tmp_path / "words").read_text()
    assert "-f rawvideo -pix_fmt rgb24 -s 8x8 -r 5 -i pipe:0" in words
    assert "-colorspace bt709 -color_primaries bt709 -color_trc bt709 -color_range tv -c:v libx264 -crf 17" in words


@pytest.mark.skipif(shutil.which("ffmpeg") is None, reason="no ffmpeg: apt-get install ffmpeg")
@pytest.mark.parametrize("suffix", ["mp4", "webm"])
def test_a_video_equals_pythons(built: Path, made_up: Path, suffix: str, tmp_path: Path) -> None:
    import av

    run = (built / "higen-run", made_up, PROMPT, "-q", f"--seed={2**64 - 1}", "--width=64", "--height=32", "--steps=2")
    done(*run, "-o", tmp_path / f"v.{suffix}")
    done(*run, "-o", tmp_path / "v.npy")
    frames = np.load(tmp_path / "v.npy")
    Video(frames, 5, {"prompt": PROMPT}).save(tmp_path / f"p.{suffix}")
    ours, theirs = (Video.open(tmp_path / f"{name}.{suffix}") for name in "vp")
    assert (ours.fps, len(ours), ours.prompt, ours.metadata["seed"]) == (5, 6, PROMPT, 2**64 - 1)
    # Both files are lossy. Ours does not lose much more than the other, and the colours are the same.
    lost = [np.abs(video.frames.astype(int) - frames).mean() for video in (ours, theirs)]
    assert lost[0] < 1.3 * lost[1] + 1
    assert np.abs(ours.frames.mean((0, 1, 2)) - frames.mean((0, 1, 2))).max() < 2
    said = []
    for name in "vp":
        with av.open(str(tmp_path / f"{name}.{suffix}")) as container:
            stream = container.streams.video[0]
            context = stream.codec_context
            tags = (context.colorspace, context.color_range, context.color_primaries, context.color_trc)
            said.append((context.name, context.pix_fmt, tags, stream.average_rate, container.metadata["title"]))
    assert said[0] == said[1]
    assert {path.name for path in tmp_path.iterdir()} == {f"p.{suffix}", "v.npy", f"v.{suffix}"}


# The installed package

PROGRAM = """
#include <stdio.h>
#include <higen/higen.h>
int main(int argc, char** argv) {
    higen_model* model = NULL;
    higen_model_info info = HIGEN_MODEL_INFO_INIT;
    if (argc != 2 || higen_model_open(argv[1], NULL, &model) != HIGEN_OK) { puts(higen_last_error()); return 1; }
    if (higen_model_describe(model, &info) != HIGEN_OK) return 2;
    printf("%s with higen %s\\n", info.name, higen_version());
    higen_model_close(model);
    return 0;
}
"""


def test_the_installed_package_needs_no_other_folder(
    built: Path, onnxruntime_root: str, made_up: Path, tmp_path: Path
) -> None:
    """The package is moved, then used through pkg-config and CMake. It must not contain paths of the build."""
    done("cmake", "--install", built, "--prefix", tmp_path / "first")
    prefix = (tmp_path / "first").rename(tmp_path / "moved")
    for name in ("lib/libhigen.so", "bin/higen-run"):
        found = done("readelf", "-d", prefix / name).stdout
        paths = [line for line in found.splitlines() if "RUNPATH" in line or "RPATH" in line]
        assert all("[$ORIGIN" in line and ":" not in line.split("[")[1] for line in paths)
        assert len(paths) == 1
    for file in (*prefix.rglob("*.cmake"), *prefix.rglob("*.pc")):
        text = file.read_text()
        assert str(tmp_path) not in text
        assert str(built) not in text
        assert onnxruntime_root not in text
    if shutil.which("pkg-config") is None:
        cpp_build.unavailable("no pkg-config: apt-get install pkg-config")
    (tmp_path / "program.c").write_text(PROGRAM)
    environment = {k: v for k, v in os.environ.items() if k != "LD_LIBRARY_PATH"}
    environment["PKG_CONFIG_PATH"] = str(prefix / "lib" / "pkgconfig")
    flags = done("pkg-config", "--cflags", "--libs", "higen", env=environment).stdout.split()
    assert done("pkg-config", "--modversion", "higen", env=environment).stdout.strip() == __version__
    done(
        "cc", *SANITIZERS.split(), tmp_path / "program.c", "-o", tmp_path / "program", *flags,
        f"-Wl,-rpath,{prefix / 'lib'}", env=environment,
    )  # fmt: skip
    assert done(tmp_path / "program", made_up, env=environment).stdout.startswith("made-up with higen ")
    libraries = done("ldd", tmp_path / "program", env=environment).stdout
    assert f"libonnxruntime.so.1 => {prefix}" in libraries
    (tmp_path / "CMakeLists.txt").write_text(
        "cmake_minimum_required(VERSION 3.22)\nproject(p LANGUAGES C)\nfind_package(higen 0.2 REQUIRED)\n"
        "add_executable(q program.c)\ntarget_link_libraries(q PRIVATE higen::higen)\n"
    )
    done(
        "cmake", "-S", tmp_path, "-B", tmp_path / "q", f"-DCMAKE_PREFIX_PATH={prefix}", f"-DCMAKE_C_FLAGS={SANITIZERS}"
    )
    done("cmake", "--build", tmp_path / "q")
    assert done(tmp_path / "q" / "q", made_up, env=environment).stdout.startswith("made-up with higen ")
    assert "made-up" in done(prefix / "bin" / "higen-run", made_up, "--info", env=environment).stdout
