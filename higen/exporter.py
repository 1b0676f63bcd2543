"""The command `higen-export`, combined from independent packages."""

from higen.engines.cli import build_engines, compare
from higen.engines.triton.cli import triton
from higen.export.cli import main

__all__ = ["main"]

main.add_command(build_engines)
main.add_command(compare)
main.add_command(triton)
