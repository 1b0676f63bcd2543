"""The graph of a network that takes known frames is the module's own, whatever is given and however long the clip."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import onnxruntime
import torch
from conftest import TINY, write_tiny_model

from higen.backends.options import Options
from higen.backends.torch import TorchBackend
from higen.export.graphs import export_stage
from higen.export.shapes import example_inputs, sizes_for
from higen.families.higen.unet import Known

STAGE = "temporal_unet_plain"


def test_the_graph_of_known_frames_is_the_modules(tmp_path: Path) -> None:
    unet = replace(TINY.unet, prior_preconditioning=True, pooled_context=True, known_frames=True)
    bundle = write_tiny_model(tmp_path / "model", replace(TINY, unet=unet))
    assert bundle.manifest.stage(STAGE).input("known").source == "known:latents"
    module = TorchBackend(bundle, Options(device="cpu", precision="fp32")).module(STAGE)
    export_stage(bundle, module, STAGE, bundle.path / "known.onnx", 18)
    session = onnxruntime.InferenceSession(str(bundle.path / "known.onnx"))
    for frames, rows in ((5, ("10001", "00000")), (8, ("11110000", "10101010")), (3, ("010", "001"))):
        sizes = sizes_for(bundle.manifest, {"B": 2, "F": frames, "H": 4, "W": 6, "N": 1})
        inputs = example_inputs(bundle.manifest, bundle.manifest.stage(STAGE), sizes, seed=frames)
        inputs["sigma"] = inputs["sigma"].abs() + 0.5
        inputs["known_mask"] = torch.tensor([[float(c) for c in row] for row in rows])
        with torch.no_grad():
            expected = module(*inputs.values())
        found = session.run(None, {name: tensor.numpy() for name, tensor in inputs.items()})
        for ours, theirs in zip(found, expected, strict=True):
            torch.testing.assert_close(torch.from_numpy(ours), theirs, atol=2e-4, rtol=1e-3)
        assert Known(inputs["known"], inputs["known_mask"]).given.flatten().tolist() == ["1" in row for row in rows]
