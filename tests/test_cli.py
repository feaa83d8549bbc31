"""The command as its user meets it: output, summaries, errors, Ctrl-C."""

import json
import os
import signal
import subprocess
import sys
import time
import weakref
from io import BytesIO, TextIOWrapper
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from expertflow import LLM, SamplingParams
from expertflow.cli.main import app, main
from expertflow.cli.run import _Interrupt
from expertflow.engine.llm import shipped_model
from expertflow.errors import ExpertFlowError, PromptError, TraceError
from expertflow.models.families import FAMILIES
from expertflow.prompts import read_prompts
from expertflow.units import format_bytes
from helpers import EXCERPT, MakeCheckpoint, commands

HANGS = 900
"""Seconds after which a process is taken to wait for ever, on the slowest machine."""
COMMAND = [sys.executable, "-m", "expertflow.cli.main"]


def invoke(*arguments: object) -> str:
    """Run a command in this process; its error, if any, is raised."""
    result = CliRunner().invoke(app, [str(a) for a in arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def test_run_prints_text_and_summary(make_checkpoint: MakeCheckpoint) -> None:
    """One prompt: its text as it grows, then the numbers that the same run gives a program."""
    folder, options = make_checkpoint("qwen3_moe"), {"gpu_memory": "600KiB", "max_batch": 1, "device": "cpu"}
    out = invoke("run", folder, "--prompt", "abc", "--max-tokens", 5, "--gpu-memory", "600KiB", "--device", "cpu")
    # a run makes room for just its prompt
    with LLM(folder, **options, max_length=8, prefill_chunk=3) as llm:
        output = llm.generate("abc", SamplingParams(max_tokens=5))[0]
        stats, plan = llm.stats, llm.plan
    assert out.startswith(f"abc{output.text}\n")
    cache = stats.cache
    assert cache.evictions > 0
    shown = " ".join(out.split())
    accesses = cache.hits + cache.loads
    for words in (
        "budget 600.0 KiB on cpu",
        f"measured peak {format_bytes(stats.peak_bytes)} (all experts resident: {format_bytes(plan.resident_total)})",
        f"slots {plan.slots} of 24 experts ({plan.slots / 24:.1%}), strategy next-use",
        f"hit ratio {cache.hits / accesses:.1%} of {accesses} accesses",
        f"loads {cache.loads} corrections when needed, 0 ahead (0 in vain)",
        f"link {format_bytes(cache.loads * plan.record_bytes)} moved, ",
        "speed 5 tokens in ",
        "decode step ",
    ):
        assert words in shown, words


def test_run_as_json_accounts_for_everything(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    """Many prompts from a file: outputs in order, peak within budget, bytes moved = loads x record bytes (law 4)."""
    (tmp_path / "prompts.jsonl").write_text("\n".join(json.dumps({"prompt": "p" * n}) for n in range(1, 12)))
    folder = make_checkpoint("mixtral")
    report = json.loads(
        invoke("run", folder, "--prompts-file", tmp_path / "prompts.jsonl", "--gpu-memory", "2MiB", "--slots", "25%",
               "--strategy", "lru-global", "--max-tokens", 4, "--json", "--device", "cpu")
    )  # fmt: skip
    assert [output["prompt"] for output in report["outputs"]] == ["p" * n for n in range(1, 12)]
    assert report["peak_bytes"] <= report["planned_bytes"] <= report["budget_bytes"]
    assert (report["slots"], report["experts"]) == (6, 24)
    record = json.loads(invoke("plan", folder, "--json", "--device", "cpu"))["row"]
    assert report["bytes_moved"] == report["loads"] * record
    assert report["tokens"] == sum(len(output["token_ids"]) for output in report["outputs"])


def test_run_puts_results_into_a_file(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    """Many prompts in turns: results in order in the file, the summary says how long requests waited; again, nothing is left."""
    prompts, results = tmp_path / "prompts.txt", tmp_path / "results.jsonl"
    prompts.write_text("\n".join("q" * n for n in range(1, 8)))
    arguments = ("run", make_checkpoint("mixtral"), "--prompts-file", prompts, "--max-batch", 2, "--max-live", 4,
                 "--max-tokens", 4, "--results", results, "--device", "cpu")  # fmt: skip
    out = invoke(*arguments)
    for word in ("7 finished, 4 live in turns of 2 (auto)", "first token", "later tokens"):
        assert word in out
    entries = [json.loads(line) for line in results.read_text().splitlines()]
    assert [entry["prompt"] for entry in entries[1:]] == ["q" * n for n in range(1, 8)]
    assert "0 tokens in" in invoke(*arguments)


def test_plan_needs_no_weights_and_says_what_the_budget_buys(make_checkpoint: MakeCheckpoint) -> None:
    """The plan adds up, on screen and as JSON."""
    folder = make_checkpoint("deepseek_v2", "bfloat16")
    plan = json.loads(
        invoke(
            "plan",
            folder,
            "--gpu-memory",
            "1MiB",
            "--max-length",
            64,
            "--prefill-chunk",
            64,
            "--json",
            "--device",
            "cpu",
        )
    )
    assert plan["dense"] + plan["kv"] + plan["workspace"] + plan["slot_bytes"] == plan["total"] <= plan["budget"]
    assert plan["host"] == plan["row"] * plan["layers"] * plan["experts"]
    text = invoke("plan", folder, "--slots", 5, "--max-length", 64, "--prefill-chunk", 64)
    for word in ("dense weights", "keys and values", "workspace", "expert slots", "least budget"):
        assert word in text


def test_models_lists_the_live_table() -> None:
    """Every entry of the table of families is listed."""
    entries, shown = json.loads(invoke("models", "--json")), invoke("models")
    assert {entry["model_type"] for entry in entries} == set(FAMILIES)
    assert all(entry.title in shown for entry in FAMILIES.values())
    assert {entry["model_type"]: entry["blocks"] for entry in entries}["gpt_oss"] == ["attention", "experts"]


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        (["run"], "there is no prompt"),
        (["run", "--prompt", "x", "--strategy", "lrv"], "unknown strategy 'lrv'.*'lru'"),
        (["run", "--prompt", "x", "--gpu-memory", "plenty"], "gpu_memory='plenty' is not a size"),
        (["run", "--prompt", "x", "--slots", "none"], "slots='none'"),
        (["run", "--prompt", "x", "--device", "gpu"], "device='gpu' is unknown"),
        (["run", "--prompt", "x", "--temperature", "-1"], "temperature=-1.0 is negative"),
        (["run", "/no/such/model", "--prompt", "x"], "is not a folder"),
        (["plan", "--gpu-memory", "1MiB"], "least that works"),
    ],
)
def test_bad_input_is_one_clear_error(arguments: list[str], match: str) -> None:
    """Every user error is of our tree and names what, value and remedy."""
    with pytest.raises(ExpertFlowError, match=match):
        invoke(*arguments)


def _command(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*COMMAND, *arguments], capture_output=True, text=True, check=False, timeout=HANGS)


def test_errors_go_to_stderr_with_exit_code_two() -> None:
    """The process ends with code 2, one line on stderr, no traceback, nothing on stdout."""
    result = _command("run", "/no/such/model", "--prompt", "x")
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.startswith("error: ")
    assert "Traceback" not in result.stderr
    misspelt = _command("run", "--prompt", "x", "--gpu-memroy", "1GiB")
    assert misspelt.returncode == 2
    assert "--gpu-memory" in misspelt.stderr


def test_help_needs_no_torch() -> None:
    """`--help` of every command, and `import expertflow`, load neither torch nor transformers."""
    probe = """
import sys, typer, expertflow
from expertflow.cli.main import app

def helps(group, words):
    yield words
    for name, command in getattr(group, "commands", {}).items():
        yield from helps(command, [*words, name])

for words in helps(typer.main.get_command(app), []):
    app([*words, "--help"], standalone_mode=False)
    assert not {"torch", "transformers", "numba"} & set(sys.modules), words
"""
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Usage:") == len(set(commands(typer.main.get_command(app)))) + 2  # the program and `trace`
    for option in ("--gpu-memory", "--strategies", "--validation", "--markdown"):
        assert option in done.stdout


def test_an_interrupt_is_not_lost() -> None:
    """One that falls into a weak reference's callback, where Python drops what is raised, ends the run at its next token."""

    class Thing: ...

    def gone(_: object) -> None:
        called.append(1)
        signal.raise_signal(signal.SIGINT)
        [0 for _ in range(1000)]  # what is raised comes up in here

    called: list[int] = []
    before = signal.getsignal(signal.SIGINT)
    with _Interrupt() as interrupt:
        interrupt.check()
        thing = Thing()
        reference = weakref.ref(thing, gone)
        del thing
        assert called
        with pytest.raises(KeyboardInterrupt):
            interrupt.check()
    assert reference() is None
    assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.parametrize("command", [["report", "result.json"], ["simulate", "a.trace", "--plot", "a.png"]])
def test_pictures_without_matplotlib_are_refused(command: list[str]) -> None:
    """It is optional: where it is missing, the error names what to install, whatever else is wrong, and shows no traceback."""
    script = f"import sys; sys.modules['matplotlib'] = None; sys.argv[1:] = {command}; from expertflow.cli.main import main; main()"
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert "need" in result.stderr
    assert "expertflow-moe[plot]" in result.stderr
    assert "Traceback" not in result.stderr


def test_ctrl_c_ends_cleanly() -> None:
    """An interrupt while generating gives the summary of what was done, exit code 130 and no traceback."""
    process = subprocess.Popen(
        [*COMMAND, "run", "--prompt", "Once", "--max-tokens", "900", "--device", "cpu"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, env={**os.environ, "PYTHONUNBUFFERED": "1"},
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stdout.read(20)  # it is generating
    time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=HANGS)
    assert process.returncode == 130
    assert b"Traceback" not in errors
    assert b"measured peak" in errors


@pytest.mark.parametrize(
    ("name", "content", "match"),
    [
        ("empty.txt", "\n  \n", "holds no prompt"),
        ("bad.jsonl", '{"prompt": "a"}\n{"text": "b"}', "line 2"),
        ("broken.jsonl", "{", "line 1"),
        ("number.jsonl", '{"prompt": 3}', "is no text"),
    ],
)
def test_bad_prompt_files_are_refused(tmp_path: Path, name: str, content: str, match: str) -> None:
    """An empty or malformed prompts file names file and line."""
    (tmp_path / name).write_text(content)
    with pytest.raises(PromptError, match=match):
        read_prompts(tmp_path / name)
    with pytest.raises(PromptError, match="cannot be read"):
        read_prompts(tmp_path / "missing.txt")


def test_the_shipped_model_writes_english_within_a_quarter_of_its_size() -> None:
    """The demo's job: sentences of ordinary words, peak within a budget well under the model's size."""
    report = json.loads(
        invoke(
            "run",
            "--prompt",
            "It was a dark night, and",
            "--gpu-memory",
            "12MiB",
            "--max-tokens",
            60,
            "--json",
            "--device",
            "cpu",
        )
    )
    size = sum(path.stat().st_size for path in shipped_model().glob("*.safetensors"))
    assert report["peak_bytes"] <= report["budget_bytes"] == 12 * 2**20 < 0.3 * size
    words = report["outputs"][0]["text"].lower().split()
    common = {"the", "and", "of", "to", "a", "in", "was", "he", "she", "it", "that", "had", "with", "his", "her", "i"}
    assert sum(word.strip(".,;!?\"'") in common for word in words) >= 0.2 * len(words)


def test_simulate_refuses_a_trace_of_another_model(make_checkpoint: MakeCheckpoint) -> None:
    """Stating the model checks the trace against it."""
    trace = EXCERPT
    with pytest.raises(TraceError, match=r"\(24, 32, 4\), not \(3, 8, 4\)"):
        invoke("simulate", trace, "--model", make_checkpoint("gpt_oss"))


def test_a_terminal_without_unicode_loses_nothing(
    make_checkpoint: MakeCheckpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where standard output takes ASCII only, JSON stays JSON with the whole prompt in it, and text comes as escapes."""
    folder = make_checkpoint("qwen3_moe")
    prompt, printed = "a\u5b57\U0001f600", []
    words = ["expertflow", "run", str(folder), "--device", "cpu", "--max-tokens", "1", "--prompt", prompt]
    monkeypatch.setenv("OMP_WAIT_POLICY", "passive")  # else the command would set it
    for more in ([], ["--json"]):
        output, errors = (TextIOWrapper(BytesIO(), encoding="ascii", write_through=True) for _ in range(2))
        with monkeypatch.context() as patched:
            patched.setattr(sys, "argv", [*words, *more])
            patched.setattr(sys, "stdout", output)
            patched.setattr(sys, "stderr", errors)
            with pytest.raises(SystemExit) as ended:
                main()
        assert ended.value.code in {None, 0}
        printed.append(output.buffer.getvalue())
    assert printed[0].startswith(b"a\\u5b57\\U0001f600")
    assert json.loads(printed[1])["outputs"][0]["prompt"] == prompt
