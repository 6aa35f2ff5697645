"""Publishing and pulling stored calibrations: python -m kvq.share export|import <folder, .tar or hub repository id> [--store DIR].

Every entry is read whole and its digest checked before it is copied, on both sides; nothing but safetensors files is taken, and nothing
is ever unpickled. An entry that other code fitted is refused with the field named: it would never be found.
"""

import argparse
import os
import re
import shutil
import sys
import tarfile
import tempfile
from pathlib import Path

from kvq import store
from kvq.errors import Refusal

ENTRY = re.compile(r"[\w.-]+-[0-9a-f]{8}\.safetensors")
HUB = re.compile(r"[\w.-]+/[\w.-]+")


def export(folder: Path, to: str) -> list[str]:
    """Copy every sound entry of `folder` to a folder, a .tar file or a hub repository; return their names. Raises Refusal if there is none."""
    entries = _sound(sorted(Path(folder).glob("*.safetensors")))
    if not entries:
        raise Refusal(f"{folder} holds no stored calibration; run a cell first, or name the folder in KVQ_CALIB_DIR.")
    if to.endswith(".tar"):
        Path(to).parent.mkdir(parents=True, exist_ok=True)
        with tarfile.open(to, "w") as archive:
            for entry in entries:
                archive.add(entry, arcname=entry.name)
    elif _is_hub(to):
        _upload(entries, to)
    else:
        Path(to).mkdir(parents=True, exist_ok=True)
        for entry in entries:
            _copy(entry, Path(to))
    return [entry.name for entry in entries]


def take(folder: Path, source: str) -> list[str]:
    """Copy entries from a folder, a .tar file or a hub repository into `folder`; return their names.

    Raises Refusal if there is none, if one is damaged or misnamed, or if other code fitted one; then nothing is copied.
    """
    with tempfile.TemporaryDirectory() as here:
        found = _fetch(source, Path(here))
        if not found:
            raise Refusal(f"{source} holds no stored calibration (*.safetensors).")
        for entry in found:
            _check(entry)
        Path(folder).mkdir(parents=True, exist_ok=True)
        for entry in found:
            _copy(entry, Path(folder))
        return [entry.name for entry in found]


def _check(entry: Path) -> None:
    try:
        recipe, _ = store.read(entry)
    except store.Damaged as error:
        raise Refusal(f"{error}; nothing was imported.") from error
    if recipe.get("code") != store.code_version():
        raise Refusal(
            f"{entry.name} differs in code: it was fitted by sources {recipe.get('code')}, these are {store.code_version()}; "
            "check out the commit that it was made with, or calibrate again. Nothing was imported."
        )
    if store.path_of(recipe, entry.parent).name != entry.name:
        raise Refusal(f"{entry.name} is named after another recipe than it holds ({store.path_of(recipe, entry.parent).name}); nothing was imported.")


def _sound(entries: list[Path]) -> list[Path]:
    kept = []
    for entry in entries:
        try:
            store.read(entry)
            kept.append(entry)
        except store.Damaged as error:
            print(f"left out: {error}", file=sys.stderr)
    return kept


def _fetch(source: str, here: Path) -> list[Path]:
    if Path(source).is_dir():
        return sorted(p for p in Path(source).glob("*.safetensors") if p.is_file())
    if Path(source).is_file():
        return _unpack(Path(source), here)
    if _is_hub(source):
        from huggingface_hub import snapshot_download

        try:
            return sorted(Path(snapshot_download(source, repo_type="dataset", allow_patterns="*.safetensors", local_dir=here)).glob("*.safetensors"))
        except Exception as error:  # each transport library has its own errors for "no network"
            raise Refusal(f"{source} cannot be pulled from the hub: {str(error).strip().splitlines()[0]} Without network, import a folder or a .tar.") from error
    raise Refusal(f"There is nothing at '{source}'; give a folder, a .tar file or a hub repository id (owner/name).")


def _unpack(archive: Path, here: Path) -> list[Path]:
    """The regular files of a tar that are named like entries, whatever folders they claim to be in; sizes are the archive's own."""
    found = []
    try:
        with tarfile.open(archive, "r:") as stream:
            for member in stream:
                name = Path(member.name).name
                if member.isreg() and ENTRY.fullmatch(name):
                    with stream.extractfile(member) as inside, open(here / name, "wb") as out:
                        shutil.copyfileobj(inside, out)
                    found.append(here / name)
    except (tarfile.TarError, OSError, EOFError) as error:
        raise Refusal(f"{archive} is not a readable .tar file ({str(error) or type(error).__name__}); nothing was imported.") from error
    return found


def _upload(entries: list[Path], repository: str) -> None:
    from huggingface_hub import HfApi

    with tempfile.TemporaryDirectory() as here:
        for entry in entries:
            shutil.copy(entry, here)
        try:
            HfApi().create_repo(repository, repo_type="dataset", exist_ok=True, private=True)
            HfApi().upload_folder(repo_id=repository, repo_type="dataset", folder_path=here, commit_message="Add stored calibrations")
        except Exception as error:
            raise Refusal(f"{repository} cannot be written: {str(error).strip().splitlines()[0]} Log in (hf auth login), or export a folder or a .tar.") from error


def _copy(entry: Path, folder: Path) -> None:
    from kvq.results import replace

    replace(folder / entry.name, lambda temporary: shutil.copy(entry, temporary))


def _is_hub(place: str) -> bool:
    return bool(HUB.fullmatch(place)) and not Path(place).exists() and not Path(place).parent.exists()


def main(arguments: list[str] | None = None) -> int:
    """Print what was copied; 0, or 2 with a sentence."""
    parser = argparse.ArgumentParser(prog="python -m kvq.share")
    parser.add_argument("what", choices=("export", "import"))
    parser.add_argument("place", help="folder, .tar file or hub repository id")
    parser.add_argument("--store", default=os.environ.get("KVQ_CALIB_DIR", "outputs/calibrations"), type=Path)
    given = parser.parse_args(arguments)
    try:
        names = export(given.store, given.place) if given.what == "export" else take(given.store, given.place)
    except Refusal as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print("\n".join(names))
    print(f"{len(names)} calibrations {given.what}ed")
    return 0


if __name__ == "__main__":
    sys.exit(main())
