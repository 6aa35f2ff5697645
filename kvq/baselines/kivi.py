"""KIVI: asymmetric 2-bit quantization without tuning, keys per channel and values per token (Liu et al., ICML 2024, section 3).

code = round((x - min) / scale), scale = (max - min) / (2^b - 1), float16 scale and minimum per group: b + 32/G bits.

Departures: keys and values keep the same exact window (conf: window) and keys beyond it wait for a whole group, where the original
codes keys whenever `window` of them have gathered; 1 and 3 bits exist in later papers and here only. Arithmetic is float32.
"""

import torch
from torch import Tensor, nn

from kernels.bitpack import pack, packed_bytes, unpack
from kernels.paged import fuse
from kernels.pages import PAGE, Segment, Spec
from kvq.baselines.affine import dequantize, extent, quantize
from kvq.baselines.inputs import accept, finite, fitted, sizes


class KIVI(nn.Module):
    """Uniform min-max codes over groups of tokens (keys) or of channels (values), after RoPE, without calibration.

    axis "channel": one scale per channel and group of `group` consecutive tokens, which is also the block.
    axis "token": one scale per token and group of `group` consecutive channels; a head narrower than `group` is one group.
    """

    space = "post"
    grad_group = None
    depends_on = ()

    def __init__(self, bits: float, *, axis: str, group: int, seed: int = 0):
        """Raises ValueError unless bits is 1, 2, 3 or 4, axis "channel" or "token", group a positive multiple of 8."""
        super().__init__()
        if bits not in (1, 2, 3, 4):
            raise ValueError(f"KIVI bits must be 1, 2, 3 or 4, got {bits}.")
        if axis not in ("channel", "token"):
            raise ValueError(f"KIVI axis must be 'channel' (keys) or 'token' (values), got {axis!r}.")
        if group < 8 or group % 8:
            raise ValueError(f"KIVI group must be a positive multiple of 8 (32 in the paper, 128 in its code), got {group}.")
        self.code_bits, self.axis, self.group = int(bits), axis, group
        self.block = group if axis == "channel" else 1
        self.register_buffer("shape", None)

    def check(self, heads: int, head_dim: int) -> None:
        """Raise ValueError if channel groups do not divide the head dimension."""
        if self.axis == "token" and head_dim % min(self.group, head_dim):
            raise ValueError(f"KIVI group {self.group} does not divide the head dimension {head_dim}; choose a divisor.")

    @property
    def bits(self) -> float:
        """Stored bits per value: b + 32/G (codes of a row are padded to whole bytes)."""
        dim = fitted(self.shape)[1]
        row = dim if self.axis == "token" else self.group * dim
        return 8 * packed_bytes(row, self.code_bits) / row + 32 / self._size(dim)

    def fit(self, calibration) -> "KIVI":
        """Take the shape from calibration.x [H, N, D]; nothing is learned. Raises ValueError as check does."""
        self.check(calibration.x.shape[0], calibration.x.shape[2])
        self.shape = sizes(calibration.x)
        return self

    def encode(self, x: Tensor) -> dict[str, Tensor]:
        """x [B, H, T, D] to codes (uint8), scale and minimum (float16).

        channel: codes [B, H, T/G, bytes of G * D codes, token by token], scale and minimum [B, H, T/G, D];
        token: codes [B, H, T, bytes of D codes], scale and minimum [B, H, T, D/G].
        Raises ValueError on NaN, infinity, side data beyond float16, or T not a multiple of the block.
        """
        x = accept(x, self.shape, self.block)
        size = self._size(x.shape[3])
        dim = 2 if self.axis == "channel" else 3
        groups = x.unflatten(dim, (x.shape[dim] // size, size))
        along = dim + 1
        minimum, scale = extent(groups, self.code_bits, along)
        codes = quantize(groups, minimum, scale, self.code_bits).flatten(3)
        return {"codes": pack(codes, self.code_bits), "scale": scale.squeeze(along), "minimum": minimum.squeeze(along)}

    def decode(self, codes: dict[str, Tensor]) -> Tensor:
        """Return [B, H, T, D] float32."""
        dim = fitted(self.shape)[1]
        if self.axis == "channel":
            return _decode_channel(codes, self.code_bits, self.group, dim)
        integers = unpack(codes["codes"], self.code_bits, dim).unflatten(3, (-1, self._size(dim)))
        return dequantize(integers, codes["minimum"].unsqueeze(4), codes["scale"].unsqueeze(4)).flatten(3)

    def paged(self) -> Spec | None:
        """The codec as kernels read it: levels are the integers, the gain is the scale, the offset the minimum; None for keys whose groups are no pages."""
        heads, dim = fitted(self.shape)
        size = dim if self.axis == "channel" else self._size(dim)
        if self.axis == "channel" and (self.group != PAGE or dim % PAGE):
            return None
        levels = torch.arange(2**self.code_bits, device=self.shape.device).float()
        segments = tuple(Segment(h, start, size, self.code_bits, 0) for h in range(heads) for start in range(0, dim, size))
        numbers = segments, levels, None, None, self._symbols, self._restore
        return Spec(heads, dim, *numbers, offset=self.axis == "token", channels=self.axis == "channel")

    def fuse(self, value: nn.Module):
        """Attention over packed codes with this value codec, or None where no kernel serves the pair."""
        return fuse(self, value)

    def _symbols(self, codes: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        dim = fitted(self.shape)[1]
        names = "scale", "minimum"
        if self.axis == "token":
            return unpack(codes["codes"], self.code_bits, dim), torch.cat([codes[name].transpose(2, 3).flatten(1, 2) for name in names], 1)
        integers = unpack(codes["codes"], self.code_bits, PAGE * dim).unflatten(3, (PAGE, dim)).flatten(2, 3)
        # [B, H, P, D] to [B, H D / 32, 32 P]: a row holds 32 channels, a page its own 32 columns.
        return integers, torch.cat([codes[name].unflatten(3, (-1, PAGE)).transpose(2, 3).flatten(3).flatten(1, 2) for name in names], 1)

    def _restore(self, symbols: Tensor, sides: Tensor) -> dict[str, Tensor]:
        heads = symbols.shape[1]
        if self.axis == "token":
            scale, minimum = (x.unflatten(1, (heads, -1)).transpose(2, 3).contiguous() for x in sides.chunk(2, 1))
            return {"codes": pack(symbols, self.code_bits), "scale": scale, "minimum": minimum}
        scale, minimum = (x.unflatten(1, (heads, -1)).unflatten(3, (-1, PAGE)).transpose(2, 3).flatten(3) for x in sides.chunk(2, 1))
        return {"codes": pack(symbols.unflatten(2, (-1, PAGE)).flatten(3), self.code_bits), "scale": scale, "minimum": minimum}

    def _size(self, dim: int) -> int:
        return self.group if self.axis == "channel" else min(self.group, dim)


class KIVIScaleOnly(nn.Module):
    """KIVI's key codec without its exact residual: each group is coded with the scales of the group before it.

    A comparison baseline of Block-GTQ (arXiv 2606.24033), handicapped by design: min and scale per channel, before RoPE,
    lag one group of 32 tokens and values outside them are clamped; the first group uses those of the calibration keys.
    Departure: tokens are coded in whole groups, so a trailing part of a group stays exact until it is complete, where
    the original codes each token on arrival. The codes of complete groups are the same.
    """

    space = "pre"
    grad_group = None
    depends_on = ("calib",)
    stateful = True

    def __init__(self, bits: float, *, group: int, calibration_tokens: int, seed: int = 0):
        """`calibration_tokens`: how many of the first calibration keys set the scales of the first group.

        Raises ValueError unless bits is 1, 2, 3 or 4, group a positive multiple of 8 and calibration_tokens positive.
        """
        super().__init__()
        if bits not in (1, 2, 3, 4):
            raise ValueError(f"KIVIScaleOnly bits must be 1, 2, 3 or 4, got {bits}.")
        if group < 8 or group % 8:
            raise ValueError(f"KIVIScaleOnly group must be a positive multiple of 8 (32 in the original), got {group}.")
        if calibration_tokens < 1:
            raise ValueError(f"KIVIScaleOnly calibration_tokens must be positive, got {calibration_tokens}.")
        self.code_bits, self.group, self.block, self.calibration_tokens = int(bits), group, group, calibration_tokens
        for name in ("shape", "minimum", "scale"):
            self.register_buffer(name, None)

    @property
    def bits(self) -> float:
        """Stored bits per value: b + 32/G; every group keeps the float16 min and scale it was coded with."""
        row = self.group * fitted(self.shape)[1]
        return 8 * packed_bytes(row, self.code_bits) / row + 32 / self.group

    def fit(self, calibration) -> "KIVIScaleOnly":
        """Set the first group's minimum and scale [H, D] from calibration.x [H, N, D]. Raises ValueError on NaN or infinity."""
        self.shape = sizes(calibration.x)
        minimum, scale = extent(finite(calibration.x[:, : self.calibration_tokens]), self.code_bits, 1)
        self.minimum, self.scale = minimum.squeeze(1), scale.squeeze(1)
        return self

    def encode(self, x: Tensor, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """x [B, H, T, D] to codes [B, H, T/G, bytes], scale and minimum [B, H, T/G, D], those used for each group.

        `state` carries the minimum and scale [B, H, D] of the last group coded; it is empty at the start of a stream and
        updated in place. Raises ValueError on NaN, infinity, side data beyond float16, or T not a multiple of the block.
        """
        groups = accept(x, self.shape, self.block).unflatten(2, (x.shape[2] // self.group, self.group))
        own = extent(groups, self.code_bits, 3)
        lagged = []
        for name, current in zip(("minimum", "scale"), own, strict=True):
            current = current.squeeze(3)
            first = state[name] if name in state else getattr(self, name).expand(x.shape[0], -1, -1)
            history = torch.cat([first.unsqueeze(2), current], dim=2)
            state[name] = history[:, :, -1].clone()
            lagged.append(history[:, :, :-1].contiguous())
        minimum, scale = lagged
        codes = quantize(groups, minimum.unsqueeze(3), scale.unsqueeze(3), self.code_bits).flatten(3)
        return {"codes": pack(codes, self.code_bits), "scale": scale, "minimum": minimum}

    def decode(self, codes: dict[str, Tensor]) -> Tensor:
        """Return [B, H, T, D] float32."""
        return _decode_channel(codes, self.code_bits, self.group, fitted(self.shape)[1])


def _decode_channel(codes: dict[str, Tensor], bits: int, group: int, dim: int) -> Tensor:
    integers = unpack(codes["codes"], bits, group * dim).unflatten(3, (group, dim))
    return dequantize(integers, codes["minimum"].unsqueeze(3), codes["scale"].unsqueeze(3)).flatten(2, 3)
