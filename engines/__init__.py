"""Builds TensorRT engines from ONNX graphs (imported as `higen.engines`)."""
