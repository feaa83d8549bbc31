"""The one error tree. Every message states what went wrong, with which value, and what to do about it.

Must not know the rest of the package, so that every module may raise from it.
"""

from typing import Any


class ExpertFlowError(Exception):
    """Base of every error that this package raises on purpose.

    Args:
        what: what went wrong, naming the offending value.
        remedy: what the user can do about it.
    """

    def __init__(self, what: str, remedy: str) -> None:
        """Join both halves into the message a user reads."""
        super().__init__(f"{what}. {remedy}" if remedy else what)
        self.what = what
        self.remedy = remedy


class ConfigError(ExpertFlowError):
    """An option is unknown, has a bad value, or contradicts another."""


class BudgetError(ConfigError):
    """The stated GPU memory budget cannot work; the message names the least that does.

    Args:
        what: what went wrong.
        remedy: what to do.
        least_bytes: the smallest budget, in bytes, for which the same request works.
    """

    def __init__(self, what: str, remedy: str, least_bytes: int) -> None:
        """Keep the least working budget for programs that want to retry."""
        super().__init__(what, remedy)
        self.least_bytes = least_bytes


class HostMemoryError(ExpertFlowError):
    """The host has too little free memory for the expert store."""


class DeviceError(ExpertFlowError):
    """The requested device is not there."""


class CheckpointError(ExpertFlowError):
    """A checkpoint folder is incomplete, damaged, or disagrees with its own config."""


class UnreadWarning(UserWarning):
    """A checkpoint holds tensors that its model has no place for, such as biases or layers beyond its config."""


class QuantisedWarning(UserWarning):
    """Experts are quantised while they are loaded, because `expert_format` says so: the model's answers change."""


class UnsupportedModelError(ExpertFlowError):
    """The model is no MoE, of no family that runs exactly, or cannot do this while offloaded."""


class ClosedError(ExpertFlowError):
    """The model was closed and its memory given back."""


class PromptError(ExpertFlowError):
    """A prompt is empty, unreadable, or longer than the model's context."""


class CancelledError(ExpertFlowError):
    """Requests were cancelled by another caller, or by an error, before they had finished."""


class RequestError(ExpertFlowError):
    """One request has no next token; others go on.

    Args:
        index: position of its prompt in the call.
        token: number of the token it lacks, from 1.
        why: what is wrong.
        remedy: what to do about it.

    Attributes:
        index: as above.
        token: as above.
        outputs: finished requests of the same call, in the order of its prompts.
    """

    def __init__(self, index: int, token: int, why: str, remedy: str) -> None:
        """Start without finished requests."""
        super().__init__(f"request {index} has no token {token}: {why}", remedy)
        self.index, self.token = index, token
        self.outputs: tuple[Any, ...] = ()


class NonFiniteError(RequestError):
    """A request's logits are no numbers (NaN or infinity), so it has no next token; arguments as of `RequestError`."""

    def __init__(self, index: int, token: int) -> None:
        """Name the request and the token."""
        super().__init__(
            index,
            token,
            "its logits are not finite (NaN or infinity)",
            "Look for such numbers in the weights; if activations overflow float16, run with dtype bfloat16 or float32.",
        )


class MaskError(RequestError):
    """A request's mask allows no token, or failed; arguments as of `RequestError`."""

    def __init__(self, index: int, token: int, why: str) -> None:
        """Name the request, the token and the reason."""
        super().__init__(index, token, why, "Correct the grammar, or whatever makes the mask; other requests go on.")


class ResultsError(ExpertFlowError):
    """A results file is of something else, damaged, or cannot be written."""


class TraceError(ExpertFlowError):
    """A routing trace is truncated, foreign, empty, of another model than stated, or lacks what is needed."""


class PredictorError(ExpertFlowError):
    """A predictor is damaged, was made for another model, or cannot be trained from what was given."""


class ResultError(ExpertFlowError):
    """A result file is damaged, foreign, of another version, or cannot be written."""
