"""One launch for one new token of keys and values: turned back, divided, coded in all stages, bytes written (obeys `kernels.append`).

A program has one piece of keys or values and BN sequences; the residual stays in registers, and tables are copied to shared memory ahead of the stage that needs
them, because they depend on no residual. Products are those of `kernels.rvq_triton`: two float16 halves, sums in float32. With few sequences the lower halves
are the rows that a product of 16 rows has to spare (STACK).
"""

import triton
import triton.language as tl


@triton.jit
def append_token(
    keys, values, key_tables, value_tables, key_bias, value_bias, key_codes, value_codes, cos, sin, at, batch, key_unit, value_unit,
    kb, kh, vb, vh, kcb, vcb, tb,
    PIECES: tl.constexpr, STAGES: tl.constexpr, K: tl.constexpr, D: tl.constexpr, DIM: tl.constexpr,
    BN: tl.constexpr, STACK: tl.constexpr, TURN: tl.constexpr, R: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """Strides in elements: of keys and values by sequence and head, of codes by sequence, of cos and sin [B, >= DIM / 2] by sequence. R: stages as a power of two."""
    piece, is_value = tl.program_id(1), tl.program_id(2) > 0
    ROWS: tl.constexpr = 2 * BN if STACK else BN
    r, d, k = tl.arange(0, ROWS), tl.arange(0, D), tl.arange(0, K)
    mine = tl.program_id(0) * BN + tl.arange(0, BN)
    row = (tl.program_id(0) * BN + r % BN).to(tl.int64)
    some = (row < batch)[:, None]
    channel = (piece * D + d) % DIM
    head = (piece * D + d) // DIM
    x = tl.where(is_value, values, keys) + row[:, None] * tl.where(is_value, vb, kb) + (head * tl.where(is_value, vh, kh))[None, :]
    rest = tl.load(x + channel[None, :], mask=some, other=0.0).to(tl.float32)
    if TURN:
        HALF: tl.constexpr = DIM // 2
        turned = (row < tl.where(is_value, 0, batch))[:, None]
        angle = row[:, None] * tb + (channel % HALF)[None, :]
        partner = tl.load(x + ((channel + HALF) % DIM)[None, :], mask=turned, other=0.0).to(tl.float32)
        across = tl.load(sin + angle, mask=turned, other=0.0)
        rest = rest * tl.load(cos + angle, mask=turned, other=1.0) + tl.where((channel < HALF)[None, :], partner, -partner) * across
    rest *= tl.where(is_value, value_unit, key_unit)
    table = tl.where(is_value, value_tables, key_tables) + piece * (STAGES * K * D)
    bias = tl.where(is_value, value_bias, key_bias) + piece * (STAGES * K)
    codes = tl.where(is_value, value_codes, key_codes) + mine.to(tl.int64) * tl.where(is_value, vcb, kcb) + tl.load(at) * (PIECES * STAGES) + piece * STAGES
    stages = tl.arange(0, R)[None, :]
    found = tl.zeros([BN, R], tl.int32)
    score = tl.zeros([BN, K], tl.float32)
    # An entry is chosen a turn after its scores: its row is asked for after the copy of a later table was, and has not to queue behind it.
    for stage in tl.range(0, STAGES, num_stages=DEPTH):
        _, label = tl.max(score, 1, return_indices=True, return_indices_tie_break_left=False)
        found = tl.where(stages == stage - 1, label[:, None], found)
        chosen = tl.reshape(tl.broadcast_to(label[None, :], (ROWS // BN, BN)), (ROWS,))
        if stage > 0:  # a branch, not a mask: else the compiler copies rows as it does tables, and nothing is ahead any more
            rest -= tl.load(table + (stage - 1) * (K * D) + chosen[:, None] * D + d[None, :]).to(tl.float32)
        entries = tl.load(table + stage * (K * D) + k[None, :] * D + d[:, None]).to(tl.float16)
        high = rest.to(tl.float16)
        low = (rest - high.to(tl.float32)).to(tl.float16)
        score = tl.dot(tl.where((r < BN)[:, None], high, low) if STACK else low, entries)
        score = tl.sum(tl.reshape(score, (2, BN, K)), 0) if STACK else tl.dot(high, entries, score)
        score += tl.load(bias + stage * K + k)[None, :]
    _, label = tl.max(score, 1, return_indices=True, return_indices_tie_break_left=False)
    found = tl.where(stages == STAGES - 1, label[:, None], found)
    tl.store(codes[:, None] + stages, found.to(tl.uint8), mask=(mine < batch)[:, None] & (stages < STAGES))
