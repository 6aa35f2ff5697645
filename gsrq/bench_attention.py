"""Decode attention over residual codes beside fp16: one layer by context and by batch, and whole steps that fill the same memory.

Every output is compared with the definition before it is timed; what differs by more than `TOLERANCE` gets no time. Table entries are
Gaussian and codes uniform, which is what a cache of a well-used codebook looks like to a gather.
"""

import functools
import math
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from kernels import attention, lookup, lookup_bound_triton, lookup_direct_triton, rvq
from kernels.timing import measure

DEVICE = "cuda"
HEADS, QUERIES, DIM, LAYERS = 8, 32, 128, 32  # Llama-3-8B
HIDDEN, INNER, VOCABULARY = 4096, 14336, 128256
MEMORY = 100e9  # bytes that cache and codebooks of a whole model may fill
TOKENS = 2000  # of the comparison with the definition
TOLERANCE = 3e-3  # relative; float16 sums of stages give 3e-4
KERNELS = {"bound": lookup_bound_triton, "direct": lookup_direct_triton}
BACKENDS = {"fp16 flash": SDPBackend.FLASH_ATTENTION, "fp16 cudnn": SDPBackend.CUDNN_ATTENTION}
WORKERS = 12  # processes that compile


class Case(NamedTuple):
    """A way to code a head; `shared`: one table for all pieces, strided keys, codes by heads and a size per token, as VQLLM has; `post`: keys after RoPE."""

    piece: int
    stages: int
    dtype: torch.dtype = torch.float16
    shared: bool = False
    post: bool = False

    @property
    def name(self) -> str:
        """As rows call it."""
        width = {torch.float16: "fp16", torch.float8_e4m3fn: "fp8"}[self.dtype]
        kind = ("shared " if self.shared else "") + ("after RoPE " if self.post else "")
        return f"codes {kind}{8 * self.stages / self.piece:g} bit d{self.piece} {width} tables"

    def rotation(self, inv_freq: Tensor, base: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """What the kernel is told of RoPE."""
        return (None, None) if self.post else (inv_freq, base)

    def tables(self) -> Tensor:
        """Entries [pieces, stages, 256, piece] of one tensor of one layer."""
        pieces = HEADS * DIM // self.piece
        drawn = 0.3 * torch.randn(1 if self.shared else pieces, self.stages, 256, self.piece, device=DEVICE)
        return drawn.to(self.dtype).expand(pieces, -1, -1, -1)

    def coded(self, tables: Tensor, batch: int, tokens: int, strided: bool = False) -> lookup.Coded:
        """Codes drawn at random, token-major as the cache keeps them."""
        strips = HEADS if self.shared else 1
        codes = torch.randint(0, 256, (batch, strips, tokens, HEADS * DIM // self.piece * self.stages // strips), dtype=torch.uint8, device=DEVICE).mT
        sizes = torch.rand(batch, HEADS, tokens, device=DEVICE).half() + 0.5 if self.shared else None
        return lookup.Coded(codes, tables, sizes, self.shared and strided)

    def pair(self, batch: int, tokens: int, tables: tuple[Tensor, Tensor] | None = None) -> tuple[lookup.Coded, lookup.Coded]:
        """Keys and values, with tables of their own unless given."""
        keys, values = tables or (self.tables(), self.tables())
        return self.coded(keys, batch, tokens, strided=True), self.coded(values, batch, tokens)


FP8 = torch.float8_e4m3fn
CASES = (Case(128, 16), Case(128, 16, FP8), Case(128, 12, FP8), Case(64, 8, FP8), Case(32, 4), Case(32, 4, FP8), Case(32, 3, FP8),
         Case(128, 16, FP8, post=True), Case(32, 4, FP8, post=True), Case(32, 3, FP8, post=True),
         Case(32, 4, shared=True), Case(8, 1))  # the last two: VQLLM and CQ  # fmt: skip
FULL = (Case(32, 4, FP8), Case(32, 3, FP8), Case(32, 4, FP8, post=True), Case(32, 3, FP8, post=True), Case(128, 16, FP8), Case(128, 16))  # of whole steps


def inputs(batch: int) -> tuple[Tensor, Tensor, Tensor]:
    """Query [B, 32, 128], radians per token, and the position of the first token of each sequence."""
    inv_freq = 5e5 ** (-torch.arange(0, DIM, 2, device=DEVICE) / DIM)
    return torch.randn(batch, QUERIES, DIM, device=DEVICE).half(), inv_freq, torch.zeros(batch, dtype=torch.int32, device=DEVICE)


def warm(case: Case, name: str) -> str | None:
    """Compile one kernel for one case in a process of its own; what went wrong, or None."""
    try:
        query, inv_freq, base = inputs(1)
        for tokens in (1024, 4096):
            KERNELS[name].attend(query, *case.pair(1, tokens), tokens, DIM**-0.5, *case.rotation(inv_freq, base))
        torch.cuda.synchronize()
    except Exception as error:
        return f"{type(error).__name__}: {str(error)[:200]}"
    return None


@functools.cache
def verified(box, cases: tuple[Case, ...] = CASES, names: tuple[str, ...] = tuple(KERNELS)) -> list[tuple[Case, str]]:
    """Pairs of case and kernel that compile, in parallel, and agree with the definition on ragged rows and in the middle of a text."""
    wanted = [(case, name) for case in cases for name in names]
    with ProcessPoolExecutor(WORKERS, mp_context=multiprocessing.get_context("spawn")) as pool:
        found = list(pool.map(warm, *zip(*wanted)))
    good = []
    for (case, name), problem in zip(wanted, found, strict=True):
        problem = problem or _difference(box, case, name)
        if problem is None:
            good.append((case, name))
        else:
            print(f"{case.name}, {name}: not timed: {problem}", flush=True)
    return good


def _difference(box, case: Case, name: str) -> str | None:
    tokens, scale = TOKENS, DIM**-0.5
    query, inv_freq, _ = inputs(2)
    base, first = torch.tensor([5, 40000], dtype=torch.int32, device=DEVICE), torch.tensor([0, tokens // 3], device=DEVICE)
    keys, values = case.pair(2, tokens + 16)
    key, value = (lookup.rebuild(coded, HEADS, tokens) for coded in (keys, values))
    key = key if case.post else lookup.rotate(key, inv_freq, base)
    expected = attention.attend(query, key, value, scale, first)
    try:
        ours = KERNELS[name].attend(query, keys, values, tokens, scale, *case.rotation(inv_freq, base), first)
    except Exception as error:
        return f"{type(error).__name__}: {str(error)[:200]}"
    off = max(((a - b).norm() / b.norm()).item() for a, b in zip(ours, expected, strict=True))
    box.note("decode_attention", f"{case.name}, {name}", f"q{QUERIES} kv{HEADS} d{DIM} b2 t{tokens}", "difference from the definition", "relative", off)
    return None if off < TOLERANCE else f"outputs differ by {off:.2g}"


def _exact(box, shape: str, batch: int, tokens: int, sets: int) -> None:
    query = torch.randn(batch, QUERIES, DIM, device=DEVICE).half()
    caches = [torch.randn(2, batch, HEADS, tokens, DIM, device=DEVICE, dtype=torch.float16) for _ in range(sets)]
    for name, backend in BACKENDS.items():
        with sdpa_kernel(backend):
            box.note("decode_attention", name, shape, "time", "us", measure(lambda i: scaled_dot_product_attention(query[:, :, None], *caches[i], enable_gqa=True), sets))


def grid(box, shapes: list[tuple[int, int]]) -> None:
    """One query per sequence for each (batch, tokens), sets of inputs in turn so that none stays in L2; fp16 in the same run."""
    pairs = verified(box)
    for batch, tokens in shapes:
        shape = f"q{QUERIES} kv{HEADS} d{DIM} b{batch} t{tokens}"
        sets = max(2, min(16, 2 * 131072 // (batch * tokens)))
        box.spend(_exact, box, shape, batch, tokens, sets)
        query, inv_freq, base = inputs(batch)
        for case, name in pairs:

            def one(case=case, name=name, batch=batch, tokens=tokens, query=query, inv_freq=inv_freq, base=base, sets=sets, shape=shape):
                held = [case.pair(batch, tokens) for _ in range(sets)]
                run = lambda i: KERNELS[name].attend(query, *held[i], tokens, DIM**-0.5, *case.rotation(inv_freq, base))  # noqa: E731
                box.note("decode_attention", f"{case.name}, {name}", shape, "time", "us", measure(run, sets))

            box.spend(one)


def contexts(box) -> None:
    """Batch 1 by context."""
    grid(box, [(1, 131072), (1, 32768), (1, 8192)])


def batches(box) -> None:
    """1K context by batch."""
    grid(box, [(64, 1024), (256, 1024), (16, 1024), (1, 1024)])


class Step:
    """The rest of a decoding step: real-shape random weights of all layers, so that a step reads 16 GB of them."""

    def __init__(self):
        def draw(rows, columns):
            return torch.randn(rows, columns, device=DEVICE, dtype=torch.float16) / math.sqrt(rows)

        both = QUERIES * DIM + 2 * HEADS * DIM
        shapes = ((HIDDEN, both), (QUERIES * DIM, HIDDEN), (HIDDEN, 2 * INNER), (INNER, HIDDEN))
        self.layers = [[draw(*shape) for shape in shapes] for _ in range(LAYERS)]
        self.head = draw(HIDDEN, VOCABULARY)

    def __call__(self, x: Tensor, attend) -> Tensor:
        """x [B, HIDDEN] to scores of the vocabulary; attend(layer, query, key, value) [B, 32, 128] is one layer's attention with its append."""
        for layer, (into, back, up, down) in enumerate(self.layers):
            query, key, value = (x @ into).split([QUERIES * DIM, HEADS * DIM, HEADS * DIM], -1)
            x = x + attend(layer, query.view(-1, QUERIES, DIM), key, value).flatten(1).half() @ back
            x = torch.nn.functional.rms_norm(x, (HIDDEN,))
            gate, wide = (x @ up).chunk(2, -1)
            x = torch.nn.functional.rms_norm(x + (torch.nn.functional.silu(gate) * wide) @ down, (HIDDEN,))
        return x @ self.head


def memory(box, tokens: int = 32768) -> None:
    """Tokens per second of whole steps, graphed, at as many sequences of `tokens` tokens as MEMORY holds; caches of two layers serve all in turn."""
    step, two = Step(), 2
    per = LAYERS * 2 * HEADS * tokens * DIM

    def row(provider: str, batch: int, attend) -> None:
        x = torch.randn(batch, HIDDEN, device=DEVICE).half()
        shape = f"q{QUERIES} kv{HEADS} d{DIM} b{batch} t{tokens}"
        median, low, high = (1e-3 * t for t in measure(lambda i: step(x, attend), 1, replays=5))
        box.note("decode_step", provider, shape, "time", "ms", (median, low, high))
        box.note("decode_step", provider, shape, "throughput at equal memory", "tokens/s", tuple(1e3 * batch / t for t in (median, high, low)))

    def exact(name: str, backend) -> None:
        batch = int(MEMORY // (2 * per))
        caches = [torch.randn(2, batch, HEADS, tokens, DIM, device=DEVICE, dtype=torch.float16) for _ in range(two)]

        def attend(layer, query, key, value):
            held = caches[layer % two]
            held[0, :, :, -1], held[1, :, :, -1] = key.view(-1, HEADS, DIM), value.view(-1, HEADS, DIM)
            return scaled_dot_product_attention(query[:, :, None], *held, enable_gqa=True)[:, :, 0]

        with sdpa_kernel(backend):
            row(name, batch, attend)

    def coded(case: Case, name: str) -> None:
        tables = [(case.tables(), case.tables()) for _ in range(two)]
        beside = LAYERS * sum(t.numel() * t.element_size() for t in tables[0])
        batch = int((MEMORY - beside) // (per * case.stages / case.piece))
        held = [case.pair(batch, tokens, pair) for pair in tables]
        _, inv_freq, base = inputs(batch)

        def attend(layer, query, key, value):
            for x, each in zip((key, value), held[layer % two]):
                codes = rvq.encode(x.view(len(x), -1, case.piece).transpose(0, 1), each.tables)
                each.codes[:, 0, :, -1] = codes.transpose(0, 1).flatten(1)
            return KERNELS[name].attend(query.contiguous(), *held[layer % two], tokens, DIM**-0.5, *case.rotation(inv_freq, base))[0]

        row(f"{case.name}, {name}", batch, attend)

    for name, backend in BACKENDS.items():
        box.spend(exact, name, backend)
    for case, name in verified(box, FULL, ("direct",)):
        box.spend(coded, case, name)
