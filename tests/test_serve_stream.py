"""Streams say the same whatever comes together: text split anywhere, characters and stop texts over several tokens."""

import json
from types import SimpleNamespace

from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from expertflow import SamplingParams
from expertflow.engine.request import Request, StreamOutput
from expertflow.serve.writers.chat import ChatWriter
from expertflow.serve.writers.completions import CompletionWriter
from expertflow.serve.writers.parts import Answer, PlainReader
from expertflow.serve.writers.writer import Head, Writer

END = 256
TEXTS = st.text(st.sampled_from("ab \né€😀#"), max_size=12)


def byte_tokenizer() -> tuple[Tokenizer, dict[int, int]]:
    """A tokenizer whose every token is one byte, and the token of each byte."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE(vocab={letter: place for place, letter in enumerate([*alphabet, "<end>"])}, merges=[]))
    made.add_special_tokens(["<end>"])
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters = {byte: chr(byte) for byte in shown} | {
        byte: chr(256 + place) for place, byte in enumerate(sorted(set(range(256)) - set(shown)))
    }  # the alphabet of GPT-2, by its definition
    return made, {byte: made.token_to_id(letter) for byte, letter in letters.items()}


TOKENIZER, TOKENS = byte_tokenizer()


def outputs_of(text: str, stops: tuple[str, ...], limit: int) -> list[StreamOutput]:
    """What an engine gives for a model that says a text, byte by byte, and then ends."""
    request = Request(
        index=0, prompt=None, prompt_token_ids=(TOKENS[ord("x")],), params=SamplingParams(stop=stops), ends={END},
        limit=limit, decoder=TOKENIZER,
    )  # fmt: skip
    found = []
    for token in (*(TOKENS[byte] for byte in text.encode()), END):
        found.append(request.append(token))
        if found[-1].output is not None:
            break
    return found


def reference(text: str, stops: tuple[str, ...], limit: int) -> tuple[str, str]:
    """What the answer has to be: text up to the first stop text whose bytes are all there, or to the limit, and the reason."""
    whole = text.encode()
    for count in range(1, min(limit, len(whole)) + 1):
        seen = whole[:count].decode(errors="ignore")
        if found := [seen.find(stop) for stop in stops if stop in seen]:
            return seen[: min(found)], "stop"
    if limit > len(whole):
        return text, "stop"
    cut = whole[:limit].decode(errors="replace")
    found = [cut.find(stop) for stop in stops if stop in cut]
    return (cut[: min(found)], "stop") if found else (cut, "length")


def read_back(data: bytes, *, chat: bool) -> tuple[str, list[str]]:
    """Text and reasons of a stream, read as a client does."""
    text, reasons = "", []
    for line in data.decode().split("\n\n"):
        if not line:
            continue
        choice = json.loads(line.removeprefix("data: "))["choices"][0]
        text += choice["delta"].get("content", "") if chat else choice["text"]
        reasons += [choice["finish_reason"]] if choice["finish_reason"] else []
    return text, reasons


@given(text=TEXTS, stops=st.lists(st.sampled_from(["b", "é€", "#", "a b", "😀a", "€#"]), max_size=2), data=st.data())
def test_a_stream_in_any_pieces_is_the_whole_answer(text: str, stops: list[str], data: st.DataObject) -> None:
    """Whatever outputs come together, and wherever the answer is cut off."""
    limit = data.draw(st.integers(1, len(text.encode()) + 2))
    outputs, wanted = outputs_of(text, tuple(stops), limit), reference(text, tuple(stops), limit)
    for chat in (True, False):
        head = Head(model="m", prompt_tokens=1)
        writer: Writer = ChatWriter(head, [Answer(PlainReader())]) if chat else CompletionWriter(head, [""])
        sent, left = b"".join(frame.encoded for frame in writer.begin()), outputs
        while left:
            size = data.draw(st.integers(1, len(left)))
            sent += b"".join(frame.encoded for frame in writer.take(0, left[:size]))
            left = left[size:]
        whole = writer.whole()["choices"][0]
        said = whole["message"]["content"] if chat else whole["text"]
        assert (said, whole["finish_reason"]) == wanted
        assert read_back(sent, chat=chat) == (said, [wanted[1]])
        assert writer.usage["completion_tokens"] == len(outputs)


def test_tokens_that_were_not_read_are_counted_once_a_prompt() -> None:
    """Answers to one prompt share it: what one of them had to read was read."""
    writer = CompletionWriter(Head(model="m", prompt_tokens=30, prompts=2), ["", "", "", ""])
    for choice, cached in enumerate([0, 9, 16, 17]):
        output = SimpleNamespace(text="x", token_id=1, logprobs=None, output=None, cached_tokens=cached)
        writer.take(choice, [output])
        writer.take(choice, [output])
    assert writer.usage["prompt_tokens_details"] == {"cached_tokens": 0 + 16}
