"""Every command runs from end to end, on a model made in a moment, with the smallest settings, in 80 columns."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import typer
from rich.cells import cell_len

from expertflow import LLM
from expertflow.cli.main import app
from expertflow.errors import ConfigError, ExpertFlowError, TraceError
from expertflow.files import whole_file, write_whole
from expertflow.models.weights import sources
from expertflow.progress import Progress
from expertflow.trace.format import load_trace, save_trace
from helpers import EXCERPT, Done, MakeCheckpoint, commands, run

SMALL_RUN = ("--device", "cpu", "--max-tokens", 4, "--max-batch", 4, "--max-length", 32)


def strict(text: str) -> dict:
    """A JSON document as any other program reads it: NaN and Infinity are none."""
    return json.loads(text, parse_constant=lambda word: pytest.fail(f"{word} is no JSON"))


@pytest.fixture(scope="module")
def columns() -> Iterator[None]:
    """A terminal of 80 columns."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COLUMNS", "80")
        yield


@pytest.fixture(scope="module")
def place(make_checkpoint: MakeCheckpoint, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with prompts, a link to the model, and a folder of recorded routing as others write it."""
    folder = tmp_path_factory.mktemp("commands")
    (folder / "model").symlink_to(make_checkpoint("qwen3_moe"))
    for name, letters in (("prompts.txt", "abcdefgh"), ("others.txt", "ABCDEFGH")):
        (folder / name).write_text("\n".join(letter * (3 + place) for place, letter in enumerate(letters)))
    foreign = folder / "foreign"
    foreign.mkdir()
    ids = np.random.default_rng(0).integers(0, 8, (40, 3, 2))
    np.savez(foreign / "routing.npz", experts=ids, weights=np.ones(ids.shape, dtype=np.float16))
    (foreign / "sequences.json").write_text(json.dumps([{"offset": 0, "n_rows": 40}]))
    return folder


@pytest.fixture(scope="module")
def chain(place: Path, columns: None) -> dict[str, Done]:  # noqa: ARG001 - sets the terminal
    """One command after another, each on what the ones before it wrote."""
    model, trace, predictor = place / "model", place / "run.trace", place / "predictor"
    done = {
        "strategies": run("strategies"),
        "models": run("models"),
        "plan": run("plan", model, "--gpu-memory", "4MiB", "--max-length", 32, "--device", "cpu"),
        "trace record": run("trace", model, "--prompts-file", place / "prompts.txt", "-o", trace, *SMALL_RUN),
    }
    run("trace", "record", model, "--prompts-file", place / "others.txt", "-o", place / "other.trace", *SMALL_RUN)
    done |= {
        "trace info": run("trace", "info", trace),
        "trace import": run("trace", "import", place / "foreign", "-o", place / "foreign.trace"),
        "simulate": run(
            "simulate", trace, "--slots", "50%,75%", "--batch", 2, "--strategy", "next-use",
            "--plot", place / "simulate.png", "--json", place / "simulate.json",
        ),
        "train-predictor": run("train-predictor", trace, "-o", predictor, "--epochs", 1, "--validation", 0.3, "--device", "cpu"),
        "eval-predictor": run(
            "eval-predictor", predictor, place / "other.trace", "--batch", "1,2x2", "--slots", "50%", "--steps", 5,
            "--plot", place / "eval.png", "--json", place / "eval.json",
        ),
        "run": run("run", model, "--prompts-file", place / "prompts.txt", "--results", place / "out.jsonl", "--slots", "50%",
                   "--predictor", predictor, *SMALL_RUN),
        "bench": run("bench", "--model", model, "--strategies", "lru,next-use", "--slots", "50%", "--batches", "1,2", "--tokens", 2,
                     "--repeats", 1, "--device", "cpu", "--predictor", "none", "--out", place / "bench.json"),
    }  # fmt: skip
    return done | {"report": run("report", place / "bench.json", "-o", place / "report")}


def test_every_command_ran(chain: dict[str, Done]) -> None:
    """The chain has every command of the live table but those that wait for people, and each wrote something."""
    assert set(chain) | {"chat", "serve"} == set(commands(typer.main.get_command(app)))
    assert all(done.stdout + done.stderr for done in chain.values())


def test_no_cell_is_cut_off_in_80_columns(chain: dict[str, Done]) -> None:
    """Nothing but JSON, paths and progress is wider than the terminal, and no cell ends in an ellipsis."""
    for name, done in chain.items():
        assert "…" not in done.stdout + done.stderr, name
        wide = [line for line in done.stdout.splitlines() if cell_len(line) > 80]
        assert all(line.startswith(("{", "/")) for line in wide), (name, wide)


@pytest.mark.parametrize(
    ("command", "what"),
    [
        ("trace record", "recording prompts: 8 of 8 (100%)"),
        ("simulate", "replays: 2 of 2 (100%)"),
        ("train-predictor", "epochs: 1 of 1 (100%)"),
        ("eval-predictor", "replays: 18 of 18 (100%)"),
        ("run", "requests: 8 of 8 (100%)"),
        ("bench", "runs: "),
    ],
)
def test_long_work_shows_lines_where_there_is_no_terminal(chain: dict[str, Done], command: str, what: str) -> None:
    """Into a file or pipe progress is lines on stderr; stdout stays the output's."""
    assert what in chain[command].stderr
    assert what not in chain[command].stdout


def test_every_json_file_is_json(chain: dict[str, Done], place: Path) -> None:
    """JSON of every command is read by a strict parser, and no path of this machine is in it."""
    texts = [(place / name).read_text() for name in ("simulate.json", "eval.json", "bench.json")]
    texts += [run("trace", "info", place / "run.trace", "--json").stdout, chain["bench"].stdout.splitlines()[-1]]
    texts += [run("models", "--json").stdout, run("plan", place / "model", "--device", "cpu", "--json").stdout]
    texts += (place / "out.jsonl").read_text().splitlines()
    for text in texts:
        strict(text)
        assert str(place) not in text


def test_commands_leave_what_they_were_asked_for(chain: dict[str, Done], place: Path) -> None:
    """Pictures, pages and results are there under their names, and nothing unfinished is beside them."""
    assert chain
    for name in ("simulate.png", "eval.png", "report/bench_budget.png"):
        assert (place / name).read_bytes().startswith(b"\x89PNG"), name
    assert "## model, preset quick" in (place / "report" / "README.md").read_text()
    assert not [path for path in place.rglob("*") if ".part" in path.name or "unfinished" in path.name]


def test_a_recorded_trace_carries_its_models_record_bytes(chain: dict[str, Done], place: Path) -> None:
    """What the planner reads from the checkpoint's headers stands in the trace, and a replay takes it from there."""
    assert chain
    planned = strict(run("plan", place / "model", "--device", "cpu", "--json").stdout)["row"]
    assert load_trace(place / "run.trace").header.record_bytes == planned
    assert strict(run("trace", "info", place / "run.trace", "--json").stdout)["record_bytes"] == planned
    for name in ("simulate.json", "eval.json"):
        config = strict((place / name).read_text())["config"]
        assert (config["record_bytes"], config["record_bytes_from"]) == (planned, "trace")
        assert config["cost"]["row_bytes"] == planned
    cell = strict((place / "simulate.json").read_text())["cells"][0]
    assert cell["bytes_per_token"] == pytest.approx(cell["loads"] / cell["tokens"] * planned, abs=1)
    assert "assumed" not in chain["simulate"].stderr + chain["eval-predictor"].stderr


def replayed(place: Path, trace: str, *more: object) -> tuple[Done, dict]:
    """A small replay, and the config of its result."""
    words = ("--slots", "50%", "--batch", 1, "--strategy", "next-use", "--json", place / "again.json")
    done = run("simulate", place / trace, *words, *more)
    return done, strict((place / "again.json").read_text())["config"]


def test_what_a_replay_takes_for_an_expert(chain: dict[str, Done], place: Path) -> None:
    """The model decides, else the option, else the trace; what is left is an assumption, printed and written."""
    assert chain
    planned = load_trace(place / "run.trace").header.record_bytes
    done, config = replayed(place, "foreign.trace")
    assert "assumed: 49.8 MB an expert" in done.stderr
    assert (config["record_bytes"], config["record_bytes_from"]) == (49_800_000, "assumed")
    for option in ("--record-mb", "--row-mb"):
        done, config = replayed(place, "run.trace", option, 3.5)
        assert (config["record_bytes"], config["record_bytes_from"]) == (3_500_000, "option")
        assert "assumed" not in done.stderr
    done, config = replayed(place, "foreign.trace", "--model", place / "model", "--record-mb", 3.5)
    assert (config["record_bytes"], config["record_bytes_from"]) == (planned, "model")
    assert "not used: --record-mb 3.5" in done.stderr
    run("trace", "import", place / "foreign", "-o", place / "sized.trace", "--record-mb", 2)
    assert replayed(place, "sized.trace")[1]["record_bytes"] == 2_000_000
    for value in ("0", "-1", "nan", "inf"):
        with pytest.raises(ConfigError, match=f"record_mb={float(value)}"):
            replayed(place, "run.trace", "--record-mb", value)


def test_an_evaluation_says_what_it_assumes(chain: dict[str, Done], place: Path) -> None:
    """As a replay, of a trace that does not say what its model's experts take."""
    assert chain
    old = load_trace(place / "other.trace")
    save_trace(replace(old, header=replace(old.header, record_bytes=0)), place / "old.trace")
    words = ("eval-predictor", place / "predictor", place / "old.trace", "--batch", "", "--json", place / "again.json")
    for more, size, source in (((), 49_800_000, "assumed"), (("--record-mb", 3), 3_000_000, "option")):
        done = run(*words, *more)
        assert ("assumed: 49.8 MB" in done.stderr) is (source == "assumed")
        config = strict((place / "again.json").read_text())["config"]
        assert (config["record_bytes"], config["record_bytes_from"]) == (size, source)
        assert config["cost"]["row_bytes"] == size


def test_a_place_that_cannot_be_written_is_refused_before_the_work(
    make_checkpoint: MakeCheckpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A trace for a folder that is not there costs no loading of a model."""
    (tmp_path / "p.txt").write_text("abc")
    monkeypatch.setattr(LLM, "__init__", lambda *_, **__: pytest.fail("loaded a model"))
    with pytest.raises(ExpertFlowError, match="does not exist"):
        run(
            "trace",
            make_checkpoint("qwen3_moe"),
            "--prompts-file",
            tmp_path / "p.txt",
            "-o",
            tmp_path / "no" / "t.trace",
        )


def test_a_bad_header_is_refused(tmp_path: Path, place: Path, chain: dict[str, Done]) -> None:
    """Record bytes are a whole number, 0 or more."""
    assert chain
    trace = load_trace(place / "run.trace")
    for wrong in (-1, 2.5, True, "9"):
        save_trace(replace(trace, header=replace(trace.header, record_bytes=wrong)), tmp_path / "bad.trace")
        with pytest.raises(TraceError, match="record_bytes"):
            load_trace(tmp_path / "bad.trace")


def test_a_failed_writer_leaves_the_old_file(tmp_path: Path) -> None:
    """A file is whole at every moment; what was begun is gone; a link stays a link."""
    target, link = tmp_path / "a.json", tmp_path / "link.json"
    link.symlink_to(target)

    def fail() -> None:
        with whole_file(link) as part:
            part.write_text("half")
            raise OSError(28, "No space left on device")

    write_whole(link, "old")
    with pytest.raises(OSError, match="No space left"):
        fail()
    assert target.read_text() == "old"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.json", "link.json"]
    write_whole(link, "new")
    assert link.is_symlink()
    assert target.read_text() == "new"
    write_whole(Path("/dev/null"), "nothing")
    assert Path("/dev/null").is_char_device()


def test_lines_are_ten_at_most_and_end_with_everything(capsys: pytest.CaptureFixture[str]) -> None:
    """A thousand steps are ten lines; work whose size is not known stays silent for its first minute."""
    with Progress("steps", 1000) as bar:
        for _ in range(1000):
            bar.advance()
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(",")[0] for line in lines] == [f"steps: {n}00 of 1000 ({n}0%)" for n in range(1, 11)]
    with Progress("bytes", 3 << 20, size=True) as bar:
        bar.advance(3 << 20, note="fast")
    assert capsys.readouterr().err.startswith("bytes: 3.0 MiB of 3.0 MiB (100%)")
    with Progress("steps", 9, show=False) as bar:
        bar.advance(9)
    with Progress("steps") as bar:
        bar.advance()
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("words", "match"),
    [
        (("simulate", "TRACE", "--seed", -1), "seed=-1"),
        (("simulate", "TRACE", "--gate-recall", "nan"), "gate_recall=nan"),
        (("simulate", "TRACE", "--batch", "\u00b2"), "batch='\u00b2'"),
        (("simulate", "TRACE", "--link-gbps", "inf"), "link_gbps=inf"),
        (("eval-predictor", "p", "TRACE", "--leave-out", "category=physics"), "needs a trace"),
        (("bench", "--seed", -1), "seed=-1"),
        (("bench", "--long-prompt", -1), "long_prompt=-1"),
        (("bench", "--deadline", "nan"), "deadline=nan"),
        (("bench", "--batches", "\u00b2"), "batches='\u00b2'"),
    ],
)
def test_impossible_numbers_are_errors_of_ours(words: tuple[object, ...], match: str) -> None:
    """No traceback of NumPy or JSON, and no option without effect."""
    with pytest.raises(ConfigError, match=match):
        run(*(EXCERPT if word == "TRACE" else word for word in words))


def test_loading_a_large_model_shows_lines(
    make_checkpoint: MakeCheckpoint, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where `progress` is on and loading takes long; what counts as large is set to nothing here."""
    monkeypatch.setattr(sources, "_LONG_TO_LOAD", 1)
    for progress in (True, False):
        LLM(make_checkpoint("qwen3_moe"), device="cpu", max_length=32, progress=progress).close()
        assert ("loading experts: 576.0 KiB of 576.0 KiB (100%)" in capsys.readouterr().err) is progress


def test_a_terminal_gets_a_bar(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """It has the name, the numbers and the note, and is taken away at the end."""
    for name, value in (("FORCE_COLOR", "1"), ("TERM", "xterm"), ("COLUMNS", "80")):
        monkeypatch.setenv(name, value)
    with Progress("steps", 8) as bar:
        bar.advance(3, note="7 tokens/s")
    text = capsys.readouterr().err
    assert "steps, 7 tokens/s" in text
    assert "3/8" in text
    assert text.endswith("\x1b[2K")  # the line is empty again
