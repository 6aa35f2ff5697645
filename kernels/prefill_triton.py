"""Triton: pages to float16 tiles in stored order, and causal attention of a chunk of queries over such tiles (or over exact tokens)."""

import triton
import triton.language as tl


@triton.jit
def stored_tokens(
    words, sides, tiles, levels, pages, out, wb, wh, sb, rows, offset_row, start, stop, pages_stride,
    HEADS: tl.constexpr, TILES: tl.constexpr, DIM: tl.constexpr, PAGE: tl.constexpr, LOG8: tl.constexpr, OFFSET: tl.constexpr, BARE: tl.constexpr,
    CHANNELS: tl.constexpr, TABLE: tl.constexpr,
):  # fmt: skip
    """out [B, H, stop - start, DIM]: gain times level (plus offset) of tokens start.. stop - 1; a program decodes one page of one head."""
    head, batch = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    page = (start // 32 + tl.program_id(0)).to(tl.int64)
    slot, col = tl.arange(0, 32), tl.arange(0, 16)
    token = page * 32 + slot
    inside = token < stop
    if TABLE:
        page = tl.load(pages + batch * pages_stride + page).to(tl.int64)
    words += batch * wb + head * wh + page * PAGE
    sides += batch * sb + page * rows * 32
    out += ((batch * HEADS + head) * (stop - start) + token - start) * DIM
    within = slot % 8
    pair_at, one_at, later = 4 * within + 2 * (slot // 8 % 2), 4 * within + slot // 8, slot // 16
    for t in range(TILES):
        info = tiles + (head * TILES + t) * 8
        width, first, n, book, here, place, row = (
            tl.load(info), tl.load(info + 1), tl.load(info + 2), tl.load(info + 3), tl.load(info + 4), tl.load(info + 5), tl.load(info + 6)
        )  # fmt: skip
        mask = inside[:, None] & (col < here)[None, :]
        code = tl.zeros([32, 16], tl.int32)
        at = words + first + col[None, :]
        for a in range(width // 2):
            word = tl.load(at + (2 * a + later)[:, None] * n, mask=mask, other=0)
            code |= ((word >> pair_at[:, None]) & 3) << (2 * a)
        if width % 2 == 1:
            word = tl.load(at + (width - 1) * n + tl.zeros([32, 1], tl.int32), mask=mask, other=0)
            code |= ((word >> one_at[:, None]) & 1) << (width - 1)
        y = tl.load(levels + book + code, mask=mask, other=0)
        if CHANNELS:
            here_side = sides + head * DIM + place + col
            y = y * tl.load(here_side).to(tl.float32)[None, :] + tl.load(here_side + HEADS * DIM).to(tl.float32)[None, :]
        elif not BARE:
            gain = tl.load(sides + row * 32 + slot, mask=inside, other=0)
            if LOG8:
                y *= tl.where(gain == 0, 0.0, tl.exp2((gain.to(tl.float32) - 128.0) * 0.125))[:, None]
            else:
                y *= gain.to(tl.float32)[:, None]
        if OFFSET:
            y += tl.load(sides + (offset_row + row) * 32 + slot, mask=inside, other=0).to(tl.float32)[:, None]
        tl.store(out[:, None] + place + col[None, :], y.to(out.dtype.element_ty), mask=mask)


@triton.jit
def _steps(
    q, keys, values, low, high, place, limit, visible, window, scale, o, top, mass,
    MASK: tl.constexpr, DIM: tl.constexpr, DPAD: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """Running softmax over keys low.. high - 1. MASK: some of them are not seen by some query."""
    j, d = tl.arange(0, STEP), tl.arange(0, DPAD)
    for start in range(low, high, STEP):
        at = start + j
        near, far = keys + at.to(tl.int64)[None, :] * DIM + d[:, None], values + at.to(tl.int64)[:, None] * DIM + d[None, :]
        if MASK or DIM != DPAD:  # noqa: SIM108
            k = tl.load(near, mask=(at < limit)[None, :] & (d < DIM)[:, None], other=0)
        else:
            k = tl.load(near)
        s = tl.dot(q, k, input_precision="ieee")
        if MASK:
            seen = (at[None, :] <= place[:, None]) & (at[None, :] > place[:, None] - window) & ((at >= visible) & (at < limit))[None, :]
            s = tl.where(seen, s, float("-inf"))
        peak = tl.maximum(top, tl.max(s, 1))
        anchor = tl.where(peak == float("-inf"), 0.0, peak)
        p = tl.exp2(s * scale - anchor[:, None] * scale)
        decay = tl.exp2((top - anchor) * scale)
        mass = mass * decay + tl.sum(p, 1)
        if MASK or DIM != DPAD:  # noqa: SIM108
            v = tl.load(far, mask=(at < limit)[:, None] & (d < DIM)[None, :], other=0)
        else:
            v = tl.load(far)
        o = tl.dot(p.to(v.dtype), v, o * decay[:, None], input_precision="ieee")
        top = peak
    return o, top, mass


@triton.jit
def attend_rows(
    query, keys, values, output, lse, first, chunk, tokens, at, window, scale,
    HEADS: tl.constexpr, GROUP: tl.constexpr, DIM: tl.constexpr, DPAD: tl.constexpr, ROWS: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """query [B, HEADS, chunk, DIM] at positions at + i; keys, values [B, HEADS / GROUP, tokens, DIM]; first [B]; scale > 0 times log2(e)."""
    block, place = tl.num_programs(0) - 1 - tl.program_id(0), tl.program_id(1).to(tl.int64)  # long rows of keys first
    row, d = block * ROWS + tl.arange(0, ROWS), tl.arange(0, DPAD)
    keys += place // GROUP * tokens * DIM
    values += place // GROUP * tokens * DIM
    inside = (row < chunk)[:, None] & (d < DIM)[None, :]
    address = (place * chunk + row)[:, None] * DIM + d[None, :]
    q = tl.load(query + address, mask=inside, other=0)
    visible = tl.maximum(tl.load(first + place // HEADS), 0)
    here = at + row
    lowest, highest = at + block * ROWS, at + tl.minimum(block * ROWS + ROWS, chunk) - 1  # positions of the first and the last query
    stop = tl.maximum(tl.minimum(tokens, highest + 1), 0)
    low = tl.maximum(visible, lowest - window + 1) // STEP * STEP
    # Keys between full_low and full_high, whole steps, are seen by every query of the block.
    full_low = tl.minimum((tl.maximum(visible, highest - window + 1) + STEP - 1) // STEP * STEP, tl.maximum((stop + STEP - 1) // STEP * STEP, low))
    full_high = tl.maximum(tl.minimum(tokens, lowest + 1) // STEP * STEP, full_low)
    o, top, mass = tl.zeros([ROWS, DPAD], tl.float32), tl.full([ROWS], float("-inf"), tl.float32), tl.zeros([ROWS], tl.float32)
    o, top, mass = _steps(q, keys, values, low, full_low, here, tokens, visible, window, scale, o, top, mass, True, DIM, DPAD, STEP)
    o, top, mass = _steps(q, keys, values, full_low, full_high, here, tokens, visible, window, scale, o, top, mass, False, DIM, DPAD, STEP)
    o, top, mass = _steps(q, keys, values, full_high, stop, here, tokens, visible, window, scale, o, top, mass, True, DIM, DPAD, STEP)
    tl.store(output + address, o / tl.where(mass == 0, 1.0, mass)[:, None], mask=inside)
    tl.store(lse + place * chunk + row, tl.where(mass == 0, float("-inf"), (top * scale + tl.log2(tl.where(mass == 0, 1.0, mass))) * 0.6931471805599453), mask=row < chunk)
