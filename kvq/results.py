"""Result rows: tidy and long, one parquet per run named by a hash of what was computed, written whole or not at all. No torch."""

import hashlib
import importlib.metadata
import json
import math
import os
import subprocess
import uuid
from collections.abc import Mapping
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from kvq.errors import Refusal

COLUMNS = {
    "run": "str", "model": "str", "quant": "str", "task": "str", "data": "str", "calib": "str",
    "bits": "float64", "bits_stored": "float64", "bits_total": "float64", "encoded_tokens": "int64",
    "subset": "str", "metric": "str", "value": "float64", "stderr": "float64", "n": "int64",
    "seed": "int64", "config": "str", "commit": "str", "dirty": "bool", "date": "str", "device": "str", "torch": "str", "transformers": "str",
}  # fmt: skip
"""Column name to dtype. bits: the label; bits_stored: codes and per-token side data as held, per value coded; bits_total: everything
held for one sequence (codebooks and exact tokens included), per value cached. `config` is the resolved JSON of the run."""


DIGEST = b"kvq.digest"
"""Key of the rows' hash in a file's metadata; committed files of earlier versions have none."""


def run_id(identity: Mapping) -> str:
    """8 hex digits of the canonical JSON of what is computed; ints and floats that are equal hash alike."""
    return hashlib.sha256(json.dumps(_canonical(identity), sort_keys=True).encode()).hexdigest()[:8]


def _canonical(value):
    if isinstance(value, Mapping):
        return {str(k): _canonical(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_canonical(v) for v in value]
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else value


HOW = ("batch_size", "chunk", "memory_gb", "dtype", "device", "device_map")
"""Options that say how a cell is computed, not what."""


def fingerprint(quant: str, task: str, options: Mapping) -> str:
    """What a run's own options ask for, as 8 hex digits: without empty options, those of HOW and the label of the bits.

    Runs of one cell have different names if they were made in another number type, or before an option or the version of embedded examples entered the name.
    """

    def told(node):
        return {k: told(v) for k, v in node.items() if v is not None and k not in HOW} if isinstance(node, Mapping) else node

    parts = {k: options[k] for k in ("model", "task", "calib", "prefill", "seed")}
    codecs = {k: v for k, v in options["quant"].items() if k != "bits"}
    return run_id({"names": [quant, task], "fused": options.get("attention") == "fused", **told({**parts, "quant": codecs})})


def fingerprints(folder: Path) -> dict[str, list[str]]:
    """Runs in `folder`/runs by fingerprint; empty where there are none."""
    if not any(folder.glob("runs/*.parquet")):
        return {}
    rows = load(folder).drop_duplicates("run")
    found: dict[str, list[str]] = {}
    for row in rows.itertuples():
        found.setdefault(fingerprint(row.quant, row.task, json.loads(row.config)), []).append(row.run)
    return found


def write(rows: list[dict], path: Path) -> pd.DataFrame:
    """Check rows against the schema and write one parquet through a temporary file. Raises ValueError on a bad row."""
    frame = pd.DataFrame(rows)
    missing, extra = set(COLUMNS) - set(frame.columns), set(frame.columns) - set(COLUMNS)
    if missing or extra:
        raise ValueError(f"Rows do not follow the schema: missing {sorted(missing)}, unknown {sorted(extra)}.")
    frame = frame[list(COLUMNS)].astype(COLUMNS)
    for column in ("bits", "bits_stored", "bits_total", "value"):
        bad = frame[~frame[column].map(math.isfinite)]
        if len(bad):
            raise ValueError(f"Column {column} is not finite for metric {bad.metric.iloc[0]} of subset {bad.subset.iloc[0]}; nothing was written.")
    if ((frame.quant != "fp16") & (frame.encoded_tokens <= 0)).any():
        raise ValueError(f"No token was encoded under quant={frame.quant.iloc[0]}: the score would be fp16 under another name; nothing was written.")
    table = pa.Table.from_pandas(frame, preserve_index=False)
    table = table.replace_schema_metadata({**table.schema.metadata, DIGEST: _digest(frame)})
    replace(path, lambda temporary: pq.write_table(table, temporary, write_page_checksum=True, write_statistics=False))
    return frame


def _digest(frame: pd.DataFrame) -> bytes:
    """Hash of every value as it is read back."""
    return hashlib.sha256(frame.to_csv(index=False).encode()).hexdigest().encode()


def replace(path: Path, save) -> None:
    """Call save(temporary path) and rename onto `path`, so that a reader sees the old file, the new one, or none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}")  # process ids repeat from machine to machine
    try:
        save(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def read(path: Path) -> pd.DataFrame:
    """One run's rows. Raises Refusal if the file is damaged or of another schema."""
    try:
        table = pq.ParquetFile(path, page_checksum_verification=True).read()
        frame = table.to_pandas()
    except Exception as error:
        raise Refusal(f"{path} is not a readable result file ({type(error).__name__}); delete it and run the cell again.") from error
    kept = (table.schema.metadata or {}).get(DIGEST)
    if kept is not None and kept != _digest(frame):
        raise Refusal(f"{path} is not what was written (its digest does not match); delete it and run the cell again.")
    if list(frame.columns) != list(COLUMNS) or not all(_is(frame[column], kind) for column, kind in COLUMNS.items()) or frame.empty:
        raise Refusal(f"{path} has other columns than this version writes; delete it and run the cell again.")
    return frame


def _is(column: pd.Series, kind: str) -> bool:
    return pd.api.types.is_string_dtype(column) if kind == "str" else column.dtype == kind


def load(folder: Path = Path("results"), **where) -> pd.DataFrame:
    """All committed rows under `folder`/runs, filtered by column values: load(task="longbench", quant=["km", "gsrq"])."""
    frames = [read(path) for path in sorted(Path(folder).glob("runs/*.parquet"))]
    rows = pd.concat(frames, ignore_index=True) if frames else pd.DataFrame({c: pd.Series(dtype=t) for c, t in COLUMNS.items()})
    for column, wanted in where.items():
        rows = rows[rows[column].isin([wanted] if isinstance(wanted, str) or not hasattr(wanted, "__iter__") else list(wanted))]
    return rows


def provenance(device: str) -> dict:
    """Where a row comes from: commit (KVQ_COMMIT, where it is set, speaks for an exported tree), dirty flag, UTC date, device, library versions."""

    def git(*arguments):
        found = subprocess.run(["git", *arguments], capture_output=True, text=True, cwd=Path(__file__).parent)
        return found.stdout.strip() if found.returncode == 0 else ""

    exported = os.environ.get("KVQ_COMMIT", "")
    return {
        "commit": exported or git("rev-parse", "--short=12", "HEAD"),
        "dirty": not exported and bool(git("status", "--porcelain", "--untracked-files=no", "--", ":!results")),
        "date": pd.Timestamp.now("UTC").strftime("%Y-%m-%dT%H:%M:%SZ"),
        "device": device,
        "torch": importlib.metadata.version("torch"),
        "transformers": importlib.metadata.version("transformers"),
    }
