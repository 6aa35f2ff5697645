"""One query per sequence against a cache in parts: attention over each part, and the exact merge of the parts by log-sum-exp.

A cache is coded tokens (read from packed bits by a kernel) and exact tokens (sinks, a window). Softmax over their union is a
weighted mean of the parts' outputs, weight exp(lse of the part): nothing is approximated. This file defines; kernels obey.
"""

import torch
from torch import Tensor

Part = tuple[Tensor, Tensor]
"""Output [B, Hq, D] and log-sum-exp [B, Hq] of the scaled scores, both float32; a part without visible tokens is (0, -inf)."""


def attend(
    query: Tensor, key: Tensor, value: Tensor, scale: float, first: Tensor | None = None, window: int | None = None, lengths: Tensor | None = None
) -> Part:
    """Attention of query [B, Hq, D] over key and value [B, H, T, D]; query head h reads KV head h // (Hq // H).

    first: [B] index of the first visible token (left padding). window: only the last `window` tokens are visible.
    lengths: [B] tokens of a sequence where they are not all T; what lies behind them may be anything.
    """
    batch, heads, tokens, dim = key.shape
    grouped = query.float().view(batch, heads, -1, dim)
    score = (grouped * scale) @ key.float().mT  # [B, H, G, T]
    where = torch.arange(tokens, device=key.device)
    begin = torch.zeros(batch, 1, dtype=torch.long, device=key.device) if first is None else first[:, None]
    if window is not None:
        begin = begin.clamp_min(tokens - window) if lengths is None else torch.maximum(begin, lengths[:, None] - window)
    hidden = where < begin
    if lengths is not None:
        behind = where >= lengths[:, None]
        hidden, value = hidden | behind, value.masked_fill(behind[:, None, :, None], 0)
    score = score.masked_fill(hidden[:, None, None], -torch.inf)
    lse = score.logsumexp(-1) if tokens else score.new_full(score.shape[:3], -torch.inf)
    weight = (score - lse.clamp_min(torch.finfo(lse.dtype).min)[..., None]).exp()
    return (weight @ value.float()).flatten(1, 2), lse.flatten(1, 2)


def merge(parts: list[Part]) -> Part:
    """The part that all tokens of `parts` make together."""
    outputs, sums = (torch.stack(x) for x in zip(*parts))
    lse = sums.logsumexp(0)
    weight = (sums - lse.clamp_min(torch.finfo(lse.dtype).min)).exp()
    return (outputs * weight[..., None]).sum(0), lse
