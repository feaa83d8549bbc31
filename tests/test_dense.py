"""The kernels of a step's dense part do what their references do, and depend on nothing they should not."""

import pytest
import torch

from expertflow.kernels import dense, dense_reference
from helpers import DEVICE

CLOSE = {torch.float32: 1e-5, torch.bfloat16: 1e-2}


def draw(
    seed: int, dtype: torch.dtype, rows: int = 3, length: int = 300
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, tuple[torch.Tensor, torch.Tensor]]:
    """Query, keys, values (views of longer rows, in another order), rows and positions; columns behind are poison."""
    random = torch.Generator().manual_seed(seed)
    query = torch.randn(rows, 6, 16, generator=random).to(dtype)
    held = torch.randn(2, rows + 1, 2, 400, 16, generator=random).to(dtype)
    order, positions = torch.tensor([2, 0, 3])[:rows], torch.tensor([0, 299, 70])[:rows]
    for row, position in zip(order.tolist(), positions.tolist(), strict=True):
        held[:, row, :, position + 1 :] = 1e4
    keys, values = held[:, :, :, :length].to(DEVICE)
    return query.to(DEVICE), keys, values, (order.to(DEVICE), positions.to(DEVICE))


@pytest.mark.parametrize("dtype", CLOSE)
@pytest.mark.parametrize("window", [None, 90])
@pytest.mark.parametrize("sink", [False, True])
def test_attention_is_the_references(dtype: torch.dtype, window: int | None, sink: bool) -> None:
    """Over one span and several, with and without window and sinks."""
    query, keys, values, where = draw(1, dtype)
    sinks = torch.randn(6, generator=torch.Generator().manual_seed(2)).to(DEVICE, dtype) if sink else None
    mine = dense.decode_attention(query, keys, values, where, 0.3, window, sinks)
    theirs = dense_reference.decode_attention(query, keys, values, where, 0.3, window, sinks)
    torch.testing.assert_close(mine, theirs, atol=CLOSE[dtype], rtol=CLOSE[dtype])


def test_attention_bits_depend_on_the_sequence_alone() -> None:
    """Neither the columns a step looks at nor the other sequences change a bit."""
    query, keys, values, (rows, positions) = draw(3, torch.bfloat16)
    whole = dense.decode_attention(query, keys, values, (rows, positions), 0.3)
    alone = dense.decode_attention(query[2:], keys[:, :, :128], values[:, :, :128], (rows[2:], positions[2:]), 0.3)
    assert torch.equal(whole[2:], alone)


def test_more_spans_than_are_joined_at_once() -> None:
    """A long sequence beside a short one, which has the bits that it has alone; nothing behind either is read."""
    random, length = torch.Generator().manual_seed(8), dense.AHEAD.value * dense_reference.SPAN + 300
    query = torch.randn(2, 2, 16, generator=random).to(DEVICE)
    keys, values = torch.randn(2, 2, 1, length, 16, generator=random).to(DEVICE)
    where = torch.tensor([1, 0], device=DEVICE), torch.tensor([length - 7, 300], device=DEVICE)
    expected = dense_reference.decode_attention(query, keys, values, where, 0.3)
    for kept in (keys, values):
        kept[1, :, length - 6 :] = kept[0, :, 301:] = torch.nan
    found = dense.decode_attention(query, keys, values, where, 0.3)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    alone = dense.decode_attention(query[1:], keys[:, :, :512], values[:, :, :512], (where[0][1:], where[1][1:]), 0.3)
    assert torch.equal(found[1:], alone)


@pytest.mark.parametrize("window", [1, 2, 257, 600])
def test_a_window_far_from_the_beginning_is_all_that_is_read(window: int) -> None:
    """Spans are counted from the window's first column; what lies before it is no number. Sinks count once."""
    random = torch.Generator().manual_seed(7)
    query = torch.randn(2, 6, 16, generator=random).to(DEVICE)
    keys, values = torch.randn(2, 3, 2, 1300, 16, generator=random).to(DEVICE)
    sinks = torch.randn(6, generator=random).to(DEVICE)
    where = torch.tensor([2, 0], device=DEVICE), torch.tensor([1290, 511], device=DEVICE)
    expected = dense_reference.decode_attention(query, keys, values, where, 0.3, window, sinks)
    for row, position in zip(*(one.tolist() for one in where), strict=True):
        for kept in (keys, values):
            kept[row, :, : max(0, position - window + 1)] = kept[row, :, position + 1 :] = torch.nan
    for columns in (1300, 1291):
        found = dense.decode_attention(query, keys[:, :, :columns], values[:, :, :columns], where, 0.3, window, sinks)
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", CLOSE)
@pytest.mark.parametrize("window", [None, 90])
def test_attention_adds_a_bias_by_distance(dtype: torch.dtype, window: int | None) -> None:
    """A table of M distances a head, of which the kernel reads as many as a sequence is long; checked against plain indexing."""
    query, keys, values, where = draw(5, dtype)
    table = torch.randn(6, 310, generator=torch.Generator().manual_seed(6)).to(DEVICE, dtype)
    mine = dense.decode_attention(query, keys, values, where, 0.3, window, None, table)
    theirs = dense_reference.decode_attention(query, keys, values, where, 0.3, window, None, table)
    torch.testing.assert_close(mine, theirs, atol=CLOSE[dtype], rtol=CLOSE[dtype])
    row, position = where[0][2], int(where[1][2])  # the last sequence, as one would write it down
    begin = 0 if window is None else max(0, position - window + 1)
    seen = keys[row, :, begin : position + 1].float().repeat_interleave(3, dim=0)
    scores = (seen @ query[2].float()[:, :, None])[:, :, 0] * 0.3
    scores += table[:, : position + 1 - begin].float().flip(1)
    plain = scores.softmax(1)[:, None] @ values[row, :, begin : position + 1].float().repeat_interleave(3, dim=0)
    torch.testing.assert_close(theirs[2].float(), plain[:, 0], atol=CLOSE[dtype], rtol=CLOSE[dtype])


@pytest.mark.parametrize("dtype", CLOSE)
@pytest.mark.parametrize("wide", [False, True])
def test_norm_is_the_references(dtype: torch.dtype, wide: bool) -> None:
    """For widths that are no power of two as well."""
    states = torch.randn(2, 3, 48, generator=torch.Generator().manual_seed(4)).to(DEVICE, dtype)
    weight = torch.linspace(-1, 2, 48).to(DEVICE, dtype)
    mine = dense.rms_norm(states, weight, 1e-5, wide=wide)
    theirs = dense_reference.rms_norm(states, weight, 1e-5, wide=wide)
    torch.testing.assert_close(mine, theirs, atol=CLOSE[dtype], rtol=CLOSE[dtype])
