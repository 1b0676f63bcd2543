"""ONNX graphs to TensorRT engines (imported as `higen.engines`)."""
