"""LongBench's metrics for the embedded suite, restated so that a trained stand-in can be scored without the harness; a test holds them to the original."""

import re
import string
from collections import Counter
from difflib import SequenceMatcher

PUNCTUATION = str.maketrans("", "", string.punctuation)


def normal(text: str) -> list[str]:
    """Words in lower case without punctuation and articles."""
    return re.sub(r"\b(a|an|the)\b", " ", text.lower().translate(PUNCTUATION)).split()


def f1(prediction: str, answer: str) -> float:
    """Overlap of the two bags of words."""
    said, asked = normal(prediction), normal(answer)
    same = sum((Counter(said) & Counter(asked)).values())
    return 2 * same / (len(said) + len(asked)) if same else 0.0


def numbers(prediction: str, answer: str) -> float:
    """The share of numbers in the prediction that are the answer's number."""
    said, asked = re.findall(r"\d+", prediction), re.findall(r"\d+", answer)[0]
    return said.count(asked) / len(said) if said else 0.0


def label(prediction: str, answer: str, classes: list[str]) -> float:
    """One over the number of classes named, if the right one is among them."""
    named = [name for name in classes if name in prediction]
    named = [name for name in named if not (name in answer and name != answer)]
    return 1 / len(named) if answer in named else 0.0


def code(prediction: str, answer: str) -> float:
    """Similarity of the first line of code said, 0 to 1."""
    lines = (line for line in prediction.split("\n") if line.strip() and not any(mark in line for mark in ("`", "#", "//")))
    return round(100 * SequenceMatcher(None, next(lines, ""), answer).ratio()) / 100


def common(left: list[str], right: list[str]) -> set[str]:
    """The words of a longest common subsequence, found from its end."""
    table = [[0] * (len(right) + 1) for _ in range(len(left) + 1)]
    for i, word in enumerate(left):
        for j, other in enumerate(right):
            table[i + 1][j + 1] = table[i][j] + 1 if word == other else max(table[i][j + 1], table[i + 1][j])
    i, j, found = len(left), len(right), set()
    while i and j:
        if left[i - 1] == right[j - 1]:
            found.add(left[i - 1])
            i, j = i - 1, j - 1
        elif table[i - 1][j] > table[i][j - 1]:
            i -= 1
        else:
            j -= 1
    return found


def rouge(prediction: str, answer: str) -> float:
    """Summary-level ROUGE-L's F as the rouge package has it: sentences end at full stops, every word counts once."""
    said, asked = ([" ".join(part.split()).split(" ") for part in text.split(".") if part] for text in (prediction, answer))
    if not said or not asked:
        return 0.0
    shared = set().union(*(common(right, left) for right in asked for left in said))
    return 2 * len(shared) / (len(set().union(*asked)) + len(set().union(*said)))


def subset(name: str, prediction: str, document: dict) -> float:
    """The subset's own metric on an answer as generated, 0 to 1."""
    if name in ("trec", "triviaqa"):
        prediction = prediction.split("\n")[0]
    metric = {"gov_report": rouge, "qmsum": rouge, "passage_retrieval_en": numbers, "passage_count": numbers, "lcc": code, "repobench-p": code}.get(name, f1)
    if name not in ("lcc", "repobench-p"):
        prediction = prediction.strip()
    if name == "trec":
        return max(label(prediction, answer, document["all_classes"]) for answer in document["answers"])
    return max(metric(prediction, answer) for answer in document["answers"])


def needle(prediction: str, answers: list[str]) -> float:
    """The fraction of answers found in the output, case ignored."""
    return sum(answer.lower() in prediction.lower() for answer in answers) / len(answers)


def boxed(prediction: str) -> str | None:
    """What the last \\boxed{} holds."""
    found = re.findall(r"\\boxed\{([^{}]*)\}", prediction)
    return found[-1] if found else None
