"""The part of `expertflow chat` that loads a model here. Imports torch."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

from transformers.utils import logging as transformers_logging

from expertflow.config import SamplingParams
from expertflow.engine.llm import LLM


class Here:
    """A model in this process.

    Args:
        llm: the model.
        params: how to sample.
    """

    def __init__(self, llm: LLM, params: SamplingParams) -> None:
        """Keep both."""
        self.name, self._llm, self._params = llm.name, llm, params

    def answer(self, messages: list[dict[str, str]]) -> Iterator[str]:
        """The pieces of an answer."""
        for output in self._llm.stream([messages], self._params):
            yield output.text


def main(
    model: str | None,
    system: str,
    engine: Mapping[str, Any],
    sampling: Mapping[str, Any],
    talk: Callable[[Here, str], None],
) -> None:
    """Load a model, then talk."""
    transformers_logging.set_verbosity_error()
    with LLM(model, progress=True, **engine) as llm:
        talk(Here(llm, replace(llm.chat_params, **sampling)), system)
