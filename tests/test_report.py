"""Reports say what result files say: every number, every missed goal, every picture."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from expertflow.bench.pages import figures
from expertflow.bench.pages.bounds import over_bounds
from expertflow.bench.pages.goals import verdicts
from expertflow.bench.pages.report import section, write_report
from expertflow.bench.result import (
    BELADY,
    DECODE,
    FIRST,
    HIT,
    KEPT,
    KEPT_ALL,
    MOVED,
    PEAK,
    RESIDENT,
    SAVED,
    WARM,
    WHOLE,
    Figure,
    ModelFacts,
    Result,
    Row,
    write_result,
)
from expertflow.cli.bench import show
from expertflow.cli.main import app
from expertflow.errors import ResultError


def row(strategy: str, slots: int, batch: int, speed: float, **more: float) -> Row:
    """A row with every figure; `kept`, `belady`, `bound`, `peak`, `saved` as wanted."""
    kept, belady = more.get("kept", 0.5), more.get("belady", 0.7)
    figures = {
        DECODE: Figure(
            values=(speed, speed * 1.1, speed * 0.9), unit="tokens/s", bound=more.get("bound", 1000.0), bound_is="all resident"
        ),
        WHOLE: Figure(values=(speed / 2,), unit="tokens/s"),
        FIRST: Figure(values=(0.25,), unit="s"),
        HIT: Figure(values=(kept,), unit="share"),
        KEPT: Figure(values=(kept,), unit="share", bound=belady, bound_is="Belady"),
        KEPT_ALL: Figure(values=(kept,), unit="share", bound=belady, bound_is="Belady"),
        MOVED: Figure(values=(12.5,), unit="MB/token", bound=7.5, bound_is="Belady"),
        PEAK: Figure(values=(more.get("peak", 5e8),), unit="bytes", bound=6e8, bound_is="the plan"),
        SAVED: Figure(values=(more.get("saved", 0.5),), unit="share", bound=0.99, bound_is="one slot"),
    }  # fmt: skip
    return Row(
        strategy=strategy,
        slots=slots,
        share=slots / 1536,
        batch=batch,
        state=WARM,
        execution="host",
        exact=True,
        figures=figures,
    )


def made(*rows: Row, experts: int = 128) -> Result:
    """A result of a Switch model."""
    facts = ModelFacts(
        name="switch", model_type="switch_transformers", layers=12, experts=experts, top_k=1, dtype="bfloat16", row_bytes=9437184,
        dense_bytes=10**8, fingerprint="abc",
    )  # fmt: skip
    kept = {name: Figure(values=(0.7,), unit="share") for name in (KEPT, KEPT_ALL)}
    belady = Row(
        strategy=BELADY, slots=rows[0].slots, share=rows[0].share, batch=rows[0].batch, state=WARM, execution="replay",
        exact=None, figures=kept, note="counted",
    )  # fmt: skip
    whole = replace(row(RESIDENT, 1536, rows[0].batch, 1000.0), exact=None)  # 900 to 1100 tokens/s
    return Result(
        preset="paper", command="expertflow bench --preset paper --out made.json", date="2026-01-01", commit="", seed=0,
        config={"tokens": 8, "repeats": 3, "prompts": "p"}, machine={"device": "cpu", "processor": "p", "cores": 2},
        versions={"torch": "0"}, model=facts, link_gbps=50.0, rows=(*rows, belady, whole), complete=True,
    )  # fmt: skip


def test_the_page_has_the_numbers_of_the_file_and_three_pictures(tmp_path: Path) -> None:
    """Medians and spreads of the rows appear in tables headed by the command; the pictures are PNG files."""
    result = made(row("ring", 48, 4, 13.125), row("next-use", 48, 4, 431.75, kept=0.4321))
    page, *pictures = write_report([("made.json", result)], tmp_path / "report")
    text = page.read_text()
    assert "431.8 (388.6-474.9)" in text
    assert "13.1 (11.8-14.4)" in text
    assert "| 0.432 |" in text
    assert "12.50 (7.50)" in text
    assert text.count(f"`{result.command}`") >= 4
    assert [path.name for path in pictures] == ["made_speed.png", "made_kept.png", "made_budget.png"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in pictures)
    assert all(f"({path.name})" in text for path in pictures)


def test_goals_are_met_or_missed_by_the_rows() -> None:
    """Thirty times the ring at four slots a layer meets ten times; three times does not, and says what the link allows."""
    fast = made(row("ring", 48, 4, 10.0), row("plec", 48, 4, 300.0, saved=0.95))
    assert [verdict.met for verdict in verdicts(fast)] == [True, True]
    slow = made(row("ring", 48, 4, 10.0), row("plec", 48, 4, 30.0, bound=50.0))
    speed, memory = verdicts(slow)
    assert not speed.met
    assert speed.figure.startswith("3.00x")
    assert speed.bound.startswith("5.00x")
    assert "out of reach here: all resident alone allows 5.00x" in speed.reason
    assert not memory.met
    text = section("made.json", slow)
    assert "**missed**" in text
    assert "out of reach here" in text


def test_a_missed_hit_ratio_names_belady_or_the_forecast() -> None:
    """No strategy can do better than Belady; below it, a longer forecast would help."""
    beyond = made(row("lru", 192, 4, 9.0, kept=0.6), row("next-use", 192, 4, 10.0, kept=0.65, belady=0.7), experts=32)
    ratio, points = verdicts(beyond)
    assert not ratio.met
    assert "Belady, who knows every later use, keeps 70.00%" in ratio.reason
    assert "Belady is 10.0 points above lru" in points.reason
    within = made(row("lru", 192, 4, 9.0, kept=0.6), row("next-use", 192, 4, 10.0, kept=0.7, belady=0.95), experts=32)
    assert [verdict.reason for verdict in verdicts(within)] == ["next-use would have to see further ahead"] * 2


def test_a_baseline_is_taken_at_its_best() -> None:
    """Points over a baseline count against the execution that keeps most, not the fastest; so does ours."""
    rows = (
        row("lru", 192, 4, 90.0, kept=0.6),
        replace(row("lru", 192, 4, 50.0, kept=0.75), execution="graph"),
        row("plec", 192, 4, 99.0, kept=0.5),
        row("next-use", 192, 4, 10.0, kept=0.8, belady=0.95),
    )
    _, points = verdicts(made(*rows, experts=32))
    assert points.figure.startswith("5.0 points (next-use, 192 slots, batch 4")
    assert not points.met


def test_other_models_have_no_goals() -> None:
    """A goal is judged on its own model only."""
    assert not verdicts(made(row("ring", 48, 4, 10.0), row("plec", 48, 4, 300.0), experts=64))


def test_what_is_wrong_is_in_the_page() -> None:
    """Unequal tokens, a peak over the plan, an unfinished run: all named before the tables."""
    bad = replace(row("ring", 48, 4, 10.0, peak=7e8), exact=False)
    result = replace(made(bad, row("plec", 48, 4, 30.0)), complete=False, left_out=("lru, slots 48: the deadline",))
    text = section("made.json", result)
    assert "NOT equal in 1 of 2 rows" in text
    assert "OVER the plan in 1 rows" in text
    assert "**Incomplete**" in text
    assert "Not measured: lru, slots 48: the deadline." in text
    assert re.search(r"oracle: counted\.", text)


def test_the_command_says_what_it_wrote(tmp_path: Path) -> None:
    """Several files, one page; a folder that cannot be made is an error of ours."""
    for name in ("a", "b"):
        write_result(made(row("ring", 48, 4, 10.0), row("plec", 48, 4, 30.0)), tmp_path / f"{name}.json")
    words = ["report", *(str(tmp_path / f"{name}.json") for name in ("a", "b")), "-o", str(tmp_path / "out")]
    done = CliRunner().invoke(app, words, catch_exceptions=False)
    assert done.exit_code == 0
    assert len(done.stdout.split()) == 7
    assert (tmp_path / "out" / "README.md").read_text().count("## switch, preset paper") == 2
    (tmp_path / "file").write_text("")
    with pytest.raises(ResultError, match="cannot be written"):
        CliRunner().invoke(app, [*words[:3], "-o", str(tmp_path / "file")], catch_exceptions=False)


def speeds(row_: Row, *values: float, bound: float, bound_is: str, moved: float = 12.5) -> Row:
    """The row with these decoding speeds, beside this bound."""
    figures_ = {
        **row_.figures,
        DECODE: Figure(values=values, unit="tokens/s", bound=bound, bound_is=bound_is),
        MOVED: Figure(values=(moved,), unit="MB/token", bound=7.5, bound_is="Belady"),
    }
    return replace(row_, figures=figures_)


@pytest.mark.parametrize(
    ("values", "bound", "bound_is", "moved", "why"),
    [
        ((880.0, 1050.0, 1200.0), 1000.0, "all experts resident", 12.5, "ran at 900.0 to 1100.0 tokens/s, and these runs, 880.0 to 1200.0, overlap"),
        ((1200.0, 1300.0), 1000.0, "all experts resident", 12.5, "every run here was faster, 1200.0 to 1300.0"),
        ((90.0,), 80.0, "Belady's bytes at the link's speed", 6.25, "7.50 MB/token, and the median of these runs is 6.25"),
        ((9000.0,), 80.0, "Belady's bytes at the link's speed", 12.5, "measured 50.0 GB/s, and these runs moved 112.5 GB/s"),
        ((90.0, 70.0, 95.0), 80.0, "Belady's bytes at the link's speed", 12.5, "the runs differ by more: 70.0 to 95.0"),
    ],
)  # fmt: skip
def test_a_speed_over_its_bound_says_why(
    values: tuple[float, ...], bound: float, bound_is: str, moved: float, why: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """The measurement behind the bound is named, in the page and in the command's output; a speed below says nothing."""
    over = speeds(row("lru", 48, 4, 1.0), *values, bound=bound, bound_is=bound_is, moved=moved)
    result = made(over, row("plec", 48, 4, 30.0))
    (line,) = over_bounds(result)
    assert line.startswith("lru (host), 48 slots, batch 4: ")
    assert why in line
    assert f"- {line}." in section("made.json", result)
    show(result)
    assert " ".join(f"above the bound: {line}".split()) in " ".join(capsys.readouterr().out.split())
    assert not over_bounds(made(row("plec", 48, 4, 30.0)))


def test_the_table_of_a_measurement_fits_80_columns(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also with the longest names, large numbers, and several executions."""
    monkeypatch.setenv("COLUMNS", "80")
    rows = [row(name, 1234, 32, 98765.4, peak=7.7e10) for name in ("lru-global", "oracle-step", "on-demand")]
    show(made(*rows, *(replace(item, execution="graph") for item in rows)))
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= 80
    assert "\u2026" not in out
    assert "98765.4" in out


def test_budget_axes_begin_at_zero_and_join_one_strategy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A line joins slot counts of one strategy; the all-resident model is a point; the picture says of what it is."""
    seen: list[tuple[figures.Picture, str]] = []
    monkeypatch.setattr(figures, "save_picture", lambda picture, _, about, **__: seen.append((picture, about)))
    rows = [row(name, slots, 4, 10.0 * slots) for name in ("lru", "plec") for slots in (48, 192)]
    figures.budget(made(*rows), tmp_path / "x.png")
    ((picture, about),) = seen
    assert about == "switch; p, 2026-01-01"
    for panel in picture.axes:
        assert (panel.get_xlim()[0], panel.get_ylim()[0]) == (0, 0)
        lines = {line.get_label(): line for line in panel.get_lines()}
        assert {name: len(line.get_xdata()) for name, line in lines.items()} == {"lru": 2, "plec": 2, RESIDENT: 1}
        assert lines[RESIDENT].get_linestyle() == "None"
