"""The picture of an evaluation: recall layer by layer, and precision against recall of batch unions, a line a source.

Needs matplotlib, which is optional: import this module only where a picture is drawn.
"""

from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure

from expertflow.errors import ConfigError
from expertflow.files import save_picture
from expertflow.predict.evaluation.evaluate import PRECISION, RECALL, Evaluation


def draw(evaluations: Sequence[Evaluation], path: Path, about: str = "") -> None:
    """Draw and save; the first source is the one that is compared.

    Args:
        evaluations: at least one; all with the same batch sizes.
        path: of the picture, such as `x.png`.
        about: model, machine and date, for a line below.

    Raises:
        ConfigError: if the file cannot be written, or its ending names no picture format.
    """
    sizes = [item.batch for item in evaluations[0].batches]
    figure = Figure(figsize=(3.6 * (len(sizes) + 1) + 1.6, 4.0), layout="constrained")
    panels = figure.subplots(1, len(sizes) + 1, squeeze=False)[0]
    for number, item in enumerate(evaluations):
        style = {"color": f"C{number}", "linewidth": 1.2 if number else 2.4, "zorder": 2.0 if number else 3.0}
        panels[0].plot(range(len(item.layer_recall)), item.layer_recall, label=item.name, **style)
        for panel, union in zip(panels[1:], item.batches, strict=True):
            recall, precision = union.thresholds.recall, union.thresholds.precision
            shown = [place for place, share in enumerate(recall) if share > 0]
            panel.plot([recall[place] for place in shown], [precision[place] for place in shown], **style)
    panels[0].set(title="recall at top-k guesses", xlabel="MoE layer", ylim=(0, 1))
    for panel, size in zip(panels[1:], sizes, strict=True):
        panel.axvline(RECALL, color="gray", linewidth=0.8, linestyle=":")
        panel.axhline(PRECISION, color="gray", linewidth=0.8, linestyle=":")
        panel.set(title=f"union of {size} sequence{'s' if size > 1 else ''}", xlabel="recall", xlim=(0, 1.01))
        panel.set_ylim(0, 1.01)
    if sizes:
        panels[1].set_ylabel("precision")
    for panel in panels:
        panel.grid(alpha=0.3)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right upper", fontsize="small")
    try:
        save_picture(figure, path, about, dpi=110)
    except (OSError, ValueError) as error:
        raise ConfigError(f"the picture {path} cannot be written: {error}", "Use a writable place and .png.") from error
