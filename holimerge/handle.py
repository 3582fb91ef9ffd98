"""The patch on one model instance: which hooks it sets, and what flows between them during a forward.

    model.generate        (instance attribute)  refuses what cannot be right before any work; remembers the prompt
    model                 pre/post hook         opens and closes the call, reads labels
    core                  pre/post hook         finds the video placeholders, checks where features come from
    core.get_video_features (instance attribute) encodes, reduces, marks dropped rows
    language_model        pre/post hook         takes dropped rows out of the sequence, puts outputs back in place
    layers[k-1].self_attn post hook             attention of the query to the video tokens
    layers[k..]           pre hook              merge at k; masks and rotary tables for the shorter sequence

A dropped row is marked by NaN in its features, shape unchanged, so that everything transformers does between encoding
and the language model (placeholder checks, beam expansion, chunked prefill, several videos) goes on as before.
"""

from __future__ import annotations

import functools
import inspect
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.modeling_outputs import BaseModelOutputWithPooling

from .allocation import largest_remainder
from .cache import cache_state
from .call import CALL, PROMPT, Call, Prompt, by_name
from .config import Config, ConfigError
from .cost import largest_budget
from .inner_stage import InnerStage
from .registry import method_module
from .report import Report, Selection, VideoReport
from .shapes import shape_of
from .splice import continue_over, pack, remember_continuation, unpack
from .tokens import MergeRecord, Target, keep_everything


@dataclass
class ReducedVideo(BaseModelOutputWithPooling):
    """What `get_video_features` returns inside a patched model's own calls; its type says where it comes from."""


_REPLAY: ContextVar[tuple[Handle, Selection] | None] = ContextVar("holimerge_replay", default=None)


class _Last(threading.local):
    def __init__(self) -> None:
        self.reports: WeakKeyDictionary[Handle, Report] = WeakKeyDictionary()
        self.selections: WeakKeyDictionary[Handle, Selection] = WeakKeyDictionary()


_LAST = _Last()


class _Wrapped:
    """An instance attribute that stands in for a bound method; a class of its own so that it can be deep-copied."""

    def __init__(self, handle: Handle, name: str, original: Callable[..., Any], run: str) -> None:
        self.handle, self.name, self.original, self.run = handle, name, original, run
        functools.update_wrapper(self, original)
        self.__signature__ = inspect.signature(original)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return getattr(self.handle, self.run)(self.original, *args, **kwargs)


class Handle:
    """The patch of one model. Made by `patch_model`; `detach` undoes everything it did."""

    def __init__(self, model: Any, family: Any, config: Config) -> None:
        self.model, self.family, self.config = model, family, config
        self.method = method_module(config.method).METHOD
        self.core: Any = family.core(model)
        self.lm: Any = family.language_model(model)
        self.force_packing = False  # tests: run the packing although nothing was dropped
        self._hooks: list[Any] = []
        self._attributes: list[tuple[nn.Module, str]] = []
        self.inner: InnerStage | None = None
        if config.inner is not None:
            self.inner = InnerStage(self, config.inner)
        positions = config.outer.positions if config.outer is not None else "auto"
        self.contiguous = positions == "contiguous" or (positions == "auto" and not family.mrope)

    # ------------------------------------------------------------------ attach and detach

    def attach(self) -> None:
        """Set the hooks; on an error nothing stays behind."""
        try:
            self._replace(self.model, "generate", "_generate")
            self._replace(self.core, "get_video_features", "_video_features")
            self._pre(self.model, self._open)
            self._post(self.model, self._close)
            self._pre(self.core, self._enter_core)
            self._post(self.core, self._leave_core)
            self._pre(self.lm, self._enter_lm)
            self._post(self.lm, self._leave_lm)
            if self.inner is not None:
                self._hooks += self.inner.attach()
            self.model.__dict__["_holimerge_handle"] = self
        except BaseException:
            self.detach()
            raise

    def detach(self) -> None:
        """Remove every hook and attribute; the model is as it was."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        for module, name in self._attributes:
            module.__dict__.pop(name, None)
        self._attributes.clear()
        self.model.__dict__.pop("_holimerge_handle", None)

    def _replace(self, module: nn.Module, name: str, run: str) -> None:
        module.__dict__[name] = _Wrapped(self, name, getattr(module, name), run)
        self._attributes.append((module, name))

    def _pre(self, module: nn.Module, hook: Callable[..., Any]) -> None:
        self._hooks.append(module.register_forward_pre_hook(hook, with_kwargs=True))

    def _post(self, module: nn.Module, hook: Callable[..., Any]) -> None:
        self._hooks.append(module.register_forward_hook(hook, with_kwargs=True, always_call=True))

    # ------------------------------------------------------------------ what the last forward did

    @property
    def report(self) -> Report:
        found = _LAST.reports.get(self)
        if found is None:
            raise RuntimeError("no forward has run since the model was patched (in this thread)")
        return found

    @property
    def selection(self) -> Selection:
        """The choices of the last forward that saw a video."""
        found = _LAST.selections.get(self)
        if found is None:
            raise RuntimeError("no forward with a video has run since the model was patched (in this thread)")
        return found

    @contextmanager
    def replaying(self, selection: Selection) -> Iterator[None]:
        """Inside the block, forwards make the choices of `selection` instead of their own."""
        token = _REPLAY.set((self, selection))
        try:
            yield
        finally:
            _REPLAY.reset(token)

    @property
    def replay(self) -> Selection | None:
        found = _REPLAY.get()
        return found[1] if found is not None and found[0] is self else None

    def current(self) -> Call | None:
        """The running call of this model in this thread."""
        call = CALL.get()
        return call if call is not None and call.handle is self else None

    # ------------------------------------------------------------------ generate

    def _generate(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        given = kwargs.get("generation_config")

        def setting(name: str) -> Any:
            for source in (
                kwargs.get(name),
                getattr(given, name, None),
                getattr(self.model.generation_config, name, None),
            ):
                if source is not None:
                    return source
            return None

        if self.inner is not None:
            if setting("use_cache") is False:
                raise ValueError(
                    "use_cache=False: without a cache every step would merge anew with its newest token as the query; "
                    "use a cache, or a configuration without an inner block"
                )
            if setting("prefill_chunk_size") is not None:
                raise ValueError(
                    "prefill_chunk_size: each chunk would merge with its own last token as the query; "
                    "prefill in one piece, or use a configuration without an inner block"
                )
            if setting("cache_implementation") is not None:
                kwargs["disable_compile"] = True  # lengths that differ by layer break the compiled decoding step
        inputs = args[0] if args else kwargs.get("inputs")
        given_ids = isinstance(inputs, Tensor) and not inputs.is_floating_point()
        ids = inputs if given_ids else kwargs.get("input_ids")
        cache = kwargs.get("past_key_values")
        seen = int(cache.get_seq_length()) if cache is not None else 0
        prompt = Prompt(self, ids, kwargs.get("inputs_embeds"), kwargs.get("attention_mask"), seen)
        token = PROMPT.set(prompt)
        try:
            return original(*args, **kwargs)
        finally:
            PROMPT.reset(token)

    # ------------------------------------------------------------------ the outer forward

    def _open(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        call = Call(self, module, labels=by_name(module, args, kwargs).get("labels"))
        call.token = CALL.set(call)

    def _close(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        call = self.current()
        if call is not None and call.opener is module and call.token is not None:
            CALL.reset(call.token)

    # ------------------------------------------------------------------ the core

    def _enter_core(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        if self.current() is None:  # the core was called directly
            self._open(module, args, kwargs)
        call = self.current()
        assert call is not None
        self._find_video(call, by_name(module, args, kwargs))

    def _find_video(self, call: Call, given: dict[str, Any]) -> None:
        encoded = (given.get("mm_encoder_outputs") or {}).get("video")
        pixels = given.get("pixel_values_videos")
        ids, embeds = given.get("input_ids"), given.get("inputs_embeds")
        cache = given.get("past_key_values")
        call.seen = int(cache.get_seq_length()) if cache is not None else 0
        if encoded is None and pixels is None:
            if (
                ids is not None
                and ids.shape[1] > 1
                and call.seen == 0
                and bool(self.family.video_mask(self.core, ids, None).any())
            ):
                raise RuntimeError(
                    "the prompt has video placeholders but no video: a patched model reduces pixel_values_videos itself"
                )
            return
        if encoded is not None and not isinstance(encoded, ReducedVideo):
            raise RuntimeError(
                "the video's features were computed by the caller (mm_encoder_outputs), so they were not reduced; "
                "pass pixel_values_videos instead, or unpatch the model"
            )
        call.has_video = True
        call.input_ids, call.inputs_embeds = ids, embeds
        call.attention_mask = given.get("attention_mask")
        call.video_mask = self.family.video_mask(self.core, ids, embeds)
        if self.contiguous and self.family.mrope and ids is not None:
            image = getattr(self.core.config, "image_token_id", None)
            if image is not None and bool((ids == image).any()):
                raise ConfigError(
                    "outer.positions: 'contiguous' would flatten the positions of the images in this prompt; "
                    "use 'original'"
                )
        if encoded is not None:
            call.report = getattr(encoded, "report", None)
            records = getattr(encoded, "reductions", None)
            features: Any = encoded.pooler_output
            call.reductions = None if records is None else self._expanded(call, records, len(features))

    def _expanded(self, call: Call, records: list[MergeRecord], count: int) -> list[MergeRecord]:
        """Records in the order of the rows' videos, after `generate` repeated each row's videos for its beams."""
        times = count // len(records)
        if times == 1:
            return records
        assert call.video_mask is not None
        rows = self._videos_by_row(call.video_mask[::times], records)
        return [records[v] for row in rows for _ in range(times) for v in row]

    def _videos_by_row(self, mask: Tensor, records: list[MergeRecord] | list[int]) -> list[list[int]]:
        """Which videos each row holds, from the number of its placeholders."""
        lengths = [r if isinstance(r, int) else r.total for r in records]
        rows, video = [], 0
        for wanted in mask.sum(1).tolist():
            row: list[int] = []
            while wanted > 0 and video < len(lengths):
                wanted -= lengths[video] + self.family.separators
                row.append(video)
                video += 1
            rows.append(row)
        return rows

    def _leave_core(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        call = self.current()
        states = getattr(output, "video_hidden_states", None)
        if call is not None and call.has_video and states is not None:
            output.video_hidden_states = states.nan_to_num(nan=0.0)  # rows of dropped tokens
        self._close(module, args, kwargs, output)

    # ------------------------------------------------------------------ features

    def _video_features(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        call, prompt = self.current(), PROMPT.get()
        generating = prompt is not None and prompt.handle is self
        if call is None and not generating:
            return original(*args, **kwargs)  # the user's own call
        bound = inspect.signature(original).bind_partial(*args, **kwargs)
        arguments = dict(bound.arguments)
        arguments.update(arguments.pop("kwargs", {}))
        grids = self.family.grids(self.core, arguments)
        report = Report(inner_layer=None if self.inner is None else self.inner.layer)
        if self.method.reduce is None:
            output, records = self._stock(original, arguments, grids, report)
        else:
            targets = self._targets(grids, call, prompt)
            output, records = self._reduced(original, arguments, grids, targets, report)
        report.videos = [
            VideoReport(record, (rows, columns), self.family.separators)
            for record, (_, rows, columns) in zip(records, grids, strict=True)
        ]
        output.reductions, output.report = records, report
        if call is not None:
            call.reductions, call.report = records, report
        return output

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
        outer = self.config.outer
        assert outer is not None
        assert self.method.reduce is not None
        device = _device(arguments)
        with report.clock.stage("vision", device):
            encoded = self.family.encode(
                self.core,
                original,
                arguments,
                at=outer.at,
                scored=self.method.needs_scores,
                chunk=self.config.chunk_frames,
            )
        replay = self.replay
        records = []
        with report.clock.stage("reduce", device), torch.no_grad():
            for i, (video, target) in enumerate(zip(encoded, targets, strict=True)):
                record = self.method.reduce(video.tokens, target, outer) if replay is None else replay.outer[i]
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
            pooled = self.family.assemble(self.core, features)
        return ReducedVideo(pooler_output=pooled), records

    def _targets(self, grids: list[tuple[int, int, int]], call: Call | None, prompt: Prompt | None) -> list[Target]:
        budget = self.config.budget
        assert budget is not None
        totals = [t * h * w for t, h, w in grids]
        if budget.flops is None:
            return [
                Target(budget.keep(n), budget.retain if budget.retain is not None else budget.keep(n) / n, budget.exact)
                for n in totals
            ]
        source = call if call is not None else prompt
        assert source is not None
        mask = self.family.video_mask(self.core, source.input_ids, source.inputs_embeds)
        valid = source.attention_mask if source.attention_mask is not None else torch.ones_like(mask)
        mask, valid = mask[:, source.seen :], valid[:, -mask.shape[1] :][:, source.seen :]
        if int(mask.sum()) != sum(totals) + len(totals) * self.family.separators:
            raise ValueError(
                f"the prompt has {int(mask.sum())} video placeholders, its videos make "
                f"{sum(totals) + len(totals) * self.family.separators} tokens"
            )
        text = shape_of(self.model.config).text
        layer = None if self.inner is None else self.inner.layer
        retain = None if self.config.inner is None else self.config.inner.retain
        keep = [0] * len(totals)
        for row, length in zip(self._videos_by_row(mask, totals), valid.sum(1).tolist(), strict=True):
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
                raise ConfigError(f"budget.flops: {error}") from None
            if most < len(row):
                raise ConfigError(
                    f"budget.flops: {budget.flops} leaves {most} token(s) for the {len(row)} videos of a prompt; "
                    "each needs at least one"
                )
            extra = largest_remainder([totals[v] - 1 for v in row], most - len(row))
            for v, more in zip(row, extra, strict=True):
                keep[v] = 1 + more
        return [Target(k, k / n, budget.exact) for k, n in zip(keep, totals, strict=True)]

    # ------------------------------------------------------------------ the language model

    def _enter_lm(self, module: Any, args: Any, kwargs: Any) -> Any:
        call = self.current()
        if call is None:
            return None
        cache, embeds = kwargs.get("past_key_values"), kwargs["inputs_embeds"]
        if not call.has_video:
            if embeds.shape[1] > 1 and call.seen == 0:
                _LAST.reports[self] = Report()
            state = cache_state(cache)
            return None if state is None else (args, continue_over(call, kwargs, state))
        report = call.report = call.report or Report()
        if cache is None and _uses_cache(module, kwargs):
            cache = DynamicCache(config=module.config)
            kwargs = {**kwargs, "past_key_values": cache}
        with report.clock.stage("splice", embeds.device):
            call.packing = pack(call, kwargs, cache)
        if call.packing is not None:
            kwargs = {**kwargs, **call.packing.arguments}
            if self.inner is not None:
                self.inner.begin(call)
        report.clock.start("prefill", embeds.device)
        return args, kwargs

    def _leave_lm(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        call = self.current()
        if call is None or output is None:
            return
        if call.continuation is not None:
            remember_continuation(call, kwargs["past_key_values"])
        if not call.has_video:
            return
        assert call.report is not None
        call.report.clock.stop("prefill", kwargs["inputs_embeds"].device)
        if call.packing is not None:
            unpack(call, output)
        _LAST.reports[self] = call.report
        if call.reductions is not None:
            owners = None if call.inner is None else call.inner.owners
            _LAST.selections[self] = Selection(list(call.reductions), owners)
            if owners is not None:
                self._report_inner(call, owners)

    def _report_inner(self, call: Call, owners: list[Tensor]) -> None:
        """Tell each video's report which of its tokens the inner merge kept."""
        assert call.video_mask is not None
        assert call.reductions is not None
        assert call.report is not None
        of_record = {id(video.record): video for video in call.report.videos}
        for row, owner in zip(self._videos_by_row(call.video_mask, call.reductions), owners, strict=True):
            kept = owner == torch.arange(owner.shape[0], device=owner.device)
            for video, flags in zip(row, kept.split([call.reductions[v].kept for v in row]), strict=True):
                of_record[id(call.reductions[video])].inner_kept = flags


def _uses_cache(module: Any, kwargs: dict[str, Any]) -> bool:
    given = kwargs.get("use_cache")
    return bool(module.config.use_cache if given is None else given)


def _device(arguments: dict[str, Any]) -> torch.device:
    return next(v.device for v in arguments.values() if isinstance(v, Tensor))
