"""The documents: their length and links, and that the programs accept their commands and examples."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from higen.api import default_model, generate
from higen.bundle import Bundle
from higen.cli import main as higen
from higen.exporter import main as exporter
from higen.families.stage_rows import map_controls
from higen.families.svd.spec import controls as svd_controls

ROOT = Path(__file__).parents[1]
PAGES = [
    ROOT / "README.md",
    *sorted((ROOT / "docs").glob("*.md")),
    *sorted((ROOT / "engines" / "cpp").glob("*.md")),
    *sorted((ROOT / "benchmarks").glob("*.md")),
    ROOT / "higen" / "assets" / "MODEL_CARD.md",
]
PROGRAMS: dict[str, click.Group] = {"higen": higen, "higen-export": exporter}


def _blocks(page: Path, language: str = "") -> Iterator[str]:
    """The fenced code blocks of a page in one language."""
    for found in re.finditer(r"^```(\w*)\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL):
        if found[1] == language:
            yield found[2]


def _commands() -> list[tuple[str, str]]:
    """Each command of higen's programs in the documents, with the name of its page."""
    found = []
    for page in PAGES:
        for block in _blocks(page):
            for line in block.replace("\\\n", " ").splitlines():
                if line.split(" ")[0] in PROGRAMS:
                    found.append((page.name, line))
    return found


def test_the_readme_is_one_screen() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").split()) <= 700


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_to_files(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if not target.startswith(("http://", "https://", "#")):
            assert (page.parent / target.partition("#")[0]).exists(), target


def test_every_page_of_the_documentation_is_in_the_readmes_table() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert [page.name for page in (ROOT / "docs").glob("*.md") if f"(docs/{page.name})" not in text] == []


def test_code_cites_documents_that_exist() -> None:
    cited = re.compile(r"\b((?:docs/)?[a-zA-Z_/]*\w\.md)\b")
    known = {path.name for path in PAGES}
    made = {"report.md", "evaluation.md", "table.md"}  # files that commands write
    for folder in ("higen", "export", "engines"):
        for file in (ROOT / folder).rglob("*.py"):
            for name in cited.findall(file.read_text(encoding="utf-8")):
                assert Path(name).name in known | made, f"{file.relative_to(ROOT)} cites {name}"


@pytest.mark.parametrize(("page", "line"), _commands())
def test_a_documented_command_has_these_options(page: str, line: str) -> None:
    words = shlex.split(line, comments=True)
    group: click.Command = PROGRAMS[words.pop(0)]
    context = click.Context(group, **group.context_settings)  # else the commands keep other names of --help
    while isinstance(group, click.Group) and words and (found := group.get_command(context, words[0])) is not None:
        group, words = found, words[1:]
    known = {name for parameter in group.get_params(context) for name in parameter.opts}
    options = {word for word in words if re.match(r"--?[a-zA-Z]", word)}
    if isinstance(group, click.Group):  # `higen train FILE ...` is the command `config`
        config = group.get_command(context, "config")
        assert config is not None
        known |= {name for parameter in config.get_params(context) for name in parameter.opts}
    if "--model" in words or group.name == "generate":  # the controls of the models that the pages name are options too
        controls = (*Bundle.open(default_model()).manifest.controls, *svd_controls(), *map_controls(edges=True))
        known |= {f"--{control.name.replace('_', '-')}" for control in controls}
        known |= {f"--{control.name.removesuffix('s')}" for control in controls if control.kind == "frames"}
    assert options <= known, page


def test_the_readmes_python_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (code,) = _blocks(ROOT / "README.md", "python")
    exec(compile(code, "README.md", "exec"), {})
    assert (tmp_path / "heart.webp").stat().st_size > 10_000


def test_commands_on_a_clip_and_a_model_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "higen").symlink_to(default_model())
    generate("a red heart beating", seed=7, steps=1).save("clip.mp4")
    runner = CliRunner()
    for command in ("cues clip.mp4 --plot cues.png", "doctor --model models/higen", "prompts --model models/higen"):
        result = runner.invoke(higen, shlex.split(command))
        assert result.exit_code == 0, result.output
    result = runner.invoke(exporter, ["inspect", "models/higen"])
    assert result.exit_code == 0, result.output
    assert (tmp_path / "cues.png").stat().st_size > 1000
