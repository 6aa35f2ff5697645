"""One run's result rows from its records: scores beside fp16 on the same examples, three bit numbers, seconds."""

import json

from kvq import results, statistics
from kvq.errors import Refusal

FOLDERS = ("results", "outputs", "calibrations")
"""Settings that say where files are, not what was computed: they stay out of rows."""


def of_run(cell, task, records: list[dict], reference: list[dict] | None, usage: dict, device: str, codecs: str) -> list[dict]:
    """Rows in the schema of `kvq.results`. `usage`: bytes, tokens and seconds summed over the records; codecs: `kvq.store.content` of those used.

    Raises Refusal if nothing was compressed.
    """
    quant, tables = cell.resolved["quant"], usage.get("table_bytes", 0)
    if not usage.get("coded_values"):
        raise Refusal(
            f"Nothing was compressed: every token stayed exact (quant.sink={quant['sink']}, quant.window={quant['window']}); "
            "lower them or use longer prompts. Nothing was written."
        )
    stored = 8 * usage["code_bytes"] / usage["coded_values"]
    config = {**{k: v for k, v in cell.resolved.items() if k not in FOLDERS}, "identity": cell.identity, "codecs": codecs}
    common = {
        "run": cell.run, "model": cell.choices["model"], "quant": cell.choices["quant"], "task": cell.choices["task"], "data": str(task.data),
        "calib": cell.choices["calib"] if cell.identity["calib"] else "none", "bits": cell.label, "bits_stored": stored,
        "bits_total": 8 * (usage["code_bytes"] + usage["exact_bytes"] + tables) / usage["slot_values"],
        "encoded_tokens": int(usage["encoded"]), "seed": cell.resolved["seed"],
        "config": json.dumps(config, sort_keys=True), **results.provenance(device),
    }  # fmt: skip
    rows = [{**common, **row} for row in statistics.summarize(records).to_dict("records")]
    for suffix, some in (("", records), ("_fp16", reference or [])):
        derived = task.derived(some) if some and hasattr(task, "derived") else []
        rows += [{**common, **row, "metric": row["metric"] + suffix} for row in derived]
    fp16 = records if cell.is_reference else reference
    if hasattr(task, "perfect"):
        rows += [{**common, **row, "metric": statistics.WEAK} for row in statistics.weakness(fp16, task.metric, task.perfect).to_dict("records")]
    if reference is not None:
        for suffix, table in (("fp16", statistics.summarize(reference)), ("minus_fp16", statistics.paired(records, reference, task.metric))):
            table = table[table.metric == task.metric] if "metric" in table else table
            rows += [{**common, **row, "metric": f"{task.metric}_{suffix}"} for row in table.to_dict("records")]
    rate = len(records) / usage["task_seconds"]  # as run: the fp16 forward that perplexity compares with is included
    once = {"tokens": usage["tokens"], "reused_tokens": usage.get("reused_tokens", 0), "batch_size": len(records) / usage.get("batches", len(records))}
    once |= {"compression": 16 / stored, "examples_per_second": rate, **{k: v for k, v in usage.items() if k.endswith("_seconds")}}
    rows += [{**common, "subset": "run", "metric": k, "value": v, "stderr": 0.0, "n": len(records)} for k, v in once.items()]
    return rows
