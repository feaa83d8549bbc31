"""Wishes: sizes, shares, options and strategies, and how bad ones are refused."""

from dataclasses import dataclass, fields
from typing import Annotated, Any

import pytest
import typer
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from expertflow.cache.strategy import STRATEGIES, find_strategy
from expertflow.cli.main import app
from expertflow.cli.options import Fields, Given, grouped
from expertflow.config import EngineConfig, SamplingParams, doc, options_of
from expertflow.errors import ConfigError
from expertflow.units import format_bytes, parse_bytes, parse_slots


@pytest.mark.parametrize(
    ("text", "size"),
    [("6GiB", 6 * 2**30), ("1.5 GiB", 3 * 2**29), ("500MB", 5 * 10**8), ("2g", 2**31), ("4096", 4096), (77, 77)],
)
def test_sizes_are_read_as_written(text: str | int, size: int) -> None:
    """Binary and decimal units mean what they say; a bare number is bytes."""
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["", "six", "6XB", "-1GiB", "0", "1e9", "GiB"])
def test_a_bad_size_names_option_and_remedy(text: str) -> None:
    """What is no positive size is refused, naming the option and a good example."""
    with pytest.raises(ConfigError, match=r"gpu_memory=.*6GiB"):
        parse_bytes(text, "gpu_memory")


@given(st.integers(min_value=1, max_value=2**45))
def test_format_keeps_three_digits(size: int) -> None:
    """A formatted size, read again, is within a rounding step of the original."""
    text = format_bytes(size).replace(" ", "")
    assert parse_bytes(text) == pytest.approx(size, rel=0.05)


@pytest.mark.parametrize(
    ("text", "slots"),
    [("96", 96), ("25%", 360), ("0.1%", 1), (5000, 1440), (1, 1), ("4/layer", 96), ("90/layer", 1440)],
)
def test_slots_are_a_count_a_share_or_a_size_of_cache(text: str | int, slots: int) -> None:
    """A share is of all experts, rounded down; the paper's cache size is a layer's; more than all experts is all of them."""
    assert parse_slots(text, 24, 60) == slots


@pytest.mark.parametrize("text", ["0", "-3", "0%", "0.01%", "many", "12.5", "%", "0/layer", "/layer", "10%/layer"])
def test_bad_slots_are_refused(text: str) -> None:
    """Less than one slot, or no number at all, is an error."""
    with pytest.raises(ConfigError, match="slots="):
        parse_slots(text, 24, 60)


@pytest.mark.parametrize(
    ("cls", "wrong", "meant"),
    [
        (EngineConfig, "gpu_memroy", "gpu_memory"),
        (EngineConfig, "slot", "slots"),
        (SamplingParams, "temprature", "temperature"),
    ],
)
def test_an_unknown_option_names_the_nearest(cls: type, wrong: str, meant: str) -> None:
    """A misspelt option is an error that says which one was meant."""
    with pytest.raises(ConfigError, match=f"unknown option '{wrong}'.*'{meant}'"):
        cls.from_mapping({wrong: 1})


@pytest.mark.parametrize(
    ("cls", "options"),
    [
        (EngineConfig, {"device": "gpu"}),
        (EngineConfig, {"dtype": "int8"}),
        (EngineConfig, {"max_batch": 0}),
        (EngineConfig, {"max_length": 1}),
        (EngineConfig, {"gpu_memory": "lots"}),
        (EngineConfig, {"host_memory": "-1GiB"}),
        (SamplingParams, {"max_tokens": 0}),
        (SamplingParams, {"temperature": -0.1}),
        (SamplingParams, {"top_k": -1}),
        (SamplingParams, {"top_p": 0.0}),
        (SamplingParams, {"top_p": 1.5}),
        (SamplingParams, {"stop": ("",)}),
        (SamplingParams, {"min_p": 1.01}),
        (SamplingParams, {"presence_penalty": -2.1}),
        (SamplingParams, {"frequency_penalty": float("nan")}),
        (SamplingParams, {"repetition_penalty": 0.0}),
        (SamplingParams, {"min_tokens": 9, "max_tokens": 8}),
        (SamplingParams, {"logprobs": -1}),
        (SamplingParams, {"prompt_logprobs": 1025}),
        (SamplingParams, {"logit_bias": {5: 101}}),
        (SamplingParams, {"logit_bias": {"5": 1}}),
        (SamplingParams, {"logit_bias": [5]}),
    ],
)
def test_values_out_of_range_are_refused(cls: type, options: dict) -> None:
    """Every option is checked when it is stated, not when it first hurts."""
    with pytest.raises(ConfigError):
        cls.from_mapping(options)


def test_an_unknown_strategy_names_the_nearest() -> None:
    """A misspelt strategy is an error that says which entry was meant."""
    with pytest.raises(ConfigError, match=r"'lru-globl'.*'lru-global'"):
        find_strategy("lru-globl")


def test_every_entry_is_found_by_its_name() -> None:
    """The table's keys are the entries' own names."""
    assert all(find_strategy(name).name == name for name in STRATEGIES)


def test_every_field_is_an_option_of_run() -> None:
    """A field of either config is an option under its name, with its text and default; only `progress` is always on there."""
    params = {one.name: one for one in typer.main.get_command(app).commands["run"].params}
    chosen = {"max_batch", "max_length", "prefill_chunk", "seed"}
    for cls in (EngineConfig, SamplingParams):
        assert [option.name for option in options_of(cls)] == [one.name for one in fields(cls)]
        for option in options_of(cls):
            assert option.text.endswith("."), option.name
            assert f"{option.name}: {option.text}" in cls.__doc__
            if not option.typed:
                continue
            param = params[option.off[0] if option.off else option.name]
            assert param.opts == [f"--{param.name.replace('_', '-')}"]
            assert param.help.startswith(
                (option.off[1] if option.off else option.text).replace("`max_batch`", "--max-batch")
            )
            expected = False if option.off else None if option.several or option.name in chosen else option.default
            assert param.default == expected, option.name
    assert params["max_length"].help.endswith("Default: what the run needs.")
    assert params["max_live"].help.endswith("Default: --max-batch.")
    assert params["gpu_memory"].help.endswith("Default: no limit.")


@dataclass(frozen=True, kw_only=True)
class Knobs:
    size: str | int | None = doc("Size of things.", default=None, none="any")
    count: int = doc("How many.", default=3)
    share: float = doc("How much, see `count`.", default=0.5)
    words: str | tuple[str, ...] = doc("A word.", default=())
    numbers: tuple[int, ...] = doc("A number.", default=())
    loud: bool = doc("Print more.", default=False)
    safe: bool = doc("Check all.", default=True, off=("unsafe", "Check nothing."))
    left: int = doc("Not for this command.", default=0)
    inner: bool = doc("Not for a command line.", default=False, typed=False)


def test_a_new_field_is_a_new_option() -> None:
    """One field makes one option of its type: what is given reaches the command by field, what is not is left out or the default."""
    knobs, seen = typer.Typer(), []

    @knobs.command()
    @grouped
    def main(
        *,
        name: Annotated[str, typer.Option()],
        knob: Annotated[Given, Fields(Knobs, without=("left",), defaults={"count": 4}, chosen={"size": "1"})],
    ) -> None:
        seen.append((name, knob))

    def run(*words: str) -> Any:
        return CliRunner().invoke(knobs, [*words])

    assert run("--name", "a").exit_code == 0
    assert seen.pop() == ("a", {"count": 4, "share": 0.5, "loud": False, "safe": True})
    words = "--name b --size 6GiB --count 5 --words x --words y --numbers 1 --loud --unsafe"
    assert run(*words.split(" ")).exit_code == 0
    found = {
        "size": "6GiB",
        "count": 5,
        "share": 0.5,
        "words": ("x", "y"),
        "numbers": (1,),
        "loud": True,
        "safe": False,
    }
    assert seen.pop() == ("b", found)
    for wrong in (["--count", "x"], ["--left", "1"], ["--inner"], ["--numbers", "x"]):
        assert run("--name", "a", *wrong).exit_code == 2
    assert not seen
    shown = " ".join(run("--help").output.split())
    for text in (
        "Size of things. Default: 1.",
        "How many. [default: 4]",
        "How much, see --count.",
        "A word. May be given several times.",
    ):
        assert text in shown.replace("│ │ ", ""), shown
