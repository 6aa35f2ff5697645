"""TurboQuant-MSE: a seeded rotation and scalar levels at one rate per head (arXiv 2504.19874), the encoder inside Block-GTQ.

x = n u with n = |x|; y = u R^T has nearly Gaussian coordinates of variance 1/D whatever x is; each is replaced by its nearest
level, and x is decoded as s (yhat R) with one stored gain s per vector: s = n / |yhat| keeps the length ("unit_norm", the
paper), s = <x R^T, yhat> / |yhat|^2 minimises the error ("least_squares"), at the same storage.
"""

from typing import Any

import torch
from torch import Tensor, nn

from kernels.bitpack import pack, packed_bytes, unpack
from kernels.paged import fuse
from kernels.pages import Segment, Spec
from kernels.rotate import haar, hadamard, hadamard_signs
from kernels.scalar import MAX_BITS, gaussian_levels, nearest, sphere_levels

from .gain import GAINS, NORM_BYTES, STORED, channel_mean, load_norm, prepare, solve_gain, store_norm

KEY_SEED, VALUE_SEED = 42, 1000  # the public code's seeds for keys and values; the constructor's seed is added
TILE = 4096  # tokens coded at a time, so that the float64 intermediates stay small beside the cache
CODEBOOKS = ("gaussian", "exact")
ROTATIONS = ("haar", "hadamard", "none")


def choose(name: str, value: str, choices: tuple[str, ...]) -> str:
    """Return value, or raise ValueError naming the valid choices."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}.")
    return value


def scalar_levels(bits: int, dim: int, codebook: str) -> Tensor:
    """Unit-variance levels [2**bits] float32 for a vector of `dim` coordinates."""
    return (gaussian_levels(bits) if codebook == "gaussian" else sphere_levels(bits, dim)).float()


class TurboQuantMSE(nn.Module):
    """Codec of [B, H, T, D] at an integer number of code bits, 1 to 8, plus one norm per vector.

    All heads share one rotation. Codes: "codes" uint8 [B, H, T, ceil(D bits / 8)], "norm" [B, H, T, 1] in norm_dtype.
    Data-free except for `center`, which removes the calibration mean of every channel before coding and adds it back after.
    """

    block = 1
    grad_group = None

    def __init__(
        self,
        bits: float,
        *,
        codebook: str = "gaussian",
        gain: str = "unit_norm",
        rotation: str = "haar",
        center: bool = False,
        norm_dtype: str = "float16",
        space: str = "post",
        seed: int = 0,
    ):
        super().__init__()
        if bits != int(bits) or not 1 <= bits <= MAX_BITS:
            raise ValueError(f"TurboQuantMSE takes an integer number of bits from 1 to {MAX_BITS}, got {bits}.")
        self.code_bits = int(bits)
        self.codebook = choose("codebook", codebook, CODEBOOKS)
        self.gain = choose("gain", gain, GAINS)
        self.rotation_kind = choose("rotation", rotation, ROTATIONS)
        self.norm_dtype = choose("norm_dtype", norm_dtype, tuple(NORM_BYTES))
        self.space = choose("space", space, ("pre", "post"))
        self.depends_on = ("calib", "seed") if center else ("seed",)
        self.center = bool(center)
        self.seed = int(seed)
        self.register_buffer("shape", None)  # [2] int32: heads, head_dim
        self.register_buffer("levels", None)  # [2**bits] float32, unit variance
        self.register_buffer("rotation", None)  # haar [D, D] float32, hadamard signs [D] int8, or None
        self.register_buffer("mean", None)  # [H, D] float32, or None

    @property
    def bits(self) -> float:
        """Stored bits per value: packed codes and norm, codebook and rotation excluded."""
        dim = self._fitted()[1]
        return 8 * (packed_bytes(dim, self.code_bits) + NORM_BYTES[self.norm_dtype]) / dim

    def check(self, heads: int, head_dim: int) -> None:
        """Raise ValueError if vectors of this size cannot be served."""
        if self.rotation_kind == "hadamard":
            hadamard_signs(head_dim, 0)
        if self.codebook == "exact" and head_dim < 2:
            raise ValueError(f"codebook=exact needs a head dimension of at least 2, got {head_dim}.")

    def fit(self, calibration: Any) -> "TurboQuantMSE":
        """Make the tables for calibration.x [H, N, D]; of the data only the per-channel mean is used, and only if center is set."""
        heads, _, dim = calibration.x.shape
        self.check(heads, dim)
        device = calibration.x.device
        seed = self.seed + (KEY_SEED if calibration.kind == "key" else VALUE_SEED)
        self.shape = torch.tensor([heads, dim], dtype=torch.int32, device=device)
        self.levels = scalar_levels(self.code_bits, dim, self.codebook).to(device)
        if self.rotation_kind == "haar":
            self.rotation = haar(dim, seed).to(device)
        elif self.rotation_kind == "hadamard":
            self.rotation = hadamard_signs(dim, seed).to(device)
        if self.center:
            self.mean = channel_mean(calibration.x)
        return self

    def encode(self, x: Tensor) -> dict[str, Tensor]:
        """Code x [B, H, T, D]; a vector's codes do not depend on its neighbours in the call.

        Raises ValueError for a wrong shape, a value that is not finite, or a norm beyond the range of norm_dtype.
        """
        self._fitted(x)
        parts = [self._encode(tile) for tile in x.split(TILE, 2)]
        return {name: torch.cat([part[name] for part in parts], 2) for name in parts[0]}

    def _encode(self, x: Tensor) -> dict[str, Tensor]:
        x = prepare(x, self.mean)
        rotated = self._rotate(x)
        norm = rotated.square().sum(-1, keepdim=True).sqrt()
        unit = rotated * (x.shape[-1] ** 0.5 / torch.where(norm > 0, norm, 1.0))
        levels = self.levels.to(unit.dtype)
        codes = nearest(unit, levels)
        y = levels[codes]
        inner, power = (rotated * y).sum(-1, keepdim=True), y.square().sum(-1, keepdim=True)
        gain = solve_gain(norm, inner, power, self.gain)
        return {"codes": pack(codes, self.code_bits), "norm": store_norm(gain, self.norm_dtype)}

    def decode(self, codes: dict[str, Tensor]) -> Tensor:
        """Reconstruct [B, H, T, D] float32."""
        dim = self._fitted()[1]
        tiles = zip(codes["codes"].split(TILE, 2), codes["norm"].split(TILE, 2), strict=True)
        return torch.cat([self._decode(packed, norm, dim) for packed, norm in tiles], 2)

    def _decode(self, packed: Tensor, norm: Tensor, dim: int) -> Tensor:
        y = self.levels[unpack(packed, self.code_bits, dim)]
        x = self._unrotate(y) * load_norm(norm, self.norm_dtype)
        return x if self.mean is None else x + self.mean[:, None]

    def paged(self) -> Spec:
        """The codec as kernels read it."""
        heads, dim = self._fitted()
        segments = tuple(Segment(h, 0, dim, self.code_bits, 0) for h in range(heads))
        rotation = None if self.rotation_kind == "none" else self._unrotate(torch.eye(dim, device=self.levels.device))[None]
        numbers = segments, self.levels, rotation, self.mean, self._symbols, self._restore, STORED[self.norm_dtype]
        return Spec(heads, dim, *numbers, log8=self.norm_dtype == "log8", gain=self.gain)

    def fuse(self, value: nn.Module):
        """Attention over packed codes with this value codec, or None where no kernel serves the pair."""
        return fuse(self, value)

    def _symbols(self, codes: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        return unpack(codes["codes"], self.code_bits, self._fitted()[1]), codes["norm"].squeeze(-1)

    def _restore(self, symbols: Tensor, sides: Tensor) -> dict[str, Tensor]:
        return {"codes": pack(symbols, self.code_bits), "norm": sides.unsqueeze(-1)}

    def _rotate(self, x: Tensor) -> Tensor:
        if self.rotation_kind == "haar":
            return x @ self.rotation.to(x.dtype).T
        return hadamard(x * self.rotation) if self.rotation_kind == "hadamard" else x

    def _unrotate(self, y: Tensor) -> Tensor:
        if self.rotation_kind == "haar":
            return y @ self.rotation
        return hadamard(y) * self.rotation if self.rotation_kind == "hadamard" else y

    def _fitted(self, x: Tensor | None = None) -> tuple[int, int]:
        if self.shape is None:
            raise RuntimeError("TurboQuantMSE: call fit before encode, decode or bits.")
        heads, dim = self.shape.tolist()
        if x is not None and (x.dim() != 4 or (x.shape[1], x.shape[3]) != (heads, dim)):
            raise ValueError(f"TurboQuantMSE was fitted for [B, {heads}, T, {dim}], got {list(x.shape)}.")
        return heads, dim
