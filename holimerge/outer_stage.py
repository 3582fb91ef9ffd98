"""Where the outer reduction sits: around `get_video_features`, between the vision tower and the prompt."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutputWithPooling

from .allocation import largest_remainder
from .call import CALL, PROMPT, Call, Prompt
from .config import ConfigError
from .cost import largest_budget
from .report import Report, VideoReport
from .shapes import shape_of
from .tokens import MergeRecord, Target, keep_everything

if TYPE_CHECKING:
    from .handle import Handle


@dataclass
class ReducedVideo(BaseModelOutputWithPooling):
    """What `get_video_features` returns inside a patched model's own calls; its type says where it comes from."""


class OuterStage:
    """The outer reduction of one patched model."""

    def __init__(self, handle: Handle) -> None:
        self.handle = handle

    def expanded(self, call: Call, records: list[MergeRecord], count: int) -> list[MergeRecord]:
        """Records in the order of the rows' videos, after `generate` repeated each row's videos for its beams."""
        times = count // len(records)
        if times == 1:
            return records
        assert call.video_mask is not None
        rows = self.videos_by_row(call.video_mask[::times], [r.total for r in records])
        return [records[v] for row in rows for _ in range(times) for v in row]

    def videos_by_row(self, mask: Tensor, lengths: list[int]) -> list[list[int]]:
        """Which videos each row holds, from the number of its placeholders and of the videos' tokens."""
        rows, video = [], 0
        for wanted in mask.sum(1).tolist():
            row: list[int] = []
            while wanted > 0 and video < len(lengths):
                wanted -= lengths[video] + self.handle.family.separators
                row.append(video)
                video += 1
            rows.append(row)
        return rows

    @torch.compiler.disable  # hooks that come and go with a call cannot be traced
    def video_features(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        call, prompt = self.handle.current(), PROMPT.get()
        generating = prompt is not None and prompt.handle is self.handle
        if call is not None and not generating and not _inside_a_forward():
            CALL.set(None)  # a call that was broken off and never closed
            call = None
        if call is None and not generating:
            return original(*args, **kwargs)  # the user's own call
        bound = inspect.signature(original).bind_partial(*args, **kwargs)
        arguments = dict(bound.arguments)
        arguments.update(arguments.pop("kwargs", {}))
        grids = self.handle.family.grids(self.handle.core, arguments)
        report = Report(inner_layer=None if self.handle.inner is None else self.handle.inner.layer)
        if self.handle.method.reduce is None:
            output, records = self._stock(original, arguments, grids, report)
        else:
            targets = self._targets(grids, call, prompt)
            output, records = self._reduced(original, arguments, grids, targets, report)
        report.videos = [
            VideoReport(record, (rows, columns), self.handle.family.separators)
            for record, (_, rows, columns) in zip(records, grids, strict=True)
        ]
        output.reductions, output.report = records, report
        dropping = any(r.kept < r.total for r in records)
        if call is not None:
            call.reductions, call.report, call.dropping = records, report, dropping
        elif prompt is not None:
            prompt.dropping, prompt.report = dropping, report
            if prompt.chunked and dropping:
                self._check_finite(output, records)
        return output

    def _check_finite(self, output: ReducedVideo, records: list[MergeRecord]) -> None:
        """In a chunked prefill only NaN tells dropped tokens from kept ones, so a kept token must not hold it."""
        features: Any = output.pooler_output
        for video, record in zip(features, records, strict=True):
            if not bool(torch.isfinite(video[record.slots]).all()):
                raise ValueError("the projector's output holds values that are not finite (NaN or infinity)")

    def _stock(
        self, original: Callable[..., Any], arguments: dict[str, Any], grids: list[tuple[int, int, int]], report: Report
    ) -> tuple[ReducedVideo, list[MergeRecord]]:
        device = _device(arguments)
        with report.clock.stage("vision", device):
            stock = original(**{**arguments, "return_dict": True})
        output = ReducedVideo(pooler_output=stock.pooler_output)
        return output, [keep_everything(t, h * w, device) for t, h, w in grids]

    def _reduced(
        self,
        original: Callable[..., Any],
        arguments: dict[str, Any],
        grids: list[tuple[int, int, int]],
        targets: list[Target],
        report: Report,
    ) -> tuple[ReducedVideo, list[MergeRecord]]:
        outer = self.handle.config.outer
        assert outer is not None
        assert self.handle.method.reduce is not None
        device = _device(arguments)
        with report.clock.stage("vision", device):
            encoded = self.handle.family.encode(
                self.handle.core,
                original,
                arguments,
                at=outer.at,
                scored=self.handle.method.needs_scores,
                chunk=self.handle.config.chunk_frames,
            )
        replay = self.handle.replay
        records = []
        if replay is not None and len(replay.outer) != len(encoded):
            raise ValueError(f"the replayed selection has {len(replay.outer)} videos, the prompt {len(encoded)}")
        # decisions are taken in float32 also under autocast
        with report.clock.stage("reduce", device), torch.no_grad(), torch.autocast(device.type, enabled=False):
            for i, (video, target) in enumerate(zip(encoded, targets, strict=True)):
                record = self.handle.method.reduce(video.tokens, target, outer) if replay is None else replay.outer[i]
                records.append(record.to(video.tokens.features.device))
        features = []
        with report.clock.stage("project", device):
            for video, record in zip(encoded, records, strict=True):
                if record.kept == record.total:
                    features.append(video.everything())
                    continue
                kept = video.merged(record)
                marked = kept.new_full((record.total, kept.shape[-1]), torch.nan)
                features.append(marked.index_copy(0, record.slots, kept))
            pooled = self.handle.family.assemble(self.handle.core, features)
        return ReducedVideo(pooler_output=pooled), records

    def _targets(self, grids: list[tuple[int, int, int]], call: Call | None, prompt: Prompt | None) -> list[Target]:
        budget = self.handle.config.budget
        assert budget is not None
        totals = [t * h * w for t, h, w in grids]
        if budget.flops is None:
            return [
                Target(budget.keep(n), budget.retain if budget.retain is not None else budget.keep(n) / n, budget.exact)
                for n in totals
            ]
        source = call if call is not None else prompt
        assert source is not None
        mask = self.handle.family.video_mask(self.handle.core, source.input_ids, source.inputs_embeds)
        valid = source.attention_mask if source.attention_mask is not None else torch.ones_like(mask)
        valid = valid[:, -mask.shape[1] :]
        if isinstance(source, Prompt) and mask.shape[1] > source.seen:
            # `generate` was given the whole conversation and will look at what the cache has not seen
            mask, valid = mask[:, source.seen :], valid[:, source.seen :]
        if int(mask.sum()) != sum(totals) + len(totals) * self.handle.family.separators:
            raise ValueError(
                f"the prompt has {int(mask.sum())} video placeholders, its videos make "
                f"{sum(totals) + len(totals) * self.handle.family.separators} tokens"
            )
        text = shape_of(self.handle.model.config).text
        layer = None if self.handle.inner is None else self.handle.inner.layer
        retain = None if self.handle.config.inner is None else self.handle.config.inner.retain
        keep = [0] * len(totals)
        for row, length in zip(self.videos_by_row(mask, totals), valid.sum(1).tolist(), strict=True):
            if not row:
                continue
            total = sum(totals[v] for v in row)
            try:
                most = largest_budget(
                    text,
                    share=budget.flops,
                    total_tokens=total,
                    text_tokens=int(length) - total,
                    inner_layer=layer,
                    inner_retain=retain,
                )
            except ValueError as error:
                raise ConfigError(str(error)) from None
            if most < len(row):
                raise ConfigError(
                    f"budget.flops: {budget.flops} leaves {most} token(s) for the {len(row)} videos of a prompt; "
                    "each needs at least one"
                )
            extra = largest_remainder([totals[v] - 1 for v in row], most - len(row))
            for v, more in zip(row, extra, strict=True):
                keep[v] = 1 + more
        return [Target(k, k / n, budget.exact) for k, n in zip(keep, totals, strict=True)]


def _inside_a_forward() -> bool:
    """Whether this code runs inside a module's forward (also a compiled one, whose frames keep the names)."""
    frame = sys._getframe(1)
    while frame is not None:
        name = frame.f_code.co_name
        if name in ("forward", "_call_impl", "_wrapped_call_impl") or name.startswith("torch_dynamo_resume_in_"):
            return True
        frame = frame.f_back  # type: ignore[assignment]
    return False


def _device(arguments: dict[str, Any]) -> torch.device:
    return next(v.device for v in arguments.values() if isinstance(v, Tensor))
