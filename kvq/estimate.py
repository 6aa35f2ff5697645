"""What a cell will need, before anything heavy is loaded: memory of weights, cache and calibration, and rough time."""

import functools
import json
import os
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from kvq import models, report
from kvq.cache import coded_shapes, layer_kinds
from kvq.errors import Refusal
from kvq.quantizer import Calibration, table_bytes

GB = 2**30


@dataclass
class Estimate:
    """Bytes unless said otherwise. `cache` and `decoded` (the decoded copy that memo=true keeps) are of one sequence of `length` tokens.

    `known`: the stored bits are the codec's own, else the label, without side data. `codebooks` is 0 where a fit decides them.
    """

    weights: int
    cache: int
    decoded: int
    codebooks: int
    calibration: int
    length: int | None
    batch: int
    bits: float
    known: bool
    seconds: float
    available: int
    device: str

    @property
    def least(self) -> int:
        """Without which not one sequence can be read."""
        return self.weights + self.codebooks + self.cache + self.decoded

    @property
    def whole(self) -> int:
        return self.weights + self.codebooks + self.batch * (self.cache + self.decoded)

    def refuse_if_too_large(self) -> None:
        """Raise Refusal, with the figures, if the device's whole memory is smaller than `least`."""
        if self.least > self.available:
            raise Refusal(
                f"This cell needs at least {self.least / GB:.1f} GB (weights {self.weights / GB:.1f}, cache of {self.length or 0:,} tokens {self.cache / GB:.1f}, "
                f"its decoded copy {self.decoded / GB:.1f}), {self.device} has {self.available / GB:.1f}; use a smaller model or context, memo=false, "
                "model.dtype=bfloat16, or model.device_map=auto over several GPUs."
            )


def of(cell, task, make: dict, tiny_config) -> Estimate:
    """The estimate of a prepared cell. make: functions that make an unfitted codec, by kind; tiny_config: the config of a model without a path.

    Raises Refusal if the model's config cannot be had, or the task asks for more tokens than the model allows.
    """
    cfg = cell.resolved
    config = _config(cfg["model"]) if "path" in cfg["model"] else tiny_config()
    text = config.get_text_config(decoder=True)
    dtype, device = models.resolve(cfg["model"]["dtype"], cfg["model"]["device"])
    width = torch.finfo(getattr(torch, dtype)).bits // 8
    parameters = _parameters(config.to_json_string(), type(config))
    if hasattr(task, "fits"):
        task.fits(text.max_position_embeddings, cell.choices["model"])
    asked = [cfg["task"].get("context"), *(cfg["task"].get("lengths") or [])] if cfg["task"].get("context") is None else [cfg["task"]["context"]]
    length = max((n for n in asked if isinstance(n, int)), default=None)
    length = length and min(length, text.max_position_embeddings)
    layers = sum(kind == "full_attention" for kind, _ in layer_kinds(config))
    shapes = coded_shapes(config)
    found = {kind: _stored(make[kind], kind, float(cfg["quant"][kind]["bits"]), *shape) for kind, shape in shapes.items()}
    values = {kind: heads * dim for kind, (heads, dim) in shapes.items()}
    exact = min(length or 0, cfg["quant"]["sink"] + cfg["quant"]["window"])
    cache = sum(layers * values[k] * ((length or 0) - exact) * found[k][0] / 8 + layers * values[k] * exact * width for k in shapes)
    tokens = cfg["calib"]["samples"] * cfg["calib"]["length"] if cell.identity["calib"] else 64
    recorded = tokens * (sum(values.values()) + text.num_attention_heads * shapes["key"][1]) * 4
    groups = max(1, min(len(layer_kinds(config)), int(cfg["calib"]["memory_gb"] * GB / recorded)))
    total, name = _memory(device, cfg["model"].get("device_map"))
    return Estimate(
        weights=parameters * width, cache=int(cache), decoded=layers * sum(values.values()) * (length or 0) * width if cfg["memo"] else 0,
        codebooks=layers * sum(f[1] for f in found.values()), calibration=groups * recorded, length=length,
        batch=cfg["task"]["batch_size"] if isinstance(cfg["task"].get("batch_size"), int) else 1, bits=sum(found[k][0] * values[k] for k in shapes) / sum(values.values()),
        known=all(f[2] for f in found.values()), seconds=2 * parameters * (length or text.max_position_embeddings) / _speed(device), available=total, device=name,
    )  # fmt: skip


def show(cell, estimate: Estimate, finished: bool) -> None:
    """Print one cell's estimate. Raises Refusal if it cannot fit."""
    e, c = estimate, cell.choices
    length = f"{e.length:,} tokens" if e.length else "length set by the data"
    known = "" if e.known else " without side data and codebooks"
    fits = "" if e.whole <= e.available else f" · does not fit with task.batch_size={e.batch}, lower it"
    report.say(
        f"run {cell.run}{' (finished)' if finished else ''}: {c['model']} {c['quant']} {cell.label:g} bits {c['task']} · weights {size(e.weights)} · cache of {length} "
        f"{size(e.cache)} at {e.bits:.3f} bits{known}, decoded copy {size(e.decoded)}, x{e.batch} sequences · calibration {size(e.calibration)} · "
        f"about {e.seconds:.2g} s per sequence read · {size(e.whole)} of {size(e.available)} on {e.device}{fits}"
    )
    e.refuse_if_too_large()


def size(amount: float) -> str:
    """Bytes for people."""
    for unit, scale in (("GB", GB), ("MB", 2**20)):
        if amount >= scale:
            return f"{amount / scale:.1f} {unit}"
    return f"{amount / 1024:.0f} KB"


def _config(model: dict):
    source = models.folder(model["path"]) or model["path"]
    try:
        config = AutoConfig.from_pretrained(source, revision=model["revision"])
        config.get_text_config(decoder=True).num_hidden_layers  # noqa: B018  a config.json of something else
    except (OSError, ValueError, AttributeError) as error:
        reason = str(error).strip().splitlines()[0]
        raise Refusal(f"model.path={model['path']} cannot be loaded: {reason} Without network, download it elsewhere and pass model=local model.path=<folder>.") from error
    for key, value in (model.get("overrides") or {}).items():
        setattr(config, key, value)
    return config


@functools.lru_cache(maxsize=8)
def _parameters(config: str, kind: type) -> int:
    """Parameters of the model, counted on a copy without storage; tied ones once."""
    with torch.device("meta"):
        return sum(p.numel() for p in AutoModelForCausalLM.from_config(kind.from_dict(json.loads(config))).parameters())


def _stored(make, kind: str, label: float, heads: int, dim: int) -> tuple[float, int, bool]:
    """(stored bits per value, bytes of codebooks, whether they are the codec's own): a codec that learns nothing tells when it knows the shape."""
    codec = make()
    if "calib" in getattr(codec, "depends_on", ("calib",)):
        return label, 0, False
    x = torch.randn(heads, 256, dim, generator=torch.Generator().manual_seed(0))
    codec.fit(Calibration(x=x, kind=kind, layer=0, seed=0, positions=torch.arange(256), sample_length=256, queries=x))
    return float(codec.bits), table_bytes([codec]), True


def _memory(device: str, device_map: str | None) -> tuple[int, str]:
    """(bytes, name) of what may hold the model: a GPU, this machine's memory (or its container's share), or all GPUs and the memory."""
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    limit = Path("/sys/fs/cgroup/memory.max")
    host = min(pages, int(limit.read_text())) if limit.is_file() and limit.read_text().strip().isdigit() else pages
    gpus = [torch.cuda.get_device_properties(i).total_memory for i in range(torch.cuda.device_count())] if device.startswith("cuda") or device_map else []
    if device_map:
        return host + sum(gpus), f"{len(gpus)} GPUs and the host"
    if device.startswith("cuda"):
        index = torch.device(device).index or 0
        return gpus[index], torch.cuda.get_device_name(index)
    return host, "this machine"


@functools.cache
def _speed(device: str) -> float:
    """Multiply-adds per second times two of a product of 1024 x 1024 matrices, measured now; a rough bound on what the model reaches."""
    x = torch.ones(1024, 1024, device=device, dtype=torch.float32 if device == "cpu" else torch.bfloat16)
    x @ x
    start = time.perf_counter()
    (x @ x).sum().item()
    return 2 * 1024**3 / (time.perf_counter() - start)
