"""How every figure looks: one colour and marker per method everywhere, legible at column width, vector PDF and PNG."""

import hashlib
import json
from pathlib import Path

import matplotlib
import matplotlib.ticker

matplotlib.use("Agg")
import matplotlib.pyplot as plt

FIGURES = Path("results/figures")
COLUMN, PAGE = 3.4, 7.0
"""Widths in inches: one column and the page."""

# Okabe-Ito and Tol's muted palette: told apart with the common colour-vision deficiencies.
COLORS = {
    "fp16": "#444444", "fp8": "#888888", "int8": "#AAAAAA", "int4": "#BBBBBB", "km": "#E69F00", "gskm": "#56B4E9", "gsrq": "#0072B2",
    "tq_mse": "#CC79A7", "blockgtq": "#D55E00", "blockgtq_plus": "#8B0000", "kivi": "#009E73", "kivi_scale_only": "#44AA99", "vqllm": "#882255", "cq": "#999933", "zero": "#000000",
    "gsrq_plus": "#332288", "gsrq_fp8": "#117733", "blockgtq_tiles": "#EE8866",
}  # fmt: skip
LABELS = {
    "fp16": "fp16", "fp8": "FP8", "int8": "INT8", "int4": "INT4", "km": "KM", "gskm": "GSKM", "gsrq": "GSRQ", "tq_mse": "TQ-MSE",
    "blockgtq": "Block-GTQ", "blockgtq_plus": "Block-GTQ+ (ours)", "kivi": "KIVI (window 128)", "kivi_scale_only": "KIVI-ScaleOnly", "vqllm": "VQLLM", "cq": "CQ", "zero": "zero",
    "gsrq_plus": "GSRQ+ (ours)", "gsrq_fp8": "GSRQ, 8-bit codebooks (ours)", "blockgtq_tiles": "Block-GTQ tiles (ours)",
}  # fmt: skip
MARKERS = "osD^vP*Xph<>d"


def color(name: str) -> str:
    """The method's colour; an unknown method gets a stable one from its name."""
    if name in COLORS:
        return COLORS[name]
    spare = list(plt.get_cmap("tab20").colors)
    return matplotlib.colors.to_hex(spare[int(hashlib.sha256(name.encode()).hexdigest(), 16) % len(spare)])


def label(name: str) -> str:
    return LABELS.get(name, name)


def marker(name: str) -> str:
    known = list(COLORS)
    return MARKERS[known.index(name) % len(MARKERS)] if name in known else "o"


def bits(number: float) -> str:
    """A budget in words."""
    return f"{number:g} bit" if number == 1 else f"{number:g} bits"


def name_ends(axis, ends: list[tuple[float, str, str]], x: float = 1.02) -> None:
    """Names beside the right edge at the heights (data y, text, colour) where lines end, pushed apart so that none overlap.

    Call when the axis limits are final.
    """
    if not ends:
        return
    height = axis.get_position().height * axis.figure.get_figheight() * 72  # points, before the layout engine shrinks the axes
    gap = min(8.0 / height, 1 / max(len(ends), 1))
    to_axes = axis.transScale + axis.transLimits
    placed: list[float] = []
    for y, text, colour in sorted(ends, key=lambda e: (e[0], e[1])):
        here = float(to_axes.transform((axis.get_xlim()[0], y))[1])
        placed.append(max(here, placed[-1] + gap) if placed else here)
    excess = max(0.0, placed[-1] - 1.0)
    for (y, text, colour), here in zip(sorted(ends, key=lambda e: (e[0], e[1])), placed):
        axis.annotate(text, (x, here - excess * (here / placed[-1] if placed[-1] else 0)), xycoords="axes fraction", color=colour, fontsize=6.5, va="center", annotation_clip=False)


def points(axis, x, y, spread, name: str, *, text: str | None = None, line: str = "-", **keywords):
    """One method's points with error bars in its own colour and marker; `spread` may hold NaN."""
    bars = [0 if v != v else v for v in spread] if spread is not None else None
    return axis.errorbar(x, y, yerr=bars, color=color(name), marker=marker(name), label=text or label(name), linestyle=line, capsize=2, elinewidth=0.8, **keywords)


def plain_log(axis, which: str = "x", base: int = 2) -> None:
    """A logarithmic axis with plain numbers at its ticks: powers of two, or 1, 2 and 5 times powers of ten."""
    (axis.set_xscale if which == "x" else axis.set_yscale)("log", base=base)
    target = axis.xaxis if which == "x" else axis.yaxis
    if base == 10:
        target.set_major_locator(matplotlib.ticker.LogLocator(10, subs=(1.0, 2.0, 5.0)))
    target.set_major_formatter(lambda v, _: f"{v:g}")
    target.set_minor_locator(matplotlib.ticker.NullLocator())


def setup() -> None:
    """Matplotlib defaults of the repository."""
    plt.rcParams.update({
        "font.size": 8, "axes.titlesize": 8, "axes.labelsize": 8, "legend.fontsize": 7, "xtick.labelsize": 7, "ytick.labelsize": 7,
        "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.alpha": 0.25, "grid.linewidth": 0.5,
        "lines.linewidth": 1.2, "lines.markersize": 4, "legend.frameon": False, "figure.constrained_layout.use": True,
        "pdf.fonttype": 42, "svg.hashsalt": "kvq", "savefig.dpi": 200,
    })  # fmt: skip


def save(figure, name: str, folder: Path = FIGURES) -> list[Path]:
    """Write <name>.pdf and <name>.png, byte for byte the same for the same drawing."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{name}.pdf", folder / f"{name}.png"]
    figure.savefig(paths[0], metadata={"CreationDate": None, "ModDate": None})
    figure.savefig(paths[1], metadata={"Software": None})
    plt.close(figure)
    return paths


class Index:
    """Which inputs each figure was drawn from, so that `make figures` redraws what changed and nothing else."""

    def __init__(self, folder: Path = FIGURES):
        self.folder, self.path = folder, folder / "index.json"
        self.known = json.loads(self.path.read_text()) if self.path.is_file() else {}

    def current(self, name: str, digest: str) -> bool:
        return self.known.get(name) == digest and (self.folder / f"{name}.pdf").is_file() and (self.folder / f"{name}.png").is_file()

    def note(self, name: str, digest: str) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        self.known[name] = digest
        self.path.write_text(json.dumps(dict(sorted(self.known.items())), indent=1) + "\n")
