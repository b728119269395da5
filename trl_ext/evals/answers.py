"""How probable a policy finds the reference answer behind its own thoughts."""

import math

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from trl_ext.evals import likelihood
from trl_ext.evals.options import EvaluationOptions
from trl_ext.rollouts.splice import answer_token_ids, check_context, thought_length


def answer_logps(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: list[likelihood.Row],
    answers: list[str],
    options: EvaluationOptions,
    end: int | None,
) -> list[float]:
    """log π(a*|x, c) in the place of what each completion says behind the marker.

    Args:
        model: the policy, in evaluation mode.
        tokenizer: its tokenizer.
        rows: prompts and sampled completions, token ids.
        answers: the reference answer of each row.
        options: with a marker.
        end: token that belongs to each answer as its last; None for no such token.

    Returns:
        Nats, summed over the answer's tokens; NaN where the completion has no marker.

    Raises:
        ValueError: an answer that is no text, or is empty, or longer than the model's context.
    """
    assert options.marker is not None
    logps = [math.nan] * len(rows)
    told: dict[int, likelihood.Row] = {}
    for i, ((prompt, completion), answer) in enumerate(zip(rows, answers, strict=True)):
        n = thought_length(completion, tokenizer, options.marker)
        if n is not None:
            ids = answer_token_ids(tokenizer, {"answer": answer}, options.answer_prefix, end)
            told[i] = (prompt + completion[:n], ids)
    lengths = [len(context) + len(ids) for context, ids in told.values()]
    check_context(lengths, model, "prompt, thought and reference answer")
    batches = likelihood.in_batches(model, list(told.values()), options.batch_size)
    scored = (logp for batch in batches for logp in likelihood.completion_logps(model, batch))
    for i, logp in zip(told, scored, strict=True):
        logps[i] = logp
    return logps
