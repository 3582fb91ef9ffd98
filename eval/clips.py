"""A video read and preprocessed once for all its questions and configurations."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from holimerge.inputs import build_inputs
from holimerge.video import Video, read_video

from .frame_cache import FrameCache
from .load import Loaded, to_model
from .tasks.base import Prompt, Sample, Task


class Unusable(Exception):  # noqa: N818  (it is recorded, not raised to the user)
    """A video that cannot be read, or a question that cannot be shown."""

    def __init__(self, at: str, error: Exception | str) -> None:
        super().__init__(str(error) or type(error).__name__)
        self.at = at

    def to_dict(self) -> dict[str, str]:
        """For a record."""
        return {"at": self.at, "text": str(self)}


class _PixelsOnce:
    """A checkpoint's preprocessor settings that remember the pixels of the last frames."""

    def __init__(self, settings: Any) -> None:
        self._settings = settings
        self._frames: np.ndarray | None = None
        self._made: Any = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._settings, name)

    def pixels(self, frames: np.ndarray) -> Any:
        if self._frames is not frames:
            self._frames, self._made = frames, self._settings.pixels(frames)
        return self._made


class Clip:
    """Frames of one video (or part of one), read when made.

    ms: decode (not there if the frames came from the cache) and preprocess (once `inputs` has run).
    error: why it cannot be read; then there is no `video`.
    """

    def __init__(
        self, task: Task, sample: Sample, loaded: Loaded, *, frames: int, sampling: str, cache: FrameCache | None
    ) -> None:
        self.loaded, self.ms = loaded, dict[str, float]()
        self.error: Unusable | None = None
        self._settings = _PixelsOnce(loaded.settings)
        try:
            if task.prepare is not None:
                task.prepare(sample)
            self.video = self._read(sample, frames, sampling, cache)
        except (OSError, ValueError) as error:
            self.error = Unusable("video", error)

    def _read(self, sample: Sample, frames: int, sampling: str, cache: FrameCache | None) -> Video:
        if sample.video is None:
            raise FileNotFoundError(f"sample {sample.id}: the data set names no video")
        rule: dict[str, Any] = {"sampling": sampling}
        if sampling == "fps":
            rule["max_frames"] = frames
            rule["min_frames"] = min(4, frames)
        else:
            rule["frames"] = frames
        rule |= {name: value for name, value in (("start", sample.start), ("end", sample.end)) if value is not None}
        if sample.source_fps is not None:
            rule["source_fps"] = sample.source_fps
        path = Path(sample.video)
        return self._decoded(path, **rule) if cache is None else cache.read(path, self._decoded, **rule)[0]

    def _decoded(self, path: Path, **rule: Any) -> Video:
        """Timed here, so that what the cache does (hashing, writing frames) is not taken for decoding."""
        begin = time.perf_counter()
        video = read_video(path, **rule)
        self.ms["decode"] = round((time.perf_counter() - begin) * 1000, 3)
        return video

    @property
    def seconds(self) -> Sequence[float]:
        """Times of the frames, NaN where the source has no clock."""
        return self.video.timestamps.tolist()

    def inputs(self, prompt: Prompt) -> dict[str, Any]:
        """The prompt's inputs on the model's device.

        Raises:
            Unusable: a text or frames that cannot be made into inputs.
        """
        extra: dict[str, Any] = {}
        if prompt.system is not None:
            extra["system"] = prompt.system
        if prompt.answer_prefix:
            extra["answer_prefix"] = prompt.answer_prefix
        model = self.loaded.model
        begin = time.perf_counter()
        try:
            made = build_inputs(
                prompt.user,
                self.video,
                config=model.config,
                tokenizer=self.loaded.tokenizer,
                settings=self._settings,  # type: ignore[arg-type]
                chat_template=self.loaded.chat_template,
                **extra,
            )
        except ValueError as error:
            raise Unusable("prompt", error) from error
        self.ms.setdefault("preprocess", round((time.perf_counter() - begin) * 1000, 3))
        return to_model(made, model)
