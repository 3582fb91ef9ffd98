"""Reduction methods: one file each; `METHOD` in it says what it can do."""
