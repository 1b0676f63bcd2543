"""The command `higen plan`: a scene script from a story."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import click

from higen.errors import OutputError, RequestError
from higen.terminal import JSON, PATH, reported, say
from higen.text_files import TextError, plain_text

__all__ = ["plan"]

KEYS = ("HIGEN_LLM_KEY", "OPENAI_API_KEY")
"""Environment variables for an endpoint's key; the first one that is set is used."""


@click.command()
@click.argument("story", default="")
@click.option("-o", "--output", type=PATH, help="File to write the script to.  [standard output]")
@click.option("--model", type=PATH, help="Model directory that the script is for.  [the built-in small model]")
@click.option("--llm", metavar="URL", help="Endpoint with OpenAI's chat completions.  [none: use rules]")
@click.option("--llm-model", metavar="NAME", help="Name of the language model at the endpoint.")
@click.option("--llm-timeout", type=float, default=120.0, show_default=True, help="Seconds that one answer may take.")
@click.option("--schema", is_flag=True, help="Print the JSON schema of the model's scripts; do not plan.")
@JSON
def plan(
    story: str,
    output: Path | None,
    model: Path | None,
    llm: str | None,
    llm_model: str | None,
    llm_timeout: float,
    schema: bool,
    as_json: bool,
) -> None:
    """Turn STORY (- is standard input) into a scene script for `higen generate --script`.

    Without --llm, rules look for words of order, pace and stillness. The endpoint's key is read from the environment
    variable HIGEN_LLM_KEY or OPENAI_API_KEY.
    """
    with reported(as_json):
        from higen.bundle import Bundle, default_model
        from higen.llm_planner import Endpoint, plan_by_llm, problems_of
        from higen.output_file import check_file, output_file
        from higen.rule_planner import plan_by_rules
        from higen.script import make_script, script_schema

        if (llm is None) != (llm_model is None):
            raise RequestError("--llm and --llm-model: give both or neither")
        if output is not None:
            check_file(output)
        bundle = Bundle.open(model or default_model())
        if schema:
            click.echo(json.dumps(script_schema(bundle.manifest), indent=None if as_json else 1))
            return
        told = _standard_input() if story == "-" else story
        if llm is not None and llm_model is not None:
            key = next((os.environ[name] for name in KEYS if os.environ.get(name)), None)
            script = plan_by_llm(told, bundle, Endpoint(llm, llm_model, key, llm_timeout), say)
        else:
            script = plan_by_rules(told, bundle.manifest)
            make_script(script, bundle.manifest)
            for line in problems_of(script, bundle):
                say(line, fg="yellow")
        text = json.dumps(script, indent=None if as_json and output is None else 1, ensure_ascii=False)
        if output is None:
            click.echo(text)
            return
        try:
            with output_file(output) as temporary:
                temporary.write_text(text + "\n", encoding="utf-8")
        except OSError as error:
            raise OutputError(f"{output}: cannot be written: {error.strerror}") from error
        done = {"file": str(output), "scenes": len(script["scenes"])}
        click.echo(json.dumps(done) if as_json else f"{output}: {done['scenes']} scenes")


def _standard_input() -> str:
    """The text of a file or of standard input, UTF-8. Raises RequestError."""
    try:
        return plain_text(sys.stdin.buffer.read())
    except TextError as error:
        raise RequestError(f"standard input: {error}") from error
