"""Exports a model directory to ONNX graphs (imported as `higen.export`)."""
