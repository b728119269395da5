"""Log-probabilities of sampled completions, by teacher forcing."""

from typing import Any

import torch

from trl_ext.rollouts._inputs import accepted, device_of, pad_left, pad_right, positions


@torch.no_grad()
def sampled_logps(
    model: Any,
    prompt_ids: list[list[int]],
    completion_ids: list[list[int]],
    temperature: float,
    rows_per_pass: int,
) -> list[list[float]]:
    """Scores each completion's tokens under the model at a temperature.

    log π_τ(yₜ | x, y₍<t₎) = logits(yₜ)/τ − log Σₐ exp(logits(a)/τ), in float32

    Args:
        model: a causal language model, in the mode (training or not) it shall score in.
        prompt_ids: `B` prompts.
        completion_ids: `B` completions, each as long as it is.
        temperature: τ > 0.
        rows_per_pass: rows of one forward pass, at least 1.

    Returns:
        `B` lists, nats, as long as the completions.
    """
    logps = []
    for start in range(0, len(prompt_ids), rows_per_pass):
        rows = slice(start, start + rows_per_pass)
        logps += _score(model, prompt_ids[rows], completion_ids[rows], temperature)
    return logps


def _score(
    model: Any, prompt_ids: list[list[int]], completion_ids: list[list[int]], temperature: float
) -> list[list[float]]:
    device = device_of(model)
    prompts, prompt_mask = pad_left(prompt_ids, 0)
    completions_BT, completion_mask = pad_right(completion_ids)
    T = completions_BT.size(1)
    mask = torch.cat([prompt_mask, completion_mask], dim=1).to(device)
    logits_BTV = model(
        input_ids=torch.cat([prompts, completions_BT], dim=1).to(device),
        attention_mask=mask,
        use_cache=False,
        **accepted(model, position_ids=positions(mask), logits_to_keep=T + 1),
    ).logits[:, -T - 1 : -1]
    logits_BTV = logits_BTV.float() / temperature
    index_BT1 = completions_BT.to(logits_BTV.device).unsqueeze(-1)
    logp_BT = logits_BTV.gather(-1, index_BT1).squeeze(-1) - logits_BTV.logsumexp(-1)
    return [row[: len(c)] for row, c in zip(logp_BT.tolist(), completion_ids, strict=True)]
