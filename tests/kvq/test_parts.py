"""Stretches cover all examples once; records are gathered only when every part is whole."""

from types import SimpleNamespace

import pytest

from kvq import parts, predictions
from kvq.errors import Refusal


@pytest.mark.parametrize("count", [0, 1, 5, 12])
@pytest.mark.parametrize("several", [1, 2, 3, 7])
def test_stretches_leave_nothing_out(count, several):
    examples = list(range(count))
    assert [e for part in range(several) for e in parts.stretch(examples, part, several)] == examples


@pytest.mark.parametrize("part, several", [(2, 2), (-1, 2), (0, 0), (True, 2), (0.0, 1), ("0", 1)])
def test_impossible_parts_are_refused(part, several):
    with pytest.raises(Refusal, match="part counts from 0"):
        parts.check(part, several)


def test_forced_parts_are_refused():
    parts.check(0, 1, force=True)
    with pytest.raises(Refusal, match="whole cell"):
        parts.check(0, 2, force=True)


def test_records_come_in_the_order_of_examples_once_all_parts_are_whole(tmp_path):
    examples = [SimpleNamespace(id=str(i)) for i in range(5)]
    files = [tmp_path / f"run{parts.suffix(part, 2)}.jsonl" for part in range(2)]
    assert parts.gather(files, examples) is None
    record = {"subset": "", "metrics": {}, "usage": {}}
    for part, path in enumerate(files):
        mine = [{"id": e.id, **record} for e in reversed(parts.stretch(examples, part, 2))]
        predictions.append(path, mine[:-1])
        path.open("a").write(predictions.line(mine[-1])[:20])  # the last line is being written
        assert parts.gather(files, examples) is None
        path.write_text("".join(map(predictions.line, mine)))
    assert [r["id"] for r in parts.gather(files, examples)] == ["0", "1", "2", "3", "4"]
