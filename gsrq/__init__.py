"""GSRQ: gain-shape residual quantization of the KV cache (Kim, Park, Chung, Chung; arXiv 2607.01065, ICML 2026).

Paper                                   here
Algorithm 1, GSKM                       gsrq.gskm.gain_shape (one update; on a GPU gsrq.gskm_triton), gsrq.gskm.gskm (all)
assignment argmax_k 2 g x.s - g^2       kernels.kmeans.nearest (the score is half of it: x.c - ||c||^2 / 2 with c = g s)
K-means, the ablation's other arm       kernels.kmeans.kmeans: conf/quant/km.yaml is GSRQ with this argument
w = log(1 + lambda ||grad||)            gsrq.weights.log_weights
product + residual pipeline             gsrq.quantizer.GSRQ; encoding and decoding are kernels.rvq
bits = R log2 K / D                     GSRQ.bits, from the packed bytes
new keys and values coded in one kernel kernels.append, called by gsrq.fused
attention over packed codes             gsrq.fused, kernels.lookup; timings: gsrq.bench

Identities that the tests hold: with a raw instead of a unit direction the update is Lloyd's (s = m/||m||, g = ||m||); weights w on unit
directions equal weights w/||x|| on raw ones; after a Lloyd round the captured energy is sum ||c||^2 / sum ||x||^2 over occupancy.

Departures: what the paper leaves open or what we do otherwise.
- Start of the directions (not stated): K distinct random members of non-zero norm, then 3 rounds of spherical k-means on at most 32
  vectors per entry. warmup=0 is Algorithm 1 as printed; it collapses on some seeds, because an entry whose only member is itself keeps
  a gain as long as its own norm.
- First gains (not stated): mean projection of the members by cosine.
- Weighted updates (not printed): s = normalise(sum w x/||x||), g = max(0, sum w x.s / sum w). The same weights at every stage.
- Loss and median of the weights (not stated): mean next-token cross-entropy of the unquantized model; one median per layer, tensor and piece.
- Stopping: besides "no assignment changes" and a number of rounds, a relative `tolerance`; 0 turns it off. The iterate with the least
  weighted squared error is returned, since the objective may rise.
- Empty entries (paper: keep or re-initialise): direction of a vector drawn in proportion to its weighted error, median gain; counted.
- Codebooks are fp16 in units of one power of two per tensor, and the next stage learns from the residual of these stored entries.
- Keys are coded before RoPE (the paper's kernels imply it; its figure code reads keys after RoPE): space="post" switches.
- Order (not stated): contiguous channels, heads in model order, so a piece of 256 spans two neighbouring heads.
- A model narrower than a piece is one piece, with stages for the same bits.
- Extras, off by default: beam > 1 keeps several partial sums while encoding, refine > 0 refits all stages jointly (gsrq.refine), codebook=float8
  stores entries in 8 bits. They are not part of GSRQ and belong in no GSRQ row; conf/quant/gsrq_plus.yaml turns the first two on,
  conf/quant/gsrq_fp8.yaml the last.
- Every token is coded, the first included; no exact window unless the configuration asks for one.
"""

from gsrq.quantizer import GSRQ

__all__ = ["GSRQ"]
