"""Triton: ask for what a step will read, so that its many short loads wait for the L2 cache and not for memory, one after another."""

import triton
import triton.language as tl


@triton.jit
def prefetch(at):
    """Bring the 128 bytes around every pointer of `at` into the L2 cache; nothing waits for them."""
    tl.inline_asm_elementwise("prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [at.to(tl.int64)], dtype=tl.int32, is_pure=False, pack=1)


@triton.jit
def prefetch_pages(words, page, STRIDE: tl.constexpr, WORDS: tl.constexpr):
    """The WORDS words of 4 pages, page int64 [64] with every page 16 times in a row; STRIDE: words from a page to the next."""
    line = tl.arange(0, 64) % 16 * 32
    for first in tl.static_range(0, WORDS, 512):
        prefetch(words + page * STRIDE + tl.minimum(line + first, WORDS - 1))


@triton.jit
def prefetch_step(
    key_words, value_words, key_sides, value_sides, pages, first, last, key_rows, value_rows, gains,
    KEY_PAGE: tl.constexpr, VALUE_PAGE: tl.constexpr, KEY_WORDS: tl.constexpr, VALUE_WORDS: tl.constexpr, KEY_BARE: tl.constexpr, VALUE_BARE: tl.constexpr,
    TABLE: tl.constexpr,
):  # fmt: skip
    """Words and gains of the four pages from `first` on, none behind `last`. sides: at the head's first row of a page; gains: such rows of a key."""
    page = tl.minimum(first + tl.arange(0, 64) // 16, last)
    page = (tl.load(pages + page) if TABLE else page).to(tl.int64)
    prefetch_pages(key_words, page, KEY_PAGE, KEY_WORDS)
    prefetch_pages(value_words, page, VALUE_PAGE, VALUE_WORDS)
    if not KEY_BARE:
        prefetch(key_sides + (page * key_rows + tl.minimum(tl.arange(0, 64) % 16, gains - 1)) * 32)
    if not VALUE_BARE:
        prefetch(value_sides + page * value_rows * 32)
