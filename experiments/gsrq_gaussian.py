"""White Gaussian vectors, the setting of GSRQ's Figure 4 (arXiv 2607.01065): five clusterings, in-sample and held-out, against the bound.

`python -m experiments.gsrq_gaussian` computes the rows (about ten minutes on two cores); `python -m experiments gsrq_gaussian` draws them.
The paper scores the training vectors with fewer than five vectors per entry at K=2048; the same codebooks on new vectors, and codebooks
with 200 vectors per entry, tell how much of that is memory. No code of b bits per element has an expected error below 2^(-2b).
"""

import time
from pathlib import Path

import pandas as pd

from experiments import style
from experiments.tables import Table, spread

NAME = "gsrq_gaussian.parquet"

# arm: (k-means or GSKM, options, colour of the Okabe-Ito set, marker, label)
ARMS = {
    "km_random": ("kmeans", {"start": "random"}, "#E69F00", "s", "k-means, random start"),
    "km_plusplus": ("kmeans", {"start": "kmeans++"}, "#D55E00", "^", "k-means++"),
    "km_spherical": ("kmeans", {"start": "spherical", "warmup": 3}, "#56B4E9", "D", "k-means, spherical start"),
    "gskm_literal": ("gskm", {"start": "spherical", "warmup": 0}, "#009E73", "v", "GSKM as printed"),
    "gskm": ("gskm", {"start": "spherical", "warmup": 3}, "#0072B2", "o", "GSKM, spherical start"),
}
PAPER = {"paper KM": ("+", "k-means, paper"), "paper GSKM": ("x", "GSKM, paper")}
ROUNDS, TOLERANCE, HELD_OUT, SEEDS = 20, 1e-4, 10_000, (0, 1, 2)
LIMITED, PER_ENTRY = 10_000, 200
DIMENSIONS, ENTRIES = (4, 8, 16, 32, 64, 128, 256, 512), (64, 128, 256, 512, 1024, 2048, 4096)

# experiment: [(D, K, N)]
EXPERIMENTS = {
    "D sweep, N=10k": [(d, 2048, LIMITED) for d in DIMENSIONS],
    "K sweep, N=10k": [(256, k, LIMITED) for k in ENTRIES],
    "D sweep, N=200K": [(d, 256, 256 * PER_ENTRY) for d in DIMENSIONS[1:]],
    "K sweep, N=200K": [(256, k, k * PER_ENTRY) for k in ENTRIES[:4]],
}


def compute(experiments: dict = EXPERIMENTS, arms: tuple = tuple(ARMS), seeds: tuple = SEEDS, workers: int = 2) -> pd.DataFrame:
    """Tidy rows: experiment, arm, D, K, N, split (train, held-out), metric (mse, gain_error, cosine, entropy), value, seed, seconds.

    mse is per element, gain_error is mean | ||x|| - ||x^|| |, entropy is the occupancy in bits, seconds is the CPU time of the clustering.
    A case that two experiments share is computed once.
    """
    from concurrent.futures import ProcessPoolExecutor
    from multiprocessing import get_context

    cases = {case for listed in experiments.values() for case in listed}
    jobs = [(arm, *case, seed) for case in sorted(cases, key=lambda c: -c[0] * c[1] * c[2]) for arm in arms for seed in seeds]
    if workers == 1:
        frame = pd.DataFrame([row for job in jobs for row in one(job)])
    else:
        with ProcessPoolExecutor(workers, get_context("spawn")) as pool:
            frame = pd.DataFrame([row for rows in pool.map(one, jobs) for row in rows])
    place = pd.DataFrame([(name, *case) for name, listed in experiments.items() for case in listed], columns=["experiment", "D", "K", "N"])
    return place.merge(frame, on=["D", "K", "N"])


def one(job: tuple) -> list[dict]:
    """Rows of one clustering; job = (arm, D, K, N, seed)."""
    import torch

    from gsrq.gskm import gskm
    from kernels.kmeans import kmeans, nearest

    torch.set_num_threads(1)  # one process per core: threads of small products would wait for each other
    arm, width, entries, n, seed = job
    method, options = ARMS[arm][:2]
    draw = torch.Generator().manual_seed(seed)
    train, fresh = torch.randn(1, n, width, generator=draw), torch.randn(1, HELD_OUT, width, generator=draw)
    begin = time.process_time()
    found = {"kmeans": kmeans, "gskm": gskm}[method](train, entries, rounds=ROUNDS, tolerance=TOLERANCE, generator=draw, **options)
    seconds = time.process_time() - begin
    rows = []
    for split, x in (("train", train), ("held-out", fresh)):
        labels, _ = nearest(x, found.entries)
        x, own = x[0], found.entries[0][labels[0]]
        share = torch.bincount(labels[0], minlength=entries).double() / len(x)
        measured = {
            "mse": (x - own).square().mean(),
            "gain_error": (x.norm(dim=-1) - own.norm(dim=-1)).abs().mean(),
            "cosine": torch.nn.functional.cosine_similarity(x, own, dim=-1).mean(),
            "entropy": -(share * share.clamp_min(1e-300).log2()).sum(),
        }
        for metric, value in measured.items():
            rows.append({"arm": arm, "D": width, "K": entries, "N": n, "split": split, "metric": metric, "value": float(value), "seed": seed, "seconds": seconds})
    return rows


def rows(results: Path = Path("results"), model: str = "standin") -> pd.DataFrame:
    """Our rows, and the paper's Figure 4 (read off its plots; in-sample, one seed) as the arms `paper KM` and `paper GSKM`."""
    if not (results / NAME).is_file() or model != "standin":
        return pd.DataFrame()
    table = pd.read_csv(results / "reported" / "gsrq.csv")
    table = table[table["table"].str.fullmatch("Fig4[a-f]") & table["value"].notna()]
    place = table["subset"].str.extract(r"D=(?P<D>\d+);K=(?P<K>\d+)").astype(int)
    paper = place.assign(
        experiment=table["table"].map(lambda name: f"{'D' if name in ('Fig4a', 'Fig4b', 'Fig4c') else 'K'} sweep, N=10k"),
        arm="paper " + table["method"],
        N=LIMITED,
        split="train",
        metric=table["metric"].replace("mse_per_element", "mse"),
        value=table["value"].astype(float),
        seed=42,
    )
    return pd.concat([pd.read_parquet(results / NAME), paper], ignore_index=True)


def draw(rows: pd.DataFrame):
    """Figure: mean squared error minus the bound, mean and range over seeds. Columns: in-sample, held out, held out with enough data."""
    import matplotlib.pyplot as plt

    columns = (
        ("N=10k", "train", "In-sample, N = 10 000\n(the paper's protocol)"),
        ("N=10k", "held-out", "The same codebooks,\n10 000 new vectors"),
        ("N=200K", "held-out", "200 training vectors per entry,\n10 000 new vectors"),
    )
    rows = rows[rows["metric"] == "mse"]
    rows = rows.assign(excess=rows["value"] - bound(rows["D"], rows["K"]))
    figure, axes = plt.subplots(2, 3, figsize=(style.PAGE, 4.6))
    for sweep, line in zip("DK", axes, strict=True):
        for (size, split, title), axis in zip(columns, line, strict=True):
            here = rows[(rows["experiment"] == f"{sweep} sweep, {size}") & (rows["split"] == split)]
            _panel(axis, here, sweep)
            axis.set_title(title if sweep == "D" else "")
            fixed = here["K" if sweep == "D" else "D"].iloc[0]
            axis.set_xlabel(f"dimension $D$ ($K$ = {fixed})" if sweep == "D" else f"entries $K$ ($D$ = {fixed})")
        line[0].set_ylabel("MSE $-$ rate-distortion bound")
        seen = rows[(rows["experiment"] == f"{sweep} sweep, N=10k") & rows["arm"].isin(list(ARMS))]["excess"]
        for axis in line[:2]:
            axis.set_ylim(seen.min() - 0.03, seen.max() + 0.03)
        line[2].set_ylim(-0.002, 1.08 * rows[rows["experiment"] == f"{sweep} sweep, N=200K"].query("split == 'held-out'")["excess"].max())
    for axis in axes[:, 1]:
        axis.set_yticklabels([])
    _illusion(axes[0], rows)
    named = {name: handle for axis in axes[0] for handle, name in zip(*axis.get_legend_handles_labels(), strict=True)}
    figure.legend(named.values(), named.keys(), loc="outside lower center", ncols=4)
    return figure


def bound(D, K):
    """Least expected squared error per element of white Gaussian vectors at log2(K) / D bits: 2^(-2 log2(K) / D) = K^(-2 / D)."""
    return K ** (-2.0 / D)


def _panel(axis, here: pd.DataFrame, sweep: str) -> None:
    for arm, (_, _, colour, marker, label) in ARMS.items():
        by = here[here["arm"] == arm].groupby(sweep)["excess"].agg(["mean", "min", "max"])
        spread = [by["mean"] - by["min"], by["max"] - by["mean"]]
        axis.errorbar(by.index, by["mean"], spread, color=colour, marker=marker, ms=3 if arm == "gskm" else 5, lw=1, capsize=2, label=label)
    ours = here[here["arm"].isin(list(ARMS))]
    for arm, (marker, label) in PAPER.items():
        points = here[(here["arm"] == arm) & here[sweep].isin(ours[sweep])]
        if len(points):
            axis.plot(points[sweep], points["excess"], ls="", color="black", marker=marker, ms=5, label=label, zorder=5)
    if (ours["split"] == "held-out").all() and (ours["value"] > 1).any():
        zero = (1 + ours["excess"] - ours["value"]).groupby(ours[sweep]).mean()
        axis.plot(zero.index, zero, color="0.4", ls=":", label="every vector coded as zero")
    axis.axhline(0, color="0.3", lw=0.8, ls="--", zorder=0)
    axis.set_xscale("log", base=2)


def _illusion(line, rows: pd.DataFrame) -> None:
    here = rows[(rows["experiment"] == "D sweep, N=10k") & (rows["arm"] == "gskm") & (rows["D"] == 256)]
    least = bound(256, 2048)
    for axis, split, words, height in (
        (line[0], "train", "in-sample illusion: at $D$ = 256\nGSKM has {:.2f}, bound {:.2f}", 0.93),
        (line[1], "held-out", "the same codebook, new vectors:\n{:.2f}, worse than coding zero", 0.07),
    ):
        value = here[here["split"] == split]["value"].mean()
        text = {"xytext": (0.97, height), "textcoords": "axes fraction", "ha": "right", "va": "top" if height > 0.5 else "bottom", "fontsize": 6.5}
        axis.annotate(words.format(value, least), (256, value - least), arrowprops={"arrowstyle": "->", "lw": 0.7, "shrinkB": 4}, **text)


def table(rows: pd.DataFrame) -> Table:
    """Error at the paper's reference point, in-sample and held out, and with enough data."""
    here = rows[(rows["metric"] == "mse") & (rows["D"] == 256) & rows["K"].isin((256, 2048))]
    wide = here.groupby(["K", "N", "split", "arm"])["value"].apply(lambda v: spread(v.drop_duplicates())).unstack("arm").reset_index().fillna("")
    return Table(
        "Mean squared error per element of white Gaussian vectors at D = 256; coding zero gives 1. "
        "Rate-distortion bound: 0.958 at K = 256, 0.942 at K = 2048, in expectation on new vectors."
    ).add("", wide)


if __name__ == "__main__":
    compute().to_parquet(Path("results") / NAME, index=False)
