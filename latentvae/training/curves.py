"""The course of a run as one picture: validations, losses, discriminator, gradients and learning rate over images."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from latentvae.images import PixelFormat, save_image
from latentvae.training.run_dir import RunDirectory
from latentvae.training.wording import Change, changes_planned, progress_line, short_images

if TYPE_CHECKING:  # half a second that only a picture is worth
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLUMNS = 3
PLOT = (3.6, 1.75)  # inches, of each plot; fixed margins, since automatic layouts take longer than the drawing
LEFT, ABOVE, BELOW, EDGE = 0.66, 0.36, 0.44, 0.14  # inches around each: values, title, images; and at the right edge
DPI = 120
HEADER = 0.42  # inches above the panels
LEGEND = 0.3  # inches more where a legend stands there
SMOOTHING = 0.06  # of the rows are in the window of the smoothed line
FEW = 12  # rows up to which every one is a dot, and nothing is smoothed
MANY = 60  # rows above which dots would run into each other
EXACT = ("validation", "learning_rate")  # free of noise: not smoothed
LOG_RANGE = 30.0  # from the smallest to the largest value: above it, the axis is logarithmic
# Okabe and Ito's colours, which the colour-blind tell apart.
BLUE, ORANGE, GREEN, RED, PURPLE, SKY = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9"
GRAY, DARK = "#8a8a8a", "#303030"


@dataclass(frozen=True)
class Panel:
    """One small plot.

    Attributes:
        series: label => name of the figure in metrics.jsonl; a lone series has no label.
        bounds: of the y axis; None follows the values.
        is_log: None decides by the range of the values.
    """

    title: str
    series: Mapping[str, str]
    color: str
    bounds: tuple[float, float] | None = None
    is_log: bool | None = None


PANELS = (
    Panel("Validation PSNR (dB)", {"": "validation_psnr"}, GREEN, is_log=False),
    Panel("Validation LPIPS", {"": "validation_lpips"}, GREEN, is_log=False),
    Panel("Validation equivariance error", {"": "validation_equivariance_error"}, GREEN),
    Panel("Reconstruction loss", {"": "reconstruction"}, BLUE),
    Panel("Perceptual loss (LPIPS)", {"": "perceptual"}, BLUE),
    Panel("SSIM loss", {"": "ssim"}, BLUE),
    Panel("KL (nats per latent element)", {"": "kl"}, BLUE),
    Panel("Distance from the starting latents", {"": "anchor"}, BLUE),
    Panel("Adversarial loss (generator)", {"": "adversarial"}, ORANGE, is_log=False),
    Panel("Discriminator loss", {"": "discriminator"}, ORANGE, is_log=False),
    Panel("Discriminator accuracy", {"": "discriminator_accuracy"}, ORANGE, bounds=(0.0, 1.0), is_log=False),
    Panel(
        "Discriminator logits",
        {"real": "discriminator_real_logits", "fake": "discriminator_fake_logits"},
        ORANGE,
        is_log=False,
    ),
    Panel("Adaptive weight", {"": "adaptive_weight"}, ORANGE),
    Panel("Gradient norm", {"model": "autoencoder_grad_norm", "discriminator": "discriminator_grad_norm"}, PURPLE),
    Panel("Learning rate", {"": "learning_rate"}, GRAY, is_log=False),
    Panel("Images per second", {"": "images_per_second"}, GRAY, is_log=False),
)


def plot_run(run: RunDirectory) -> Path:
    """Draw RUN/metrics.jsonl into RUN/curves.png; a run without rows yet gives a picture that says so."""
    return save_image(pixels_of(draw_run(run)), run.curves, PixelFormat())


def pixels_of(figure: "Figure") -> np.ndarray:
    """HWC uint8, RGB."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def draw_run(run: RunDirectory) -> "Figure":
    """All panels for which the run has figures, with marks where its recipe changes something and where it resumed."""
    from matplotlib.figure import Figure

    rows, settings = run.read_metrics(), run.settings()
    known = {name for row in rows for name in row}
    panels = [panel for panel in PANELS if known & set(panel.series.values())]
    images = [row["images_seen"] for row in rows] or [0]
    first, last = min(images), max(images)
    begin = first if last / 2 < first < last else 0  # of a run that went on from another one
    changes = [change for change in changes_planned(settings) if begin <= change.images <= last]
    resumes = sorted({row["images_seen"] for row in rows if row.get("event") == "resumed"})
    columns = min(COLUMNS, max(len(panels), 2))
    lines = max(-(-len(panels) // columns), 1)
    header = HEADER + (LEGEND if changes or resumes else 0)
    width, height = (LEFT + PLOT[0]) * columns + EDGE, (ABOVE + PLOT[1] + BELOW) * lines + header
    figure = Figure(figsize=(width, height), dpi=DPI, facecolor="white")
    figure.subplots_adjust(
        left=LEFT / width,
        right=1 - EDGE / width,
        bottom=BELOW / height,
        top=1 - (header + ABOVE) / height,
        wspace=LEFT / PLOT[0],
        hspace=(ABOVE + BELOW) / PLOT[1],
    )
    title = _heading(run, rows, settings)  # a path in it may have dollar signs
    figure.text(0.012, 1 - 0.24 / height, title, va="center", fontsize=11, color=DARK, parse_math=False)
    figure.text(0.012, 1 - 0.52 / height, _legend(changes, resumes), va="center", fontsize=8.5, color="#666666")
    if not panels:
        figure.text(0.5, 0.45, "nothing is logged yet", ha="center", fontsize=12, color=GRAY)
        return figure
    axes = figure.subplots(lines, columns, squeeze=False, sharex=True).flatten()
    for index, (ax, panel) in enumerate(zip(axes, panels, strict=False)):
        _style(ax, panel.title, is_lowest=index + columns >= len(panels))
        _marks(ax, changes, resumes)
        _curves(ax, panel, rows)
    for ax in axes[len(panels) :]:
        ax.set_visible(False)
    axes[0].set_xlim(begin - 0.005 * (last - begin), last + 0.015 * (last - begin) + 1e-3)
    return figure


def _heading(run: RunDirectory, rows: Sequence[Mapping[str, Any]], settings: Mapping[str, Any]) -> str:
    model, training = settings.get("model") or {}, settings.get("training") or {}
    total = None if training.get("max_minutes") else training.get("total_images")  # a bound that time seldom allows
    name = f"{run.path.resolve().name}   \N{MIDDLE DOT}   {model.get('start_from') or model.get('preset') or 'model'}"
    seen = max((row["images_seen"] for row in rows), default=0)
    return f"{name}   \N{MIDDLE DOT}   " + (progress_line(seen, total, 0.0) if total else f"{seen:,} images")


def _legend(changes: Sequence[Change], resumes: Sequence[int]) -> str:
    named = [f"{number}  {c.what} from {short_images(c.images)}" for number, c in enumerate(changes, start=1)]
    if resumes:
        named.append("\N{BLACK UP-POINTING TRIANGLE}  resumed" + (f" {len(resumes)} times" if resumes[1:] else ""))
    return "      ".join(named)


def _style(ax: "Axes", title: str, *, is_lowest: bool) -> None:
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    ax.set_title(title, loc="left", fontsize=9.5, fontweight="bold", color=DARK, pad=6)
    ax.spines[["top", "right"]].set_visible(False)
    ax.spines[["left", "bottom"]].set_color("#c8c8c8")
    ax.grid(axis="y", color="#ececec", linewidth=0.8)
    ax.set_axisbelow(True)
    ax.tick_params(which="both", labelsize=8, colors="#555555", length=0, labelbottom=True)
    ax.xaxis.set_major_locator(MaxNLocator(5))
    ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: short_images(value)))
    if is_lowest:
        ax.set_xlabel("images", fontsize=8, color="#555555")


def _marks(ax: "Axes", changes: Sequence[Change], resumes: Sequence[int]) -> None:
    """Numbered dashed lines where the recipe changes something, triangles where the run was resumed."""
    top = ax.get_xaxis_transform()  # images across, the height of the panel up
    numbers: dict[int, list[str]] = {}  # of one mark: several things may change at once
    for number, change in enumerate(changes, start=1):
        numbers.setdefault(change.images, []).append(str(number))
    for images, own in numbers.items():
        ax.axvline(images, color="#b0b0b0", linewidth=0.9, linestyle=(0, (4, 3)), zorder=1)
        shape = "circle,pad=0.22" if len(own) == 1 else "round,pad=0.3"
        bubble = {"boxstyle": shape, "facecolor": "white", "edgecolor": "#b0b0b0", "linewidth": 0.7}
        ax.text(
            images,
            0.985,
            " ".join(own),
            transform=top,
            fontsize=6,
            color="#666666",
            ha="center",
            va="center",
            bbox=bubble,
            zorder=6,
        )
    if resumes:
        height = np.zeros(len(resumes))
        ax.plot(resumes, height, "^", color=RED, markersize=4, transform=top, clip_on=False, zorder=6)


def _curves(ax: "Axes", panel: Panel, rows: Sequence[Mapping[str, Any]]) -> None:
    """The series of one panel; their last values stand at the right of its title."""
    drawn: list[np.ndarray] = []
    latest: list[tuple[str, str]] = []  # text, colour
    for (label, name), color in zip(panel.series.items(), (panel.color, SKY), strict=False):
        x, y = _series(rows, name)
        if not len(x):
            continue
        smooth = _smoothed(y)
        if len(x) <= FEW or name.startswith(EXACT):
            dots = "o" if len(x) <= MANY else ""
            ax.plot(x, y, color=color, linewidth=1.5, marker=dots, markersize=3.2, zorder=3)
            smooth = y
        else:
            ax.plot(x, y, color=color, linewidth=0.6, alpha=0.3, zorder=2)
            ax.plot(x, smooth, color=color, linewidth=1.6, zorder=3)
        latest.append((f"{label} {smooth[-1]:.3g}".strip(), color))
        drawn += [smooth, np.quantile(y, (0.01, 0.99))]
    if drawn:
        _limits(ax, panel, np.concatenate(drawn))
        _latest(ax, latest)


def _latest(ax: "Axes", texts: Sequence[tuple[str, str]]) -> None:
    from matplotlib.artist import Artist
    from matplotlib.offsetbox import AnchoredOffsetbox, HPacker, TextArea

    written: list[Artist] = [
        TextArea(text, textprops={"color": c, "fontsize": 9, "fontweight": "bold"}) for text, c in texts
    ]
    row = HPacker(children=written, pad=0, sep=10)
    box = AnchoredOffsetbox(
        "lower right",
        pad=0,
        borderpad=0,
        child=row,
        frameon=False,
        bbox_to_anchor=(1, 1.035),
        bbox_transform=ax.transAxes,
    )
    box.set_in_layout(False)
    ax.add_artist(box)


def _limits(ax: "Axes", panel: Panel, values: np.ndarray) -> None:
    """Room for the smoothed line and for 98 percent of the raw values: a spike is cut rather than flattening all."""
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

    low, high = float(values.min()), float(values.max())
    if panel.bounds is not None:
        ax.set_ylim(*panel.bounds)
    elif panel.is_log is not False and low > 0 and high / low > LOG_RANGE:
        ax.set_yscale("log")
        ax.set_ylim(low / 1.25, high * 1.25)
        ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high / low < 200 else (1,)))
        ax.yaxis.set_minor_formatter(NullFormatter())
    else:
        room = max(high - low, 0.2 * abs(high)) or 1.0  # a level line stays level
        ax.set_ylim(low - 0.08 * room, high + 0.12 * room)
        ax.yaxis.set_major_locator(MaxNLocator(5))
    ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.4g}"))


def _series(rows: Sequence[Mapping[str, Any]], name: str) -> tuple[np.ndarray, np.ndarray]:
    """Images and finite values of one figure, by images."""
    points = {row["images_seen"]: row[name] for row in rows if isinstance(row.get(name), int | float)}
    finite = sorted((images, value) for images, value in points.items() if np.isfinite(value))
    x, y = np.array(finite, dtype=np.float64).reshape(-1, 2).T
    return x, y


def _smoothed(values: np.ndarray) -> np.ndarray:
    """The mean over a centred window, cut at the end of the run; it grows from the start, where losses fall steeply."""
    half = max(int(len(values) * SMOOTHING / 2), 1)
    sums = np.concatenate([[0.0], np.cumsum(values)])
    index = np.arange(len(values))
    first = index - np.minimum(index, half)
    last = np.minimum(index + np.minimum(index, half), len(values) - 1)
    return np.asarray((sums[last + 1] - sums[first]) / (last + 1 - first))
