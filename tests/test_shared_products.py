"""Programs that share a product by chunks of its inputs: the bits of one program that takes them all, and sums in the order of the chunks."""

from dataclasses import replace

import pytest
import torch

from expertflow.formats.format import Format, TensorSpec
from expertflow.formats.plain import PLAIN, plain
from expertflow.formats.published.fp8 import FP8
from expertflow.formats.published.gguf import GGUF
from expertflow.formats.published.int4 import INT4
from expertflow.formats.published.mxfp4 import MXFP4
from expertflow.formats.records import RecordLayout
from expertflow.kernels.mlp import ExpertMlp, Workspace
from helpers import DEVICES

pytest.importorskip("triton", reason="kernels need triton")
from expertflow.kernels import experts
from expertflow.kernels.prompts.grouped import GroupedMlp
from expertflow.kernels.prompts.pairs import sort_pairs
from expertflow.kernels.tiling import Tiling

DEVICE = torch.device(DEVICES[-1])
FORMATS = {"plain": PLAIN, "words": MXFP4, "words of int4": INT4, "bytes": FP8, "tiles": GGUF["Q8_0"]}


def make(format_: Format, hidden: int, width: int, experts_: int = 2) -> tuple[ExpertMlp, torch.Tensor]:
    """An MLP with a bias, and slots of random experts."""
    generator, specs = torch.Generator().manual_seed(3), []
    for name, shape in (("gate_up_proj", (2 * width, hidden)), ("down_proj", (hidden, width))):
        joined = 2 if name == "gate_up_proj" and format_ is not PLAIN else 1
        specs.append(TensorSpec(name=name, shape=shape, dtype="bfloat16", format=format_, joined=joined))
        specs.append(plain(f"{name}_bias", shape[:1], "bfloat16"))
    layout = RecordLayout.of(specs)
    pool = torch.zeros(experts_, layout.record_bytes, dtype=torch.uint8)
    for record in pool:
        for spec in layout.specs:
            for part, value in spec.format.draw(spec, generator, 0.05).items():
                target = layout.part(record, spec.name, part)
                target.copy_(value.view(target.shape))
    return ExpertMlp.of(layout, "silu"), pool.to(DEVICE)


def run(mlp: ExpertMlp, pool: torch.Tensor, hidden: torch.Tensor, slots: torch.Tensor, cut: Tiling) -> torch.Tensor:
    """What the pairs give, the second time: counts are back to 0 by then."""
    work = Workspace.allocate(mlp, *slots.shape, DEVICE)
    for _ in range(2):
        work.parts.fill_(torch.nan)
        experts.launch_up(mlp, hidden, slots, pool, work, cut)
        experts.launch_down(mlp, slots, pool, work, cut)
    assert not work.counts.any()
    return work.parts


@pytest.mark.parametrize("name", ["plain", "words", "bytes", "tiles"])
def test_programs_that_share_a_product_give_the_same_bits(name: str) -> None:
    """Every reader, with whole chunks and a short one, a pair without a slot, and an expert of two tokens."""
    mlp, pool = make(FORMATS[name], 160, 192)
    hidden = torch.randn(3, 160, generator=torch.Generator().manual_seed(1)).to(DEVICE, torch.bfloat16)
    slots = torch.tensor([[0], [-1], [0]], dtype=torch.int32, device=DEVICE)
    one = Tiling(32, 64, chunk=128)
    found = [run(mlp, pool, hidden, slots, cut) for cut in (one, replace(one, split=True))]
    assert found[1].isnan().any(dim=2)[:, 0].tolist() == [False, True, False]
    assert torch.equal(found[0][[0, 2]], found[1][[0, 2]])


@pytest.mark.parametrize("width", [512, 576, 832] if DEVICE.type == "cuda" else [512, 640])
@pytest.mark.parametrize("name", ["words", "words of int4", "bytes"])
def test_codes_requested_ahead_give_the_same_bits(name: str, width: int) -> None:
    """Whole chunks, a last one of fewer steps, and one that ends within a step; also where a single chunk is all there is.

    None ends within a step on a CPU, because the interpreter's sums go by the size of a step.
    """
    mlp, pool = make(FORMATS[name], 256, width)
    hidden = torch.randn(3, 256, generator=torch.Generator().manual_seed(1)).to(DEVICE, torch.bfloat16)
    slots = torch.tensor([[0], [-1], [0]], dtype=torch.int32, device=DEVICE)
    loop = Tiling(64 if DEVICE.type == "cuda" else 128, 128, chunk=256)  # few programs for the interpreter
    expected = run(mlp, pool, hidden, slots, loop)[[0, 2]]
    for ahead in (1, 2, 9):
        found = run(mlp, pool, hidden, slots, replace(loop, split=True, ahead=ahead))
        assert torch.equal(found[[0, 2]], expected), ahead


@pytest.mark.parametrize("split", [False, True])
def test_chunks_are_summed_in_their_order(split: bool) -> None:
    """In float32, 1e8 + 1 is 1e8: so the second chunk's 1 is lost in any other order but from the first chunk to the last one."""
    specs = [plain("wi", (16, 384), "float32"), plain("wo", (384, 16), "float32")]
    layout = RecordLayout.of(specs)
    pool = torch.zeros(1, layout.record_bytes, dtype=torch.uint8)
    weight = layout.weights(pool[0])["wi"]
    weight[:, 5], weight[:, 130], weight[:, 300] = 1e8, 1.0, -1e8
    weight[3, 130], weight[3, 300] = -1e8, 1.0
    mlp = ExpertMlp.of(layout, "relu")
    cut = Tiling(16, 32, 4, 3, chunk=128, split=split)
    slots = torch.zeros(1, 1, dtype=torch.int32, device=DEVICE)
    work = Workspace.allocate(mlp, 1, 1, DEVICE)
    experts.launch_up(mlp, torch.ones(1, 384, device=DEVICE), slots, pool.to(DEVICE), work, cut)
    assert work.inner[0].tolist() == [1.0 if output == 3 else 0.0 for output in range(16)]


@pytest.mark.cuda
@pytest.mark.parametrize("name", FORMATS)
def test_a_token_has_the_same_bits_whatever_shares_a_product(name: str, cuda: torch.device) -> None:
    """Alone, among 63 others, and in a prompt; and as the decoded weights give them."""
    mlp, pool = make(FORMATS[name], 2048, 1536, 8)
    hidden = torch.randn(64, 2048, device=cuda).to(torch.bfloat16)
    index = torch.stack([torch.randperm(8, device=cuda)[:4] for _ in range(64)])
    found = []
    for tokens in (64, 1, 5):
        work = Workspace.allocate(mlp, tokens, 4, cuda)
        experts.expert_pairs(mlp, hidden[-tokens:], index[-tokens:].to(torch.int32), pool, work)
        found.append(work.parts)
    pairs = sort_pairs(index, 8).counted(index.cpu().numpy())
    work = Workspace.allocate(mlp, 64, 4, cuda)
    GroupedMlp(mlp, cuda)(hidden, pairs, [(expert, expert) for expert in pairs.needed], pool, work)
    found.append(work.parts)
    decoded_mlp, decoded = make(PLAIN, 2048, 1536, 8)
    for ours, theirs in zip(pool.cpu(), decoded, strict=True):
        for tensor, value in mlp.layout.weights(ours).items():
            decoded_mlp.layout.tensor(theirs, tensor).copy_(value)
    work = Workspace.allocate(mlp, 1, 4, cuda)
    experts.expert_pairs(decoded_mlp, hidden[-1:], index[-1:].to(torch.int32), decoded, work)
    found.append(work.parts)
    assert all(torch.equal(each[-1], found[0][-1]) for each in found)
    assert torch.equal(found[2], found[0][-5:])
