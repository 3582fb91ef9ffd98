"""Where the outer reduction sits: around `get_video_features`, between the vision tower and the prompt."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutputWithPooling

from .call import CALL, PROMPT, Call, Placed, Prompt, Source, signature, videos_by_row
from .config import ConfigError
from .encode_ahead import Ahead, encoded_ahead
from .encoder.stage import EncoderStage
from .encoding import Encoded, Grid, Request
from .placement import FrameImages, Placement, frames_among_images
from .planning.patched import row_of
from .planning.solve import share_out
from .report import Report, VideoReport
from .tokens import MergeRecord, Target, keep_everything, upload

if TYPE_CHECKING:
    from .handle import Handle


PIXELS = {"video": "pixel_values_videos", "image": "pixel_values"}  # by kind of placeholder
_INSIDE: ContextVar[bool] = ContextVar("holimerge_inside_encoding", default=False)


@dataclass
class ReducedVideo(BaseModelOutputWithPooling):
    """What the encoding functions return inside a patched model's own calls; its type says where it comes from.

    kept: per video, [K, D], the tokens that stay (None where nothing was reduced).
    """

    deepstack_features: list[Any] | None = None
    kept: list[Tensor] | None = None


class OuterStage:
    """The outer reduction of one patched model."""

    def __init__(self, handle: Handle) -> None:
        self.handle = handle

    @property
    def attached(self) -> bool:
        """Whether this is the patch that the model has."""
        return self.handle.model.__dict__.get("_holimerge_handle") is self.handle

    def functions(self) -> dict[str, str]:
        """Kind of placeholder -> the core's function that encodes what it stands for."""
        found = {}  # in the order in which models encode them
        if self.handle.config.treat_images_as_video:
            found["image"] = "get_image_features"
        if self.handle.family.video_input:
            found["video"] = "get_video_features"
        return found

    @torch.compiler.disable  # hooks that come and go with a call cannot be traced
    def features(self, kind: str, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """In place of the core's function: encode, reduce, mark dropped rows."""
        if _INSIDE.get():  # some families encode videos by their function for images
            return original(*args, **kwargs)
        call, prompt = self.handle.current(), PROMPT.get()
        generating = prompt is not None and prompt.handle is self.handle
        if call is not None and not generating and not _inside_a_forward():
            CALL.set(None)  # a call that was broken off and never closed
            call = None
        if call is None and not generating:
            return original(*args, **kwargs)  # the user's own call
        source = call if call is not None else prompt
        assert source is not None
        bound = signature(original).bind_partial(*args, **kwargs)
        arguments = dict(bound.arguments)
        arguments.update(arguments.pop("kwargs", {}))
        token = _INSIDE.set(True)
        try:
            return self._features(kind, original, arguments, source)
        finally:
            _INSIDE.reset(token)

    def _features(
        self, kind: str, original: Callable[..., Any], arguments: dict[str, Any], source: Call | Prompt
    ) -> ReducedVideo:
        handle = self.handle
        family, core = handle.family, handle.core
        grids: list[Grid] = family.grids(core, arguments)
        if handle.method.reduce is not None:
            _refuse_empty(PIXELS[kind], grids)
        frames = None
        videos = [[i] for i in range(len(grids))]  # which grids are the frames of each video
        if kind == "image":
            frames = self._images(source, grids)
            videos = frames.videos
        report = source.report = source.report or Report(
            inner_layer=None if handle.inner is None else handle.inner.layer
        )
        whole = [grids[video[0]]._replace(frames=sum(grids[i].frames for i in video)) for video in videos]
        targets = None if handle.method.reduce is None else self._targets(kind, whole, source, frames)
        earlier = len(source.placements or [])
        output, placements = self.run(original, arguments, whole, targets, report, videos, earlier)
        report.videos += [
            VideoReport(placement, (grid.rows, grid.columns)) for placement, grid in zip(placements, whole, strict=True)
        ]
        source.dropping = source.dropping or any(p.record.kept < p.record.total for p in placements)
        placed = Placed(placements, len(output.pooler_output), frames)
        if isinstance(source, Call):
            source.sources[kind] = self.source(kind, placed, placed.count, source)
            return output
        source.placed[kind] = placed
        if source.chunked and source.dropping:
            self._check_finite(output)
        return output

    def source(self, kind: str, placed: Placed | None, count: int, call: Call) -> Source:
        """Where the videos of encoded features stand in a forward.

        Args:
            placed: None in a chunk of a prompt.
            count: entries of the features' container, more than `placed` says after `generate` repeated rows for beams.
        """
        mask = self.handle.family.placeholders(self.handle.core, kind, call.input_ids, call.inputs_embeds)
        if placed is None:
            return Source(mask, None)
        times, placements = count // placed.count, placed.placements
        if placed.frames is not None:
            mask = FrameImages([], [row for row in placed.frames.inside for _ in range(times)]).within(mask)
        if times > 1:
            rows = Source(mask[::times], placements).by_row()
            placements = [placements[v] for row in rows for _ in range(times) for v in row]
        return Source(mask, placements)

    def _images(self, source: Call | Prompt, grids: list[Grid]) -> FrameImages:
        mask = self.handle.family.placeholders(self.handle.core, "image", source.input_ids, source.inputs_embeds)
        if isinstance(source, Prompt) and mask.shape[1] > source.seen:
            mask = mask[:, source.seen :]
        return frames_among_images(mask, grids)

    def _check_finite(self, output: Any) -> None:
        """In a chunked prefill only NaN tells dropped tokens from kept ones, so a kept token must not hold it."""
        for kept in output.kept or []:
            if not bool(torch.isfinite(kept).all()):
                raise ValueError("the projector's output holds values that are not finite (NaN or infinity)")

    def run(
        self,
        original: Callable[..., Any],
        arguments: dict[str, Any],
        grids: list[Grid],
        targets: list[Target] | None,
        report: Report,
        videos: list[list[int]],
        earlier: int,
    ) -> tuple[Any, list[Placement]]:
        """Encode videos and reduce them to their targets, or (without targets) encode them as the stock model does.

        Args:
            original: the stock function.
            arguments: its bound arguments.
            grids, targets: of every video.
            report: takes the times.
            videos: for every video, which of the family's grids are its frames.
            earlier: videos of this prompt that were reduced before, for a replayed selection.
        """
        if targets is None:
            with report.clock.stage("vision", _device(arguments)):
                stock = original(**{**arguments, "return_dict": True})
            output = ReducedVideo(
                pooler_output=stock.pooler_output, deepstack_features=getattr(stock, "deepstack_features", None)
            )
            records = [keep_everything(grid.frames, grid.rows * grid.columns, _device(arguments)) for grid in grids]
            return output, self._placements(records, grids)
        parts = self._encode(original, arguments, grids, report)
        placements = self._placements(self._reduce(parts, videos, targets, report, earlier), grids)
        return self._project(arguments, parts, videos, placements, report), placements

    def _placements(self, records: list[MergeRecord], grids: list[Grid]) -> list[Placement]:
        family, core = self.handle.family, self.handle.core
        layouts = [family.layout(core, grid) for grid in grids]
        return [
            Placement(record, None if layout is None else upload(layout, record.anchor.device))
            for record, layout in zip(records, layouts, strict=True)
        ]

    def request(self) -> Request:
        """How the tower is to be run for the next videos."""
        config = self.handle.config
        assert config.outer is not None
        return Request(
            config.outer.at,
            self.handle.method.needs_scores,
            config.chunk_frames,
            None if config.encoder is None else EncoderStage(config.encoder),
            graphs=self.handle.graphs,
            attention=config.tower_attention,
        )

    def ahead(self, device: torch.device) -> Ahead | None:
        """What encodes a video while it is read; None where all frames are needed at once, or nothing is reduced.

        device: of the pixels.
        """
        encoder, family = self.handle.config.encoder, self.handle.family
        whole = encoder is not None and encoder.tokens is None
        return None if whole or self.handle.method.reduce is None or not family.video_input else Ahead(self, device)

    def _encode(
        self, original: Callable[..., Any], arguments: dict[str, Any], grids: list[Grid], report: Report
    ) -> list[Encoded]:
        ahead = encoded_ahead(self, arguments, grids)
        request = self.request() if ahead is None else ahead.request
        report.ahead |= ahead is not None
        if request.encoder is not None:
            report.encoders.append(request.encoder.report)
        with report.clock.stage("vision", _device(arguments)):
            if ahead is not None:
                return ahead.encoded()
            encoded: list[Encoded] = self.handle.family.encode(self.handle.core, original, arguments, request)
        return encoded

    def _reduce(
        self, parts: list[Encoded], videos: list[list[int]], targets: list[Target], report: Report, earlier: int
    ) -> list[MergeRecord]:
        """A record per video. videos: which parts are its frames; earlier: videos of this prompt reduced before."""
        outer, replay, reduce = self.handle.config.outer, self.handle.replay, self.handle.method.reduce
        assert outer is not None
        assert reduce is not None
        if replay is not None and len(replay.outer) < earlier + len(videos):
            raise ValueError(
                f"the replayed selection has {len(replay.outer)} videos, the prompt {earlier + len(videos)}"
            )
        records: list[MergeRecord] = []
        device = parts[0].tokens.features.device
        # decisions are taken in float32 also under autocast
        with report.clock.stage("reduce", device), torch.no_grad(), torch.autocast(device.type, enabled=False):
            for i, (video, target) in enumerate(zip(videos, targets, strict=True)):
                tokens = parts[video[0]].joined([parts[part] for part in video[1:]]).tokens
                record = reduce(tokens, target, outer) if replay is None else replay.outer[earlier + i]
                record = record.to(device)
                records.append(record.by_frame() if self.handle.family.framed or len(video) > 1 else record)
        return records

    def _project(
        self,
        arguments: dict[str, Any],
        parts: list[Encoded],
        videos: list[list[int]],
        placements: list[Placement],
        report: Report,
    ) -> Any:
        """The kept tokens, projected, in the containers and places of the stock features."""
        family, core = self.handle.family, self.handle.core
        features: list[list[Tensor]] = [[] for _ in parts]  # [part][level]
        kept_tokens = []
        with report.clock.stage("project", _device(arguments)):
            for video, placement in zip(videos, placements, strict=True):
                record = placement.record
                whole = record.kept == record.total
                levels = parts[video[0]].joined([parts[part] for part in video[1:]]).levels
                kept = [level.whole() if whole else level.merged(record) for level in levels]
                kept_tokens.append(kept[0])
                separator = family.separator(core)
                for x in kept:
                    marked = _placed(x if whole else _marked(x, record), placement, separator)
                    for part, piece in zip(video, marked.chunk(len(video)), strict=True):
                        features[part].append(piece)
            for encoded, found in zip(parts, features, strict=True):
                if not found:  # an image that is no frame of a video
                    found += [level.whole() for level in encoded.levels]
            levels_of_all = [list(level) for level in zip(*features, strict=True)]
            pooled = family.assemble(core, arguments, levels_of_all[0])
        return ReducedVideo(pooler_output=pooled, deepstack_features=levels_of_all[1:] or None, kept=kept_tokens)

    def _others(self, kind: str, source: Call | Prompt) -> Tensor:
        other = "video" if kind == "image" else "image"
        return self.handle.family.placeholders(self.handle.core, other, source.input_ids, source.inputs_embeds)

    def _targets(self, kind: str, grids: list[Grid], source: Call | Prompt, inside: FrameImages | None) -> list[Target]:
        handle = self.handle
        budget = handle.config.budget
        assert budget is not None
        totals = [grid.total for grid in grids]
        if not budget.of_prompt:
            # the share as it is written, where the count alone does not bind
            counts = [(budget.keep(n), n) for n in totals]
            return [Target(k, (budget.tokens is None and budget.retain) or k / n, budget.exact) for k, n in counts]
        name = f"budget.{budget.of_prompt[0]}"
        mask = handle.family.placeholders(handle.core, kind, source.input_ids, source.inputs_embeds)
        if inside is not None:
            mask = inside.within(mask)
        if len(self.functions()) > 1 and bool(self._others(kind, source).any()):
            raise ConfigError(f"{name}: cannot be solved for a prompt of videos and images as videos; use retain")
        valid = source.attention_mask if source.attention_mask is not None else torch.ones_like(mask)
        valid = valid[:, -mask.shape[1] :]
        if isinstance(source, Prompt) and mask.shape[1] > source.seen:
            # `generate` was given the whole conversation and will look at what the cache has not seen
            mask, valid = mask[:, source.seen :], valid[:, source.seen :]
        layouts = [handle.family.layout(handle.core, grid) for grid in grids]
        lengths = [n if layout is None else len(layout) for n, layout in zip(totals, layouts, strict=True)]
        if int(mask.sum()) != sum(lengths):
            raise ValueError(
                f"the prompt has {int(mask.sum())} {kind} placeholders, its videos make {sum(lengths)} tokens"
            )
        keep = [0] * len(totals)
        for row, length in zip(videos_by_row(mask.sum(1).tolist(), lengths), valid.sum(1).tolist(), strict=True):
            if not row:
                continue
            rest = int(length) - sum(totals[v] for v in row)
            solved = share_out(budget, row_of(handle, [grids[v] for v in row], rest))
            for v, count in zip(row, solved, strict=True):
                keep[v] = count
        return [Target(k, k / n, budget.exact) for k, n in zip(keep, totals, strict=True)]


def _placed(features: Tensor, placement: Placement, separator: Tensor | None) -> Tensor:
    """[M, D]: a video's features [T N, D] with its separators between them, NaN where one is dropped."""
    if placement.layout is None or separator is None:
        return features
    sizes, layout = placement.values[0].to(features.device), placement.layout.to(features.device)
    separators = separator.to(features).expand(layout.shape[0], -1).masked_fill((sizes == 0)[:, None], torch.nan)
    return torch.where((layout < 0)[:, None], separators, features[layout.clamp_min(0)])


def _marked(kept: Tensor, record: MergeRecord) -> Tensor:
    """[T N, D]: kept tokens in the places they take, NaN elsewhere."""
    return kept.new_full((record.total, kept.shape[-1]), torch.nan).index_copy(0, record.slots, kept)


def _refuse_empty(name: str, grids: list[Grid]) -> None:
    """Stock towers fail on a video without a frame, each in its own obscure way."""
    if not grids:
        raise ValueError(f"{name} is empty: it holds no video and no image")
    for number, grid in enumerate(grids):
        if grid.total == 0:
            raise ValueError(
                f"{name}: video {number} of {len(grids)} has no tokens (frames x rows x columns: "
                f"{grid.frames} x {grid.rows} x {grid.columns}); every video needs at least one frame"
            )


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
