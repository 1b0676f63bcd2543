"""Layers and checkpoint readers in PyTorch that model families share. No module here depends on a family."""
