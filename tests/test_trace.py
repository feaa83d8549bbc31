"""The trace format, its reader's refusals, converters and the recorder."""

import gzip
import json
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from expertflow import LLM, SamplingParams
from expertflow.errors import TraceError
from expertflow.events import Event, EventKind
from expertflow.trace.format import (
    CHUNK_ROWS,
    DECODE,
    PREFILL,
    Header,
    TraceWriter,
    check_model,
    load_trace,
    open_trace,
    save_trace,
)
from expertflow.trace.importer import import_folder
from helpers import EXCERPT, MakeCheckpoint, make_trace


@given(rows=st.integers(1, 40), layers=st.integers(1, 3), experts=st.sampled_from([2, 8, 255, 256, 300]))
@settings(max_examples=15)
def test_what_is_saved_is_read_back(
    rows: int, layers: int, experts: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Header, rows, sequences and vocabulary survive the file, for small and large numbers of experts."""
    path = tmp_path_factory.mktemp("trace") / "t.trace"
    trace = make_trace(rows, layers, experts)
    save_trace(trace, path)
    again = load_trace(path)
    assert (again.header, again.sequences, again.vocabulary) == (trace.header, trace.sequences, trace.vocabulary)
    for before, after in zip(trace.rows, again.rows, strict=True):
        assert before.dtype == after.dtype
        np.testing.assert_array_equal(before, after)


def test_a_long_trace_is_written_and_read_in_parts(tmp_path: Path) -> None:
    """Rows go to disk a chunk at a time and come back chunk by chunk."""
    trace = make_trace(3 * CHUNK_ROWS // 2)
    save_trace(trace, tmp_path / "t.trace")
    opened = open_trace(tmp_path / "t.trace")
    first = next(iter(opened.read()))
    assert opened.chunks == (CHUNK_ROWS, CHUNK_ROWS // 2)
    np.testing.assert_array_equal(first.experts, trace.rows.experts[:CHUNK_ROWS])


def test_an_unfinished_recording_leaves_no_trace_under_its_name(tmp_path: Path) -> None:
    """A writer that fails leaves a part file, which is refused as truncated."""
    path = tmp_path / "t.trace"

    def crash() -> None:
        with TraceWriter(path, Header(layers=1, experts=2, top_k=1)) as writer:
            writer.append(make_trace(3, 1, 2, 1).rows)
            raise RuntimeError("crash")

    with pytest.raises(RuntimeError, match="crash"):
        crash()
    assert not path.exists()
    with pytest.raises(TraceError, match=r"truncated: it has no footer"):
        open_trace(path.with_name("t.trace.part"))


def _rewrite(path: Path, name: str, content: bytes | None) -> None:
    with zipfile.ZipFile(path) as archive:
        members = {member: archive.read(member) for member in archive.namelist()}
    members[name] = content
    with zipfile.ZipFile(path, "w") as archive:
        for member, data in members.items():
            if data is not None:
                archive.writestr(member, data)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda p: p.write_bytes(p.read_bytes()[:400]), "is truncated"),
        (lambda p: p.write_text("not a trace"), "is no routing trace: it is no zip"),
        (lambda p: p.unlink(), "cannot be read"),
        (lambda p: _rewrite(p, "header.json", None), "has no header"),
        (lambda p: _rewrite(p, "header.json", b"{}"), "does not say 'expertflow-trace'"),
        (lambda p: _rewrite(p, "header.json", b"[1"), "header or footer is no JSON"),
        (lambda p: _rewrite(p, "footer.json", None), "truncated: it has no footer"),
        (lambda p: _rewrite(p, "footer.json", b"{}"), "footer.json lacks 'chunks'"),
        (lambda p: _rewrite(p, "000000/tokens.npy", None), "lacks 000000/tokens.npy"),
        (lambda p: _rewrite(p, "000000/tokens.npy", b"\x93NUMPY"), "tokens.npy is damaged"),
    ],
)
def test_bad_files_are_refused_with_a_reason(spoil: object, message: str, tmp_path: Path) -> None:
    """Truncated, foreign, missing and damaged files are errors of our tree that say what is wrong."""
    path = tmp_path / "t.trace"
    save_trace(make_trace(10), path)
    spoil(path)
    with pytest.raises(TraceError, match=message):
        load_trace(path)


def test_other_versions_models_and_empty_traces_are_refused(tmp_path: Path) -> None:
    """A newer version, a header of another model than the rows or than stated, and no rows at all."""
    path, trace = tmp_path / "t.trace", make_trace(10)
    save_trace(trace, path)
    header = {"format": "expertflow-trace", "version": 2, "layers": 2, "experts": 8, "top_k": 2}
    _rewrite(path, "header.json", json.dumps(header).encode())
    with pytest.raises(TraceError, match="of trace version 2"):
        open_trace(path)
    _rewrite(path, "header.json", json.dumps({**header, "version": 1, "experts": 4}).encode())
    with pytest.raises(TraceError, match=r"experts.npy holds 0 to 7; 0 to 4 can be"):
        load_trace(path)
    _rewrite(path, "header.json", json.dumps({**header, "version": 1, "layers": 3}).encode())
    with pytest.raises(TraceError, match=r"shape \(10, 2, 2\), not \(10, 3, 2\)"):
        load_trace(path)
    with pytest.raises(TraceError, match=r"\(2, 8, 2\), not \(24, 32, 4\)"):
        check_model(trace.header, layers=24, experts=32, top_k=4)
    save_trace(replace(trace, rows=trace.rows.take(slice(0))), path)
    with pytest.raises(TraceError, match="is empty"):
        load_trace(path)


def test_a_folder_of_recorded_routing_is_converted(tmp_path: Path) -> None:
    """Rows get their sequence, place, and token ids from the aligned texts; rows of no sequence are left out."""
    ids = np.random.default_rng(0).integers(0, 5, (7, 2, 2))
    np.savez(tmp_path / "routing.npz", experts=ids.astype(np.uint8), weights=np.full(ids.shape, 0.5, np.float16))
    sequences = [{"offset": 0, "n_rows": 3, "repetition": True}, {"offset": 4, "n_rows": 3}]
    (tmp_path / "sequences.json").write_text(json.dumps(sequences))
    with gzip.open(tmp_path / "decoded_tokens.jsonl.gz", "wt") as stream:
        stream.write(json.dumps({"offset": 4, "tokens": ["b", "a", "b"]}) + "\n")
    trace = import_folder(tmp_path)
    np.testing.assert_array_equal(trace.rows.experts, ids[[0, 1, 2, 4, 5, 6]])
    assert trace.rows.tokens.tolist() == [-1, -1, -1, 1, 0, 1]
    assert trace.rows.step.tolist() == [0, 1, 2, 0, 1, 2]
    assert (trace.header.experts, trace.vocabulary) == (8, ("a", "b"))
    assert len(trace.without("repetition")) == 3
    with pytest.raises(TraceError, match=r"names expert 4, but 4 a layer"):
        import_folder(tmp_path, experts=4)
    (tmp_path / "sequences.json").write_text(json.dumps([{"offset": 5, "n_rows": 3}]))
    with pytest.raises(TraceError, match="rows up to 8"):
        import_folder(tmp_path)
    with pytest.raises(TraceError, match=r"routing\.npz cannot be read"):
        import_folder(tmp_path / "nowhere")


def test_the_excerpt_is_what_its_note_says() -> None:
    """The shipped excerpt is real gpt-oss-20b routing, small, licensed, with token ids."""
    trace = load_trace(EXCERPT)
    check_model(trace.header, layers=24, experts=32, top_k=4)
    assert EXCERPT.stat().st_size <= 2**20
    assert (trace.header.licence, (EXCERPT.parent / "LICENSE").exists()) == ("Apache-2.0", True)
    assert (trace.without("repetition").rows.tokens >= 0).all()


@pytest.mark.parametrize("model_type", ["mixtral", "deepseek_v2", "switch_transformers"])
def test_the_recorder_sees_what_the_cache_was_asked_for(
    model_type: str, make_checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    """The experts recorded for each pass are those the cache served, and tokens and sequences are the requests'."""
    prompts, limit = [[5, 6, 7], [8, 9, 10, 11, 12], [13, 14]], 4
    needed: dict[tuple[int, int], int] = {}

    def note(event: Event) -> None:
        if event.kind is EventKind.LAYER:
            needed[event.step, event.layer] = event.value

    with LLM(make_checkpoint(model_type), slots=8, device="cpu", max_batch=2, prefill_chunk=6) as llm:
        llm._offloaded.events.subscribe(note)
        with llm.record(tmp_path / "t.trace"):
            outputs = llm.generate(prompts, SamplingParams(max_tokens=limit, ignore_eos=True))
    trace = load_trace(tmp_path / "t.trace")
    experts, rows = trace.header.experts, trace.rows
    for (step, layer), count in needed.items():
        routed = np.unique(rows.experts[rows.step == step, layer])
        assert (routed < experts).sum() == count
    assert set(rows.step.tolist()) == {step for step, _ in needed}
    for output in outputs:
        mine = rows.sequence == output.index
        read = rows.tokens[mine & (rows.phase == PREFILL)].tolist()
        fed = rows.tokens[mine & (rows.phase == DECODE)].tolist()
        assert fed == list(output.token_ids[:-1])
        assert read[: len(prompts[output.index])] == prompts[output.index]
    assert (np.diff(rows.weights.astype(np.float32), axis=2) <= 0).all()
