"""Building blocks of a decode step: the kernels compute what their references do, whatever else is in the batch."""

from functools import partial

import pytest
import torch

from expertflow.execution.blocks import join
from expertflow.execution.blocks.join import joined
from expertflow.kernels import reference as experts_reference
from expertflow.kernels.blocks import reference
from expertflow.kernels.blocks.given import Cells, Heads, LatentHeads, Norm, Places, Rotary, Router, RouterRule, Seen
from helpers import DEVICE

pytest.importorskip("triton", reason="kernels need triton")
from expertflow.kernels import experts
from expertflow.kernels.blocks import attend, gated, product, rotate, route, slots
from expertflow.kernels.blocks import latents as latents_kernel

CLOSE = {torch.float32: 1e-5, torch.bfloat16: 4e-2}
RULES = {
    "gpt-oss": RouterRule(top_k=4, scores="logits", over_chosen=True),
    "mixtral": RouterRule(top_k=2, normalised=True, wide_weights=True),
    "qwen": RouterRule(top_k=4),
    "ernie": RouterRule(top_k=4, normalised=True, wide_logits=True),  # with a correction, which a GPU might join with a product
    "deepseek-v2": RouterRule(top_k=4, groups=4, kept_groups=2, scale=16.0, wide_logits=True, wide_weights=True),
    "deepseek-v3": RouterRule(
        top_k=4, scores="sigmoid", groups=4, kept_groups=3, group_top=2, normalised=True, scale=2.5, wide_logits=True, wide_weights=True,
    ),
}  # fmt: skip


def draw(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def norm_of(width: int, dtype: torch.dtype, *, wide: bool = False) -> Norm:
    return Norm(1 + 0.2 * draw(width, dtype=dtype, seed=9), 1e-5, wide)


@pytest.mark.parametrize("dtype", CLOSE)
@pytest.mark.parametrize("tokens", [1, 4, 5, 19])
@pytest.mark.parametrize("full", [False, True])
def test_product_is_the_references(tokens: int, dtype: torch.dtype, *, full: bool) -> None:
    """Inputs and outputs that no block size divides; with norm, bias, residual and share, and without; few tokens, and more than a tile."""
    states = draw(tokens, 99, dtype=dtype)[:, :88]  # as the first of what another product gave
    states, weight = states if full else states.contiguous(), draw(37, 88, dtype=dtype, seed=1) * 0.1
    more = (
        draw(37, dtype=dtype, seed=2),
        norm_of(88, dtype, wide=tokens % 2 == 0),
        draw(tokens, 37, dtype=dtype, seed=3),
        draw(tokens, 1, dtype=dtype, seed=4).sigmoid(),
    )
    given = more if full else ()
    theirs = reference.product(states, weight, *given)
    for computed in (product.product, partial(product.product, most=0)):  # of steps, and of passes over prompts
        torch.testing.assert_close(computed(states, weight, *given), theirs, atol=CLOSE[dtype], rtol=CLOSE[dtype])


@pytest.mark.parametrize("dtype", CLOSE)
@pytest.mark.parametrize(
    ("tokens", "activation"), [(1, "silu"), (5, "gelu_tanh"), (19, "silu"), (1, "relu2"), (70, "gelu")]
)
def test_gated_products_are_the_references(tokens: int, dtype: torch.dtype, activation: str) -> None:
    """Both products in one launch, with a norm before them and without; one token, a tile, several, and so many that cuBLAS has them."""
    states, weight = draw(tokens, 88, dtype=dtype), draw(74, 88, dtype=dtype, seed=1) * 0.1
    for norm in (None, norm_of(88, dtype, wide=tokens == 5)):
        mine, theirs = (module.gated(states, weight, activation, norm) for module in (gated, reference))
        assert mine.shape == (tokens, 37)
        torch.testing.assert_close(mine, theirs, atol=CLOSE[dtype], rtol=CLOSE[dtype])


@pytest.mark.parametrize("tokens", [3, 16])
def test_a_token_of_a_product_has_its_bits_anywhere(tokens: int) -> None:
    """In another place, beside other tokens: the same bits, of one captured size."""
    states, weight = draw(tokens, 96, dtype=torch.bfloat16), draw(40, 96, dtype=torch.bfloat16, seed=1)
    first = product.product(states, weight, None, norm_of(96, torch.bfloat16))
    order = torch.arange(tokens).flip(0)
    other = torch.cat([states[order[: tokens - 1]], 7 * states[:1]])
    again = product.product(other, weight, None, norm_of(96, torch.bfloat16))
    assert torch.equal(first[order[: tokens - 1]], again[: tokens - 1])


def test_a_token_of_latents_and_gated_products_has_its_bits_anywhere() -> None:
    """In another place, beside other tokens, behind the sixteenth: the same bits, of one captured size."""
    count, order = 19, torch.randperm(19, generator=torch.Generator().manual_seed(8)).to(DEVICE)
    states, weight = draw(count, 96, dtype=torch.bfloat16), draw(80, 96, dtype=torch.bfloat16, seed=1)
    norm, rank = norm_of(96, torch.bfloat16), 40
    assert torch.equal(
        gated.gated(states, weight, "silu", norm)[order], gated.gated(states[order], weight, "silu", norm)
    )
    heads = LatentHeads(2, 16, 8, norm_of(rank, torch.bfloat16), draw(2 * 32, rank, dtype=torch.bfloat16, seed=2))
    joined, angles = draw(count, 2 * 24 + rank + 8, dtype=torch.bfloat16), draw(count, 4, seed=4)
    table = torch.arange(4 * count, dtype=torch.int32, device=DEVICE).view(count, 4)
    rows, positions, found = torch.arange(count, device=DEVICE), torch.arange(count, device=DEVICE) * 13, []
    for place in (rows, order):
        where, here = rows[place], positions[place]
        kept = [draw(4 * count, 1, 64, size, dtype=torch.bfloat16, seed=6) for size in (rank, 8)]
        cells = Cells(*kept, table[where, here // 64].long(), here % 64)
        rotary = Rotary(angles[place].cos(), angles[place].sin(), doubled=False, woven=True)
        asked, latents = joined[place].split([2 * 24, rank + 8], dim=1)
        seen = Seen(where, here, table, 0.3, None, None)
        found.append((latents_kernel.attend_latents(asked, latents, heads, rotary, cells, seen), *kept))
    assert torch.equal(found[0][0][order], found[1][0])
    assert all(torch.equal(*pair) for pair in zip(found[0][1:], found[1][1:], strict=True))


@pytest.mark.parametrize(
    ("turned", "doubled", "window", "kind"),
    [
        (16, True, None, "heads"),
        (8, True, 90, "none"),
        (16, False, None, "heads"),
        (16, True, None, "all"),
        (8, False, None, "woven"),
    ],
)
@pytest.mark.parametrize("dtype", CLOSE)
def test_attention_is_the_references(
    turned: int, dtype: torch.dtype, window: int | None, kind: str, *, doubled: bool
) -> None:
    """Whole heads and parts of them, one span and several; keys and values arrive in their pages of one layer, and nowhere else.

    Norms are of each head, of all of them together, or there are none; pairs lie apart, or woven.
    """
    positions, heads = torch.tensor([300, 0, 127], device=DEVICE), Heads(6, 2, 16)
    angles = draw(3, turned // 2, seed=4)
    angles = torch.cat([angles, angles], dim=1) if doubled else angles
    rotary = Rotary(angles.cos().to(dtype), angles.sin().to(dtype), doubled, kind == "woven")
    widths = {"heads": (16, 16), "all": (96, 32), "woven": (16, 16)}.get(kind)
    norms = widths and tuple(
        norm_of(width, dtype)._replace(weight=draw(width, dtype=dtype, seed=5 + place))
        for place, width in enumerate(widths)
    )
    states, table = (
        draw(3, heads.all * 16, dtype=dtype),
        torch.arange(18, dtype=torch.int32, device=DEVICE).flip(0).view(3, 6),
    )
    rows, found = torch.tensor([2, 0, 1], device=DEVICE), []
    pages, places = table[rows, positions // 64].long(), positions % 64
    for module in (attend, reference):
        kept = draw(2, 3, 18, 2, 64, 16, dtype=dtype, seed=6)  # of three layers, the second is written
        kept[:, 1, pages, :, places] = torch.nan  # what lay there before is of no account
        sinks = draw(6, dtype=dtype, seed=7) if doubled else None
        seen = Seen(rows, positions, table, 0.3, window, sinks)
        heads_gave = module.attend(states, heads, rotary, norms, Cells(kept[0, 1], kept[1, 1], pages, places), seen)
        found.append((heads_gave, kept))
    for mine, theirs in zip(*found, strict=True):
        torch.testing.assert_close(mine, theirs, atol=CLOSE[dtype], rtol=CLOSE[dtype])
    values = states.view(3, heads.all, 16)[0, 8:]
    assert torch.equal(found[0][1][1, 1, pages[0], :, 300 % 64], values)


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [("heads", torch.bfloat16), ("none", torch.bfloat16), ("all", torch.float32), ("woven", torch.float32)],
)
def test_prompts_are_turned_as_the_reference_turns_them(kind: str, dtype: torch.dtype) -> None:
    """Tokens of more than one program; keys and values arrive in their cells, and nowhere else. Three query heads are no power of two."""
    tokens, heads, half = 70, Heads(6, 2, 16), 4 if kind == "none" else 8
    angles = draw(tokens, half, seed=4).repeat(1, 1 if kind == "woven" else 2)
    tables = [
        table.to(dtype).T.contiguous().T if kind == "none" else table.to(dtype)
        for table in (angles.cos(), angles.sin())
    ]
    rotary = Rotary(*tables, kind != "woven", kind == "woven")  # some models make them transposed
    widths, norms = {"heads": (16, 16), "all": (96, 32), "woven": (16, 16)}.get(kind), None
    if widths:
        query, key = (norm_of(width, dtype) for width in widths)
        norms = query, key._replace(weight=draw(widths[1], dtype=dtype, seed=6))
    states, found = draw(tokens, heads.all * 16, dtype=dtype), []
    place = torch.randperm(3 * 64, generator=torch.Generator().manual_seed(1))[:tokens].to(DEVICE)
    for module in (rotate.rotate, reference.rotate):
        kept = draw(2, 4, 2, 64, 16, dtype=dtype, seed=7)
        found.append((module(states, heads, rotary, norms, Cells(*kept, place // 64, place % 64)), kept))
    for mine, theirs in zip(*found, strict=True):
        torch.testing.assert_close(mine, theirs, atol=CLOSE[dtype], rtol=CLOSE[dtype])
    assert torch.equal(found[0][1][1], found[1][1][1])


@pytest.mark.parametrize(
    ("tables", "woven", "parted", "dtype"),
    [
        ("paired", True, False, torch.float32),
        ("doubled", True, True, torch.float32),
        ("doubled", True, True, torch.bfloat16),
        ("single", False, False, torch.bfloat16),
    ],
)
def test_latent_attention_is_the_references(tables: str, dtype: torch.dtype, *, woven: bool, parted: bool) -> None:
    """More tokens than a tile has; latents and rotary parts arrive in their pages of one layer, and nowhere else.

    Pairs lie in every order that there is, and angles come as DeepSeek-V2 and V3 give them. Widths are no powers of two.
    """
    count, queries, plain, rope, width, rank = 19, 3, 24, 12, 20, 40
    angles, positions = draw(count, rope // 2, seed=4), torch.arange(count, device=DEVICE) * 16
    if tables == "paired":
        cos, sin = torch.view_as_real(torch.polar(torch.ones_like(angles), angles)).unbind(2)
    else:
        angles = torch.cat([angles, angles], dim=1) if tables == "doubled" else angles
        cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    rotary = Rotary(cos, sin, tables == "doubled", woven, parted)
    weight = draw(queries * (plain + width), rank, dtype=dtype, seed=2) * rank**-0.5
    heads = LatentHeads(queries, plain, rope, norm_of(rank, dtype, wide=parted), weight)
    joined = draw(count, queries * (plain + rope) + rank + rope, dtype=dtype)
    asked, latents = joined.split([queries * (plain + rope), rank + rope], dim=1)
    table = torch.arange(5 * count, dtype=torch.int32, device=DEVICE).flip(0).view(count, 5)
    rows, found = torch.arange(count, device=DEVICE).flip(0), []
    pages, places = table[rows, positions // 64].long(), positions % 64
    for module in (latents_kernel, reference):
        kept = [draw(3, 5 * count, 1, 64, size, dtype=dtype, seed=6) for size in (rank, rope)]
        for part in kept:
            part[:, pages, :, places] = torch.nan
        cells = Cells(kept[0][1], kept[1][1], pages, places)
        heads_gave = module.attend_latents(
            asked, latents, heads, rotary, cells, Seen(rows, positions, table, 0.3, None, None)
        )
        found.append((heads_gave, *(part[1] for part in kept)))
        assert all(part[[0, 2]][:, pages, :, places].isnan().all() for part in kept)
    for mine, theirs in zip(*found, strict=True):
        torch.testing.assert_close(mine, theirs, atol=CLOSE[dtype], rtol=CLOSE[dtype])


@pytest.mark.parametrize("dtype", CLOSE)
@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_router_is_the_references(rule: RouterRule, dtype: torch.dtype) -> None:
    """Every kind of router, with what it may add, a shared expert's share, and recorded experts in its place; counters are back at zero."""
    tokens, count = 5, 12
    bias, correction = draw(count, dtype=dtype, seed=6), draw(count, seed=7)
    gated = rule is RULES["qwen"]
    router = Router(
        draw(count + gated, 72, dtype=dtype, seed=8) * 0.2,
        bias if rule.over_chosen else None,
        correction if rule.wide_logits else None,
        rule,
        gated,
    )
    states, counts = draw(tokens, 72, dtype=dtype), torch.zeros(tokens, dtype=torch.int32, device=DEVICE)
    slots = torch.arange(20, 20 + count, dtype=torch.int32, device=DEVICE)
    places = Places(slots, torch.tensor([3], dtype=torch.int32, device=DEVICE))
    mine, theirs = (module.route(states, norm_of(72, dtype), router, counts, places) for module in (route, reference))
    assert torch.equal(mine[3][:3], 20 + mine[1][:3].int())
    assert (mine.share is None) == (not router.gated)
    for one, other in zip(mine[: 4 + router.gated], theirs, strict=False):
        assert one.dtype == other.dtype
        torch.testing.assert_close(one, other, atol=CLOSE[dtype], rtol=CLOSE[dtype])
    assert not counts.any()
    recorded = torch.arange(tokens * rule.top_k, device=DEVICE).view(tokens, rule.top_k) % count
    replayed = route.route(states, norm_of(72, dtype), router, counts, places, recorded)
    assert torch.equal(replayed.chosen, recorded)
    assert torch.equal(replayed.slots[:3], 20 + recorded[:3].int())
    assert torch.equal(replayed.weights, mine.weights)
    again = reference.route(states, norm_of(72, dtype), router, counts, places, recorded)
    assert torch.equal(replayed.slots, again.slots)
    assert torch.equal(again.chosen, recorded)


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # of the interpreter
def test_a_router_without_numbers_still_chooses_experts() -> None:
    """NaN gives K distinct experts that there are, and weights that are no numbers."""
    router = Router(draw(12, 16), None, None, RULES["mixtral"])
    counts = torch.zeros(1, dtype=torch.int32, device=DEVICE)
    states = torch.full((1, 16), torch.nan, device=DEVICE)
    _, index, weights, *_ = route.route(states, norm_of(16, torch.float32), router, counts)
    assert len(set(index[0].tolist())) == 2
    assert 0 <= int(index.min()) <= int(index.max()) < 12
    assert weights.isnan().all()


def test_sums_take_what_is_added_behind_them() -> None:
    """A shared expert's states and the residual, in any number; slots are looked up for live tokens alone."""
    parts, index = draw(3, 2, 40), torch.tensor([[1, 3], [0, 4], [2, 2]], device=DEVICE)
    weights, added = draw(3, 2, seed=1), [draw(3, 40, seed=seed) for seed in (2, 3)]
    for count in range(3):
        outs = [torch.empty(3, 40, device=DEVICE) for _ in range(2)]
        for module, out in zip((experts, experts_reference), outs, strict=True):
            module.combine(parts, index, weights, 4, out, added[:count])
        torch.testing.assert_close(*outs)
    places = torch.tensor([7, 5, -1, 9], dtype=torch.int32, device=DEVICE)
    live = torch.tensor([2], dtype=torch.int32, device=DEVICE)
    for module in (slots, experts_reference):
        assert module.find_slots(places, index, live).tolist() == [[5, 9], [7, -1], [-1, -1]]


@pytest.mark.parametrize("large", [0, 1 << 20])
def test_joined_weights_take_no_memory(large: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts become views, numbers stay; a second time gives the same memory; what would lie askew is left alone.

    Large ones by way of the host, so that they are never there twice.
    """
    monkeypatch.setattr(join, "LARGE", large)
    parts = [torch.nn.Parameter(draw(rows, 16, seed=rows), requires_grad=False) for rows in (8, 4, 4)]
    before = [part.clone() for part in parts]
    whole = joined(parts)
    assert torch.equal(whole, torch.cat(before))
    assert {part.untyped_storage().data_ptr() for part in parts} == {whole.untyped_storage().data_ptr()}
    assert joined(parts).data_ptr() == whole.data_ptr()
    assert joined([draw(1, 3), draw(1, 3)]) is None


def test_weights_that_cannot_be_joined_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    """Large ones leave the device before they are joined; without memory for the joined one they come back."""
    parts = [torch.nn.Parameter(draw(16, 8, seed=seed)) for seed in range(3)]
    before = [part.detach().clone() for part in parts]

    def full(*_: object, **__: object) -> torch.Tensor:
        raise torch.OutOfMemoryError("full")

    monkeypatch.setattr(join, "LARGE", 0)
    with monkeypatch.context() as patched:
        patched.setattr(torch, "empty", full)
        with pytest.raises(torch.OutOfMemoryError):
            joined(parts)
    assert all(map(torch.equal, parts, before))
    assert torch.equal(joined(parts), torch.cat(before))
