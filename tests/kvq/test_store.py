"""The calibration store: what comes back codes like what went in, and nothing foreign, damaged or pickled comes back."""

import itertools
import json
import pickle
import shutil
import threading
import time

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


def test_content_tells_codecs_apart_by_any_buffer():
    def pairs(values):
        return [tuple(Table().fit(value) for value in values), (None, None)]

    assert store.content(pairs((1, 2))) == store.content(pairs((1, 2)))
    assert len({store.content(pairs(values)) for values in ((1, 2), (2, 1), (1, 3))}) == 3


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


FIELDS = {"quant": "other", "codec": {"bits": 3}, "model": {"content": "cd"}, "revision": "b", "tokens": 9, "text": "t2", "seed": 1, "code": "2"}
FULL = {"quant": "table", "codec": {"bits": 2}, "model": {"content": "ab"}, "revision": None, "tokens": 8, "text": "t1", "seed": 0, "code": "1"}


def test_a_foreign_entry_is_refused_in_every_combination_of_fields(tmp_path):
    fit = Fit()
    fetch(tmp_path / "a", fit, FULL)
    for size in range(1, len(FIELDS) + 1):
        for fields in itertools.combinations(sorted(FIELDS), size):
            wanted = {**FULL, **{field: FIELDS[field] for field in fields}}
            folder = tmp_path / "-".join(fields)
            folder.mkdir()
            shutil.copy(entry(tmp_path / "a"), store.path_of(wanted, folder))
            with pytest.raises(Refusal) as refused:
                fetch(folder, fit, wanted)
            assert all(f"{field} ({FULL[field]}, wanted {FIELDS[field]})" in str(refused.value) for field in fields)
    assert fit.calls == 1


def test_every_flipped_byte_is_noticed(tmp_path):
    fetch(tmp_path, Fit())
    path = entry(tmp_path)
    whole = path.read_bytes()
    for at in range(0, len(whole), 3):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        try:
            recipe, _ = store.read(path)
        except store.Damaged:
            continue
        assert recipe != RECIPE, f"byte {at} of {len(whole)} went unnoticed"


def test_of_two_that_want_the_same_one_fits_and_the_other_waits(tmp_path):
    fit, results = Fit(), []

    def slow():
        time.sleep(0.5)
        return fit()

    threads = [threading.Thread(target=lambda: results.append(fetch(tmp_path, slow))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert fit.calls == 1 and [int(pairs[2][1].inner.levels) for pairs in results] == [4, 4, 4] and len(list(tmp_path.iterdir())) == 1


def test_without_leave_to_fit_the_nearest_entry_is_named_by_its_differences(tmp_path):
    def strict(recipe):
        return store.fetch(make_pairs=make_pairs, fit=Fit(), recipe=recipe, folder=tmp_path, devices=["cpu"] * 3, may_fit=False)

    with pytest.raises(Refusal, match="there is none of table at all.*calib-import"):
        strict(FULL)
    fetch(tmp_path, Fit(), {**FULL, "seed": 5})
    fetch(tmp_path, Fit(), {**FULL, "seed": 5, "text": "t9", "code": "7"})
    with pytest.raises(Refusal, match=r"the nearest, table-\w{8}\.safetensors, differs in seed"):
        strict(FULL)
    assert int(strict({**FULL, "seed": 5})[0][0].inner.levels) == 1
