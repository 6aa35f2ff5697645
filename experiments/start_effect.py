"""Is GSKM's gain the update rule or the start? Both updates from every start, one to sixteen residual stages, three seeds.

`python -m experiments.start_effect` computes the synthetic rows (minutes on a GPU, about half an hour on two cores);
`python run.py experiment=start_effect` those of the model: error per stage of keys and values, and loss.
"""

import json
import sys
import time
from pathlib import Path

import pandas as pd

from experiments import choice, style

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
WIDTH, ENTRIES, STAGES, TRAIN, HELD_OUT, SEEDS, ROUNDS = 128, 256, 16, 51_200, 10_000, (0, 1, 2), 40
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


if __name__ == "__main__":
    compute().to_parquet(Path(sys.argv[1] if len(sys.argv) > 1 else "results") / NAME, index=False)
