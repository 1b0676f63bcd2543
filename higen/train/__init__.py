"""Training: losses, trainers and recipes; needs the `train` extra, never imported by inference."""
