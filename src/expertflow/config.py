"""Every option of the engine and of sampling, declared once: name, type, default, what it does; checked when made.

An option is one field with `doc`: `options_of` lists them, and the command line is made from that list (`cli/options.py`).
Frozen and keyword-only. An unknown key is an error that names the nearest one. Must not know models and devices.
"""

import difflib
import operator
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from math import inf
from types import MappingProxyType, NoneType
from typing import Any, NamedTuple, Self, TypeVar, get_args, get_origin

from expertflow.errors import ConfigError
from expertflow.formats.dtypes import RUN_DTYPES
from expertflow.units import parse_bytes, read_slots

DEVICES = ("auto", "cuda", "cpu")
DTYPES = ("auto", *RUN_DTYPES)
EXECUTIONS = ("auto", "host", "graph")
SCHEDULES = ("auto", "fifo", "group")
EXPERT_FORMATS = ("fp8", "int4", "mxfp4")
"""Formats that experts can be quantised to, by their names in `formats.table`."""
_NO_CODE = "Leave it out: code that comes with a checkpoint is never run."
_FETCH = "Fetch it first (`hf download ID --local-dir FOLDER` takes this option), and give the folder as the model."
_PLACE = "Leave it out: `gpu_memory` or `slots` states how much of the model is on the device."
_QUANTISE = "Use `expert_format` to quantise experts on loading; a packed checkpoint says by itself how it is packed."
_WEIGHTS = "Leave it out: the checkpoint's weights run in `dtype`, float32, bfloat16 or float16."
OF_OTHERS = MappingProxyType({
    "torch_dtype": "Use `dtype`.",
    "attn_implementation": "Only `from_pretrained` takes it: the captured steps of `LLM` have an attention kernel of their own.",
    "experts_implementation": "Leave it out: experts are offloaded, with the bits of `experts_implementation='eager'`.",
    "device_map": "Use `device`; `gpu_memory` or `slots` states how much of the model is on it.",
    "max_memory": "Use `gpu_memory` and `host_memory`.",
    "low_cpu_mem_usage": "Leave it out: every weight is read once, into its place.",
    "trust_remote_code": _NO_CODE,
    "code_revision": _NO_CODE,
    "use_safetensors": "Leave it out: only safetensors files are read.",
    "config": "Leave it out: the folder's config.json describes the model.",
    "gguf_file": "Give the file's path as the model.",
    "generation_config": "Set `model.generation_config` once it is loaded.",
    "adapter_kwargs": "Add adapters once the model is loaded.",
    "output_loading_info": "Leave it out: a weight that is missing or of another shape is an error.",
    "ignore_mismatched_sizes": "Leave it out: a weight that is missing or of another shape is an error.",
    **dict.fromkeys(("offload_folder", "offload_state_dict", "offload_buffers", "tp_plan", "tp_size", "device_mesh"), _PLACE),
    **dict.fromkeys(("quantization_config", "load_in_8bit", "load_in_4bit"), _QUANTISE),
    "state_dict": _WEIGHTS,
    **dict.fromkeys(("revision", "token", "use_auth_token", "cache_dir", "subfolder", "variant"), _FETCH),
    **dict.fromkeys(("local_files_only", "force_download", "resume_download", "proxies"), _FETCH),
})  # fmt: skip
"""Options of transformers' `from_pretrained` that do not exist here, and what to do in place of each."""
_Class = TypeVar("_Class", bound=type)
_READ_ELSEWHERE = ("stop", "stop_token_ids", "device", "dtype", "logit_bias")
"""Fields with rules of their own for what they take."""
MOST_LOGPROBS = 1024
"""Most probable tokens that may be asked for."""


def nearest(word: str, known: Iterable[str]) -> str:
    """Name the nearest known word, or list them all: the remedy of an unknown name."""
    names = sorted(known)
    close = difflib.get_close_matches(word, names, n=1, cutoff=0.5)
    return f"Did you mean {close[0]!r}?" if close else f"Known: {', '.join(names)}."


def _require(ok: bool, what: str, remedy: str) -> None:  # noqa: FBT001 - the condition reads best first
    if not ok:
        raise ConfigError(what, remedy)


class Option(NamedTuple):
    """One option, as a command line or a server declares it.

    Attributes:
        name: of the field.
        kind: type of one value: str, int, float or bool.
        several: whether it takes several values.
        default: of the field.
        text: what it does, in whole sentences; other options stand in backticks.
        none: what None means; empty if it cannot be None.
        off: for an option that is on by default: name and text of the switch that turns it off, else empty.
        typed: whether it is of use on a command line.
    """

    name: str
    kind: type
    several: bool
    default: Any
    text: str
    none: str
    off: tuple[str, str] | tuple[()]
    typed: bool


def check_device(name: str) -> None:
    """Refuse what names no device: `auto`, `cpu`, `cuda` and `cuda:N` do.

    Raises:
        ConfigError: then.
    """
    known = name in DEVICES or re.fullmatch(r"cuda:[0-9]{1,3}|cpu:0", name)
    _require(bool(known), f"device={name!r} is unknown", nearest(name, DEVICES))


def check_expert_format(name: str | None) -> None:
    """Refuse what names no format that experts can be quantised to; None does none.

    Raises:
        ConfigError: then.
    """
    known = name is None or name in EXPERT_FORMATS
    _require(known, f"expert_format={name!r} is unknown", nearest(str(name), EXPERT_FORMATS))


def doc(text: str, *, default: Any, none: str = "", off: tuple[str, str] | tuple[()] = (), typed: bool = True) -> Any:
    """A dataclass field that is an option; see `Option`."""
    return field(default=default, metadata={"text": text, "none": none, "off": off, "typed": typed})


def options_of(cls: type) -> tuple[Option, ...]:
    """The options of `EngineConfig` or `SamplingParams`, in the order of their fields."""
    found = []
    for one in fields(cls):
        kinds = [kind for kind in _parts(one.type) if kind is not NoneType]
        lists = [kind for kind in kinds if get_origin(kind) is tuple]
        kind = get_args(lists[0])[0] if lists else kinds[0]
        found.append(Option(name=one.name, kind=kind, several=bool(lists), default=one.default, **one.metadata))
    return tuple(found)


def _parts(kind: Any) -> tuple[Any, ...]:
    """The members of a union; a type that is none is its own only member."""
    return (kind,) if isinstance(kind, type) or get_origin(kind) is tuple else get_args(kind)


def _documented(cls: _Class) -> _Class:
    """Add the options to the class's docstring."""
    lines = [
        f"        {option.name}: {option.text}{f' None: {option.none}.' if option.none else ''}"
        for option in options_of(cls)
    ]
    cls.__doc__ = f"{cls.__doc__}\n\n    Attributes:\n" + "\n".join(lines)
    return cls


def _read_types(options: Any) -> None:
    """Turn numbers of other libraries into Python's, and refuse values of another type than the field has.

    Raises:
        ConfigError: naming the option, its value and what it takes.
    """
    for one in fields(options):
        kinds = [one.type.__name__] if isinstance(one.type, type) else str(one.type).split(" | ")
        value = getattr(options, one.name)
        if one.name in _READ_ELSEWHERE or get_origin(one.type) is tuple or (value is None and "None" in kinds):
            continue
        read = next((found for kind in kinds if (found := _read_as(kind, value)) is not None), None)
        _require(
            read is not None,
            f"{one.name}={value!r} is of type {type(value).__name__}",
            f"It takes {' or '.join(kinds)}.",
        )
        object.__setattr__(options, one.name, read)


def _read_as(kind: str, value: Any) -> Any:
    """A value as one of Python's types; None if it is none of these."""
    if kind == "bool":
        return bool(value) if type(value).__name__ in ("bool", "bool_") else None
    if type(value).__name__ in ("bool", "bool_"):
        return None
    if kind == "int":
        return operator.index(value) if hasattr(value, "__index__") else None
    if kind == "float":
        large = isinstance(value, int) and abs(value) > 2**63
        return float(value) if hasattr(value, "__float__") and not isinstance(value, str) and not large else None
    return os.fspath(value) if kind == "str" and isinstance(value, str | os.PathLike) else None


def _read_several(name: str, value: Any, kind: type) -> tuple[Any, ...]:
    """One or several values of a type, as a tuple.

    Raises:
        ConfigError: if one of them is of another type.
    """
    listed = (value,) if isinstance(value, str | bytes) or not isinstance(value, Iterable) else tuple(value)
    read = tuple(_read_as(kind.__name__, one) for one in listed)
    for one, found in zip(listed, read, strict=True):
        _require(found is not None, f"{name} holds {one!r}, of type {type(one).__name__}", f"It takes {kind.__name__}.")
    return read


class _Checked:
    @classmethod
    def from_mapping(cls, options: Mapping[str, Any]) -> Self:
        """Build from plain options.

        Raises:
            ConfigError: for a key that is no option (names the nearest) or a value out of range.
        """
        known = [f.name for f in fields(cls)]  # type: ignore[arg-type]  # every subclass is a dataclass
        for key in options:
            if key not in known:
                raise ConfigError(f"unknown option {key!r}", OF_OTHERS.get(key) or nearest(key, known))
        return cls(**options)


@_documented
@dataclass(frozen=True, kw_only=True)
class EngineConfig(_Checked):
    """How to run a model. `engine.prepare` turns these options into choices and numbers, or refuses them."""

    gpu_memory: str | int | None = doc("Device memory for everything, such as 6GiB.", default=None, none="no limit")
    slots: str | int | None = doc(
        "Expert slots: a count, a share such as 25%, or 16/layer.", default=None, none="all the budget buys"
    )
    strategy: str | None = doc(
        "What to load ahead and what to keep in the slots, see `expertflow strategies`.",
        default=None,
        none="plec with a predictor, else next-use",
    )
    predictor: str = doc(
        "Folder of a trained predictor, auto (the model's own, if it has one), or none.", default="auto"
    )
    tokenizer: str | None = doc(
        "Folder of the tokenizer and chat template.",
        default=None,
        none="the model's own, for a GGUF file the one beside it",
    )
    max_batch: int = doc("Sequences computed together at most.", default=8)
    max_live: int | None = doc(
        "Sequences that have keys and values at once. If they are more than `max_batch`, they take turns.",
        default=None,
        none="`max_batch`",
    )
    schedule: str = doc(
        "How sequences take turns when more are live than one step computes: fifo (by arrival), group (those with similar "
        "predicted routes together), or auto (whichever is expected to cost less).",
        default="auto",
    )
    max_length: int | None = doc(
        "Tokens of a sequence, prompt included.", default=None, none="the model's context, at most 4096"
    )
    kv_tokens: int | None = doc(
        "Tokens of keys and values of all live sequences together. A request is admitted once its prompt and answer fit.",
        default=None,
        none="`max_live` x `max_length`, or what half of the budget left beside weights and workspace holds",
    )
    prefill_chunk: int | None = doc(
        "Tokens of one prefill pass, over all its sequences.",
        default=None,
        none="as many as are computed while missing experts are copied; at least 512, at most 8192 or what an eighth of the budget holds",
    )
    batch_invariant: bool = doc(
        "Let no bit of an answer depend on other requests: decode steps of one size, one prompt a pass. Needs graph execution.",
        default=False,
    )
    device: str = doc("auto, cpu, cuda, or cuda:N.", default="auto")
    dtype: str = doc("auto (the checkpoint's), float32, bfloat16 or float16.", default="auto")
    expert_format: str | None = doc(
        "Quantise the experts of a plain checkpoint while it is loaded, to fp8, int4 or mxfp4. This changes the model's answers.",
        default=None,
        none="experts stay as they are stored",
    )
    execution: str = doc(
        "graph (a decode step is one CUDA graph that decides on the GPU), host (the host decides layer by layer), or auto "
        "(graph on CUDA where family, strategy and budget allow it).",
        default="auto",
    )
    host_memory: str | int | None = doc(
        "Host memory that the expert store may take, such as 64GiB.", default=None, none="what is free now"
    )
    prefix_memory: str | int = doc(
        "Host memory for keys and values of earlier prompts, such as 4GiB: a prompt that begins as one of them is read from there on. "
        "0: none; auto: 4GiB or 32 full prompts, where the model allows it.", default="0",
    )  # fmt: skip
    prefix_generated: bool = doc(
        "Keep those of generated tokens as well: a next turn reads less, and the last bits of its logits may differ.", default=False
    )  # fmt: skip
    progress: bool = doc("Show progress bars on long work.", default=False, typed=False)

    def __post_init__(self) -> None:
        """Refuse values that mean nothing."""
        _read_types(self)
        for name in ("device", "dtype"):  # torch's own objects, by the names that torch prints
            object.__setattr__(self, name, str(getattr(self, name)).removeprefix("torch."))
        check_device(self.device)
        _require(self.dtype in DTYPES, f"dtype={self.dtype!r} is unknown", nearest(self.dtype, DTYPES))
        _require(
            self.execution in EXECUTIONS,
            f"execution={self.execution!r} is unknown",
            nearest(self.execution, EXECUTIONS),
        )
        _require(
            self.schedule in SCHEDULES, f"schedule={self.schedule!r} is unknown", nearest(self.schedule, SCHEDULES)
        )
        check_expert_format(self.expert_format)
        _require(
            self.max_live is None or self.max_live >= self.max_batch,
            f"max_live={self.max_live} is less than max_batch={self.max_batch}",
            "A step cannot have more sequences than live; raise max_live, or lower max_batch.",
        )
        for name in ("max_batch", "prefill_chunk"):
            value = getattr(self, name)
            _require(value is None or value >= 1, f"{name}={value} is too small", "Use 1 or more.")
        for name, most in (
            ("max_batch", 2**20),
            ("max_live", 2**20),
            ("prefill_chunk", 2**31),
            ("max_length", 2**31),
            ("kv_tokens", 2**40),
        ):
            value = getattr(self, name) or 0
            _require(value <= most, f"{name}={value} is too large", f"Use {most} or less.")
        _require(
            self.max_length is None or self.max_length >= 2,
            f"max_length={self.max_length} is too small",
            "Leave room for one prompt token and one generated token.",
        )
        _require(
            self.kv_tokens is None or self.kv_tokens >= (self.max_length or 2),
            f"kv_tokens={self.kv_tokens} is less than max_length={self.max_length or 2}: one such sequence would not fit",
            "Raise kv_tokens, or lower max_length.",
        )
        kept = None if str(self.prefix_memory) in ("0", "auto") else self.prefix_memory
        for name, size in (("gpu_memory", self.gpu_memory), ("host_memory", self.host_memory), ("prefix_memory", kept)):
            if size is not None:
                parse_bytes(size, name)
        if self.slots is not None:
            read_slots(self.slots)


@_documented
@dataclass(frozen=True, kw_only=True)
class SamplingParams(_Checked):
    """How to choose tokens and when to stop."""

    max_tokens: int | None = doc("Tokens to generate at most, for each prompt.", default=128, none="as many as fit")
    temperature: float = doc("0 is greedy; larger is more random.", default=0.0)
    top_k: int = doc("Sample among the k most probable tokens; 0: all.", default=0)
    top_p: float = doc("Sample among the most probable tokens that together reach this probability.", default=1.0)
    min_p: float = doc(
        "Sample among tokens that are at least this share as probable as the most probable one; 0: all.", default=0.0
    )
    presence_penalty: float = doc(
        "Taken from the logit of every token that was generated before, -2 to 2.", default=0.0
    )
    frequency_penalty: float = doc(
        "Taken from a token's logit for each time that it was generated before, -2 to 2.", default=0.0
    )
    repetition_penalty: float = doc(
        "Divides positive logits, and multiplies others, of tokens of the prompt and of the answer so far; 1: not.",
        default=1.0,
    )
    logit_bias: dict[int, float] | None = doc(  # noqa: RUF009 - as every other field
        "What is added to the logits of tokens, by token id, -100 to 100.", default=None, none="nothing", typed=False
    )
    min_tokens: int = doc("Tokens to generate before a token or text may end the generation.", default=0)
    logprobs: int | None = doc(
        "Give each token's log-probability, and those of so many most probable tokens beside it.",
        default=None,
        none="they are not computed",
    )
    prompt_logprobs: int | None = doc(
        "The same of the prompt's tokens, given those before them.", default=None, none="they are not computed"
    )
    seed: int | None = doc("Seed of the random numbers.", default=None, none="one is drawn")
    stop: str | tuple[str, ...] = doc("Text that ends the generation; it is not part of the output.", default=())
    stop_token_ids: tuple[int, ...] = doc("Token id that ends the generation, beside the model's own.", default=())
    ignore_eos: bool = doc("Go on after the model's end-of-text token.", default=False)
    skip_special_tokens: bool = doc(
        "Leave special tokens out of the text.",
        default=True,
        off=("keep_special_tokens", "Keep special tokens in the text."),
    )

    def __post_init__(self) -> None:
        """Refuse values that mean nothing."""
        _read_types(self)
        for name, kind in (("stop", str), ("stop_token_ids", int)):
            object.__setattr__(self, name, _read_several(name, getattr(self, name), kind))
        _require(
            self.max_tokens is None or self.max_tokens >= 1,
            f"max_tokens={self.max_tokens} is too small",
            "Use 1 or more.",
        )
        _require(
            self.temperature == 0 or 1e-3 <= self.temperature < inf,
            f"temperature={self.temperature} is {'negative' if self.temperature < 0 else 'too small, or no number'}",
            "Use 0 (greedy), or 0.001 and more.",
        )
        _require(
            self.seed is None or 0 <= self.seed < 2**63, f"seed={self.seed} is out of range", "Use 0 to 2**63 - 1."
        )
        _require(self.top_k >= 0, f"top_k={self.top_k} is negative", "Use 0 (no limit) or more.")
        _require(0 < self.top_p <= 1, f"top_p={self.top_p} is not a probability", "Use a value in (0, 1].")
        _require(all(self.stop), "stop contains an empty text", "Remove it: an empty text would stop at once.")
        _require(0 <= self.min_p <= 1, f"min_p={self.min_p} is no share", "Use a value from 0 (all) to 1.")
        for name in ("presence_penalty", "frequency_penalty"):
            value = getattr(self, name)
            _require(-2 <= value <= 2, f"{name}={value} is out of range", "Use a value from -2 to 2; 0 is none.")
        _require(
            1e-3 <= self.repetition_penalty <= 1e3,
            f"repetition_penalty={self.repetition_penalty} is out of range",
            "Use a value from 0.001 to 1000, such as 1.1; 1 is none.",
        )
        _require(
            0 <= self.min_tokens <= (inf if self.max_tokens is None else self.max_tokens),
            f"min_tokens={self.min_tokens} is negative, or more than max_tokens={self.max_tokens}",
            "Use 0 (none) to max_tokens.",
        )
        for name in ("logprobs", "prompt_logprobs"):
            value = getattr(self, name)
            _require(
                value is None or 0 <= value <= MOST_LOGPROBS,
                f"{name}={value} is out of range",
                f"Use 0 (the token's own) to {MOST_LOGPROBS}.",
            )
        object.__setattr__(self, "logit_bias", _read_bias(self.logit_bias))

    @property
    def changes_logits(self) -> bool:
        """Whether logits of single tokens are changed before one is chosen: by penalties, bias or `min_tokens`."""
        penalties = self.presence_penalty, self.frequency_penalty, self.repetition_penalty - 1
        return any(penalties) or bool(self.logit_bias) or self.min_tokens > 0


def _read_bias(value: Any) -> dict[int, float] | None:
    """Token ids and what is added to their logits.

    Raises:
        ConfigError: if it is something else, or out of range.
    """
    if value is None:
        return None
    _require(isinstance(value, Mapping), f"logit_bias={value!r} is no mapping", "Map token ids to -100 to 100.")
    read = {}
    for token, bias in value.items():
        number, amount = _read_as("int", token), _read_as("float", bias)
        _require(
            number is not None and number >= 0 and amount is not None and -100 <= amount <= 100,
            f"logit_bias adds {bias!r} to token {token!r}",
            "Map token ids to values from -100 to 100.",
        )
        read[number] = amount
    return read
