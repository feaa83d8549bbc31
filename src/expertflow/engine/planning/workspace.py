"""The temporary memory of a pass over prompts and of a step, bytes: upper bounds from tensor sizes, compared with measured peaks.

Pure. Must not know budgets and slots.
"""

from expertflow.execution.kv.layout import pages_of
from expertflow.execution.sampling.scoring import POSITIONS
from expertflow.formats.dtypes import DTYPES
from expertflow.kernels.dense_reference import LEAST_HEADS, SPAN
from expertflow.kernels.latent.reference import EXPANDED, spans_of
from expertflow.kernels.mlp import DOWN_NAMES, Workspace
from expertflow.kernels.residency.state import CacheState
from expertflow.models.shape import ModelShape

CUDA_LIBRARY_BYTES = 40 * 2**20
"""cuBLAS keeps 32 MiB in the allocator on an H100 (benchmarks/results/host_execution_h100.json), plus 8 MiB of room."""
GRAPH_POOL_BYTES = 64 * 2**20
"""The allocator takes a graph's memory in blocks of 2 and 20 MiB that it does not give back."""
_SLACK = 1.1
"""Factor on counted temporaries: allocators round up, and operators are counted by name, not by trace."""


def graph_bytes(shape: ModelShape, rows: int, length: int, device: str) -> int:
    """Return an upper bound on the bytes of decode steps as graphs, beside weights, keys and values, and slots.

    The host execution's workspace is not in it: prompts run while the graphs keep their memory.
    """
    pairs, width = rows * shape.top_k, inner_width(shape)
    state = CacheState.nbytes(shape.layers, shape.experts, shape.total_experts)
    sizes = pairs, width, 2 * width, shape.hidden
    buffers = Workspace.nbytes(*sizes, DTYPES[shape.dtype].nbytes) + Workspace.beside_nbytes(*sizes)
    buffers += rows * (shape.vocabulary * DTYPES[shape.dtype].nbytes + 16)
    buffers += shape.layers * (shape.experts + 1) * 4
    buffers += rows.bit_length() * 2 * (min(pairs, shape.experts) + 2) * (pairs + 3) * 4
    if device != "cuda":  # an expert is decoded, and computed in float32; so is a token's attention to its past
        attention = length * (4 * shape.heads * 4 + 2 * max((layer.read_per_token for layer in shape.kv), default=0))
        return state + buffers + shape.records.decode_bytes + 3 * shape.expert_width * shape.hidden * 4 + 2 * attention
    captured = workspace_bytes(shape, rows, length, rows, prompts=False, grouped=True, linear=shape.decode_kernel)
    if shape.decode_kernel:
        captured += attention_parts(shape, rows, length)
    return state + buffers + captured + CUDA_LIBRARY_BYTES + GRAPH_POOL_BYTES


def inner_width(shape: ModelShape) -> int:
    """Return the elements between the projections of an expert (I)."""
    return next((spec.inputs for spec in shape.specs if spec.name in DOWN_NAMES), shape.expert_width)


def attention_parts(shape: ModelShape, rows: int, length: int) -> int:
    """Return the bytes in which a captured step's attention keeps the sums of a sequence's spans; none if there is one span.

    Over latents there are queries brought to them as well, and sums also of one span.
    """
    if shape.latent:
        least, most = spans_of(shape.heads)
        element, spans = DTYPES[shape.dtype].nbytes, min(most, pages_of(length, least))
        return rows * shape.heads * (spans * (shape.latent * element + 4) + shape.latent * element)
    spans, width = pages_of(length, SPAN), shape.head_width // shape.heads
    heads = max(layer.read_per_token for layer in shape.kv) // (2 * DTYPES[shape.dtype].nbytes * width)
    padded = max(LEAST_HEADS, 1 << (shape.heads // heads - 1).bit_length())
    return rows * heads * spans * padded * (width + 2) * 4 if spans > 1 else 0


def workspace_bytes(  # noqa: PLR0913 - three by keyword
    shape: ModelShape,
    batch: int,
    length: int,
    chunk: int,
    *,
    prompts: bool = True,
    grouped: bool = False,
    linear: bool = False,
) -> int:
    """Return an upper bound on the temporary device memory of one step, bytes.

    The phases of a layer follow one another, so the largest counts; tensors that live through all of them are added.

    Args:
        shape: the model's figures.
        batch: sequences.
        length: tokens of a sequence, prompt included.
        chunk: tokens of a prefill pass over all sequences.
        prompts: whether the step may be one over prompts.
        grouped: whether kernels compute all tokens of an expert at once, from slots.
        linear: whether a kernel computes attention, without scores and masks in memory.
    """
    element = DTYPES[shape.dtype].nbytes
    tokens = max(chunk, batch)
    if shape.encoder_decoder and prompts:
        tokens = max(tokens, batch * length)  # an encoder reads its prompts whole
    columns = max(1, tokens // batch)
    state = tokens * shape.hidden
    steady = tokens * 8 * 8  # positions
    if linear:  # embeddings, a layer's input, residual, normed input; rotary tables, in float32 too. Norms are kernels
        steady += state * element * 4 + tokens * 2 * (shape.head_width // shape.heads) * (element + 4)
    else:  # the same and what norms make, and masks
        steady += state * element * 6 + state * 4 * 2 + batch * columns * length * (2 * element + 8)
    if any(layer.in_pages for layer in shape.kv):  # where a pass's keys and values lie in their pages
        steady += tokens * 8 * 8
        if not linear:
            steady += batch * length * (shape.heads + 4) * 8 * len(set(shape.windows))
    attention = _attention(shape, batch, length, tokens, linear=linear)
    if linear and prompts and shape.latent:
        attention += _expanded(shape, batch * length)
    return int(_SLACK * (steady + max(attention, _moe(shape, tokens, grouped=grouped), _head(shape, batch))))


def _attention(shape: ModelShape, batch: int, length: int, tokens: int, *, linear: bool) -> int:
    element, columns = DTYPES[shape.dtype].nbytes, max(1, tokens // batch)
    tokens = max(tokens, batch * columns)  # a pass without padding has as many as it is large
    if linear:  # what is kept is read where it lies: queries, keys and values of the pass, while keys are rotated, in float32 perhaps
        kept = max(layer.bytes_per_token for layer in shape.kv if layer.in_pages) // (2 * element)
        return tokens * (shape.head_width + kept) * (2 * element + 2 * 4)
    # queries, keys, values and their rotated copies (in float32 while rotating)
    heads = tokens * shape.head_width * (6 * element + 3 * 4)
    # a layer's KV rows of the sequences that step are gathered; keys and values are repeated over grouped heads
    cache = max((layer.read_per_token for layer in shape.kv), default=0) * batch * length
    repeated = 3 * batch * length * shape.head_width * element
    scores = batch * shape.heads * columns * length * (4 if not shape.encoder_decoder and not shape.scores else 16)
    return heads + cache + repeated + scores


def _expanded(shape: ModelShape, columns: int) -> int:
    """Keys and values that are made of latents at once: of so many heads as fit, of one at least."""
    of_head = max(layer.read_per_token - layer.bytes_per_token for layer in shape.kv) // shape.heads * columns
    return max(of_head, min(of_head * shape.heads, EXPANDED))


def _moe(shape: ModelShape, tokens: int, *, grouped: bool) -> int:
    element = DTYPES[shape.dtype].nbytes
    pairs = tokens * shape.top_k
    router = tokens * shape.experts * 4 * 5
    sorting = pairs * 8 * 6 + pairs * 4 * 2
    dense = tokens * shape.dense_width * element * 4
    if grouped:  # what each pair's expert made, and what lies between its projections; then their sum
        between = pairs * (shape.hidden * 4 + inner_width(shape) * element)
        return router + sorting + 2 * tokens * shape.hidden * element + max(between, dense)
    parts = pairs * shape.hidden * element + 3 * tokens * shape.hidden * element
    # one expert may get every token: its input (a copy where token rows are not aligned), inner states, output; weighting them
    expert = tokens * (3 * shape.hidden * element + 4 * shape.expert_width * element + shape.hidden * 4)
    records = shape.records  # a record is decoded before its expert is computed
    return router + sorting + parts + max(expert + records.decoded_bytes, records.decode_bytes, dense)


def _head(shape: ModelShape, batch: int) -> int:
    # logits, their float32 copy, probabilities, sorted values, indices and running sums of one sequence at a time
    # or log-probabilities of two sequences, or of two of a few positions of a prompt
    element, scored = DTYPES[shape.dtype].nbytes, 0 if shape.encoder_decoder else POSITIONS
    return shape.vocabulary * (batch * (element + 8) + scored * element + 40)
