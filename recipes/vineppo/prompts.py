"""Prompts as the authors' SFT policies know them: `dataset_name: recipes.vineppo.prompts:gsm8k`.

Those policies have no chat template; their prompt is one text. Source: the configurations released
with arXiv:2410.01679.
"""

from datasets import Dataset, load_dataset

PROMPT = "[MATH_TASK] Problem:\n{}\n\nSolution:"


def gsm8k(split: str) -> Dataset:
    """Grade-school problems; `answer` ends in `#### ` and the number."""
    return with_prompts(load_dataset("openai/gsm8k", "main", split=split), "question")


def math(split: str) -> Dataset:
    """Hendrycks' MATH in 12 000 and 500 problems, with `solution` and `answer`."""
    return with_prompts(load_dataset("nlile/hendrycks-MATH-benchmark", split=split), "problem")


def with_prompts(rows: Dataset, column: str) -> Dataset:
    """Adds the column `prompt` from the column that holds the problem."""
    return rows.map(lambda row: {"prompt": PROMPT.format(row[column])})
