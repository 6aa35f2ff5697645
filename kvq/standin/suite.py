"""An embedded suite in the format of LongBench v1: twelve of its subsets re-made from seeds, for a model no larger than this one."""

from kvq.standin import completion, filler, hops, labels, lexicon, needles, passages, questions, summary, templates

SUBSETS = {
    "multifieldqa_en": "single-doc QA", "qasper": "single-doc QA",
    "hotpotqa": "multi-doc QA", "2wikimqa": "multi-doc QA",
    "gov_report": "summarization", "qmsum": "summarization",
    "trec": "few-shot", "triviaqa": "few-shot",
    "passage_retrieval_en": "synthetic", "passage_count": "synthetic",
    "lcc": "code", "repobench-p": "code",
}
MAKERS = {
    "multifieldqa_en": questions.reading, "qasper": questions.article, "hotpotqa": hops.bridge, "2wikimqa": hops.compositional,
    "gov_report": summary.report, "qmsum": summary.meeting, "trec": labels.typing, "triviaqa": labels.trivia,
    "passage_retrieval_en": passages.retrieval, "passage_count": passages.counting, "lcc": completion.single, "repobench-p": completion.repository,
}
NEW_TOKENS = {subset: 110 if category == "summarization" else 36 for subset, category in SUBSETS.items()}
SHORTEST = 512


def generate(subset: str, n: int, tokens: int, tokenizer, seed: int) -> list[dict]:
    """n documents whose prompt (templates.prompt, bos included) has at most ``tokens`` tokens of the tokenizer.

    Each has LongBench's fields: input, context, answers (list), length (words of the context), dataset, language, all_classes, _id. Answers are at
    most 32 tokens, summaries at most 96. Raises ValueError for an unknown subset or fewer than 512 tokens.
    """
    if subset not in SUBSETS or tokens < SHORTEST:
        raise ValueError(f"The subset is one of {', '.join(SUBSETS)} with at least {SHORTEST} tokens, not {subset!r} with {tokens}.")
    haystack, made = filler.heldout(tokenizer), []
    for index in range(n):
        one = needles.fitting(lambda target: MAKERS[subset](lexicon.stream("eval", f"{subset}/{tokens}", seed, index), haystack, target), tokens,
                              lambda document: haystack.count(templates.prompt(subset, document)) + 1)
        made.append({"input": one["input"], "context": one["context"], "answers": one["answers"], "length": len(one["context"].split()),
                     "dataset": subset, "language": "en", "all_classes": one["all_classes"], "_id": f"{subset}-{tokens}-{seed}-{index}"})
    return made
