"""`expertflow trace MODEL`: run prompts through an offloaded model and record every token's experts."""

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from transformers.utils import logging as transformers_logging

from expertflow.config import SamplingParams
from expertflow.engine.llm import LLM, shipped_model
from expertflow.progress import Progress
from expertflow.units import format_bytes


def main(*, model: str | None, prompts: list[str], out: Path, engine: dict[str, Any], sampling: dict[str, Any]) -> None:
    """Load, generate, record."""
    params = SamplingParams.from_mapping(sampling)
    transformers_logging.set_verbosity_error()
    console = Console(stderr=True)
    folder = shipped_model() if model is None else model
    # the host execution: captured steps keep the routing on the device
    with LLM(folder, execution="host", progress=True, **engine) as llm, llm.record(out):
        with Progress("recording prompts", len(prompts)) as bar:
            for item in llm.stream(prompts, params):
                if item.output is not None:
                    bar.advance()
        tokens = llm.stats.tokens
    console.print(
        f"{escape(str(out))}: {len(prompts)} prompts, {tokens} generated tokens, {format_bytes(out.stat().st_size)}"
    )
