"""Kernel-level latency of FlashInfer's decode attention from fp16 and fp8 caches: rows that stand beside those of `kernels.bench_paged`.

python -m kernels.bench_flashinfer --out rows.parquet            needs flashinfer-python besides torch, triton and pandas
Shapes, cold caches, graph replays and spreads are those of bench_paged. Every call that serves one token per sequence on Hopper is timed with both
orders of a page's axes: single_decode_with_kv_cache, BatchDecodeWithPagedKVCacheWrapper (lengths that may change under the graph, or, "fixed", planned
for these lengths alone) and XQA; the fastest of them is the baseline. plan() runs before the capture, run() in it. Scales of fp8 caches are 1, so that
no kernel scales an output, and pages lie in order. Every output is compared with attention in float32 before its time is taken.
"""

import argparse
from collections.abc import Callable, Iterable, Iterator
from types import ModuleType
from typing import NamedTuple

import pandas as pd
import torch
from torch import Tensor

from kernels.attention import attend
from kernels.bench_paged import COLD, DIM, LIMIT, SHAPES, rows_of
from kernels.timing import measure

PRECISIONS = {"fp16": torch.float16, "fp8": torch.float8_e4m3fn}
CALLS = {"single": (0,), "single tensor cores": (0,), "batch": (16, 64), "batch tensor cores": (16, 64), "batch fixed": (64,),
         "batch tensor cores fixed": (64,), "xqa": (64, 128)}  # fmt: skip
"""Ways to call FlashInfer to tokens per page; 0 is a cache that is not paged. Left out: FA3, whose tile has 128 queries of one head, so that a group's
keys are read once per head and nothing is split over keys (FlashInfer chooses FA2 for decoding itself), and cuDNN, which bench_paged times."""
XQA_LIMIT = 6e-2  # XQA reads an fp8 cache with fp8 products: queries and weights are rounded to 3 bits as well, 2.6 % each
WORKSPACE = 2**28  # bytes; FlashInfer recommends half of it


class Variant(NamedTuple):
    """A call, tokens per page, and the order of a page's axes: tokens before heads (NHD) or heads before tokens (HND)."""

    call: str
    page: int
    layout: str

    def name(self, precision: str) -> str:
        return f"flashinfer {precision}, {self.call} {self.layout}" + (f" page {self.page}" if self.page else "")


def variants(batch: int, calls: Iterable[str] = CALLS) -> Iterator[Variant]:
    """Those of `calls` that serve this batch: a cache without pages is one sequence."""
    for call in calls:
        if batch == 1 or not call.startswith("single"):
            yield from (Variant(call, page, layout) for page in CALLS[call] for layout in ("NHD", "HND"))


def package() -> ModuleType:
    """The package; exits with a sentence where it is not installed."""
    try:
        import flashinfer
    except ImportError as reason:
        message = "FlashInfer cannot be imported ({}): install it with `pip install flashinfer-python`; it compiles its kernels with nvcc at the first call."
        raise SystemExit(message.format(reason)) from reason
    return flashinfer


def paged(flat: Tensor, variant: Variant, batch: int, tokens: int) -> Tensor:
    """Elements [batch, tokens * kv * DIM] in the shape that the call takes, one page per sequence where it has none: [pages, page, kv, DIM] or [pages, kv, page, DIM]."""
    page = variant.page or tokens
    if tokens % page:
        raise ValueError(f"{tokens} tokens are not whole pages of {page}: choose a multiple.")
    kv = flat[0].numel() // tokens // DIM
    return flat.view(batch * tokens // page, *((page, kv) if variant.layout == "NHD" else (kv, page)), DIM)


def dense(pages: Tensor, layout: str, batch: int) -> Tensor:
    """The same elements as [batch, kv, tokens, DIM]."""
    pages = pages.transpose(1, 2) if layout == "NHD" else pages  # [pages, kv, page, DIM]
    return pages.unflatten(0, (batch, -1)).transpose(1, 2).flatten(2, 3)


def attention(flashinfer: ModuleType, variant: Variant, query: Tensor, sets: list[tuple[Tensor, Tensor]], tokens: int, workspace: Tensor) -> Callable[[int], Tensor]:
    """call(i): attention of query [B, Hq, DIM] over sets[i], keys and values as `paged` gives them; workspace: `WORKSPACE` bytes of zeros."""
    (call, page, layout), (batch, heads, dim), key = variant, query.shape, sets[0][0]
    if call.startswith("single"):
        tensor_cores = "tensor cores" in call
        return lambda i: flashinfer.single_decode_with_kv_cache(query[0], sets[i][0][0], sets[i][1][0], kv_layout=layout, use_tensor_cores=tensor_cores)[None]
    count = tokens // page
    table = torch.arange(batch * count, dtype=torch.int32, device=query.device)
    if call == "xqa":
        lengths = torch.full((batch,), tokens, dtype=torch.int32, device=query.device).view(torch.uint32)
        options = {"bmm1_scale": dim**-0.5, "bmm2_scale": 1.0, "kv_layout": layout}
        return lambda i: flashinfer.decode.xqa_batch_decode_with_kv_cache(query, sets[i], workspace, table.view(batch, count), lengths, tokens, **options)
    begin, last = torch.arange(0, batch * count + 1, count, dtype=torch.int32), torch.full((batch,), page, dtype=torch.int32)
    held = {"paged_kv_indptr_buffer": begin, "paged_kv_indices_buffer": table, "paged_kv_last_page_len_buffer": last}
    held = {} if call.endswith("fixed") else {"use_cuda_graph": True, **{name: x.to(query.device, copy=True) for name, x in held.items()}}
    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(workspace, layout, use_tensor_cores="tensor cores" in call, **held)
    wrapper.plan(begin, table, last, heads, key.shape[2 if layout == "NHD" else 1], dim, page, q_data_type=query.dtype, kv_data_type=key.dtype)
    return lambda i: wrapper.run(query, sets[i])


def results(flashinfer: ModuleType, precision: str, calls: Iterable[str], shape: tuple[int, int, int, int], device: str = "cuda") -> Iterator[tuple[Variant, dict | Exception]]:
    """Variants and what `rows_of` takes, or why FlashInfer does not serve this shape so."""
    heads, kv, batch, tokens = shape
    dtype = PRECISIONS[precision]
    size = 2 * batch * kv * tokens * DIM * dtype.itemsize
    count = max(1, min(40, round(COLD / size)))
    flat = [[torch.randn(batch, tokens * kv * DIM, device=device, dtype=torch.float16).to(dtype) for _ in range(2)] for _ in range(count)]
    query = torch.randn(batch, heads, DIM, device=device, dtype=torch.float16)
    for variant in variants(batch, calls):
        sets = [tuple(paged(x, variant, batch, tokens) for x in pair) for pair in flat]
        try:
            workspace = torch.zeros(WORKSPACE, dtype=torch.uint8, device=device)  # XQA's semaphores begin at 0
            call = attention(flashinfer, variant, query, sets, tokens, workspace)
            theirs = attend(query, *(dense(x, variant.layout, batch) for x in sets[0]), DIM**-0.5)[0].double()
            off = float((call(0).double() - theirs).norm() / theirs.norm())
            if not off <= (XQA_LIMIT if (variant.call, precision) == ("xqa", "fp8") else LIMIT):
                raise ArithmeticError(f"wrong output, off by {off:.1e}")
            yield variant, {"times": measure(call, count), "bytes": size, "checked": True, "off": off}
        except Exception as reason:  # what FlashInfer does not serve, or serves wrongly, is no baseline: it has no row, and the log says why
            yield variant, reason


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", required=True, help="parquet file for the rows")
    parser.add_argument("--only", nargs="*", default=list(PRECISIONS), choices=list(PRECISIONS))
    parser.add_argument("--calls", nargs="*", default=list(CALLS), choices=list(CALLS))
    parser.add_argument("--shapes", nargs="*", type=int, default=range(len(SHAPES)), help="indices into the list of shapes of bench_paged")
    options, rows, flashinfer = parser.parse_args(), [], package()
    for index in options.shapes:
        for precision in options.only:
            torch.cuda.empty_cache()
            for variant, result in results(flashinfer, precision, options.calls, SHAPES[index]):
                name = variant.name(precision)
                if isinstance(result, Exception):
                    print(*SHAPES[index], name, type(result).__name__, str(result)[:300], flush=True)
                    continue
                found = rows_of("decode_attention", name, SHAPES[index], result, "kernels.bench_flashinfer")
                found += [{**found[0], "metric": "relative error", "unit": "1", **dict.fromkeys(("median", "p5", "p95"), result["off"])}]
                rows += [{**row, "flashinfer": flashinfer.__version__} for row in found]
                median, low, high = result["times"]
                print(*SHAPES[index], name, f"{median:.1f} us [{low:.1f}, {high:.1f}] {result['bytes'] / median / 1e6:.2f} TB/s, off by {result['off']:.1e}", flush=True)
            pd.DataFrame(rows).to_parquet(options.out)


if __name__ == "__main__":
    main()
