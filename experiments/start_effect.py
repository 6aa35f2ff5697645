"""Is GSKM's gain the update rule or the start? Both updates from every start, one to sixteen residual stages, three seeds.

`python -m experiments.start_effect` computes the synthetic rows (two CPU minutes);
`python run.py experiment=start_effect` those of the model: error per stage of keys and values, and loss.
"""

import sys
import time
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd

from experiments import committed, stages, style
from experiments.tables import Table, spread

NAME = "start_effect.parquet"
# arm: (update, start, options, colour, marker, label)
ARMS = {
    "km random": ("km", "random", {}, "#E69F00", "s", "k-means, random members"),
    "km kmeans++": ("km", "kmeans++", {}, "#D55E00", "^", "k-means++"),
    "km spherical": ("km", "spherical", {"warmup": 3}, "#56B4E9", "D", "k-means, spherical start"),
    "gskm random": ("gskm", "random", {}, "#CC79A7", "v", "GSKM, random members"),
    "gskm kmeans++": ("gskm", "kmeans++", {}, "#882255", "P", "GSKM, k-means++ start"),
    "gskm spherical": ("gskm", "spherical", {"warmup": 3}, "#0072B2", "o", "GSKM, spherical start"),
}  # fmt: skip
WIDTH, ENTRIES, STAGES, TRAIN, HELD_OUT, SEEDS, ROUNDS = 128, 256, 16, 12_800, 10_000, (0, 1, 2), 40
DATA = ("white Gaussian", "heavy-tailed")


def vectors(kind: str, count: int, width: int, generator):
    """[1, count, width]: white Gaussian, or the same directions with log-normal norms (sigma 0.6, the control of GSRQ's figure code)."""
    import torch

    x = torch.randn(1, count, width, generator=generator)
    if kind == "white Gaussian":
        return x
    return x / x.norm(dim=-1, keepdim=True) * (0.6 * torch.randn(1, count, 1, generator=generator)).exp()


def one(kind: str, arm: str, seed: int, train: int = TRAIN, stages: int = STAGES, entries: int = ENTRIES, width: int = WIDTH, device: str = "cpu") -> list[dict]:
    """Rows of one residual quantizer: after each stage, relative squared error, cosine of the sum, and occupancy entropy of the stage."""
    import torch

    from gsrq.gskm import gskm
    from kernels.kmeans import kmeans, nearest

    draw = torch.Generator().manual_seed(seed)
    rest = {"train": vectors(kind, train, width, draw).to(device), "held-out": vectors(kind, HELD_OUT, width, draw).to(device)}
    whole = {split: x.clone() for split, x in rest.items()}
    update, start, options = ARMS[arm][:3]
    rows, begin = [], time.perf_counter()
    for stage in range(1, stages + 1):
        found = {"km": kmeans, "gskm": gskm}[update](rest["train"], entries, rounds=ROUNDS, tolerance=1e-3, start=start, generator=draw, **options)
        for split, x in rest.items():
            labels, _ = nearest(x, found.entries)
            rest[split] = x - found.entries[:, labels[0]]
            share = torch.bincount(labels[0], minlength=entries).double() / x.shape[1]
            rebuilt = whole[split] - rest[split]
            measured = {
                "relative": rest[split].square().mean() / whole[split].square().mean(),
                "cosine": torch.nn.functional.cosine_similarity(whole[split], rebuilt, dim=-1).mean(),
                "entropy": -(share * share.clamp_min(1e-300).log2()).sum(),
            }
            rows += [{"data": kind, "arm": arm, "stage": stage, "split": split, "metric": m, "value": float(v), "seed": seed} for m, v in measured.items()]
    return [{**row, "seconds": time.perf_counter() - begin} for row in rows]


def compute(**sizes) -> pd.DataFrame:
    """All synthetic rows, on the GPU if there is one."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    return pd.DataFrame([row for kind in DATA for arm in ARMS for seed in SEEDS for row in one(kind, arm, seed, device=device, **sizes)])


def rows(results: Path = Path("results"), model: str = "standin") -> pd.DataFrame:
    """Long: where (data set, or keys, values, loss), arm, stage (bits for the loss), split, value, seed."""
    parts = []
    if (results / NAME).is_file() and model == "standin":
        synthetic = pd.read_parquet(results / NAME)
        parts.append(synthetic[synthetic["metric"] == "relative"].rename(columns={"data": "where"}))
    found = stages.gather(results, model, ("km", "gskm"), ("mse",))
    found = found[found["piece"].isna() & (found["bits"] == 1) & found["beam"].eq(1)]
    if len(found):
        found = found[found["samples"] == found["samples"].max()]
        parts.append(found.assign(where=found["kind"] + "s", arm=found["quant"] + " " + found["start"], split=found["split"].replace("heldout", "held-out")))
    loss = committed.load(results, model=model, task="perplexity", quant=["km", "gskm"], metric="loss_minus_fp16")
    loss = committed.one_setting(committed.shipped(loss, ("key.cluster.start", "value.cluster.start")))
    if len(loss):
        start = committed.option(loss, "quant.key.cluster.start")
        parts.append(loss.assign(where="loss", arm=loss["quant"] + " " + start, stage=loss["bits"], split="held-out"))
    if not parts:
        return pd.DataFrame()
    return pd.concat(parts)[["where", "arm", "stage", "split", "value", "seed"]].assign(model=model).sort_values(["where", "arm", "stage", "split", "seed"], ignore_index=True)


def draw(rows: pd.DataFrame):
    """Held-out error relative to the spherical-start GSKM at every stage; last panel: loss above fp16, the same way. Mean and range over seeds."""
    panels = [w for w in (*DATA, "keys", "values", "loss") if (rows["where"] == w).any()]
    figure, axes = plt.subplots(1, len(panels), figsize=(style.PAGE, 2.6), squeeze=False)
    for axis, where in zip(axes[0], panels):
        part = rows[(rows["where"] == where) & (rows["split"] == "held-out")]
        base = part[part["arm"] == "gskm spherical"].groupby("stage")["value"].mean()
        arms = part.groupby("stage")["arm"].nunique()
        budgets = sorted(arms[arms > 3].index) if where == "loss" else []
        part = part[part["stage"].isin(budgets)] if where == "loss" else part
        for place, (arm, (_, _, _, colour, mark, text)) in enumerate(ARMS.items()):
            mine = part[part["arm"] == arm]
            if mine.empty:
                continue
            cells = mine.assign(value=100 * (mine["value"] / mine["stage"].map(base) - 1)).groupby("stage")["value"].agg(["mean", "min", "max"])
            x = [budgets.index(b) + (place - 2.5) * 0.13 for b in cells.index] if where == "loss" else cells.index
            bars = [cells["mean"] - cells["min"], cells["max"] - cells["mean"]]
            axis.errorbar(
                x,
                cells["mean"],
                bars,
                color=colour,
                marker=mark,
                markersize=3.5,
                linestyle="none" if where == "loss" else "-",
                linewidth=0.9,
                capsize=1.5,
                elinewidth=0.7,
                label=text,
            )
        axis.set_title({"keys": "model, keys", "values": "model, values", "loss": "model, loss"}.get(where, where))
        if where == "loss":
            axis.set_xticks(range(len(budgets)), [f"{b:g}" for b in budgets])
            axis.set_xlabel("bits per value")
        else:
            axis.set_xlabel("stages")
            axis.set_xscale("log", base=2)
            axis.set_xticks([1, 2, 4, 8, 16], ["1", "2", "4", "8", "16"])
            axis.minorticks_off()
    axes[0][0].set_ylabel("difference to GSKM from\na spherical start (percent)")
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=3)
    return figure


def shares(rows: pd.DataFrame) -> pd.DataFrame:
    """Per place, stage (or budget) and seed: gap from k-means++ to GSKM, and the percentages of it that the start alone and the update alone close."""
    parts = []
    for (where, stage), part in rows[rows["split"] == "held-out"].groupby(["where", "stage"]):
        wide = part.pivot_table(index="seed", columns="arm", values="value")
        if {"km kmeans++", "km spherical", "gskm spherical", "gskm kmeans++"} <= set(wide.columns):
            gap = wide["km kmeans++"] - wide["gskm spherical"]
            closed = {arm: 100 * (wide["km kmeans++"] - wide[arm]) / gap for arm in ("km spherical", "gskm kmeans++")}
            parts.append(pd.DataFrame({"where": where, "stage": stage, "gap": gap, "start": closed["km spherical"], "update": closed["gskm kmeans++"]}).reset_index())
    return pd.concat(parts, ignore_index=True) if parts else pd.DataFrame(columns=["where", "stage", "gap", "start", "update", "seed"])


def verdict(rows: pd.DataFrame) -> pd.DataFrame:
    """The shares after the last stage and at every budget, mean and spread over seeds, as text."""
    lines = []
    for (where, stage), part in shares(rows).dropna().groupby(["where", "stage"]):
        if where == "loss" or stage in (1, STAGES):
            lines.append({"where": where, "stage or bits": stage, "gap": spread(part["gap"], digits=4), "closed by the start alone": _closed(part, "start"),
                          "closed by the update alone": _closed(part, "update"), "seeds": len(part)})  # fmt: skip
    return pd.DataFrame(lines)


def ahead(difference: pd.Series) -> bool:
    """Whether a difference per seed is positive by two standard errors of its mean; False for one seed."""
    return bool(difference.mean() > 2 * difference.std() / len(difference) ** 0.5)


def _closed(part: pd.DataFrame, column: str) -> str:
    return spread(part[column], digits=0) + " %" if ahead(part["gap"]) else "no gap"


def answer(rows: pd.DataFrame) -> str:
    """What the rows say of the model's held-out error after the last stage and of its loss, in two sentences; empty without such rows."""
    found, said = shares(rows).dropna(), ""
    last = {where: part for where, part in found[found["stage"] == STAGES].groupby("where") if where in ("keys", "values") and ahead(part["gap"])}
    if last:
        told = (f"{spread(p['start'], digits=0)} % of the gap of {where}" for where, p in last.items())
        alone = (f"{spread(p['update'], digits=0)} %" for p in last.values())
        said += f" After {STAGES} stages k-means from the spherical start closes {' and '.join(told)} in held-out error, the update alone {' and '.join(alone)}."
    loss = rows[rows["where"] == "loss"].pivot_table(index=["stage", "seed"], columns="arm", values="value")
    if {"km kmeans++", "km spherical", "gskm spherical"} <= set(loss.columns):
        told = {"k-means++ is ahead of GSKM": [], "GSKM is ahead of k-means++": [], "spherical k-means and GSKM differ by less than two standard errors": []}
        for bits, part in loss.dropna(subset=["km kmeans++", "km spherical", "gskm spherical"]).groupby("stage"):
            gap, beside = part["km kmeans++"] - part["gskm spherical"], part["km spherical"] - part["gskm spherical"]
            for words, holds in zip(told, (ahead(-gap), ahead(gap), len(part) > 1 and not (ahead(beside) or ahead(-beside)))):
                told[words] += [f"{bits:g}"] if holds else []
        said += " In loss " + "; ".join(f"{words} at {', '.join(bits)} bits" for words, bits in told.items() if bits) + "." if any(told.values()) else ""
    return said


def table(rows: pd.DataFrame) -> Table:
    last = rows[(rows["split"] == "held-out") & ((rows["where"] == "loss") | (rows["stage"] == 16))]
    wide = last.groupby(["where", "stage", "arm"])["value"].apply(lambda v: spread(v, digits=4, seeds=True)).unstack("arm").reindex(columns=list(ARMS)).reset_index().fillna("")
    caption = (
        f"Relative squared error held out after {STAGES} stages ({WIDTH} channels, {ENTRIES} entries; white Gaussian, log-normal norms, the model's keys and values), "
        "loss above fp16 in nats; mean ± standard deviation over seeds, whose number follows in brackets. "
        "No gap: k-means++ is not behind GSKM by two standard errors." + answer(rows)
    )
    return Table(caption).add("Which part of GSKM's gain over k-means++ is its start", verdict(rows)).add("All arms", wide)


if __name__ == "__main__":
    compute().to_parquet(Path(sys.argv[1] if len(sys.argv) > 1 else "results") / NAME, index=False)
