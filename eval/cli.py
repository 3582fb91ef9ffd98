"""The command line: `holimerge ask | eval | compare | cache | bench | plan | flops | list | doctor | ...`.

Nothing heavy is imported before a command runs. A user's mistake is one red line on stderr and exit status 2; `--debug`
shows where it came from. With `--json` nothing but the JSON is on stdout.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

if TYPE_CHECKING:
    from rich.console import Console

app = typer.Typer(
    name="holimerge",
    help="Training-free video token merging for Hugging Face video LLMs.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

# What a user can cause: configurations, files, models, missing packages. Anything else keeps its traceback.
_MISTAKES = (ValueError, TypeError, OSError, ImportError)

Json = Annotated[bool, typer.Option("--json", help="Print JSON on stdout and nothing else.")]
Output = Annotated[Path | None, typer.Option(help="Also write the numbers into this JSON file.", dir_okay=False)]
Dtype = Annotated[Literal["auto", "float32", "bfloat16", "float16"], typer.Option(help="Of the weights.")]
_ATTENTION = "sdpa, eager, flash_attention_2; default: the model's own."
Attention = Annotated[str | None, typer.Option(help=_ATTENTION)]


def _command(function: Callable[..., None]) -> Callable[..., None]:
    """Register a command that explains a user's mistake in one line."""

    @functools.wraps(function)
    def run(*args: Any, debug: bool = False, **kwargs: Any) -> None:
        try:
            function(*args, **kwargs)
        except Exception as error:
            mistake = isinstance(error, _MISTAKES) or type(error).__name__ == "OutOfMemoryError"
            if debug or not mistake or isinstance(error, BrokenPipeError):
                raise
            from .plain import plain

            text = plain(error) or type(error).__name__
            typer.secho(f"error: {text}", fg=typer.colors.RED, err=True)
            raise typer.Exit(2) from None

    kind = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
    extra = inspect.Parameter("debug", inspect.Parameter.KEYWORD_ONLY, default=False, annotation=kind)
    signature = inspect.signature(function, eval_str=True)
    run.__signature__ = signature.replace(parameters=[*signature.parameters.values(), extra])  # type: ignore[attr-defined]
    return app.command(function.__name__.rstrip("_").replace("_", "-"))(run)


def _console() -> Console:
    from .show import stdout

    return stdout()


def _finish(result: Any, show: Callable[[], None], as_json: bool, output: Path | None) -> None:
    """Print a result as JSON or for people, and write it if asked."""
    text = json.dumps(result, indent=2)
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(text + "\n", encoding="utf-8")
    if as_json:
        typer.echo(text)
    else:
        show()


@_command
def ask(
    video: Annotated[str, typer.Argument(help="A video file, or a folder of images.")],
    question: Annotated[str, typer.Argument(help="What to ask about it.")],
    model: Annotated[str, typer.Option(help="A Hugging Face hub id or a local folder.")],
    config: Annotated[str, typer.Option(help="A preset (`holimerge list`) or a YAML file.")] = "holimerge-15",
    frames: Annotated[int, typer.Option(help="Frames taken with --sampling uniform.")] = 32,
    sampling: Annotated[
        Literal["uniform", "left", "midpoint", "fps"], typer.Option(help="How frames are chosen.")
    ] = "uniform",
    fps: Annotated[float | None, typer.Option(help="Frames a second with --sampling fps (default 2).")] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Longest answer, in tokens.", min=1)] = 128,
    device_map: Annotated[str | None, typer.Option(help="accelerate's: auto, cuda:0, cpu, ...")] = None,
    dtype: Dtype = "auto",
    attn_implementation: Attention = None,
    backend: Annotated[
        Literal["auto", "pyav", "torchcodec", "decord"], typer.Option(help="What decodes the video.")
    ] = "auto",
    compare: Annotated[bool, typer.Option("--compare", help="Ask the unpatched model too.")] = False,
    json_: Json = False,
) -> None:
    """Ask a model about a video, with its video tokens merged."""
    from .ask import answer_video, show_answer
    from .show import Steps

    with Steps() as say:
        result = answer_video(
            video,
            question,
            model,
            config=config,
            frames=frames,
            sampling=sampling,
            fps=fps,
            max_new_tokens=max_new_tokens,
            device_map=device_map,
            dtype=dtype,
            attn_implementation=attn_implementation,
            backend=backend,
            compare=compare,
            say=say,
        )
    _finish(result, lambda: show_answer(result, _console()), json_, None)


@_command
def eval_(
    model: Annotated[str, typer.Option(help="A Hugging Face hub id or a local folder.")],
    output: Annotated[
        Path, typer.Option("--output", "--output-path", "--output_path", help="The run's folder.", file_okay=False)
    ],
    config: Annotated[
        list[str] | None,
        typer.Option(
            help="A preset, a YAML file, or unpatched; repeat for several, or join by commas. "
            "Default: unpatched,holimerge-15."
        ),
    ] = None,
    tasks: Annotated[list[str] | None, typer.Option(help="Benchmarks, joined by commas (`holimerge list`).")] = None,
    data: Annotated[list[str] | None, typer.Option(help="Where the data lie: ROOT, or TASK=ROOT; repeat.")] = None,
    limit: Annotated[int | None, typer.Option(help="Only the first samples of each data set.")] = None,
    batch_size: Annotated[int, typer.Option("--batch-size", "--batch_size", help="Prompts generated together.")] = 1,
    num_frames: Annotated[
        int, typer.Option("--num-frames", "--num_frames", "--max_frames_num", help="Frames of each video.")
    ] = 32,
    protocol: Annotated[
        str | None, typer.Option(help="official, lmms_eval_0_3, ...: prompts and answer extraction.")
    ] = None,
    sampling: Annotated[
        str | None, typer.Option(help="uniform, left, midpoint or fps; default: the protocol's rule.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of random fallbacks; answers are greedy.")] = 0,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in --output.")] = False,
    device_map: Annotated[
        str | None, typer.Option("--device-map", "--device_map", help="accelerate's: auto, cuda:0, cpu, ...")
    ] = None,
    dtype: Dtype = "auto",
    attn: Annotated[
        str | None, typer.Option("--attn", "--attn-implementation", "--attn_implementation", help=_ATTENTION)
    ] = None,
    no_cache: Annotated[bool, typer.Option("--no-cache", help="Decode every video, keep no frames on disk.")] = False,
    cache_size: Annotated[str, typer.Option(help="Most room for cached frames.")] = "10GB",
    no_reuse: Annotated[bool, typer.Option("--no-reuse", help="Encode a video anew for each question.")] = False,
    stall_seconds: Annotated[float, typer.Option(help="Wait so long for dead processes.", hidden=True)] = 1800.0,
    json_: Json = False,
) -> None:
    """Evaluate a model under several configurations on benchmarks; can be killed and resumed."""
    from .evaluate import evaluate
    from .frame_cache import FrameCache, default_folder, parse_size
    from .plan import split_names
    from .show_eval import EvalProgress, show_results

    cache = None if no_cache else FrameCache(default_folder(), parse_size(cache_size))
    with EvalProgress() as meter:
        results = evaluate(
            model,
            split_names(config or ["unpatched", "holimerge-15"]),
            split_names(tasks or []),
            output,
            data=data or [],
            limit=limit,
            batch_size=batch_size,
            seed=seed,
            num_frames=num_frames,
            protocol=protocol,
            sampling=sampling,
            resume=resume,
            device_map=device_map,
            dtype=dtype,
            attn_implementation=attn,
            cache=cache,
            reuse=not no_reuse,
            stall_seconds=stall_seconds,
            meter=meter,
        )
    if results is not None:  # another process than the first has nothing to tell
        _finish(results, lambda: show_results(results, _console()), json_, None)


@_command
def compare(
    results: Annotated[list[Path], typer.Argument(help="results.json files, or folders of runs; one or several.")],
    output: Annotated[
        Path | None, typer.Option(help="Also write comparison.md and comparison.json here.", file_okay=False)
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the bootstrap.")] = 0,
    json_: Json = False,
) -> None:
    """Compare runs, or one run's configurations, sample by sample with the first."""
    from .compare import compare_files, show_comparison

    found = compare_files(results, seed=seed, output=output)
    _finish(found, lambda: show_comparison(found, _console()), json_, None)


@_command
def cache(
    clear: Annotated[bool, typer.Option("--clear", help="Remove every cached frame.")] = False,
    json_: Json = False,
) -> None:
    """Show where sampled frames are cached and how much room they take."""
    from .frame_cache import FrameCache, default_folder

    kept = FrameCache(default_folder())
    count, size = kept.clear() if clear else kept.size()
    found = {"folder": str(kept.folder), "videos": count, "bytes": size, "cleared": clear}
    text = f"{count} videos, {size / 1e6:.1f} MB {'removed from' if clear else 'in'} {kept.folder}"
    _finish(found, lambda: typer.echo(text), json_, None)


@_command
def bench(
    shape: Annotated[
        str, typer.Option(help="toy, a name `holimerge list` shows, or a folder with a config.json.")
    ] = "toy",
    model: Annotated[str | None, typer.Option(help="A checkpoint instead of random weights.")] = None,
    frames: Annotated[int | None, typer.Option(help="Frames; default: the shape's.", min=1)] = None,
    config: Annotated[list[str] | None, typer.Option(help="Repeat for several.")] = None,
    dtype: Dtype = "auto",
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1; default: a GPU if there is one.")] = None,
    attn_implementation: Attention = None,
    text_tokens: Annotated[int, typer.Option(help="Prompt tokens besides the video's.", min=2)] = 40,
    warmup: Annotated[int, typer.Option(min=0)] = 3,
    repeats: Annotated[int, typer.Option(min=1)] = 5,
    new_tokens: Annotated[int, typer.Option(help="Decoding steps timed.", min=0)] = 16,
    count: Annotated[bool, typer.Option("--count", help="Also count the FLOPs that really run.")] = False,
    reduction: Annotated[
        bool, typer.Option("--reduction", help="Time the reduction alone, against the authors' procedure.")
    ] = False,
    output: Output = None,
    json_: Json = False,
) -> None:
    """Measure time to first token by stage, FLOPs and memory, unpatched against configurations."""
    from .show import Steps

    with Steps() as say:
        if reduction:
            from .bench_reduction import reduction_table, run

            listed = run(None, cases=(frames,) if frames else (32, 128), repeats=repeats, say=say)
        else:
            from .bench import bench_model

            result = bench_model(
                shape=shape,
                model=model,
                frames=frames,
                configs=config or ["holitom-10", "holimerge-10"],
                dtype=dtype,
                device=device,
                attn_implementation=attn_implementation,
                text_tokens=text_tokens,
                warmup=warmup,
                repeats=repeats,
                new_tokens=new_tokens,
                count=count,
                say=say,
            )
    if reduction:
        _finish(listed, lambda: _console().print(reduction_table(listed)), json_, output)
        return
    from .bench import show_bench

    _finish(result, lambda: show_bench(result, _console()), json_, output)


@_command
def flops(
    shape: Annotated[str, typer.Option(help="A name `holimerge list` shows, or a folder with a config.json.")],
    config: Annotated[str, typer.Option(help="A preset or a YAML file.")] = "holitom-10",
    frames: Annotated[int | None, typer.Option(help="Frames; default: the shape's.")] = None,
    convention: Annotated[
        Literal["paper", "exact"], typer.Option(help="paper: HoliTom's table; exact: everything that runs.")
    ] = "exact",
    text_tokens: Annotated[int, typer.Option(help="Prompt tokens besides the video's.")] = 40,
    json_: Json = False,
) -> None:
    """Compute the FLOPs of one prompt, unreduced and reduced; needs no weights."""
    from .flops import flops_report

    result = flops_report(shape, frames=frames, config=config, convention=convention, text_tokens=text_tokens)

    def show() -> None:
        from rich.table import Table

        from .show import flops_text

        console, tokens = _console(), result["tokens"]
        console.print(f"{result['shape']}, {result['frames']} frames, {config}", style="bold", highlight=False)
        table = Table()
        for name in (f"FLOPs ({convention})", "unreduced", "reduced"):
            table.add_column(name, justify="left" if name.startswith("FLOPs") else "right")
        stages = result["stages"]
        for name in stages["unreduced"]:
            table.add_row(
                name.replace("_", " "), *(flops_text(stages[side][name]) for side in ("unreduced", "reduced"))
            )
        table.add_section()
        table.add_row("all", *(flops_text(result["total"][side]) for side in ("unreduced", "reduced")))
        table.add_row("share", "100 %", f"{100 * result['ratio']:.1f} %")
        if "decode_per_token" in result:
            table.add_row("each token", *(flops_text(result["decode_per_token"][s]) for s in ("unreduced", "reduced")))
        console.print(table)
        left = "" if tokens["after_inner"] is None else f", {tokens['after_inner']} after layer {tokens['inner_layer']}"
        console.print(f"video tokens: {tokens['video']}, entering the LLM {tokens['entering']}{left}", highlight=False)
        console.print(f"unit: {result['unit']}", highlight=False)
        for note in result["assumptions"]:
            console.print(f"- {note}", style="dim", highlight=False)

    _finish(result, show, json_, None)


@_command
def plan(
    budget: Annotated[
        list[str], typer.Option(help="ttft_ms=300, memory_gib=12, tokens=640, flops=0.1, retain=0.2; repeat or join.")
    ],
    model: Annotated[str | None, typer.Option(help="A Hugging Face hub id or a local folder.")] = None,
    shape: Annotated[str | None, typer.Option(help="Or a name `holimerge list` shows, or toy: random weights.")] = None,
    frames: Annotated[int | None, typer.Option(help="Frames; without it: the most that fit.", min=1)] = None,
    least: Annotated[float, typer.Option(help="Without --frames: least share of the tokens that enters.")] = 0.1,
    text_tokens: Annotated[int, typer.Option(help="Prompt tokens besides the video's.", min=2)] = 40,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1; default: a GPU if there is one.")] = None,
    dtype: Dtype = "auto",
    attn_implementation: Annotated[str, typer.Option(help="sdpa, eager, flash_attention_2.")] = "sdpa",
    inner: Annotated[bool, typer.Option(help="Whether an inner merge may be chosen.")] = True,
    measure: Annotated[bool, typer.Option(help="Run the plan and compare.")] = True,
    repeats: Annotated[int, typer.Option(min=1)] = 3,
    recalibrate: Annotated[bool, typer.Option("--recalibrate", help="Measure the device anew.")] = False,
    output: Output = None,
    json_: Json = False,
) -> None:
    """Find the configuration that meets a budget of time, memory, FLOPs or tokens, and run it."""
    from .planning import plan_model, show_plan
    from .show import Steps

    with Steps() as say:
        result = plan_model(
            shape=shape,
            model=model,
            frames=frames,
            budget=budget,
            text_tokens=text_tokens,
            device=device,
            dtype=dtype,
            attn_implementation=attn_implementation,
            inner=inner,
            least=least,
            measure=measure,
            repeats=repeats,
            recalibrate=recalibrate,
            say=say,
        )
    _finish(result, lambda: show_plan(result, _console()), json_, output)


@_command
def list_(json_: Json = False) -> None:
    """List methods, model families, presets, named shapes and benchmarks."""
    from holimerge.registry import list_families, list_methods, list_presets, preset_text
    from holimerge.shapes import SHAPES

    from .tasks import list_tasks

    presets = {name: preset_text(name).splitlines()[0].lstrip("# ") for name in list_presets()}
    result = {
        "methods": list_methods(),
        "families": list_families(),
        "presets": presets,
        "shapes": {name: shape.model_type for name, shape in SHAPES.items()},
        "tasks": list_tasks(),
    }

    def show() -> None:
        from rich.markup import escape

        console = _console()
        for heading, entries in result.items():
            console.print(f"[bold]{heading}[/]")
            for name in entries:
                note = entries[name] if isinstance(entries, dict) else ""
                console.print(f"  {name:20} [dim]{escape(note)}[/]", highlight=False)

    _finish(result, show, json_, None)


@_command
def doctor(json_: Json = False) -> None:
    """Tell what is installed and what of it no committed result covers."""
    from .doctor import as_json, doctor_table, examine
    from .show import Steps

    with Steps() as say:
        say("looking at packages and devices")
        lines = examine()
    _finish(as_json(lines), lambda: _console().print(doctor_table(lines)), json_, None)


@_command
def demo(
    videos: Annotated[int, typer.Option(help="Generated videos to ask about.", min=1, max=500)] = 30,
    config: Annotated[
        list[str] | None, typer.Option(help="Presets or YAML files; the default is five budgets.")
    ] = None,
    threads: Annotated[
        int, typer.Option(help="Threads of torch; one is disturbed least on a busy machine.", min=1)
    ] = 1,
    output: Output = None,
    json_: Json = False,
) -> None:
    """A tiny trained model answers questions about generated H.264 videos, with all tokens and with few."""
    from .demo import CONFIGS, run_demo, show_demo
    from .show_eval import EvalProgress

    with EvalProgress() as meter:
        result = run_demo(videos=videos, configs=config or CONFIGS, threads=threads, meter=meter)
    _finish(result, lambda: show_demo(result, _console()), json_, output)


@_command
def convert_llava_video(
    source: Annotated[Path, typer.Argument(help="The folder of a checkpoint as lmms-lab published it.")],
    target: Annotated[Path, typer.Argument(help="A new folder.")],
    newline: Annotated[
        Literal["grid", "frame", "one_token"] | None, typer.Option(help="Default: the checkpoint's own.")
    ] = None,
    pool: Annotated[Literal["average"] | None, typer.Option(help="Average, whatever the checkpoint says.")] = None,
    json_: Json = False,
) -> None:
    """Rewrite a LLaVA-Video checkpoint of lmms-lab so that the other commands can load it."""
    from . import convert, show

    with show.Steps() as say:
        found = convert.convert_llava_video(source, target, newline=newline, pool=pool, say=say)
    _finish(found, lambda: typer.echo("\n".join(f"{key}: {value}" for key, value in found.items())), json_, None)


def main(arguments: list[str] | None = None) -> None:
    """Entry point of the `holimerge` command; arguments: instead of the process's own."""
    with contextlib.suppress(BrokenPipeError):
        app(args=arguments, prog_name="holimerge")


if __name__ == "__main__":
    main()
