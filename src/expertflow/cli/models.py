"""`expertflow models`: the family table, as it is."""

import json

from rich.console import Console
from rich.table import Table
from transformers.utils import logging

from expertflow.execution.blocks.match import family_blocks
from expertflow.models.families import FAMILIES


def main(*, as_json: bool) -> None:
    """Print the live table."""
    logging.set_verbosity_error()  # about small models of families nothing has to be said
    if as_json:
        entries = [
            {
                "model_type": one.model_type, "title": one.title, "examples": one.examples, "blocks": family_blocks(one),
            }
            for one in FAMILIES.values()
        ]  # fmt: skip
        print(json.dumps(entries))  # noqa: T201 - the output
        return
    table = Table(title="Families with exactness tests", title_justify="left")
    for head in ("model_type", "family", "checkpoints", "blocks"):
        table.add_column(head, overflow="fold", no_wrap=head in ("model_type", "family"))
    for one in FAMILIES.values():
        table.add_row(one.model_type, one.title, one.examples, ", ".join(family_blocks(one)) or "none")
    console = Console()
    console.print(table)
    console.print(
        "Any other family of transformers' experts registry runs by its own forward, one expert at a time; the rest is "
        "refused with a reason. Blocks are the parts of a decoder layer that captured steps compute with few kernels."
    )
