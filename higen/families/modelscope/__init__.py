"""ModelScope's text to video and ZeroScope: one loop over frames, which may begin from a video (a second pass)."""
