"""The blend of known frames in a graph: ONNX Runtime compared with numpy's interpolation, for clips of any length.

The export's parity gate checks the whole step of a model with known frames, with masks of 0 and 1.
"""

from __future__ import annotations

import numpy as np
import onnxruntime
import pytest
import torch
from conftest import TINY
from torch import Tensor, nn

from higen.export import graphs
from higen.export.shapes import example_inputs, sizes_for
from higen.families.higen import spec
from higen.families.higen.unet import Known


class Blend(nn.Module):
    def forward(self, latents: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        known = Known(latents, mask)
        return known.blend(), known.given.float()


@pytest.fixture(scope="module")
def session(tmp_path_factory: pytest.TempPathFactory) -> onnxruntime.InferenceSession:
    path = tmp_path_factory.mktemp("graph") / "blend.onnx"
    free = torch.export.Dim.DYNAMIC
    with graphs._quiet():
        torch.onnx.export(
            Blend().eval(),
            (torch.randn(2, 3, 5, 2, 2), torch.tensor([[1.0, 0, 0, 0, 1], [0, 1, 0, 0, 0]])),
            str(path),
            dynamo=True,
            dynamic_shapes=({0: free, 2: free}, {0: free, 1: free}),
            optimize=False,
            verbose=False,
        )
    return onnxruntime.InferenceSession(str(path))


@pytest.mark.parametrize(
    "rows", [("10001", "00000"), ("1111000000", "1010101010"), ("010", "001"), ("0000000100000000",), ("1",)]
)
def test_a_graph_blends_as_numpy_interpolates(session: onnxruntime.InferenceSession, rows: tuple[str, ...]) -> None:
    mask = np.array([[float(c) for c in row] for row in rows], np.float32)
    latents = np.random.default_rng(0).standard_normal((len(rows), 3, len(rows[0]), 2, 2)).astype(np.float32)
    names = [node.name for node in session.get_inputs()]
    found, given = session.run(None, dict(zip(names, (latents, mask), strict=True)))
    assert given.reshape(-1).tolist() == [float("1" in row) for row in rows]
    for ours, clip, row in zip(found, latents, mask, strict=True):
        places = np.flatnonzero(row)
        flat = clip.transpose(1, 0, 2, 3).reshape(len(row), -1)
        if len(places):
            expected = np.stack([np.interp(range(len(row)), places, column[places]) for column in flat.T], axis=1)
        else:
            expected = np.zeros_like(flat)
        np.testing.assert_allclose(ours.transpose(1, 0, 2, 3).reshape(len(row), -1), expected, atol=1e-5)


def test_the_gate_gives_some_frames_and_not_others() -> None:
    manifest = spec.manifest(TINY)
    (stage,) = (s for s in spec.stages(known_frames=True) if s.name == "temporal_unet_plain")
    sizes = sizes_for(manifest, {"B": 4, "F": 9, "H": 4, "W": 6, "N": 1})
    mask = example_inputs(manifest, stage, sizes)["known_mask"]
    assert set(mask.flatten().tolist()) == {0.0, 1.0}
