"""`python -m holimerge.eval ...` is `holimerge eval ...`, so that accelerate and torchrun can launch it."""

from __future__ import annotations

import sys

from .cli import main

if __name__ == "__main__":
    main(["eval", *sys.argv[1:]])
