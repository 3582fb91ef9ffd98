"""The patch on one model instance: which hooks it sets, and what flows between them during a forward.

    model.generate        (instance attribute)  refuses what cannot be right before any work; remembers the prompt
    model                 pre/post hook         opens and closes the call, reads labels
    core                  pre/post hook         finds the video placeholders, checks where features come from
    core.get_video_features (instance attribute) encodes, reduces, marks dropped rows (get_image_features too, where
                                          images are treated as video)
    language_model        pre/post hook         takes dropped rows out of the sequence, puts outputs back in place
    layers[k-1].self_attn post hook             attention of the query to the video tokens
    layers[k..]           pre hook              merge at k; masks and rotary tables for the shorter sequence

A dropped row is marked by NaN in its features, shape unchanged, so that everything transformers does between encoding
and the language model (placeholder checks, beam expansion, chunked prefill, several videos) goes on as before.
"""

from __future__ import annotations

import copy
import functools
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from .cache import cache_state, make_smaller
from .call import CALL, PROMPT, Call, Prompt, Wrapped, by_name, signature
from .config import Config, ConfigError
from .encoder.stage import check
from .inner_stage import InnerStage
from .outer_stage import PIXELS, OuterStage, ReducedVideo
from .planning.patched import check_estimated
from .registry import method_module
from .report import Report, Selection
from .splice import continue_over, pack, remember_continuation, unpack
from .tower_graphs import Graphs

_REPLAY: ContextVar[tuple[Handle, Selection] | None] = ContextVar("holimerge_replay", default=None)


class _Last(threading.local):
    def __init__(self) -> None:
        self.reports: WeakKeyDictionary[Handle, Report] = WeakKeyDictionary()
        self.selections: WeakKeyDictionary[Handle, Selection] = WeakKeyDictionary()


_LAST = _Last()


class Handle:
    """The patch of one model. Made by `patch_model`; `detach` undoes everything it did."""

    def __init__(self, model: Any, family: Any, config: Config) -> None:
        self.model, self.family, self.config = model, family, config
        self.method = method_module(config.method).METHOD
        self.core: Any = family.core(model)
        self.lm: Any = family.language_model(model)
        self.force_packing = False  # tests: run the packing although nothing was dropped
        self._hooks: list[Any] = []
        self._latest: Report | None = None  # for a thread that only watches, as a streamer's reader does
        self._attributes: list[tuple[nn.Module, str, Any]] = []
        kinds = getattr(self.lm.config, "layer_types", None) or []
        self.recurrent = "linear_attention" in kinds  # some layers keep a state instead of tokens
        self.outer = OuterStage(self)
        positions = config.outer.positions if config.outer is not None else "auto"
        self.contiguous = positions == "contiguous" or (positions == "auto" and not family.mrope)
        self._refuse_what_the_family_cannot()
        tower = family.graphed(self.core)
        self.graphs = Graphs(tower) if config.cuda_graph and tower is not None else None
        self.inner: InnerStage | None = None
        if config.inner is not None:
            self.inner = InnerStage(self, config.inner)

    def _refuse_what_the_family_cannot(self) -> None:
        family, config = self.family, self.config
        name = getattr(self.model.config, "model_type", type(self.model).__name__)
        check_estimated(config.budget, self.model.config)
        if config.treat_images_as_video and family.no_images:
            raise ConfigError(f"treat_images_as_video: {name}: {family.no_images}")
        if not family.video_input and self.method.reduce is not None and not config.treat_images_as_video:
            raise ConfigError(
                f"treat_images_as_video: {name} takes the frames of a video as images and cannot tell them from other "
                "images; set it to true for prompts whose images are the frames of a video"
            )
        if config.encoder is not None:
            refused = family.no_encoder(self.core, config.encoder.need)
            check(config.encoder, refused, lambda: len(family.encoder_tower(self.core, {}, []).blocks))

    # ------------------------------------------------------------------ attach and detach

    def attach(self) -> None:
        """Set the hooks; on an error nothing stays behind."""
        try:
            self._replace(self.model, "generate", self._generate)
            for name in ("generate_batch", "init_continuous_batching"):
                if hasattr(self.model, name):
                    self._replace(self.model, name, _refuse_continuous_batching)
            for kind, name in self.outer.functions().items():
                self._replace(self.core, name, functools.partial(self.outer.features, kind))
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
        for module, name, before in self._attributes:
            module.__dict__.pop(name, None)
            if before is not None:  # somebody else's replacement
                module.__dict__[name] = before
        self._attributes.clear()
        self.model.__dict__.pop("_holimerge_handle", None)
        if self.graphs is not None:  # the handle itself goes with the next collection of cycles
            self.graphs.clear()

    def __deepcopy__(self, memo: dict[int, Any]) -> Handle:
        twin = memo[id(self)] = object.__new__(type(self))
        twin.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return twin

    def __reduce__(self) -> Any:
        raise TypeError(
            "a patched model cannot be pickled: unpatch it first (holimerge.unpatch_model) and patch what is loaded, "
            "or use save_pretrained or state_dict, which give the plain model"
        )

    def _replace(self, module: nn.Module, name: str, run: Callable[..., Any]) -> None:
        self._attributes.append((module, name, module.__dict__.get(name)))
        module.__dict__[name] = Wrapped(getattr(module, name), run)

    def _pre(self, module: nn.Module, hook: Callable[..., Any]) -> None:
        self._hooks.append(module.register_forward_pre_hook(hook, with_kwargs=True))

    def _post(self, module: nn.Module, hook: Callable[..., Any]) -> None:
        self._hooks.append(module.register_forward_hook(hook, with_kwargs=True, always_call=True))

    # ------------------------------------------------------------------ what the last forward did

    @property
    def report(self) -> Report:
        found = _LAST.reports.get(self) or self._latest
        if found is None:
            raise RuntimeError("no forward has run since the model was patched")
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
        if self.current() is not None:  # broken off: `generate` never runs inside a forward
            CALL.set(None)
        bound = signature(original).bind_partial(*args, **kwargs).arguments
        given, inputs = bound.get("generation_config"), bound.get("inputs")

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
            if kwargs.get("pixel_values_videos") is not None or kwargs.get("pixel_values") is not None:
                self.inner.check_cache(kwargs.get("past_key_values"))
                self.inner.check_compact(kwargs.get("past_key_values"))
            static = getattr(kwargs.get("past_key_values"), "is_compileable", False)
            named = setting("cache_implementation")
            if self.inner.options.compact_cache and named not in (None, "dynamic", "dynamic_full", "offloaded"):
                raise ValueError(
                    f"inner.compact_cache: a cache of cache_implementation {named!r} cannot lose tokens; use 'dynamic' "
                    "or 'offloaded', or leave compact_cache out"
                )
            if named is not None or static:
                kwargs["disable_compile"] = True  # lengths that differ by layer break the compiled decoding step
        given_ids = isinstance(inputs, Tensor) and not inputs.is_floating_point()
        ids = inputs if given_ids else kwargs.get("input_ids")
        cache = kwargs.get("past_key_values")
        seen = int(cache.get_seq_length()) if cache is not None else 0
        chunked = setting("prefill_chunk_size") is not None
        if chunked and self.config.outer is not None:
            if self.recurrent:
                raise ValueError(
                    "prefill_chunk_size: this model's linear layers cannot skip the padding of a chunk that loses all "
                    "its tokens; prefill in one piece"
                )
            if self.config.outer.order == "segment" and not self.contiguous:
                raise ValueError(
                    "prefill_chunk_size: with outer.order 'segment' and original positions a token's position may lie "
                    "in another chunk; prefill in one piece, or use order 'raster' or contiguous positions"
                )
            if self.contiguous and self.family.mrope:
                raise ValueError(
                    "prefill_chunk_size: contiguous positions of several axes need the whole prompt; "
                    "prefill in one piece, or use original positions"
                )
        self.family.check(kwargs, contiguous=self.contiguous)
        prompt = Prompt(self, ids, kwargs.get("inputs_embeds"), kwargs.get("attention_mask"), seen, chunked)
        prompt.made_here, prompt.uncompiled = cache is None, bool(setting("disable_compile"))
        token = PROMPT.set(prompt)
        try:
            return original(*args, **kwargs)
        finally:
            PROMPT.reset(token)

    # ------------------------------------------------------------------ the outer forward

    def _open(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        stale = self.current()
        if stale is not None and stale.opener is module:  # broken off: no forward runs inside itself
            CALL.set(None)
        call = Call(self, module, labels=by_name(module, args, kwargs).get("labels"))
        call.token = CALL.set(call)

    def _close(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        call = self.current()
        if call is not None and call.opener is module and call.token is not None:
            CALL.reset(call.token)

    # ------------------------------------------------------------------ the core

    def _enter_core(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        call = self.current()
        if call is None or call.reached:  # the core was called directly
            CALL.set(None)
            self._open(module, args, kwargs)
        call = self.current()
        assert call is not None
        call.reached = "core"
        self._find_video(call, by_name(module, args, kwargs))

    def _find_video(self, call: Call, given: dict[str, Any]) -> None:
        ids, embeds = given.get("input_ids"), given.get("inputs_embeds")
        call.cache = given.get("past_key_values")
        call.input_ids, call.inputs_embeds = ids, embeds
        call.attention_mask = given.get("attention_mask")
        prompt = PROMPT.get()
        for kind in self.outer.functions():
            name = PIXELS[kind]
            pixels, outputs = given.get(name), given.get("mm_encoder_outputs")
            encoded = outputs.get(kind) if isinstance(outputs, Mapping) else outputs
            if encoded is None and pixels is None:
                if (
                    kind == "video"
                    and not self.family.one_placeholder
                    and ids is not None
                    and ids.shape[1] > 1
                    and call.seen == 0
                    and bool(self.family.placeholders(self.core, kind, ids, None).any())
                ):
                    raise RuntimeError(
                        f"the prompt has video placeholders but no video: a patched model reduces {name} itself"
                    )
                continue
            made_here = isinstance(encoded, ReducedVideo) and prompt is not None and kind in prompt.placed
            if encoded is not None and not made_here:
                raise RuntimeError(
                    f"the {kind}'s features were computed by the caller (mm_encoder_outputs), so they were not "
                    f"reduced; pass {name} instead, or unpatch the model"
                )
            self.family.check(given, contiguous=self.contiguous)
            call.has_video = True
            if encoded is not None:
                assert prompt is not None
                placed = None if prompt.chunked else prompt.placed[kind]
                call.sources[kind] = self.outer.source(kind, placed, len(encoded.pooler_output), call)
                call.dropping, call.report = prompt.dropping, prompt.report

    def _leave_core(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        call = self.current()
        try:
            if call is None or not call.dropping or output is None:
                return output
            # rows of dropped tokens
            if isinstance(output, tuple):
                return tuple(_without_nan(x) if _are_features(x) else x for x in output)
            for name in ("video_hidden_states", "image_hidden_states"):
                if getattr(output, name, None) is not None:
                    setattr(output, name, _without_nan(getattr(output, name)))
            return output
        finally:
            self._close(module, args, kwargs, output)

    # ------------------------------------------------------------------ the language model

    def _enter_lm(self, module: Any, args: Any, kwargs: Any) -> Any:
        call = self.current()
        if call is None:
            return None
        cache, embeds = kwargs.get("past_key_values"), kwargs.get("inputs_embeds")
        foreign = embeds is None or any(source.mask.shape != embeds.shape[:2] for source in call.sources.values())
        if call.reached != "core" or foreign:  # called directly, after a call that was broken off
            CALL.set(None)
            return None
        call.reached = "language model"
        call.has_video = call.has_video and any(s.placements != [] for s in call.sources.values())
        if not call.has_video:
            prompt = PROMPT.get()
            # guidance runs a prompt without a video beside one with a video
            aside = prompt is not None and prompt.handle is self and bool(prompt.placements)
            if not aside and (cache is None or ((embeds.shape[1] > 1 or not cache.is_compileable) and call.seen == 0)):
                self._reported(Report())
            state = cache_state(cache)
            if state is None:
                return None
            self._check_cache(state)
            return args, continue_over(call, kwargs, state)
        return args, self._enter_prompt(call, module, kwargs)

    @torch.compiler.disable  # once a prompt; traced, its numbers on the host would make a new graph for every length
    def _enter_prompt(self, call: Call, module: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        cache, embeds = kwargs.get("past_key_values"), kwargs["inputs_embeds"]
        placements = call.placements
        if self.replay is not None and placements is not None and len(placements) != len(self.replay.outer):
            raise ValueError(
                f"the replayed selection has {len(self.replay.outer)} videos, the prompt {len(placements)}"
            )
        report = call.report = call.report or Report()
        checkpointing = module.training and getattr(module, "gradient_checkpointing", False)
        if checkpointing and self.inner is not None:
            raise ValueError(
                "gradient checkpointing: layers are run again without the inner merge's state; "
                "turn it off, or use a configuration without an inner block"
            )
        if cache_state(cache) is not None:
            self._check_cache(cache_state(cache))
        if cache is None and not checkpointing and _uses_cache(module, kwargs):
            cache = DynamicCache(config=module.config)
            kwargs = {**kwargs, "past_key_values": cache}
        with report.clock.stage("splice", embeds.device):
            call.packing = pack(call, kwargs, cache)
        if call.packing is not None:
            kwargs = {**kwargs, **call.packing.arguments}
            if call.roomy:
                make_smaller(cache, embeds.shape[1] - call.packing.index.shape[1])
            if self.inner is not None:
                self.inner.begin(call)
        report.clock.start("prefill", embeds.device)
        return kwargs

    def _leave_lm(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        call = self.current()
        if call is None or output is None:
            return
        prompt = call.prompt
        if prompt is not None and prompt.cache is None:
            prompt.cache = kwargs.get("past_key_values")
        if call.continuation is not None:
            remember_continuation(call, kwargs["past_key_values"])
        if call.has_video:
            self._leave_prompt(call, kwargs, output)

    @torch.compiler.disable
    def _leave_prompt(self, call: Call, kwargs: dict[str, Any], output: Any) -> None:
        assert call.report is not None
        call.report.clock.stop("prefill", kwargs["inputs_embeds"].device, output.last_hidden_state.device)
        if call.packing is not None:
            if self.inner is not None:
                self.inner.compact(call)
            unpack(call, output)
        self._reported(call.report)
        placements = call.placements
        if placements is not None:
            owners = None if call.inner is None else call.inner.owners
            _LAST.selections[self] = Selection([p.record for p in placements], owners)
            if owners is not None:
                self._report_inner(call, owners)

    def _reported(self, report: Report) -> None:
        _LAST.reports[self] = self._latest = report

    def _check_cache(self, state: Any) -> None:
        """A cache must go on as it began."""
        layer = None if self.inner is None else self.inner.layer
        if (state.inner_layer is not None and state.inner_layer != layer) or state.contiguous != self.contiguous:
            raise RuntimeError(
                "this cache was filled under another configuration "
                f"(inner merge at {state.inner_layer}, {'contiguous' if state.contiguous else 'original'} positions); "
                "finish a conversation before patching anew"
            )

    def _report_inner(self, call: Call, owners: list[Tensor]) -> None:
        """Tell each video's report which of its tokens the inner merge kept."""
        assert call.report is not None
        of_record = {id(video.record): video for video in call.report.videos}
        source = next(iter(call.sources.values()))
        placements, rows = source.placements, source.by_row()
        assert placements is not None
        held = [[placements[v].record.kept for v in row] for row in rows]
        if len(call.sources) == 1 and [sum(counts) for counts in held] == [len(owner) for owner in owners]:
            for row, counts, owner in zip(rows, held, owners, strict=True):
                kept = owner == torch.arange(owner.shape[0], device=owner.device)
                for v, flags in zip(row, kept.split(counts), strict=True):
                    of_record[id(placements[v].record)].inner_kept = flags
            return
        # videos and images as videos may alternate in a row, and a mask may hide some of their tokens: every
        # placeholder is asked whose it is
        assert call.packing is not None
        for source in call.sources.values():
            assert source.placements is not None
            for placement, (at, columns) in zip(source.placements, source.columns(), strict=True):
                entering = call.packing.index[at][call.packing.video[at]]
                mine = torch.isin(entering, columns.to(entering.device))
                kept = owners[at] == torch.arange(owners[at].shape[0], device=owners[at].device)
                of_record[id(placement.record)].inner_kept = kept[mine.to(kept.device)]


def _refuse_continuous_batching(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    raise ValueError(
        f"{original.__name__}: continuous batching takes token ids alone, so no video reaches the model; use generate"
    )


def _are_features(x: Any) -> bool:
    return isinstance(x, Tensor) and x.ndim == 2 and x.is_floating_point()


def _without_nan(features: Any) -> Any:
    """Features in any container, zero where a token was dropped."""
    if isinstance(features, Tensor):
        return features.nan_to_num(nan=0.0)
    if isinstance(features, (list, tuple)):
        return type(features)(_without_nan(x) for x in features)
    if isinstance(features, ReducedVideo):
        return ReducedVideo(pooler_output=_without_nan(features.pooler_output))
    return features


def _uses_cache(module: Any, kwargs: dict[str, Any]) -> bool:
    given = kwargs.get("use_cache")
    return bool(module.config.use_cache if given is None else given)
