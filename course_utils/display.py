"""Pictures for notebooks: grids of drawings, a stepper that a class can move, a loss curve that grows."""

import io
import math
from collections.abc import Callable, Sequence

import ipywidgets as widgets
import matplotlib.pyplot as plt
import numpy as np
from IPython.display import display
from matplotlib.figure import Figure
from torch import Tensor

from course_utils.runtime import ROOT, retraining
from course_utils.training import Run


def show(
    images: Tensor, titles: Sequence[str] = (), columns: int = 10, size: float = 1.0, heading: str = "",
    rows: Sequence[str] = (),
) -> None:  # fmt: skip
    """Draw a grid of images, (N, 3, H, W) or one (3, H, W), as uint8 or as floats that are clipped to [0, 1].

    `size` is the width of one image in inches; `titles` stand above the images, `rows` on the left of
    the rows. Raises ValueError for other shapes.
    """
    if images.ndim not in (3, 4) or images.shape[-3] != 3:
        raise ValueError(f"show() takes images of shape (N, 3, H, W) or (3, H, W), not {tuple(images.shape)}.")
    images = images[None] if images.ndim == 3 else images
    images = images.float() / 255 if not images.is_floating_point() else images
    pixels = images.detach().float().clamp(0, 1).permute(0, 2, 3, 1).cpu().numpy()
    columns = min(columns, len(pixels))
    lines = math.ceil(len(pixels) / columns)
    room = 0.25 * any(titles)
    figure, axes = plt.subplots(lines, columns, figsize=(size * columns, (size + room) * lines + 0.3 * bool(heading)))
    for index, axis in enumerate(np.atleast_1d(axes).flat):
        axis.axis("off")
        if index < len(pixels):
            axis.imshow(pixels[index], interpolation="nearest" if pixels.shape[1] < 64 else "antialiased")
        if index < len(titles):
            axis.set_title(titles[index], fontsize=8)
    figure.suptitle(heading, fontsize=11)
    figure.tight_layout(pad=0.2)
    for name, axis in zip(rows, figure.axes[::columns], strict=bool(rows)):
        axis.text(-0.1, 0.5, name, transform=axis.transAxes, ha="right", va="center", fontsize=8)


def png(figure: Figure) -> bytes:
    """The figure as a PNG; the figure is closed."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", bbox_inches="tight", dpi=110)
    plt.close(figure)
    return buffer.getvalue()


def picture() -> widgets.Image:
    """An empty picture for a widget, which is shown at its own size."""
    return widgets.Image(format="png", layout=widgets.Layout(width="auto", align_self="flex-start"))


def save_picture(lesson: str) -> None:
    """Where COURSE_RETRAIN=1, keep the figure that was drawn last as `notebooks/pictures/<lesson>.png`."""
    if retraining():
        plt.gcf().savefig(ROOT / "notebooks" / "pictures" / f"{lesson}.png", bbox_inches="tight", dpi=110)


def stepper(draw: Callable[[int], Figure], last: int, label: str = "step") -> widgets.VBox:
    """A slider from 0 to `last` with a play button; `draw(step)` gives the picture below it, kept once drawn."""
    kept: dict[int, bytes] = {}
    slider = widgets.IntSlider(0, 0, last, description=label, continuous_update=False)
    play = widgets.Play(value=0, min=0, max=last, interval=700)
    shown = picture()

    def update(_: object = None) -> None:
        if slider.value not in kept:
            kept[slider.value] = png(draw(slider.value))
        shown.value = kept[slider.value]

    widgets.jslink((play, "value"), (slider, "value"))
    slider.observe(update, "value")
    update()
    return widgets.VBox([widgets.HBox([play, slider]), shown])


def explorer(draw: Callable[[list[float]], Figure], labels: Sequence[str], reach: float = 3.0) -> widgets.HBox:
    """A slider from -reach to reach for each label; `draw(values)` gives the picture beside them."""
    sliders = [
        widgets.FloatSlider(0, min=-reach, max=reach, step=0.25, description=label, continuous_update=False)
        for label in labels
    ]
    shown = picture()

    def update(_: object = None) -> None:
        shown.value = png(draw([slider.value for slider in sliders]))

    for slider in sliders:
        slider.observe(update, "value")
    update()
    return widgets.HBox([widgets.VBox(sliders), shown])


class LossCurve:
    """A callback for `train` that draws the loss as it falls, and leaves the last picture in the page."""

    def __init__(self, every: int = 50):
        self.every = every
        self.handle = display(self.draw([], "the loss will appear here"), display_id=True)

    def __call__(self, run: Run) -> None:
        if run.step % self.every == 0 or run.step == run.steps:
            losses = [row["loss"] for row in run.history]
            self.handle.update(self.draw(losses, f"step {run.step}, {run.seconds:.0f} s"))

    @staticmethod
    def draw(losses: list[float], title: str) -> Figure:
        figure, axis = plt.subplots(figsize=(5, 2.2))
        width = 20
        long = len(losses) > width
        axis.plot(losses, alpha=0.35 if long else 1, label="each step")
        if long:
            means = np.convolve(losses, np.ones(width) / width, "valid")
            axis.plot(range(width - 1, len(losses)), means, label=f"mean of {width}")
            axis.legend(frameon=False)
        axis.set(xlabel="step", ylabel="loss", title=title)
        plt.close(figure)
        return figure
