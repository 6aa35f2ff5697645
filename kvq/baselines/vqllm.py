"""VQLLM: residual vector quantization of the KV cache (Kumar, 2024, arXiv 2410.15704; not VQ-LLM, the kernel paper).

x / std -> groups of 32 channels -> sum over stages of one entry out of C, greedily; bits = depth * log2(C) / 32 + 16 / head_dim.
One table per (layer, tensor, stage), shared by all heads and groups.

Departures: the model is frozen (the released default) and training reads the harness's calibration tokens, `batch` at random per
step, where the release takes 200 steps of 65,536 tokens of SlimPajama; tables are float16 and the std is float16, not bfloat16;
a vector of zeros stores a std of 0 and decodes to zeros, where the release divides by 1 and decodes the entries nearest to zero.
"""

import torch
from torch import Tensor, nn

from kernels.bitpack import pack, packed_bytes, unpack
from kernels.kmeans import kmeans, nearest, sums
from kernels.lookup import Coded
from kernels.lookup_pair import Pair, serves
from kernels.rvq import decode, encode, rows_of
from kvq.baselines.inputs import accept, finite, fitted, half, sizes

START_VECTORS = 100_000  # the k-means start sees at most so many sub-vectors
SMOOTHING = 1e-5  # Laplace smoothing of the running counts
CLIP = 100.0  # entries stay within +-CLIP
CONSTANT = 1e-6  # a std below this part of the largest value is rounding noise: the vector is constant


class VQLLM(nn.Module):
    """Residual codes of `entries` entries per stage over groups of `group` channels, after division by the token's own std.

    The std (unbiased, no mean removed, one float16 per token and head) is stored; a std of 0 divides by 1. Group j holds channels
    j, j + D/group, j + 2 D/group, ... if `strided` (keys), consecutive channels otherwise (values).
    """

    block = 1
    space = "pre"
    grad_group = None

    def __init__(
        self,
        bits: float,
        *,
        group: int,
        entries: int,
        strided: bool,
        rounds: int,
        steps: int,
        batch: int,
        decay: float,
        seed: int = 0,
    ):
        """bits = depth * log2(entries) / group, without the std; a head narrower than `group` is one group.

        Training: `rounds` of k-means per stage on the first `batch` tokens, then `steps` updates by exponential moving
        averages with `decay`, each on `batch` tokens drawn from the calibration. Raises ValueError unless entries is a power
        of two in 2..65536, bits gives a whole depth of at least 1, group, batch are positive and decay is in [0, 1).
        """
        super().__init__()
        if entries.bit_count() != 1 or not 2 <= entries <= 2**16:
            raise ValueError(f"VQLLM entries must be a power of two from 2 to 65536, got {entries}.")
        if group < 1 or batch < 1 or rounds < 0 or steps < 0 or not 0 <= decay < 1:
            raise ValueError(
                "VQLLM needs group and batch of at least 1, rounds and steps of at least 0 and a decay in [0, 1), "
                f"got group={group}, batch={batch}, rounds={rounds}, steps={steps}, decay={decay}."
            )
        self.label, self.group, self.code_bits, self.strided = bits, group, entries.bit_length() - 1, strided
        self.rounds, self.steps, self.batch, self.decay, self.seed = rounds, steps, batch, decay, seed
        self._depth(group)
        self.register_buffer("shape", None)
        self.register_buffer("codebook", None)  # [depth, C, group] float16

    def check(self, heads: int, head_dim: int) -> None:
        """Raise ValueError if the groups do not divide the head dimension or bits is no whole number of stages in it."""
        size = min(self.group, head_dim)
        if head_dim < 2 or head_dim % size:
            raise ValueError(f"VQLLM groups of {size} channels do not divide the head dimension {head_dim}; choose a divisor.")
        self._depth(size)

    @property
    def bits(self) -> float:
        """Stored bits per value: the codes of all stages and the float16 std of each token and head."""
        dim = fitted(self.shape)[1]
        size = min(self.group, dim)
        return (8 * packed_bytes(dim // size * self._depth(size), self.code_bits) + 16) / dim

    def fit(self, calibration) -> "VQLLM":
        """Learn the tables from calibration.x [H, N, D].

        Raises ValueError on NaN or infinity, a std beyond float16, fewer sub-vectors than entries, and as check does.
        """
        x = finite(calibration.x)
        heads, tokens, dim = x.shape
        self.check(heads, dim)
        vectors = self._split(x / _divisor(_deviation(x))).transpose(0, 1).flatten(1, 2)  # [N, H * groups, d]
        generator = torch.Generator().manual_seed((self.seed << 20) + 2 * calibration.layer + (calibration.kind == "value"))
        tables = self._start(vectors[: self.batch].flatten(0, 1), generator)
        counts, totals = torch.ones_like(tables[..., 0]), tables.clone()
        for _ in range(self.steps):
            drawn = vectors
            if tokens > self.batch:
                drawn = vectors[torch.randperm(tokens, generator=generator)[: self.batch].to(x.device)]
            rest = drawn.flatten(0, 1).unsqueeze(0)
            ones = torch.ones_like(rest[..., 0])
            for stage, table in enumerate(tables):
                labels, _ = nearest(rest, table[None])
                count, total = sums(rest, ones, labels, len(table))
                rest = rest - rows_of(table[None], labels)
                counts[stage].mul_(self.decay).add_(count[0], alpha=1 - self.decay)
                totals[stage].mul_(self.decay).add_(total[0], alpha=1 - self.decay)
            whole = counts.sum(1, keepdim=True)
            smooth = (counts + SMOOTHING) / (whole + counts.shape[1] * SMOOTHING) * whole
            tables = (totals / smooth.unsqueeze(2)).clamp(-CLIP, CLIP)
        self.codebook = half(tables, "A VQLLM table entry")
        self.shape = sizes(x)
        return self

    def encode(self, x: Tensor) -> dict[str, Tensor]:
        """x [B, H, T, D] to codes [B, H, T, bytes of (D/group) * depth codes] uint8 and scale [B, H, T] float16.

        Codes are ordered by group, then stage. Raises ValueError on NaN, infinity, or a std beyond float16.
        """
        x = accept(x, self.shape)
        scale = _deviation(x)
        vectors = self._split(x / _divisor(scale))
        codes = encode(vectors.reshape(1, -1, vectors.shape[-1]), self.codebook.unsqueeze(0))
        codes = codes.view(*x.shape[:3], vectors.shape[3] * codes.shape[-1])
        return {"codes": pack(codes, self.code_bits), "scale": scale.squeeze(-1)}

    def decode(self, codes: dict[str, Tensor]) -> Tensor:
        """Return [B, H, T, D] float32."""
        dim = fitted(self.shape)[1]
        depth, _, size = self.codebook.shape
        labels = unpack(codes["codes"], self.code_bits, dim // size * depth)
        vectors = decode(labels.reshape(1, -1, depth), self.codebook.unsqueeze(0)).view(*labels.shape[:3], dim // size, size)
        x = vectors.transpose(3, 4) if self.strided else vectors
        return x.flatten(3) * codes["scale"].float().unsqueeze(-1)

    def fuse(self, value: nn.Module) -> Pair | None:
        """What attends over packed codes of these keys and the values of `value`, or None: 8-bit codes, values in consecutive channels."""
        if type(value) is not VQLLM or value.strided or self.code_bits != 8 or value.code_bits != 8 or not torch.equal(self.shape, value.shape):
            return None
        heads, dim = fitted(self.shape)
        return Pair(self._read, value._read, dim, self.space) if serves(dim, self.codebook.shape[2], value.codebook.shape[2]) else None

    def _read(self, codes: dict[str, Tensor]) -> Coded:
        heads, dim = fitted(self.shape)
        tables = self.codebook.expand(heads * dim // self.codebook.shape[2], -1, -1, -1)
        return Coded(codes["codes"].mT, tables, codes["scale"], self.strided)

    def _depth(self, size: int) -> int:
        depth = self.label * size / self.code_bits
        if depth < 1 or depth != int(depth):
            unit = self.code_bits / size
            codes = f"{self.code_bits}-bit codes over {size} channels"
            raise ValueError(f"VQLLM bits must be a positive multiple of {unit:g} ({codes}), got {self.label}.")
        return int(depth)

    def _split(self, x: Tensor) -> Tensor:
        size = min(self.group, x.shape[-1])
        groups = x.shape[-1] // size
        return x.unflatten(-1, (size, groups)).mT if self.strided else x.unflatten(-1, (groups, size))

    def _start(self, vectors: Tensor, generator: torch.Generator) -> Tensor:
        if len(vectors) > START_VECTORS:
            vectors = vectors[torch.randperm(len(vectors), generator=generator)[:START_VECTORS].to(vectors.device)]
        rest, tables = vectors.unsqueeze(0), []
        for _ in range(self._depth(vectors.shape[1])):
            options = {"start": "random", "rounds": self.rounds, "empty": "keep", "generator": generator}
            table = kmeans(rest, 2**self.code_bits, **options).entries
            rest = rest - rows_of(table, nearest(rest, table)[0])
            tables.append(table[0])
        return torch.stack(tables)


def _deviation(x: Tensor) -> Tensor:
    # A constant vector is coded undivided, except one of zeros (or below float16), which decodes to exact zeros.
    variance = (x - x.mean(-1, keepdim=True)).square().sum(-1, keepdim=True) / (x.shape[-1] - 1)
    scale, largest = half(variance.sqrt(), "The standard deviation of a token"), x.abs().amax(-1, keepdim=True)
    constant = (scale <= CONSTANT * largest) & (largest.to(torch.float16) != 0)
    return torch.where(constant, torch.ones_like(scale), scale)


def _divisor(scale: Tensor) -> Tensor:
    return torch.where(scale == 0, 1.0, scale.float())
