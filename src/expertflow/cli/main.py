"""The command `expertflow`: options of every command, and nothing else.

Each command's work is in a module of its own, imported when it runs. Errors of our tree become one clear line and
exit code 2; Ctrl-C becomes exit code 130.
"""

from importlib import import_module
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

from expertflow.errors import ExpertFlowError

app = typer.Typer(
    name="expertflow",
    help="Run Mixture-of-Experts models that do not fit on the GPU, inside a memory budget you state.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

Model = Annotated[
    str | None,
    typer.Argument(help="Checkpoint folder, or Hugging Face id. Default: the shipped model."),
]
GpuMemory = Annotated[str | None, typer.Option(help="Device memory for everything, such as 6GiB. Default: no limit.")]
Slots = Annotated[
    str | None, typer.Option(help="Expert slots: a count, or a share such as 25%. Default: all the budget buys.")
]
Strategy = Annotated[str, typer.Option(help="What to keep in the slots.")]
Device = Annotated[str, typer.Option(help="auto, cuda or cpu.")]
Dtype = Annotated[str, typer.Option(help="auto (the checkpoint's), float32, bfloat16 or float16.")]
MaxBatch = Annotated[
    int | None, typer.Option(help="Sequences computed together at most. Default: all prompts, at most 8.")
]
MaxLength = Annotated[
    int | None, typer.Option(help="Tokens of a sequence, prompt included. Default: what the run needs.")
]
PrefillChunk = Annotated[
    int | None, typer.Option(help="Tokens of one prefill pass. Default: the prompts', at most 512.")
]
HostMemory = Annotated[str | None, typer.Option(help="Host memory the experts may take. Default: what is free.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")]


def _call(command: str, **options: Any) -> None:
    import_module(f"expertflow.cli.{command}").main(**options)


@app.command()
def run(
    model: Model = None,
    prompt: Annotated[list[str] | None, typer.Option(help="A prompt; may be given several times.")] = None,
    prompts_file: Annotated[
        Path | None, typer.Option(help="A prompt a line, or JSON lines with a field 'prompt'.")
    ] = None,
    gpu_memory: GpuMemory = None,
    slots: Slots = None,
    strategy: Strategy = "lru",
    max_tokens: Annotated[int, typer.Option(help="Tokens to generate at most, a prompt.")] = 128,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
    top_k: Annotated[int, typer.Option(help="Sample among the k most probable tokens; 0: all.")] = 0,
    top_p: Annotated[
        float, typer.Option(help="Sample among the most probable tokens of this total probability.")
    ] = 1.0,
    seed: Annotated[int, typer.Option(help="Seed of the sampling.")] = 0,
    stop: Annotated[
        list[str] | None, typer.Option(help="Text that ends the generation; may be given several times.")
    ] = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    max_batch: MaxBatch = None,
    max_length: MaxLength = None,
    prefill_chunk: PrefillChunk = None,
    host_memory: HostMemory = None,
    json: Json = False,
) -> None:
    """Generate text inside a memory budget, then say what it cost."""
    engine = {
        "gpu_memory": gpu_memory, "slots": slots, "strategy": strategy, "device": device, "dtype": dtype,
        "prefill_chunk": prefill_chunk, "host_memory": host_memory, "max_batch": max_batch, "max_length": max_length,
    }  # fmt: skip
    sampling = {
        "max_tokens": max_tokens, "temperature": temperature, "top_k": top_k, "top_p": top_p, "seed": seed,
        "stop": tuple(stop or ()),
    }  # fmt: skip
    _call(
        "run",
        model=model,
        prompts=prompt or [],
        prompts_file=prompts_file,
        engine=engine,
        sampling=sampling,
        as_json=json,
    )


@app.command()
def plan(
    model: Model = None,
    gpu_memory: GpuMemory = None,
    slots: Slots = None,
    strategy: Strategy = "lru",
    device: Device = "auto",
    dtype: Dtype = "auto",
    max_batch: MaxBatch = None,
    max_length: MaxLength = None,
    prefill_chunk: PrefillChunk = None,
    json: Json = False,
) -> None:
    """Say what goes where and what a budget buys, from config and headers alone."""
    engine = {
        "gpu_memory": gpu_memory, "slots": slots, "strategy": strategy, "device": device, "dtype": dtype,
        "prefill_chunk": prefill_chunk, "max_batch": max_batch, "max_length": max_length,
    }  # fmt: skip
    _call("plan", model=model, engine=engine, as_json=json)


@app.command()
def models(json: Json = False) -> None:
    """List the model families."""
    _call("models", as_json=json)


def main() -> None:
    """Entry point."""
    try:
        app(standalone_mode=True)
    except ExpertFlowError as error:
        Console(stderr=True).print(f"[bold red]error:[/] {escape(str(error))}", soft_wrap=True, highlight=False)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        Console(stderr=True).print("interrupted")
        raise SystemExit(130) from None


if __name__ == "__main__":
    main()
