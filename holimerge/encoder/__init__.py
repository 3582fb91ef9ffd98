"""Reduction inside the vision tower: frames, tokens or unchanged pictures that its blocks need not compute twice."""
