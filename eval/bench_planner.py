"""Whether the planner's times are right on this machine: plans for three models and three numbers of frames, run.

    python -m holimerge.eval.bench_planner --output results

Shapes of a size that a CPU can run (real classes, random weights). For each number of frames the stock model and the
plan for a share of its predicted time take turns; predicted and measured times to the first token are compared.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from holimerge.config import Budget
from holimerge.planning.solve import Choice, ImpossibleError, Setting, plan
from holimerge.shapes import Shape, build_config, count_parameters

from .conditions import conditions
from .planning import measure_choices, setting_of, worst
from .toy import describe, random_model

FRAMES = (2, 4, 8)
SHARE = 0.6  # of the stock model's predicted time, which the plan must meet
AIM = 0.15  # relative error of the time to first token
_TEXT = {"num_hidden_layers": 12, "hidden_size": 1024, "num_attention_heads": 16, "num_key_value_heads": 4}
_TEXT |= {"intermediate_size": 2816, "vocab_size": 16384, "max_position_embeddings": 32768}
_TEXT |= {"bos_token_id": 1, "eos_token_id": 2}
_TOKENS = {"video_token_id": 1001, "image_token_id": 1000, "vision_start_token_id": 1002, "vision_end_token_id": 1003}
_SOURCE = "small sizes in the published architecture"


def _qwen(vision: dict[str, Any], sections: list[int], **text: Any) -> dict[str, Any]:
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": sections}
    sizes = {"depth": 12, "hidden_size": 384, "num_heads": 6, "out_hidden_size": _TEXT["hidden_size"]}
    decoder = {**_TEXT, **text, "rope_parameters": rope}
    return {"vision_config": {**sizes, **vision}, "text_config": decoder, "tie_word_embeddings": False, **_TOKENS}


def _llava() -> dict[str, Any]:
    siglip = {"model_type": "siglip_vision_model", "image_size": 384, "patch_size": 14, "vision_use_head": False}
    siglip |= {"hidden_size": 384, "intermediate_size": 1536, "num_attention_heads": 6, "num_hidden_layers": 12}
    decoder = {"model_type": "qwen2", **_TEXT}
    tokens = {"video_token_index": 1001, "image_token_index": 1000}
    return {"vision_config": siglip, "text_config": decoder, "tie_word_embeddings": False, **tokens}


SHAPES = {
    shape.name: shape
    for shape in (
        Shape("llava-onevision-small", "llava_onevision", _llava(), _SOURCE, separators=1),
        Shape(
            "qwen2.5-vl-small",
            "qwen2_5_vl",
            _qwen({"intermediate_size": 1152, "fullatt_block_indexes": [3, 7, 11]}, [8, 12, 12]),
            _SOURCE,
            grid=(18, 32),
        ),
        Shape(
            "qwen3-vl-small",
            "qwen3_vl",
            _qwen({"intermediate_size": 1536, "deepstack_visual_indexes": [3, 6, 9]}, [12, 10, 10], head_dim=64),
            _SOURCE,
            grid=(16, 28),
            separators_per_step=8,
        ),
    )
}


def bench_shape(
    shape: Shape,
    *,
    frames: Sequence[int] = FRAMES,
    share: float = SHARE,
    warmup: int = 1,
    repeats: int = 3,
    say: Callable[[str, int, int], None] | None = None,
    keep: Callable[[dict[str, Any]], None] = lambda _: None,
) -> dict[str, Any]:
    """Plan and run one model on the CPU.

    Args:
        shape: its sizes.
        frames: numbers of frames.
        share: of the stock model's predicted time that the plan is given as `ttft_ms`.
        warmup, repeats: runs of the stock model and of the plan.
        keep: given the result so far after each number of frames.

    Returns:
        `cases`: per number of frames `unpatched` and `plan`, each predicted and measured; `errors` of the time to
        first token; `aim`; `conditions`.
    """
    config, device = build_config(shape), torch.device("cpu")
    # measured anew: on a shared machine an older measurement may be of a quieter hour
    setting = setting_of(config, shape, device=device, dtype=torch.float32, recalibrate=True)
    model = random_model(config)
    result: dict[str, Any] = {
        "kind": "planner",
        "shape": shape.name,
        "sizes": describe(config),
        "parameters": count_parameters(config),
        "calibration_seconds": setting.device.seconds,
        "cases": {},
    }
    for count in frames:
        stock = plan(setting, Budget.model_validate({"retain": 1.0}), count)
        limit, planned = _within(setting, count, stock.ttft_ms, share)
        choices = {"unpatched": stock, "plan": planned}
        runs = measure_choices(model, config, setting, choices, warmup=warmup, repeats=repeats, say=say)
        sides = {name: {**choices[name].to_dict(), "measured": runs[name]} for name in choices}
        result["cases"][str(count)] = {"budget": {"ttft_ms": limit}, **sides}
        cases = result["cases"].values()
        errors = [case[side]["measured"]["error"]["ttft"] for case in cases for side in ("unpatched", "plan")]
        result["errors"] = worst(errors)
        result["aim"] = {"at most": AIM, "met": max(map(abs, errors)) <= AIM}
        result["conditions"] = conditions(device, dtype="float32", attn="sdpa", seed=0, warmup=warmup, repeats=repeats)
        keep(result)
    return result


def _within(setting: Setting, frames: int, whole: float, share: float) -> tuple[float, Choice]:
    """The plan for a share of the whole's time, or for half way to the least where that is too little."""
    limit = round(share * whole, 1)
    try:
        return limit, plan(setting, Budget.model_validate({"ttft_ms": limit}), frames)
    except ImpossibleError as error:
        limit = round((error.least + whole) / 2, 1)
        return limit, plan(setting, Budget.model_validate({"ttft_ms": limit}), frames)


def main(arguments: list[str] | None = None) -> None:
    """Write one JSON per model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="a folder")
    parser.add_argument("--shape", action="append", choices=list(SHAPES), help="repeat for several; default: all")
    parser.add_argument("--frames", type=int, nargs="+", default=list(FRAMES))
    parser.add_argument("--repeats", type=int, default=3)
    asked = parser.parse_args(arguments)
    from .show import Steps

    with Steps() as say:
        for name in asked.shape or SHAPES:
            asked.output.mkdir(parents=True, exist_ok=True)
            path = asked.output / f"planner-{name}-cpu.json"

            def keep(result: dict[str, Any], path: Path = path) -> None:
                path.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")

            result = bench_shape(SHAPES[name], frames=asked.frames, repeats=asked.repeats, say=say, keep=keep)
            print(name, result["errors"], "aim met" if result["aim"]["met"] else "aim missed")


if __name__ == "__main__":
    main()
