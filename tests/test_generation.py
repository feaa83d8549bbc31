"""Tokens and text: batches, chunks, sampling, stopping, streaming."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer
from tokenizers.models import WordPiece
from transformers import OlmoeForCausalLM, PreTrainedTokenizerFast

from expertflow import LLM, SamplingParams, from_pretrained
from expertflow.cache.forecast import Recorded
from expertflow.cache.strategy import STRATEGIES
from expertflow.engine.llm import shipped_model
from expertflow.engine.request import Request
from expertflow.engine.text import decoder_of, load_tokenizer
from expertflow.errors import ConfigError, PromptError, UnsupportedModelError
from expertflow.execution import sampler
from expertflow.execution.sampler import Draw, Sampler
from expertflow.kernels.sampling.reference import choose
from expertflow.models import experts
from helpers import MakeCheckpoint, random_future

GREEDY = SamplingParams(max_tokens=6, ignore_eos=True)
SAMPLED = SamplingParams(max_tokens=6, ignore_eos=True, temperature=1.0, top_k=20, top_p=0.95, seed=4)


@pytest.fixture(scope="module")
def llm(make_checkpoint: MakeCheckpoint) -> Iterator[LLM]:
    with LLM(make_checkpoint("qwen3_moe"), slots=7, device="cpu", max_length=64, max_batch=3, prefill_chunk=12) as llm:
        yield llm


def _prompts(count: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(8)
    return [torch.randint(3, 90, (3 + 5 * i,), generator=generator).tolist() for i in range(count)]


@pytest.mark.parametrize("params", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_tokens_do_not_depend_on_the_batch(llm: LLM, params: SamplingParams) -> None:
    """In float32 a prompt's tokens are the same alone, in a padded batch, and in any order (law 5)."""
    prompts = _prompts(5)
    alone = [llm.generate([prompt], params)[0].token_ids for prompt in prompts]
    together = [output.token_ids for output in llm.generate(prompts, params)]
    reversed_order = [output.token_ids for output in llm.generate(prompts[::-1], params)][::-1]
    assert alone == together == reversed_order


def test_tokens_do_not_depend_on_the_prefill_chunk(make_checkpoint: MakeCheckpoint) -> None:
    """In float32 a long prompt gives the same tokens however it is cut into passes."""
    prompts = _prompts(4)
    results = []
    for chunk in (1, 7, 512):
        with LLM(make_checkpoint("gpt_oss"), device="cpu", max_length=64, max_batch=4, prefill_chunk=chunk) as llm:
            results.append([output.token_ids for output in llm.generate(prompts, GREEDY)])
    assert results[0] == results[1] == results[2]


def test_a_finished_sequence_leaves_the_batch(llm: LLM) -> None:
    """Sequences of different lengths in one batch all get their own tokens, and the short ones stop costing."""
    prompts = _prompts(3)
    params = [SamplingParams(max_tokens=n, ignore_eos=True) for n in (2, 6, 4)]
    alone = [llm.generate([prompt], p)[0].token_ids for prompt, p in zip(prompts, params, strict=True)]
    together = llm.generate(prompts, params)
    assert [output.token_ids for output in together] == alone
    assert [len(output.token_ids) for output in together] == [2, 6, 4]


def test_encoder_decoder_sequences_leave_the_batch(make_checkpoint: MakeCheckpoint) -> None:
    """The same holds for an encoder-decoder model."""
    prompts = _prompts(3)
    params = [SamplingParams(max_tokens=n, ignore_eos=True) for n in (2, 6, 4)]
    with LLM(make_checkpoint("switch_transformers"), slots=3, device="cpu", max_length=64) as llm:
        alone = [llm.generate([prompt], p)[0].token_ids for prompt, p in zip(prompts, params, strict=True)]
        assert [output.token_ids for output in llm.generate(prompts, params)] == alone


def test_stop_token_and_length(llm: LLM) -> None:
    """Generation ends at a stop token, at max_tokens, or where the context is full."""
    (prompt,) = _prompts(1)
    free = llm.generate(prompt, GREEDY)[0]
    assert (len(free.token_ids), free.finish_reason) == (6, "length")
    stopped = llm.generate(prompt, SamplingParams(max_tokens=6, stop_token_ids=(free.token_ids[2],)))[0]
    first = free.token_ids.index(free.token_ids[2])
    assert (stopped.token_ids, stopped.finish_reason) == (free.token_ids[: first + 1], "stop")
    full = llm.generate([5] * 60, SamplingParams(max_tokens=50, ignore_eos=True))[0]
    assert (len(full.token_ids), full.finish_reason) == (4, "length")


def test_stream_pieces_make_the_text(llm: LLM) -> None:
    """What is streamed, joined, is the text of the finished request; every token comes once."""
    pieces = list(llm.stream(["hello there", "good"], SamplingParams(max_tokens=12, ignore_eos=True, temperature=2.0)))
    for index in range(2):
        mine = [piece for piece in pieces if piece.index == index]
        output = mine[-1].output
        assert output is not None
        assert "".join(piece.text for piece in mine) == output.text
        assert tuple(piece.token_id for piece in mine) == output.token_ids


class Letters:
    """A decoder of one byte a token, so that characters can be cut in two."""

    def decode(self, token_ids: list[int], *, skip_special_tokens: bool) -> str:  # noqa: ARG002
        return bytes(token_ids).decode("utf-8", errors="replace")


@given(text=st.text(max_size=20), stops=st.lists(st.text(min_size=1, max_size=4), max_size=3))
@settings(max_examples=300)
def test_streamed_text_never_shows_a_stop_text(text: str, stops: list[str]) -> None:
    """Streamed text is exactly what stands before the first stop text, whatever the bytes of the tokens."""
    tokens = list(text.encode("utf-8", errors="ignore")) or [65]
    request = Request(
        index=0, prompt=None, prompt_token_ids=(1,), params=SamplingParams(stop=tuple(stops)), ends=(),
        limit=len(tokens), decoder=Letters(),
    )  # fmt: skip
    shown = ""
    for token in tokens:
        piece = request.append(token)
        shown += piece.text
        if piece.output is not None:
            break
    whole = bytes(tokens[: len(request.token_ids)]).decode("utf-8", errors="replace")
    cut = min((whole.find(stop) for stop in stops if stop in whole), default=len(whole))
    assert shown == request.text == whole[:cut]
    assert request.finish_reason == ("stop" if any(stop in whole for stop in stops) else "length")


class Stripping:
    """A decoder that drops the space a text begins with, as SentencePiece tokenizers do."""

    def decode(self, token_ids: list[int], *, skip_special_tokens: bool) -> str:  # noqa: ARG002
        return "".join([" the", " sea", " was", " calm"][token] for token in token_ids).removeprefix(" ")


def test_text_continues_the_prompt() -> None:
    """The space between prompt and first generated word survives tokenizers that strip leading spaces."""
    request = Request(
        index=0, prompt="the sea was", prompt_token_ids=(0, 1, 2), params=SamplingParams(), ends=(), limit=2,
        decoder=Stripping(),
    )  # fmt: skip
    request.append(3)
    assert request.append(2).output.text == " calm was"


def _draw(logits: torch.Tensor, *draws: Draw) -> list[int]:
    return Sampler(torch.device("cpu")).choose(logits, draws).tokens


def test_sampling_follows_the_probabilities() -> None:
    """Frequencies of many draws match softmax, of all tokens, of the first two, and of those at least half as probable."""
    logits = torch.tensor([2.0, 1.0, 0.0, 1.8])
    expected = torch.softmax(logits / 0.8, 0)

    def frequencies(**options: float) -> torch.Tensor:
        params = SamplingParams(temperature=0.8, **options)
        rules = torch.tensor([Draw(params=params, seed=1, position=n).rules(4) for n in range(4000)]).double()
        return torch.bincount(choose(logits.expand(4000, 4), rules), minlength=4) / 4000

    assert torch.allclose(frequencies(), expected, atol=0.03)
    two = torch.where(logits > 1.5, expected, 0)
    for options in ({"top_k": 2}, {"min_p": 0.5}, {"top_p": 0.75}):
        assert torch.allclose(frequencies(**options), two / two.sum(), atol=0.03), options


@pytest.mark.parametrize(("top_k", "temperature"), [(0, 1.0), (0, 0.7), (7, 1.0), (3, 1.6)])
def test_the_cut_is_where_the_probabilities_say(
    top_k: int, temperature: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For every `top_p` to a hundredth, those that can be drawn are the fewest that make up `top_p`; the highest id comes last."""
    random = np.random.default_rng(4)
    raw = random.normal(size=12) * 1.5
    chances = np.exp(raw / temperature) / np.exp(raw / temperature).sum()
    order = np.argsort(-chances)
    kept = chances[order][: top_k or None] / chances[order][: top_k or None].sum()
    monkeypatch.setattr(sampler, "uniform", lambda *_: 1 - 1e-9)
    for top_p in np.arange(0.01, 1.0, 0.01):
        fewest = next(count for count in range(1, len(kept) + 1) if kept[:count].sum() >= top_p)
        params = SamplingParams(temperature=temperature, top_k=top_k, top_p=float(top_p))
        assert _draw(torch.tensor(raw)[None], Draw(params=params)) == [max(order[:fewest])], top_p


def test_a_batch_draws_what_its_sequences_would_draw_alone() -> None:
    """Greedy and sampled sequences side by side get the tokens they get one by one."""
    logits = torch.randn(4, 50, generator=torch.Generator().manual_seed(3))
    logits[0, 7] = logits[0, 31] = 9.0  # the lowest of equals
    for position in range(3):
        draws = [
            Draw(params=SamplingParams(temperature=t), seed=n, position=position) for n, t in enumerate((0, 1, 0, 0.5))
        ]
        one_by_one = [_draw(logits[n : n + 1], draw)[0] for n, draw in enumerate(draws)]
        assert _draw(logits, *draws) == one_by_one
    assert one_by_one[0] == 7


def test_the_same_seed_gives_the_same_text(llm: LLM) -> None:
    """Sampling is repeatable, and another seed gives something else."""
    (prompt,) = _prompts(1)
    draw = [llm.generate(prompt, SamplingParams(max_tokens=8, temperature=1.5, seed=s))[0].token_ids for s in (1, 1, 2)]
    assert draw[0] == draw[1] != draw[2]


@pytest.mark.parametrize(
    ("prompts", "match"),
    [
        ([], "no prompt"),
        ("", "prompt 0 is empty"),
        ([[1, 2], []], "prompt 1 is empty"),
        ([[5] * 64], "prompt 0 has 64 tokens"),
        ([[5, 96]], "holds token 96"),
        ([[-1]], "holds token -1"),
    ],
)
def test_bad_prompts_are_refused_before_anything_runs(llm: LLM, prompts: object, match: str) -> None:
    """A bad prompt among good ones stops the call before a token is generated."""
    before = llm.stats.tokens
    with pytest.raises(PromptError, match=match):
        llm.stream(prompts, GREEDY)
    assert llm.stats.tokens == before


def test_one_set_of_parameters_a_prompt(llm: LLM) -> None:
    """Parameters are one for all or one each."""
    with pytest.raises(PromptError, match="2 sampling parameters for 1 prompts"):
        llm.generate([[3, 4]], [GREEDY, GREEDY])


def test_the_library_decodes_as_transformers_does() -> None:
    """The shipped tokenizer's tokens, special and broken ones too; a tokenizer that cleans up, or decodes its own way, decodes itself."""
    tokenizer = load_tokenizer(shipped_model())
    library = decoder_of(tokenizer)
    assert library is tokenizer.backend_tokenizer
    random = np.random.default_rng(0)
    for length in (1, 2, 7, 40):
        for _ in range(50):
            tokens = random.integers(0, len(tokenizer), length).tolist()
            for skip in (False, True):
                expected = tokenizer.decode(tokens, skip_special_tokens=skip)
                assert library.decode(tokens, skip_special_tokens=skip) == expected

    class Own(PreTrainedTokenizerFast):
        def _decode(self, *_: object, **__: object) -> str:
            return "mine"

    own = Own(tokenizer_object=tokenizer.backend_tokenizer)
    assert decoder_of(own) is own
    pieces = Tokenizer(WordPiece({"[UNK]": 0, "well": 1, ".": 2}, unk_token="[UNK]"))  # noqa: S106 - a token of text
    for cleans in (False, True):
        other = PreTrainedTokenizerFast(tokenizer_object=pieces, clean_up_tokenization_spaces=cleans)
        assert (decoder_of(other) is other) == cleans
        assert decoder_of(other).decode([1, 2], skip_special_tokens=True) == other.decode(
            [1, 2], skip_special_tokens=True
        )
    assert decoder_of(None) is None


def test_text_needs_a_tokenizer(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    """A folder without a tokenizer takes token ids and says so when given text."""
    for path in make_checkpoint("olmoe").iterdir():
        if "token" not in path.name:
            (tmp_path / path.name).symlink_to(path)
    with LLM(tmp_path, device="cpu", max_length=32) as llm:
        assert len(llm.generate([3, 4, 5], GREEDY)[0].token_ids) == 6
        with pytest.raises(PromptError, match=r"no tokenizer.*token ids"):
            llm.generate("text")


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("slots", [1, 4, 9])
def test_an_interrupted_step_leaves_nothing_wrong(
    strategy: str, slots: int, make_checkpoint: MakeCheckpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whichever expert an error or Ctrl-C falls into, what is generated afterwards is right."""
    folder = make_checkpoint("qwen3_moe")
    recorded = Recorded(random_future(folder)) if STRATEGIES[strategy].needs_future else None
    model = from_pretrained(folder, slots=slots, strategy=strategy, forecast=recorded)
    device = model.device
    ids = torch.randint(3, 90, (1, 9), generator=torch.Generator().manual_seed(2)).to(device)
    one = torch.tensor([[7]], device=device)
    with torch.inference_mode():
        whole, single = model(ids).logits, model(one).logits
        mlp, calls = experts._registry_mlp, [0]

        def failing(*arguments: object) -> torch.Tensor:
            calls[0] -= 1
            if calls[0] == 0:
                raise KeyboardInterrupt
            return mlp(*arguments)

        monkeypatch.setattr(experts, "_registry_mlp", failing)
        for place in range(1, 18, 3):
            calls[0] = place
            with pytest.raises(KeyboardInterrupt):
                model(ids)
            model.expertflow.controller.table.check_integrity()
            calls[0] = 0
            assert torch.equal(model(one).logits, single), place
            assert torch.equal(model(ids).logits, whole), place
    model.expertflow.close()


def test_length_beyond_the_context_is_refused(make_checkpoint: MakeCheckpoint) -> None:
    """max_length cannot exceed what the model was made for."""
    with pytest.raises(ConfigError, match="max_length=500 is more than the model's context of 128"):
        LLM(make_checkpoint("qwen3_moe"), device="cpu", max_length=500)


def test_the_transformers_model_is_an_ordinary_one(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    """`from_pretrained` gives the stock class, counts what the cache does, and refuses to save half a model."""
    model = from_pretrained(make_checkpoint("olmoe"), slots="25%", device="cpu")
    assert isinstance(model, OlmoeForCausalLM)
    model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=3, do_sample=False)
    assert model.expertflow.counters.loads > 0
    with pytest.raises(UnsupportedModelError, match="holds no experts"):
        model.save_pretrained(tmp_path)
    model.expertflow.close()
