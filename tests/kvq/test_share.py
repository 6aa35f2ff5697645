"""Calibrations published and pulled: as a folder, a tar and through the hub's interface; foreign, damaged and pickled files are refused."""

import io
import pickle
import shutil
import tarfile

import pytest
import torch
from torch import nn

from kvq import share, store
from kvq.errors import Refusal
from tests.kvq.test_store import Bomb

RECIPE = {"quant": "table", "codec": {"bits": 2}, "seed": 0, "code": store.code_version()}


@pytest.fixture
def stored(tmp_path):
    """A store with two entries."""
    folder = tmp_path / "store"
    for seed in (0, 1):
        codec = nn.Module()
        codec.register_buffer("table", torch.arange(4.0) + seed)
        store.save([(codec, None)], {**RECIPE, "seed": seed}, folder)
    return folder


def names(folder):
    return sorted(p.name for p in folder.iterdir())


@pytest.mark.parametrize("place", ["folder", "deep/all.tar"])
def test_there_and_back(stored, tmp_path, place, capsys):
    assert share.main(["export", str(tmp_path / place), "--store", str(stored)]) == 0
    assert share.main(["import", str(tmp_path / place), "--store", str(tmp_path / "other")]) == 0
    assert names(tmp_path / "other") == names(stored) and "2 calibrations imported" in capsys.readouterr().out
    assert all((tmp_path / "other" / n).read_bytes() == (stored / n).read_bytes() for n in names(stored))


def test_through_the_hub(stored, tmp_path, monkeypatch):
    import huggingface_hub

    held = tmp_path / "hub"
    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", lambda self, name, **_: held.mkdir())
    monkeypatch.setattr(huggingface_hub.HfApi, "upload_folder", lambda self, *, folder_path, **_: shutil.copytree(folder_path, held, dirs_exist_ok=True))
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, local_dir, **_: shutil.copytree(held, local_dir, dirs_exist_ok=True))
    share.export(stored, "someone/calibrations")
    assert share.take(tmp_path / "other", "someone/calibrations") == names(stored)


def test_the_hub_out_of_reach_is_a_sentence(stored, monkeypatch, capsys):
    import huggingface_hub

    def fail(*_, **__):
        raise OSError("no route to host")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", fail)
    assert share.main(["import", "someone/calibrations", "--store", str(stored)]) == 2
    assert share.main(["export", "someone/calibrations", "--store", str(stored)]) == 2
    err = capsys.readouterr().err
    assert err.count("no route to host") == 2 and "import a folder or a .tar" in err


def test_what_other_code_fitted_is_refused_by_field(stored, tmp_path):
    store.save([(nn.Module(), None)], {**RECIPE, "code": "0123456789abcdef"}, stored)
    with pytest.raises(Refusal, match=r"differs in code: it was fitted by sources 0123456789abcdef"):
        share.take(tmp_path / "other", str(stored))
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("damage", [lambda b: b[:-1], lambda b: b[:9], lambda b: pickle.dumps(Bomb()), lambda b: b[:-2] + b"xx"], ids=range(4))
def test_damaged_entries_are_neither_published_nor_pulled(stored, tmp_path, damage, capsys):
    path = stored / names(stored)[0]
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(Refusal, match="damaged.*nothing was imported"):
        share.take(tmp_path / "other", str(stored))
    assert share.export(stored, str(tmp_path / "out")) == names(stored)[1:] and "left out" in capsys.readouterr().err


def test_a_renamed_entry_is_refused(stored, tmp_path):
    (stored / names(stored)[0]).rename(stored / "table-00000000.safetensors")
    with pytest.raises(Refusal, match="named after another recipe"):
        share.take(tmp_path / "other", str(stored))


def test_a_tar_reaches_no_other_place_and_brings_no_other_file(stored, tmp_path):
    whole = (stored / names(stored)[0]).read_bytes()
    with tarfile.open(tmp_path / "evil.tar", "w") as archive:
        for name, content in (("../../escaped.pkl", pickle.dumps(Bomb())), ("../" + names(stored)[0], whole), ("/abs/setup.py", b"x")):
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
        link = tarfile.TarInfo("table-11111111.safetensors")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)
    assert share.take(tmp_path / "other", str(tmp_path / "evil.tar")) == names(stored)[:1] == names(tmp_path / "other")
    assert not list(tmp_path.rglob("escaped*"))


@pytest.mark.parametrize("content", [b"", b"not a tar" * 100])
def test_nothing_to_take_is_a_sentence(tmp_path, content, capsys):
    (tmp_path / "x.tar").write_bytes(content)
    (tmp_path / "empty").mkdir()
    for place in ("x.tar", "empty", "nowhere.tar"):
        assert share.main(["import", str(tmp_path / place), "--store", str(tmp_path / "s")]) == 2
    assert share.main(["export", str(tmp_path / "out"), "--store", str(tmp_path / "empty")]) == 2
    assert "Traceback" not in capsys.readouterr().err and not (tmp_path / "s").exists()
