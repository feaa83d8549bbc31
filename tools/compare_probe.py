"""Run one tree's engine over a list of cases and write down all that it answers and does. Started by `compare_trees.py`.

PYTHONPATH chooses the tree. The probe uses the public API and two names inside it: the event stream, and the functions
that choose kernels for a device. It must not compare anything, because it sees one tree only.
"""

import hashlib
import io
import itertools
import json
import os
import runpy
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import asdict
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock
from zipfile import ZipFile

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["OMP_NUM_THREADS"] = "1"  # two trees run beside each other
os.environ["TRITON_INTERPRET"] = "1"  # read when kernels are imported
os.environ["EXPERTFLOW_CHECK_SHAPES"] = "0"  # no checks in code of the tests

import torch
from torch import nn
from triton.runtime import interpreter

import expertflow
from expertflow import LLM, ExpertFlowError, SamplingParams
from expertflow.models.families import FAMILIES

DTYPES = ("float32", "bfloat16")
STRATEGIES = ("lru-global", "next-use", "plec")
SLOTS = ("few", "half", "all")
SHIPPED = (("plec", "few"), ("plec", "half"), ("plec", "all"), ("next-use", "few"), ("lru-global", "half"))
"""Strategies and slots of the shipped model, which has a predictor."""
SHARES = {"half": "50%", "all": "100%"}
CHOOSERS = ("backend", "step_kernels")
"""Functions of a device that return its kernels: the engine's, and the predictor's where it has its own."""
PROMPTS = (
    [5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19],
    [10, 11],
    [12, 13, 14],
    [40, 41, 42, 43, 44, 45, 46],
)
TEXTS = (
    "Once upon a time there was a little girl who lived in a house beside the sea, and every morning she went out to look",
    "The old man",
    "She opened the door and",
)
SIZES = {"device": "cpu", "max_length": 48, "max_batch": 2, "max_live": 3, "prefill_chunk": 12}
"""Prompts are read in several chunks, and more sequences are live than one step computes."""


class Case(NamedTuple):
    """One model with one set of options.

    Attributes:
        model: checkpoint folder; None: the shipped model.
        execution: `host`; `graph`; or `kernels`, graph execution with the Triton kernels, which their interpreter runs on CPU
            tensors.
        strategy: as the option.
        slots: `few`, `half` or `all`.
        predictor: as the option.
    """

    model: Path | None
    execution: str
    strategy: str
    slots: str
    predictor: str

    @property
    def name(self) -> str:
        """For people, and to pick cases by."""
        model = "shipped" if self.model is None else self.model.name
        words = (model, self.execution, self.strategy, self.slots, *(["predictor"] if self.predictor != "auto" else []))
        return " ".join(words)

    @property
    def options(self) -> dict[str, Any]:
        """Fields of `EngineConfig`."""
        slots = SHARES.get(self.slots, 12 if self.model is None else 3)
        execution = "host" if self.execution == "host" else "graph"
        return {
            **SIZES, "slots": slots, "strategy": self.strategy, "execution": execution, "predictor": self.predictor,
        }  # fmt: skip


def save_checkpoints(tests: Path, folder: Path) -> None:
    """Save a small random model of every family, in float32 and bfloat16, and a random predictor for each.

    Args:
        tests: the tests of a tree, whose fixtures make both.
        folder: where to; a model's folder is `TYPE-DTYPE`, its predictor's `TYPE-DTYPE-predictor`.
    """
    sys.path.insert(0, str(tests))
    of_models = import_module("conftest")
    of_predictors = next(path.stem for path in sorted(tests.glob("*.py")) if "def make_predictor(" in path.read_text())
    folders = Folders(folder)
    make_model = of_models.make_checkpoint.__wrapped__(folders)
    make_predictor = import_module(of_predictors).make_predictor.__wrapped__(folders)
    for model_type, dtype in itertools.product(of_models.FAMILIES, DTYPES):
        folders.name = f"{model_type}-{dtype}"
        model = make_model(model_type, dtype, spread=0.3)
        folders.name += "-predictor"
        make_predictor(model)


class Folders:
    """In place of pytest's factory of temporary folders: the next folder's name is stated before it is made."""

    def __init__(self, root: Path) -> None:
        """Make them below `root`."""
        self.root, self.name = root, ""

    def mktemp(self, _: str) -> Path:
        """A new folder of that name."""
        made = self.root / self.name
        made.mkdir(parents=True)
        return made


def all_cases(models: Path) -> Iterator[Case]:
    """What is run: the shipped model and every family, by execution, strategy and number of slots.

    A family takes each strategy with another number of slots, and other pairs of them than its neighbours. The interpreter is
    slow: with Triton's kernels a family takes one pair, and only one family and the shipped model have a predictor then.
    """
    for execution, (strategy, slots) in itertools.product(("host", "graph"), SHIPPED):
        yield Case(None, execution, strategy, slots, "auto")
    for place, (model_type, family) in enumerate(FAMILIES.items()):
        captured = ("graph", "kernels") if not family.no_graph else ()
        for execution, number in itertools.product(("host", *captured), range(3)):
            strategy, dtype = STRATEGIES[number], DTYPES[(number + place // 3) % 2]
            if execution == "kernels" and number != (2 if model_type == "qwen3_moe" else place % 2):
                continue
            slots = SLOTS[(number + place) % 3]
            model = models / f"{model_type}-{dtype}"
            with_predictor = strategy == "plec" and (execution != "host" or place % 2 == 0)
            yield Case(model, execution, strategy, slots, f"{model}-predictor" if with_predictor else "auto")
    yield Case(None, "kernels", "plec", "half", "auto")


class Logits:
    """Hashes what every layer of the vocabulary's width puts out, in the order of the calls."""

    def __init__(self) -> None:
        """Begin with no vocabulary: nothing is hashed."""
        self.vocabulary = 0
        self.hashes: list[str] = []

    def __call__(self, module: nn.Module, _: object, output: object) -> None:
        """A module's forward has run."""
        if isinstance(module, nn.Linear) and module.out_features == self.vocabulary:
            number = output.detach().contiguous().view(torch.uint8).numpy()  # type: ignore[attr-defined]
            self.hashes.append(hashlib.sha256(number.tobytes()).hexdigest()[:12])


@contextmanager
def triton_kernels() -> Iterator[Counter[str]]:
    """Give CPU tensors the kernels of CUDA, and count the kernels that run, by name.

    Raises:
        RuntimeError: if nothing was found that chooses kernels, or no kernel ran.
    """
    modules = [module for name, module in list(sys.modules.items()) if name.startswith("expertflow.")]
    ran: Counter[str] = Counter()
    patches = []
    for name in CHOOSERS:
        for module in modules:
            choose = vars(module).get(name)
            if callable(choose) and getattr(choose, "__module__", "").startswith("expertflow."):
                on_cuda = partial(_call_with, choose, torch.device("cuda"))
                patches.append(mock.patch.object(module, name, on_cuda))
    launch = interpreter.GridExecutor.__call__

    def count(executor: Any, *args: Any, **options: Any) -> Any:
        ran[executor.fn.__name__] += 1
        return launch(executor, *args, **options)

    patches.append(mock.patch.object(interpreter.GridExecutor, "__call__", count))
    if len(patches) == 1:
        raise RuntimeError(f"no function named {' or '.join(CHOOSERS)} chooses kernels: name it in CHOOSERS")
    for each in patches:
        each.start()
    try:
        yield ran
    finally:
        for each in patches:
            each.stop()
    if not ran:
        raise RuntimeError("no Triton kernel ran")


def _call_with(choose: Any, device: torch.device, _: torch.device) -> Any:
    return choose(device)


def run_case(case: Case, logits: Logits) -> dict[str, Any]:
    """Run one case.

    Returns:
        What happened, as JSON can hold it; of a case that was refused the error.
    """
    try:
        if case.execution == "kernels":
            with triton_kernels() as ran:
                found = run_model(case, logits)
            return {**found, "ran": dict(ran)}
        return {**run_model(case, logits), "plan": plan_of(case)}
    except ExpertFlowError as error:
        return {"error": type(error).__name__, "message": str(error)}


def run_model(case: Case, logits: Logits) -> dict[str, Any]:
    """Load a model, generate greedily and with seeds, and in host execution once more while routing is recorded."""
    prompts: list[Any] = list(TEXTS if case.model is None else PROMPTS)
    seeded, length = prompts, 8
    if case.execution == "kernels":  # few steps: the interpreter is slow
        prompts, seeded, length = (prompts[1:], [], 3) if case.model is None else (prompts[:3], prompts[:1], 3)
    common = {"max_tokens": length, "ignore_eos": True}
    greedy = SamplingParams(**common)
    sampled = [SamplingParams(**common, temperature=0.9, top_k=40, top_p=0.95, seed=7 + n) for n in range(len(seeded))]
    happened: list[Any] = []
    answers: list[Any] = []
    trace: list[list[Any]] = []
    with LLM(case.model, **case.options) as llm:
        stream = getattr(llm, "events", None) or getattr(llm, "_offloaded", llm).events
        stream.subscribe(happened.append)
        logits.vocabulary, logits.hashes = llm.plan.shape.vocabulary, []
        answers += llm.generate(prompts, greedy)
        if seeded:
            answers += llm.generate(seeded, sampled)
        if case.execution == "host":
            with tempfile.TemporaryDirectory() as folder:
                path = Path(folder) / "routing.trace"
                with llm.record(path):
                    answers += llm.generate(prompts, greedy)
                trace = members_of(path)
        stats = llm.stats
        return {
            "tokens": [list(answer.token_ids) for answer in answers],
            "texts": [[answer.text, answer.finish_reason, answer.seed] for answer in answers],
            "logits": logits.hashes,
            "events": [[e.kind.value, e.step, e.layer, e.expert, e.slot, e.value] for e in happened],
            "counters": asdict(stats.cache),
            "totals": [stats.tokens, stats.prompt_tokens, stats.finished, llm.plan.slots],
            "identity": [llm.fingerprint, llm.identity, llm.predictor_failure],
            "trace": trace,
        }


def members_of(path: Path) -> list[list[Any]]:
    """A trace file without its times: name, compression, compressed size and bytes of every member, in their order."""
    with ZipFile(path) as archive:
        return [
            [member.filename, member.compress_type, member.compress_size, archive.read(member).hex()]
            for member in archive.infolist()
        ]


def plan_of(case: Case) -> dict[str, Any]:
    """The numbers that `expertflow plan --json` prints for a case."""
    words = [word for name, value in case.options.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    printed = io.StringIO()
    argv = ["expertflow", "plan", *([] if case.model is None else [str(case.model)]), *words, "--json"]
    with redirect_stdout(printed), mock.patch.object(sys, "argv", argv):
        try:
            runpy.run_module("expertflow", run_name="__main__")
        except SystemExit as end:
            if end.code:
                raise
    plan: dict[str, Any] = json.loads(printed.getvalue())
    return plan


def main(models: Path, out: Path, words: list[str]) -> None:
    """Run every case whose name has one of the words, and write a line of JSON for each, behind one that names the tree."""
    warnings.simplefilter("ignore")  # NumPy's, in the interpreter
    logits = Logits()
    nn.modules.module.register_module_forward_hook(logits)
    with out.open("w") as lines:
        lines.write(json.dumps({"package": expertflow.__file__}) + "\n")
        for case in all_cases(models):
            if words and not any(word in case.name for word in words):
                continue
            began = time.process_time()
            found = run_case(case, logits)
            lines.write(json.dumps({"case": case.name, "seconds": time.process_time() - began, **found}) + "\n")
            lines.flush()


if __name__ == "__main__":
    if sys.argv[1] == "save":
        save_checkpoints(Path(sys.argv[2]), Path(sys.argv[3]))
    else:
        main(Path(sys.argv[2]), Path(sys.argv[3]), sys.argv[4:])
