"""Model directory to ONNX graphs (imported as `higen.export`)."""
