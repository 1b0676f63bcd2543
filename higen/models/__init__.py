"""Layers and checkpoint readers that model families share, in PyTorch. No module here knows a family."""
