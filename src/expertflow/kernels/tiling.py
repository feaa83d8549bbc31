"""How the projections of an expert are cut into programs, by format and number of pairs. Must not know how a program works."""

from dataclasses import dataclass, replace

from expertflow.formats.dtypes import DTYPES
from expertflow.formats.format import Format, TensorSpec
from expertflow.kernels.device import ROOM
from expertflow.kernels.mlp import CHUNKS, SHARED_PAIRS, ExpertMlp
from expertflow.kernels.reading.bytes import ahead_fits, by_words
from expertflow.kernels.reading.halves import STEP, by_halves
from expertflow.kernels.reading.tiles import INTERPRETED

TILE = 16
"""Tokens in a tile: the narrowest a tensor core takes on the side of the tokens, fixed so that bits are."""
FEW_PAIRS = 16
"""Pairs below which the programs of a projection do not fill a GPU."""
_OF_ONE_TOKEN = 8
"""Pairs up to which a projection of two outputs an element gains from written out steps; at sixteen it loses."""
_AT_ONCE = 80
"""Registers of a thread with which six programs of four warps share a multiprocessor of Hopper."""
_FIVE = 96
"""Registers of a thread with which five programs do."""
_LEAST_STAGES = 3
"""Stages below which a tiling of fewer outputs is better."""


@dataclass(frozen=True)
class Tiling:
    """How a projection is cut. Only `block_k` and `chunk` enter the arithmetic.

    Attributes:
        block_n: outputs of a program.
        block_k: inputs of one step.
        warps: of a program.
        stages: steps in flight.
        chunk: inputs that are summed by themselves, before the chunks' sums are added in their order; a multiple of 128.
        split: whether each chunk is a program's.
        registers: of a thread at most; None: as many as the compiler likes.
        ahead: steps of a chunk whose codes a program requests at once; 0: as the pipeline of the loop has them.
    """

    block_n: int
    block_k: int
    warps: int = 4
    stages: int = 4
    chunk: int = 1 << 20
    split: bool = False
    registers: int | None = None
    ahead: int = 0

    def chunks(self, inputs: int) -> int:
        """Chunks of a weight of so many inputs."""
        return -(-inputs // self.chunk)

    def programs(self, outputs: int, inputs: int) -> int:
        """Programs along the outputs and inputs of a weight."""
        return -(-outputs // self.block_n) * (self.chunks(inputs) if self.split else 1)


def tilings(mlp: ExpertMlp, pairs: int, room: int = ROOM, *, early: bool = True) -> tuple[Tiling, Tiling]:
    """How up and down projection are cut.

    What a pair gives must not depend on other pairs, so only what does not enter the arithmetic may depend on their number.

    Args:
        mlp: the experts.
        pairs: (token, rank) pairs of the call.
        room: bytes of shared memory that a program may take.
        early: whether the device has Hopper's programmatic launch and its products, which take fewer registers.
    """
    if mlp.dtype == "float32":
        up, down = Tiling(16, 32, 4, 3), Tiling(32, 32, 4, 3)
    elif mlp.transposed:
        up, down = Tiling(64, 64, 4, 4), Tiling(64, 64, 4, 6)
    else:
        up, down = Tiling(32, 128, 4, 4), Tiling(64, 128, 4, 3)
    if not INTERPRETED.value:  # in the interpreter `block_k` decides about bits, on a GPU it does not
        up = _of_codes(mlp.up.spec, pairs, up, 2 if mlp.gated else 1, early=early)
        down = _of_codes(mlp.down.spec, pairs, down, 1, early=early)
    up, down = replace(up, chunk=chunk_of(mlp.hidden)), replace(down, chunk=chunk_of(mlp.width))
    return _within(room, up, mlp.up.spec, 2 if mlp.gated else 1), _within(room, down, mlp.down.spec, 1)


def _of_codes(spec: TensorSpec, pairs: int, other: Tiling, outputs: int, *, early: bool) -> Tiling:
    """The tiling of a weight whose codes are decoded in registers, else the `other` one; `benchmarks/tune_experts.py` compares them.

    Programs share a product where there are too few to fill a GPU. On Hopper those of one output an element are small enough then to run
    at the same time, and request their codes before anything else; at one token, those of two outputs as well. Codes of one byte are read
    fastest by many small programs.
    """
    if _by_halves(spec):
        return _of_halves(spec.format, pairs, outputs, early=early)
    if _by_words(spec):
        fits = bool(ahead_fits(spec.format.constants(spec), spec.inputs))
        return _of_bytes(pairs, outputs, fits=fits, early=early)
    return other


def _of_halves(format_: Format, pairs: int, outputs: int, *, early: bool) -> Tiling:
    """Of codes of four bits."""
    few, shared = pairs < FEW_PAIRS, pairs <= SHARED_PAIRS
    small_groups = getattr(format_, "group", 0) < 32
    scaled_twice = small_groups and not format_.quick  # a thread needs more registers then
    if early and outputs == 1 and (few if scaled_twice else shared):
        return Tiling(64, 128, split=True, registers=_AT_ONCE, ahead=1 if small_groups else 2)
    if early and not scaled_twice and pairs <= _OF_ONE_TOKEN:
        return Tiling(64 // outputs, 128, split=True, registers=_AT_ONCE, ahead=1)
    if early and not scaled_twice and outputs == 1:
        return Tiling(64, 128, registers=_FIVE)
    block, most = 64 if few or outputs > 1 else 128, None if scaled_twice and outputs == 1 else 128
    return Tiling(block, 128, split=shared, registers=most)


def _of_bytes(pairs: int, outputs: int, *, fits: bool, early: bool) -> Tiling:
    """Of codes of eight bits; `fits`: whether they can be requested ahead."""
    few = pairs < FEW_PAIRS
    if early and fits and (few if outputs == 1 else pairs <= _OF_ONE_TOKEN):
        return Tiling(64 // outputs, 128, split=True, registers=_AT_ONCE, ahead=1)
    if outputs == 1:
        return Tiling(64, 128, stages=3, split=few, registers=_FIVE if early and not few else None)
    return Tiling(32, 128, stages=4)


def chunk_of(inputs: int) -> int:
    """Inputs of a chunk of a weight with so many: at most `CHUNKS` chunks, of at least four steps of 128.

    It enters the arithmetic, so it is the same for every format and number of tokens.
    """
    steps = -(-inputs // 128)
    return -(-steps // min(CHUNKS, max(1, steps // 4))) * 128


def _within(room: int, cut: Tiling, spec: TensorSpec, outputs: int) -> Tiling:
    """A tiling that `room` bytes of shared memory hold; `outputs` of the weight make one of `block_n`.

    Only packed words that are not taken out two by two need so much: the tile loader fetches the word of every single number.
    """
    size = DTYPES[spec.dtype].nbytes

    def fits(cut: Tiling) -> bool:
        numbers = cut.block_n * outputs * cut.block_k
        tokens = TILE * cut.block_k * cut.stages
        return 4 * numbers * (cut.stages - 1) + size * (numbers + tokens) <= room

    in_threads = cut.block_n * outputs % 64 == 0 and cut.block_k == STEP.value
    if spec.format.tiles != "words" or (_by_halves(spec) and in_threads):
        return cut
    blocks = [block for block in (cut.block_n, cut.block_n // 2, cut.block_n // 4) if block >= TILE]
    smaller = [
        replace(cut, block_n=block, stages=stages)
        for block in blocks
        for stages in range(cut.stages, _LEAST_STAGES - 1, -1)
    ]
    return next(filter(fits, smaller), smaller[-1])


def _by_halves(spec: TensorSpec) -> bool:
    """Whether a weight is made of four-bit codes, two at a time."""
    return spec.format.tiles == "words" and bool(by_halves(spec.format.constants(spec), spec.dtype))


def _by_words(spec: TensorSpec) -> bool:
    """Whether a weight is made of codes of one byte, four at a time."""
    if spec.format.tiles != "bytes":
        return False
    return bool(by_words(spec.format.constants(spec), spec.dtype, spec.inputs, 128))
