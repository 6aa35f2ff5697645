"""FlashInfer's baseline without FlashInfer: what each call is handed, judged by a stand-in that reads it as FlashInfer documents it."""

import sys
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton")

from kernels import bench_flashinfer  # noqa: E402
from kernels.attention import attend  # noqa: E402
from kernels.bench_flashinfer import DIM, Variant  # noqa: E402

BATCH, HEADS, KV, TOKENS = 3, 4, 2, 128


def whole(query, pages, table, lengths, layout, scale):
    """Attention over paged caches as FlashInfer's documentation defines it, a sequence at a time."""
    outputs = []
    for q, row, tokens in zip(query, table, lengths):
        pair = [x[row.long()].float() for x in pages]  # [pages, page, kv, DIM] or [pages, kv, page, DIM]
        pair = [(x if layout == "NHD" else x.transpose(1, 2)).reshape(-1, KV, DIM)[:tokens].transpose(0, 1)[None] for x in pair]
        outputs.append(attend(q[None], *pair, scale)[0][0])
    return torch.stack(outputs).to(query.dtype)


class Wrapper:
    def __init__(self, workspace, layout, use_cuda_graph=False, use_tensor_cores=False, **buffers):
        assert workspace.dtype == torch.uint8 and bool(buffers) == use_cuda_graph
        self.layout, self.buffers = layout, buffers

    def plan(self, indptr, indices, last, heads, kv, dim, page, q_data_type, kv_data_type):
        assert (heads, kv, dim, q_data_type) == (HEADS, KV, DIM, torch.float16) and len(self.buffers.get("paged_kv_last_page_len_buffer", last)) == BATCH
        ends = zip(indptr[:-1].tolist(), indptr[1:].tolist())
        self.rows, self.lengths, self.kind = [indices[a:b] for a, b in ends], ((indptr.diff() - 1) * page + last).tolist(), kv_data_type

    def run(self, query, pages):
        assert {x.dtype for x in pages} == {self.kind}
        return whole(query, pages, self.rows, self.lengths, self.layout, DIM**-0.5)


def xqa(query, pages, workspace, table, lengths, longest, bmm1_scale, bmm2_scale, kv_layout):
    assert table.dtype == torch.int32 and lengths.dtype == torch.uint32 and longest == TOKENS and bmm2_scale == 1 and not workspace.any()
    return whole(query, pages, table, lengths.view(torch.int32).tolist(), kv_layout, bmm1_scale)


def single(query, key, value, kv_layout, use_tensor_cores):
    return whole(query[None], (key[None], value[None]), torch.zeros(1, 1), [TOKENS], kv_layout, DIM**-0.5)[0]


FAKE = SimpleNamespace(BatchDecodeWithPagedKVCacheWrapper=Wrapper, single_decode_with_kv_cache=single, decode=SimpleNamespace(xqa_batch_decode_with_kv_cache=xqa))
CASES = [(p, b, v) for p in bench_flashinfer.PRECISIONS for b in (1, BATCH) for v in bench_flashinfer.variants(b) if b > 1 or v.call.startswith("single")]


@pytest.mark.parametrize("precision, batch, variant", CASES, ids=[f"b{b} {v.name(p)}" for p, b, v in CASES])
def test_every_call_attends_to_the_tokens_that_it_is_checked_against(precision, batch, variant):
    flat = [torch.randn(batch, TOKENS * KV * DIM).to(bench_flashinfer.PRECISIONS[precision]) for _ in range(2)]
    query = torch.randn(batch, HEADS, DIM, dtype=torch.float16)
    sets = [tuple(bench_flashinfer.paged(x, variant, batch, TOKENS) for x in flat)]
    found = bench_flashinfer.attention(FAKE, variant, query, sets, TOKENS, torch.zeros(8, dtype=torch.uint8))(0)
    asked = attend(query, *(bench_flashinfer.dense(x, variant.layout, batch) for x in sets[0]), DIM**-0.5)[0]
    assert torch.allclose(found.float(), asked, atol=2e-3)
    if variant.layout == "HND" and not variant.page:  # then keys of a head lie in a row: the one order that needs no reasoning
        assert torch.equal(bench_flashinfer.dense(sets[0][0], "HND", batch).float(), flat[0].view(batch, KV, TOKENS, DIM).float())


def test_every_way_has_a_row_of_its_own():
    one, many = ([v.name("fp8") for v in bench_flashinfer.variants(batch)] for batch in (1, 16))
    assert len(set(one)) == len(one) and set(many) < set(one) and {name.split(",")[0] for name in one} == {"flashinfer fp8"}
    assert all("single" in name for name in set(one) - set(many)) and [v.call for v in bench_flashinfer.variants(1, ["xqa"])] == ["xqa"] * 4


def test_a_wrong_output_is_no_baseline(monkeypatch):
    monkeypatch.setattr(bench_flashinfer, "measure", lambda call, count: (float(count), 1.0, 2.0))
    monkeypatch.setattr(bench_flashinfer, "COLD", 3 * 2 * BATCH * KV * TOKENS * DIM)
    spoiled = SimpleNamespace(**vars(FAKE) | {"decode": SimpleNamespace(xqa_batch_decode_with_kv_cache=lambda query, *rest, **options: 1.05 * xqa(query, *rest, **options))})
    elements = 2 * BATCH * KV * TOKENS * DIM
    for precision, limit, sets, size in (("fp16", bench_flashinfer.LIMIT, 2, 2 * elements), ("fp8", bench_flashinfer.XQA_LIMIT, 3, elements)):
        found = dict(bench_flashinfer.results(spoiled, precision, ["batch", "xqa"], (HEADS, KV, BATCH, TOKENS), "cpu"))
        for variant, result in found.items():
            off = 0.05 if variant.call == "xqa" else 0
            assert isinstance(result, ArithmeticError) == (off > limit), (variant, result)
            if off <= limit:
                assert result["off"] == pytest.approx(off, abs=2e-3) and result["times"][0] == sets and result["bytes"] == size
        assert len(found) == 8 and all("off by" in str(r) for r in found.values() if isinstance(r, Exception))


def test_ragged_pages_are_refused():
    with pytest.raises(ValueError, match="100 tokens are not whole pages of 64"):
        bench_flashinfer.paged(torch.zeros(1, 100 * DIM), Variant("xqa", 64, "NHD"), 1, 100)


def test_without_the_package_one_sentence_says_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "flashinfer", None)
    with pytest.raises(SystemExit, match="FlashInfer cannot be imported .*pip install flashinfer-python"):
        bench_flashinfer.package()
