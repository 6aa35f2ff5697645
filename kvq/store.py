"""The calibration store: fitted codecs as safetensors, keyed by the content of everything that shaped them. Never a pickle."""

import functools
import hashlib
import json
import logging
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from kvq.errors import Refusal
from kvq.models import ROOT
from kvq.quantizer import set_buffers
from kvq.results import replace, run_id

log = logging.getLogger(__name__)
FITTING_CODE = ("kernels/*.py", "gsrq/*.py", "blockgtq/*.py", "kvq/baselines/*.py", "kvq/calibrate.py", "kvq/record.py", "kvq/rope.py")


@functools.cache
def code_version() -> str:
    """Hash of the sources that decide what a fit returns: editing a quantizer makes its stored calibrations unreachable."""
    digest = hashlib.sha256()
    for pattern in FITTING_CODE:
        for file in sorted(ROOT.glob(pattern)):
            digest.update(file.name.encode() + file.read_bytes())
    return digest.hexdigest()[:16]


def path_of(recipe: dict, folder: Path) -> Path:
    return Path(folder) / f"{recipe['quant']}-{run_id(recipe)}.safetensors"


def save(pairs: list[tuple], recipe: dict, folder: Path) -> Path:
    """Write the buffers of all (key, value) codecs with their recipe; whole or not at all."""
    tensors = {}
    for layer, pair in enumerate(pairs):
        for kind, codec in zip(("key", "value"), pair):
            if codec is not None:
                for name, buffer in codec.named_buffers():
                    tensors[f"{layer}/{kind}/{name}"] = buffer.detach().cpu().contiguous().clone()
    tensors = tensors or {"empty": torch.zeros(1)}
    path = path_of(recipe, folder)
    replace(path, lambda temporary: save_file(tensors, temporary, metadata={"recipe": json.dumps(recipe, sort_keys=True)}))
    return path


def restore(pairs: list[tuple], recipe: dict, folder: Path, device) -> bool:
    """Fill unfitted codecs from the store; False if there is no usable entry (a damaged one is reported and rebuilt).

    Raises Refusal if the entry under this key was made from another recipe, naming the field.
    """
    path = path_of(recipe, folder)
    if not path.is_file() or (found := _read(path, device)) is None:
        return False
    kept, groups = found
    for field in sorted(set(recipe) | set(kept)):
        if run_id({field: kept.get(field)}) != run_id({field: recipe.get(field)}):
            raise Refusal(f"{path} was calibrated with another {field} ({kept.get(field)}, wanted {recipe.get(field)}); delete it or set the same {field}.")
    for layer, pair in enumerate(pairs):
        for kind, codec in zip(("key", "value"), pair):
            if codec is not None:
                set_buffers(codec, groups.get((layer, kind), {})).to(device)
    return True


def _read(path: Path, device) -> tuple[dict, dict] | None:
    """(recipe, {(layer, kind): buffers}) of one entry, or None after a warning if it is damaged."""
    try:
        with safe_open(path, framework="pt", device=str(device)) as stored:
            recipe = json.loads((stored.metadata() or {}).get("recipe", "{}"))
            groups: dict[tuple[int, str], dict] = {}
            for name in set(stored.keys()) - {"empty"}:
                layer, kind, buffer = name.split("/")
                groups.setdefault((int(layer), kind), {})[buffer] = stored.get_tensor(name)
            return recipe, groups
    except (SafetensorError, json.JSONDecodeError, UnicodeDecodeError, ValueError, OSError) as error:
        log.warning("%s is damaged (%s); calibrating again.", path, type(error).__name__)
        return None


def _adopt(pairs: list[tuple], recipe: dict, folder: Path, device) -> bool:
    """Take codecs from a finer fit that differs in bits alone, where the method can (`adopt(buffers) -> bool`)."""
    if not all(hasattr(codec, "adopt") for pair in pairs for codec in pair):
        return False
    for path in sorted(Path(folder).glob(f"{recipe['quant']}-*.safetensors")):
        found = _read(path, device)
        if found is None or run_id(_without_bits(found[0])) != run_id(_without_bits(recipe)):
            continue
        groups = found[1]
        if all((i, kind) in groups and codec.adopt(groups[i, kind]) for i, pair in enumerate(pairs) for kind, codec in zip(("key", "value"), pair)):
            return True
    return False


def _without_bits(recipe: dict) -> dict:
    codec = {kind: {k: v for k, v in node.items() if k != "bits"} if isinstance(node, dict) else node for kind, node in recipe.get("codec", {}).items()}
    return {**recipe, "codec": codec}


def fetch(make_pairs: Callable[[], list[tuple]], fit: Callable[[], list[tuple]], recipe: dict, folder: Path, device) -> list[tuple]:
    """Codecs for this recipe: restored if stored, else cut from a finer fit or fitted, stored and restored, so that both ways give the same object."""
    pairs = make_pairs()
    if not restore(pairs, recipe, folder, device):
        save(pairs if _adopt(pairs, recipe, folder, device) else fit(), recipe, folder)
        pairs = make_pairs()
        restore(pairs, recipe, folder, device)
    return pairs
