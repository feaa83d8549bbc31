"""Prompts, options and text of every kind that callers bring: read rightly, or refused by name."""

import random
from collections import UserDict
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from expertflow import LLM, EngineConfig, SamplingParams
from expertflow.engine.inputs import PromptReader, split_prompts
from expertflow.engine.offline import Results
from expertflow.engine.request import TextStream
from expertflow.engine.text import stop_tokens
from expertflow.errors import ConfigError, PromptError, ResultsError
from expertflow.prompts import read_prompts
from helpers import MakeCheckpoint

IDS = list(range(20, 30))
TURN = "<|turn|>"
TEMPLATE = "{{ bos_token }}{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}{% if add_generation_prompt %}>{% endif %}"


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """Bytes as tokens, a begin token added to every text, a special token in the middle of things, a chat template."""
    words = ["<pad>", "<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    made = Tokenizer(models.BPE(vocab={word: number for number, word in enumerate(words)}, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens([TURN, "<s>"])
    made.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    names = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}
    fast = PreTrainedTokenizerFast(tokenizer_object=made, **names)
    fast.chat_template = TEMPLATE
    return fast


@pytest.fixture(scope="module")
def llm(make_checkpoint: MakeCheckpoint) -> Iterator[LLM]:
    with LLM(make_checkpoint("qwen3_moe", spread=0.3), device="cpu", max_length=64, max_batch=3) as made:
        yield made


SAME = {
    "a tuple": tuple(IDS),
    "an array": np.array(IDS),
    "a tensor": torch.tensor(IDS),
    "numbers of NumPy": [np.int64(i) for i in IDS],
    "tensors of one number": [torch.tensor(i) for i in IDS],
    "a list of tensors": [torch.tensor(IDS)],
    "a batch of one": torch.tensor([IDS]),
    "what a tokenizer returns": {"input_ids": IDS, "attention_mask": [1] * len(IDS)},
    "a padded batch": UserDict(input_ids=[[0, 0, *IDS]], attention_mask=[[0, 0] + [1] * len(IDS)]),
    "a padded batch of tensors": {
        "input_ids": torch.tensor([[0, *IDS]]),
        "attention_mask": torch.tensor([[0] + [1] * 10]),
    },
    "a mapping": {"prompt": IDS},
    "mappings": [{"prompt_token_ids": IDS}],
}


@pytest.mark.parametrize("given", SAME.values(), ids=SAME)
def test_token_ids_of_every_kind_are_one_prompt(given: object) -> None:
    """Whatever holds them, the token ids are the prompt."""
    read = PromptReader(None)
    assert [read.read(0, one).token_ids for one in split_prompts(given)] == [tuple(IDS)]


WRONG = {
    "half a token": [[5.7, 6.2]],
    "a float": [5.7],
    "floats of torch": torch.tensor([1.0, 2.0]),
    "None": None,
    "None in a list": [None],
    "truth": [True, False],
    "bytes": b"abc",
    "a number": 5,
    "a mapping without a prompt": {"text": "abc"},
    "three dimensions": torch.zeros(1, 1, 1, dtype=torch.long),
    "a list of lists of lists": [[[5]]],
    "a set": {5, 6},
    "text without a tokenizer": "abc",
    "a chat without a tokenizer": [{"role": "user", "content": "x"}],
    "empty": [[]],
}


@pytest.mark.parametrize("given", WRONG.values(), ids=WRONG)
def test_what_is_no_prompt_is_refused(given: object) -> None:
    """Nothing is guessed: an error of ours says what it was."""
    read = PromptReader(None)
    with pytest.raises(PromptError):
        [read.read(0, one) for one in split_prompts(given)]


def test_messages_are_rendered_by_the_chat_template(tokenizer: PreTrainedTokenizerFast) -> None:
    """A chat, a list of chats, a mapping with one, and the tokenizer's own result are the same tokens, begun once."""
    read, chat = PromptReader(tokenizer), [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
    expected = tuple(tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False))
    assert expected.count(tokenizer.bos_token_id) == 1
    text = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    encoded = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True)
    for given in (chat, [chat], {"messages": chat}, encoded, text, [text]):
        found = [read.read(0, one) for one in split_prompts(given)]
        assert [one.token_ids for one in found] == [expected], given
    assert read.read(0, chat).text == text
    assert len(split_prompts([chat, chat])) == 2
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    try:
        with pytest.raises(PromptError, match="cannot render these messages: roles must alternate"):
            read.read(0, chat)
    finally:
        tokenizer.chat_template = TEMPLATE


def test_half_a_surrogate_pair_is_replaced(llm: LLM) -> None:
    """Text that no encoding can write is read with a replacement character; a whole pair is joined."""
    tokenizer = PromptReader(llm.tokenizer)
    assert tokenizer.read(0, "a\ud83db").text == "a\ufffdb"
    assert tokenizer.read(0, "a\ud83d\ude00b").text == "a\U0001f600b"


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"temperature": "0.7"}, "temperature='0.7' is of type str.*float"),
        ({"max_tokens": 2.5}, r"max_tokens=2\.5 is of type float"),
        ({"max_tokens": True}, "max_tokens=True"),
        ({"top_k": None}, "top_k=None is of type NoneType"),
        ({"seed": "7"}, "seed='7'"),
        ({"ignore_eos": "yes"}, "ignore_eos='yes'"),
        ({"stop": 5}, "stop holds 5"),
        ({"stop": ["a", None]}, "stop holds None"),
        ({"stop_token_ids": ("5",)}, "stop_token_ids holds '5'"),
    ],
)
def test_options_of_another_type_are_named(options: dict, match: str) -> None:
    """An option of the wrong type is refused with its name, its value and what it takes."""
    with pytest.raises(ConfigError, match=match):
        SamplingParams(**options)


def test_numbers_of_other_libraries_are_numbers() -> None:
    """NumPy's numbers, paths and lists mean what they say."""
    params = SamplingParams(
        max_tokens=np.int64(5),
        temperature=np.float32(0.5),
        stop=["a", "b"],
        stop_token_ids=np.array([4, 5]),
        seed=np.int32(3),
    )
    assert params == SamplingParams(max_tokens=5, temperature=0.5, stop=("a", "b"), stop_token_ids=(4, 5), seed=3)
    assert EngineConfig(predictor=Path("some") / "folder").predictor == "some/folder"
    for wrong in ({"gpu_memory": 6.5}, {"max_batch": "4"}, {"progress": 1}, {"predictor": None}):
        with pytest.raises(ConfigError, match=f"{next(iter(wrong))}="):
            EngineConfig(**wrong)


def test_parameters_under_both_names(llm: LLM) -> None:
    """`sampling_params=` is `params`; both, or something else, is refused."""
    params = SamplingParams(max_tokens=3, ignore_eos=True)
    assert llm.generate(IDS, sampling_params=params) == llm.generate(IDS, params)
    for wrong in ({"params": params, "sampling_params": params}, {"params": {"max_tokens": 3}}, {"params": 5}):
        with pytest.raises(ConfigError, match="params"):
            llm.generate(IDS, **wrong)


def test_as_many_tokens_as_fit(llm: LLM) -> None:
    """`max_tokens=None` goes on until the sequence is full."""
    out = llm.generate(IDS, SamplingParams(max_tokens=None, ignore_eos=True))[0]
    assert (len(out.token_ids), out.finish_reason) == (64 - len(IDS), "length")


def test_a_seed_is_drawn_and_can_be_given_again(llm: LLM) -> None:
    """Without a seed one prompt gets several answers; each can be had again by the seed it names."""
    params = SamplingParams(max_tokens=12, temperature=1.5, ignore_eos=True)
    outputs = llm.generate([IDS] * 4, params)
    assert len({out.token_ids for out in outputs}) > 1
    for out in outputs:
        again = llm.generate(IDS, SamplingParams(max_tokens=12, temperature=1.5, ignore_eos=True, seed=out.seed))[0]
        assert again.token_ids == out.token_ids
    assert llm.generate(IDS, SamplingParams(max_tokens=2))[0].seed is None


def test_results_keep_the_seed_they_were_drawn_with(tmp_path: Path) -> None:
    """A file is resumed with its own seed and refuses another stated one; greedy files have none."""
    drawn = SamplingParams(temperature=1.0)
    with Results(tmp_path / "r", ["a"], drawn, "m") as first:
        seed = first.seed
    with Results(tmp_path / "r", ["a"], drawn, "m") as second:
        assert second.seed == seed is not None
    with Results(tmp_path / "r", ["a"], SamplingParams(temperature=1.0, seed=seed), "m") as third:
        assert third.seed == seed
    with pytest.raises(ResultsError, match="other prompts, other sampling"):
        Results(tmp_path / "r", ["a"], SamplingParams(temperature=1.0, seed=seed + 1), "m")
    with Results(tmp_path / "greedy", ["a"], SamplingParams(seed=3), "m") as greedy:
        assert greedy.seed is None


def pieces(stream: TextStream, ids: list[int]) -> list[str]:
    return [*(stream.push(token) for token in ids), stream.flush()]


@pytest.mark.parametrize("slow", [False, True])
@pytest.mark.parametrize("cut", range(9))
def test_text_begins_at_the_prompts_end_whatever_byte_that_is(
    cut: int, slow: object, tokenizer: PreTrainedTokenizerFast
) -> None:
    """A prompt that ends inside a character: the text begins with that character, and no byte is lost."""
    whole = "ab字c😀"
    ids = tokenizer(whole, add_special_tokens=False)["input_ids"]
    cut = min(cut, len(ids) - 1)
    decoder = tokenizer if slow else tokenizer.backend_tokenizer
    found = pieces(TextStream(decoder, ids[:cut], skip_special=True), ids[cut:])
    done = bytes(whole, "utf-8")[:cut].decode("utf-8", "ignore")
    assert "".join(found) == whole.removeprefix(done)
    assert not any("\ufffd" in piece for piece in found)


@pytest.mark.parametrize("slow", [False, True])
def test_an_unfinished_last_character_is_flushed(slow: object, tokenizer: PreTrainedTokenizerFast) -> None:
    """What ends inside a character ends with a replacement, not with nothing."""
    ids = tokenizer("a字", add_special_tokens=False)["input_ids"]
    decoder = tokenizer if slow else tokenizer.backend_tokenizer
    assert "".join(pieces(TextStream(decoder, [], skip_special=True), ids[:-1])) == "a\ufffd"


def test_special_tokens_are_kept_on_request(tokenizer: PreTrainedTokenizerFast) -> None:
    """Left out by default, shown on request."""
    ids = [5, tokenizer.convert_tokens_to_ids(TURN), 6]
    for skip in (True, False):
        found = "".join(pieces(TextStream(tokenizer.backend_tokenizer, [4], skip_special=skip), ids))
        assert found == tokenizer.decode(ids, skip_special_tokens=skip)
        assert (TURN in found) is not skip


def test_a_special_token_stops_by_its_text(tokenizer: PreTrainedTokenizerFast) -> None:
    """A stop text that is a special token stops at that token; one with a special token inside is refused unless it shows."""
    turn = tokenizer.convert_tokens_to_ids(TURN)
    assert stop_tokens(tokenizer, SamplingParams(stop=("x", TURN))) == {turn}
    assert stop_tokens(tokenizer, SamplingParams(stop=TURN, skip_special_tokens=False)) == set()
    with pytest.raises(ConfigError, match="contains the special token"):
        stop_tokens(tokenizer, SamplingParams(stop=f"{TURN}\n"))
    assert stop_tokens(tokenizer, SamplingParams(stop=f"{TURN}\n", skip_special_tokens=False)) == set()


def test_a_line_of_prompts_ends_at_a_line_feed_only(tmp_path: Path) -> None:
    """A byte order mark and carriage returns are no text; other separators are."""
    path = tmp_path / "prompts.txt"
    path.write_bytes("\ufeffone\u2028two\x0cthree\x85\r\n\r\nfour\x1c\n".encode())
    assert read_prompts(path) == ["one\u2028two\x0cthree\x85", "four\x1c"]
    path = tmp_path / "prompts.jsonl"
    path.write_bytes('\ufeff{"prompt": "one\u2028two"}\r\n{"prompt": "three"}'.encode())
    assert read_prompts(path) == ["one\u2028two", "three"]


def test_text_goes_on_where_the_librarys_stream_gives_up() -> None:
    """Byte-fallback decoders change earlier text at some ids, which the library's stream refuses; later text still comes."""
    vocabulary = {"a": 1, **{f"<0x{byte:02X}>": 2 + byte for byte in range(256)}}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], byte_fallback=True))
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    draw, gave_up = random.Random(4), 0
    for _ in range(300):
        ids = [draw.choice((1, *range(2, 258))) for _ in range(12)]
        stream = TextStream(tokenizer, [], skip_special=False)
        assert "".join(pieces(stream, [*ids, 1, 1, 1])).endswith("aaa")
        gave_up += stream._library is None
    assert gave_up
