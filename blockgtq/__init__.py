"""Block-GTQ: RoPE-aware bit allocation for quantized keys (arXiv 2606.24033), on top of TurboQuant-MSE (arXiv 2504.19874).

Equation map
    logit q^T R_delta k = sum_i q_i^T R(delta theta_i) k_i, and its error     blockgtq.diagnose
    block energies E|q_i|^2, E|k_i|^2; GQA average over each query head       blockgtq.energy.block_energy, score_blocks
    score s_i = (E|q_i|^2 + E|k_i|^2) / 2 and its variants                    blockgtq.energy.SCORES
    J(b) = sum_i s_i 4^(-b_i), sum b_i = B, greedy from b_min                 blockgtq.allocate
    groups of equal width, one norm and one rotation each                     blockgtq.layout, blockgtq.quantizer
    u = x / |x|, y = u R^T, nearest level, norm correction                    blockgtq.turboquant, blockgtq.gain
    levels for N(0, 1/m)                                                      kernels.scalar
    Haar rotation from a seed                                                 kernels.rotate

Departures from the paper's code
    Codebooks are converged. The public code stops Lloyd's algorithm after 100 iterations, which at 5 to 8 bits leaves an error
        1.1 to 4 times the optimum and above the paper's own bound. Groups of 2 or 4 channels are an exception: there the
        unconverged levels, bunched near zero, happen to suit the bounded coordinate better (2 channels, 8 bits: relative
        error 7.8e-6 against 1.5e-5). codebook=exact uses the true marginal of a rotated unit vector and is better than both
        everywhere (5.8e-6).
    One encoder. The public code has an fp32 round trip for quality and a 256-bin table for serving that cannot reach all 7- and
        8-bit codes; here every code is the nearest level, and what is stored is what is decoded.
    The rotation is applied in float64 while encoding, so a vector's codes do not depend on how many tokens share the call.
    Norms are stored in fp16 (norm_dtype) and counted; the public code counts neither norms nor padding.
    Codes are bit-dense: a key takes its budget rounded up to a byte, and 2 bits take half of 4. The public cache stores nibbles and
        bytes, padded to the worst head of the model, so its K2 and K3 are equally large.
    Sorting is stable: blocks of equal width keep their order, so equal widths give equal codes.
    Keys are coded after RoPE by default, as in the public serving path; space=pre is its quality path. Energies are the same.
    Pairs come from the model. The public code pairs channels i and i + D/2 everywhere, which is wrong for interleaved models and
        for partly rotated ones. partial=full keeps unrotated channels in static blocks of their own instead of mixing them
        with rotated ones; split and merge use floor(bits) for them when the average is fractional.
    Seeds: 42 for keys and 1000 for values, plus the constructor's seed, for every head (the public quality runs add the head).
    The budget is spent to the last bit also where scores are zero.
    Offered beyond the paper: gain=least_squares, center, score=qk_mse (scale-invariant), fractional averages, log8 norms.
"""

from .allocate import allocate
from .quantizer import BlockGTQ
from .turboquant import TurboQuantMSE

__all__ = ["BlockGTQ", "TurboQuantMSE", "allocate"]
