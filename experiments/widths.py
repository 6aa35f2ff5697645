"""Rows of the allocation task: one record per layer with the widths and energies of every RoPE block."""

from pathlib import Path

import pandas as pd

from experiments import committed

SHADES = ("#F7F7F7", "#E0E0E0", "#FDE0C5", "#F9B384", "#EB7F5A", "#C9514E", "#8E2F4F", "#4A1942")
"""Widths 1 to 8, light to dark, told apart in grey as well."""


def gather(results: Path, model: str, bits: tuple[float, ...] = (2.0, 3.0), quant: str = "blockgtq") -> pd.DataFrame:
    """Records of runs with shipped options on the default calibration, columns layer, widths [H][L], energies and metrics."""
    frame = committed.one_setting(committed.shipped(committed.load(results, model=model, task="allocation", quant=quant)))
    frame = frame[frame["bits"].isin(bits)]
    if frame.empty:
        return frame
    return committed.records(results, frame).assign(model=model).sort_values(["bits", "seed", "layer"], ignore_index=True)
