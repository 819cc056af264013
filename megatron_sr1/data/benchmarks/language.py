"""Sets without images: GSM8K (arXiv 2110.14168, `openai/gsm8k`), MATH-500 (arXiv 2305.20050, `HuggingFaceH4/MATH-500`),
MMLU-Pro (arXiv 2406.01574, `TIGER-Lab/MMLU-Pro`) and SuperGPQA (arXiv 2502.14739, `m-a-p/SuperGPQA`).
"""

from __future__ import annotations

import string

from megatron_sr1.data.benchmarks.item import BadRow, Item, SourceRow, answer_of, some, text
from megatron_sr1.data.benchmarks.options import ask, gold_letter, parse_options

_GSM8K_MARK = "####"


def gsm8k(row: SourceRow) -> Item:
    """Fields: question, answer: a solution whose last line is `#### 1,234`, without the comma the gold."""
    _, mark, gold = answer_of(row, "answer").rpartition(_GSM8K_MARK)
    if not mark or not gold.strip():
        raise BadRow("empty_answer", f"no {_GSM8K_MARK} with a number ends its answer")
    return Item(text(row, "question"), gold.strip().replace(",", ""))


def math_500(row: SourceRow) -> Item:
    """Fields: problem, answer (LaTeX), subject, level (1 to 5), unique_id (test/algebra/12.json)."""
    key = text(row, "unique_id").removesuffix(".json")
    return Item(text(row, "problem"), answer_of(row, "answer"), text(row, "subject"), key, metadata=some(row, "level"))


def mmlu_pro(row: SourceRow) -> Item:
    """Fields: question_id, question, options (up to ten), answer (a letter), answer_index (the same from 0), category,
    src.
    """
    options = parse_options(row.get("options"))
    gold = gold_letter(answer_of(row, "answer"), len(options))
    index = row.get("answer_index")
    if index is not None and index != string.ascii_uppercase.index(gold):
        raise BadRow("field", f"its answer {gold} is not that of answer_index={index!r}")
    problem = ask(text(row, "question"), options)
    return Item(problem, gold, text(row, "category"), text(row, "question_id"), options, metadata=some(row, "src"))


def supergpqa(row: SourceRow) -> Item:
    """Fields: uuid, question, options (four to ten), answer_letter, discipline, field, subfield, difficulty,
    is_calculation; by discipline is how its results are reported.
    """
    options = parse_options(row.get("options"))
    gold = gold_letter(answer_of(row, "answer_letter"), len(options))
    metadata = some(row, "field", "subfield", "difficulty", "is_calculation")
    problem = ask(text(row, "question"), options)
    return Item(problem, gold, text(row, "discipline"), text(row, "uuid"), options, metadata=metadata)
