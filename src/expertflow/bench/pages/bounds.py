"""Why a measured speed can stand above its bound: the bound is made of measurements too, and each has a spread.

Turns rows of a result into sentences. Must not know how anything was measured or is shown.
"""

from expertflow.bench.result import DECODE, MOVED, RESIDENT, Figure, Result, Row


def over_bounds(result: Result) -> list[str]:
    """A sentence for every row whose median decoding speed is above its bound, in the order of the rows.

    Args:
        result: a measurement; speeds are tokens a second.
    """
    resident = {(row.execution, row.batch): row.figures[DECODE] for row in result.rows if row.strategy == RESIDENT}
    lines = []
    for row in result.rows:
        speed = row.figures.get(DECODE)
        if speed is None or speed.bound is None or speed.median <= speed.bound:
            continue
        where = f"{row.strategy} ({row.execution}), {row.slots} slots, batch {row.batch}"
        why = _why(row, speed, resident.get((row.execution, row.batch)), result.link_gbps)
        lines.append(f"{where}: {speed.median / speed.bound:.1%} of its bound, because {why}")
    return lines


def _why(row: Row, speed: Figure, whole: Figure | None, link_gbps: float) -> str:
    """The measurement behind the bound that this row's runs exceed."""
    if whole is not None and speed.bound_is == "all experts resident":
        spread = (
            f"the bound is measured too: the all-resident model ran at {whole.low:.1f} to {whole.high:.1f} tokens/s"
        )
        mine = f"{speed.low:.1f} to {speed.high:.1f}"
        if speed.low <= whole.high:
            return f"{spread}, and these runs, {mine}, overlap with that"
        return f"{spread}, and every run here was faster, {mine}: that model is no limit of the machine"
    moved = row.figures.get(MOVED)
    if moved is not None and moved.bound is not None:
        if moved.median < moved.bound:
            return (
                f"the bound is Belady's mean over the recorded runs, {moved.bound:.2f} MB/token, and the median of these "
                f"runs is {moved.median:.2f}"
            )
        reached = moved.median * speed.median / 1e3
        if reached > link_gbps:
            return f"the bound takes the link's measured {link_gbps:.1f} GB/s, and these runs moved {reached:.1f} GB/s"
    return f"the runs differ by more: {speed.low:.1f} to {speed.high:.1f} tokens/s"
