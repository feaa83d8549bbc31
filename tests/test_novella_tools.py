"""Tests of the tools that make the shipped model: corpus, training twin, export, resuming."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console
from transformers import AutoModelForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tools"))

from novella import corpus, loop
from novella.constants import Recipe, Shape
from novella.data import Batches, Corpus
from novella.model import Twin, parameter_counts, stock_config
from novella.optim import learning_factor, orthogonalise
from novella.report import check_size, export, load_report

TINY = Shape(
    vocab=96,
    hidden=32,
    layers=2,
    heads=2,
    kv_heads=1,
    head_dim=16,
    experts=8,
    top_k=2,
    expert_width=16,
    max_positions=64,
)
QUICK = replace(Recipe(), batch=2, sequence=16, warmup_steps=3, probe_every=10_000)


def tokens(count: int, seed: int) -> np.ndarray:
    """Return random token ids of the tiny vocabulary."""
    return np.random.default_rng(seed).integers(0, TINY.vocab, count).astype(np.uint16)


def new_run(shape: Shape = TINY) -> loop.Run:
    """Start a tiny CPU run on fixed random tokens."""
    data = Corpus(tokens(700, 1), tokens(200, 2), 700)
    quiet = Console(quiet=True)
    return loop.start_run(shape, QUICK, torch.device("cpu"), data, quiet, compiled=False)


@pytest.mark.parametrize("moe", [True, False])
def test_twin_gives_the_stock_models_logits(moe: bool) -> None:
    """The training twin computes what stock transformers computes from the same weights."""
    shape = replace(TINY, moe=moe, init_std=0.2)
    twin = Twin(shape).initialise(3)
    stock = AutoModelForCausalLM.from_config(stock_config(shape, QUICK), dtype=torch.float32)
    stock.set_attn_implementation("eager")
    if moe:
        stock.set_experts_implementation("eager")
    stock.load_state_dict(twin.state_dict(), strict=False)
    stock.tie_weights()
    probe = torch.from_numpy(tokens(48, 5).astype(np.int64)).view(2, 24)
    with torch.no_grad():
        torch.testing.assert_close(twin.logits(probe), stock(probe).logits, atol=1e-4, rtol=1e-4)


def test_twin_gives_the_stock_models_gradients() -> None:
    """The sorted dispatch sends gradients to the weights and routers as the stock model does."""
    shape = replace(TINY, init_std=0.2)
    twin = Twin(shape).initialise(4)
    stock = AutoModelForCausalLM.from_config(stock_config(shape, QUICK), dtype=torch.float32)
    stock.set_experts_implementation("eager")
    stock.load_state_dict(twin.state_dict(), strict=False)
    stock.tie_weights()
    probe = torch.from_numpy(tokens(34, 6).astype(np.int64)).view(2, 17)
    probe = probe.clamp(min=1)  # the stock embedding gives its padding entry, 0, no gradient
    twin(probe[:, :-1], probe[:, 1:], QUICK).language.backward()
    logits = stock(probe[:, :-1]).logits
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), probe[:, 1:].flatten()).backward()
    theirs = dict(stock.named_parameters())
    for name, parameter in twin.named_parameters():
        torch.testing.assert_close(parameter.grad, theirs[name].grad, atol=1e-4, rtol=1e-3)


def test_export_round_trips_through_stock_transformers(tmp_path: Path) -> None:
    """The exported folder reloads with stock classes and gives the twin's bf16-rounded logits."""
    twin = Twin(replace(TINY, init_std=0.1)).initialise(7)
    answer = export(twin, tmp_path / "model", QUICK)
    assert answer["class"] == "Qwen3MoeForCausalLM"
    assert answer["max_logit_difference_fp32"] < 1e-4


def test_export_refuses_a_checkpoint_over_the_size_limit(tmp_path: Path) -> None:
    """A checkpoint beyond the project's size limit is refused with both sizes in the message."""
    (tmp_path / "model").mkdir()
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "model" / "weights").write_bytes(bytes(2_000))
    small = replace(QUICK, max_total_bytes=1_999)
    with pytest.raises(ValueError, match="the limits are"):
        check_size(tmp_path / "model", tmp_path / "tokenizer", small)
    exact = replace(QUICK, max_total_bytes=2_000)
    assert check_size(tmp_path / "model", tmp_path / "tokenizer", exact)["total_bytes"] == 2_000


def test_resumed_run_repeats_the_uninterrupted_losses(tmp_path: Path) -> None:
    """A run stopped half-way and resumed in a new process state ends with the same losses."""
    whole = new_run()
    whole.total = 40
    loop.train(whole, tmp_path / "whole")
    first = new_run()
    first.total = 40
    loop.train(first, tmp_path / "parts", stop_at=23)
    second = new_run()
    assert loop.resume(second, tmp_path / "parts")
    assert (second.step, second.total) == (23, 40)
    loop.train(second, tmp_path / "parts")
    assert second.curve == whole.curve
    assert len(whole.curve) == 40


def test_training_lowers_the_loss() -> None:
    """Both optimisers together learn a repeating text within a few steps."""
    run = new_run()
    run.batches = Batches(np.tile(np.arange(16, dtype=np.uint16), 60), 2, 16, 0, torch.device("cpu"))
    run.total = 40
    first = float(loop.train_step(run)[0])
    while run.step < run.total:
        last = float(loop.train_step(run)[0])
    assert last < first - 1.0


def test_one_epoch_sees_every_window_once() -> None:
    """An epoch's batches are a permutation of all windows, and another epoch orders them anew."""
    batches = Batches(tokens(700, 1), 2, 16, 9, torch.device("cpu"))
    batches.enter_epoch(0)
    first = batches.starts.tolist()
    assert sorted(first) == [16 * i for i in range(batches.steps_per_epoch * 2)]
    batches.enter_epoch(1)
    assert [s - 389 % 16 for s in batches.starts.tolist()] != first


def test_schedule_warms_up_and_ends_at_zero() -> None:
    """The learning rate rises independently of the total and decays to zero at its end."""
    assert learning_factor(1, 100, QUICK) == learning_factor(1, 100_000, QUICK)
    assert learning_factor(20, 100, QUICK) == 1.0
    assert learning_factor(99, 100, QUICK) < 0.02
    assert learning_factor(100, 100, QUICK) == 0.0


def test_orthogonalise_evens_out_singular_values() -> None:
    """Newton-Schulz brings every singular value of a random matrix near one."""
    stack = torch.randn(3, 12, 40, generator=torch.Generator().manual_seed(1))
    values = torch.linalg.svdvals(orthogonalise(stack, 5))
    assert 0.5 < float(values.min()) <= float(values.max()) < 1.4


def test_load_report_measures_against_the_fair_share() -> None:
    """An expert with half its fair share of tokens is reported as 0.5."""
    report = load_report(torch.tensor([[5, 10, 10, 15], [10, 10, 10, 10]]))
    assert report["per_layer"] == [[0.5, 1.0, 1.0, 1.5], [1.0] * 4]
    assert (report["min_relative"], report["max_relative"]) == (0.5, 1.5)
    assert report["layer_min"] == [0.5, 1.0]


def test_full_size_model_keeps_its_promised_shape() -> None:
    """The shipped shape holds at least 85 % of its parameters in experts and matches the dense."""
    with torch.device("meta"):
        moe, dense = Twin(Shape()), Twin(Shape(moe=False))
    size = parameter_counts(moe)
    assert size["experts"] / size["total"] >= 0.85
    router = Shape().layers * Shape().experts * Shape().hidden
    assert size["active"] - router == parameter_counts(dense)["total"]


def book(name: str, words: list[str]) -> corpus.Book:
    """Make a book of the given words."""
    text = " ".join(words)
    return corpus.Book("clic", name, text, corpus.shingles(text))


def test_books_that_share_text_are_dropped() -> None:
    """A near copy of a kept book is dropped; a book that shares a little stays."""
    words = [f"w{i}" for i in range(1_000)]
    near = ["x"] * 100 + words[100:]
    far = words[:100] + [f"v{i}" for i in range(900)]
    books = [book("original", words), book("near", near), book("far", far)]
    kept, dropped = corpus.drop_duplicates(books, 0.2)
    assert [b.path for b in kept] == ["original", "far"]
    assert dropped == [("clic/near", "clic/original")]


def test_books_that_leak_into_held_out_text_leave_training() -> None:
    """Training loses the held-out books and every book that shares text with one of them."""
    words = [f"w{i}" for i in range(1_000)]
    held = book("held", words)
    leaky = book("leaky", words[:100] + [f"v{i}" for i in range(900)])
    clean = book("clean", [f"u{i}" for i in range(1_000)])
    assert corpus.without_leaks([held, leaky, clean], [held], 0.02) == [clean]


def test_hard_wrapped_lines_join_and_debris_goes() -> None:
    """Cleaning unwraps lines and removes licences, page numbers, notes and odd quotes."""
    raw = (
        "Licence text\n\n*** START OF THIS EBOOK ***\n\nIt was a cold,\nwell-\nlit _night_.[1]\n\n"
        "[Page 12]\n\n\u201cYes,\u201d said  he -- \u2018no.\u2019\n\n*** END OF THIS EBOOK ***\nmore"
    )
    assert corpus.clean(raw) == ("It was a cold, well-lit night.\n\n\"Yes,\" said he\u2014'no.'")


def test_endless_paragraph_splits_between_speakers() -> None:
    """A paragraph that lost its breaks is cut at a change of speaker, and no text is lost."""
    talk = '"Is it you?" "It is." She went away quickly. '
    pieces = corpus.split_long((talk * 30).strip(), limit=200)
    assert pieces[0] == '"Is it you?"'
    assert " ".join(pieces) == (talk * 30).strip()
