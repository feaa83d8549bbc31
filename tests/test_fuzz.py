"""Hostile files, configs and options, by format: our error or the right answer, below the command's last resort.

`EXPERTFLOW_FUZZ=20 pytest tests/test_fuzz.py` tries twenty times as many.
"""

import hashlib
import io
import json
import random
import shutil
import warnings
import zipfile
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import typer

from expertflow import LLM, EngineConfig, SamplingParams
from expertflow.bench.result import read_result
from expertflow.bench.workload import read_prompt_set
from expertflow.cli.main import app
from expertflow.engine.offline import Results
from expertflow.engine.prepare import prepare
from expertflow.errors import ExpertFlowError
from expertflow.models.files.checkpoint import INDEX_NAME, SINGLE_NAME, walk
from expertflow.predict.artifact import Artifact, load_artifact, save_artifact
from expertflow.predict.dataset import passages
from expertflow.prompts import read_prompts
from expertflow.sim.workload import as_recorded, live_sequences
from expertflow.trace.format import DECODE, Header, Rows, Trace, load_trace, save_trace
from fuzz import MANY, VALUES, hostile, outcome, spoilt, with_header
from helpers import ROOT, MakeCheckpoint, load_resident, random_artifact

PARSER = (typer.BadParameter.__mro__[2], typer.Abort)  # whatever the parser of options says of a value
RESULT = ROOT / "benchmarks" / "results" / "bench_quick_cpu.json"
PROMPTS = [[5, 6, 7], [8, 9]]
GREEDY = SamplingParams(max_tokens=3, ignore_eos=True)


def cases(name: str, count: int) -> list[random.Random]:
    """One source of random numbers a case."""
    return [random.Random(f"{name} {number}") for number in range(count * MANY)]


def tokens(folder: Path) -> list[tuple[int, ...]]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with LLM(folder, device="cpu", predictor="none", slots=6, max_batch=2, max_length=16, prefill_chunk=8) as llm:
            return [tuple(output.token_ids) for output in llm.generate(PROMPTS, GREEDY)]


@pytest.fixture(scope="module")
def model(make_checkpoint: MakeCheckpoint) -> Path:
    return make_checkpoint("qwen3_moe", num_hidden_layers=2, num_experts=4, spread=0.3)


def test_safetensors_headers(model: Path, tmp_path: Path) -> None:
    """A changed header is refused, or the same tokens come out."""
    folder = Path(shutil.copytree(model, tmp_path / "model"))
    raw = (model / SINGLE_NAME).read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header, data, right = json.loads(raw[8 : 8 + length]), raw[8 + length :], tokens(model)
    accepted = 0
    for source in cases("safetensors", 300):
        changed = (
            spoilt(raw[: 8 + length], source) + data
            if source.random() < 0.2
            else with_header(hostile(header, source), data)
        )
        (folder / SINGLE_NAME).write_bytes(changed)
        if not isinstance(outcome(lambda: walk(folder)), ExpertFlowError):
            accepted += 1
            found = outcome(lambda: tokens(folder))
            assert isinstance(found, ExpertFlowError) or found == right
    assert accepted < 60 * MANY


def test_indexes(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    """A changed index is refused, or the same tensors are found."""
    folder = Path(shutil.copytree(make_checkpoint("qwen3_moe", shard="100KB"), tmp_path / "model"))
    index, right = json.loads((folder / INDEX_NAME).read_text()), walk(folder)
    for source in cases("index", 300):
        (folder / INDEX_NAME).write_text(hostile(index, source), encoding="utf-8", errors="surrogatepass")
        found = outcome(lambda: walk(folder))
        assert isinstance(found, ExpertFlowError) or found == right or set(found) < set(right)


@pytest.mark.parametrize("model_type", ["qwen3_moe", "mixtral", "gpt_oss"])
def test_configs(model_type: str, make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    """A changed config is refused, or the tokens of the stock model with that config come out."""
    made = make_checkpoint(model_type, spread=0.3)
    folder = Path(shutil.copytree(made, tmp_path / "model"))
    config = json.loads((made / "config.json").read_text())
    for source in cases(f"config {model_type}", 60):
        text = hostile(config | {"return_dict": True, "attention_chunk_size": None}, source)
        (folder / "config.json").write_text(text, encoding="utf-8", errors="surrogatepass")
        if not isinstance(outcome(lambda: prepare(folder, EngineConfig(device="cpu"))), ExpertFlowError):
            found = outcome(lambda: tokens(folder))
            assert isinstance(found, ExpertFlowError) or found == stock(folder), text


@pytest.mark.parametrize("name", ["generation_config.json", "tokenizer_config.json", "tokenizer.json"])
def test_other_settings(name: str, model: Path, tmp_path: Path) -> None:
    """Changed settings of generation or tokenizer are refused, or tokens come out as they did, until an end of text."""
    folder, right = Path(shutil.copytree(model, tmp_path / "model")), tokens(model)
    settings = json.loads((model / name).read_text())
    for source in cases(name, 40):
        (folder / name).write_text(hostile(settings, source), encoding="utf-8", errors="surrogatepass")
        found = outcome(partial(tokens, folder))
        assert isinstance(found, ExpertFlowError) or found == right


def stock(folder: Path) -> list[tuple[int, ...]]:
    resident, found = load_resident(folder), []
    for prompt in PROMPTS:
        ids = list(prompt)
        for _ in range(GREEDY.max_tokens):
            ids.append(int(resident(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
        found.append(tuple(ids[len(prompt) :]))
    return found


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    """Of two sequences, as a recording has it."""
    random_ = np.random.default_rng(0)
    rows, layers, experts, top_k = 30, 2, 8, 2
    ids = random_.permuted(np.tile(np.arange(experts), (rows, layers, 1)), axis=2)[..., :top_k]
    columns = Rows(
        ids.astype(np.uint8), np.full(ids.shape, 0.5, np.float16), np.arange(rows, dtype=np.int32) % 20,
        np.full(rows, DECODE, np.uint8), np.arange(rows, dtype=np.int32) // 15, np.arange(rows, dtype=np.int32),
    )  # fmt: skip
    header = Header(layers=layers, experts=experts, top_k=top_k, model="made up")
    save_trace(Trace(header=header, rows=columns, sequences=({"sequence": 0}, {"sequence": 1})), tmp_path / "t.trace")
    return tmp_path / "t.trace"


def hostile_column(raw: bytes, source: random.Random) -> bytes:
    """A column of another type, shape or content."""
    array, stream = np.load(io.BytesIO(raw)), io.BytesIO()
    kind = source.choice(
        [
            "f4",
            "f8",
            "i8",
            ">i4",
            "u8",
            "?",
            "c16",
            "U3",
            "V8",
            "M8[s]",
            "i4,f4",
            "O",
            "same",
            "shape",
            "bytes",
            "header",
        ]
    )
    if kind == "bytes":
        return spoilt(raw, source)
    if kind == "header":
        wanted = source.choice(
            ["(10**12,)", "(-1,)", "(30, 2, 2**40)", "(True,)", "(" * 400, "()", "(30.0, 2, 2)", "((30,),)"]
        )
        text = f"{{'descr': '<i4', 'fortran_order': False, 'shape': {wanted}, }}"
        return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text.encode() + raw[-200:]
    if kind == "shape":
        array = array.reshape(source.choice([(-1,), (1, *array.shape), (*array.shape, 1), array.shape[::-1]]))
    elif kind == "O":
        array = array.astype(object)
    elif kind != "same":
        array = np.zeros(array.shape, kind) if kind in {"U3", "V8", "M8[s]", "i4,f4"} else array.astype(kind)
    if array.dtype.kind in "iuf" and array.size:
        array = array.copy()
        array.flat[source.randrange(array.size)] = source.choice(
            [0, 1, 7, 8, 100, -1 if array.dtype.kind != "u" else 2, float("nan") if array.dtype.kind == "f" else 3]
        )
    np.save(stream, array, allow_pickle=True)
    return stream.getvalue()


def hostile_trace(path: Path, source: random.Random) -> None:
    """Change a member of the archive, or the archive."""
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    name = source.choice(list(members))
    if source.random() < 0.1:
        path.write_bytes(spoilt(path.read_bytes(), source))
        return
    members[name] = (
        hostile(json.loads(members[name]), source).encode("utf-8", "surrogatepass")
        if name.endswith("json")
        else hostile_column(members[name], source)
    )
    if source.random() < 0.05:
        members[name] = bytes(50_000_000)
    with zipfile.ZipFile(
        path, "w", source.choice([zipfile.ZIP_DEFLATED, zipfile.ZIP_STORED, zipfile.ZIP_LZMA, zipfile.ZIP_BZIP2])
    ) as archive:
        for member, content in members.items():
            archive.writestr(member, content)


def use_trace(path: Path) -> Trace:
    """Whatever reads rows before compiled code does; the simulator's own replay takes what comes out of here."""
    found = load_trace(path)
    assert found.rows.experts.min() >= 0
    assert found.rows.experts.max() <= found.header.experts <= 65_534
    for prepare_ in (
        lambda: live_sequences(found, 2),
        lambda: as_recorded(found),
        lambda: passages(found),
        lambda: passages(found, ["a"]),
    ):
        try:
            prepare_()
        except ExpertFlowError:
            continue
    return found


def test_traces(trace: Path) -> None:
    """A changed trace is refused, or its columns are what the format says."""
    raw = trace.read_bytes()
    for source in cases("trace", 400):
        trace.write_bytes(raw)
        hostile_trace(trace, source)
        found = outcome(lambda: use_trace(trace))
        if not isinstance(found, ExpertFlowError):
            assert [column.dtype for column in found.rows] == [
                np.uint8 if found.header.experts < 256 else np.uint16,
                np.float16,
                np.int32,
                np.uint8,
                np.int32,
                np.int32,
            ]


def test_predictors(tmp_path: Path) -> None:
    """A changed predictor is refused, or its chances are chances."""
    folder = tmp_path / "predictor"
    save_artifact(random_artifact(), folder)
    about, packed = json.loads((folder / "predictor.json").read_text()), (folder / "predictor.safetensors").read_bytes()
    length = int.from_bytes(packed[:8], "little")
    header, data = json.loads(packed[8 : 8 + length]), packed[8 + length :]
    for source in cases("predictor", 200):
        weights = packed
        if source.random() < 0.4:
            weights = with_header(hostile(header, source), data) if source.random() < 0.5 else spoilt(packed, source)
        text = (
            hostile(about, source)
            if weights is packed
            else json.dumps(about | {"sha256": hashlib.sha256(weights).hexdigest()})
        )
        (folder / "predictor.json").write_text(text, encoding="utf-8", errors="surrogatepass")
        (folder / "predictor.safetensors").write_bytes(weights)
        found = outcome(lambda: chances(load_artifact(folder)))
        assert isinstance(found, ExpertFlowError) or bool(((found >= 0) & (found <= 1)).all())


def chances(artifact: Artifact) -> torch.Tensor:
    c, ids = artifact.config, torch.arange(6)[None]
    routes = torch.zeros(1, 6, c.layers, c.top_k, dtype=torch.int64)
    return artifact.probabilities(artifact.model(ids, routes), ids, ids)


def test_results_files(tmp_path: Path) -> None:
    """A changed results file is refused and left as it is, or gone on with."""
    path, texts, params = tmp_path / "r.jsonl", ["a", "b", "c"], SamplingParams(temperature=1.0)
    with Results(path, texts, params, "model") as results:
        lines = [
            results._header,
            {"index": 1, "text": "x", "token_ids": [1]},
            {"index": 0, "text": "y", "token_ids": []},
        ]
    for source in cases("results", 300):
        raw = "".join((hostile(line, source) if source.random() < 0.4 else json.dumps(line)) + "\n" for line in lines)
        path.write_text(raw[: source.choice((None, -1, -9))], encoding="utf-8", errors="surrogatepass")
        before = path.read_bytes()
        found = outcome(lambda: read_results(path, texts, params))
        assert not isinstance(found, ExpertFlowError) or path.read_bytes() == before
        assert isinstance(found, ExpertFlowError) or set(found) <= {0, 1, 2}


def read_results(path: Path, texts: list[str], params: SamplingParams) -> dict[int, Any]:
    with Results(path, texts, params, "model") as results:
        return dict(results.done)


def test_prompts_files(tmp_path: Path) -> None:
    """A changed file of prompts is refused, or holds texts; the benchmark's also ids."""
    path = tmp_path / "p.jsonl"
    for source in cases("prompts", 300):
        lines = [hostile({"prompt": "a text", "tokens": [1, 2], "more": {"x": [1]}}, source) for _ in range(2)]
        path.write_text("\n".join(lines), encoding="utf-8", errors="surrogatepass")
        found = outcome(lambda: read_prompts(path))
        assert isinstance(found, ExpertFlowError) or all(isinstance(prompt, str) for prompt in found)
        outcome(lambda: read_prompt_set(path, None, long_prompt=5, seed=0))


def test_result_files(tmp_path: Path) -> None:
    """A changed result of the benchmark is refused, or a page can be made of it."""
    document = json.loads(RESULT.read_text())
    document["rows"] = document["rows"][:3]
    for source in cases("result", 300):
        (tmp_path / "r.json").write_text(hostile(document, source), encoding="utf-8", errors="surrogatepass")
        outcome(lambda: read_result(tmp_path / "r.json"))


COMMANDS = (
    ["plan", "MODEL", "--slots=@", "--device=cpu"], ["plan", "MODEL", "--gpu-memory=@", "--device=cpu"], ["plan", "MODEL", "--max-batch=@", "--device=cpu"],
    ["plan", "MODEL", "--max-live=@", "--max-length=@", "--device=cpu"], ["plan", "MODEL", "--prefill-chunk=@", "--device=cpu"],
    ["plan", "@"], ["plan", "MODEL", "--predictor=@", "--strategy=@"], ["trace", "info", "@"], ["report", "@", "--out=@"],
    ["trace", "import", "@", "--out=@"], ["eval-predictor", "@", "@", "--batch=@"], ["run", "@", "--prompt=@", "--results=@", "--max-tokens=@"],
    ["train-predictor", "TRACE", "--out=@", "--epochs=0", "--batch=@"], ["bench", "--batches=@", "--slots=@", "--tokens=@", "--out=/nowhere/x"],
    ["simulate", "TRACE", "--slots=@", "--batch=@", "--strategy=@", "--json=/nowhere/x"], ["run", "--prompts-file=@", "--seed=@", "--results=/nowhere/x"],
)  # fmt: skip
WORDS = (
    "", "0", "-1", "1", "3", "25%", "1e9%", "1e999999999%", "16/layer", "9" * 30, "9" * 5000, str(2**63 - 1), str(2**63), "nan", "inf", "6GiB", "9" * 400 + "TiB",
    "a" * 300, "a" * 5000, "/" + "a/" * 3000, "[/b]x", "[red]", "é", "\udcff", "../..", "/dev/null", "/dev/zero", ".", "x=y", "4x2", "lru", "all,all", "--", "/proc/self/mem",
)  # fmt: skip


def test_commands(model: Path, trace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Options with whatever value end a command with our error, with the option parser's, or well."""
    for source in cases("command", 300):
        words = [word.replace("@", source.choice(WORDS)) for word in source.choice(COMMANDS)]
        words = [{"MODEL": str(model), "TRACE": str(trace)}.get(word, word) for word in words]
        outcome(partial(command, words))
    capsys.readouterr()


def command(words: list[str]) -> None:
    try:
        app(words, standalone_mode=False)
    except (*PARSER, SystemExit):
        return


def test_options() -> None:
    """Options of the Python front door of every type are refused, or read as what they are."""
    names = {kind: list(kind.__dataclass_fields__) for kind in (EngineConfig, SamplingParams)}
    for source in cases("option", 1000):
        kind = source.choice(list(names))
        options = {
            name: source.choice((*VALUES, *WORDS, Path("x"), b"x", 1j, np.int64(3)))
            for name in source.sample(names[kind], 2)
        }
        found = outcome(partial(kind.from_mapping, options))
        assert isinstance(found, ExpertFlowError) or asdict(found)
