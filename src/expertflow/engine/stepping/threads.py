"""How many threads torch computes with: no more than the process has processors, and one for small experts.

A number that was chosen is kept: `OMP_NUM_THREADS`, `MKL_NUM_THREADS`, or an earlier `torch.set_num_threads`. Torch does
not show whether that was called, so a number that torch would have chosen by itself counts as not chosen.
Must not know models.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from expertflow.limits import default_threads, usable_cpus

SMALL_EXPERT = 2**20
"""Bytes of an expert up to which one thread computes. Waking another takes 50 us, half of such an expert's time for eight
tokens (measured on two processors, torch 2.13, `OMP_WAIT_POLICY=passive`)."""


class Threads:
    """Threads of a model's steps. Lowers torch's own number to the processors there are, for the whole process.

    Args:
        expert_bytes: one expert.
    """

    def __init__(self, expert_bytes: int) -> None:
        """Lower the number where it is too high."""
        self._replaceable = limit_threads()
        self._small = expert_bytes <= SMALL_EXPERT

    @property
    def number(self) -> int:
        """Threads of a step that begins now."""
        now = torch.get_num_threads()
        return 1 if self._small and now in self._replaceable else now

    @contextmanager
    def step(self) -> Iterator[None]:
        """Use that number inside; afterwards torch gets its former one again."""
        before, wanted = torch.get_num_threads(), self.number
        if wanted != before:
            torch.set_num_threads(wanted)
        try:
            yield
        finally:
            if wanted != before:
                torch.set_num_threads(before)


def limit_threads() -> set[int]:
    """Lower torch's number of threads to the processors there are, if it is torch's own.

    Returns:
        Numbers that may be replaced from now on; none if the environment states one that OpenMP can read.
    """
    stated = (os.environ.get(name, "").split(",")[0].strip() for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"))
    if any(number.isdecimal() and int(number) for number in stated):
        return set()
    usable, replaceable = usable_cpus(), default_threads()
    now = torch.get_num_threads()
    if now > usable and now in replaceable:
        torch.set_num_threads(usable)
    return replaceable | {usable}
