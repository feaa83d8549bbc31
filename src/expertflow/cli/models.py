"""`expertflow models`: the family table, as it is."""

import json

from rich.console import Console
from rich.table import Table

from expertflow.models.families import FAMILIES


def main(*, as_json: bool) -> None:
    """Print the live table."""
    if as_json:
        entries = [
            {"model_type": one.model_type, "title": one.title, "examples": one.examples} for one in FAMILIES.values()
        ]
        print(json.dumps(entries))  # noqa: T201 - the output
        return
    table = Table(title="Families with exactness tests", title_justify="left")
    for head in ("model_type", "family", "checkpoints"):
        table.add_column(head, overflow="fold")
    for one in FAMILIES.values():
        table.add_row(one.model_type, one.title, one.examples)
    console = Console()
    console.print(table)
    console.print(
        "Any other family of transformers' experts registry runs by its own forward, one expert at a time; the rest is "
        "refused with a reason."
    )
