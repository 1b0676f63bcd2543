"""Weighted words and long prompts: the parts of a prompt, its chunks of tokens, and the manifest's rules for them."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cpp_build
import numpy as np
import prompt_truth as truth
import pytest
import sealing
from hypothesis import given, settings
from hypothesis import strategies as st

from higen.chunk_runner import ChunkRunner
from higen.errors import ManifestError, PromptWarning, RequestError
from higen.families.stable_diffusion import spec
from higen.families.stage_rows import CHUNKS, Sampling, clip_text
from higen.manifest import Manifest
from higen.manifest_file import Opened, manifest_text, read_manifest
from higen.noise_schedule import NoiseSchedule, Solver
from higen.prompt_chunks import weighted
from higen.prompt_weights import pieces
from higen.request import make_request
from higen.sampler import Plan, denoise
from higen.schedule import solver_table
from higen.stages import Output, Stage, Tensor
from higen.tables import TextRules, Tiles, Windows
from higen.tokenizer import PromptTokenizer, build_clip_tokenizer, write_tokenizer
from higen.typed_json import from_json, to_json

built, onnxruntime_root = cpp_build.built, cpp_build.onnxruntime_root  # fixtures

COMMAS = "a red apple on a wooden table, " * 20
PLAIN = "word " * 160

# The examples in the web UI's documentation of its parser.
PUBLISHED = {
    "normal text": [("normal text", 1.0)],
    "an (important) word": [("an ", 1.0), ("important", 1.1), (" word", 1.0)],
    "(unbalanced": [("unbalanced", 1.1)],
    r"\(literal\]": [("(literal]", 1.0)],
    "(unnecessary)(parens)": [("unnecessaryparens", 1.1)],
    "a (((house:1.3)) [on] a (hill:0.5), sun, (((sky))).": [
        ("a ", 1.0),
        ("house", 1.5730000000000004),
        (" ", 1.1),
        ("on", 1.0),
        (" a ", 1.1),
        ("hill", 0.55),
        (", sun, ", 1.1),
        ("sky", 1.4641000000000006),
        (".", 1.1),
    ],
}


def parts(prompt: str) -> list[tuple[str | None, float]]:
    return [(piece.text, piece.weight) for piece in pieces(prompt)]


@pytest.mark.parametrize("prompt", PUBLISHED)
def test_parts_are_those_of_the_web_ui(prompt: str) -> None:
    got, wanted = parts(prompt), PUBLISHED[prompt]
    assert [text for text, _ in got] == [text for text, _ in wanted]
    assert [weight for _, weight in got] == pytest.approx([weight for _, weight in wanted])


@pytest.mark.parametrize(
    ("prompt", "wanted"),
    [
        ("a)b]", [("a)b]", 1.0)]),
        ("a:b:1.3)", [("a:b:1.3)", 1.0)]),
        ("(note: hi)", [("note: hi", 1.1)]),
        ("(a: +.5 )", [("a", 0.5)]),
        ("(a:-1)", [("a", -1.0)]),
        ("(a:0)", [("a", 0.0)]),
        ("BREAKFAST BREAK tea", [("BREAKFAST ", 1.0), (None, 1.0), (" tea", 1.0)]),
        ("(a BREAK b:1.2)", [("a ", 1.2), (None, 1.0), (" b", 1.2)]),
        ("a\\b \\\\", [("ab \\", 1.0)]),
        ("()[]", []),
        ("", []),
    ],
    ids=str,
)
def test_parts_of_unusual_prompts(prompt: str, wanted: list[tuple[str | None, float]]) -> None:
    assert parts(prompt) == wanted


@pytest.mark.parametrize(
    ("prompt", "said"),
    [
        ("(a:1e9)", "'1e9'"),
        ("(a:nan)", "'nan'"),
        ("(a:-Infinity)", "'-Infinity'"),
        ("(a:1.2.3)", "'1.2.3'"),
        ("(a:101)", "101"),
        ("((a:99):99)", "9801"),
        ("(a:" + "9" * 400 + ")", "from -100 to 100"),
        ("(" * 40 + "a", "32 open brackets"),
        ("[cat:dog:0.5]", "prompt editing"),
        ("a [cat|dog]", "prompt editing"),
    ],
    ids=lambda value: value[:20],
)
def test_wrong_weights_are_refused(prompt: str, said: str) -> None:
    with pytest.raises(RequestError, match="negative_prompt") as error:
        pieces(prompt, "negative_prompt")
    assert said in str(error.value)


@settings(max_examples=300, deadline=None)
@given(st.text(alphabet="ab,:.1 ()[]\\", max_size=30))
def test_parts_are_those_of_the_second_reading_where_brackets_nest(prompt: str) -> None:
    """Crossing brackets, as in ([)], have no unique reading."""
    try:
        got = parts(prompt)
    except RequestError:
        return
    if not _nests(prompt):
        return
    wanted = truth.parsed(prompt)
    assert "".join(text or "" for text, _ in got) == "".join(text or "" for text, _ in wanted)
    letters = [[w for text, weight in side for w in [weight] * len(text or "")] for side in (got, wanted)]
    assert letters[0] == pytest.approx(letters[1])


def _nests(prompt: str) -> bool:
    opened: list[str] = []
    for token in truth.TOKEN.findall(prompt):
        if token in ("(", "["):
            opened.append(token)
        closes = token in (")", "]") or (token[0] == ":" and len(token) > 1)
        if closes and (not opened or opened.pop() != {"]": "["}.get(token, "(")):
            return False
    return True


# Chunks.


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    write_tokenizer(build_clip_tokenizer(), path)
    return path


@pytest.fixture(scope="module")
def clip(file: Path) -> PromptTokenizer:
    return PromptTokenizer.from_file(file, clip_text("tokenizer.json", 77, 49407))


PROMPTS = [
    "",
    "a cat",
    "BREAK a cat BREAK BREAK a dog BREAK",
    "a (red:1.4) [apple] on a ((wooden table:1.2), dark)",
    COMMAS,
    PLAIN,
    f"{'word ' * 75}BREAK next",
    f"{'word ' * 75}, next",
    f"{'word ' * 54}, {'word ' * 30}",
    f"{'word ' * 55}, {'word ' * 30}",
    f"({'word ' * 50}, (far away, {'word ' * 60}:1.3)",
    "naïve café (日本:1.2) it's",
]


@pytest.mark.parametrize("prompt", PROMPTS, ids=range(len(PROMPTS)))
def test_chunks_are_those_of_the_second_reading(clip: PromptTokenizer, prompt: str) -> None:
    read = clip.read(prompt)
    wanted = truth.chunked(clip.tokenizer, prompt)
    assert read.ids.shape == read.weights.shape == (len(wanted), 77)
    for ids, weights, row in zip(read.ids, read.weights, wanted, strict=True):
        assert ids.tolist() == [49406, *(token for token, _ in row), *[49407] * (76 - len(row))]
        assert weights.tolist() == pytest.approx([1.0, *(weight for _, weight in row), *[1.0] * (76 - len(row))])


def test_a_prompt_without_syntax_is_read_as_before(clip: PromptTokenizer) -> None:
    for prompt in ("a cat", "it's 20 meters high; naïve café", "x, y, z"):
        read = clip.read(prompt)
        assert np.array_equal(read.ids, clip.encode([prompt]))
        assert np.all(read.weights == 1)
    plain = PromptTokenizer(clip.tokenizer, TextRules("tokenizer.json", 77, 49407))
    assert np.array_equal(plain.read("(a:1.3)").ids, plain.encode(["(a:1.3)"]))


@pytest.mark.parametrize(("chunks", "most"), [(1, "75 tokens"), (2, "2 x 75 tokens")])
def test_what_is_beyond_the_last_chunk_is_cut(clip: PromptTokenizer, chunks: int, most: str) -> None:
    tokenizer = PromptTokenizer(clip.tokenizer, replace(clip.rules, chunks=chunks))
    for prompt in ("word " * (75 * chunks) + "(lost:1.2) more", "a BREAK " * chunks + "(lost:1.2) more"):
        with pytest.warns(PromptWarning, match=f"reads {most}; words cut off: 'lost', 'more'"):
            read = tokenizer.read(prompt)
        assert len(read.ids) == chunks
    assert len(tokenizer.read("word " * (75 * chunks) + "BREAK").ids) == chunks


def test_the_mean_is_restored() -> None:
    hidden = np.random.default_rng(0).normal(0.3, 1, (1, 5, 4)).astype(np.float32)
    weights = np.array([1, 1.5, 0, -1, 1], np.float32)
    got = weighted(hidden, weights)
    assert got.mean() == pytest.approx(hidden.mean(), rel=1e-4)
    ratio = got / (hidden * weights[None, :, None] + 1e-30)
    assert np.allclose(ratio[0, [0, 1, 3, 4]], ratio[0, 0, 0], rtol=1e-5)
    assert weighted(hidden, np.ones(5, np.float32)) is hidden
    with pytest.raises(RequestError, match="mean 0"):
        weighted(hidden, np.zeros(5, np.float32))


# The manifest's rules.


def manifest() -> Manifest:
    unet: dict[str, Any] = {"block_out_channels": [32, 64], "in_channels": 4}
    networks = spec.Networks(
        unet, {"max_position_embeddings": 77, "hidden_size": 32}, spec.Codec({"block_out_channels": [32, 32]})
    )
    sampling = Sampling(
        NoiseSchedule("scaled_linear", beta_start=0.00085, beta_end=0.012), "epsilon", (Solver("ddim"),)
    )
    return spec.manifest(networks, sampling, name="m", licence="", size=16, pad_id=49407)


def test_old_files_lack_the_keys_and_stay_as_they_are() -> None:
    plain = TextRules("tokenizer.json")
    stored = to_json(plain)
    assert set(stored) == {"tokenizer", "length", "pad_id", "clean"}
    assert from_json(TextRules, stored, whole=True) == plain
    rules = clip_text("tokenizer.json", 77, 0)
    assert to_json(rules) == {**stored, "weights": "parentheses", "chunks": CHUNKS}
    assert from_json(TextRules, to_json(rules), whole=True) == rules


def test_rules_that_do_not_fit_the_stages_are_refused() -> None:
    good = manifest()
    assert good.text is not None
    with pytest.raises(ManifestError, match="'T': a size"):
        replace(good, text=replace(good.text, chunks=1))
    with pytest.raises(ManifestError, match="weights"):
        replace(good.text, weights="commas")  # type: ignore[arg-type]
    for chunks in (0, 65):
        with pytest.raises(ManifestError, match="chunks"):
            replace(good.text, chunks=chunks)
    with pytest.raises(ManifestError, match=r"sizes\.symbols\.T"):
        replace(good, sizes=replace(good.sizes, symbols={**good.fixed, "T": 77}))
    fixed = tuple(
        replace(s, inputs=tuple(replace(t, shape=tuple("L" if n == "T" else n for n in t.shape)) for t in s.inputs))
        for s in good.stages
    )
    with pytest.raises(ManifestError, match=r"context: \[B, T, D\]"):
        replace(good, stages=fixed)
    replace(good, stages=fixed, text=replace(good.text, chunks=1))  # weights without chunks are possible
    wrong = [
        replace(s, outputs=(replace(s.outputs[0], shape=("B", "Dc")),)) if i == 0 else s for i, s in enumerate(fixed)
    ]
    with pytest.raises(ManifestError, match=r"text_encoder\.hidden"):
        replace(good, stages=tuple(wrong), text=replace(good.text, chunks=1))


def test_a_wrong_weight_is_refused_before_work_starts() -> None:
    tables = manifest()
    none: Any = {"controls": {}, "load": None}
    with pytest.raises(RequestError, match="prompt 2 of 2"):
        make_request(tables, ["a", "(a:nan)"], **none)
    with pytest.raises(RequestError, match="negative_prompt"):
        make_request(tables, "a", negative_prompt="(a:1e9)", **none)
    make_request(with_plain_texts(tables), "(a:nan)", **none)


def with_plain_texts(tables: Manifest) -> Manifest:
    """The same model without the prompt rules."""
    rows = tuple(
        replace(s, inputs=tuple(replace(t, shape=tuple("L" if n == "T" else n for n in t.shape)) for t in s.inputs))
        for s in tables.stages
    )
    return replace(tables, stages=rows, text=TextRules("tokenizer.json", 77, 49407))


# C++.


def test_cpp_reads_the_same(built: Path, clip: PromptTokenizer, file: Path, tmp_path: Path) -> None:
    random = np.random.default_rng(1)
    words = [
        "cat",
        "dog,",
        "(",
        ")",
        "[",
        "]",
        ":1.3)",
        ": .5)",
        "BREAK",
        "\\(",
        "\\",
        ":",
        "naive,",
        "|",
        ":nan)",
        "x:",
    ]
    texts = [*PROMPTS, *PUBLISHED, "(a:1e9)", "(a:" + "9" * 400 + ")", "(" * 40, "[a:b:0.5]", "word " * 700]
    texts += [" ".join(random.choice(words, random.integers(1, 30))) for _ in range(200)]
    texts += ["".join(random.choice(words, random.integers(1, 120))) for _ in range(100)]
    for chunks in (1, 3, CHUNKS):
        rules = replace(clip.rules, chunks=chunks)
        job = {"op": "readings", "tokenizer": str(file), "length": 77, "pad_id": 49407, "weights": True}
        (tmp_path / "job.json").write_text(json.dumps([{**job, "chunks": chunks, "texts": texts}]), encoding="utf-8")
        cpp_build.done(built / "tests" / "vectors", tmp_path / "job.json", tmp_path / "result.json")
        (got,) = json.loads((tmp_path / "result.json").read_text(encoding="utf-8"))
        assert not any(isinstance(number, float) and math.isnan(number) for number in got)
        for text, answer in zip(texts, got, strict=True):
            warnings: list[Warning] = []
            try:
                read = PromptTokenizer(clip.tokenizer, rules).read(text, warnings.append)
            except RequestError:
                assert answer == "HIGEN_ERROR_REQUEST", text
                continue
            assert answer[0] == read.ids.ravel().tolist(), text
            assert np.array_equal(np.float32(answer[1]), read.weights.ravel()), text
            # Python's repr doubles a backslash.
            assert answer[2] == [str(warning).replace("\\\\", "\\") for warning in warnings], text


def axis(document: Any, stage: int, index: int, place: int, symbol: object) -> None:
    document["stages"][stage]["inputs"][index]["shape"][place] = symbol


def last_input(document: Any, stage: int, changes: dict[str, Any]) -> None:
    document["stages"][stage]["inputs"].append({**document["stages"][stage]["inputs"][-1], **changes})


EDITS: dict[str, Callable[[Any], object]] = {
    "as it is": lambda d: None,
    "weights null": lambda d: d["text"].update(weights=None),
    "no weights": lambda d: d["text"].pop("weights"),
    "no chunks": lambda d: d["text"].pop("chunks"),
    "other weights": lambda d: d["text"].update(weights="commas"),
    "weights that are a number": lambda d: d["text"].update(weights=1.1),
    "no chunk": lambda d: d["text"].update(chunks=0),
    "too many chunks": lambda d: d["text"].update(chunks=65),
    "chunks that are a text": lambda d: d["text"].update(chunks="8"),
    "T of the model's own": lambda d: d["sizes"]["symbols"].update(T=77),
    "T of the model's own, one chunk": lambda d: (d["text"].update(chunks=1), d["sizes"]["symbols"].update(T=77)),
    "a context of L tokens": lambda d: axis(d, 1, -2, 1, "L"),
    "T elsewhere": lambda d: axis(d, 1, -2, 2, "T"),
    "T twice": lambda d: axis(d, 1, -2, 2, "T") or axis(d, 1, -2, 1, "T"),
    "a pooled output": lambda d: d["stages"][0]["outputs"].append({"name": "pooled", "shape": ["B", "Dc"]}),
    "two texts": lambda d: last_input(d, 0, {"name": "other", "source": "text:negative"}),
    "noise of T tokens": lambda d: last_input(d, 1, {"name": "more", "shape": ["B", "T"], "source": "noise:4"}),
}


def test_cpp_refuses_the_same_rules(built: Path, tmp_path: Path) -> None:
    jobs, fits = [], {}
    for i, (name, change) in enumerate(EDITS.items()):
        folder = tmp_path / str(i)
        folder.mkdir()
        document = json.loads(manifest_text(Opened(manifest(), {}, {})))
        change(document)
        sealing.write(folder, document)
        jobs.append({"op": "tables", "path": str(folder)})
        try:
            read_manifest(folder)
            fits[name] = True
        except ManifestError:
            fits[name] = False
    assert {name for name, fit in fits.items() if fit} == {
        "as it is",
        "weights null",
        "no weights",
        "T of the model's own, one chunk",
    }
    (tmp_path / "job.json").write_text(json.dumps(jobs), encoding="utf-8")
    cpp_build.done(built / "tests" / "vectors", tmp_path / "job.json", tmp_path / "result.json")
    answers = json.loads((tmp_path / "result.json").read_text(encoding="utf-8"))
    for (name, fit), answer in zip(fits.items(), answers, strict=True):
        assert ("error" not in answer) == fit, (name, answer)
        assert fit or answer["error"] == "HIGEN_ERROR_MANIFEST", (name, answer)


# Batches of prompts with different numbers of chunks.

STATE = ("B", "C", "F", "H", "W")
COLUMNS = ("t", "A", "B", "C", "alpha", "sigma")
STEP = Stage(
    "step",
    "",
    (
        *(Tensor(name, STATE) for name in ("latents", "previous")),
        *(Tensor(name, ("B",)) for name in COLUMNS),
        Tensor("context", ("B", "T", 1), source="reader.hidden"),
    ),
    (Output("latents", STATE), Output("previous", STATE)),
)


class Formula:
    """m is the mean of the given part of the latents, plus the mean of the text's tokens, plus a tenth of x."""

    def run(self, stage: str, /, **tensors: Any) -> dict[str, Any]:
        x, text = tensors["latents"], tensors["context"]
        assert len({len(value) for value in tensors.values()}) == 1
        a, b, c, alpha, sigma = (tensors[name].reshape(-1, 1, 1, 1, 1) for name in COLUMNS[1:])
        m = x.mean((1, 2, 3, 4), keepdims=True) + text.mean((1, 2)).reshape(-1, 1, 1, 1, 1) + np.float32(0.1) * x
        return {"latents": a * x + b * m + c * tensors["previous"], "previous": alpha * x - sigma * m}

    def to_numpy(self, tensor: Any) -> Any:
        return np.asarray(tensor)


@pytest.mark.parametrize(
    ("windows", "tiles"), [(None, None), (Windows(3, 2), None), (None, Tiles(3, 4, 2)), (Windows(2, 1), Tiles(4, 3, 3))]
)
def test_cpp_runs_prompts_with_different_numbers_of_chunks(
    built: Path, tmp_path: Path, windows: Windows | None, tiles: Tiles | None
) -> None:
    """In C++ as in Python, each sample equals a single generation, also with windows and tiles."""
    chunks, length, shape = (2, 1, 3, 2), 2, (4, 2, 5, 5, 7)
    random = np.random.default_rng(1)
    latents = random.standard_normal(shape).astype(np.float32)
    context = random.standard_normal((4, length * max(chunks), 1)).astype(np.float32)
    table = solver_table(NoiseSchedule(), "v", Solver("dpm++2m", "trailing"), 6)
    rules: Any = SimpleNamespace(text=SimpleNamespace(length=length), all_stages=(STEP,))

    def ran(samples: list[int]) -> Any:
        runner = ChunkRunner.over(Formula(), rules, [chunks[i] for i in samples])
        most = length * max(chunks[i] for i in samples)
        text, guidance = context[samples, :most], np.ones((6, len(samples), shape[2]), np.float32)
        plan = Plan("loop", lambda _: STEP, lambda _: {"context": text}, table, guidance, samples, 0)
        *_, last = denoise(runner, replace(plan, windows=windows, tiles=tiles), latents[samples])
        return last.latents

    together = ran([0, 1, 2, 3])
    for i in range(4):
        assert np.abs(together[i] - ran([i])[0]).max() < 1e-5
    job = {"op": "loop", "shape": shape, "steps": 6, "tokens": [length * n for n in chunks]}
    job |= {"latents": latents.ravel().tolist(), "context": context.ravel().tolist()}
    job |= {"windows": windows and [windows.length, windows.stride]}
    job |= {"tiles": tiles and [tiles.height, tiles.width, tiles.stride]}
    (tmp_path / "job.json").write_text(json.dumps([job]), encoding="utf-8")
    cpp_build.done(built / "tests" / "vectors", tmp_path / "job.json", tmp_path / "result.json")
    (got,) = json.loads((tmp_path / "result.json").read_text(encoding="utf-8"))
    assert np.abs(np.reshape(got, shape) - together).max() < 1e-5
