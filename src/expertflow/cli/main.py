"""The command `expertflow`: options of every command, and nothing else.

Each command's work is in a module of its own, imported when it runs. How a command ends is in `cli/endings.py`; Ctrl-C
ends with exit code 130, as in every program made with typer.
"""

import os
import sys
from importlib import import_module
from io import TextIOWrapper
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from expertflow import __version__
from expertflow.cli.endings import reported
from expertflow.cli.options import (
    DEVICE,
    DTYPE,
    EXPERT_FORMAT,
    PREDICTOR,
    Fields,
    Given,
    Json,
    Model,
    Out,
    PromptsFile,
    RecordMb,
    Skip,
    TraceArgument,
    TraceModel,
    grouped,
)
from expertflow.config import EngineConfig, SamplingParams
from expertflow.serve.options import ServeConfig

app = typer.Typer(
    name="expertflow",
    help="Run Mixture-of-Experts models that do not fit on the GPU, inside a memory budget you state.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


class _TraceGroup(TyperGroup):
    """`trace MODEL ...` means `trace record MODEL ...`."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """Insert `record` before anything that is no subcommand."""
        if args and args[0] not in self.commands:
            args = ["record", *args]
        return super().resolve_command(ctx, args)


trace_app = typer.Typer(
    cls=_TraceGroup, help="Record, inspect and convert routing traces.", no_args_is_help=True,
    context_settings={"ignore_unknown_options": True},
)  # fmt: skip
app.add_typer(trace_app, name="trace")


def _show_version(wanted: bool) -> None:  # noqa: FBT001 - typer calls it
    if wanted:
        print(f"expertflow {__version__}")  # noqa: T201 - the output
        raise typer.Exit


@app.callback()
def options_of_all(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Run Mixture-of-Experts models that do not fit on the GPU, inside a memory budget you state."""


def _arguments() -> Any:
    """The module that checks arguments: imported by commands, but not by `--help`."""
    return import_module("expertflow.cli.arguments")


def _from_file(context: typer.Context, file: Path | None) -> Path | None:
    found: Path | None = import_module("expertflow.cli.stated_file").take_defaults(context, file)
    return found


def _prompts(given: list[str], file: Path | None) -> list[str]:
    prompts: list[str] = import_module("expertflow.prompts").all_prompts(given, file)
    return prompts


def _call(command: str, **options: Any) -> None:
    import_module(f"expertflow.cli.{command}").main(**options)


@app.command()
@grouped
def run(
    *,
    model: Model = None,
    prompt: Annotated[list[str] | None, typer.Option(help="A prompt; may be given several times.")] = None,
    prompts_file: Annotated[
        Path | None, typer.Option(help="A prompt a line, or JSON lines with a field 'prompt'.")
    ] = None,
    engine: Annotated[
        Given,
        Fields(
            EngineConfig,
            chosen={
                "max_batch": f"all prompts, at most {EngineConfig.max_batch}",
                "max_length": "what the run needs",
                "prefill_chunk": "the prompts', or what the plan asks for",
            },
        ),
    ],
    sampling: Annotated[
        Given, Fields(SamplingParams, chosen={"seed": "one is drawn and shown; each prompt adds its place"})
    ],
    results: Annotated[
        Path | None,
        typer.Option(help="Append each finished request to this JSONL file; an existing file is resumed."),
    ] = None,
    json: Json = False,
) -> None:
    """Generate text inside a memory budget, then show what it cost."""
    prompts = _prompts(prompt or [], prompts_file)
    _arguments().check_run(engine, sampling, len(prompts), results)
    _arguments().check_model(model, fetch=True)
    _call(
        "run",
        model=model,
        prompts=prompts,
        engine=engine,
        sampling=sampling,
        results=results,
        as_json=json,
    )


@app.command()
@grouped
def serve(
    *,
    model: Model = None,
    server: Annotated[Given, Fields(ServeConfig, aliases={"max_model_len": "--max-length"})],
    engine: Annotated[
        Given,
        Fields(
            EngineConfig,
            without=("max_length",),
            defaults={"prefix_memory": "auto"},
            aliases={"max_batch": "--max-num-seqs", "prefill_chunk": "--max-num-batched-tokens"},
        ),
    ],
    config: Annotated[
        Path | None,
        typer.Option(
            callback=_from_file, is_eager=True, help="YAML file of these options; the command line counts more."
        ),
    ] = None,
) -> None:
    """Serve a model over HTTP, with OpenAI's API."""
    del config  # its callback has read it
    _arguments().check_serve(server, engine)
    _call("serve", model=model, engine=engine, server=server)


@app.command()
@grouped
def chat(
    *,
    model: Model = None,
    url: Annotated[str | None, typer.Option(help="Server to talk to instead, such as http://127.0.0.1:8000.")] = None,
    api_key: Annotated[str | None, typer.Option(envvar="EXPERTFLOW_API_KEY", help="Key of that server.")] = None,
    system: Annotated[str, typer.Option(help="System message that every chat begins with.")] = "",
    engine: Annotated[Given, Fields(EngineConfig, defaults={"max_batch": 1, "prefix_memory": "auto"})],
    sampling: Annotated[
        Given,
        Fields(
            SamplingParams,
            chosen={
                "max_tokens": "as many as fit",
                **dict.fromkeys(("temperature", "top_k", "top_p"), "what the model's generation_config.json says"),
            },
        ),
    ],
) -> None:
    """Talk to a model in the terminal. /help lists what can be typed beside messages."""
    SamplingParams.from_mapping(sampling)
    if url is None:
        _arguments().check_engine(engine, max_batch=1)
        _arguments().check_model(model, fetch=True)
    _call(
        "chat",
        model=model,
        server=None if url is None else (url, api_key),
        system=system,
        engine=engine,
        sampling=sampling,
    )


@app.command()
@grouped
def plan(
    *,
    model: Model = None,
    engine: Annotated[Given, Fields(EngineConfig, without=("host_memory",), chosen={"max_batch": "1"})],
    json: Json = False,
) -> None:
    """Show what goes where and what a budget buys, from config and headers alone."""
    _arguments().check_engine(engine, max_batch=1)
    _arguments().check_model(model, fetch=False)
    _call("plan", model=model, engine=engine, as_json=json)


@app.command()
def models(json: Json = False) -> None:
    """List the model families."""
    _call("models", as_json=json)


@trace_app.command("record")
@grouped
def trace_record(
    *,
    prompts_file: PromptsFile,
    out: Out,
    model: Model = None,
    engine: Annotated[Given, Fields(EngineConfig, without=("execution",))],
    sampling: Annotated[Given, Fields(SamplingParams, defaults={"seed": 0})],
) -> None:
    """Run a model, offloaded, and record every token's experts (`expertflow trace MODEL` is short for this)."""
    prompts = _prompts([], prompts_file)
    _arguments().check_run(engine, sampling, len(prompts), out)
    _arguments().check_model(model, fetch=True)
    _call("record", model=model, prompts=prompts, out=out, engine=engine, sampling=sampling)


@trace_app.command("info")
def trace_info(trace: TraceArgument, json: Json = False) -> None:
    """Show what is in a trace."""
    import_module("expertflow.cli.trace").info(path=trace, as_json=json)


@trace_app.command("import")
def trace_import(
    source: Annotated[Path, typer.Argument(help="Folder with routing.npz and sequences.json.")],
    out: Out,
    model: Annotated[str, typer.Option(help="Name of the model. Default: the folder's name.")] = "",
    experts: Annotated[int | None, typer.Option(help="Experts a layer. Default: what the data needs.")] = None,
    note: Annotated[str, typer.Option(help="Source and licence of the data.")] = "",
    record_mb: Annotated[float | None, typer.Option(help="One expert, MB (10^6 bytes). Default: unknown.")] = None,
) -> None:
    """Convert a folder of recorded routing into a trace."""
    import_module("expertflow.cli.trace").convert(
        source=source, out=out, model=model, experts=experts, note=note, record_mb=record_mb
    )


@app.command()
def simulate(
    trace: TraceArgument,
    slots: Annotated[str, typer.Option(help="Counts or shares, separated by commas.")] = "12.5%,25%,50%",
    batch: Annotated[
        str, typer.Option(help="Live sequences, separated by commas; 'recorded': the passes as they were recorded.")
    ] = "1,4,8,16",
    strategy: Annotated[str, typer.Option(help="Names separated by commas, or 'all'.")] = "all",
    groups: Annotated[int, typer.Option(help="Groups of the batch that take turns.")] = 1,
    grouping: Annotated[
        str,
        typer.Option(
            help="Divide the groups anew by true paths: swaps (ours) or similar (the paper's). Default: as they arrive."
        ),
    ] = "",
    link_gbps: Annotated[float, typer.Option(help="Bandwidth of the link, GB/s.")] = 50.0,
    model: TraceModel = None,
    record_mb: RecordMb = None,
    copy_us: Annotated[float, typer.Option(help="Fixed cost of a copy, microseconds.")] = 10.0,
    layer_us: Annotated[float, typer.Option(help="A layer without its experts, microseconds.")] = 25.0,
    expert_us: Annotated[float, typer.Option(help="One expert's computation, microseconds.")] = 17.0,
    gate_recall: Annotated[float, typer.Option(help="Share of the path the next-layer gate foresees.")] = 0.85,
    skip: Skip = "repetition",
    seed: Annotated[int, typer.Option(help="Seed of the order of sequences.")] = 0,
    plot: Annotated[Path | None, typer.Option(help="Draw hit ratio and bytes a token against slots.")] = None,
    json: Annotated[Path | None, typer.Option("--json", help="Write everything as JSON.")] = None,
) -> None:
    """Replay a trace with the engine's own decisions, for strategies, slots and batches."""
    _arguments().check_record(record_mb)
    _arguments().check_simulate(trace, slots, batch, strategy, (plot, json))
    _arguments().check_model(model, fetch=False)
    cost = {"link_gbps": link_gbps, "copy_us": copy_us, "layer_us": layer_us, "expert_us": expert_us}
    options = {"groups": groups, "grouping": grouping, "gate_recall": gate_recall, "skip": skip, "seed": seed}
    _call(
        "simulate",
        trace=trace, slots=slots, batch=batch, strategy=strategy, model=model, record_mb=record_mb, cost=cost,
        options=options, plot=plot, json_file=json,
    )  # fmt: skip


@app.command("train-predictor")
def train_predictor(
    trace: TraceArgument,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder to write; an unfinished run in it is continued.")],
    model: Annotated[
        str | None, typer.Option(help="Checkpoint the trace is of; needed to serve it if the trace does not state it.")
    ] = None,
    kind: Annotated[str, typer.Option(help="path (ours), or t5 (the paper's).")] = "path",
    epochs: Annotated[int, typer.Option(help="Passes over the training sequences.")] = 100,
    batch: Annotated[int, typer.Option(help="Windows of a training step.")] = 16,
    rate: Annotated[float, typer.Option(help="Highest learning rate.")] = 2e-3,
    seed: Annotated[int, typer.Option(help="Seed of split, weights and order.")] = 0,
    validation: Annotated[float, typer.Option(help="Share of the sequences that chooses the epoch.")] = 0.1,
    leave_out: Annotated[
        str, typer.Option(help="Keep sequences for a test, such as category=physics; empty: none.")
    ] = "",
    skip: Skip = "repetition",
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
) -> None:
    """Train a routing path predictor from a trace."""
    options = {"epochs": epochs, "batch": batch, "rate": rate, "seed": seed, "device": device}
    _arguments().check_training(trace, out, kind, options, validation)
    _arguments().check_condition(leave_out)
    _arguments().check_model(model, fetch=False)
    module = import_module("expertflow.cli.train_predictor")
    source = module.Source(trace=trace, model=model, skip=skip, leave_out=leave_out, validation=validation)
    module.main(source=source, out=out, kind=kind, options=options)


@app.command("eval-predictor")
def eval_predictor(
    predictor: Annotated[Path, typer.Argument(help="Folder written by train-predictor.")],
    trace: TraceArgument,
    baselines: Annotated[
        Path | None, typer.Option(help="Trace the free baselines learn from. Default: each half from the other.")
    ] = None,
    only: Annotated[str, typer.Option(help="Sequences to take, such as category=physics; empty: all.")] = "",
    leave_out: Annotated[
        str, typer.Option(help="Sequences of --baselines that nothing is learned from, such as category=physics.")
    ] = "",
    batch: Annotated[
        str, typer.Option(help="Live sequences to replay, 4x2: in two groups that take turns; empty: no replay.")
    ] = "1,4,16,4x2",
    slots: Annotated[str, typer.Option(help="Counts or shares, separated by commas.")] = "25%,50%",
    steps: Annotated[int, typer.Option(help="Steps of a replay at most.")] = 2000,
    model: TraceModel = None,
    record_mb: RecordMb = None,
    skip: Skip = "repetition",
    plot: Annotated[Path | None, typer.Option(help="Draw recall a layer, and precision against recall.")] = None,
    json: Annotated[Path | None, typer.Option("--json", help="Write everything as JSON.")] = None,
) -> None:
    """Measure a predictor beside the free baselines, and what it saves in the simulator."""
    evaluation = import_module("expertflow.cli.evaluation")
    test = evaluation.Test(
        trace=trace, free=baselines, only=only, leave_out=leave_out, skip=skip, cases=evaluation.parse_cases(batch),
        slots=tuple(part.strip() for part in slots.split(",")), steps=steps, model=model, record_mb=record_mb,
    )  # fmt: skip
    _arguments().check_evaluation(test, predictor, (plot, json))
    _call("eval_predictor", artifact=predictor, test=test, plot=plot, json_file=json)


@app.command()
def strategies(
    markdown: Annotated[bool, typer.Option("--markdown", help="Print the table of docs/how-it-works.md.")] = False,
) -> None:
    """List the strategies."""
    _call("strategies", markdown=markdown)


@app.command()
def bench(
    preset: Annotated[str, typer.Option(help="quick (minutes on a CPU), or paper (the paper's conditions).")] = "quick",
    model: Annotated[str | None, typer.Option(help="Checkpoint folder or id. Default: the shipped model.")] = None,
    predictor: Annotated[str | None, typer.Option(help=PREDICTOR)] = None,
    strategies: Annotated[str | None, typer.Option(help="Names separated by commas. Default: the preset's.")] = None,
    slots: Annotated[str | None, typer.Option(help="Counts, shares or N/layer, separated by commas.")] = None,
    batches: Annotated[str | None, typer.Option(help="Sequences together, separated by commas.")] = None,
    tokens: Annotated[int | None, typer.Option(help="New tokens of a sequence.")] = None,
    repeats: Annotated[int | None, typer.Option(help="Timed runs of each configuration, in turns.")] = None,
    long_prompt: Annotated[
        int | None, typer.Option(help="Tokens of one long prompt, measured behind; 0: none.")
    ] = None,
    prompts_file: Annotated[
        Path | None, typer.Option(help="A prompt a line, or JSON lines with 'prompt' or 'tokens'.")
    ] = None,
    deadline: Annotated[float | None, typer.Option(help="Seconds after which nothing new is begun.")] = None,
    execution: Annotated[str | None, typer.Option(help="auto, host or graph; several are set side by side.")] = None,
    device: Annotated[str | None, typer.Option(help=DEVICE)] = None,
    dtype: Annotated[str | None, typer.Option(help=DTYPE)] = None,
    expert_format: Annotated[str | None, typer.Option(help=EXPERT_FORMAT)] = None,
    seed: Annotated[int | None, typer.Option(help="Order of the prompts, and what the simulated gate misses.")] = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Write the result here as well.")] = None,
) -> None:
    """Measure every strategy on this machine, each number beside its bound. The last line is the result as JSON."""
    presets = import_module("expertflow.bench.presets")
    options = {
        "model": model, "predictor": predictor, "strategies": presets.names(strategies), "slots": presets.names(slots),
        "batches": presets.numbers(batches, "batches"), "tokens": tokens, "repeats": repeats, "long_prompt": long_prompt,
        "prompts_file": prompts_file, "deadline": deadline, "executions": presets.names(execution), "device": device,
        "dtype": dtype, "expert_format": expert_format, "seed": seed,
    }  # fmt: skip
    _arguments().check_bench(preset, options, out)
    _call("bench", preset=preset, options=options, out=out)


@app.command()
def report(
    results: Annotated[list[Path], typer.Argument(help="Files written by `expertflow bench --out`.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for README.md and the pictures.")] = Path("report"),
) -> None:
    """Write a page with tables and pictures from result files."""
    _call("report", results=results, out=out)


def main() -> None:
    """Entry point."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):  # what a terminal cannot show is written as escapes
            stream.reconfigure(errors="backslashreplace")
    if not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME"} & set(os.environ):
        os.environ["OMP_WAIT_POLICY"] = "passive"  # waiting threads would starve the one they wait for; torch reads it
    with reported():
        app(standalone_mode=True)


if __name__ == "__main__":
    main()
