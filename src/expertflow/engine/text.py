"""The text side of a model: its tokenizer, loaded once, and the requests that prompts become.

`ModelText` belongs to a checkpoint folder and needs no weights. `RequestFactory` adds what a loaded model decides: the
longest sequence, the vocabulary, and the tokens that end a text. Must not know how requests run.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from expertflow.config import EngineConfig, SamplingParams
from expertflow.engine.inputs import Prompt, PromptReader
from expertflow.engine.plan import DEFAULT_CONTEXT, Plan
from expertflow.engine.planning.pass_size import SMALLEST
from expertflow.engine.request import Decoder, Request
from expertflow.errors import CheckpointError, ConfigError, PromptError
from expertflow.execution.sampling.masks import TokenMask
from expertflow.models.files.identity import beside
from expertflow.models.places import context_of

_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "spiece.model",
    "vocab.json",
    "vocab.txt",
    "tokenizer_config.json",
)
_MAKE_THEM = "Make them: SamplingParams(max_tokens=64)."


class ModelText:
    """The tokenizer of a checkpoint, and what is made of it. Several threads may use it at once.

    Args:
        folder: the checkpoint folder, or a GGUF file.
        tokenizer: folder of another tokenizer than the model's own.

    Attributes:
        folder: the checkpoint.
        tokenizer: its tokenizer; None if there is none.
        decoder: turns tokens into text, see `decoder_of`; None without a tokenizer.
        reader: turns prompts into token ids.

    Raises:
        CheckpointError: if the tokenizer's files cannot be loaded.
        ConfigError: if the folder that was given has no tokenizer.
    """

    def __init__(self, folder: Path, tokenizer: str | None = None) -> None:
        """Load the tokenizer."""
        self.folder = folder
        self.tokenizer = load_tokenizer(folder if tokenizer is None else Path(tokenizer))
        if tokenizer is not None and self.tokenizer is None:
            raise ConfigError(f"tokenizer={tokenizer!r} is no folder with a tokenizer", "It needs tokenizer.json.")
        self.decoder = decoder_of(self.tokenizer)
        self.reader = PromptReader(self.tokenizer)

    def read(self, prompts: Sequence[Any]) -> list[Prompt]:
        """Tokenise prompts.

        Args:
            prompts: each as `PromptReader.read` takes them.

        Raises:
            PromptError: if one is empty or of another kind, or is text and there is no tokenizer.
        """
        return [self.reader.read(index, prompt) for index, prompt in enumerate(prompts)]

    def room_for(self, prompts: Sequence[Prompt], params: SamplingParams) -> dict[str, int]:
        """The smallest engine options with which these prompts run at once; memory that is left over holds slots.

        Args:
            prompts: at least one, from `read`.
            params: how many tokens each generates.

        Returns:
            `max_batch`, at most its default, `max_length`, at most the model's context, and `prefill_chunk` where prompts are
            fewer tokens than the smallest pass otherwise.

        Raises:
            PromptError: if a prompt fills the model's context.
            ConfigError: if a stop text cannot be found in the text, see `stop_tokens`.
        """
        stop_tokens(self.tokenizer, params)
        batch = min(len(prompts), EngineConfig.max_batch)
        lengths = [len(prompt.token_ids) for prompt in prompts]
        longest, most = max(lengths), context_of(self.folder)
        if most is not None and longest >= most:
            raise PromptError(
                f"prompt {lengths.index(longest)} has {longest} tokens; with one to generate, {most} fit", "Shorten it."
            )
        wanted = longest + (params.max_tokens or DEFAULT_CONTEXT)
        length = max(2, wanted if most is None else min(wanted, most))
        chunk = max(1, longest * batch)
        return {"max_batch": batch, "max_length": length, **({"prefill_chunk": chunk} if chunk < SMALLEST else {})}


class RequestFactory:
    """Makes requests of prompts, for one loaded model. Several threads may use it at once.

    Args:
        text: of the model's folder.
        plan: of the model: longest sequence, vocabulary, kind.
        ends: token ids that end a text, see `end_tokens`.
    """

    def __init__(self, text: ModelText, plan: Plan, ends: tuple[int, ...]) -> None:
        """Keep what every request of this model shares."""
        self.text = text
        self._max_length, self._ends = plan.max_length, ends
        self._vocabulary, self._encoder_decoder = plan.shape.vocabulary, plan.shape.encoder_decoder

    def request(
        self, prompt: Any, params: SamplingParams | None = None, index: int = 0, mask: TokenMask | None = None
    ) -> Request:
        """One request.

        Args:
            prompt: text, token ids, chat messages, a `Prompt`, or a mapping with one of these, see `engine.inputs`.
            params: how to sample and stop; None: the defaults of `SamplingParams`.
            index: place of the prompt in its call, for outputs and messages.
            mask: restricts its tokens; None: it may get any.

        Raises:
            PromptError: if the prompt is empty, too long, or of another kind.
            ConfigError: if `params` is no `SamplingParams`, a stop text cannot be found in the text, see `stop_tokens`, or
                `logit_bias` names a token the model does not know.
        """
        params = SamplingParams() if params is None else params
        if not isinstance(params, SamplingParams):
            raise ConfigError(f"params={params!r} is no SamplingParams", _MAKE_THEM)
        text, tokens = self.text.reader.read(index, prompt, self._vocabulary)
        room = self._max_length if self._encoder_decoder else self._max_length - len(tokens)
        if len(tokens) > self._max_length or room < 1:
            raise PromptError(
                f"prompt {index} has {len(tokens)} tokens; with one to generate, {self._max_length} fit",
                "Shorten it, or raise max_length (at most the model's context).",
            )
        if unknown := [token for token in params.logit_bias or () if token >= self._vocabulary]:
            raise ConfigError(
                f"logit_bias names token {unknown[0]}", f"The model knows tokens 0 to {self._vocabulary - 1}."
            )
        if self._encoder_decoder and params.prompt_logprobs is not None:
            raise ConfigError(
                f"prompt_logprobs={params.prompt_logprobs} of a model whose encoder reads the prompt", "Leave it out."
            )
        stops = stop_tokens(self.text.tokenizer, params)
        return Request(
            index=index,
            prompt=text,
            prompt_token_ids=tokens,
            params=params,
            ends={*params.stop_token_ids, *stops, *(() if params.ignore_eos else self._ends)},
            limit=room if params.max_tokens is None else min(params.max_tokens, room),
            decoder=self.text.decoder,
            continues=not self._encoder_decoder,
            mask=mask,
        )

    def requests(
        self, prompts: Sequence[Any], params: SamplingParams | Sequence[SamplingParams] | None = None
    ) -> list[Request]:
        """A request for each prompt; see `request`.

        Args:
            prompts: at least one.
            params: for all, or one for each prompt.

        Raises:
            PromptError: if there is no prompt, a prompt is bad, or the numbers of prompts and parameters differ.
            ConfigError: if `params` holds anything but `SamplingParams`.
        """
        if params is None or isinstance(params, SamplingParams):
            params = [params or SamplingParams()] * len(prompts)
        if not isinstance(params, Sequence) or not all(isinstance(one, SamplingParams) for one in params):
            raise ConfigError(f"params={params!r} is no SamplingParams", _MAKE_THEM)
        if len(params) != len(prompts):
            raise PromptError(
                f"{len(params)} sampling parameters for {len(prompts)} prompts", "Give one a prompt, or one for all."
            )
        if not prompts:
            raise PromptError("there is no prompt", "Give at least one.")
        return [self.request(prompt, one, i) for i, (prompt, one) in enumerate(zip(prompts, params, strict=True))]


def load_tokenizer(place: Path) -> PreTrainedTokenizerBase | None:
    """The tokenizer of a folder, or the one beside a GGUF file; None if there is none.

    Raises:
        CheckpointError: if its files cannot be loaded.
    """
    folder = beside(place)
    if not any((folder / name).is_file() for name in _TOKENIZER_FILES):
        return None
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        # settings of a wrong type show at the first use, which may also change the tokenizer: later ones only read it
        tokenizer.decode(tokenizer("a")["input_ids"])
    except Exception as error:  # the tokenizers library raises plain Exception
        raise CheckpointError(
            f"the tokenizer in {folder} cannot be loaded: {error}", "Fetch it again; code of its own is never run."
        ) from error
    return tokenizer


def decoder_of(tokenizer: PreTrainedTokenizerBase | None) -> Decoder | None:
    """What turns a tokenizer's tokens into text: the tokenizers library where it gives the same text, in a tenth of the time.

    Two calls a token through transformers take longer than everything else that the host does for a step of many sequences.
    """
    if tokenizer is None:
        return None
    fast, own = PreTrainedTokenizerFast, type(tokenizer)
    if getattr(own, "_decode", None) is not fast._decode or own.decode is not fast.decode:  # noqa: SLF001 - there is no public name for it
        return tokenizer
    library = tokenizer.backend_tokenizer
    cleans = tokenizer.clean_up_tokenization_spaces and (
        type(library.model).__name__ != "BPE"  # there transformers cleans up only with the setting below
        or getattr(tokenizer, "clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output", False)
    )
    decoder: Decoder = tokenizer if cleans else library
    return decoder


def stop_tokens(tokenizer: PreTrainedTokenizerBase | None, params: SamplingParams) -> set[int]:
    """Ids of the stop texts that are special tokens, which never show in a text without them.

    Raises:
        ConfigError: if a stop text has a special token in it beside other text, and the text is without these.
    """
    if tokenizer is None or not params.stop or not params.skip_special_tokens:
        return set()
    special = {str(token): number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    for stop in params.stop:
        inside = next((token for token in special if token in stop), None)
        if stop not in special and inside is not None:
            raise ConfigError(
                f"stop={stop!r} contains the special token {inside!r}, which is left out of the text",
                f"Stop at {inside!r} alone, or keep special tokens in the text (skip_special_tokens=False).",
            )
    return {special[stop] for stop in params.stop if stop in special}


def end_tokens(model: PreTrainedModel) -> tuple[int, ...]:
    """Token ids that end a text: from the model's generation config, else from its config."""
    generation = getattr(model, "generation_config", None)
    ends = getattr(generation, "eos_token_id", None)
    if ends is None:
        ends = model.config.get_text_config(decoder=True).eos_token_id
    if ends is None:
        return ()
    return tuple(ends) if isinstance(ends, list | tuple) else (int(ends),)
