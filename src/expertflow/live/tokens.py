"""The newest token of each live sequence, and whether the predictor has taken it in.

Pure numbers. Must not know tensors, state rows and predictors.
"""

from collections.abc import Mapping, Sequence


class NewestTokens:
    """Follows each sequence's newest token from the sampler to the predictor.

    A token is *pending* until the predictor's state is updated with it. The update happens once, before the step that feeds
    the token in or in an earlier step of other sequences. A step that breaks and runs again finds the token taken in.

    Attributes:
        pending: sequence number to its newest token, in the order of sampling, where the state has not been updated with it.
    """

    def __init__(self) -> None:
        """Follow no sequence."""
        self.pending: dict[int, int] = {}
        self._predicted: dict[int, bool] = {}
        """Sequences whose state was updated with a token, and whether a step was predicted from the latest one of these."""

    def sampled(self, tokens: Mapping[int, int]) -> None:
        """Replace the newest tokens of sequences; keys are sequence numbers."""
        self.pending.update(tokens)

    def take(self, first: Sequence[int], *, predicted: bool) -> tuple[list[int], list[int]]:
        """Hand out all pending tokens; the caller updates the predictor's state with them.

        Args:
            first: sequences whose tokens come first, in this order.
            predicted: whether the caller also predicts the sequences' steps.

        Returns:
            Sequence numbers and their tokens.
        """
        numbers = [number for number in first if number in self.pending]
        numbers += [number for number in self.pending if number not in numbers]
        return numbers, self._take(numbers, predicted=predicted)

    def take_all(self, *, predicted: bool) -> tuple[list[int], list[int]]:
        """As `take`, in the order of sampling."""
        numbers, tokens = list(self.pending), list(self.pending.values())
        self.pending.clear()
        self._predicted.update(dict.fromkeys(numbers, predicted))
        return numbers, tokens

    def take_only(self, sequences: Sequence[int], *, predicted: bool) -> tuple[list[int], list[int]]:
        """As `take`, but tokens of other sequences stay pending."""
        numbers = [number for number in sequences if number in self.pending]
        return numbers, self._take(numbers, predicted=predicted)

    def _take(self, numbers: list[int], *, predicted: bool) -> list[int]:
        self._predicted.update(dict.fromkeys(numbers, predicted))
        return [self.pending.pop(number) for number in numbers]

    def updated(self, sequence: int) -> bool:
        """Whether the predictor's state holds the sequence's newest token."""
        return sequence in self._predicted and sequence not in self.pending

    def predicted(self, sequence: int) -> bool:
        """Whether the sequence's next step was predicted from its newest token."""
        return self._predicted.get(sequence, False) and sequence not in self.pending

    def forget(self, sequence: int) -> None:
        """Stop following a sequence."""
        self.pending.pop(sequence, None)
        self._predicted.pop(sequence, None)
