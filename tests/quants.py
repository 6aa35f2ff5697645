"""The quantizers that conf/quant names, instantiated as the runner does, with fits shrunk to seconds."""

import inspect
from pathlib import Path

from hydra.utils import get_object, instantiate
from omegaconf import OmegaConf

ROOT = Path(__file__).resolve().parent.parent
NAMES = sorted(path.stem for path in (ROOT / "conf" / "quant").glob("*.yaml"))
QUICK = {"rounds": 2, "steps": 2, "entries": 16, "warmup": 1, "calibration_tokens": 64}
"""Smaller values for options that only make a fit longer or its codebooks larger, where a quantizer has them."""


def load(name: str, bits: float | None = None, quick: dict | None = None):
    """The YAML of one quantizer, resolved; `bits` where it does not pin its own; `quick` changes options that exist."""
    node = OmegaConf.merge({"bits": 4.0 if bits is None else bits}, OmegaConf.create({"quant": OmegaConf.load(ROOT / "conf" / "quant" / f"{name}.yaml")}))
    node = OmegaConf.to_container(node, resolve=True)["quant"]
    quick = QUICK if quick is None else quick
    for codec in (node["key"], node["value"]):
        takes = inspect.signature(get_object(codec["_target_"])).parameters
        codec.update({k: v for k, v in quick.items() if k in takes})
        for part in codec.values():
            if isinstance(part, dict):
                part.update({k: v for k, v in quick.items() if k in part})
    return node


def maker(node: dict, kind: str, seed: int = 0):
    """A function that makes one unfitted codec."""
    partial = instantiate(node[kind], _convert_="all")
    return lambda: partial(seed=seed)


def pins_bits(name: str) -> bool:
    return "${bits}" not in (ROOT / "conf" / "quant" / f"{name}.yaml").read_text()
