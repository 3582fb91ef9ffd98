"""Pictures of what a reduction did: segments of a video, kept tokens on its frames, accuracy and time against budget.

Pure functions of frames and of what `last_report`, `holimerge eval` or `holimerge.eval.measure` give; each returns a
matplotlib `Figure` (no pyplot, no global state): show it in a notebook after `%matplotlib inline`, or `savefig` it.
Needs matplotlib (`pip install holimerge[viz]`), imported when a picture is drawn. Colours are Okabe and Ito's, which
people with any colour vision can tell apart.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from holimerge.report import VideoReport
from holimerge.tokens import MergeRecord

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BLUE, ORANGE, GREEN, VERMILLION = "#0072B2", "#E69F00", "#009E73", "#D55E00"
PURPLE, SKY, YELLOW, GREY = "#CC79A7", "#56B4E9", "#F0E442", "#C8C8C8"
# of clusters, in the order in which they are first seen
CLUSTERS = (ORANGE, SKY, GREEN, YELLOW, PURPLE, VERMILLION, BLUE)
SERIES = ((BLUE, "o"), (VERMILLION, "s"), (GREEN, "^"), (PURPLE, "D"), (ORANGE, "v"))
STAGES = {"vision": BLUE, "reduce": VERMILLION, "project": YELLOW, "splice": ORANGE, "prefill": SKY, "other": GREY}
MOST_FRAMES = 16  # drawn side by side in a strip; of a longer video every second one, every third, ...


class Part(NamedTuple):
    """Tokens of one segment, frames `first` to `last`: `static` were merged over time, `kept` entered by themselves,
    `dropped` did not enter."""

    first: int
    last: int
    static: int
    kept: int
    dropped: int


class Point(NamedTuple):
    """A configuration in `accuracy_against_tokens`: video tokens that enter, accuracy in % with its 95 % interval."""

    name: str
    tokens: float
    percent: float
    low: float
    high: float


def static_tokens(record: MergeRecord) -> np.ndarray:
    """Which tokens were merged over time: [T, N] bool, true where another frame of the segment has its token of the
    same position in the same kept token. (Of a static set without any kept token, nothing is seen here.)"""
    owner = record.assignment.view(record.frames, record.per_frame).cpu()
    static = torch.zeros(owner.shape, dtype=torch.bool)
    for first, last in record.segments:
        ordered, place = owner[first : last + 1].sort(dim=0)
        same = (ordered[1:] == ordered[:-1]) & (ordered[1:] >= 0)
        found = torch.zeros_like(ordered, dtype=torch.bool)
        found[1:] |= same
        found[:-1] |= same
        static[first : last + 1] = torch.zeros_like(found).scatter(0, place, found)
    return static.numpy()


def segment_parts(record: MergeRecord) -> list[Part]:
    """What became of the tokens of every segment; one part for the whole video if the method makes no segments."""
    static = static_tokens(record)
    held = record.assignment.view(record.frames, record.per_frame).cpu().numpy() >= 0
    parts = []
    for first, last in record.segments or ((0, record.frames - 1),):
        span = slice(first, last + 1)
        over_time = int(static[span].sum())
        entered = int(held[span].sum())
        parts.append(Part(first, last, over_time, entered - over_time, held[span].size - entered))
    return parts


def points(results: Mapping[str, Any], task: str = "synthetic") -> list[Point]:
    """The configurations of one task in results.json of `holimerge eval`, fewest tokens first.

    Raises:
        ValueError: the results have no such task.
    """
    if task not in results["tasks"]:
        raise ValueError(f"task: {task!r} is not in these results; valid: {', '.join(results['tasks'])}")
    found = []
    for name, got in results["tasks"][task]["configs"].items():
        accuracy = got["accuracy"]
        if accuracy["percent"] is not None and "entering" in got["tokens"]:
            tokens = got["tokens"]["entering"]["median"]
            found.append(Point(name, tokens, accuracy["percent"], accuracy["low"], accuracy["high"]))
    return sorted(found, key=lambda point: point.tokens)


def frame_strip(frames: np.ndarray, video: VideoReport, *, title: str | None = None) -> Figure:
    """The video's frames in a row, cut where its segments begin; below, what became of each segment's tokens.

    Args:
        frames: uint8 [F, H, W, 3], those that the model saw; F is T or a multiple (two frames a token in Qwen2.5-VL).
        video: of `last_report(model).videos`.
        title: another one than the default, which gives the counts.

    Raises:
        ValueError: frames of another shape, or a number that does not fit the record.
    """
    record, parts = video.record, segment_parts(video.record)
    shown = _frames_of(frames, record)
    step = math.ceil(record.frames / MOST_FRAMES)
    aspect = shown.shape[1] / shown.shape[2]
    width = 13.0
    strip = width / record.frames * step * aspect
    figure = _figure(width, strip + 2.2)
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=(strip, 1.0))
    for part in parts:
        for frame in range(part.first, part.last + 1, step):
            end = min(frame + step, part.last + 1)
            seen = shown[frame][:, : max(1, shown.shape[2] * (end - frame) // step)]  # cut where the segment ends
            top.imshow(seen, extent=(frame, end, 0, 1), aspect="auto", interpolation="nearest")
            top.axvline(frame, color="white", linewidth=0.8)
    top.set(xlim=(0, record.frames), ylim=(0, 1), yticks=[])
    top.tick_params(axis="x", length=0, labelbottom=False)
    for spine in top.spines.values():
        spine.set_visible(False)
    for number, part in enumerate(parts):
        middle, length = (part.first + part.last + 1) / 2, part.last + 1 - part.first
        total, base = length * record.per_frame, 0.0
        counts = (("static", part.static, BLUE), ("kept", part.kept, ORANGE), ("dropped", part.dropped, GREY))
        for kind, count, colour in counts:
            share = 100 * count / total
            bars = bottom.bar(middle, share, length - 0.12, bottom=base, color=colour)
            bars.patches[0].set_gid(f"{kind} {number}")
            base += share
        if part.static and length > 1:
            share = 100 * part.static / total
            above = share < 30  # a low bar has no room for its number
            place = share + 3 if above else share / 2
            bottom.text(
                middle,
                place,
                f"{share:.0f} %",
                ha="center",
                va="bottom" if above else "center",
                color="black" if above else "white",
                fontsize=9,
            )
        if part.first:
            for axes in (top, bottom):
                axes.axvline(part.first, color="white", linewidth=5, clip_on=False)
                line = axes.axvline(part.first, color="black", linewidth=1.8, clip_on=False)
                line.set_gid("boundary")
    bottom.set(ylim=(0, 100), yticks=[0, 50, 100], ylabel="% of tokens")
    bottom.set_xlabel("frame" if step == 1 else f"frame (one of {step} is shown)")
    ticks = [part.first for part in parts]
    bottom.set_xticks([tick + 0.5 for tick in ticks], [str(tick) for tick in ticks])
    bottom.tick_params(axis="x", length=0)
    _bare(bottom)
    names = (("same as in other frames: merged over time", BLUE), ("kept by itself", ORANGE), ("dropped", GREY))
    _legend(figure, [(name, {"facecolor": colour}) for name, colour in names])
    removed = 100 * record.temporal / record.total
    figure.suptitle(
        title
        or f"{record.frames} frames in {len(parts)} segments: merging what repeats removes {record.temporal} of "
        f"{record.total} tokens ({removed:.0f} %) before any are chosen",
        fontsize=12,
    )
    return figure


def kept_tokens(
    frames: np.ndarray,
    videos: VideoReport | Mapping[str, VideoReport],
    which: Sequence[int],
    *,
    title: str = "Kept tokens are clear, dropped ones dark; tokens merged into one share its colour",
) -> Figure:
    """Some frames with their tokens: kept ones clear, merged ones in the colour of the token that they went to.

    Args:
        frames: uint8 [F, H, W, 3], as for `frame_strip`.
        videos: of `last_report(model).videos`; several, by name, are drawn one below the other.
        which: the frames to show (temporal steps of the record).
        title: of the picture.

    Raises:
        ValueError: a frame that is not there, frames of another shape, or no frame.
    """
    named = {"": videos} if isinstance(videos, VideoReport) else dict(videos)
    if not named or not which:
        raise ValueError(f"nothing to show: {len(named)} videos, frames {list(which)}")
    for video in named.values():
        for frame in which:
            if not 0 <= frame < video.record.frames:
                raise ValueError(f"which: frame {frame}; valid: 0 to {video.record.frames - 1}")
    side = max(1.5, min(2.4, 12.0 / len(which)))
    aspect = frames.shape[1] / frames.shape[2] if frames.ndim == 4 else 1.0
    figure = _figure(max(7.0, side * len(which) + 0.5), side * aspect * (len(named) + 1) + 0.9)
    grid = figure.subplots(len(named) + 1, len(which), squeeze=False)
    for axes in grid.flat:
        axes.set(xticks=[], yticks=[])
        for spine in axes.spines.values():
            spine.set_visible(False)
    first = next(iter(named.values()))
    for axes, frame in zip(grid[0], which, strict=True):
        axes.imshow(_frames_of(frames, first.record)[frame], interpolation="nearest")
        axes.set_title(f"frame {frame}", fontsize=10)
    for row, (name, video) in zip(grid[1:], named.items(), strict=True):
        colours = _cluster_colours(video.record, which)
        for axes, frame in zip(row, which, strict=True):
            axes.imshow(_frames_of(frames, video.record)[frame], interpolation="nearest")
            _draw_cells(axes, video, frame, frames.shape[1:3], colours)
        if name:
            row[0].set_ylabel(name, fontsize=10)
    if named.keys() != {""}:
        grid[0][0].set_ylabel("all tokens", fontsize=10)
    _legend(
        figure,
        [
            ("kept (white border)", {"facecolor": "#888888", "edgecolor": "white"}),
            ("kept, holds others (border of their colour)", {"facecolor": "#888888", "edgecolor": ORANGE}),
            ("merged into it", {"facecolor": ORANGE, "alpha": 0.6}),
            ("dropped", {"facecolor": "black", "alpha": 0.75}),
        ],
    )
    figure.suptitle(title, fontsize=12)
    return figure


def accuracy_against_tokens(
    series: Mapping[str, Sequence[Point]], *, full: Point | None = None, chance: float | None = None, title: str = ""
) -> Figure:
    """Accuracy with 95 % intervals against the video tokens that enter the LLM.

    Args:
        series: name -> points, for instance of several methods; drawn from few tokens to many.
        full: the unpatched model, drawn as a line with its interval.
        chance: accuracy of guessing in %, drawn as a line.
        title: what the picture shows.

    Raises:
        ValueError: no point at all.
    """
    counts = sorted({point.tokens for line in series.values() for point in line})
    if not counts:
        raise ValueError("series: no point to draw")
    figure = _figure(7.5, 4.2)
    axes = figure.subplots()
    if full is not None:
        axes.axhspan(full.low, full.high, color=GREY, alpha=0.4, linewidth=0)
        axes.axhline(full.percent, color="black", linewidth=1.2, linestyle="--", gid="full")
        axes.text(1, full.percent, " all tokens", transform=axes.get_yaxis_transform(), va="center")
    if chance is not None:
        axes.axhline(chance, color="black", linewidth=1, linestyle=":")
        axes.text(1, chance, " guessing", transform=axes.get_yaxis_transform(), va="center")
    for number, (name, line) in enumerate(series.items()):
        colour, marker = SERIES[number % len(SERIES)]
        ordered = sorted(line, key=lambda point: point.tokens)
        y = np.array([point.percent for point in ordered])
        errors = [y - [point.low for point in ordered], [point.high for point in ordered] - y]
        x = [point.tokens * 1.03 ** (number - (len(series) - 1) / 2) for point in ordered]  # intervals side by side
        axes.errorbar(x, y, errors, color=colour, marker=marker, capsize=3, linewidth=1.8, label=name)
    axes.set_xscale("log")
    total = None if full is None else full.tokens
    ticks = counts[:1]
    for count in counts:
        if count > 1.15 * ticks[-1]:  # labels need room
            ticks.append(count)
    axes.set_xticks(ticks, [_count_label(count, total) for count in ticks])
    axes.set_xticks([], minor=True)
    axes.set_xlim(counts[0] / 1.3, counts[-1] * 1.3)
    axes.set(xlabel="video tokens that enter the LLM", ylabel="questions answered right (%)")
    axes.grid(axis="y", color="#E6E6E6")
    axes.set_axisbelow(True)
    _bare(axes)
    if len(series) > 1 or next(iter(series)):
        figure.legend(loc="outside lower center", ncols=3, frameon=False)
    axes.set_title(title, fontsize=12, loc="left")
    return figure


def stage_times(cases: Mapping[str, Mapping[str, Any]], *, title: str = "Milliseconds to the first token") -> Figure:
    """Median milliseconds by stage as bars, one for each case of `holimerge.eval.measure.measure_cases`.

    Raises:
        ValueError: no case.
    """
    if not cases:
        raise ValueError("cases: none to draw")
    figure = _figure(8.5, 0.5 * len(cases) + 1.7)
    axes = figure.subplots()
    for row, measured in enumerate(cases.values()):
        ms = {stage: spread["median"] for stage, spread in measured["ms"]["stages"].items()}
        ms["other"] = measured["ms"]["other"]["median"]
        left = 0.0
        for stage, colour in STAGES.items():  # `inner` is a part of prefill
            width = max(0.0, ms.get(stage, 0.0))
            bar = axes.barh(row, width, 0.62, left=left, color=colour)
            bar.patches[0].set_gid(f"{stage} {row}")
            left += width
        axes.text(left, row, f" {measured['ms']['ttft']['median']:.0f} ms", va="center", fontsize=10)
    axes.set_yticks(range(len(cases)), list(cases))
    axes.invert_yaxis()
    axes.set_xlim(0, axes.get_xlim()[1] * 1.08)
    axes.set_xlabel("ms")
    _bare(axes)
    _legend(figure, [(stage, {"facecolor": colour}) for stage, colour in STAGES.items()])
    axes.set_title(title, fontsize=12, loc="left")
    return figure


def _figure(width: float, height: float) -> Figure:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), dpi=90, layout="constrained")


def _bare(axes: Any) -> None:
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def _legend(figure: Figure, entries: Sequence[tuple[str, dict[str, Any]]]) -> None:
    from matplotlib.patches import Patch

    handles = [Patch(label=name, **{"edgecolor": "none", "linewidth": 2, **look}) for name, look in entries]
    look: dict[str, Any] = {"frameon": False, "fontsize": 9, "handleheight": 1.2, "handlelength": 1.8}
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), **look)


def _count_label(count: float, total: float | None) -> str:
    return f"{count:.0f}" if not total else f"{count:.0f}\n{100 * count / total:.0f} %"


def _frames_of(frames: np.ndarray, record: MergeRecord) -> np.ndarray:
    """One frame for every temporal step of the record."""
    if frames.ndim != 4 or frames.shape[-1] != 3 or frames.dtype != np.uint8:
        raise ValueError(f"frames: uint8 [F, H, W, 3] are needed, got {frames.dtype} {list(frames.shape)}")
    each = math.ceil(frames.shape[0] / record.frames)  # a model that takes two frames a step pads an odd one
    if math.ceil(frames.shape[0] / max(each, 1)) != record.frames:
        raise ValueError(f"frames: {frames.shape[0]} of them; the record has {record.frames} steps")
    return frames[::each]


def _cluster_colours(record: MergeRecord, which: Sequence[int]) -> dict[int, str]:
    """Kept token -> colour, of those that hold several tokens, in the order in which the shown frames meet them."""
    owner = record.assignment.view(record.frames, record.per_frame)[list(which)].flatten().tolist()
    sizes = record.sizes.tolist()
    met = dict.fromkeys(k for k in owner if k >= 0 and sizes[k] > 1)
    return {k: CLUSTERS[number % len(CLUSTERS)] for number, k in enumerate(met)}


def _draw_cells(axes: Any, video: VideoReport, frame: int, size: tuple[int, ...], colours: Mapping[int, str]) -> None:
    """Cover the cells of one frame; every rectangle's gid is kept, merged or dropped."""
    from matplotlib.patches import Rectangle

    record, (rows, columns) = video.record, video.grid
    high, wide = size[0] / rows, size[1] / columns
    owner = record.assignment.view(record.frames, record.per_frame)[frame].tolist()
    anchor = record.anchor.tolist()
    for cell, kept in enumerate(owner):
        x, y = cell % columns * wide - 0.5, cell // columns * high - 0.5
        if kept < 0:
            look: dict[str, Any] = {"gid": "dropped", "facecolor": "black", "alpha": 0.75, "linewidth": 0}
        elif anchor[kept] != frame * record.per_frame + cell:
            look = {"gid": "merged", "facecolor": colours[kept], "alpha": 0.6, "linewidth": 0}
        else:
            look = {"gid": "kept", "facecolor": "none", "edgecolor": colours.get(kept, "white"), "linewidth": 2.2}
        inset = 1.0 * min(high, wide) / 16 if look["gid"] == "kept" else 0.0
        axes.add_patch(Rectangle((x + inset, y + inset), wide - 2 * inset, high - 2 * inset, **look))
