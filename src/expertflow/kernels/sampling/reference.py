"""Pick the next token of each sequence, as a chain of small functions: allow, weigh, top-k, top-p, min-p, draw.

What one sequence gets depends on its own logits and parameters alone, bit for bit, on every device. Chances are whole
numbers, so sums have one value in any order. Tokens are ordered by logit, the lowest id first among equals; a draw is the
inverse of the running sum of kept chances in the order of ids. The kernels of `kernels.sampling.select` and `.likely` are the twins.
Must not know requests and options.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

UNIFORM, TOP_K, TOP_P, SCALE, LEAST = range(5)
"""Columns of `rules`."""
RULES = 5
"""Columns of `rules`."""
NO_TOKEN = -1
"""In place of a token where logits are no numbers."""
WEIGHT_BITS = 40
"""The most probable token weighs 2 to the power of this; one that is 2^-40 times as likely, or less, weighs nothing."""
FRACTION_BITS = 24
"""Binary places of an exponent."""
LOWEST = -63.0
"""Exponents are cut off here."""
POWERS = (2**31, 1488521975, 515877768, 119164956, 20570151, 2736670, 233859)
"""2^-g = c0 - g (c1 - g (c2 - ...)) for g from 0 to 1, times 2^31: least squares at 200 Chebyshev points, error below 5e-9."""


def choose(
    logits: Float[Tensor, "B V"], rules: Float[Tensor, "B 5"], mask: Int[Tensor, "B W"] | None = None
) -> Int[Tensor, " B"]:
    """Pick a token of each sequence.

    Args:
        logits: of any float dtype, V at most 2^22; minus infinity forbids a token.
        rules: float64, a sequence: a uniform number in [0, 1); how many of the most probable tokens are kept, 0: all; the share
            of their chances that is kept; log2(e) / temperature, rounded to float32; and log2(min_p), or minus infinity.
        mask: int32, W = ceil(V / 32): bit `v % 32` of word `v // 32` is set where token v is allowed. None: all are.

    Returns:
        int64; `NO_TOKEN` where a logit is NaN, or the largest allowed one is infinite.
    """
    allowed = allow(logits.float(), mask)
    top = allowed.amax(dim=-1, keepdim=True)  # NaN if there is one: a GPU sorts one with a sign last
    ordered, ids = allowed.sort(dim=-1, descending=True, stable=True)
    del allowed
    exponents = scale(ordered, top, rules[:, SCALE, None])
    weights = weigh(exponents)
    weights = top_k(weights, rules[:, TOP_K, None])
    weights = top_p(weights, rules[:, TOP_P, None])
    weights = min_p(weights, exponents, rules[:, LEAST, None])
    del exponents, ordered
    weights = torch.empty_like(weights).scatter_(-1, ids, weights)
    return draw(weights, rules[:, UNIFORM, None]).masked_fill_(~top[:, 0].isfinite(), NO_TOKEN)


def allow(logits: Float[Tensor, "B V"], mask: Int[Tensor, "B W"] | None) -> Float[Tensor, "B V"]:
    """Forbid what the mask lacks; NaN stays, so that it is seen."""
    if mask is None:
        return logits
    ids = torch.arange(logits.shape[1], dtype=torch.int32, device=logits.device)
    forbidden = (mask[:, ids // 32] >> (ids % 32)) & 1 == 0
    return logits.masked_fill(forbidden & ~logits.isnan(), float("-inf"))


def scale(
    logits: Float[Tensor, "B V"], top: Float[Tensor, "B 1"], factor: Float[Tensor, "B 1"]
) -> Float[Tensor, "B V"]:
    """Exponents of 2, from `LOWEST` to 0, by temperature; overwrites the logits. What follows is whole numbers."""
    top = top.masked_fill(~top.isfinite(), 0.0)  # nothing is drawn there
    return logits.sub_(top).mul_(factor.float()).nan_to_num_(LOWEST).clamp_(LOWEST, 0.0)


def weigh(exponents: Float[Tensor, "B V"]) -> Int[Tensor, "B V"]:
    """2 to these powers, times 2^`WEIGHT_BITS`, rounded down."""
    fixed = (exponents * -float(2**FRACTION_BITS)).to(torch.int32)
    fraction = (fixed & (2**FRACTION_BITS - 1)).long() << 8
    power = torch.full_like(fraction, POWERS[-1])
    for coefficient in reversed(POWERS[:-1]):
        power.mul_(fraction).bitwise_right_shift_(32).neg_().add_(coefficient)
    return power.bitwise_left_shift_(WEIGHT_BITS - 31).bitwise_right_shift_(fixed >> FRACTION_BITS)


def top_k(weights: Int[Tensor, "B V"], count: Float[Tensor, "B 1"]) -> Int[Tensor, "B V"]:
    """Keep the first `count`; 0 keeps all."""
    places = torch.arange(weights.shape[1], device=weights.device)
    return weights.masked_fill_((places >= count) & (count > 0), 0)


def top_p(weights: Int[Tensor, "B V"], share: Float[Tensor, "B 1"]) -> Int[Tensor, "B V"]:
    """Keep the fewest of the first ones that together have this share of the kept chances."""
    running = weights.cumsum(-1)
    enough = (running[:, -1:].double() * share).ceil().long()
    return weights.masked_fill_((running.sub_(weights) >= enough) & (share < 1), 0)


def min_p(
    weights: Int[Tensor, "B V"], exponents: Float[Tensor, "B V"], least: Float[Tensor, "B 1"]
) -> Int[Tensor, "B V"]:
    """Keep what is at least so likely, as a power of 2, in parts of the most probable token's chance."""
    return weights.masked_fill_(exponents < least.float(), 0)


def draw(weights: Int[Tensor, "B V"], uniform: Float[Tensor, "B 1"]) -> Int[Tensor, " B"]:
    """The first token whose running sum of chances is more than the uniform number's part of all."""
    running = weights.cumsum(-1)
    whole = running[:, -1:]
    wanted = (whole.double() * uniform).long().minimum(whole - 1)
    return (running <= wanted).sum(-1)


def choose_each(
    logits: Float[Tensor, "B V"],
    rules: Float[Tensor, "B 5"],
    mask: Int[Tensor, "B W"] | None = None,
    *,
    counted: bool = True,
    shared: bool = True,
) -> Int[Tensor, " B"]:
    """As `choose`, for a CPU: one sequence after the other, so that it takes the memory of one, and of its likely tokens alone.

    The last two arguments are hints for the kernel.
    """
    del counted, shared
    chosen = torch.full((len(logits),), NO_TOKEN)
    for row, (_, count, _, factor, _) in enumerate(rules.tolist()):
        one = allow(logits[row : row + 1].float(), None if mask is None else mask[row : row + 1])[0]
        top = one.max()
        if not top.isfinite():
            continue
        below = (one - top).mul_(factor) > -(WEIGHT_BITS + 1)  # all others weigh nothing
        if 0 < count < len(one):
            below &= one >= one.topk(int(count)).values[-1]
        ids = below.nonzero()[:, 0]
        chosen[row] = ids[choose(one[None, ids], rules[row : row + 1])[0]]
    return chosen


BLOCK = 256
"""Tokens of which the most probable one is looked for first: a device finds few of many numbers slowly, and few of few fast."""
ROWS = 2
"""Sequences that `likely` works on at once: it takes up to 17 bytes for each of their logits, and 16 a token."""


def likely(
    logits: Float[Tensor, "B V"], rows: Int[Tensor, " R"], tokens: Int[Tensor, " R"], count: int
) -> Float[Tensor, "R N"]:
    """How likely a token is, and which are most likely. Waits for nothing.

    Args:
        logits: of all sequences; a line of logits with NaN or infinity means nothing.
        rows: the sequences concerned.
        tokens: one of each; what is found of one below 0 means nothing.
        count: how many of the most probable ones, at most V.

    Returns:
        float64 `[R, 2 + 2 count]`: the natural logarithm of the token's probability; its rank from 1; ids of the most probable ones; their
        logarithms.
    """
    parts = zip(rows.split(ROWS), tokens.clamp_min(0)[:, None].split(ROWS), strict=True)
    return torch.cat([_likely(logits[some].float(), chosen, count) for some, chosen in parts])


def _likely(values: Float[Tensor, "R V"], chosen: Int[Tensor, "R 1"], count: int) -> Float[Tensor, "R N"]:
    norm, own = values.logsumexp(-1, keepdim=True), values.gather(-1, chosen)
    ids = torch.arange(values.shape[1], device=values.device)
    rank = 1 + ((values > own) | ((values == own) & (ids < chosen))).sum(-1, keepdim=True)
    best = _largest(in_order(values, ids), count) if count else chosen[:, :0]
    found = token_of(best)
    return torch.cat([part.double() for part in (own - norm, rank, found, values.gather(-1, found) - norm)], dim=-1)


def in_order(values: Float[Tensor, "R N"], ids: Int[Tensor, "... N"]) -> Int[Tensor, "R N"]:
    """Integers in the order of the tokens: by logit, the lowest id largest among equals."""
    bits = torch.where(values == 0, 0.0, values).view(torch.int32)
    bits = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits).long()
    return bits.bitwise_left_shift_(32).add_((2**32 - 1) - ids)


def token_of(keys: Int[Tensor, "R K"]) -> Int[Tensor, "R K"]:
    """The tokens behind integers of `in_order`."""
    return (2**32 - 1) - (keys & (2**32 - 1))


def _largest(keys: Int[Tensor, "R V"], count: int) -> Int[Tensor, "R K"]:
    """The largest of keys that are all different, in descending order: they lie in that many blocks, those with the largest ones."""
    blocks = keys.shape[1] // BLOCK
    if count >= blocks:
        return keys.topk(count).values
    blocked, rest = keys[:, : blocks * BLOCK].unflatten(1, (blocks, BLOCK)), keys[:, blocks * BLOCK :]
    best = blocked.amax(-1).topk(count).indices
    found = blocked.gather(1, best[..., None].expand(-1, -1, BLOCK)).flatten(1)
    return torch.cat([found, rest], dim=1).topk(count).values
