"""Asks the questions of one process, video by video, and records each answer as it comes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np

import holimerge.video
from holimerge.config import Config
from holimerge.inputs import build_inputs

from .answering import Answer, as_fields, best_option, generate_answers, option_tokens, score_answer
from .clips import Clip, Unusable
from .frame_cache import FrameCache
from .load import Loaded
from .plan import Plan
from .records import Record
from .reuse import Reuse, reusing
from .run import patched
from .tasks.base import Extracted, Prompt, Sample


class Meter(Protocol):
    """Who shows how far a run is; see `holimerge.eval.show_eval`."""

    def begin(self, total: int, done: int) -> None:
        """There are `total` answers to give, `done` of them are there."""

    def step(self, what: str, count: int) -> None:
        """`count` more answers are there."""

    def say(self, text: str) -> None:
        """Something else is going on."""


class Video(NamedTuple):
    """The samples of one video, and the (config, sample id) that are still to be asked."""

    samples: list[Sample]
    missing: set[tuple[str, str]]


class Item(NamedTuple):
    """A question ready to be asked. options: tokens of each, for a task answered by likelihood."""

    sample: Sample
    clip: Clip
    inputs: dict[str, Any]
    options: list[list[int]]


@dataclass
class Runner:
    """The model, what it is asked under, and where answers go. The fields are those of `holimerge.eval.evaluate`."""

    loaded: Loaded
    configs: Mapping[str, Config | None]
    write: Callable[[Record], None]
    meter: Meter | None = None
    batch_size: int = 1
    seed: int = 0
    num_frames: int = 32
    cache: FrameCache | None = None
    reuse: bool = True

    def check(self) -> None:
        """Whatever does not fit the checkpoint says so before the first question, not in every record."""
        frames = np.zeros((2, 56, 56, 3), dtype=np.uint8)
        blank = holimerge.video.Video(frames, np.zeros(2), fps=1.0, total_frames=2)
        model, tokenizer, settings, template = self.loaded
        build_inputs("?", blank, config=model.config, tokenizer=tokenizer, settings=settings, chat_template=template)
        for config in self.configs.values():
            with patched(model, config):
                pass

    def run(self, plan: Plan, videos: Sequence[Video]) -> None:
        """Ask what is missing of a task; with batches, as many videos at once as fill one."""
        waiting: list[Video] = []
        for video in videos:
            waiting.append(video)
            if sum(len(v.samples) for v in waiting) >= self.batch_size:
                self._ask(plan, waiting)
                waiting = []
        if waiting:
            self._ask(plan, waiting)

    def _ask(self, plan: Plan, videos: Sequence[Video]) -> None:
        missing = set().union(*(video.missing for video in videos))
        wanted = {name: 1 if config is None else config.more_frames for name, config in self.configs.items()}
        asked = {name for name, _ in missing}
        for times in dict.fromkeys(wanted[name] for name in wanted if name in asked):
            self._ask_of(plan, videos, times, [name for name in wanted if wanted[name] == times], missing)

    def _ask_of(
        self, plan: Plan, videos: Sequence[Video], times: int, names: Sequence[str], missing: set[tuple[str, str]]
    ) -> None:
        """Ask under the configurations `names`, which read `times` as many frames as the run asks for."""
        clips = [
            Clip(
                plan.task,
                video.samples[0],
                self.loaded,
                frames=self.num_frames * times,
                sampling=plan.sampling,
                cache=self.cache,
            )
            for video in videos
        ]
        pairs = [(sample, clip) for video, clip in zip(videos, clips, strict=True) for sample in video.samples]
        for name in names:
            config = self.configs[name]
            todo = [(sample, clip) for sample, clip in pairs if (name, sample.id) in missing]
            if not todo:
                continue
            fresh = {id(clip) for clip in clips}  # of which no question has told the times of decoding yet
            model = self.loaded.model
            with (
                patched(model, config),
                reusing(model, self.batch_size) if self.reuse else nullcontext() as reuse,
            ):
                for batch in self._batches(plan, name, todo):
                    for item, answer in zip(batch, self._answers(plan, batch, config, reuse), strict=True):
                        first = id(item.clip) in fresh
                        fresh.discard(id(item.clip))
                        self.write(self._answered(plan, name, item, answer, first))
                    self._step(plan, name, len(batch))

    def _batches(self, plan: Plan, name: str, todo: Sequence[tuple[Sample, Clip]]) -> Iterator[list[Item]]:
        """What can be asked, in batches of equally many frames; what cannot be shown is recorded on the way."""
        batch: list[Item] = []
        most = self.batch_size if plan.task.answer_by == "generation" else 1
        for sample, clip in todo:
            try:
                item = self._item(plan, sample, clip)
            except Unusable as error:
                self.write({**_asked(plan, name, sample), **_no_answer(error)})
                self._step(plan, name, 1)
                continue
            if batch and (len(batch) == most or _shape(batch[0]) != _shape(item)):
                yield batch
                batch = []
            batch.append(item)
        if batch:
            yield batch

    def _item(self, plan: Plan, sample: Sample, clip: Clip) -> Item:
        if clip.error is not None:
            raise clip.error
        prompt = Prompt(sample.question)
        if plan.task.prompt is not None:
            try:
                prompt = plan.task.prompt(sample, plan.protocol, clip.seconds)
            except ValueError as error:  # subtitles that cannot be read; a missing folder of them stops the run
                raise Unusable("prompt", error) from error
        inputs = clip.inputs(prompt)
        if plan.task.answer_by != "likelihood":
            return Item(sample, clip, inputs, [])
        try:
            return Item(
                sample, clip, inputs, option_tokens(self.loaded.tokenizer, sample.options, prompt.answer_prefix)
            )
        except ValueError as error:
            raise Unusable("prompt", error) from error

    def _answers(self, plan: Plan, batch: Sequence[Item], config: Config | None, reuse: Reuse | None) -> list[Answer]:
        model, tokenizer = self.loaded.model, self.loaded.tokenizer
        if plan.task.answer_by == "likelihood":
            return [score_answer(model, item.inputs, item.options, config=config, reuse=reuse) for item in batch]
        rows = [item.inputs for item in batch]
        return generate_answers(model, tokenizer, rows, config=config, max_new_tokens=plan.max_new_tokens, reuse=reuse)

    def _answered(self, plan: Plan, name: str, item: Item, answer: Answer, first: bool) -> Record:
        """The record of an answer. first: of its clip, under this configuration; it tells the times of decoding."""
        sample = item.sample
        found = _choice(plan, sample, answer, self.seed)
        before = item.clip.ms if first else {}
        fields = as_fields(answer)
        fields["ms"] = {**before, **fields["ms"]}
        fields["reused"] = [*(stage for stage in ("decode", "preprocess") if stage not in before), *fields["reused"]]
        return {
            **_asked(plan, name, sample),
            "choice": found.choice,
            "fallback": found.fallback,
            "counted": found.counted,
            "correct": None if sample.answer is None else found.choice == sample.answer,
            "error": None,
            "frames": len(item.clip.video.frames),
            **fields,
        }

    def _step(self, plan: Plan, name: str, count: int) -> None:
        if self.meter is not None:
            self.meter.step(f"{plan.task.name}, {name}", count)


def _shape(item: Item) -> Any:
    return item.inputs["pixel_values_videos"].shape[1:]


def _asked(plan: Plan, name: str, sample: Sample) -> Record:
    """The part of a record that is known before the answer."""
    return {
        "task": plan.task.name,
        "config": name,
        "id": sample.id,
        "video_id": sample.video_id,
        "category": sample.category,
        "groups": dict(sample.groups),
        "protocol": plan.protocol,
        "answer": sample.answer,
    }


def _no_answer(error: Unusable) -> Record:
    """The part of a record of a sample that could not be asked; it counts neither as right nor as wrong."""
    return {"choice": None, "fallback": False, "counted": True, "correct": None, "error": error.to_dict()}


def _choice(plan: Plan, sample: Sample, answer: Answer, seed: int) -> Extracted:
    """Index of the chosen option, whether it was drawn at random, and whether the protocol counts it."""
    if answer.likelihoods is not None:
        broken = any(math.isnan(value) for value in answer.likelihoods)
        return Extracted(None if broken else best_option(answer.likelihoods))
    assert plan.task.extract is not None
    assert answer.raw is not None
    return plan.task.extract(answer.raw, sample, plan.protocol, seed)
