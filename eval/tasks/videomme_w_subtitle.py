"""Video-MME with subtitles, in the prompt those at the times of the sampled frames.

`official` lists the lines shown at these times, and asks as without subtitles where there are none; `lmms_eval_*` list
of them only text in exactly the usual font tag, and say "No subtitles available" for a video without a file.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from . import videomme

TASK = replace(
    videomme.TASK,
    name="videomme_w_subtitle",
    load=partial(videomme.load, with_subtitles=True),
    prompt=partial(videomme.prompt, with_subtitles=True),
)
