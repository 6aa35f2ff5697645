"""make wheelhouse: every wheel that another machine needs to install the pins without an index. Standard library and pip only.

    python -m kvq.wheelhouse wheelhouse --python 3.12 [--machine x86_64] [--glibc 34] [--without torch] [--extra dev] [--only NAME]

Packages that exist as source only are built here first (they are pure Python). `--without torch` leaves torch and what only torch needs
to the target, for machines that bring a CUDA build of their own.
"""

import argparse
import re
import subprocess
import sys
import tempfile
import tomllib
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LEFT = "+target"
"""Local version of the stand-in wheel of a package that the target brings itself: higher than any other, so the resolver takes it."""


def pins(extras: list[str], only: list[str]) -> list[str]:
    """The requirements of pyproject.toml with these extras; `only` keeps the named ones. Raises SystemExit on a name that is none of them."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    found = [*project["dependencies"], *(pin for extra in extras for pin in project["optional-dependencies"][extra])]
    if unknown := set(only) - {_name(pin) for pin in found}:
        raise SystemExit(f"error: {', '.join(sorted(unknown))} is not pinned in pyproject.toml.")
    return [pin for pin in found if not only or _name(pin) in only]


def collect(out: Path, python: str, machine: str, glibc: int, requirements: list[str], without: list[str]) -> None:
    """Fill `out` with wheels and requirements.txt. Raises SystemExit with pip's reason if a package cannot be had."""
    out.mkdir(parents=True, exist_ok=True)
    (out / "requirements.txt").write_text("\n".join(requirements) + "\n")
    with tempfile.TemporaryDirectory() as standins:
        for pin in requirements:
            if _name(pin) in without:
                _stand_in(Path(standins), *pin.split("=="))
        target = ["--only-binary", ":all:", "--python-version", python, "--implementation", "cp", "--abi", f"cp{python.replace('.', '')}", "--abi", "abi3", "--abi", "none"]
        for tag in platforms(machine, glibc):
            target += ["--platform", tag]
        built: set[str] = set()
        while True:
            done = _pip("download", "-d", out, "--find-links", out, "--find-links", standins, *target, "-r", out / "requirements.txt")
            if done.returncode == 0:
                break
            source_only = re.search(r"No matching distribution found for (\S+)", done.stderr)
            if not source_only or source_only[1] in built:
                raise SystemExit(f"error: {done.stderr.strip().splitlines()[-1]}")
            built.add(source_only[1])
            if (build := _pip("wheel", "--no-deps", "-w", out, source_only[1])).returncode:
                raise SystemExit(f"error: {source_only[1]} has neither a wheel for Python {python} nor a source that builds here: {build.stderr.strip().splitlines()[-1]}")
    for wheel in out.glob(f"*{LEFT}-*.whl"):
        wheel.unlink()


def platforms(machine: str, glibc: int) -> list[str]:
    """Wheel tags that a Linux machine with this glibc (its minor version) accepts, newest first."""
    old = [f"manylinux{year}_{machine}" for year in ("2014", "2010", "1")] if machine == "x86_64" else [f"manylinux2014_{machine}"]
    return [*(f"manylinux_2_{minor}_{machine}" for minor in range(glibc, 4, -1)), *old, f"linux_{machine}"]


def _name(pin: str) -> str:
    return re.split(r"[=<>\[ ]", pin)[0]


def _stand_in(folder: Path, name: str, version: str) -> None:
    """A wheel without content, dependencies or future: it keeps the resolver from fetching the real package."""
    info = f"{name}-{version}{LEFT}.dist-info"
    with zipfile.ZipFile(folder / f"{name}-{version}{LEFT}-py3-none-any.whl", "w") as wheel:
        wheel.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}{LEFT}\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: kvq\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")


def _pip(*arguments) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True)


def main(arguments: list[str] | None = None) -> int:
    """Collect and say how to install."""
    parser = argparse.ArgumentParser(prog="python -m kvq.wheelhouse")
    parser.add_argument("out", type=Path)
    parser.add_argument("--python", default=f"{sys.version_info.major}.{sys.version_info.minor}", help="version on the target: 3.11 or 3.12")
    parser.add_argument("--machine", default="x86_64")
    parser.add_argument("--glibc", default=34, type=int, help="the target's glibc is at least 2.<this>")
    parser.add_argument("--without", action="append", default=[], help="a pinned package that the target has already")
    parser.add_argument("--extra", action="append", default=[], help="an extra of pyproject.toml")
    parser.add_argument("--only", action="append", default=[], help="this pin with its dependencies, not all")
    given = parser.parse_args(arguments)
    collect(given.out, given.python, given.machine, given.glibc, pins(given.extra, given.only), given.without)
    wheels = list(given.out.glob("*.whl"))
    print(f"{len(wheels)} wheels, {sum(w.stat().st_size for w in wheels) / 1e6:.0f} MB, for Python {given.python} on {given.machine} in {given.out}")
    print(f"on the target: make setup WHEELHOUSE={given.out}, or pip install --no-index --find-links {given.out} -r {given.out}/requirements.txt")
    return 0


if __name__ == "__main__":
    sys.exit(main())
