"""Mean, standard error and paired differences over examples, and whether the fp16 score leaves anything to lose.

A record may carry a `weight` (scored tokens of a window): means are then weighted. Records with the same `cluster` are repeats of one
problem: they are averaged first, so that n and the standard error count problems.
"""

import numpy as np
import pandas as pd

RESAMPLES = 2000
WEAK = "fp16_too_weak"
HEADROOM = 0.1
"""fp16 must stand this share of the way from guessing to perfect, and two standard errors, above guessing."""


def summarize(records: list[dict]) -> pd.DataFrame:
    """Records to one row per (subset, metric): value, stderr of the mean, n; then `average` over subsets for each metric they share.

    One example has no standard error (NaN). The average is the unweighted mean of subset means, its standard error the root sum of squares over the number of subsets.
    """
    rows = [(*key, *_mean(group)) for key, group in _units(records).groupby(["subset", "metric"], sort=False)]
    table = pd.DataFrame(rows, columns=["subset", "metric", "value", "stderr", "n"])
    subsets = table["subset"].nunique()
    if subsets > 1:
        shared = table.groupby("metric").filter(lambda g: len(g) == subsets)
        average = shared.groupby("metric", sort=False).agg(value=("value", "mean"), stderr=("stderr", lambda s: float(np.sqrt((s**2).sum(skipna=False)) / len(s))), n=("n", "sum"))
        table = pd.concat([table, average.reset_index().assign(subset="average")], ignore_index=True)
    return table[["subset", "metric", "value", "stderr", "n"]]


def paired(records: list[dict], reference: list[dict], metric: str, seed: int = 0) -> pd.DataFrame:
    """Difference to the reference on the same examples, per subset and on average: value and bootstrap standard error, n.

    Raises ValueError if the two runs did not score the same examples.
    """
    theirs = {r["id"]: r["metrics"][metric] for r in reference if metric in r["metrics"]}
    mine = [r for r in records if metric in r["metrics"]]
    if {r["id"] for r in mine} != theirs.keys():
        raise ValueError(f"The fp16 run scored other examples ({len(theirs)} against {len(mine)}); run it again with force=true.")
    frame = _units([{**r, "metrics": {metric: r["metrics"][metric] - theirs[r["id"]]}} for r in mine])
    rng = np.random.default_rng(seed)
    rows, draws = [], []
    for subset, group in frame.groupby("subset", sort=False):
        d, w = group["x"].to_numpy(), group["weight"].to_numpy()
        drawn = rng.integers(len(d), size=(RESAMPLES, len(d)))
        resampled = (d[drawn] * w[drawn]).sum(axis=1) / w[drawn].sum(axis=1)
        draws.append(resampled)
        rows.append((subset, np.average(d, weights=w), resampled.std() if len(d) > 1 else np.nan, len(d)))
    if len(rows) > 1:
        rows.append(("average", np.mean([r[1] for r in rows]), np.mean(draws, axis=0).std() if len(frame) > len(rows) else np.nan, len(frame)))
    return pd.DataFrame(rows, columns=["subset", "value", "stderr", "n"])


def weakness(reference: list[dict], metric: str, perfect: float) -> pd.DataFrame:
    """Per subset and on average, 1 where fp16 is too weak to tell methods apart, else 0: columns subset, value, stderr, n.

    Weak: less than two standard errors, or less than `HEADROOM` of the way to `perfect`, above what guessing gives (a record's
    `chance`, else 0; `perfect` may lie below it, as for a loss). A method cannot lose what fp16 does not have.
    """
    scores = summarize([{**r, "metrics": {metric: r["metrics"][metric]}} for r in reference if metric in r["metrics"]])
    levels = summarize([{**r, "metrics": {metric: r.get("chance", 0.0)}} for r in reference if metric in r["metrics"]])
    span = perfect - levels["value"]
    gain = (scores["value"] - levels["value"]) * np.sign(span)
    weak = (gain <= 2 * scores["stderr"].fillna(0)) | (gain < HEADROOM * span.abs())
    return scores[["subset", "n"]].assign(value=weak.astype(float), stderr=0.0)[["subset", "value", "stderr", "n"]]


def _units(records: list[dict]) -> pd.DataFrame:
    """Long table subset, unit, metric, x, weight: one line per metric of each independent unit (an example, or all repeats of one problem)."""
    long = pd.DataFrame(
        [(r["subset"], r.get("cluster", r["id"]), m, float(v), float(r.get("weight", 1))) for r in records for m, v in r["metrics"].items()],
        columns=["subset", "unit", "metric", "x", "weight"],
    )
    if any("cluster" in r for r in records):
        long = long.groupby(["subset", "unit", "metric"], sort=False, as_index=False).mean()
    return long


def _mean(group: pd.DataFrame) -> tuple[float, float, int]:
    """(weighted mean, its standard error, n). The error is that of a ratio estimator, s / sqrt(n) for equal weights."""
    x, w = group["x"].to_numpy(), group["weight"].to_numpy()
    n, mean = len(x), float(np.average(x, weights=w))
    stderr = float(np.sqrt(n / (n - 1) * (w**2 * (x - mean) ** 2).sum()) / w.sum()) if n > 1 else np.nan
    return mean, stderr, n
