"""`expertflow strategies`: the live strategy table, a block a strategy, or as a Markdown page."""

from rich.console import Console
from rich.markup import escape

from expertflow.cache.strategy import ALL_LAYERS, DEFAULT, PREDICTED_DEFAULT, STRATEGIES, Strategy
from expertflow.cli.tables import facts_table

_INTRO = f"""# Strategies

Generated from the live table by `expertflow strategies --markdown`; a test compares. A strategy is a forecast, a
prefetch plan and an eviction policy: one entry of `src/expertflow/cache/strategy.py`. The default is `{DEFAULT}`, with
a trained predictor `{PREDICTED_DEFAULT}`. Entries that need a recording of the run itself work in `expertflow simulate`
and where a recorded future is given to the engine; elsewhere they are refused.

| name | slots | loads ahead | evicts | needs a recording | what it does |
|---|---|---|---|---|---|
"""
_HEADS = ("slots", "loads ahead", "evicts", "needs a recording")


def main(*, markdown: bool) -> None:
    """Print the table."""
    if markdown:
        print(page(), end="")  # noqa: T201 - the output
        return
    console = Console()
    for entry in STRATEGIES.values():
        name, *values, summary = _cells(entry)
        console.print(
            f"[bold]{name}[/]{' (the default)' if name == DEFAULT else ''}: {escape(summary)}", highlight=False
        )
        table = facts_table()
        for head, value in zip(_HEADS, values, strict=True):
            table.add_row(f"  {head}", escape(value))
        console.print(table)


def page() -> str:
    """Return the strategies as a Markdown page."""
    return _INTRO + "".join(f"| {' | '.join(_cells(entry))} |\n" for entry in STRATEGIES.values())


def _cells(entry: Strategy) -> tuple[str, ...]:
    slots = "an equal share a layer" if entry.partition == "layer" else "one pool"
    far = "any layer" if entry.ahead == ALL_LAYERS else f"{entry.ahead} layer{'s' if entry.ahead > 1 else ''}"
    ahead = "no" if entry.prefetch == "none" else f"planned every {entry.prefetch}, {far} ahead"
    rule = (entry.policy.__doc__ or "").splitlines()[0].rstrip(".").removeprefix("Evict ")
    evicts = rule if entry.retain else "every expert after its layer"
    return entry.name, slots, ahead, evicts, "yes" if entry.needs_future else "no", entry.summary
