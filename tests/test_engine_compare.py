"""Arguments that `higen-export compare` refuses before it loads a graph. tests/test_quantize.py tests its results."""

from __future__ import annotations

import json

import pytest
from click.testing import CliRunner

from higen.api import default_model
from higen.exporter import main


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (["--precision", "q"], "RequestError", "precision='q': one of 'fp32', 'fp16', 'bf16', 'int8'"),
        (["--precision", "FP16"], "RequestError", "precision='FP16': one of"),
        (["--precision", "fp32"], "RequestError", "compared with itself"),
        (["--with", "torch"], "RequestError", "with='torch': 'onnx' or 'tensorrt'"),
        (["--precision", "int8"], "ModelError", "no spatial_unet.int8.onnx (make it: higen-export quantize {model} "),
        (
            ["--precision", "int8", "--with", "tensorrt"],
            "ModelError",
            "no spatial_unet.int8.onnx (make it: higen-export quantize {model} --precision int8)",
        ),
    ],
    ids=range(6),
)
def test_a_wrong_option_is_one_error(arguments: list[str], error: str, message: str) -> None:
    model = str(default_model())
    said = CliRunner().invoke(main, ["compare", model, *arguments, "--json"])
    assert said.exit_code == 2
    answer = json.loads(said.output)
    assert answer["error"] == error
    assert message.replace("{model}", model) in answer["message"]
    plain = CliRunner().invoke(main, ["compare", model, *arguments])
    assert plain.exit_code == 2
    assert plain.output.startswith(f"{error}: ")
