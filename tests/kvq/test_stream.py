"""The stream of one layer: sink, codes and window in order, each token encoded once, rows of unequal length apart."""

import pytest
import torch

from kvq.stream import RaggedStream, Stream
from tests.kvq.codecs import Exact, Lossy, Spy


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def feed(stream, x, chunks):
    start = 0
    for size in chunks:
        stream.append(x[:, :, start : start + size])
        start += size
    return stream


CHUNKINGS = ([40], [1] * 40, [7, 1, 0, 13, 1, 1, 17], [39, 1])


@pytest.mark.parametrize("chunks", CHUNKINGS, ids=str)
@pytest.mark.parametrize("sink,window,block", [(0, 0, 1), (3, 0, 1), (0, 5, 1), (3, 5, 4), (0, 0, 4), (50, 0, 1), (4, 50, 4), (2, 9, 8)])
def test_every_token_is_somewhere_and_encoded_once(sink, window, block, chunks):
    x = normal(2, 3, 40, 8)
    codec = Spy(block=block)
    stream = feed(Stream(codec, sink, window, memo=False), x, chunks)
    expected = max(40 - sink - window, 0) // block * block
    assert stream.length == 40 and stream.encoded == expected and stream.exact == 40 - expected
    assert sum(part.shape[2] for part in codec.seen) == expected
    if expected:
        assert torch.equal(torch.cat(codec.seen, 2), x[:, :, sink : sink + expected])
    whole = stream.read()
    held = slice(sink, sink + expected)
    assert torch.equal(whole[:, :, :sink], x[:, :, :sink]) and torch.equal(whole[:, :, held.stop :], x[:, :, held.stop :])
    if expected:
        assert torch.equal(whole[:, :, held], codec.decode(codec.encode(x[:, :, held])))


@pytest.mark.parametrize("chunks", CHUNKINGS, ids=str)
@pytest.mark.parametrize("options", [{}, {"block": 4}, {"stateful": True}, {"stateful": True, "block": 2}], ids=str)
def test_chunks_and_memo_change_nothing(options, chunks):
    x = normal(2, 3, 40, 8)
    whole = feed(Stream(Lossy(**options), 2, 6, memo=False), x, [40])
    streams = [feed(Stream(Lossy(**options), 2, 6, memo=memo), x, chunks) for memo in (False, True)]
    for stream in streams:
        assert torch.equal(stream.read(), whole.read())
        assert all(torch.equal(stream.codes[name], whole.codes[name]) for name in whole.codes)


def test_codes_are_append_only():
    x, stream, before = normal(1, 2, 30, 8), Stream(Lossy(block=2), 1, 3, memo=True), {}
    for t in range(30):
        stream.append(x[:, :, t : t + 1])
        assert all(torch.equal(stream.codes[name][:, :, : leaf.shape[2]], leaf) for name, leaf in before.items())
        before = {name: leaf.clone() for name, leaf in stream.codes.items()}
    assert before["codes"].shape[2] * 2 == stream.encoded == 26


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("memo", [True, False])
def test_reads_in_the_dtype_that_came(memo, dtype):
    stream = feed(Stream(Exact(), 2, 3, memo), normal(1, 2, 20, 8).to(dtype), [15, 5])
    assert stream.read().dtype == dtype and torch.equal(stream.read(), normal(1, 2, 20, 8).to(dtype))


def test_the_memo_holds_decoded_codes_and_not_the_input():
    x = normal(1, 2, 20, 8)
    stream = feed(Stream(Lossy(), 0, 0, memo=True), x, [20])
    assert torch.equal(stream.read(), stream.codec.decode(stream.codes)) and not torch.allclose(stream.read(), x, atol=0.05)


def test_bytes_count_codes_and_exact_tokens_but_no_memo():
    x = normal(2, 3, 40, 8)
    for memo in (False, True):
        codes, exact, values = feed(Stream(Lossy(block=4), 4, 8, memo), x, [30, 10]).bytes()
        assert (codes, values) == (2 * 3 * 28 * 8 + 2 * 3 * 7 * 4, 2 * 3 * 28 * 8)
        assert exact == 2 * 3 * 12 * 8 * 4
    assert Stream(Lossy(), 0, 0, True).bytes() == (0, 0, 0)


def test_turns_get_the_positions_of_the_tokens_they_turn():
    x = torch.zeros(2, 1, 12, 2)
    positions = torch.stack([torch.arange(12), torch.arange(12) + 100])
    turns = (lambda y, p: y - p[:, None, :, None], lambda y, p: y + p[:, None, :, None])
    codec = Exact("pre")
    stream = Stream(codec, 1, 2, memo=False, turns=turns)
    for t in range(0, 12, 3):
        stream.append(x[:, :, t : t + 3], positions[:, t : t + 3])
    assert torch.equal(stream.codes["x"][:, 0, :, 0], positions[:, 1:10].float())
    assert torch.equal(stream.read(), x)


@pytest.mark.parametrize("memo", [True, False])
@pytest.mark.parametrize("stateful", [True, False])
def test_selected_rows_go_on_as_if_they_had_been_alone(stateful, memo):
    x, more = normal(3, 2, 20, 8), normal(4, 2, 9, 8, seed=1)
    rows = torch.tensor([2, 0, 0, 1])
    stream = feed(Stream(Lossy(block=2, stateful=stateful), 1, 3, memo), x, [20])
    stream.select(rows)
    stream.append(more)
    for b, row in enumerate(rows):
        alone = feed(Stream(Lossy(block=2, stateful=stateful), 1, 3, memo), torch.cat([x[row : row + 1], more[b : b + 1]], 2), [20, 9])
        assert torch.equal(stream.read()[b : b + 1], alone.read())


PADS = [0, 5, 17]


def ragged(x, chunks, **options):
    make = lambda: Stream(Lossy(block=4, stateful=True), 2, 3, memo=options.get("memo", False))  # noqa: E731
    return feed(RaggedStream(make, PADS), x, chunks), make


@pytest.mark.parametrize("memo", [True, False])
@pytest.mark.parametrize("chunks", [[30], [16, 10, 4], [18] + [1] * 12], ids=str)
def test_a_ragged_row_equals_the_row_alone(chunks, memo):
    x = normal(3, 2, 30, 8)
    stream, make = ragged(x, chunks, memo=memo)
    for b, pad in enumerate(PADS):
        alone = feed(make(), x[b : b + 1, :, pad:], [30 - pad])
        assert torch.equal(stream.read()[b : b + 1, :, pad:], alone.read())
    assert not stream.read()[2, :, :17].any()
    assert stream.length == 30 and stream.encoded + stream.exact == 30


def test_a_ragged_stream_can_be_reordered():
    x, more = normal(3, 2, 30, 8), normal(4, 2, 9, 8, seed=1)
    stream, make = ragged(x, [30])
    rows = torch.tensor([2, 2, 0, 1])
    stream.select(rows)
    stream.append(more)
    for b, row in enumerate(rows.tolist()):
        alone = feed(make(), torch.cat([x[row : row + 1, :, PADS[row] :], more[b : b + 1]], 2), [30 - PADS[row], 9])
        assert torch.equal(stream.read()[b : b + 1, :, PADS[row] :], alone.read())


def test_a_lost_token_in_a_ragged_row_is_noticed():
    stream, _ = ragged(normal(3, 2, 30, 8), [30])
    stream.rows[1].tail = stream.rows[1].tail[:, :, 1:]
    assert stream.encoded + stream.exact != 30
