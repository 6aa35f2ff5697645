"""The calibration store: fitted codecs as safetensors, keyed by the content of everything that shaped them. Never a pickle.

An entry's name is a hash of its recipe: method and options with bits, content of the model (weights' hash, or hub id and commit), text
and number of its tokens, seed, and the code that fits. Its metadata holds the recipe and a digest of every tensor, checked before use.
"""

import functools
import hashlib
import json
import logging
from collections.abc import Callable
from pathlib import Path

import torch
from filelock import FileLock
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from kvq.errors import Refusal
from kvq.models import ROOT
from kvq.quantizer import set_buffers
from kvq.results import replace, run_id

log = logging.getLogger(__name__)
FITTING_CODE = ("kernels/*.py", "gsrq/*.py", "blockgtq/*.py", "kvq/baselines/*.py", "kvq/calibrate.py", "kvq/record.py", "kvq/rope.py")


class Damaged(Exception):
    """An entry is not what was written; the message says how."""


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
    tensors = _tensors(pairs) or {"empty": torch.zeros(1)}
    path = path_of(recipe, folder)
    metadata = {"recipe": json.dumps(recipe, sort_keys=True), "digest": _digest(tensors)}
    replace(path, lambda temporary: save_file(tensors, temporary, metadata=metadata))
    return path


def content(pairs: list[tuple]) -> str:
    """16 hex digits of all buffers of (key, value) codecs: equal where the codecs are equal to the last bit."""
    return _digest(_tensors(pairs))[:16]


def _tensors(pairs: list[tuple]) -> dict[str, torch.Tensor]:
    tensors = {}
    for layer, pair in enumerate(pairs):
        for kind, codec in zip(("key", "value"), pair):
            if codec is not None:
                for name, buffer in codec.named_buffers():
                    tensors[f"{layer}/{kind}/{name}"] = buffer.detach().cpu().contiguous().clone()
    return tensors


def _digest(tensors: dict[str, torch.Tensor]) -> str:
    """Hash of names, dtypes, shapes and bytes: safetensors itself keeps no checksum."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def recipe_of(path: Path) -> dict:
    """The recipe of an entry, from its header alone. Raises Damaged."""
    return _open(path, lambda stored: json.loads(stored.metadata()["recipe"]))


def read(path: Path) -> tuple[dict, dict[str, torch.Tensor]]:
    """(recipe, tensors) of an entry, every byte checked. Raises Damaged."""

    def whole(stored):
        metadata = stored.metadata()
        tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118  not a dict
        if metadata["digest"] != _digest(tensors):
            raise ValueError("its digest does not match")
        return json.loads(metadata["recipe"]), tensors

    return _open(path, whole)


def _open(path: Path, take: Callable):
    try:
        with safe_open(path, framework="pt") as stored:
            found = take(stored)
            recipe = found[0] if isinstance(found, tuple) else found
            if not isinstance(recipe, dict) or "quant" not in recipe:
                raise ValueError("it has no recipe")
            return found
    except (SafetensorError, KeyError, TypeError, AttributeError, ValueError, OSError, RuntimeError) as error:
        raise Damaged(f"{path} is damaged ({type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else 'no header'})") from error


def difference(kept: dict, wanted: dict) -> list[str]:
    """The fields in which two recipes differ, the codec's by their own names."""
    return [field for field in sorted(set(kept) | set(wanted)) if run_id({field: kept.get(field)}) != run_id({field: wanted.get(field)})]


def restore(pairs: list[tuple], recipe: dict, folder: Path, devices: list) -> bool:
    """Fill unfitted codecs from the store, each on its layer's device; False if there is no usable entry (a damaged one is reported and rebuilt).

    Raises Refusal if the entry under this key was made from another recipe, naming the field.
    """
    path = path_of(recipe, folder)
    if not path.is_file():
        return False
    try:
        kept, tensors = read(path)
    except Damaged as error:
        log.warning("%s; calibrating again.", error)
        return False
    if fields := difference(kept, recipe):
        told = "; ".join(f"{f} ({kept.get(f)}, wanted {recipe.get(f)})" for f in fields)
        raise Refusal(f"{path} was calibrated with another {told}; delete it or set the same {', '.join(fields)}.")
    groups = _grouped(tensors)
    for layer, pair in enumerate(pairs):
        for kind, codec in zip(("key", "value"), pair):
            if codec is not None:
                set_buffers(codec, groups.get((layer, kind), {})).to(devices[layer])
    return True


def _grouped(tensors: dict) -> dict[tuple[int, str], dict]:
    groups: dict[tuple[int, str], dict] = {}
    for name, tensor in tensors.items():
        if name != "empty":
            layer, kind, buffer = name.split("/")
            groups.setdefault((int(layer), kind), {})[buffer] = tensor
    return groups


def _stored(recipe: dict, folder: Path) -> list[tuple[Path, dict]]:
    """Entries of the recipe's method with their recipes; damaged ones are left out."""
    found = []
    for path in sorted(Path(folder).glob(f"{recipe['quant']}-*.safetensors")):
        try:
            found.append((path, recipe_of(path)))
        except Damaged as error:
            log.warning("%s; passed over.", error)
    return found


def _adopt(pairs: list[tuple], recipe: dict, folder: Path, devices: list) -> bool:
    """Take codecs from a finer fit that differs in bits alone, where the method can (`adopt(buffers) -> bool`)."""
    if not all(hasattr(codec, "adopt") for pair in pairs for codec in pair):
        return False
    for path, kept in _stored(recipe, folder):
        if difference(_without_bits(kept), _without_bits(recipe)):
            continue
        try:
            groups = _grouped(read(path)[1])
        except Damaged:
            continue
        moved = {(i, kind): {k: t.to(devices[i]) for k, t in group.items()} for (i, kind), group in groups.items()}
        if all((i, kind) in moved and codec.adopt(moved[i, kind]) for i, pair in enumerate(pairs) for kind, codec in zip(("key", "value"), pair)):
            return True
    return False


def _without_bits(recipe: dict) -> dict:
    codec = {kind: {k: v for k, v in node.items() if k != "bits"} if isinstance(node, dict) else node for kind, node in recipe.get("codec", {}).items()}
    return {**recipe, "codec": codec}


def fetch(make_pairs: Callable[[], list[tuple]], fit: Callable[[], list[tuple]], recipe: dict, folder: Path, devices: list, may_fit: bool = True) -> list[tuple]:
    """Codecs for this recipe: restored if stored, else cut from a finer fit or fitted, stored and restored, so that both ways give the same object.

    devices: one per layer. Of several processes that want one recipe, one fits and the others wait. Raises Refusal without `may_fit`
    if nothing is stored for the recipe, naming the fields in which the nearest entry differs.
    """
    pairs = make_pairs()
    if restore(pairs, recipe, folder, devices):
        return pairs
    if not may_fit:
        raise Refusal(_nearest(recipe, folder))
    Path(folder).mkdir(parents=True, exist_ok=True)
    lock = path_of(recipe, folder).with_suffix(".lock")
    with FileLock(lock):
        pairs = make_pairs()
        try:
            if not restore(pairs, recipe, folder, devices):  # another process may have fitted it meanwhile
                save(pairs if _adopt(pairs, recipe, folder, devices) else fit(), recipe, folder)
                pairs = make_pairs()
                restore(pairs, recipe, folder, devices)
        finally:
            lock.unlink(missing_ok=True)
    return pairs


def _nearest(recipe: dict, folder: Path) -> str:
    apart = sorted(((difference(kept, recipe), path) for path, kept in _stored(recipe, folder)), key=lambda found: len(found[0]))
    hint = f"the nearest, {apart[0][1].name}, differs in {', '.join(apart[0][0])}" if apart else f"there is none of {recipe['quant']} at all"
    return f"fit=false, and {folder} holds no calibration for this cell: {hint}. Import one (make calib-import FROM=...) or allow fit=true."
