"""The picture of a sweep: hit ratio and bytes a token against slots, one line a strategy, one column a batch."""

from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure

from expertflow.errors import ConfigError
from expertflow.files import save_picture
from expertflow.sim.replay import Outcome

_MARKS = "osv^D<>pXh*d"


def draw(outcomes: Sequence[Outcome], path: Path, about: str = "") -> None:
    """Draw and save.

    Args:
        outcomes: at least one.
        path: of the picture, such as `x.png`.
        about: model, machine and date, for a line below.

    Raises:
        ConfigError: if the file cannot be written, or its ending names no picture format.
    """
    batches = sorted({outcome.batch for outcome in outcomes})
    names = list(dict.fromkeys(outcome.strategy for outcome in outcomes))
    figure = Figure(figsize=(4.2 * len(batches) + 1.5, 7.5), layout="constrained")
    axes = figure.subplots(2, len(batches), squeeze=False, sharex=True, sharey="row")
    for column, batch in enumerate(batches):
        for name, mark in zip(names, _MARKS * len(names), strict=False):
            cells = sorted((o for o in outcomes if (o.batch, o.strategy) == (batch, name)), key=lambda o: o.slots)
            shares = [100 * cell.share for cell in cells]
            axes[0][column].plot(shares, [cell.kept_ratio for cell in cells], marker=mark, label=name, clip_on=False)
            axes[1][column].plot(shares, [cell.bytes_per_token / 1e6 for cell in cells], marker=mark, label=name)
        axes[0][column].set_title(f"{batch} live sequences" if batch > 1 else "1 sequence")
        axes[1][column].set_xlabel("slots, % of experts")
        axes[1][column].set_yscale("log")
        axes[1][column].yaxis.set_major_formatter("{x:g}")
        axes[0][column].set_xlim(left=0)
        axes[0][column].set_ylim(bottom=0)
        for row in (0, 1):
            axes[row][column].grid(alpha=0.3)
    axes[0][0].set_ylabel("share of needs kept (no load)")
    axes[1][0].set_ylabel("MB moved a token (logarithmic)")
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside right upper")
    try:
        save_picture(figure, path, about, dpi=120)
    except (OSError, ValueError) as error:
        raise ConfigError(f"the picture {path} cannot be written: {error}", "Use a writable place and .png.") from error
