"""`expertflow models`: the family table, as it is."""

import json

from rich.console import Console
from rich.table import Table

from expertflow.models.families import FAMILIES


def main(*, as_json: bool) -> None:
    """Print the live table."""
    if as_json:
        rows = [
            {"model_type": row.model_type, "title": row.title, "examples": row.examples} for row in FAMILIES.values()
        ]
        print(json.dumps(rows))  # noqa: T201 - the output
        return
    table = Table(title="Families with exactness tests", title_justify="left")
    for head in ("model_type", "family", "checkpoints"):
        table.add_column(head, overflow="fold")
    for row in FAMILIES.values():
        table.add_row(row.model_type, row.title, row.examples)
    console = Console()
    console.print(table)
    console.print(
        "Any other family of transformers' experts registry runs by its own forward, one expert at a time; the rest is "
        "refused with a reason."
    )
