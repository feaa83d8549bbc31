"""Choosing tokens: the chain and its kernels, penalties, masks, seeds, and log-probabilities."""

import json
from collections.abc import Iterator
from dataclasses import replace
from math import e, log2
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from expertflow import LLM, SamplingParams
from expertflow.cli.run import main as run
from expertflow.engine.request import Request, StreamOutput
from expertflow.errors import ConfigError, MaskError
from expertflow.execution import sampler
from expertflow.execution.sampler import Draw, Sampler, uniform
from expertflow.execution.sampling.edits import TokenEdits, edit
from expertflow.execution.sampling.logprobs import log_probabilities
from expertflow.execution.sampling.masks import TokenMask
from expertflow.kernels.backend import backend
from expertflow.kernels.sampling import reference
from expertflow.models.families import FAMILIES
from expertflow.triton_support import HAS_TRITON
from helpers import MakeCheckpoint, load_resident

if HAS_TRITON:
    from expertflow.kernels.sampling import likely, select
GENERATOR = np.random.default_rng


def _cases(count: int, vocabulary: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Logits, half of them with many ties; rules of every mix, cuts at exact shares among them; masks, some full, some of one token."""
    random = GENERATOR(seed)
    logits = random.normal(size=(count, vocabulary)).astype(np.float32) * 3
    logits[::2] = np.round(logits[::2])
    logits[1::50] = -0.0  # all alike: every top-p of a power of two is an edge
    rules = np.stack([
        random.random(count),
        random.integers(0, vocabulary, count) * random.integers(0, 2, count),
        random.choice([1.0, 0.5, 0.25, 0.125, 1e-9, *random.random(3)], count),
        np.float32(log2(e) / random.choice([0.01, 0.3, 0.7, 1.0, 2.5], count)),
        np.float32(np.log2(random.choice([1.0, 0.5, 0.1, 1e-12], count))),
    ], axis=1)  # fmt: skip
    rules[3::50, 0], rules[4::50, 0] = 0, 1 - 2**-53
    mask = random.integers(-(2**31), 2**31, (count, -(-vocabulary // 32))).astype(np.int32)
    mask[::3] = -1
    mask[1::7], mask[1::7, -1] = 0, 1
    return torch.from_numpy(logits), torch.from_numpy(rules), torch.from_numpy(mask)


def _by_hand(logits: Tensor, rules: Tensor, mask: Tensor) -> np.ndarray:
    """The same choice, by NumPy's powers and sums in float64."""
    uniform, count, share, factor, least = (column[:, None] for column in rules.numpy().T)
    places = np.arange(logits.shape[1])
    allowed = (mask.numpy()[:, places // 32] >> (places % 32)) & 1
    values = np.where(allowed == 1, logits.numpy(), -np.inf)
    order = np.argsort(-values, axis=1, kind="stable")
    power = (np.take_along_axis(values, order, 1) - values.max(1, keepdims=True)) * factor.astype(np.float32)
    weight = np.floor(np.exp2(power, dtype=np.float64) * 2**40)
    weight[(places >= count) & (count > 0)] = 0
    weight[weight.cumsum(1) - weight >= np.where(share < 1, share * weight.sum(1, keepdims=True), np.inf)] = 0
    weight[power < least] = 0
    kept = np.zeros_like(weight)
    np.put_along_axis(kept, order, weight, 1)
    return (kept.cumsum(1) <= np.floor(uniform * kept.sum(1, keepdims=True))).sum(1)


def test_a_hundred_thousand_draws_are_what_numpy_finds() -> None:
    """Ties, exact shares, full and narrow masks: the chain equals a few lines of NumPy in every draw."""
    logits, rules, mask = _cases(100_000, 33)
    assert reference.choose(logits, rules, mask).tolist() == _by_hand(logits, rules, mask).tolist()
    few = slice(0, 300)
    alone = reference.choose_each(logits[few], rules[few], mask[few])
    assert torch.equal(alone, reference.choose(logits, rules, mask)[few]), "one after the other"


@pytest.mark.skipif(not HAS_TRITON, reason="needs triton")
@pytest.mark.parametrize(("dtype", "masked"), [("bfloat16", True), ("float16", False), ("float32", True)])
def test_the_kernel_is_the_chain(dtype: str, masked: bool) -> None:
    """Over several pieces of the vocabulary, with ties across them, and rows whose logits are no numbers."""
    logits, rules, mask = _cases(8, 300, seed=5)
    logits[2, 7], logits[3, 8], logits[4, 40:] = float("nan"), float("inf"), float("-inf")
    logits.view(torch.int32)[5, 9] = -1  # NaN with a sign
    device = "cuda" if torch.cuda.is_available() else "cpu"
    logits, rules, mask = (
        logits.to(device, getattr(torch, dtype)),
        rules.to(device),
        mask.to(device) if masked else None,
    )
    expected = reference.choose(logits, rules, mask)
    assert select.choose(logits, rules, mask, piece=256).tolist() == expected.tolist()
    assert expected[2] == expected[5] == reference.NO_TOKEN


def test_the_kernel_is_the_chain_for_a_hundred_thousand_draws(cuda: torch.device) -> None:
    """On a GPU: as many draws as the chain alone, and some over a large vocabulary."""
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for count, vocabulary in ((33_334, 300), (32, 201_088)):
            logits, rules, mask = _cases(count, vocabulary, seed=vocabulary)
            logits = logits.to(dtype)
            for bits in (None, mask):
                expected = torch.cat([reference.choose(*some) for some in zip(
                    logits.split(2000), rules.split(2000), mask.split(2000) if bits is not None else [None] * 17, strict=False
                )])  # fmt: skip
                there = None if bits is None else bits.to(cuda)
                assert torch.equal(backend(cuda).choose(logits.to(cuda), rules.to(cuda), there).cpu(), expected)


def test_random_numbers_are_those_of_splitmix() -> None:
    """The published first numbers of seed 1234567; and a seed's numbers are spread over [0, 1), and unlike another's."""
    published = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431]
    assert [sampler._mixed(1234567 + (n + 1) * sampler._STEP) for n in range(4)] == published
    numbers = np.array([[uniform(seed, position) for position in range(2000)] for seed in (0, 1)])
    counts = [np.histogram(line, 10, (0, 1))[0] for line in numbers]
    assert all(abs(count - 200).max() < 60 for count in counts)
    assert abs(np.corrcoef(numbers)[0, 1]) < 0.1


@pytest.mark.parametrize("vocabulary", [4096, 4133])
def test_the_most_probable_tokens_are_those_of_a_sort(vocabulary: int) -> None:
    """Block by block as all at once: with ties within blocks and across them, and few of many blocks."""
    logits = torch.from_numpy(np.round(GENERATOR(1).normal(size=(3, vocabulary)) * 2).astype(np.float32))
    logits[1] = 0.0
    found = log_probabilities(logits, [0, 1, vocabulary - 1], [7, 7, 7])
    ordered = logits.sort(dim=-1, descending=True, stable=True).indices
    for line, row in zip(found, ordered.tolist(), strict=True):
        assert [one.token_id for one in line[1:]] == row[:7]
        assert line[0].rank == row.index(line[0].token_id) + 1


@pytest.mark.skipif(not HAS_TRITON, reason="needs triton")
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize(("vocabulary", "count"), [(300, 7), (300, 300), (4096, 5), (9001, 20), (9001, 0)])
def test_one_reading_of_the_logits_finds_the_likely_tokens(dtype: str, vocabulary: int, count: int) -> None:
    """Ids and ranks are those of a sort, with ties within and across blocks, at ends and where tokens are forbidden; chances are float64's."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    drawn = np.round(GENERATOR(vocabulary).normal(size=(9, vocabulary + 8)) * 4) / 2
    drawn[1], drawn[2, 40:], drawn[3, vocabulary - 1] = 0.0, -np.inf, 30.0
    drawn[4] = np.where(drawn[4] > 0, 0.0, -0.0)
    logits = torch.from_numpy(drawn).to(device, getattr(torch, dtype))[:, :vocabulary]
    rows, tokens = [0, 1, 2, 3, 4, 6, 8], [0, vocabulary - 1, 7, vocabulary - 1, 255, 256, -1]
    given = logits, torch.tensor(rows, device=device), torch.tensor(tokens, device=device), count
    found, expected = likely.likely(*given).cpu(), reference.likely(*given).cpu()
    exact = logits.cpu().double()
    order, logarithms = exact.sort(dim=-1, descending=True, stable=True).indices, exact.log_softmax(-1)
    for line, other, row, token in zip(found, expected, rows, tokens, strict=True):
        chosen = order[row].tolist()
        ids = line[2 : 2 + count].long().tolist()
        assert ids == chosen[:count]
        assert torch.allclose(line[2 + count :], logarithms[row, ids], atol=1e-5)
        assert torch.equal(line[1 : 2 + count], other[1 : 2 + count])
        assert torch.allclose(line, other, atol=1e-5)
        if token >= 0:
            assert line[1] == chosen.index(token) + 1
            assert line[0] == pytest.approx(float(logarithms[row, token]), abs=1e-5)


def test_edits_are_bias_and_penalties_in_order() -> None:
    """As written out for each token: bias, repetition by sign, then frequency and presence; endings wait for `min_tokens`."""
    params = SamplingParams(
        logit_bias={2: 1.5, 7: -3}, repetition_penalty=1.25, frequency_penalty=0.5, presence_penalty=0.25, min_tokens=4
    )
    logits = torch.linspace(-2, 2, 200)[None].repeat(2, 1).to(torch.bfloat16)
    prompt = [1, 1, 5, *range(50, 180)]  # more tokens than there is room for at first
    edits = TokenEdits(params, prompt, ends={8})
    answer = [7, 2, 7]
    for token in answer:
        edits.add(token)
    for generated in (3, 4):
        expected = logits.double()[0]
        for token in range(200):
            expected[token] += {2: 1.5, 7: -3}.get(token, 0)
            if token in {*prompt, *answer}:
                expected[token] *= 1 / 1.25 if expected[token] > 0 else 1.25
            expected[token] -= 0.5 * answer.count(token) + 0.25 * (token in answer)
        if generated < 4:
            expected[8] = -np.inf
        found = edit(logits, [None, edits], [0, generated])
        assert torch.equal(found[0], logits[0].float())
        assert torch.allclose(found[1].double(), expected, atol=1e-6)


@pytest.fixture(scope="module")
def llm(make_checkpoint: MakeCheckpoint) -> Iterator[LLM]:
    with LLM(make_checkpoint("qwen3_moe"), slots=7, device="cpu", max_length=64, max_batch=4, prefill_chunk=12) as llm:
        yield llm


PROMPTS = [[5, 17, 33, 62], [9, 8, 7, 21, 30, 44, 41], list(range(20, 37)), [11]]
BASE = SamplingParams(max_tokens=8, ignore_eos=True)
MIX = [
    BASE,
    replace(BASE, temperature=0.9, seed=3, min_p=0.05, logprobs=2),
    replace(BASE, temperature=1.3, seed=3, top_k=40, frequency_penalty=1.5, repetition_penalty=1.3),
    replace(BASE, temperature=0.8, seed=9, top_p=0.8, logit_bias={7: 4.0}),
]


def test_a_seed_gives_its_tokens_beside_any_others(llm: LLM) -> None:
    """In float32 each mix of options gets the tokens it gets alone, in a batch, and in one that others join."""
    alone = [llm.generate([prompt], params)[0] for prompt, params in zip(PROMPTS, MIX, strict=True)]
    together = llm.generate(PROMPTS, MIX)
    assert [one.token_ids for one in together] == [one.token_ids for one in alone]
    engine, found = llm.engine, {}
    for place in (3, 1, 0, 2):  # one joins every second step
        engine.add(
            llm.request(PROMPTS[place], MIX[place], index=place), lambda out: found.update({out.index: out.output})
        )
        engine.step()
        engine.step()
    while engine.unfinished:
        engine.step()
    assert [found[place].token_ids for place in range(4)] == [one.token_ids for one in alone]
    assert len(alone[1].logprobs) == 8
    assert alone[0].logprobs is None


def test_bias_and_least_length(llm: LLM) -> None:
    """A bias of 100 forces a token and one of -100 forbids it; no stop comes before `min_tokens`; unknown tokens are refused."""
    free = llm.generate([PROMPTS[0]], BASE)[0].token_ids
    assert set(llm.generate([PROMPTS[0]], replace(BASE, logit_bias={33: 100}))[0].token_ids) == {33}
    other = llm.generate([PROMPTS[0]], replace(BASE, logit_bias=dict.fromkeys(free, -100)))[0].token_ids
    assert not set(other) & set(free)
    ends = SamplingParams(max_tokens=8, stop_token_ids=(33,), logit_bias={33: 100})
    assert llm.generate([PROMPTS[0]], ends)[0].token_ids == (33,)
    later = llm.generate([PROMPTS[0]], replace(ends, min_tokens=5))[0]
    assert (len(later.token_ids), later.token_ids.index(33), later.finish_reason) == (6, 5, "stop")
    with pytest.raises(ConfigError, match=r"token 4096.*0 to 95"):
        llm.request(PROMPTS[0], replace(BASE, logit_bias={4096: 1}))


class Script:
    """A mask that forces given tokens; an empty set of choices where the script has None; raises where it has an error."""

    def __init__(self, script: list[int | Exception | None]) -> None:
        self.script, self.seen = script, []

    def fill(self, row: np.ndarray) -> None:
        assert not row.any()
        match self.script[len(self.seen)]:
            case Exception() as error:
                raise error
            case int() as token:
                row[token // 32] = np.array(1 << (token % 32), np.uint32).view(np.int32)

    def accept(self, token: int) -> None:
        self.seen.append(token)


def _stepped(llm: LLM, request: Request) -> list[tuple[int, StreamOutput]]:
    llm.engine.add(request)
    outputs = []
    while llm.engine.unfinished:
        outputs += llm.engine.step()
    return outputs


def test_the_command_gives_log_probabilities(
    make_checkpoint: MakeCheckpoint, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """`run` puts them into its JSON and into results files, and refuses them where nobody would see them."""
    options = {
        "model": str(make_checkpoint("qwen3_moe")),
        "prompts": ["ab"],
        "engine": {"device": "cpu", "max_length": 32},
    }
    sampling = {"max_tokens": 2, "logprobs": 1, "ignore_eos": True}
    with pytest.raises(ConfigError, match=r"logprobs=1 would not be shown.*--json"):
        run(**options, sampling=sampling, results=None, as_json=False)
    run(**options, sampling=sampling, results=tmp_path / "results", as_json=True)
    (output,) = json.loads(capsys.readouterr().out)["outputs"]
    kept = json.loads((tmp_path / "results").read_text().splitlines()[1])
    for found in (output, kept):
        assert [own[0] for own, _ in found["logprobs"]] == found["token_ids"]
        assert all(own == best for own, best in found["logprobs"]), "greedy: the token is the most probable one"


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_mask_restricts_its_request_alone(llm: LLM, temperature: float) -> None:
    """A script is followed; without a choice, or with an error, the request ends with ours; the others get their own tokens."""
    params = replace(BASE, temperature=temperature, seed=1)
    alone = llm.generate([PROMPTS[0]], params)[0].token_ids
    wanted, found = [95, 3, 63, 31, 32, 64, 0, 12], {}
    scripts = [None, Script(wanted), Script([8, None]), Script([ValueError("broken")])]
    assert isinstance(scripts[1], TokenMask)
    for place, script in enumerate(scripts):
        request = llm.request(PROMPTS[0], params, index=place, mask=script)
        llm.engine.add(request, lambda out: found.setdefault(out.index, []).append(out))
    while llm.engine.unfinished:
        llm.engine.step()
    assert found[0][-1].output.token_ids == alone
    assert list(found[1][-1].output.token_ids) == wanted == scripts[1].seen
    for place, tokens, why in (
        (2, 1, "request 2 has no token 2: its mask allows no token"),
        (3, 0, "its mask failed: .*broken"),
    ):
        error = found[place][-1].error
        assert isinstance(error, MaskError)
        with pytest.raises(MaskError, match=why):
            raise error
        assert len(found[place]) == tokens + 1
    ends = replace(params, stop_token_ids=(33,), min_tokens=2)
    ((_, failed),) = _stepped(llm, llm.request(PROMPTS[0], ends, mask=Script([33])))
    assert "only tokens that are forbidden" in str(failed.error)


@pytest.mark.parametrize(
    ("family", "execution"),
    [("gpt_oss", "graph"), ("qwen3_moe", "host"), ("granitemoe", "host"), ("flex_olmo", "host")],
)
def test_log_probabilities_are_those_of_the_model(family: str, execution: str, make_checkpoint: MakeCheckpoint) -> None:
    """Of prompt and answer, read in pieces: stock transformers' log-softmax, ranks and most probable tokens of raw logits."""
    sizes = FAMILIES["olmoe"].tiny if family == "flex_olmo" else {}
    folder = make_checkpoint(family, spread=0.3, **sizes)
    params = SamplingParams(
        max_tokens=6, temperature=1.0, seed=2, logit_bias={3: 5.0}, logprobs=2, prompt_logprobs=1, ignore_eos=True
    )
    stock = load_resident(folder)
    with LLM(folder, device="cpu", max_length=48, max_batch=2, prefill_chunk=18, execution=execution) as llm:
        outputs = llm.generate([[9, 8, 7], [(7 * n) % 90 + 3 for n in range(23)]], params)
    for output in outputs:
        ids = torch.tensor([output.prompt_token_ids + output.token_ids])
        with torch.inference_mode():
            expected = stock(ids).logits[0].log_softmax(-1)
        assert output.prompt_logprobs[0] is None
        found = [*output.prompt_logprobs[1:], *output.logprobs]
        assert len(found) == ids.shape[1] - 1
        for place, (own, *best) in enumerate(found):
            line, token = expected[place], int(ids[0, place + 1])
            assert own.token_id == token
            assert own.logprob == pytest.approx(float(line[token]), abs=1e-4)
            assert own.rank == int((line > line[token]).sum()) + 1
            many = 1 if place < len(output.prompt_token_ids) - 1 else 2
            assert [one.token_id for one in best] == line.topk(many).indices.tolist()
            assert [one.rank for one in best] == [1, 2][:many]


def test_a_batch_of_any_options_is_one_choice() -> None:
    """What one sequence gets does not depend on the options of the others; a plain one in a mixed batch gets the largest logit."""
    logits, _, _ = _cases(8, 50, seed=4)
    draws = [Draw(params=replace(MIX[n % 4], logit_bias=None), seed=n, position=n) for n in range(8)]
    choose = Sampler(torch.device("cpu")).choose
    alone = [choose(logits[n : n + 1], [one]).tokens[0] for n, one in enumerate(draws)]
    assert choose(logits, draws).tokens == alone
    assert [alone[0], alone[4]] == logits[[0, 4]].argmax(-1).tolist()
