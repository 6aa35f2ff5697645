"""Cut the two fixed samples kept in text/ out of the sources of permissively licensed packages.

    python -m kvq.standin.excerpt
"""

import gzip
import hashlib
from collections import Counter

from kvq.standin import corpus, prose

PACKAGES = ("torch", "numpy", "scipy", "sympy", "sklearn", "pandas", "networkx", "transformers", "matplotlib", "jinja2", "rich", "pygments", "mpmath")
BYTES = {"train": {"code": 600_000, "prose": 300_000}, "heldout": {"code": 300_000, "prose": 150_000}}
LARGEST = {"code": 24_000, "prose": 12_000}


def _standard() -> set[str]:
    """Paths of the standard library's own files."""
    stdlib = corpus.roots()[0]
    return {path for path, where in corpus.files() if where.is_relative_to(stdlib) and "site-packages" not in where.parts}


def choose(split: str, sources: list[tuple[str, str]]) -> list[tuple[str, str, str]]:
    """(kind, path, text) up to the size of the split, files in the order of a hash of their path."""
    chosen, left, seen = [], dict(BYTES[split]), set()
    for path, text in sorted(sources, key=lambda pair: hashlib.sha256(b"excerpt" + pair[0].encode()).digest()):
        if corpus.held_out(path) != (split == "heldout"):
            continue
        for kind, part in (("code", text), ("prose", prose.extract(text))):
            size = len(part.encode())
            if 600 <= size <= min(LARGEST[kind], left[kind]) and not corpus.MARKER.search(part):
                for kept in corpus.distinct(iter([part]), seen):
                    chosen.append((kind, path, kept))
                    left[kind] -= size
    return chosen


def main() -> None:
    standard = _standard()
    allowed = ((path, corpus.read(where)) for path, where in corpus.files()
               if path in standard and not path.startswith("test/") or path.split("/")[0] in PACKAGES)
    sources = [(path, text) for path, text in allowed if text]
    corpus.TEXT.mkdir(exist_ok=True)
    for split in BYTES:
        chosen = choose(split, sources)
        (corpus.TEXT / f"{split}.txt.gz").write_bytes(gzip.compress(corpus.join(chosen).encode(), 9, mtime=0))
        packages = Counter(path.split("/")[0] if path not in standard else "standard library" for _, path, _ in chosen)
        print(split, sum(len(text) for *_, text in chosen), dict(packages.most_common()))


if __name__ == "__main__":
    main()
