"""Wishes: sizes, shares, options and strategies, and how bad ones are refused."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from expertflow.cache.strategy import STRATEGIES, find_strategy
from expertflow.config import EngineConfig, SamplingParams
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
    ],
)
def test_values_out_of_range_are_refused(cls: type, options: dict) -> None:
    """Every option is checked when it is stated, not when it first hurts."""
    with pytest.raises(ConfigError):
        cls.from_mapping(options)


def test_an_unknown_strategy_names_the_nearest() -> None:
    """A misspelt strategy is an error that says which row was meant."""
    with pytest.raises(ConfigError, match=r"'lru-globl'.*'lru-global'"):
        find_strategy("lru-globl")


def test_every_row_is_found_by_its_name() -> None:
    """The table's keys are the rows' own names."""
    assert all(find_strategy(name).name == name for name in STRATEGIES)
