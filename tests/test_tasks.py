"""The benchmarks read the layouts people have on disk, name what is missing, and never leave the data folder."""

from __future__ import annotations

import json
import math
import shutil
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import benchmark_fixtures as make
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from holimerge.eval.tasks import get_task, list_tasks
from holimerge.eval.tasks._data import clean, without_letters
from holimerge.eval.tasks._paths import find_file, inside
from holimerge.eval.tasks.base import Loaded, Task
from holimerge.video import SAMPLINGS, read_video

pytest.importorskip("pyarrow", reason="fixtures are written with pyarrow")
pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="layouts with links")
REAL = ["egoschema_subset", "longvideobench", "mlvu_dev", "mvbench", "videomme", "videomme_w_subtitle"]


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty $HF_HOME, and no network."""

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a task reached for the network")

    for name in ("HF_HUB_CACHE", "XDG_CACHE_HOME", "HF_DATASETS_CACHE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    return tmp_path / "hf"


# One entry a layout: task, and what makes it below (a folder, $HF_HOME) and returns the root to give, or None.
Maker = Callable[[Path, Path], Path | None]


def hub(maker: Callable[..., Path], repo: str, revision: str = "main", **arguments: Any) -> Maker:
    def build(work: Path, home: Path) -> None:
        make.as_hub(home, repo, maker(work / "files", **arguments), revision)

    return build


def videomme_lmms(work: Path, home: Path) -> None:
    make.as_hub(home, "lmms-eval/Video-MME", make.videomme(work / "files"))
    place = home / "hub/datasets--lmms-eval--Video-MME/snapshots" / make.COMMIT
    for name in ("data", "subtitle"):
        shutil.copytree(place / name, home / "videomme" / name)
        shutil.rmtree(place / name)


def egoschema_lmms(work: Path, home: Path) -> None:
    make.as_hub(home, "lmms-lab/egoschema", make.egoschema(work / "files", media=home / "egoschema"))


def longvideobench_lmms(work: Path, home: Path) -> None:
    media = home / "datasets/longvideobench"
    make.as_hub(home, "longvideobench/LongVideoBench", make.longvideobench(work / "files", media=media))


def mlvu_lmms(work: Path, home: Path) -> None:
    make.mlvu_parquet(work / "files")
    shutil.move(work / "files" / "data", work / "annotations" / "data")
    make.as_hub(home, "sy1998/MLVU_dev", work / "annotations")
    home.mkdir(exist_ok=True)
    shutil.move(work / "files", home / "mlvu")


def mvbench_lmms(work: Path, home: Path) -> None:
    """json/ on main; videos on the branch `video`, which lmms-eval links to its folder in $HF_HOME."""
    make.mvbench(work / "files")
    shutil.move(work / "files" / "json", work / "annotations" / "json")
    make.as_hub(home, "OpenGVLab/MVBench", work / "annotations")
    snapshot = make.as_hub(home, "OpenGVLab/MVBench", work / "files", "video", commit="f" * 40)
    (snapshot.parents[1] / "refs" / "video").unlink()
    (home / "mvbench_video").symlink_to(snapshot)


def media_only(work: Path, home: Path) -> Path:
    videomme_lmms(work, home)
    return home / "videomme"


LAYOUTS: dict[str, tuple[str, Maker]] = {
    "videomme folder": ("videomme", lambda w, h: make.videomme(w / "d")),
    "videomme VLMEvalKit": ("videomme", lambda w, h: make.videomme(w / "d", "video")),
    "videomme hub": ("videomme", hub(make.videomme, "lmms-lab/Video-MME")),
    "videomme lmms-eval": ("videomme", videomme_lmms),
    "videomme lmms-eval's folder": ("videomme", media_only),
    "videomme_w_subtitle folder": ("videomme_w_subtitle", lambda w, h: make.videomme(w / "d")),
    "videomme_w_subtitle lmms-eval": ("videomme_w_subtitle", videomme_lmms),
    "mlvu_dev folder": ("mlvu_dev", lambda w, h: make.mlvu_json(w / "d")),
    "mlvu_dev below MLVU": ("mlvu_dev", lambda w, h: make.mlvu_json(w / "d" / "MLVU").parent),
    "mlvu_dev GitHub": ("mlvu_dev", lambda w, h: make.mlvu_json(w / "d", "data")),
    "mlvu_dev hub": ("mlvu_dev", hub(lambda f: make.mlvu_json(f / "MLVU").parent, "MLVU/MVLU")),
    "mlvu_dev parquet": ("mlvu_dev", lambda w, h: make.mlvu_parquet(w / "d")),
    "mlvu_dev parquet hub": ("mlvu_dev", hub(make.mlvu_parquet, "sy1998/MLVU_dev")),
    "mlvu_dev lmms-eval": ("mlvu_dev", mlvu_lmms),
    "mvbench folder": ("mvbench", lambda w, h: make.mvbench(w / "d")),
    "mvbench main": ("mvbench", lambda w, h: make.mvbench(w / "d", "whole", "video")),
    "mvbench named segments": ("mvbench", lambda w, h: make.mvbench(w / "d", "named", "data0613")),
    "mvbench hub": ("mvbench", hub(make.mvbench, "OpenGVLab/MVBench", "video")),
    "mvbench lmms-eval": ("mvbench", mvbench_lmms),
    "longvideobench folder": ("longvideobench", lambda w, h: make.longvideobench(w / "d")),
    "longvideobench json": ("longvideobench", lambda w, h: make.longvideobench(w / "d", "json")),
    "longvideobench hub": ("longvideobench", hub(make.longvideobench, "longvideobench/LongVideoBench")),
    "longvideobench lmms-eval": ("longvideobench", longvideobench_lmms),
    "egoschema_subset folder": ("egoschema_subset", lambda w, h: make.egoschema(w / "d")),
    "egoschema_subset hub": ("egoschema_subset", hub(make.egoschema, "lmms-lab/egoschema")),
    "egoschema_subset lmms-eval": ("egoschema_subset", egoschema_lmms),
    "custom folder": ("custom", lambda w, h: make.custom(w / "d")),
    "custom file": ("custom", lambda w, h: make.custom(w / "d") / "mine.jsonl"),
}


def plain_facts(loaded: Loaded) -> list[tuple[Any, ...]]:
    """What must not depend on the layout."""
    return sorted((s.id, s.question, s.options, s.answer, s.category, tuple(s.groups.items())) for s in loaded.samples)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_readable_videos_and_the_same_questions(tmp_path: Path, home: Path, layout: str) -> None:
    name, maker = LAYOUTS[layout]
    task, root = get_task(name), maker(tmp_path, home)
    loaded = task.load(root)
    assert task.prompt is not None
    assert task.extract is not None
    first = next(entry for entry in LAYOUTS.values() if entry[0] == name)[1]
    assert plain_facts(loaded) == plain_facts(task.load(first(tmp_path / "first", home / "none")))
    known = (make.COMMIT,) if root is None or layout.endswith("lmms-eval's folder") else ()
    assert loaded.revision in known or (
        not known and loaded.revision.startswith("sha256:") and len(loaded.revision) == 23
    )
    assert loaded.source
    for sample in loaded.samples:
        assert sample.video is not None
        assert sample.video.exists(), sample.video
        for protocol in task.protocols:
            clip = read_video(
                sample.video,
                frames=4,
                sampling=task.sampling[protocol],
                start=sample.start,
                end=sample.end,
                source_fps=sample.source_fps,
            )
            assert clip.timestamps[0] >= (sample.start or 0)
            prompt = task.prompt(sample, protocol, clip.timestamps.tolist())
            assert sample.question in prompt.user
            assert sample.answer is not None
            letter = "ABCDE"[sample.answer]
            for raw in (letter, f"({letter})", f"{letter}. {sample.options[sample.answer]}"):
                assert task.extract(raw, sample, protocol, 0).choice == sample.answer, (raw, protocol)


def test_discovery() -> None:
    assert set(list_tasks()) >= {*REAL, "custom"}
    assert not any(name.startswith("_") or name == "base" for name in list_tasks())
    with pytest.raises(ValueError, match=r"unknown task 'video_mme'; did you mean 'videomme'.*mvbench"):
        get_task("video_mme")
    for name in (*REAL, "custom"):
        task = get_task(name)
        assert task.protocols == ("official", "lmms_eval_0_3", "lmms_eval_0_7")
        assert set(task.sampling) == set(task.max_new_tokens) == set(task.protocols)
        assert set(task.sampling.values()) <= set(SAMPLINGS)


def test_videos_of_one_question_set_keep_their_groups(tmp_path: Path) -> None:
    samples = get_task("videomme").load(make.videomme(tmp_path)).samples
    assert [s.id for s in samples] == ["000-1", "000-2", "001-1", "001-2", "002-1", "002-2"]  # the data set's order
    assert samples[0].groups == {"duration": "short", "domain": "Knowledge", "sub_category": "Food"}
    assert samples[0].options == ("To cool it.", "To wash it.", "To hide it.", "To fill it.")
    assert len({s.video_id for s in samples}) == 3


# --- what is missing --------------------------------------------------------------------------------------------------

ANNOTATION = {
    "videomme": "videomme/test-00000-of-00001.parquet",
    "videomme_w_subtitle": "videomme/test-00000-of-00001.parquet",
    "mlvu_dev": "json/1_plotQA.json",
    "mvbench": "json/action_sequence.json",
    "longvideobench": "validation-00000-of-00001.parquet",
    "egoschema_subset": "Subset/test-00000-of-00001.parquet",
}
MEDIA = {"mlvu_dev": "video", "mvbench": "vlnqa", "longvideobench": "videos", "egoschema_subset": "videos"}
NAMED_BY = {
    "videomme": "videoID",
    "videomme_w_subtitle": "videoID",
    "mlvu_dev": "video",
    "mvbench": "video",
    "longvideobench": "video_path",
    "egoschema_subset": "video_idx",
}
COLUMNS = [
    *[("videomme", c) for c in ("videoID", "question_id", "duration", "task_type", "question", "options", "answer")],
    *[("mlvu_dev", c) for c in ("video", "question", "candidates", "answer", "question_type")],
    *[("mvbench", c) for c in ("video", "question", "candidates", "answer")],
    *[
        ("longvideobench", c)
        for c in ("id", "video_path", "option2", "correct_choice", "duration_group", "question_category")
    ],
    *[("egoschema_subset", c) for c in ("question_idx", "video_idx", "option", "answer")],
]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The first layout of each task, made once; tests copy it."""
    made = {}
    for name, maker in LAYOUTS.values():
        if name not in made:
            work = tmp_path_factory.mktemp(name)
            made[name] = maker(work, work / "none")
    return {name: root for name, root in made.items() if root is not None}


@pytest.fixture
def data(built: dict[str, Path], tmp_path: Path, home: Path) -> Callable[[str], Path]:
    def copy(name: str) -> Path:
        return Path(shutil.copytree(built[name], tmp_path / "data", symlinks=True))

    return copy


@pytest.mark.parametrize("name", REAL)
def test_nothing_on_disk(home: Path, tmp_path: Path, name: str) -> None:
    task = get_task(name)
    for root in (None, tmp_path):
        with pytest.raises(FileNotFoundError) as error:
            task.load(root)
        message = str(error.value)
        assert "hf download" in message
        assert task.homepage in message
        assert task.homepage.startswith("https://huggingface.co/datasets/")
        if root is not None:
            assert str(root) in message
    with pytest.raises(FileNotFoundError, match=r"nowhere: no such folder.*hf download"):
        task.load(tmp_path / "nowhere")


@pytest.mark.parametrize(("name", "column"), COLUMNS)
def test_a_missing_column(data: Callable[[str], Path], name: str, column: str) -> None:
    root = data(name)
    path = root / ANNOTATION[name]
    rows = make.rows_of(path)
    make.write_rows(path, [{key: value for key, value in row.items() if key != column} for row in rows])
    with pytest.raises(ValueError, match=rf"{path.name}.*no column '{column}'; found '.*hf download"):
        get_task(name).load(root)


@pytest.mark.parametrize("name", REAL)
def test_a_missing_folder_and_a_missing_file(data: Callable[[str], Path], name: str) -> None:
    task, root = get_task(name), data(name)
    loaded = task.load(root)
    gone = loaded.samples[0].video
    assert gone is not None
    gone.unlink()
    again = task.load(root)  # one lost video is the run's to record, not a reason to refuse
    assert [s.id for s in again.samples] == [s.id for s in loaded.samples]
    assert again.samples[0].video is not None
    assert (again.samples[0].video.exists(), again.samples[0].video.suffix) == (False, ".mp4")
    assert again.samples[-1].video == loaded.samples[-1].video
    shutil.rmtree(root / MEDIA.get(name, "data"))
    with pytest.raises(FileNotFoundError, match=rf"no folder of .*{MEDIA.get(name, 'data')}.*hf download"):
        task.load(root)


def test_a_missing_task_or_config(data: Callable[[str], Path], built: dict[str, Path], tmp_path: Path) -> None:
    root = data("mlvu_dev")
    (root / "json" / "5_order.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"5_order\.json.*mean of seven.*hf download"):
        get_task("mlvu_dev").load(root)
    root = Path(shutil.copytree(built["mvbench"], tmp_path / "mvbench"))
    (root / "json" / "scene_transition.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"no scene_transition\.json.*20 tasks.*--revision video"):
        get_task("mvbench").load(root)
    root = Path(shutil.copytree(built["egoschema_subset"], tmp_path / "ego"))
    shutil.rmtree(root / "Subset")
    with pytest.raises(FileNotFoundError, match=r"no Subset/test-.*config Subset"):
        get_task("egoschema_subset").load(root)
    root = Path(shutil.copytree(built["videomme"], tmp_path / "subtitles"))
    shutil.rmtree(root / "subtitle")
    assert get_task("videomme").load(root).samples
    with pytest.raises(FileNotFoundError, match=r"no folder of subtitles \(subtitle.*subtitle\.zip"):
        get_task("videomme_w_subtitle").load(root)
    (root / "subtitle" / "deeper").mkdir(parents=True)  # an archive unpacked into a folder of its own
    for path in (built["videomme"] / "subtitle").iterdir():
        shutil.copy(path, root / "subtitle" / "deeper")
    with pytest.raises(FileNotFoundError, match=r"no video of .* has its <videoID>\.srt in .*subtitle"):
        get_task("videomme_w_subtitle").load(root)


@pytest.mark.parametrize(
    ("name", "column", "value", "message"),
    [
        ("videomme", "answer", "E", "needs a letter from A to D, found 'E'"),
        ("videomme", "answer", None, "needs a text"),
        ("videomme", "options", ["A. only"], "2 to 10 options"),
        ("videomme", "question", " \x00", "needs a text"),
        ("videomme", "question_id", "000-2", "two rows have the id '000-2'"),
        ("mlvu_dev", "answer", "Purple", "one of the options"),
        ("mlvu_dev", "question_type", "summary", "one of anomaly_reco, count"),
        ("mlvu_dev", "candidates", "Red", "a list of texts"),
        ("mvbench", "answer", "Flew away.", "one of the options"),
        ("mvbench", "start", "one", "column 'start': needs a number"),
        ("longvideobench", "correct_choice", 5, "the number of an option"),
        ("longvideobench", "option1", "N/A", "the number of an option, one of .0, 2, 3, 4"),
        ("egoschema_subset", "answer", "5", 'a text from "0" to "4"'),
        ("egoschema_subset", "answer", None, "needs a text"),
    ],
)
def test_wrong_values(data: Callable[[str], Path], name: str, column: str, value: Any, message: str) -> None:
    root = data(name)
    path = root / ANNOTATION[name]
    rows = make.rows_of(path)
    rows[0][column] = value
    make.write_rows(path, rows)
    with pytest.raises(ValueError, match=message) as error:
        get_task(name).load(root)
    assert path.name in str(error.value)
    if "two rows" not in message:
        assert "row 0" in str(error.value)


@pytest.mark.parametrize("name", ["videomme", "mvbench"])
@pytest.mark.parametrize("content", [b"", b"nonsense", b"{}", b"[]", b"[1]", b"[" * 100000])
def test_damaged_annotations(data: Callable[[str], Path], name: str, content: bytes) -> None:
    root = data(name)
    (root / ANNOTATION[name]).write_bytes(content)
    with pytest.raises(ValueError, match=rf"{Path(ANNOTATION[name]).name}.*hf download"):
        get_task(name).load(root)


def test_without_pyarrow(data: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    root = data("videomme")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ImportError, match=r"pip install 'holimerge\[eval\]'"):
        get_task("videomme").load(root)


def test_revision_follows_the_annotations_only(data: Callable[[str], Path]) -> None:
    root, task = data("mvbench"), get_task("mvbench")
    first = task.load(root).revision
    make.video(root / "vlnqa" / "other.mp4")
    assert task.load(root).revision == first
    path = root / "json" / "state_change.json"
    make.write_rows(path, [{**make.rows_of(path)[0], "question": "What else?"}])
    assert task.load(root).revision != first


# --- names stay inside ------------------------------------------------------------------------------------------------

ESCAPES = ["../x", "/etc/passwd", "a/../../x", "..", ".", "", " ", "C:\\x", "C:x", "a\\b", "a\x00b", "a\nb", "x" * 300]


@pytest.mark.parametrize("value", ESCAPES)
@pytest.mark.parametrize("name", REAL)
def test_every_task_refuses_names_that_leave(data: Callable[[str], Path], name: str, value: str) -> None:
    root = data(name)
    path = root / ANNOTATION[name]
    rows = make.rows_of(path)
    rows[0][NAMED_BY[name]] = value
    make.write_rows(path, rows)
    with pytest.raises(ValueError, match=rf"row 0, column '{NAMED_BY[name]}'") as error:
        get_task(name).load(root)
    assert repr(value) in str(error.value)


def test_subtitles_and_links_stay_inside_too(data: Callable[[str], Path], tmp_path: Path) -> None:
    root = data("longvideobench")
    path = root / ANNOTATION["longvideobench"]
    rows = make.rows_of(path)
    rows[1]["subtitle_path"] = "../../secret.json"
    make.write_rows(path, rows)
    with pytest.raises(ValueError, match=r"row 1, column 'subtitle_path'.*secret"):
        get_task("longvideobench").load(root)
    rows[1]["subtitle_path"] = "abc1_en.json"
    make.write_rows(path, rows)
    outside = make.video(tmp_path / "outside" / "v.mp4")
    (root / "videos" / "abc0.mp4").unlink()
    (root / "videos" / "abc0.mp4").symlink_to(outside)
    with pytest.raises(ValueError, match=r"row 0, column 'video_path'.*is a link that leads out"):
        get_task("longvideobench").load(root)


@given(
    st.text(st.characters(codec=None), max_size=40)
    | st.lists(st.sampled_from(["..", ".", "a", "/", "\\", "c:", "link", "dir"])).map("/".join)
)
@example("link/../../x")
@example("dir/link")
@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_name_is_inside_or_refused(tmp_path_factory: pytest.TempPathFactory, name: str) -> None:
    top = Path(tmp_path_factory.getbasetemp()) / "names"
    folder = top / "data"
    if not folder.exists():
        (folder / "dir").mkdir(parents=True)
        (top / "secret").mkdir()
        (folder / "link").symlink_to(top / "secret")
        (folder / "dir" / "link").symlink_to(top)
        (folder / "dir" / "loop").symlink_to("loop")
    for find in (inside, lambda f, n, w: find_file([f], n, w, (".mp4",))):
        try:
            found = find(folder, name, "row 3")
        except ValueError as error:
            assert "row 3" in str(error)  # noqa: PT017
            continue
        assert found.resolve().is_relative_to(folder.resolve())
        assert found.resolve() != folder.resolve()


def test_hub_links_reach_their_blobs_and_nothing_else(tmp_path: Path, home: Path) -> None:
    snapshot = make.as_hub(home, "lmms-lab/egoschema", make.egoschema(tmp_path / "files"))
    name = next((snapshot / "videos").iterdir()).name
    assert inside(snapshot / "videos", name, "row 0").exists()
    other = make.as_hub(home, "someone/else", make.egoschema(tmp_path / "files"))
    (snapshot / "videos" / "x.mp4").symlink_to(next((other / "videos").iterdir()))
    with pytest.raises(ValueError, match="leads out"):
        inside(snapshot / "videos", "x.mp4", "row 0")


# --- single benchmarks ------------------------------------------------------------------------------------------------


def test_the_newest_main_wins_in_the_hub(tmp_path: Path, home: Path) -> None:
    old = make.as_hub(home, "lmms-lab/egoschema", make.egoschema(tmp_path / "a"), commit="a" * 40)
    new = make.as_hub(home, "lmms-lab/egoschema", make.egoschema(tmp_path / "b"), commit="f" * 40)
    assert get_task("egoschema_subset").load(None).revision == "f" * 40
    (new.parents[1] / "refs" / "main").write_text("a" * 40)
    assert get_task("egoschema_subset").load(None).revision == "a" * 40
    assert get_task("egoschema_subset").load(old).revision == "a" * 40  # given as a folder, the commit is known too


def test_mvbench_shows_parts_of_whole_videos_only(tmp_path: Path) -> None:
    task = get_task("mvbench")
    cut = {s.category: s for s in task.load(make.mvbench(tmp_path / "cut")).samples}
    named = {s.category: s for s in task.load(make.mvbench(tmp_path / "named", "named")).samples}
    whole = {s.category: s for s in task.load(make.mvbench(tmp_path / "whole", "whole")).samples}
    assert all(s.start is None and s.end is None for s in (*cut.values(), *named.values()))
    bounded = {name for name, s in whole.items() if (s.start, s.end) == (1.0, 2.5)}
    assert bounded == make.MVBENCH_BOUNDED | {"episodic_reasoning"}
    assert [name for name, s in whole.items() if s.source_fps is not None] == ["episodic_reasoning"]
    assert len({len(s.options) for s in cut.values()}) == 4  # two to five options
    sequence = whole["action_sequence"]
    clip = read_video(sequence.video, frames=99, start=sequence.start, end=sequence.end)
    assert (clip.timestamps.min(), clip.timestamps.max()) == (1.0, 2.25)


def test_mlvu_takes_options_from_the_question(tmp_path: Path) -> None:
    task, root = get_task("mlvu_dev"), make.mlvu_parquet(tmp_path)
    path = root / "data" / "test-00000-of-00001.parquet"
    rows = make.rows_of(path)
    rows[0]["question"] = (
        "Question: Which?\nOptions:\n(A) White\n(B) Red\n(C) Blue\n(D) Green"  # what the model is shown
    )
    rows[1]["question"], rows[1]["answer"] = "Without options?", "White"
    make.write_rows(path, rows)
    first, second, *_ = task.load(root).samples
    assert (first.question, first.options) == ("Which?", ("White", "Red", "Blue", "Green"))
    assert (second.question, second.options, second.answer) == ("Without options?", tuple(make.COLOURS), 3)


def test_longvideobench_fillers_are_no_options(tmp_path: Path) -> None:
    root = make.longvideobench(tmp_path)
    path = root / ANNOTATION["longvideobench"]
    rows = make.rows_of(path)
    rows[1] |= {"option0": "N/A", "correct_choice": 2}
    make.write_rows(path, rows)
    samples = get_task("longvideobench").load(root).samples
    assert [s.options for s in samples] == [
        ("one", "two", "three", "four", "five"),
        ("blue", "green", "grey"),
        ("yes", "no"),
    ]
    assert samples[1].options[samples[1].answer or 0] == "green"
    assert [s.groups["duration"] for s in samples] == ["15", "600", "3600"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 3: no JSON object"),
        ("[]", "line 3: must be an object"),
        ("[" * 99999, "line 3: no JSON object"),
        ({"video": None}, "line 3, column 'video': needs the name of a file"),
        ({"video": "../a.mp4"}, "line 3, column 'video': '../a.mp4' is no plain"),
        ({"video": "/a.mp4"}, "must not leave"),
        ({"question": ""}, "line 3, column 'question': needs a text"),
        ({"options": ["x"]}, "2 to 10 options"),
        ({"options": ["x", "x"]}, "options that differ"),
        ({"options": ["B", "A"], "answer": "A"}, "give the index"),
        ({"answer": 2}, "an index from 0 to 1, a letter from A to B"),
        ({"answer": True}, "an index from 0 to 1"),
        ({"answer": "z"}, "an index from 0 to 1"),
        ({"colour": 1}, "line 3: unknown keys 'colour'; valid: video, question"),
        ({"start": 3, "end": 2}, "needs 0 <= start < end"),
        ({"start": "x"}, "needs a number"),
        ({"start": 10**400}, "needs a number"),
        ({"end": math.inf}, "needs a number"),
        ({"id": "1"}, "line 3: the id '1' is that of line 1"),
    ],
)
def test_custom_names_the_line(tmp_path: Path, line: Any, message: str) -> None:
    good: dict[str, Any] = {"video": "a.mp4", "question": "Which?", "options": ["x", "y"], "answer": "x"}
    bad = line if isinstance(line, str) else json.dumps(good | line)
    (tmp_path / "q.jsonl").write_text(f"{json.dumps(good)}\n\n{bad}\n")
    with pytest.raises(ValueError, match=message) as error:
        get_task("custom").load(tmp_path)
    assert "q.jsonl, line 3" in str(error.value)


def test_custom_without_keys_and_without_file(tmp_path: Path) -> None:
    task = get_task("custom")
    with pytest.raises(ValueError, match="needs a JSONL file"):
        task.load(None)
    with pytest.raises(FileNotFoundError, match="found none"):
        task.load(tmp_path)
    (tmp_path / "a.jsonl").write_text("\n")
    with pytest.raises(ValueError, match="no questions"):
        task.load(tmp_path)
    (tmp_path / "a.jsonl").write_text('{"video": "a.mp4"}\n')
    with pytest.raises(ValueError, match=r"line 1: no column 'options'; found 'video'"):
        task.load(tmp_path)
    (tmp_path / "b.jsonl").write_text("\n")
    with pytest.raises(FileNotFoundError, match=r"exactly one; found a\.jsonl, b\.jsonl"):
        task.load(tmp_path)
    (tmp_path / "a.jsonl").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="no UTF-8 text"):
        task.load(tmp_path / "a.jsonl")


def test_custom_answers(tmp_path: Path) -> None:
    samples = get_task("custom").load(make.custom(tmp_path)).samples
    assert [s.answer for s in samples] == [0, 1, 1]
    assert [s.id for s in samples] == ["1", "3", "who"]
    assert [s.category for s in samples] == ["custom", "count", "custom"]
    assert (samples[2].start, samples[2].end) == (1, 2.5)


def test_custom_options_with_letters_do_not_get_two(tmp_path: Path) -> None:
    task = get_task("custom")
    row = {"video": "a.mp4", "question": "Which?", "options": ["A. left", "B. right"]}
    lines = [{**row, "answer": answer} for answer in ("B. right", "right", "B", 1)]
    lines.append({**row, "options": ["A. left", "right"], "answer": "A. left"})  # not all have one: part of the text
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    samples = task.load(tmp_path).samples
    assert [s.answer for s in samples] == [1, 1, 1, 1, 0]
    assert {s.options for s in samples[:4]} == {("left", "right")}
    assert samples[4].options == ("A. left", "right")
    assert task.prompt is not None
    assert "\nA. left\nB. right\n" in task.prompt(samples[0], "official", []).user


def test_custom_names_of_one_video_are_one_cluster(tmp_path: Path) -> None:
    row = {"question": "Which?", "options": ["x", "y"], "answer": "x"}
    names = ["c/a.mp4", "./c/a.mp4", "c//a.mp4", "c/b.mp4"]
    (tmp_path / "q.jsonl").write_text("".join(json.dumps({"video": name, **row}) + "\n" for name in names))
    samples = get_task("custom").load(tmp_path).samples
    assert [s.video_id for s in samples] == ["c/a.mp4"] * 3 + ["c/b.mp4"]


# --- text and scores --------------------------------------------------------------------------------------------------


@given(st.text(st.characters(codec=None)))
@settings(max_examples=200, deadline=None)
def test_cleaned_text_controls_nothing(text: str) -> None:
    cleaned = clean(text)
    assert not any((ord(c) < 32 and c not in "\n\t") or 127 <= ord(c) < 160 for c in cleaned)
    assert not set(cleaned) & set("\u202e\u2066\u200f\ufeff")
    assert clean(cleaned) == cleaned
    cleaned.encode("utf-8")


def test_questions_are_plain_text(data: Callable[[str], Path]) -> None:
    root = data("videomme")
    path = root / ANNOTATION["videomme"]
    rows = make.rows_of(path)
    rows[0]["question"] = "\x1b[31mWhy\u202e?\r\nTell\x00 me 多い é."
    make.write_rows(path, rows)
    assert get_task("videomme").load(root).samples[0].question == "[31mWhy?\nTell me 多い é."


def test_letters_come_off_only_if_all_have_theirs() -> None:
    assert without_letters(["A. x", "(B) y", "C) z"]) == ("x", "y", "z")
    assert without_letters(["A. Smith", "Jones"]) == ("A. Smith", "Jones")
    assert without_letters(["B. x", "A. y"]) == ("B. x", "A. y")
    assert without_letters(["A. ", "B. y"]) == ("A.", "B. y")


def records(right: dict[str, list[int]], **more: Any) -> list[dict[str, Any]]:
    return [
        {"category": name, "groups": {"duration": "short"}, "correct": bool(c), "choice": 0, "video_id": "v", **more}
        for name, marks in right.items()
        for c in marks
    ]


def test_scores() -> None:
    def score(name: str, rows: list[dict[str, Any]]) -> dict[str, float]:
        task: Task = get_task(name)
        return task.headline(rows)

    mixed = records({"plotQA": [1, 1, 1, 0], "count": [0], "order": [1, 0]})
    assert score("mlvu_dev", mixed) == {"m_avg": pytest.approx((75 + 0 + 50) / 3), "micro_avg": pytest.approx(400 / 7)}
    assert next(iter(score("mlvu_dev", mixed))) == "m_avg"
    empty = records({"action_count": [0, 0, 0]}, counted=False)
    scored = score("mvbench", records({"action_count": [1], "state_change": [1, 0]}) + empty)
    assert scored == {"mean_of_tasks": 75.0, "micro_avg": pytest.approx(200 / 3), "left_out": 50.0}
    assert score("mvbench", records({"action_count": [1, 0, 0, 0]}))["mean_of_tasks"] == 25.0
    long = [{**r, "groups": {"duration": "long"}} for r in records({"OCR": [0]})]
    assert score("videomme", records({"OCR": [1, 0]}) + long) == {
        "videomme_perception_score": pytest.approx(100 / 3),
        "long": 0.0,
        "short": 50.0,
    }
    assert score("longvideobench", mixed) == {"lvb_acc": pytest.approx(400 / 7)}  # micro
    for name in (*REAL, "custom"):
        assert set(score(name, []).values()) <= {0.0}  # a run without answers has a score, not a crash
