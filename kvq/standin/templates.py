"""The prompts of the embedded LongBench suite, as LongBench states them: one template per subset and what stands between prompt and answer."""

CLOSING = ("as concisely as you can, using a single phrase or sentence if possible. If the question cannot be answered based on the information in "
           'the article, write "unanswerable". If the question is a yes/no question, answer "yes", "no", or "unanswerable". Do not provide any explanation.')
PASSAGES = ("Answer the question based on the given passages. Only give me the answer and do not output any other words.\n\nThe following are given "
            "passages.\n{context}\n\nAnswer the question based on the given passages. Only give me the answer and do not output any other words.\n\n"
            "Question: {input}\nAnswer:")

TEMPLATES = {
    "multifieldqa_en": "Read the following text and answer briefly.\n\n{context}\n\nNow, answer the following question based on the above text, "
                       "only give me the answer and do not output any other words.\n\nQuestion: {input}\nAnswer:",
    "qasper": f"You are given a scientific article and a question. Answer the question {CLOSING}\n\nArticle: {{context}}\n\n "
              f"Answer the question based on the above article {CLOSING}\n\nQuestion: {{input}}\n\nAnswer:",
    "hotpotqa": PASSAGES,
    "2wikimqa": PASSAGES,
    "gov_report": "You are given a report by a government agency. Write a one-page summary of the report.\n\nReport:\n{context}\n\n"
                  "Now, write a one-page summary of the report.\n\nSummary:",
    "qmsum": "You are given a meeting transcript and a query containing a question or instruction. Answer the query in one or more sentences.\n\n"
             "Transcript:\n{context}\n\nNow, answer the query based on the above meeting transcript in one or more sentences.\n\n"
             "Query: {input}\nAnswer:",
    "trec": "Please determine the type of the question below. Here are some examples of questions.\n\n{context}\n{input}",
    "triviaqa": "Answer the question based on the given passage. Only give me the answer and do not output any other words. "
                "The following are some examples.\n\n{context}\n{input}",
    "passage_retrieval_en": "Here are 30 paragraphs from Wikipedia, along with an abstract. Please determine which paragraph the abstract is from."
                            "\n\n{context}\n\nThe following is an abstract.\n\n{input}\n\nPlease enter the number of the paragraph that the abstract "
                            'is from. The answer format must be like "Paragraph 1", "Paragraph 2", etc.\n\nThe answer is:',
    "passage_count": "There are some paragraphs below sourced from Wikipedia. Some of them may be duplicates. Please carefully read these paragraphs "
                     "and determine how many unique paragraphs there are after removing duplicates. In other words, how many non-repeating paragraphs "
                     "are there in total?\n\n{context}\n\nPlease enter the final count of unique paragraphs after removing duplicates. The output "
                     "format should only contain the number, such as 1, 2, 3, and so on.\n\nThe final answer is:",
    "lcc": "Please complete the code given below. \n{context}Next line of code:",
    "repobench-p": "Please complete the code given below. \n{context}{input}Next line of code:",
}
CODE = ("lcc", "repobench-p")


def prompt(subset: str, document: dict) -> str:
    """The text the model sees before it answers."""
    return TEMPLATES[subset].replace("{context}", document["context"]).replace("{input}", document["input"])


def completion(subset: str, answer: str) -> str:
    """An answer with the separator the stand-in was trained to write first: a newline before code, a space elsewhere."""
    return ("\n" if subset in CODE else " ") + answer
