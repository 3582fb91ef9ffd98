"""`holimerge ask`: one question about one video, through a checkpoint, with its tokens and times."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any


def answer_video(
    video: str,
    question: str,
    model: str,
    *,
    config: str = "holimerge-15",
    frames: int = 32,
    sampling: str = "uniform",
    fps: float | None = None,
    max_new_tokens: int = 128,
    device_map: str | None = None,
    dtype: str = "auto",
    attn_implementation: str | None = None,
    backend: str = "auto",
    compare: bool = False,
    say: Callable[..., None] = lambda *_: None,
) -> dict[str, Any]:
    """Read a video, load a checkpoint, answer greedily; with `compare` also unpatched.

    The whole video is read first, onto the device where the model will be: what is wrong with it anywhere shows before
    gigabytes are loaded, and it takes a second at most where those take many.

    A configuration with `more_frames` reads that many times `frames`; with `compare` both sides see them. Each case is
    one run. With `compare` both are warmed up by one token first, else the times hold a first run.

    Returns:
        `answers` by case, `cases` (tokens, ms, flops; as in `holimerge.eval.measure`), `before` (decode: frames read
        and preprocessed, both at once; preprocess: what is left of it, the prompt), `video`, `conditions`, ready for
        JSON.

    Raises:
        ConfigError, ValueError, TypeError, FileNotFoundError, OSError, ImportError: whatever is wrong with the
            configuration, the family, the video or the checkpoint, in this order; weights are loaded last.
    """
    from holimerge.config import load_config
    from holimerge.inputs import build_inputs
    from holimerge.reading import read_pixels

    from .conditions import conditions
    from .load import first_device, load, read_config, read_settings, to_model
    from .measure import measure_cases, spread, summary
    from .run import devices_of, patched, run_once

    loaded_config = load_config(config)
    if "://" not in video and not Path(video).exists():
        raise FileNotFoundError(f"{video}: no such video file or folder of images")
    model_config = read_config(model)
    depth = model_config.text_config.num_hidden_layers
    layer = None if loaded_config.inner is None else loaded_config.inner.resolve(depth)
    settings = read_settings(model, model_config)
    say("reading the video")
    begin = time.perf_counter()
    count = frames * loaded_config.more_frames
    where = first_device(device_map)
    clip, pixels = read_pixels(video, settings, frames=count, sampling=sampling, fps=fps, backend=backend, device=where)
    decode = (time.perf_counter() - begin) * 1000
    say("loading the model")
    loaded = load(model, device_map=device_map, dtype=dtype, attn_implementation=attn_implementation, settings=settings)
    begin = time.perf_counter()
    inputs = build_inputs(
        question,
        clip,
        config=loaded.model.config,
        tokenizer=loaded.tokenizer,
        settings=loaded.settings,
        chat_template=loaded.chat_template,
        pixels=[pixels],
    )
    preprocess = (time.perf_counter() - begin) * 1000
    inputs = to_model(inputs, loaded.model)
    name = config if loaded_config.method != "keep_all" else "keep-all"
    cases = {"unpatched": None, name: loaded_config} if compare else {name: loaded_config}
    found, answers = {}, {}
    if compare:
        measure_cases(loaded.model, inputs, cases, warmup=0, repeats=1, new_tokens=0, say=say)
    for case, cfg in cases.items():
        say(f"{case}: answering")
        with patched(loaded.model, cfg):
            run = run_once(loaded.model, inputs, max_new_tokens=max_new_tokens)
        found[case] = summary(loaded.model, inputs, cfg, [run], run, None)
        assert run.answer is not None
        answers[case] = loaded.tokenizer.decode(run.answer[0], skip_special_tokens=True).strip()
    return {
        "kind": "ask",
        "question": question,
        "answers": answers,
        "cases": found,
        "before": {"decode": spread([decode]), "preprocess": spread([preprocess])},
        "inner_layer": layer,
        "video": {
            "source": video,
            "frames": len(clip.frames),
            "frames_in_file": clip.total_frames,
            "duration_s": clip.duration,
        },
        "conditions": conditions(
            loaded.model.device,
            model=model,
            dtype=str(loaded.model.dtype).removeprefix("torch."),
            attn=str(getattr(loaded.model.config, "_attn_implementation", None)),
            devices_used=max(1, len(devices_of(loaded.model))),
            repeats=1,
            warmup=int(compare),
            video_backend="pyav" if backend == "auto" else backend,
        ),
    }


def show_answer(result: dict[str, Any], console: Any) -> None:
    """Print the answer; with two cases the table too."""
    from .show import cases_table

    if len(result["answers"]) > 1:
        for case, answer in result["answers"].items():
            console.print(f"{case}: {answer}", highlight=False, markup=False, soft_wrap=True)
        console.print(
            cases_table(
                "One run each, warmed up", result["cases"], before=result["before"], layer=result["inner_layer"]
            )
        )
        return
    ((case, answer),) = result["answers"].items()
    console.print(answer, highlight=False, markup=False, soft_wrap=True)
    tokens, ms = result["cases"][case]["tokens"], result["cases"][case]["ms"]
    left = "" if tokens["after_inner"] is None else f", {tokens['after_inner']} after layer {result['inner_layer']}"
    stages = ", ".join(f"{stage} {value['median']:.0f}" for stage, value in ms["stages"].items() if stage != "inner")
    console.print(
        f"[{case}] {tokens['features']} video tokens, {tokens['entering']} entered the LLM{left}; "
        f"first token after {ms['ttft']['median']:.0f} ms ({stages}), first run of the model",
        style="dim",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )
