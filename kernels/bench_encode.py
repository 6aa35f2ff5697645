"""Kernel-level latency of encoding: fp16 or bfloat16 keys and values of one layer to packed pages, a whole prompt and one token.

python -m kernels.bench_encode --out rows.parquet            needs torch, triton and pandas alone
One launch codes keys and values. Kernel "encode": a prompt from position 0; its bytes are the keys and values read. Kernel "encode_append":
one token behind a cache, lengths on the device, as in a graph of a decoding step; each layer of the graph has its own tables, pages and
token. All kernels are compiled first, in processes that run every cell once; codes are compared with the definition at both ends before
a time is taken, and a row says whether they were right.
"""

import argparse
import concurrent.futures
import itertools
import multiprocessing
import time

import pandas as pd
import torch

from kernels import encode, synthetic
from kernels.bench_paged import CACHES, COLD, DIM, rows_of
from kernels.pages import PAGE, Layout, Pages, Spec
from kernels.timing import measure

HEADS, TOKENS, BATCHES = [(16, 2), (32, 8)], 131072, (1, 16)
NAMES = [name for name in CACHES if name != "int4"]  # offsets are not the kernel's
TYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}
SLICE = 1024  # tokens at each end of a prompt that are compared
LAYERS, ROOM = 36, 16e9  # layers of a graph of appends, fewer where their pages would take more bytes
STRAY = 1e-3  # share of codes that may take the neighbouring level: values beside a threshold


def specs(name: str, kv: int, device: str = "cuda", dim: int = DIM) -> tuple[Spec, Spec]:
    """Specifications of keys and values of one cache, widths drawn as `kernels.bench_paged` draws them."""
    key, value, tile = CACHES[name]
    widths = key if isinstance(key, int) else synthetic.draw_widths(kv, dim // 2, key, 0.75, torch.Generator().manual_seed(0), tile)
    return tuple(synthetic.spec(kv, dim, w, device=device) for w in (widths, value))


def empty(spec: Spec, batch: int, tokens: int) -> Pages:
    """Pages with room for `tokens` tokens."""
    held = Pages(spec, Layout(spec))
    like = torch.empty(batch, len(spec.segments), 0, dtype=spec.stored, device=spec.levels.device)
    held.reserve(-(-tokens // PAGE), (batch, spec.heads), like)
    return held


def right(held: Pages, x: torch.Tensor, start: int, at: int = 0) -> bool:
    """Whether tokens x[:, :, at:] lie behind position `start` (a multiple of 32) of the pages as the definition codes them."""
    part = x[:, :, at:]
    codes, gains = encode.symbols(held.spec, part)
    found, sides = held.symbols(start, start + part.shape[2])
    distance = (found - codes).abs()
    # A neighbouring level moves the gain of its segment with it, the more the smaller the segment: gains are compared where all codes agree.
    same = torch.stack([(distance[:, s.head, :, s.start : s.start + s.size] == 0).all(-1) for s in held.spec.segments], 1)
    near = torch.isclose(sides.float(), gains.float(), rtol=2e-3, atol=1e-3) | ~same
    return bool(near.all()) and int(distance.max()) <= 1 and float(distance.float().mean()) <= STRAY


def prompt(name: str, kv: int, dtype: torch.dtype, tokens: int = TOKENS, timed: bool = True, device: str = "cuda", dim: int = DIM) -> dict:
    """Median, 5 % and 95 % of coding a prompt, with the bytes of keys and values it reads and whether its codes are right."""
    pair = specs(name, kv, device, dim)
    held, encoder = [empty(spec, 1, tokens) for spec in pair], encode.Encoder(*pair)
    size = 2 * kv * tokens * dim * dtype.itemsize
    sets = [[torch.randn(1, kv, tokens, dim, device=device, dtype=dtype) for _ in pair] for _ in range(max(1, round(COLD / size)) if timed else 1)]
    starts = torch.zeros(1, dtype=torch.int32, device=device)
    counts = torch.full_like(starts, tokens)
    call = lambda i: encoder.append(held, sets[i], starts, counts)  # noqa: E731
    call(0)
    last = max(0, tokens - SLICE) // PAGE * PAGE
    checked = all(right(h, x[:, :, :SLICE], 0) and right(h, x, last, last) for h, x in zip(held, sets[0]))
    return {"checked": checked, "bytes": size} | ({"times": measure(call, len(sets))} if timed else {})


def token(name: str, kv: int, dtype: torch.dtype, batch: int, tokens: int = TOKENS, timed: bool = True, device: str = "cuda", dim: int = DIM) -> dict:
    """The same for one token of each sequence behind `tokens` held, a multiple of 32: microseconds per layer of a graph of layers."""
    pair = specs(name, kv, device, dim)
    first = [empty(spec, batch, tokens + 1) for spec in pair]
    size = sum(x.numel() * x.element_size() for pages in first for x in (pages.words, pages.sides))
    count = max(1, min(LAYERS, int(ROOM / size))) if timed else 1
    layers = [first] + [[empty(spec, batch, tokens + 1) for spec in pair] for _ in range(count - 1)]
    encoders = [encode.Encoder(*pair) for _ in layers]
    xs = [[torch.randn(batch, kv, 1, dim, device=device, dtype=dtype) for _ in pair] for _ in layers]
    starts = torch.full((batch,), tokens, dtype=torch.int32, device=device)
    ones = torch.ones_like(starts)
    call = lambda i: encoders[i].append(layers[i], xs[i], starts, ones)  # noqa: E731
    call(0)
    checked = all(right(pages, x, tokens) for pages, x in zip(first, xs[0]))
    return {"checked": checked} | ({"times": measure(call, len(layers))} if timed else {})


def compiled(cell: tuple[str, tuple[int, int], str]) -> tuple:
    """In a process of its own: run the kernels of a cell once, so that they are compiled; whether their codes were right."""
    name, (_, kv), kind = cell
    try:
        return cell, prompt(name, kv, TYPES[kind], timed=False)["checked"], *(token(name, kv, TYPES[kind], b, timed=False)["checked"] for b in BATCHES)
    except Exception as reason:  # told here, and again by the timed cell
        return cell, type(reason).__name__, str(reason)[:200]


def rows(cell: tuple[str, tuple[int, int], str]) -> list[dict]:
    """All rows of one cell: its prompt, and one token at every batch size."""
    name, (heads, kv), kind = cell
    common = {"program": "kernels.bench_encode"}
    found = rows_of("encode", f"{name} {kind}", (heads, kv, 1, TOKENS), prompt(name, kv, TYPES[kind]), **common)
    for batch in BATCHES:
        torch.cuda.empty_cache()
        found += rows_of("encode_append", f"{name} {kind}", (heads, kv, batch, TOKENS), token(name, kv, TYPES[kind], batch), **common)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", required=True, help="parquet file for the rows")
    parser.add_argument("--only", nargs="*", choices=NAMES, default=NAMES)
    parser.add_argument("--types", nargs="*", choices=list(TYPES), default=list(TYPES))
    parser.add_argument("--jobs", type=int, default=16, help="processes that compile")
    options = parser.parse_args()
    cells, made, begun = list(itertools.product(options.only, HEADS, options.types)), [], time.time()
    with concurrent.futures.ProcessPoolExecutor(min(options.jobs, len(cells)), multiprocessing.get_context("spawn")) as pool:
        for answer in pool.map(compiled, cells):
            print(*answer, flush=True)
    print(f"compiled in {time.time() - begun:.0f} s", flush=True)
    for cell in cells:
        try:
            new = rows(cell)
        except Exception as reason:  # a cell that fails has no row, and says so
            print(*cell, type(reason).__name__, str(reason)[:200], flush=True)
            continue
        for row in new:
            if row["metric"] in ("time", "rate"):
                told = f"{row['median']:.1f} {row['unit']} [{row['p5']:.1f}, {row['p95']:.1f}]"
                print(row["kernel"], row["provider"], row["shape"], told, "" if row["checked"] else "WRONG CODES", flush=True)
        made += new
        pd.DataFrame(made).to_parquet(options.out)  # after every cell: a crash loses one


if __name__ == "__main__":
    main()
