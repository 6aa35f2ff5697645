"""The calibration store: what comes back codes like what went in, and nothing foreign, damaged or pickled comes back."""

import json
import pickle
import shutil

import pytest
import torch
from torch import nn

from kvq import store
from kvq.errors import Refusal
from kvq.quantizer import set_buffers


class Table(nn.Module):
    """A codec with a buffer of its own, one in a submodule, and one that stays empty."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Module()
        for owner, name in ((self, "table"), (self.inner, "levels"), (self, "mean")):
            owner.register_buffer(name, None)

    def fit(self, value):
        self.table = torch.full((3, 2), float(value)).T  # not contiguous
        self.inner.levels = torch.tensor(value, dtype=torch.int32)
        return self


def make_pairs():
    return [(Table(), Table()), (None, None), (Table(), Table())]


class Fit:
    def __init__(self):
        self.calls = 0

    def __call__(self):
        self.calls += 1
        pairs = make_pairs()
        for i, codec in enumerate(c for pair in pairs for c in pair if c is not None):
            codec.fit(i + 1)
        return pairs


RECIPE = {"quant": "table", "codec": {"bits": 2}, "model": {"content": "ab"}, "seed": 0, "code": "1"}


def fetch(folder, fit, recipe=RECIPE):
    return store.fetch(make_pairs=make_pairs, fit=fit, recipe=recipe, folder=folder, devices=["cpu"] * 3)


def entry(folder):
    return next(folder.glob("*.safetensors"))


def test_a_stored_calibration_comes_back_without_a_fit(tmp_path):
    fit = Fit()
    for _ in range(2):
        pairs = fetch(tmp_path, fit)
        values = [int(codec.inner.levels) for pair in pairs for codec in pair if codec is not None]
        assert values == [1, 2, 3, 4] and pairs[1] == (None, None) and pairs[0][0].mean is None
        assert torch.equal(pairs[2][1].table, torch.full((2, 3), 4.0)) and pairs[0][0].inner.levels.dtype == torch.int32
    assert fit.calls == 1


@pytest.mark.parametrize("field,value", [("seed", 1), ("codec", {"bits": 3}), ("model", {"content": "cd"}), ("code", "2")])
def test_another_recipe_is_another_calibration(tmp_path, field, value):
    fit = Fit()
    fetch(tmp_path, fit)
    fetch(tmp_path, fit, {**RECIPE, field: value})
    assert fit.calls == 2 and len(list(tmp_path.iterdir())) == 2


def test_a_foreign_recipe_under_our_name_is_refused_by_field(tmp_path):
    fit = Fit()
    fetch(tmp_path, fit)
    other = {**RECIPE, "seed": 5}
    shutil.copy(entry(tmp_path), store.path_of(other, tmp_path))
    with pytest.raises(Refusal, match=r"another seed \(0, wanted 5\)"):
        fetch(tmp_path, fit, other)
    assert fit.calls == 1


@pytest.mark.parametrize("damage", [lambda b: b[: len(b) // 2], lambda b: b"", lambda b: b[:20], lambda b: b"x" * len(b), lambda b: b[:-1]], ids=range(5))
def test_a_damaged_entry_is_made_again(tmp_path, damage, caplog):
    fit = Fit()
    fetch(tmp_path, fit)
    path = entry(tmp_path)
    path.write_bytes(damage(path.read_bytes()))
    pairs = fetch(tmp_path, fit)
    assert fit.calls == 2 and int(pairs[2][0].inner.levels) == 3 and "damaged" in caplog.text
    fetch(tmp_path, fit)
    assert fit.calls == 2


class Bomb:
    def __reduce__(self):
        return pytest.fail, ("a stored calibration was unpickled",)


def test_nothing_is_ever_unpickled(tmp_path):
    fit = Fit()
    path = store.path_of(RECIPE, tmp_path)
    path.write_bytes(pickle.dumps(Bomb()))
    fetch(tmp_path, fit)
    torch.save({"a": Bomb()}, path)
    fetch(tmp_path, fit)
    assert fit.calls == 2


def test_codecs_without_buffers_are_stored_too(tmp_path):
    calls = []
    for _ in range(2):
        store.fetch(make_pairs=lambda: [(nn.Module(), nn.Module())], fit=lambda: calls.append(1) or [(nn.Module(), nn.Module())], recipe=RECIPE, folder=tmp_path, devices=["cpu"])
    assert calls == [1]


def test_a_failed_fit_stores_nothing(tmp_path):
    def fail():
        raise ValueError("no gradient")

    with pytest.raises(ValueError, match="no gradient"):
        fetch(tmp_path, fail)
    assert not list(tmp_path.iterdir())


def test_the_key_does_not_depend_on_how_numbers_are_spelt(tmp_path):
    again = json.loads(json.dumps({**RECIPE, "codec": {"bits": 2.0}}))
    assert store.path_of(RECIPE, tmp_path) == store.path_of(again, tmp_path)
    fit = Fit()
    fetch(tmp_path, fit)
    fetch(tmp_path, fit, again)
    assert fit.calls == 1


def test_the_code_that_fits_is_part_of_the_key():
    assert len(store.code_version()) == 16
    for pattern in store.FITTING_CODE:
        assert list(store.ROOT.glob(pattern)), f"{pattern} names no file"


@pytest.mark.parametrize("name", ["unknown.levels", "fit", "nothing"])
def test_a_buffer_that_does_not_belong_is_refused(name):
    with pytest.raises(ValueError, match=name):
        set_buffers(Table(), {name: torch.zeros(1)})
