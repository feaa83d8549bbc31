"""The next tokens of all sequences of a step, from their logits, and the random numbers they are drawn by.

A random number is a function of the request's seed and the token's position, so that neither the device nor other sequences
change what is drawn, and nothing has to be kept. The choice itself is `kernels.sampling`. Must not know requests.
"""

import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import e, inf, log2
from types import MappingProxyType
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Float, Int
from torch import Tensor

from expertflow.config import SamplingParams
from expertflow.execution.sampling import logprobs
from expertflow.execution.sampling.edits import TokenEdits, edit
from expertflow.execution.sampling.logprobs import Logprob, Logprobs
from expertflow.execution.sampling.masks import TokenMask, fill_all
from expertflow.execution.sampling.upload import upload
from expertflow.kernels.backend import backend
from expertflow.kernels.sampling.reference import NO_TOKEN as NO_TOKEN  # noqa: PLC0414 - its name for the engine
from expertflow.kernels.sampling.reference import RULES
from expertflow.memory.devices import fetched

NO_CHOICE = -2
"""In place of a token where a mask leaves no choice."""
_STEP = 0x9E3779B97F4A7C15
_64 = 2**64 - 1
_LEAST_FACTOR = 1e-30
"""Of logits, at temperatures beyond all use."""


def draw_seed() -> int:
    """A seed that cannot be foreseen, within the range that `SamplingParams` takes."""
    return secrets.randbits(63)


def uniform(seed: int, position: int) -> float:
    """The random number of a token, in [0, 1), a multiple of 2^-53.

    Args:
        seed: of the request.
        position: of the token in its sequence.
    """
    return (_mixed(_mixed(seed) + (position + 1) * _STEP) >> 11) * 2.0**-53


def _mixed(number: int) -> int:
    """The finaliser of SplitMix64 (Steele, Lea, Flood: Fast splittable pseudorandom number generators, 2014)."""
    number &= _64
    number = ((number ^ (number >> 30)) * 0xBF58476D1CE4E5B9) & _64
    number = ((number ^ (number >> 27)) * 0x94D049BB133111EB) & _64
    return number ^ (number >> 31)


@dataclass(frozen=True, kw_only=True)
class Draw:
    """What one sequence's next token is chosen by.

    Attributes:
        params: of the request.
        seed: of its random numbers.
        position: of the token in its sequence.
        generated: tokens of the answer so far.
        edits: changes of single logits; None: none.
        mask: tokens that may come next; None: all.
    """

    params: SamplingParams
    seed: int = 0
    position: int = 0
    generated: int = 0
    edits: TokenEdits | None = None
    mask: TokenMask | None = None

    @property
    def plain(self) -> bool:
        """Whether the most probable token of the model is taken."""
        return self.params.temperature == 0 and self.edits is None and self.mask is None

    def rules(self, vocabulary: int) -> tuple[float, ...]:
        """A line of `rules` of `kernels.sampling.reference.choose`."""
        params = self.params
        if params.temperature == 0:
            return 0.0, 1.0, 1.0, 1.0, -inf
        count = params.top_k if params.top_k < vocabulary else 0
        factor = max(float(np.float32(log2(e) / params.temperature)), _LEAST_FACTOR)
        least = float(np.float32(log2(params.min_p))) if params.min_p else -inf
        return uniform(self.seed, self.position), float(count), params.top_p, factor, least


class Chosen(NamedTuple):
    """The next tokens of sequences.

    Attributes:
        tokens: one each, `NO_TOKEN` or `NO_CHOICE` where there is none.
        faults: what was wrong with masks, by place.
        logprobs: by place, of each token and the most probable ones, where they are wanted.
    """

    tokens: list[int]
    faults: Mapping[int, str] = MappingProxyType({})
    logprobs: Sequence[tuple[Logprob, ...] | None] = ()

    def of(self, places: Sequence[int]) -> "Chosen":
        """Those of some places, in that order."""
        faults = {new: self.faults[place] for new, place in enumerate(places) if place in self.faults}
        return Chosen([self.tokens[place] for place in places], faults, [self.logprobs[place] for place in places])


class Unread:
    """Tokens that are chosen on the device, and on their way to host memory.

    Args:
        tokens: int64 `[B]` on the device.
        logprobs: theirs, there; None: none are wanted.
        faults: what is wrong with masks, by place.
        masked: where masks are, and int64 `[B]` on the device, the most probable token without them; None: there are none.

    Attributes:
        tokens: those.
    """

    def __init__(
        self,
        tokens: Int[Tensor, " B"],
        logprobs: Logprobs | None = None,
        faults: Mapping[int, str] = MappingProxyType({}),
        masked: tuple[Sequence[int], Tensor] | None = None,
    ) -> None:
        """Queue their copy."""
        self.tokens, self._here, self._faults = tokens, fetched(tokens), faults
        self._logprobs = None if logprobs is None else logprobs._replace(lines=fetched(logprobs.lines))
        self._masked = None if masked is None else (masked[0], fetched(masked[1]))
        self._event: torch.cuda.Event | None = None
        if tokens.is_cuda:
            self._event = torch.cuda.Event()
            self._event.record(torch.cuda.current_stream(tokens.device))

    def read(self) -> Chosen:
        """The tokens, and their log-probabilities; waits until they were chosen, and for nothing behind that."""
        if self._event is not None:
            self._event.synchronize()
        tokens: list[int] = self._here.tolist()
        found = [None] * len(tokens) if self._logprobs is None else self._logprobs.read(tokens)
        faults = dict(self._faults)
        if self._masked is not None:
            places, best = self._masked
            for place in places:
                if tokens[place] == NO_TOKEN and int(best[place]) != NO_TOKEN:
                    faults[place] = "its mask allows only tokens that are forbidden"
        tokens = [NO_CHOICE if place in faults else token for place, token in enumerate(tokens)]
        return Chosen(tokens, faults, found)


class Sampler:
    """Chooses the next tokens of any sequences of one model.

    Args:
        device: where the logits are.
    """

    def __init__(self, device: torch.device) -> None:
        """Take the device's kernels."""
        self._choose = backend(device).choose
        self._device = device

    @torch.inference_mode()
    def begin(
        self,
        logits: Float[Tensor, "B V"],
        draws: Sequence[Draw],
        best: Int[Tensor, " B"] | None = None,
        most: Sequence[int | None] = (),
    ) -> Unread:
        """Choose a token of every sequence. Waits for nothing.

        Args:
            logits: of all sequences; they stay as they are.
            draws: one a sequence.
            best: the result of `most_probable`, if it is known already.
            most: how many most probable tokens each one's log-probabilities have; None: it wants none.
        """
        plain, places = all(one.plain for one in draws), [n for n, one in enumerate(draws) if one.mask is not None]
        if best is None and (plain or places):
            best = most_probable(logits)
        words, faults = fill_all([one.mask for one in draws], logits.shape[1]) if places else (None, {})
        mask = None if words is None else upload(words, self._device)
        tokens = best if plain and best is not None else self._drawn(logits, draws, mask)
        wanted = any(one is not None for one in most)
        masked = (places, best) if places and best is not None else None
        return Unread(tokens, logprobs.begin(logits, tokens, most) if wanted else None, faults, masked)

    def _drawn(self, logits: Tensor, draws: Sequence[Draw], mask: Tensor | None) -> Tensor:
        """Tokens `[B]` by the draws' rules, on the device."""
        if any(one.edits is not None for one in draws):
            logits = edit(logits, [one.edits for one in draws], [one.generated for one in draws])
        rules = self._rules(draws, logits.shape[1])
        counted, shared = bool(rules[:, 1].any()), bool((rules[:, 2] < 1).any())
        return self._choose(logits, upload(rules, self._device), mask, counted=counted, shared=shared)

    def choose(
        self, logits: Float[Tensor, "B V"], draws: Sequence[Draw], best: Int[Tensor, " B"] | None = None
    ) -> Chosen:
        """As `begin`; waits for the device once."""
        return self.begin(logits, draws, best).read()

    @torch.inference_mode()
    def weighed(self, chosen: Chosen, logits: Float[Tensor, "B V"], most: Sequence[int | None]) -> Chosen:
        """Add log-probabilities: of each token and so many most probable ones; None: of none. Waits for the device if there are any."""
        return chosen._replace(logprobs=logprobs.log_probabilities(logits, chosen.tokens, most))

    def _rules(self, draws: Sequence[Draw], vocabulary: int) -> npt.NDArray[np.float64]:
        rules = np.empty((len(draws), RULES))
        for place, one in enumerate(draws):
            rules[place] = one.rules(vocabulary)
        return rules


def most_probable(logits: Float[Tensor, "B V"]) -> Int[Tensor, " B"]:
    """The most probable token of each sequence; `NO_TOKEN` where the largest logit is NaN or infinite. Waits for nothing."""
    best = logits.argmax(dim=-1)  # NaN counts as the largest
    return best.masked_fill_(~logits.gather(-1, best[:, None])[:, 0].isfinite(), NO_TOKEN)
