"""Where a model's weights come from: the files of a checkpoint, another model's store, or random numbers.

A source finds the weights without loading them, loads the dense part, and fills an expert store or shares one. Must not
know plans, slots and caches.
"""

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel

from expertflow.errors import ClosedError, ConfigError
from expertflow.formats.format import TensorSpec
from expertflow.formats.records import ExpertStore, RecordLayout, StoreLayout
from expertflow.models.files.checkpoint import StoredTensor
from expertflow.models.files.fingerprint import fingerprint
from expertflow.models.files.identity import ContentHash, spans_of, stamps
from expertflow.models.gguf.header import is_gguf
from expertflow.models.places import walk
from expertflow.models.skeleton import Skeleton
from expertflow.models.weights.dense import PackedTensor
from expertflow.models.weights.encode import in_format, packed_already, quantised
from expertflow.models.weights.load import fill_records, load_dense
from expertflow.models.weights.mapping import ExpertPiece, check_dense, map_experts, needed
from expertflow.progress import Progress

_LONG_TO_LOAD = 1 << 30
"""Bytes of experts from which loading shows its progress: less takes a second or two."""
_STACKED = 3
"""Dimensions of a stack of experts' weights."""
_STD = 0.02
"""Standard deviation of random weights."""

Stamps = tuple[tuple[str | int, ...], ...]
"""Stamps of weights, known without reading them: while they stay, so do the weights."""


@dataclass(frozen=True, kw_only=True)
class Located:
    """A model's weights, found but not loaded.

    Attributes:
        skeleton: the model.
        fingerprint: of the weights, sampled.
        layers: the tensors of one expert of each MoE layer, as they are stored.
        pieces: where the experts' bytes are; empty without files.
        tensors: the checkpoint, by key; empty without files.
        packed: packed tensors that are no experts', by the key of an unpacked checkpoint.
    """

    skeleton: Skeleton
    fingerprint: str
    layers: tuple[tuple[TensorSpec, ...], ...]
    pieces: list[ExpertPiece] = field(default_factory=list)
    tensors: Mapping[str, StoredTensor] = field(default_factory=dict)
    packed: Mapping[str, PackedTensor] = field(default_factory=dict)

    @property
    def dense(self) -> dict[str, StoredTensor]:
        """The checkpoint without its experts, by key."""
        experts = {piece.source.key for piece in self.pieces}
        return {key: tensor for key, tensor in self.tensors.items() if key not in experts}

    @property
    def mapped(self) -> int:
        """Bytes of the files that dense weights are in: they are mapped while those are loaded."""
        return sum(file.stat().st_size for file in {tensor.file for tensor in self.dense.values()})


class WeightsSource(Protocol):
    """Gives a model its weights.

    Attributes:
        shared: whether the store belongs to another model, and takes no memory of its own.
    """

    @property
    def shared(self) -> bool:
        """Whether the store belongs to another model."""

    def locate(self, skeleton: Skeleton, *, convert: bool) -> Located:
        """Find all weights and check them against the model. Reads no more than headers.

        Args:
            skeleton: the model.
            convert: whether weights may be of another float dtype than the model runs in.

        Raises:
            CheckpointError: if a weight is missing, or of another shape or dtype than in the config.
        """

    def stamps(self, located: Located) -> Stamps:
        """Stamps of the weights, known without reading them."""

    def identity(self, located: Located) -> str:
        """Hash of all that the model's answers depend on. Reads every weight that lies in a file.

        Raises:
            CheckpointError: if a weight cannot be read.
        """

    def load_dense(self, located: Located, device: torch.device) -> PreTrainedModel:
        """The model with all weights but its experts', on the device, in evaluation mode.

        Raises:
            CheckpointError: if a weight cannot be read.
        """

    def experts(
        self, located: Located, allocate: Callable[[], ExpertStore], device: torch.device, *, show: bool
    ) -> tuple[ExpertStore, str]:
        """A filled store, and the identity of the model: a hash of all that its answers depend on.

        Args:
            located: what is loaded.
            allocate: makes an empty store; not called by a source that shares one.
            device: of the model.
            show: show progress where it takes long.

        Raises:
            CheckpointError: if a weight cannot be read.
            ConfigError: if the store that is shared holds other experts.
        """


class FileWeights:
    """The checkpoint folder's files, or a GGUF file. Experts are read straight into their records.

    Args:
        watch: called while experts are read, from several threads, with bytes read just now and bytes of all; None: not.
    """

    shared = False

    def __init__(self, watch: Callable[[int, int], None] | None = None) -> None:
        """Keep who watches."""
        self._watch = watch

    def locate(self, skeleton: Skeleton, *, convert: bool) -> Located:
        """Walk the headers of all files. See `WeightsSource`. Types of plain numbers in GGUF files are those of no run."""
        convert = convert or is_gguf(skeleton.folder)
        tensors = needed(skeleton, walk(skeleton.folder))
        found = quantised(skeleton, map_experts(skeleton, tensors, convert=convert))
        located = Located(
            skeleton=skeleton,
            fingerprint=fingerprint(tensors),
            layers=found.layers,
            pieces=found.pieces,
            tensors=tensors,
        )
        return replace(located, packed=check_dense(skeleton, located.dense, convert=convert))

    def stamps(self, located: Located) -> Stamps:
        """Sizes and times of the files."""
        return (*_expert_format(located.skeleton), *stamps(located.tensors, located.skeleton.folder))

    def identity(self, located: Located) -> str:
        """Hash the content of every file."""
        content = ContentHash()
        content.read([*(piece.span for piece in located.pieces), *spans_of(located.dense)])
        return _identity(content, located)

    def load_dense(self, located: Located, device: torch.device) -> PreTrainedModel:
        """Load through transformers."""
        return load_dense(located.skeleton, located.dense, located.packed, device)

    def experts(
        self,
        located: Located,
        allocate: Callable[[], ExpertStore],
        device: torch.device,
        *,
        show: bool,
    ) -> tuple[ExpertStore, str]:
        """Read every expert into its record, and hash what was read."""
        store, content = allocate(), ContentHash()
        total = sum(piece.nbytes for piece in located.pieces)
        with Progress("loading experts", total, size=True, show=show and total >= _LONG_TO_LOAD) as bar:

            def advance(count: int) -> None:
                bar.advance(count)
                if self._watch is not None:
                    self._watch(count, total)

            fill_records(located.pieces, store, content, device, advance)
        store.lock()
        content.read(spans_of(located.dense))
        return store, _identity(content, located)


def _expert_format(skeleton: Skeleton) -> Stamps:
    """What the model's answers depend on beside files: the format that experts are quantised to, if they are."""
    return () if skeleton.expert_format is None else (("experts", skeleton.expert_format.name),)


def _identity(content: ContentHash, located: Located) -> str:
    whole = content.identity(located.tensors, located.skeleton.folder)
    for mark in _expert_format(located.skeleton):
        whole = hashlib.sha256(f"{whole} {mark}".encode()).hexdigest()
    return whole


@dataclass(frozen=True, kw_only=True)
class SharedWeights:
    """The expert store of a model that was loaded before, and stays open as long as this one.

    Attributes:
        source: of that model; the dense part is loaded from it again.
        skeleton: of that model.
        known: its stamps; if this model's are the same, nothing is read to compare them.
        known_identity: hash of all that its answers depend on.
        store: its experts in host memory.
        device: where it runs.
    """

    source: WeightsSource
    skeleton: Skeleton
    known: Stamps
    known_identity: str
    store: ExpertStore
    device: torch.device

    @property
    def shared(self) -> bool:
        """Always."""
        return True

    def locate(self, skeleton: Skeleton, *, convert: bool) -> Located:
        """As the other model's source."""
        return self.source.locate(skeleton, convert=convert)

    def stamps(self, located: Located) -> Stamps:
        """As the other model's source."""
        return self.source.stamps(located)

    def identity(self, located: Located) -> str:
        """As the other model's source; nothing is read if the stamps are the same."""
        return self.known_identity if self.stamps(located) == self.known else self.source.identity(located)

    def load_dense(self, located: Located, device: torch.device) -> PreTrainedModel:
        """As the other model's source."""
        return self.source.load_dense(located, device)

    def experts(
        self,
        located: Located,
        allocate: Callable[[], ExpertStore],  # noqa: ARG002 - the protocol's
        device: torch.device,
        *,
        show: bool,  # noqa: ARG002 - likewise
    ) -> tuple[ExpertStore, str]:
        """The other model's store, if it holds this model's experts.

        Raises:
            ConfigError: if checkpoint, dtype, format or device differ.
        """
        mine, theirs = located.skeleton, self.skeleton
        if not self.store.nbytes:
            raise ClosedError(f"the model of {theirs.folder} whose experts are shared was closed", "Load it again.")
        same_records = StoreLayout.of(located.layers) == self.store.layout
        if not same_records or device != self.device or self.identity(located) != self.known_identity:
            raise ConfigError(
                f"{mine.folder} cannot share the experts of {theirs.folder}: checkpoint, dtype, format of experts or device differ",
                "Load it by itself.",
            )
        return self.store, self.known_identity


@dataclass(frozen=True, kw_only=True)
class RandomWeights:
    """Weights drawn at random, for a folder that holds nothing but a config.

    Norms are ones and biases zeros. The same seed gives the same weights on the same kind of device. Records are drawn on the
    device, one by one, and written into a store that is page-locked before.

    Attributes:
        seed: of all that is drawn.
        embedding: times the standard deviation of other weights that embeddings have. Wide embeddings spread the routing.
        fingerprint: of the checkpoint that these weights stand in for; its predictors are accepted.
    """

    seed: int = 0
    embedding: float = 1.0
    fingerprint: str = ""

    @property
    def shared(self) -> bool:
        """Never."""
        return False

    def locate(self, skeleton: Skeleton, *, convert: bool) -> Located:  # noqa: ARG002 - the protocol's
        """Locate nothing, because no file is read. Where the config says so, experts are packed; the dense part is plain.

        Raises:
            ConfigError: for a GGUF file, which has weights of its own.
        """
        if is_gguf(skeleton.folder):
            raise ConfigError(
                f"random weights were asked for, and {skeleton.folder} is a GGUF file",
                "Give a folder with a config.json, or leave them out.",
            )
        mark = self.fingerprint or hashlib.sha256(self._name(skeleton.folder).encode()).hexdigest()[:16]
        specs = tuple(self._stored(skeleton, spec) for spec in skeleton.specs)
        return Located(skeleton=skeleton, fingerprint=mark, layers=(specs,) * len(skeleton.expert_modules))

    @staticmethod
    def _stored(skeleton: Skeleton, spec: TensorSpec) -> TensorSpec:
        """A tensor of an expert as checkpoints of its format have it: weights are packed, biases are not.

        Raises:
            ConfigError: if packed experts are to be quantised.
        """
        if skeleton.packed and skeleton.expert_format is not None:
            raise packed_already(skeleton, skeleton.packed[0].name)
        format_ = skeleton.packed[0] if skeleton.packed else skeleton.expert_format
        return spec if format_ is None else in_format(skeleton, spec, format_)

    def stamps(self, located: Located) -> Stamps:
        """Seed and scale, and sizes and times of the setting files."""
        return (
            ("random", self.seed, str(self.embedding)),
            *_expert_format(located.skeleton),
            *stamps({}, located.skeleton.folder),
        )

    def identity(self, located: Located) -> str:
        """Hash of seed, scale, dtype, format of experts and the setting files."""
        skeleton = located.skeleton
        about = " ".join(map(str, (skeleton.dtype, *_expert_format(skeleton), self._name(skeleton.folder))))
        return hashlib.sha256(about.encode()).hexdigest()

    def _name(self, folder: Path) -> str:
        return f"random {self.seed} {self.embedding} {ContentHash().identity({}, folder)}"

    @torch.no_grad()
    def load_dense(self, located: Located, device: torch.device) -> PreTrainedModel:
        """Draw the dense weights on the device."""
        skeleton, default = located.skeleton, torch.get_default_dtype()
        torch.set_default_dtype(getattr(torch, skeleton.dtype))
        try:
            with (
                torch.device(device),
                _ExpertsNowhere(skeleton.experts),
                torch.random.fork_rng([torch.cuda.current_device()] if device.type == "cuda" else []),
            ):
                model: Any = skeleton.model_class(skeleton.config)
        finally:
            torch.set_default_dtype(default)
        random = torch.Generator(device).manual_seed(self.seed)
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=_STD, generator=random)
            else:
                nn.init.constant_(parameter, 1.0 if name.endswith("weight") else 0.0)
        model.get_input_embeddings().weight.mul_(self.embedding)
        model.name_or_path = str(skeleton.folder)
        loaded: PreTrainedModel = model.eval().requires_grad_(False)
        return loaded

    def experts(
        self, located: Located, allocate: Callable[[], ExpertStore], device: torch.device, *, show: bool
    ) -> tuple[ExpertStore, str]:
        """Draw every record. The store is locked first, so that records come at the link's speed."""
        store, dtype = allocate(), getattr(torch, located.skeleton.dtype)
        store.lock()
        random = torch.Generator(device).manual_seed(self.seed + 1)
        count, size = store.buffer.shape
        drawn = torch.zeros(size, dtype=torch.uint8, device=device)
        with Progress("drawing experts", store.nbytes, size=True, show=show and store.nbytes >= _LONG_TO_LOAD) as bar:
            for number in range(count):
                layout = store.layout.layers[number // located.skeleton.experts]
                if layout.is_plain:
                    drawn = torch.randn(size // dtype.itemsize, device=device, dtype=dtype, generator=random) * _STD
                else:
                    _draw(layout, drawn, random)
                store.record(number).copy_(drawn.view(torch.uint8))
                bar.advance(size)
        return store, self.identity(located)


class _ExpertsNowhere(TorchFunctionMode):
    """Makes stacks of experts on the meta device while a model is built: it drops them, and all of them may be more than a device has."""

    def __init__(self, experts: int) -> None:
        super().__init__()
        self._experts = experts

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call a function of torch."""
        del types
        kwargs = kwargs or {}
        shape = args[0] if args and isinstance(args[0], tuple) else args
        if func in {torch.empty, torch.zeros, torch.ones} and len(shape) == _STACKED and shape[0] == self._experts:
            kwargs = {**kwargs, "device": "meta"}
        return func(*args, **kwargs)


def _draw(layout: RecordLayout, record: Tensor, random: torch.Generator) -> None:
    """Fill a record with random numbers, each tensor in its format."""
    for spec in layout.specs:
        for name, part in spec.format.draw(spec, random, _STD).items():
            layout.part(record, spec.name, name).copy_(part.view(layout.part(record, spec.name, name).shape))
