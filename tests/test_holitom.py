"""The fast reduction against the slow oracle, and the laws every record obeys."""

from __future__ import annotations

import numpy as np
import oracle
import pytest
import torch

import holimerge.tokens as tokens_module
from holimerge.cluster import density_peaks, pairwise_distances
from holimerge.methods.holitom import HolitomOptions, _reduced, reduce
from holimerge.segment import optimal_segments, pair_cosines, run_lengths, window_counts
from holimerge.tokens import Target, VideoTokens, sum_of_rows

KINDS = ["mixed", "different", "static", "ties", "still_scenes"]


def make_video(rng, kind, frames, per_frame, width):
    """[T, N, D] float64 features and [T, N] scores of a video of one kind of redundancy."""
    if kind == "different":
        x = rng.normal(size=(frames, per_frame, width))
    elif kind == "static":
        x = np.repeat(rng.normal(size=(1, per_frame, width)), frames, axis=0)
    elif kind == "ties":  # few distinct vectors and scores, exactly representable: every decision has ties
        x = rng.integers(-1, 2, size=(frames, per_frame, width)).astype(float)
        x = np.where(rng.random((frames, per_frame, 1)) < 0.6, x[:1], x)
    elif kind == "still_scenes":
        scenes = rng.normal(size=(max(1, frames // 4), per_frame, width))
        x = scenes[np.sort(rng.integers(0, len(scenes), frames))] + 0.05 * rng.normal(size=(frames, per_frame, width))
    else:
        x = np.cumsum(rng.normal(size=(frames, per_frame, width)) * rng.random((frames, per_frame, 1)) ** 3, axis=0)
    scores = (
        rng.integers(0, 3, size=(frames, per_frame)).astype(float)
        if kind == "ties"
        else rng.random((frames, per_frame))
    )
    return x, scores


def check_agreement(x, scores, *, retain, exact, options):
    frames, per_frame, _ = x.shape
    total = frames * per_frame
    keep = min(total, max(1, int(np.floor(retain * total + 0.5))))
    expected = oracle.reduce_video(
        x, scores, exact=exact, tau=options.similarity, beta=options.beta,
        neighbours=options.neighbours, max_segment=options.max_segment, order=options.order,
        **({"keep": keep} if exact else {"retain": retain}),
    )  # fmt: skip
    tokens = VideoTokens(torch.from_numpy(x), torch.from_numpy(scores))
    record = reduce(tokens, Target(keep, retain, exact), options)
    owner, weight = expected.assignment()
    assert [tuple(s) for s in record.segments] == [tuple(s) for s in expected.segments]
    assert record.temporal == expected.removed
    assert record.anchor.tolist() == [k.anchor for k in expected.kept]
    np.testing.assert_array_equal(record.assignment.numpy(), owner)
    np.testing.assert_allclose(record.weight.numpy(), weight, rtol=1e-12)
    np.testing.assert_allclose(
        record.merge(torch.from_numpy(x).flatten(0, 1)).numpy(), expected.merge(x.reshape(total, -1)), atol=1e-12
    )
    if exact:
        assert record.kept == keep
    check_record_laws(record)


def check_record_laws(record):
    held = record.assignment >= 0
    assert int(held.sum()) == record.members
    sums = torch.zeros(record.kept, dtype=record.weight.dtype).index_add_(
        0, record.assignment[held], record.weight[held]
    )
    torch.testing.assert_close(sums, torch.ones_like(sums))
    assert (record.weight[~held] == 0).all()
    assert record.anchor.unique().numel() == record.kept
    # an anchor is held by the token it stands for
    assert torch.equal(record.assignment[record.anchor], torch.arange(record.kept))
    assert sum(record.kept_per_frame()) == record.kept
    assert int(record.sizes.sum()) == record.members
    assert record.segments[0][0] == 0
    assert record.segments[-1][1] == record.frames - 1


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("seed", range(40))
def test_agrees_with_the_oracle(kind, exact, seed):
    rng = np.random.default_rng([seed, KINDS.index(kind), exact])
    frames, per_frame, width = rng.integers(1, 11), rng.integers(1, 17), rng.integers(1, 9)
    x, scores = make_video(rng, kind, frames, per_frame, width)
    options = HolitomOptions(
        similarity=float(rng.choice([0.0, 0.65, 0.8, 0.95])),
        beta=[0.6, None, 1.0, 0.0][rng.integers(4)],
        neighbours=int(rng.integers(1, 9)),
        max_segment=[None, None, 1, 2, 5][rng.integers(5)],
        order=["raster", "segment"][rng.integers(2)],
    )
    check_agreement(x, scores, retain=float(rng.choice([0.01, 0.1, 0.25, 0.5, 0.9, 1.0])), exact=exact, options=options)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 12, 4), (7, 1, 4), (2, 2, 1)])
def test_every_exact_count_is_met(kind, shape):
    frames, per_frame, width = shape
    x, scores = make_video(np.random.default_rng(7), kind, frames, per_frame, width)
    for keep in range(1, frames * per_frame + 1):
        check_agreement(x, scores, retain=keep / (frames * per_frame), exact=True, options=HolitomOptions())


def test_exact_counts_on_either_side_of_temporal_merging():
    x, scores = make_video(np.random.default_rng(3), "still_scenes", 6, 8, 5)
    for keep in range(1, 49):
        check_agreement(x, scores, retain=keep / 48, exact=True, options=HolitomOptions(similarity=0.9, beta=0.6))


@pytest.mark.parametrize("seed", range(60))
def test_segmentation_is_the_global_optimum(seed):
    rng = np.random.default_rng(seed)
    frames, positions = int(rng.integers(1, 10)), int(rng.integers(1, 7))
    flags = rng.random((frames - 1, positions)) < rng.choice([0.3, 0.6, 0.9])
    counts = window_counts(run_lengths(torch.from_numpy(flags)).numpy())
    segments, removed = optimal_segments(counts)
    assert removed == oracle.segment_brute_force(flags)
    worth = sum(int(flags[s:e].all(0).sum()) * (e - s) for s, e in segments)
    assert worth == removed


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_lower_precision_gives_finite_whole_records(dtype):
    rng = np.random.default_rng(0)
    x, scores = make_video(rng, "still_scenes", 9, 25, 16)
    for exact in (True, False):
        record = reduce(
            VideoTokens(torch.from_numpy(x).to(dtype), torch.from_numpy(scores).float()),
            Target(40, 40 / 225, exact),
            HolitomOptions(),
        )
        check_record_laws(record)
        merged = record.merge(torch.from_numpy(x).to(dtype).flatten(0, 1))
        assert merged.dtype == dtype
        assert torch.isfinite(merged).all()


def test_the_same_input_gives_the_same_record_and_leaves_the_random_state_alone():
    x, scores = make_video(np.random.default_rng(5), "ties", 8, 12, 3)
    tokens, state = VideoTokens(torch.from_numpy(x), torch.from_numpy(scores)), torch.get_rng_state()
    first, second = (reduce(tokens, Target(20, 20 / 96), HolitomOptions(similarity=0.5)) for _ in range(2))
    assert torch.equal(first.assignment, second.assignment)
    assert torch.equal(first.weight, second.weight)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", ["features", "scores"])
def test_values_that_are_not_finite_raise(bad, where):
    x, scores = make_video(np.random.default_rng(5), "mixed", 4, 6, 3)
    (x[2, 3] if where == "features" else scores[2])[1] = bad
    with pytest.raises(ValueError, match="not finite"):
        reduce(VideoTokens(torch.from_numpy(x), torch.from_numpy(scores)), Target(5, 5 / 24), HolitomOptions())


def test_cosines_of_zero_vectors_are_zero_and_long_videos_are_chunked():
    x = torch.randn(21, 4, 3)
    x[10] = 0
    cosine, norm = pair_cosines(x)
    expected = torch.nn.functional.cosine_similarity(x[:-1], x[1:], dim=-1)
    torch.testing.assert_close(cosine, expected)
    assert (cosine[9:11] == 0).all()
    torch.testing.assert_close(norm, x.norm(dim=-1))


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("keep", [1, 40, 200])
@pytest.mark.parametrize("order", ["raster", "segment"])
def test_the_device_is_asked_once(keep, exact, order):
    # A meta tensor has no values: whatever would wait for them raises. What the host knows comes first, as in `reduce`.
    rng = np.random.default_rng(3)
    x, scores = (torch.from_numpy(v).float() for v in make_video(rng, "still_scenes", 12, 20, 6))
    options = HolitomOptions(similarity=0.9, order=order)
    target = Target(keep, keep / 240, exact)
    record = reduce(VideoTokens(x, scores), target, options)
    assert record.temporal > 40  # so that 200 tokens are more than temporal merging leaves: some are released
    assert bool(record.clustered) == (keep < 200)
    runs = run_lengths(pair_cosines(x)[0] > options.similarity).numpy()
    order = scores.argsort(dim=1, descending=True, stable=True).numpy()
    blind = _reduced(x.bfloat16().to("meta"), runs, order, target, options, torch.float32)
    merged = blind.merge(torch.empty(240, 9, dtype=torch.bfloat16, device="meta"))
    assert (blind.kept, blind.members, merged.shape) == (record.kept, record.members, (record.kept, 9))
    assert blind.slots.shape == blind.anchor.shape


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sums_of_lower_precision_are_formed_in_float32_in_pieces_of_any_size(monkeypatch, dtype):
    x, rows = torch.randn(50, 200).to(dtype), torch.randint(0, 50, (90,))
    starts, weights = torch.tensor([0, 3, 3, 40]), torch.rand(90)
    groups = [rows[a:b] for a, b in [(0, 3), (3, 3), (3, 40), (40, 90)]]
    parts = [weights[a:b] for a, b in [(0, 3), (3, 3), (3, 40), (40, 90)]]
    expected = torch.stack([(x[g].double() * w[:, None]).sum(0) for g, w in zip(groups, parts, strict=True)])
    for limit in (2**28, 1):
        monkeypatch.setattr(tokens_module, "_COPY_BYTES", limit)
        found = sum_of_rows(x, rows, starts, weights=weights)
        assert found.dtype == torch.float32
        torch.testing.assert_close(found.double(), expected, atol=1e-5, rtol=1e-5)


def test_equal_distances_of_tokens_tie_and_the_lower_index_is_the_centre():
    # from a drawn video: the mean of these three is no binary fraction, so distances from it would be rounded apart
    points = [[1, 1, 1, 0, 1, 1], [0, 1, 0, -1, 1, 1], [1, 0, 1, 1, 0, 1]]
    for dtype in (torch.float32, torch.float64):
        x, valid = torch.tensor([points], dtype=dtype), torch.ones(1, 3, dtype=torch.bool)
        gap = pairwise_distances(x.clone(), valid)[0]
        assert gap[0, 1] == gap[0, 2] == 0.5
        assert density_peaks(x, valid, torch.tensor([2]), 7, 2).tolist() == [[0, 1, 0]]
