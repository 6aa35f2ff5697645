"""Groups cover every channel once, keep the block order, and treat unrotated channels as asked."""

import pytest
import torch

from blockgtq.layout import arrange, static_pairs, unrotated

PAIRS = torch.tensor([[0, 2], [1, 3]])


def test_unrotated_and_static_pairs():
    rest = unrotated(PAIRS, 8)
    assert rest.tolist() == [4, 5, 6, 7] and static_pairs(rest).tolist() == [[4, 6], [5, 7]]
    assert static_pairs(unrotated(PAIRS, 4)).shape == (0, 2)
    with pytest.raises(ValueError, match="partial=split or merge"):
        static_pairs(torch.tensor([4, 5, 6]))


def test_stable_order_within_a_width():
    pairs = torch.tensor([[0, 4], [1, 5], [2, 6], [3, 7]])
    order, groups = arrange(torch.tensor([[3, 1, 3, 1], [2, 2, 2, 2]]), pairs, torch.tensor([]), 0, False)
    assert order.tolist() == [[1, 5, 3, 7, 0, 4, 2, 6], [0, 4, 1, 5, 2, 6, 3, 7]]
    assert [(g.head, g.start, g.size, g.width, g.seed) for g in groups] == [(0, 0, 4, 1, 43), (0, 4, 4, 3, 45), (1, 0, 8, 2, 44)]


@pytest.mark.parametrize(
    ("merge", "rest_width", "order", "shape"),
    [
        (False, 2, [1, 3, 0, 2, 4, 5], [(2, 1, 43), (2, 2, 44), (2, 2, 99)]),
        (True, 2, [1, 3, 0, 2, 4, 5], [(2, 1, 43), (4, 2, 44)]),
        (True, 3, [1, 3, 0, 2, 4, 5], [(2, 1, 43), (2, 2, 44), (2, 3, 45)]),
    ],
)
def test_unrotated_channels(merge, rest_width, order, shape):
    stored, groups = arrange(torch.tensor([[2, 1]]), PAIRS, torch.tensor([4, 5]), rest_width, merge)
    assert stored[0].tolist() == order and [(g.size, g.width, g.seed) for g in groups] == shape
