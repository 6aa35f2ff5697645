"""GSRQ (arXiv 2607.01065): pieces x residual stages of gain-shape codebooks over the concatenated KV heads of a token.

Stored bits per value = stages * log2(entries) / piece; codebooks are [pieces, stages, entries, piece] in fp16 or fp8, per layer and per K/V.
"""

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from gsrq.fused import fuse
from gsrq.gskm import gskm
from gsrq.refine import refit
from gsrq.weights import KINDS, weigh
from kernels import bitpack, rvq
from kernels.kmeans import Clustering
from kernels.lookup_pair import split_half

PIECE = 128  # one head of the paper's models
CODEBOOKS = {"float16": torch.float16, "float8": torch.float8_e4m3fn}  # what entries are stored in, in units of a power of two near the data's rms
LONG_PIECE = {0.375: 256}  # the paper's sub-half-bit point: two neighbouring heads, 12 stages
GRAD_GROUP = 8  # divides every head dimension in use; gradients are summed to pieces in `gsrq.weights`


class GSRQ(nn.Module):
    """Gain-shape residual quantizer for one layer's keys or values, [B, H, T, D].

    bits: stored bits per value. piece, stages: dimension D of a piece and residual stages R; chosen from `bits` when None
    (D = 128, R = 16 * bits at 256 entries; .375 bit: D = 256, R = 12, as in the paper). If all heads together are narrower than a
    piece, the piece is the whole width, with stages for the same bits. entries: K, a power of two.
    cluster: the clustering primitive, called as cluster(x [M, N, D], entries, weights [M, N] or None, generator=...).
    weights: log, raw or none (log and raw need gradients); tau: strength of the log weights. beam: partial sums kept while encoding.
    refine: joint refits of all stages after stage-wise training (`gsrq.refine`, ours; 0 in the paper).
    codebook: what entries are stored in, float16 (the paper) or float8 (ours: e4m3, half the bytes beside the codes). Rounding happens inside
    the fit, so every stage absorbs the rounding of the stages before it.
    space: whether keys are coded before ("pre") or after ("post") RoPE. Raises ValueError with the valid choices.
    After :meth:`fit`, `log` holds one dict per stage (rounds, re-seeded entries, relative error, occupancy entropy, per piece).
    """

    block = 1

    def __init__(
        self,
        bits: float,
        *,
        piece: int | None = None,
        stages: int | None = None,
        entries: int = 256,
        cluster: Callable[..., Clustering] = gskm,
        weights: str = "none",
        tau: float = 1.0,
        beam: int = 1,
        refine: int = 0,
        codebook: str = "float16",
        space: str = "pre",
        seed: int = 0,
    ):
        super().__init__()
        if entries < 2 or entries > 65536 or entries & (entries - 1):
            raise ValueError(f"entries={entries} must be a power of two from 2 to 65536, so that a code takes whole bits.")
        if weights not in KINDS:
            raise ValueError(f"weights={weights!r} is unknown; choose log, raw or none.")
        if not 1 <= beam <= 64:
            raise ValueError(f"beam={beam} must be an integer from 1 (greedy) to 64.")
        if space not in ("pre", "post"):
            raise ValueError(f"space={space!r} is unknown; choose pre or post.")
        if codebook not in CODEBOOKS:
            raise ValueError(f"codebook={codebook!r} is unknown; choose {' or '.join(CODEBOOKS)}.")
        if refine < 0 or refine != int(refine):
            raise ValueError(f"refine={refine} must be a whole number of rounds from 0 on.")
        if tau <= 0:
            raise ValueError(f"tau={tau} must be positive.")
        self.code_bits = entries.bit_length() - 1
        self.piece, self.stages = _shape(float(bits), piece, stages, self.code_bits)
        self.nominal, self.entries, self.cluster, self.weights, self.tau = float(bits), entries, cluster, weights, tau
        self.beam, self.refine, self.space, self.seed, self.dtype = beam, int(refine), space, seed, CODEBOOKS[codebook]
        self.grad_group = None if weights == "none" else math.gcd(GRAD_GROUP, self.piece)
        self.log: list[dict[str, list[float]]] = []
        self.register_buffer("codebooks", None)  # [M, R, K, D] fp16 or fp8, in units of `scale`
        self.register_buffer("scale", None)  # [] float32, a power of two
        self.register_buffer("heads", None)  # [] int32
        self.register_buffer("inv_freq", None)  # [head_dim / 2] radians per token, for keys that RoPE turns in split halves

    @property
    def bits(self) -> float:
        """Stored bits per value: packed codes of a token over its values; valid after :meth:`fit`."""
        pieces, stages, _, width = self._tables().shape
        return 8 * bitpack.packed_bytes(pieces * stages, self.code_bits) / (pieces * width)

    def check(self, heads: int, head_dim: int) -> tuple[int, int]:
        """Piece and stages used for this shape; raises ValueError, naming what would work, if the budget cannot be met."""
        width = heads * head_dim
        if self.grad_group and width % self.grad_group:
            raise ValueError(f"{heads} heads of {head_dim} are not a multiple of {self.grad_group}, which gradient weights need; use weights='none'.")
        if width % self.piece == 0:
            return self.piece, self.stages
        if width > self.piece:
            fits = [p for p in range(8, width + 1) if width % p == 0 and (self.nominal * p / self.code_bits).is_integer()]
            raise ValueError(f"{heads} heads of {head_dim} do not divide into pieces of {self.piece}; for {self.nominal} bits, piece can be one of {fits}.")
        stages = self.nominal * width / self.code_bits
        if not stages.is_integer():
            choices = ", ".join(f"{r * self.code_bits / width:g}" for r in range(1, 8 * width // self.code_bits + 1))
            raise ValueError(f"{heads} heads of {head_dim} with {self.entries} entries cannot be coded at {self.nominal} bits; reachable are {choices}.")
        return width, int(stages)

    @torch.no_grad()
    def fit(self, calibration) -> "GSRQ":
        """Learn all stages in order, each on the residual that the stored entries of the earlier ones leave, with the same weights.

        calibration.x [H, N, D] float32; calibration.grads if the weights need them. Raises ValueError for non-finite values or N < K.
        """
        heads, n, head_dim = calibration.x.shape
        piece, stages = self.check(heads, head_dim)
        x = calibration.x.float()
        _finite(x, "calibration vectors")
        if n < self.entries:
            raise ValueError(f"{self.entries} entries need at least {self.entries} calibration vectors, got {n}.")
        self.scale = _power_of_two(x.square().mean().sqrt())
        self.heads = torch.tensor(heads, dtype=torch.int32, device=x.device)
        whole = _cut((x / self.scale)[None], piece)
        rest = whole.clone() if self.refine else whole
        weights = weigh(calibration.grads, rest.shape[0], self.weights, self.tau) if self.weights != "none" else None
        if weights is not None:
            weights = weights.to(x.device)
        turned = _split_half(calibration.pairs, calibration.inv_freq, head_dim)
        self.inv_freq = None if turned is None else turned.to(x.device)
        # One stream of draws per (layer, key or value), so that codecs of one seed do not share their starts.
        generator = torch.Generator().manual_seed((self.seed * 4096 + calibration.layer) * 2 + (calibration.kind == "value"))
        energy = rest.square().sum((1, 2))
        self.log, books = [], []
        for _ in range(stages):
            found = self.cluster(rest, self.entries, weights, generator=generator)
            books.append(_stored(found.entries, self.dtype))
            table = books[-1].float()
            labels = rvq.encode(rest, books[-1][:, None])[..., 0]
            rest -= rvq.rows_of(table, labels)
            self.log.append(
                {
                    "rounds": [len(path) - 1 for path in found.objective],
                    "reseeded": found.reseeded,
                    "error": (rest.square().sum((1, 2)) / energy.clamp_min(1e-30)).tolist(),
                    "entropy": _entropy(labels, self.entries),
                }
            )
        self.codebooks = torch.stack(books, 1)
        for _ in range(self.refine):
            self.codebooks = _stored(refit(whole, weights, self.codebooks, self.beam), self.dtype)
        return self

    def adopt(self, finer: dict[str, Tensor]) -> bool:
        """Take the first stages from the buffers of a finer fit with the same options; False if it has too few or other pieces.

        Stages are learned in order, so these are the very codebooks that `fit` would return; refits are not, and are never cut.
        """
        if self.refine:
            return False
        books, heads = finer["codebooks"], int(finer["heads"])
        piece, stages = self.check(heads, books.shape[0] * books.shape[3] // heads)
        if books.shape[3] != piece or books.shape[1] < stages:
            return False
        self.codebooks, self.scale, self.heads = books[:, :stages].contiguous(), finer["scale"], finer["heads"]
        self.inv_freq = finer.get("inv_freq")
        return True

    @property
    def head_dim(self) -> int:
        """Channels of a head; valid after :meth:`fit`."""
        pieces, _, _, width = self._tables().shape
        return pieces * width // int(self.heads)

    def fuse(self, value: nn.Module):
        """What attends over packed codes of these keys and the values of `value`, or None (`gsrq.fused`)."""
        return fuse(self, value)

    @torch.no_grad()
    def encode(self, x: Tensor) -> dict[str, Tensor]:
        """Codes {"codes": uint8 [B, 1, T, pieces * stages * log2(entries) / 8]} of x [B, H, T, D]; raises ValueError if x is not finite.

        A token's codes do not depend on its neighbours, up to float32 rounding of matrix products of different sizes at exact ties.
        """
        _finite(x, "vectors to encode")
        return self.encode_unchecked(x)

    @torch.no_grad()
    def encode_unchecked(self, x: Tensor) -> dict[str, Tensor]:
        """:meth:`encode` without a look at the values: nothing comes back to the host, so a CUDA graph can hold it."""
        tables = self._tables()
        codes = rvq.encode(_cut(x.float() / self.scale, tables.shape[-1]), tables, self.beam)  # [M, B*T, R]
        codes = codes.transpose(0, 1).reshape(x.shape[0], 1, x.shape[2], tables.shape[0] * tables.shape[1])  # piece-major, stages inside
        return {"codes": bitpack.pack(codes, self.code_bits)}

    @torch.no_grad()
    def decode(self, codes: dict[str, Tensor]) -> Tensor:
        """Sum of the coded entries, float32 [B, H, T, D]."""
        tables = self._tables()
        pieces, stages, _, piece = tables.shape
        packed = codes["codes"]
        batch, _, time, _ = packed.shape
        index = bitpack.unpack(packed, self.code_bits, pieces * stages).view(batch * time, pieces, stages)
        x = rvq.decode(index.transpose(0, 1), tables) * self.scale  # [M, B*T, D]
        return x.transpose(0, 1).reshape(batch, time, int(self.heads), self.head_dim).transpose(1, 2)

    @torch.no_grad()
    def trace(self, x: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Per stage, for x [B, H, T, D]: what it was given and what it added, both [M, B*T, piece] float32, and its codes [M, B*T]."""
        tables = self._tables()
        rest = _cut(x.float() / self.scale, tables.shape[-1])
        codes = rvq.encode(rest, tables, self.beam)
        for stage in range(tables.shape[1]):
            entry = rvq.rows_of(tables[:, stage], codes[..., stage])
            yield rest * self.scale, entry * self.scale, codes[..., stage]
            rest = rest - entry

    def _tables(self) -> Tensor:
        if self.codebooks is None:
            raise RuntimeError("GSRQ has no codebooks yet: call fit or restore its buffers first.")
        return self.codebooks


def _shape(bits: float, piece: int | None, stages: int | None, code_bits: int) -> tuple[int, int]:
    if not 0 < bits <= 8:
        raise ValueError(f"bits={bits:g} must be above 0 and at most 8.")
    if piece is None and stages is not None:
        whole = stages * code_bits / bits
        if not math.isclose(whole, round(whole)):
            raise ValueError(f"bits={bits:g} with stages={stages} would need pieces of {whole:g} values; stages * {code_bits} / bits must be whole.")
        return round(whole), stages
    piece = LONG_PIECE.get(bits, PIECE) if piece is None else piece
    if piece < 1:
        raise ValueError(f"piece={piece} must be at least 1.")
    exact = bits * piece / code_bits
    if not exact.is_integer() or exact < 1:
        step = code_bits / piece
        near = [f"{step * r:g}" for r in (math.floor(exact), math.ceil(exact)) if r]
        paper = "; the paper has 0.375, 0.75, 1 and 2" if (code_bits, piece) == (8, PIECE) else ""
        raise ValueError(
            f"bits={bits:g} is not reachable: with {2**code_bits} entries and pieces of {piece} it must be a multiple of {step:g} (nearest: {' and '.join(near)}){paper}."
        )
    if stages is not None and stages != exact:
        raise ValueError(f"piece={piece} with stages={stages} is {stages * code_bits / piece:g} bits, but bits={bits:g} asks for {int(exact)} stages.")
    return piece, int(exact)


def _cut(x: Tensor, piece: int) -> Tensor:
    # [B, H, T, D] -> [M, B*T, piece]: heads of a token side by side, then contiguous channels
    batch, heads, time, width = x.shape
    return x.transpose(1, 2).reshape(batch * time, heads * width // piece, piece).transpose(0, 1).contiguous()


def _split_half(pairs: Tensor | None, inv_freq: Tensor | None, dim: int) -> Tensor | None:
    return inv_freq.float() if pairs is not None and split_half(pairs, dim) else None


def _finite(x: Tensor, what: str) -> None:
    if not bool(torch.isfinite(x).all()):
        axis = 2 if x.dim() == 4 else 1
        token = int((~torch.isfinite(x)).movedim(axis, 0).flatten(1).any(1).nonzero()[0])
        raise ValueError(f"The {what} are not finite, first at token {token} of {x.shape[axis]}.")


def _power_of_two(size: Tensor) -> Tensor:
    # fp16 entries neither overflow nor lose digits whatever the units of x, and dividing by a power of two is exact.
    return torch.where(size > 0, torch.exp2(torch.log2(size.clamp_min(1e-30)).round()), torch.ones_like(size))


def _stored(entries: Tensor, dtype: torch.dtype) -> Tensor:
    # Past the largest number of fp8, 448 times the data's rms, later stages make up for what is cut.
    return entries.half() if dtype == torch.float16 else entries.clamp(-torch.finfo(dtype).max, torch.finfo(dtype).max).to(dtype)


def _entropy(labels: Tensor, entries: int) -> list[float]:
    # Bits, per row; counted at once, because a GPU is waited for at every count
    flat = labels + torch.arange(0, len(labels) * entries, entries, device=labels.device)[:, None]
    share = torch.bincount(flat.flatten(), minlength=len(labels) * entries).view(-1, entries).double() / labels.shape[1]
    return (-(share * share.clamp_min(1e-300).log2()).sum(1)).tolist()
