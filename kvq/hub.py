"""Running text from a hub data set, for calibration and perplexity: hub:<dataset>:<config>:<split>."""

from itertools import islice

from kvq.errors import Refusal

REMEDY = "Without network, give a text file instead (calib.source=<file>, task.data=<file>)."
DOCUMENTS = 20_000
"""At most this many documents are read: more than any calibration or evaluation here needs of a web corpus."""


def dataset_text(source: str) -> str:
    """The `text` column of a split, rows joined by blank lines (for WikiText-2 the convention of GPTQ, KVQuant and CQ).

    Raises Refusal for a malformed source, an unreachable hub or a data set without a text column.
    """
    try:
        _, path, config, split = source.split(":")
    except ValueError as error:
        raise Refusal(f"'{source}' is not of the form hub:<dataset>:<config>:<split>.") from error
    import datasets

    from kvq.lmeval import hub_revision, quiet

    path = {"wikitext": "Salesforce/wikitext"}.get(path, path)
    revision, _ = hub_revision(path, REMEDY)
    try:
        with quiet():
            rows = list(islice(datasets.load_dataset(path, config, split=split, revision=revision, streaming=True), DOCUMENTS))
    except Exception as error:
        raise Refusal(f"{path} {config} {split} cannot be loaded: {str(error).strip().splitlines()[0]} {REMEDY}") from error
    if not rows or "text" not in rows[0]:
        raise Refusal(f"{path} {config} {split} has no column 'text'.")
    return "\n\n".join(row["text"] for row in rows)
