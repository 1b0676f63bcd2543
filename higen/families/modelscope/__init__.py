"""ModelScope's text-to-video model and ZeroScope: one loop over frames, which may start from a video (second pass)."""
