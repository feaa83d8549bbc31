"""Options that several commands have, with their help. Knows what is typed; refuses to know what it does."""

from pathlib import Path
from typing import Annotated

import typer

Model = Annotated[
    str | None,
    typer.Argument(help="Checkpoint folder, or Hugging Face id. Default: the shipped model."),
]
GpuMemory = Annotated[str | None, typer.Option(help="Device memory for everything, such as 6GiB. Default: no limit.")]
Slots = Annotated[
    str | None,
    typer.Option(help="Expert slots: a count, a share such as 25%, or 16/layer. Default: all the budget buys."),
]
Strategy = Annotated[
    str | None,
    typer.Option(
        help="What to keep in the slots, see `expertflow strategies`. Default: plec with a predictor, else next-use."
    ),
]
Predictor = Annotated[
    str, typer.Option(help="Folder of a trained predictor, auto (the model's own, if it has one), or none.")
]
Device = Annotated[str, typer.Option(help="auto, cuda or cpu.")]
Execution = Annotated[
    str, typer.Option(help="auto, host (decides layer by layer) or graph (a decode step is one CUDA graph).")
]
Dtype = Annotated[str, typer.Option(help="auto (the checkpoint's), float32, bfloat16 or float16.")]
MaxBatch = Annotated[
    int | None, typer.Option(help="Sequences computed together at most. Default: all prompts, at most 8.")
]
MaxLive = Annotated[
    int | None,
    typer.Option(help="Sequences with keys and values at once; they take turns if they are more than --max-batch."),
]
Schedule = Annotated[
    str, typer.Option(help="Who steps together in a turn: fifo (arrival), group (predicted route) or auto.")
]
MaxLength = Annotated[
    int | None, typer.Option(help="Tokens of a sequence, prompt included. Default: what the run needs.")
]
PrefillChunk = Annotated[
    int | None, typer.Option(help="Tokens of one prefill pass. Default: the prompts', at most 512.")
]
HostMemory = Annotated[str | None, typer.Option(help="Host memory the experts may take. Default: what is free.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")]


TraceArgument = Annotated[Path, typer.Argument(help="A trace file.")]
TraceModel = Annotated[
    str | None, typer.Option(help="Checkpoint the trace is of: checks that, and takes the size of an expert.")
]
RecordMb = Annotated[
    float | None,
    typer.Option(
        "--record-mb",
        "--row-mb",
        help="One expert, MB (10^6 bytes), where no model is stated. Default: the trace's own.",
    ),
]
