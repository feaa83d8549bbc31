"""Training: passages in, a calibrated predictor out; seeded, resumable, the same on every resumption.

Binary cross-entropy on recorded routing (paper section 3.2). Weights are averaged over the last steps, and the epoch
with the lowest validation loss is kept. Then network and counts are weighed and calibrated, layer by layer. Every epoch
draws from a generator of its own and ends with a checkpoint, so a resumed run ends with the same bits as an
uninterrupted one. Must not know artifacts and engines.
"""

import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional

from expertflow import outside
from expertflow.errors import PredictorError
from expertflow.memory.devices import resolve_device
from expertflow.predict.calibration import Scored, calibrate, recalled, weigh
from expertflow.predict.counts import Memory, remember
from expertflow.predict.dataset import Passage, Shape, Windows, windows
from expertflow.predict.kinds import make
from expertflow.predict.model import multi_hot
from expertflow.predict.network import OUTPUTS, PredictorConfig
from expertflow.predict.options import TrainConfig
from expertflow.types import HORIZONS

_WARM_UP = 100
_FITTED = 8192
"""Validation tokens that the calibration is fitted on."""
_ROOM = {"cpu": 1 << 28, "cuda": 1 << 31}
"""Bytes of the largest intermediate of one pass; larger batches go in parts."""


class Epoch(NamedTuple):
    """A point of the validation curve.

    Attributes:
        number: epochs done.
        loss: training loss, summed over experts, mean over tokens and layers.
        validation: the same of the averaged weights on the validation passages, without dropout.
        recall: share of the true experts among the K best guesses there, this step.
        next_recall: the same for the next step, its token unknown.
    """

    number: int
    loss: float
    validation: float
    recall: float
    next_recall: float


class Trained(NamedTuple):
    """The result.

    Attributes:
        model: averaged weights of the best epoch.
        memory: what frequent tokens and pairs used in the training passages.
        calibration: weights of network and counts, see `Artifact`.
        curve: epoch by epoch, of the network alone.
        recall: share of the true experts among the K best guesses on the validation passages, all sources together.
        next_recall: the same for the next step.
    """

    model: nn.Module
    memory: Memory
    calibration: Tensor
    curve: list[Epoch]
    recall: float
    next_recall: float


class _Batch(NamedTuple):
    tokens: Tensor
    routes: Tensor
    counts: Tensor


def train(
    config: PredictorConfig,
    training: Sequence[Passage],
    validation: Sequence[Passage],
    options: TrainConfig,
    checkpoint: Path | None = None,
    report: Callable[[Epoch], None] = lambda epoch: None,  # noqa: ARG005 - a listener's signature
) -> Trained:
    """Train a predictor.

    Args:
        config: what to train.
        training: passages to learn from.
        validation: others, to choose the epoch and to calibrate.
        options: how.
        checkpoint: folder of an unfinished run: written every epoch, continued if it holds the same run.
        report: called after every epoch.

    Raises:
        PredictorError: if the checkpoint is of another run or damaged, or the loss is no number any more.
    """
    run = _Run(config, options, training, validation)
    if checkpoint is not None:
        run.resume(checkpoint)
        for epoch in run.curve:
            report(epoch)
    while len(run.curve) < options.epochs:
        report(run.epoch())
        if checkpoint is not None:
            run.save(checkpoint)
    return run.finish()


class _Run:
    """One training run: all that a checkpoint holds."""

    def __init__(
        self, config: PredictorConfig, options: TrainConfig, training: Sequence[Passage], validation: Sequence[Passage]
    ) -> None:
        self.config, self.options = config, options
        self.device = resolve_device(options.device)
        longest = max(len(item) for item in (*training, *validation))
        length = min(options.length, -(-longest // 64) * 64)
        self.data = self._move(windows(training, length, config.experts))
        self.training = training
        self.nothing = remember((), Shape(config.layers, config.experts, config.top_k), config.vocabulary, 0).to(
            self.device
        )
        self.validation = self._move(windows(validation, length, config.experts))
        torch.manual_seed(options.seed)
        self.model = make(config).to(self.device)
        self.model.vocabulary.learn(self.data.tokens.flatten())  # type: ignore[union-attr,operator]  # every kind has one
        self.average = make(config).to(self.device).eval().requires_grad_(requires_grad=False)
        self.best = make(config).eval()
        self.average.load_state_dict(self.model.state_dict())
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=options.rate, weight_decay=options.decay, betas=(0.9, 0.98)
        )
        self.curve: list[Epoch] = []
        self.step = 0
        self.steps = options.epochs * math.ceil(len(self.data.tokens) / options.batch)
        self.warm_up = min(_WARM_UP, 1 + self.steps // 10)

    def epoch(self) -> Epoch:
        """Train over every window once, then measure."""
        number = len(self.curve)
        torch.manual_seed(self.options.seed * 1_000_003 + number + 1)
        order = torch.randperm(len(self.data.tokens)).to(self.device)
        self.model.train()
        total, tokens = 0.0, 0
        for chosen in order.split(self.options.batch):
            loss, count = self._learn(_Batch(*(column[chosen] for column in self.data)))
            total, tokens = total + loss, tokens + count
        if not math.isfinite(total):
            raise PredictorError(f"the loss is {total} in epoch {number + 1}", "Use a lower learning rate.")
        validation, recall, following = self._measure()
        result = Epoch(number + 1, total / tokens, validation, recall, following)
        if all(result.validation < earlier.validation for earlier in self.curve):
            self.best.load_state_dict(self.average.state_dict())
        self.curve.append(result)
        return result

    def finish(self) -> Trained:
        """Count the training passages, and calibrate the best epoch's averaged weights on the validation passages."""
        self.average.load_state_dict(self.best.state_dict())
        c = self.config
        memory = remember(self.training, Shape(c.layers, c.experts, c.top_k), c.vocabulary, c.memory).to(self.device)
        weights = calibrate(list(islice(self._validation_scores(memory), -(-_FITTED // self._part_tokens()))))
        found, counted = torch.zeros(2, device=self.device), torch.zeros(2, device=self.device)
        for part in self._validation_scores(memory):
            scores = weigh(weights, part.logits[:, :2], part.rows)
            hits, total = recalled(scores, part.truth[:, :2], part.valid[:, :2], c.top_k)
            found, counted = found + hits, counted + total
        recall = (found / counted.clamp(min=1)).tolist()
        return Trained(self.best, memory.cpu(), weights.cpu(), self.curve, recall[0], recall[1])

    def save(self, folder: Path) -> None:
        """Write a checkpoint; an interrupted write leaves the previous one.

        Raises:
            PredictorError: if it cannot be written.
        """
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {f"model.{k}": v for k, v in self.model.state_dict().items()}
        tensors |= {f"average.{k}": v for k, v in self.average.state_dict().items()}
        tensors |= {f"best.{k}": v for k, v in self.best.state_dict().items()}
        for number, state in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{number}.{k}": v for k, v in state.items()}
        about = {"run": self._identity(), "step": self.step, "curve": self.curve}
        whole = {k: v.detach().cpu().clone().contiguous() for k, v in tensors.items()}
        part = folder / "checkpoint.part"
        try:
            save_file(whole, part, metadata={"about": json.dumps(about)})
            part.replace(folder / "checkpoint.safetensors")
        except (OSError, SafetensorError) as error:
            raise PredictorError(
                f"{part} cannot be written: {error}", "Make room, and give the same command again to go on."
            ) from error

    def resume(self, folder: Path) -> None:
        """Resume from a checkpoint, if there is one.

        Raises:
            PredictorError: if it is damaged or of another run.
        """
        path = folder / "checkpoint.safetensors"
        if not path.exists():
            return
        remedy = f"Remove {path} to start anew, or state what was stated before."
        try:
            tensors = load_file(path)
            with safe_open(path, framework="pt") as file:
                about = outside.parse_json(file.metadata()["about"], finite=False)
            if about["run"] != json.loads(json.dumps(self._identity())):
                raise PredictorError(f"{path} is of another training run", remedy)
            for name in ("model", "average", "best"):
                part = {k.removeprefix(f"{name}."): v for k, v in tensors.items() if k.startswith(f"{name}.")}
                getattr(self, name).load_state_dict(part)
            self._resume_optimizer(tensors)
            self.step, self.curve = about["step"], [Epoch(*entry) for entry in about["curve"]]
            if not outside.whole(self.step, len(self.curve), 2**53):
                raise ValueError(f"it is at step {self.step} behind {len(self.curve)} epochs")  # noqa: TRY301 - as above
            if not all(isinstance(value, int | float) for epoch in self.curve for value in epoch):
                raise TypeError("its curve holds something else than numbers")  # noqa: TRY301 - as above
        except (OSError, SafetensorError, KeyError, ValueError, TypeError, RuntimeError) as error:
            raise PredictorError(f"{path} is damaged: {error}", remedy) from error

    def _resume_optimizer(self, tensors: dict[str, Tensor]) -> None:
        state: dict[int, dict[str, Tensor]] = {}
        for key, value in tensors.items():
            if key.startswith("optimizer."):
                _, number, name = key.split(".")
                state.setdefault(int(number), {})[name] = value
        self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": state})

    def _identity(self) -> dict[str, object]:
        """What two runs have in common if one may resume the other."""
        seen = [int(self.data.counts.sum()), int(self.validation.counts.sum()), int(self.data.tokens.sum())]
        return {"config": asdict(self.config), "options": asdict(self.options), "data": seen}

    def _move(self, cut: Windows) -> _Batch:
        kind = np.uint8 if self.config.experts < 256 else np.int16
        columns = (cut.tokens, cut.routes.astype(kind), cut.counts)
        return _Batch(*(torch.from_numpy(column).to(self.device) for column in columns))

    def _parts(self, batch: _Batch) -> Iterator[_Batch]:
        """A batch in parts whose intermediates fit, without the padding that all of its windows share."""
        c = self.config
        longest = int(batch.counts.any(0).nonzero().max()) + 1
        batch = _Batch(*(column[:, :longest] for column in batch))
        each = 4 * batch.tokens.shape[1] * c.layers * c.experts * (len(c.decays) + 2 * c.heads)
        count = max(1, _ROOM[self.device.type] // each)
        for begin in range(0, len(batch.tokens), count):
            yield _Batch(*(column[begin : begin + count] for column in batch))

    def _learn(self, batch: _Batch) -> tuple[float, int]:
        options, count = self.options, int(batch.counts.sum())
        rate = (
            options.rate
            * min(1, (self.step + 1) / self.warm_up)
            * (0.5 + 0.5 * math.cos(math.pi * self.step / self.steps))
        )
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        total = 0.0
        for part in self._parts(batch):
            hidden = torch.rand(part.tokens.shape, device=self.device) < options.hide
            blind = torch.rand(len(part.tokens), device=self.device) < options.blind
            seen = torch.where(blind[:, None, None, None], self.config.experts, part.routes)
            logits = self.model(torch.where(hidden, -1, part.tokens), seen)
            loss = self._loss(logits, part).sum() / count
            loss.backward()
            total += loss.item() * count
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.step += 1
        follow = 1 - min(options.average, self.step / (self.step + 10))
        with torch.no_grad():
            for slow, fast in zip(self.average.state_dict().values(), self.model.state_dict().values(), strict=True):
                if slow.is_floating_point():
                    slow.lerp_(fast, follow)
        return total, count

    def _loss(self, logits: Tensor, batch: _Batch) -> Tensor:
        """`[B, T]`: of counted tokens, summed over experts and outputs, mean over layers."""
        truth, valid = labels(batch.routes, batch.counts, self.config.experts)
        each = functional.binary_cross_entropy_with_logits(logits, truth, reduction="none").sum(-1).mean(-1)
        weight = torch.tensor([1.0] + [self.options.later] * (OUTPUTS - 1), device=self.device)
        return (each * valid * weight).sum(-1)

    def _part_tokens(self) -> int:
        """Tokens of a part of the validation windows."""
        return self.options.batch * self.validation.tokens.shape[1]

    def _validation_scores(self, memory: Memory) -> Iterator[Scored]:
        """Scores of network and counts for the validation windows, shuffled once."""
        order = torch.randperm(len(self.validation.tokens), generator=torch.Generator().manual_seed(self.options.seed))
        for chosen in order.to(self.device).split(self.options.batch):
            for part in self._parts(_Batch(*(column[chosen] for column in self.validation))):
                with torch.no_grad():
                    logits = self.average(part.tokens, part.routes)[part.counts]
                    before = functional.pad(part.tokens, (1, 0), value=-1)[:, :-1]
                    rows = memory(part.tokens[part.counts], before[part.counts])
                truth, valid = labels(part.routes, part.counts, self.config.experts)
                yield Scored(logits, rows, truth[part.counts], valid[part.counts])

    def _measure(self) -> tuple[float, float, float]:
        """Validation loss, recall of this step and of the next."""
        loss = tokens = 0.0
        found = torch.zeros(2, dtype=torch.float64)
        counted = torch.zeros(2, dtype=torch.float64)
        weight = torch.tensor([1.0] + [self.options.later] * (OUTPUTS - 1), device=self.device)
        for logits, _, truth, valid in self._validation_scores(self.nothing):
            each = functional.binary_cross_entropy_with_logits(logits, truth, reduction="none").sum(-1).mean(-1)
            loss += float((each * valid * weight).sum())
            tokens += len(logits)
            hits, total = recalled(logits[:, :2], truth[:, :2], valid[:, :2], self.config.top_k)
            found, counted = found + hits.cpu(), counted + total.cpu()
        recall = (found / counted.clamp(min=1)).tolist()
        return loss / max(tokens, 1), recall[0], recall[1]


def labels(routes: Tensor, counts: Tensor, experts: int) -> tuple[Tensor, Tensor]:
    """The truth for each output.

    Args:
        routes: `[B, T, L, K]`, E for none.
        counts: `[B, T]` bool, tokens to learn from.
        experts: E.

    Returns:
        `[B, T, O, L, E]` float32, 1 where used in this step, and within each horizon behind it. Then `[B, T, O]` bool,
        whether that is known: a horizon that runs behind the window's last token is not.
    """
    used = multi_hot(routes, experts)
    total = used.cumsum(1)
    length = routes.shape[1]
    real = (routes < experts).flatten(2).any(-1)
    ends = torch.where(real, torch.arange(length, device=routes.device), -1).amax(1)
    place = torch.arange(length, device=routes.device)
    planes, valid = [used], [counts & real]
    for horizon in HORIZONS:
        planes.append((total[:, (place + horizon).clamp(max=length - 1)] - total > 0).float())
        valid.append(counts & (place + horizon <= ends[:, None]))
    return torch.stack(planes, dim=2), torch.stack(valid, dim=2)
