"""Measures a model of the emoji against the real clips (`higen evaluate`)."""
