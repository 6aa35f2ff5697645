"""The prompts and metrics restated here are the harness's own."""

import importlib.util
import random
from pathlib import Path

import pytest
import yaml

from kvq.standin import score
from kvq.standin.suite import SUBSETS
from kvq.standin.templates import CODE, TEMPLATES, completion, prompt

FOLDER = Path(importlib.util.find_spec("lm_eval").origin).parent / "tasks" / "longbench"


class Loader(yaml.SafeLoader):
    """YAML that names functions, read without importing them."""


Loader.add_constructor("!function", lambda loader, node: node.value)


@pytest.mark.parametrize("subset", TEMPLATES)
def test_template_is_lm_evals(subset):
    task = yaml.load((FOLDER / f"{subset}.yaml").read_text(), Loader)
    assert task["doc_to_text"].replace("{{context}}", "{context}").replace("{{question}}", "{input}") == TEMPLATES[subset]


def test_templates_cover_the_suite_two_a_category():
    assert set(TEMPLATES) == set(SUBSETS)
    assert all(list(SUBSETS.values()).count(category) == 2 for category in SUBSETS.values())


def test_prompt_leaves_braces_of_documents_alone():
    made = prompt("lcc", {"context": "x = {input: {context}}\n", "input": ""})
    assert "x = {" in made and made.endswith("Next line of code:")
    assert completion(CODE[0], "    pass") == "\n    pass" and completion("trec", "Food") == " Food"


def _metrics():
    spec = importlib.util.spec_from_file_location("longbench_metrics", FOLDER / "metrics.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


METRICS = {"multifieldqa_en": "qa_f1", "passage_retrieval_en": "retrieval", "passage_count": "count", "lcc": "code_sim", "gov_report": "rouge"}


@pytest.mark.parametrize("subset", METRICS)
def test_score_is_lm_evals(subset):
    metrics, rng = _metrics(), random.Random(subset)
    words = ["the", "a", "red", "Fox,", "jumps", "over", "7", "12", "Paragraph", "3", "lazy", "dog.", "again", "high."]
    for _ in range(40):
        said, right = (" ".join(rng.choices(words, k=rng.randint(1, 9))) for _ in range(2))
        right = f"Paragraph {rng.randint(1, 12)}" if subset == "passage_retrieval_en" else str(rng.randint(1, 12)) if subset == "passage_count" else right
        document = {"answers": [right], "all_classes": None}
        theirs = getattr(metrics, f"get_{METRICS[subset]}_score")(document, [said])[f"{METRICS[subset]}_score"]
        assert score.subset(subset, said, document) == pytest.approx(theirs, abs=1e-6)


def test_classification_score_is_lm_evals():
    classes = ["Food", "Color", "City"]
    for said in ("Food", "Color Food", "nothing", "City"):
        document = {"answers": ["Food"], "all_classes": classes}
        assert score.subset("trec", said, document) == _metrics().get_classification_score(document, [said])["classification_score"]
