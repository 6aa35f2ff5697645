"""Mean, standard error and paired differences over examples."""

import numpy as np
import pandas as pd

RESAMPLES = 2000


def summarize(records: list[dict]) -> pd.DataFrame:
    """Records to one row per (subset, metric): value, stderr of the mean, n; then `average` over subsets for each metric they share.

    One example has no standard error (NaN). The average is the unweighted mean of subset means, its standard error the root sum of squares over the number of subsets.
    """
    long = pd.DataFrame([{"subset": r["subset"], "metric": m, "x": float(v)} for r in records for m, v in r["metrics"].items()])
    table = long.groupby(["subset", "metric"], sort=False)["x"].agg(value="mean", std="std", n="size").reset_index()
    table["stderr"] = table.pop("std") / np.sqrt(table["n"])
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
    mine = {r["id"]: (r["subset"], r["metrics"][metric]) for r in records if metric in r["metrics"]}
    theirs = {r["id"]: r["metrics"][metric] for r in reference if metric in r["metrics"]}
    if mine.keys() != theirs.keys():
        raise ValueError(f"The fp16 run scored other examples ({len(theirs)} against {len(mine)}); run it again with force=true.")
    frame = pd.DataFrame([(s, v - theirs[i]) for i, (s, v) in mine.items()], columns=["subset", "d"])
    rng = np.random.default_rng(seed)
    rows, draws = [], []
    for subset, group in frame.groupby("subset", sort=False):
        d = group["d"].to_numpy()
        resampled = d[rng.integers(len(d), size=(RESAMPLES, len(d)))].mean(axis=1)
        draws.append(resampled)
        rows.append((subset, d.mean(), resampled.std() if len(d) > 1 else np.nan, len(d)))
    if len(rows) > 1:
        rows.append(("average", np.mean([r[1] for r in rows]), np.mean(draws, axis=0).std() if len(frame) > len(rows) else np.nan, len(frame)))
    return pd.DataFrame(rows, columns=["subset", "value", "stderr", "n"])
