"""Pictures show what the record says."""

from __future__ import annotations

import dataclasses
from collections import Counter

import numpy as np
import pytest
import torch

pytest.importorskip("matplotlib")

from holimerge.eval.pictures import (
    Point,
    accuracy_against_tokens,
    frame_strip,
    kept_tokens,
    points,
    segment_parts,
    stage_times,
    static_tokens,
)
from holimerge.methods.holitom import HolitomOptions, reduce
from holimerge.placement import Placement
from holimerge.report import VideoReport
from holimerge.tokens import MergeRecord, Target, VideoTokens, keep_everything

ROWS, COLUMNS = 3, 4
CELLS = ROWS * COLUMNS


def video_of(retain: float, seed: int = 0, exact: bool = True) -> VideoReport:
    """Two scenes, of 5 and 3 frames; in each 8 positions stay and 4 change in every frame."""
    noise = torch.Generator().manual_seed(seed)
    scenes = []
    for frames in (5, 3):
        x = torch.randn(1, CELLS, 32, generator=noise).repeat(frames, 1, 1)
        x += 0.1 * torch.randn(x.shape, generator=noise)  # so that any frame's token may be the odd one
        x[:, 8:] = torch.randn(frames, 4, 32, generator=noise)
        scenes.append(x)
    tokens = VideoTokens(torch.cat(scenes), torch.rand(8, CELLS, generator=noise))
    record = reduce(tokens, Target(round(retain * 8 * CELLS), retain, exact), HolitomOptions())
    return VideoReport(Placement(record), (ROWS, COLUMNS))


def frames_of(count: int = 8) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, 30, 40, 3), dtype=np.uint8)


def bars(figure, gid):
    return [p for axes in figure.axes for p in axes.patches if p.get_gid() == gid]


def cells(axes):
    return Counter(p.get_gid() for p in axes.patches)


def test_static_tokens_are_those_that_stay():
    static = static_tokens(video_of(0.25).record)
    assert static[:, :8].all()
    assert not static[:, 8:].any()


@pytest.mark.parametrize("retain", [0.1, 0.55, 0.7, 0.9])
def test_static_tokens_token_by_token(retain):
    """From 0.55 on temporal merging is undone for some members of a group."""
    record = video_of(retain).record
    owner, static = record.assignment.view(8, CELLS).tolist(), static_tokens(record)
    for first, last in record.segments:
        for t in range(first, last + 1):
            for n in range(CELLS):
                others = [owner[u][n] for u in range(first, last + 1) if u != t]
                assert static[t, n] == (owner[t][n] >= 0 and owner[t][n] in others)
    assert retain < 0.55 or 0 < static[:, :8].sum() < 64


@pytest.mark.parametrize("retain", [0.1, 0.25, 0.5])
@pytest.mark.parametrize("exact", [True, False])
def test_parts_add_up_to_the_record(retain, exact):
    record = video_of(retain, exact=exact).record
    parts = segment_parts(record)
    assert [(p.first, p.last) for p in parts] == list(record.segments) == [(0, 4), (5, 7)]
    for part in parts:
        assert part.static + part.kept + part.dropped == (part.last - part.first + 1) * CELLS
    assert sum(p.dropped for p in parts) == int((record.assignment < 0).sum())
    # each static position removes one token fewer than the segment has frames
    assert sum(p.static - p.static // (p.last - p.first + 1) for p in parts) == record.temporal == 8 * 4 + 8 * 2


def test_tokens_released_for_a_large_budget_are_static_no_more():
    loose, tight = (sum(p.static for p in segment_parts(video_of(share).record)) for share in (0.9, 0.5))
    assert loose < tight == 8 * 8
    assert sum(p.static for p in segment_parts(video_of(1.0).record)) == 0


def test_parts_of_a_record_without_segments():
    assert segment_parts(keep_everything(3, 5)) == [(0, 2, 0, 15, 0)]


@pytest.mark.parametrize("retain", [0.1, 0.5])
def test_the_strip_has_its_boundaries_and_shares(retain):
    video = video_of(retain)
    figure = frame_strip(frames_of(), video)
    strip, shares = figure.axes
    assert len(strip.images) == 8
    for axes in (strip, shares):
        assert [line.get_xdata()[0] for line in axes.lines if line.get_gid() == "boundary"] == [5]
    for number, part in enumerate(segment_parts(video.record)):
        total = (part.last - part.first + 1) * CELLS
        for kind in ("static", "kept", "dropped"):
            (bar,) = bars(figure, f"{kind} {number}")
            assert bar.get_height() == pytest.approx(100 * getattr(part, kind) / total)
            assert part.first < bar.get_x() < bar.get_x() + bar.get_width() < part.last + 1
    assert [text.get_text() for text in shares.texts] == ["67 %", "67 %"]
    assert "48 of 96 tokens (50 %)" in figure.get_suptitle()


def test_frames_stand_at_their_place_also_when_a_strip_skips_some():
    """100 frames, of which every seventh is drawn, anew from each segment's first; the last of a segment is cut off."""
    record = dataclasses.replace(keep_everything(100, 4), segments=((0, 31), (32, 99)))
    frames = np.arange(100, dtype=np.uint8)[:, None, None, None].repeat(4, 1).repeat(14, 2).repeat(3, 3)
    strip = frame_strip(frames, VideoReport(Placement(record), (2, 2))).axes[0]
    assert [int(im.get_array()[0, 0, 0]) for im in strip.images] == [*range(0, 32, 7), *range(32, 100, 7)]
    for im in strip.images:
        start, end, *_ = im.get_extent()
        assert int(im.get_array()[0, 0, 0]) == start
        assert im.get_array().shape[1] == 2 * (end - start)
    assert [im.get_extent()[1] for im in strip.images if im.get_array().shape[1] < 14] == [32, 100]


@pytest.mark.parametrize(("count", "shown"), [(8, [0, 7]), (16, [0, 14]), (15, [0, 14])])
def test_a_step_of_two_frames_shows_its_first(count, shown):
    frames = np.arange(count, dtype=np.uint8)[:, None, None, None].repeat(30, 1).repeat(40, 2).repeat(3, 3)
    top = kept_tokens(frames, video_of(0.25), [0, 7]).axes[:2]
    assert [int(axes.images[0].get_array()[0, 0, 0]) for axes in top] == shown


@pytest.mark.parametrize("retain", [0.1, 0.25, 0.6, 1.0])
def test_every_cell_shows_what_became_of_it(retain):
    video = video_of(retain)
    record = video.record
    figure = kept_tokens(frames_of(), video, range(8))
    held = (record.assignment >= 0).view(8, CELLS).sum(1).tolist()
    for frame, axes in enumerate(figure.axes[8:]):
        found = cells(axes)
        assert found["kept"] == record.kept_per_frame()[frame]
        assert found["dropped"] == CELLS - held[frame]
        assert found["merged"] == held[frame] - found["kept"]
    assert not any(axes.patches for axes in figure.axes[:8])


def test_a_cell_lies_where_its_token_was():
    """One token kept, in row 1 and column 2 of frame 1; the one right of it merged into it; the rest dropped."""
    assignment = torch.full((2 * CELLS,), -1)
    anchor = CELLS + 1 * COLUMNS + 2
    assignment[[anchor, anchor + 1]] = 0
    weight = torch.zeros(2 * CELLS)
    weight[[anchor, anchor + 1]] = 0.5
    record = MergeRecord(2, CELLS, assignment, weight, torch.tensor([anchor]), 2)
    axes = kept_tokens(frames_of(2), VideoReport(Placement(record), (ROWS, COLUMNS)), [0, 1]).axes
    assert cells(axes[2]) == {"dropped": CELLS}
    (kept,), (merged,) = ([p for p in axes[3].patches if p.get_gid() == gid] for gid in ("kept", "merged"))
    # a frame of 30 x 40 pixels, cells of 10 x 10; pixel centres are whole numbers
    assert np.allclose(merged.get_bbox().extents, [29.5, 9.5, 39.5, 19.5])
    assert np.allclose(kept.get_bbox().extents, [19.5, 9.5, 29.5, 19.5], atol=1)
    assert kept.get_edgecolor()[:3] == merged.get_facecolor()[:3]


def test_merged_cells_have_the_colour_of_their_anchor():
    record = video_of(0.25).record
    figure = kept_tokens(frames_of(), VideoReport(Placement(record), (ROWS, COLUMNS)), range(5))
    owner = record.assignment.view(8, CELLS)
    colours: dict[int, set[tuple[float, ...]]] = {}
    for frame, axes in enumerate(figure.axes[5:]):
        for cell, patch in enumerate(axes.patches):
            if owner[frame, cell] >= 0 and record.sizes[owner[frame, cell]] > 1:
                colour = patch.get_edgecolor() if patch.get_gid() == "kept" else patch.get_facecolor()
                colours.setdefault(int(owner[frame, cell]), set()).add(colour[:3])
    assert len(colours) >= 2
    assert all(len(found) == 1 for found in colours.values())
    assert len(set().union(*colours.values())) == min(7, len(colours))


def test_several_records_one_below_the_other():
    videos = {"much": video_of(0.6), "little": video_of(0.1)}
    axes = kept_tokens(frames_of(), videos, [0, 6]).axes
    assert [a.get_ylabel() for a in axes[::2]] == ["all tokens", "much", "little"]
    for row, video in zip((axes[2:4], axes[4:6]), videos.values(), strict=True):
        assert [cells(a)["kept"] for a in row] == [video.kept_per_frame[frame] for frame in (0, 6)]


CONFIGS = {
    name: {"accuracy": {"percent": p, "low": p - 4, "high": p + 2}, "tokens": {"entering": {"median": n}}}
    for name, n, p in (("unpatched", 864, 90.0), ("a-25", 216, 89.0), ("a-10", 86, 80.0), ("b-10", 80, 75.0))
}
CONFIGS["empty"] = {"accuracy": {"percent": None}, "tokens": {}}
RESULTS = {"tasks": {"synthetic": {"configs": CONFIGS}}}


def test_points_are_what_the_results_say():
    assert points(RESULTS)[:2] == [Point("b-10", 80, 75.0, 71.0, 77.0), Point("a-10", 86, 80.0, 76.0, 82.0)]
    assert [p.name for p in points(RESULTS)] == ["b-10", "a-10", "a-25", "unpatched"]
    with pytest.raises(ValueError, match="'videomme' is not in these results; valid: synthetic"):
        points(RESULTS, "videomme")


def test_accuracy_stands_at_its_tokens_with_its_interval():
    *found, full = points(RESULTS)
    series = {"a": [p for p in found if p.name[0] == "a"][::-1], "b": found[:1]}
    axes = accuracy_against_tokens(series, full=full, chance=25).axes[0]
    for line, wanted in zip(axes.containers, ([found[1], found[2]], [found[0]]), strict=True):
        data, _, (errors,) = line.lines
        assert list(data.get_ydata()) == [p.percent for p in wanted]
        assert data.get_xdata() == pytest.approx([p.tokens for p in wanted], rel=0.02)
        spans = [segment[:, 1].tolist() for segment in errors.get_segments()]
        assert spans == [[p.low, p.high] for p in wanted]
    (line,) = [line for line in axes.lines if line.get_gid() == "full"]
    assert list(line.get_ydata()) == [90.0, 90.0]
    assert axes.get_xscale() == "log"
    assert [t.get_text() for t in axes.get_xticklabels()] == ["80\n9 %", "216\n25 %"]  # 86 has no room
    assert [t.get_text() for t in axes.figure.legends[0].get_texts()] == ["a", "b"]


def test_bars_are_as_long_as_the_stages():
    cases = {
        name: {
            "ms": {
                "ttft": {"median": 20 * k},
                "stages": {s: {"median": k * ms} for s, ms in (("vision", 5), ("prefill", 12), ("inner", 2))},
                "other": {"median": 3 * k},
            }
        }
        for name, k in (("one", 1.0), ("two", 2.0))
    }
    figure = stage_times(cases)
    for row, k in enumerate((1, 2)):
        found = {s: bars(figure, f"{s} {row}")[0] for s in ("vision", "reduce", "prefill", "other")}
        assert [found[s].get_width() for s in ("vision", "reduce", "prefill", "other")] == [5 * k, 0, 12 * k, 3 * k]
        assert found["other"].get_x() + found["other"].get_width() == 20 * k
        assert not bars(figure, f"inner {row}")  # it is a part of prefill
    assert [t.get_text() for t in figure.axes[0].get_yticklabels()] == ["one", "two"]


def test_what_cannot_be_drawn():
    video, frames = video_of(0.25), frames_of()
    with pytest.raises(ValueError, match=r"which: frame 8; valid: 0 to 7"):
        kept_tokens(frames, video, [8])
    with pytest.raises(ValueError, match="nothing to show"):
        kept_tokens(frames, video, [])
    with pytest.raises(ValueError, match="nothing to show"):
        kept_tokens(frames, {}, [0])
    for draw in (lambda f: frame_strip(f, video), lambda f: kept_tokens(f, video, [0])):
        with pytest.raises(ValueError, match="frames: 7 of them; the record has 8 steps"):
            draw(frames[:7])
        with pytest.raises(ValueError, match="frames: 0 of them"):
            draw(frames[:0])
        with pytest.raises(ValueError, match=r"uint8 \[F, H, W, 3\] are needed, got float64"):
            draw(frames / 255)
        with pytest.raises(ValueError, match=r"got uint8 \[8, 30, 40\]"):
            draw(frames[..., 0])
    with pytest.raises(ValueError, match="series: no point"):
        accuracy_against_tokens({"a": []})
    with pytest.raises(ValueError, match="cases: none"):
        stage_times({})


def test_pictures_can_be_saved_and_leave_no_state(tmp_path):
    import sys

    *found, full = points(RESULTS)
    pictures = [
        frame_strip(frames_of(), video_of(0.1)),
        kept_tokens(frames_of(), video_of(0.1), [0, 1]),
        accuracy_against_tokens({"": found}, full=full),
    ]
    for number, figure in enumerate(pictures):
        figure.savefig(tmp_path / f"{number}.png")
        assert (tmp_path / f"{number}.png").stat().st_size > 5000
    assert "matplotlib.pyplot" not in sys.modules
