"""Calibration: text in, fitted codecs out. Layers are processed in groups that fit a memory budget, so no model-sized dump exists."""

import functools
import gzip
import hashlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from kvq.cache import coded_shapes, layer_kinds
from kvq.errors import Refusal
from kvq.models import ROOT
from kvq.quantizer import Calibration, Quantizer
from kvq.record import record
from kvq.rope import Rope

Make = Callable[[], Quantizer]
STREAMS = 4  # codecs fitted at once; each holds a few copies of its layer's activations


def text(source: str) -> str:
    """Calibration or evaluation text: `standin:mixed|train|heldout`, a text file (.gz allowed), or `hub:<dataset>:<config>:<split>`."""
    if source == "standin:mixed":
        from kvq.standin.mix import mixed

        return mixed()
    if source.startswith("standin:"):
        from kvq.standin import corpus

        return "\n\n".join(corpus.sample(source.split(":")[1]))
    if source.startswith("hub:"):
        from kvq.hub import dataset_text

        return dataset_text(source)
    for path in (Path(source).expanduser(), ROOT / source):
        if path.is_file():
            raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
            try:
                return raw.decode("utf-8")
            except UnicodeDecodeError as error:
                raise Refusal(f"{path} is not UTF-8 text: {error}.") from error
    raise Refusal(f"There is no text at '{source}'; give a text file, standin:mixed, standin:train, standin:heldout or hub:<dataset>:<config>:<split>.")


def content(source: str) -> str:
    """What identifies a text: its own name if that is stable (standin:, hub:), else a hash of what the file holds."""
    if source.startswith(("standin:", "hub:")):
        return source
    return "text:" + hashlib.sha256(text(source).encode()).hexdigest()[:16]


def windows(tokenizer, source: str, count: int, length: int, offset: int = 0) -> list[Tensor]:
    """`count` windows of `length` tokens, one after the other from token `offset`. Raises Refusal if the text is too short."""
    ids = _tokens(tokenizer, source, content(source))
    available = (len(ids) - offset) // length
    if available < count:
        raise Refusal(
            f"The text '{source}' gives {max(available, 0)} windows of {length} tokens from token {offset}, {count} were asked for; "
            "lower the number or the length, or give more text."
        )
    return list(ids[offset : offset + count * length].reshape(count, length).clone())


@functools.lru_cache(maxsize=4)
def _tokens(tokenizer, source: str, content: str) -> Tensor:
    """Token ids of a whole text, kept: a sweep asks for the same text in every cell."""
    return tokenizer(text(source), add_special_tokens=False, return_tensors="pt", verbose=False).input_ids[0]


def fit(model, samples: list[Tensor], make_key: Make, make_value: Make, *, seed: int, memory_gb: float, batch_size: int = 1) -> list[tuple]:
    """Codecs (key, value) for every decoder layer, fitted on `samples` ([T] token ids each); (None, None) where the cache is the library's.

    Passes over the text are repeated for as many groups of layers as `memory_gb` of recorded activations requires.
    """
    kinds = layer_kinds(model.config)
    shapes = coded_shapes(model.config)
    make_value = make_value if "value" in shapes else lambda: None
    pairs = [(make_key(), make_value()) if kind == "full_attention" else (None, None) for kind, _ in kinds]
    groups = [tuple(c.grad_group if c else None for c in pair) for pair in pairs]
    before_rope = any(key is not None and key.space == "pre" for key, _ in pairs)
    rope = _rope(model, before_rope)
    tokens = sum(len(s) for s in samples)
    queries = model.config.get_text_config(decoder=True).num_attention_heads
    width = sum(heads * dim for heads, dim in shapes.values()) + queries * shapes["key"][1]
    step = max(1, int(memory_gb * 2**30 / (tokens * width * 4)))
    progress = tqdm(total=len(kinds), desc="calibrate", unit="layer", disable=None)
    for first in range(0, len(kinds), step):
        layers = range(first, min(first + step, len(kinds)))
        recorded = _gather(model, samples, layers, groups, rope if before_rope else None, batch_size)

        def learn(job: tuple, recorded=recorded) -> None:
            layer, codec, kind = job
            codec.to(model.device).fit(_calibration(recorded[layer], kind, codec, layer, seed, rope, len(samples[0]), model.device))

        _each(learn, [(layer, codec, kind) for layer in recorded for codec, kind in zip(pairs[layer], shapes)], model.device)
        progress.update(len(layers))
    progress.close()
    return pairs


def _each(call: Callable[[tuple], None], jobs: list[tuple], device: torch.device) -> None:
    """`call` every job, STREAMS at a time. On CUDA the kernels of other fits fill the gaps of one that waits for the host; on a CPU fits share the cores.

    A fit is thousands of short products. Threads that meet after every one of them lose more time in waiting than they win, many times more
    where other processes want the cores too, so each fit keeps to its share of the threads; what it learns does not depend on their number,
    except where stages are refitted (`gsrq.refine`): the last bits of a Cholesky factor do.
    """
    if device.type != "cuda":
        threads = torch.get_num_threads()
        workers = min(STREAMS, threads, max(1, len(jobs)))
        torch.set_num_threads(threads // workers)  # what threads started from here on begin with
        try:
            with ThreadPoolExecutor(workers) as pool:
                list(pool.map(call, jobs))
        finally:
            torch.set_num_threads(threads)
        return

    def enter() -> None:
        torch.cuda.set_stream(torch.cuda.Stream(device))  # one per thread: memory is kept by stream, so a fit gets what the fit before it gave back

    def apart(job: tuple) -> None:
        call(job)
        torch.cuda.current_stream(device).synchronize()

    torch.linalg.cholesky(torch.eye(1, device=device))  # torch loads its linear algebra once, at first use, and not safely from several threads
    torch.cuda.synchronize(device)
    with ThreadPoolExecutor(STREAMS, initializer=enter) as pool:
        list(pool.map(apart, jobs))


def _rope(model, required: bool) -> Rope | None:
    try:
        rope = Rope(model)
    except Refusal:
        if required:
            raise
        return None
    if required:
        rope.check_undo()
    return rope


def _gather(model, samples, layers: range, groups, rope, batch_size: int) -> dict[int, dict[str, list[Tensor]]]:
    stats: dict[int, dict[str, list[Tensor]]] = {}
    for slots in record(model, samples, layers, groups, rope, batch_size):
        for slot in slots:
            mine = stats.setdefault(slot.index, {name: [] for name in ("key", "value", "query", "positions", "key_grads", "value_grads")})
            for name, x in zip(("key", "value", "query"), slot.seen):
                mine[name].append(x.transpose(0, 1).flatten(1, 2).cpu())
            mine["positions"].append(slot.positions.flatten().cpu())
            for name, grads in zip(("key_grads", "value_grads"), slot.grads):
                mine[name] += [] if grads is None else [grads]
    return stats


def _calibration(stats, kind: str, codec, layer: int, seed: int, rope, sample_length: int, device) -> Calibration:
    positions = torch.cat(stats["positions"]).to(device)
    x = torch.cat(stats[kind], dim=1).to(device, torch.float32)
    queries = torch.cat(stats["query"], dim=1).to(device, torch.float32) if kind == "key" else None
    if kind == "key" and codec.space == "pre":
        x, queries = (rope.unrotate(t[None], positions[None], layer)[0] for t in (x, queries))
    pairs, inv_freq = rope.pairs(layer) if rope is not None and kind == "key" else (None, None)
    grads = stats[f"{kind}_grads"]
    return Calibration(
        x=x, kind=kind, layer=layer, seed=seed, positions=positions, sample_length=sample_length, queries=queries,
        grads=torch.cat(grads).to(device) if grads else None, pairs=pairs, inv_freq=inv_freq,
    )
