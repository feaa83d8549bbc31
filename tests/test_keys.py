"""The order of ranks as pairs of integers, in which the tables' kernels look for the smallest."""

import numpy as np
import torch
import triton
import triton.language as tl

from expertflow.kernels.residency.keys import key_of, rank_of, smallest


@triton.jit
def _smallest_kernel(ranks, found, rank, WIDTH: tl.constexpr):  # noqa: ANN001, ANN202, N803
    column = tl.arange(0, WIDTH)
    upper, lower, place = smallest(*key_of(tl.load(ranks + column)), column)
    tl.store(found, place)
    tl.store(rank, rank_of(upper, lower))


def test_keys_order_ranks_as_float64_does() -> None:
    """Neighbours, halves that are equal, both zeros, infinities: the first of the smallest, as NumPy finds it, to the bit."""
    known = [
        0.0,
        -0.0,
        1e-300,
        -1e-300,
        np.inf,
        -1e9,
        np.nextafter(-1e9, 0),
        2.0**31,
        -(2.0**52) - 1,
        3.5,
        0.1,
        np.nextafter(0.1, 1),
    ]
    random = np.random.default_rng(5)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for _ in range(40):
        ranks = random.choice(known, 16)
        if random.random() < 0.5:
            ranks = np.abs(ranks)
        found, rank = (
            torch.zeros(1, dtype=torch.int32, device=device),
            torch.zeros(1, dtype=torch.float64, device=device),
        )
        _smallest_kernel[(1,)](torch.from_numpy(ranks).to(device), found, rank, WIDTH=16)
        assert (int(found), float(rank)) == (ranks.argmin(), ranks.min())
