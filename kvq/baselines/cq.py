"""CQ: coupled quantization, one b-bit code for c neighbouring channels of a head (Zhang et al., NeurIPS 2024, arXiv 2405.03917).

Written CQ-<c>c<b>b, b/c bits per value. The table of each (layer, tensor, head, group) minimises sum_n w_n ||x_n - table[code_n]||^2
with w_n = 1 ("uniform") or the squared loss gradient summed over the group's channels ("fisher", the default of the paper's results).

Departures: k-means++ draws the start from at most 32 vectors per entry; an empty entry is placed anew; k-means stops early once no
assignment changes; weights are scaled to mean 1 per group, which changes nothing but the float32 range.
"""

import math

import torch
from torch import Tensor, nn

from kernels.bitpack import pack, packed_bytes, unpack
from kernels.kmeans import kmeans, nearest
from kernels.lookup import Coded
from kernels.lookup_pair import Pair, serves
from kernels.rvq import rows_of
from kvq.baselines.inputs import accept, finite, fitted, half, sizes

CHOICES = {4: (2, 8), 2: (4, 8), 1: (8, 8), 1.25: (8, 10)}  # bits: (channels coupled, bits of a code)


class CQ(nn.Module):
    """One nearest-entry code per group of `coupled` channels, keys before RoPE, no side data per token."""

    block = 1
    space = "pre"

    def __init__(
        self,
        bits: float,
        *,
        coupled: int | None,
        code_bits: int | None,
        weights: str,
        rounds: int,
        tolerance: float,
        seed: int = 0,
    ):
        """`coupled` and `code_bits` are chosen from bits when both are None: 4 is 2c8b, 2 is 4c8b, 1 is 8c8b, 1.25 is 8c10b.

        `rounds` of k-means at most, fewer once a round lowers the error by less than the fraction `tolerance`.
        Raises ValueError if bits is none of these or is not code_bits / coupled, if only one of the two is given, if
        code_bits is not in 1..16, or if weights is not "uniform" or "fisher".
        """
        super().__init__()
        if (coupled is None) != (code_bits is None):
            raise ValueError("CQ takes coupled and code_bits together or neither.")
        if coupled is None:
            if bits not in CHOICES:
                names = ", ".join(f"{key} ({c}c{b}b)" for key, (c, b) in CHOICES.items())
                raise ValueError(f"CQ bits must be one of {names}, got {bits}; others need coupled and code_bits.")
            coupled, code_bits = CHOICES[bits]
        if coupled < 1 or not 1 <= code_bits <= 16:
            raise ValueError(f"CQ couples at least 1 channel in a code of 1 to 16 bits, got coupled={coupled}, code_bits={code_bits}.")
        if not math.isclose(bits, code_bits / coupled):
            raise ValueError(f"CQ-{coupled}c{code_bits}b has {code_bits / coupled:g} bits per value, not {bits}; set bits to match.")
        if weights not in ("uniform", "fisher"):
            raise ValueError(f"CQ weights must be 'uniform' or 'fisher', got {weights!r}.")
        self.coupled, self.code_bits, self.weights = coupled, code_bits, weights
        self.rounds, self.tolerance, self.seed = rounds, tolerance, seed
        self.grad_group = coupled if weights == "fisher" else None
        self.register_buffer("shape", None)
        self.register_buffer("codebook", None)  # [H, D/c, 2**b, c] float16

    def check(self, heads: int, head_dim: int) -> None:
        """Raise ValueError if the coupled channels do not divide the head dimension."""
        if head_dim % self.coupled:
            raise ValueError(f"CQ couples {self.coupled} channels, which do not divide the head dimension {head_dim}.")

    @property
    def bits(self) -> float:
        """Stored bits per value: b/c (a token's codes of one head fill whole bytes)."""
        dim = fitted(self.shape)[1]
        return 8 * packed_bytes(dim // self.coupled, self.code_bits) / dim

    def fit(self, calibration) -> "CQ":
        """Learn the tables by k-means from calibration.x [H, N, D] and, for "fisher", calibration.grads [N, H * D/c].

        Raises ValueError on NaN or infinity, on fewer vectors than entries, without the gradients that "fisher" needs,
        and as check does.
        """
        x = finite(calibration.x)
        heads, tokens, dim = x.shape
        self.check(heads, dim)
        if self.weights == "fisher" and calibration.grads is None:
            raise ValueError("CQ with weights='fisher' needs squared gradients in the calibration; choose weights='uniform' without.")
        generator = torch.Generator().manual_seed((self.seed << 20) + 2 * calibration.layer + (calibration.kind == "value"))
        tables = []
        for head in range(heads):  # one head at a time bounds the memory of the clustering
            vectors = x[head].unflatten(1, (-1, self.coupled)).transpose(0, 1).contiguous()
            weights = None
            if self.weights == "fisher":
                weights = _balanced(calibration.grads.reshape(tokens, heads, -1)[:, head].T.to(x))
            options = {"rounds": self.rounds, "tolerance": self.tolerance, "generator": generator}
            tables.append(kmeans(vectors, 2**self.code_bits, weights, start="kmeans++", **options).entries)
        self.codebook = half(torch.stack(tables), "A CQ table entry")
        self.shape = sizes(x)
        return self

    def encode(self, x: Tensor) -> dict[str, Tensor]:
        """x [B, H, T, D] to one leaf [B, H, T, bytes of D/c codes] uint8. Raises ValueError on NaN or infinity."""
        x = accept(x, self.shape)
        batch, heads, tokens, _ = x.shape
        vectors = x.unflatten(3, (-1, self.coupled)).permute(1, 3, 0, 2, 4)  # [H, D/c, B, T, c]
        codes, _ = nearest(vectors.flatten(0, 1).flatten(1, 2), self.codebook.flatten(0, 1).float())
        codes = codes.view(heads, vectors.shape[1], batch, tokens).permute(2, 0, 3, 1)
        return {"codes": pack(codes, self.code_bits)}

    def decode(self, codes: dict[str, Tensor]) -> Tensor:
        """Return [B, H, T, D] float32."""
        heads, dim = fitted(self.shape)
        packed = codes["codes"]
        batch, tokens, groups = packed.shape[0], packed.shape[2], dim // self.coupled
        labels = unpack(packed, self.code_bits, groups).permute(1, 3, 0, 2).reshape(heads * groups, -1)
        vectors = rows_of(self.codebook.flatten(0, 1), labels).view(heads, groups, batch, tokens, self.coupled)
        return vectors.permute(2, 0, 3, 1, 4).flatten(3).contiguous()

    def fuse(self, value: nn.Module) -> Pair | None:
        """What attends over packed codes of these keys and the values of `value`, or None: 8-bit codes of heads that a kernel serves."""
        if type(value) is not CQ or self.code_bits != 8 or value.code_bits != 8 or not torch.equal(self.shape, value.shape):
            return None
        dim = fitted(self.shape)[1]
        return Pair(self._read, value._read, dim, self.space) if serves(dim, self.coupled, value.coupled) else None

    def _read(self, codes: dict[str, Tensor]) -> Coded:
        return Coded(codes["codes"].mT, self.codebook.flatten(0, 1)[:, None])


def _balanced(weights: Tensor) -> Tensor:
    # Squared gradients of a mean loss are ~1e-12 and smaller; the clustering only needs them up to a factor per group.
    mean = weights.mean(1, keepdim=True)
    return torch.where(mean > 0, weights / mean, 1.0)
