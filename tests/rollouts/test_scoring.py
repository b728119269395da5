"""Log-probabilities of completions, against forward passes of single rows."""

import pytest
import torch

from tests.rollouts.models import EOS, PROMPTS, adapted, generation_config, sharp_llama, tiny_gpt2
from trl_ext.rollouts import sample, sampled_logps

COMPLETIONS = [[3, 4, 5, EOS], [6], [], [7, 8, 9, 10, 11]]


def by_hand(model, prompt, completion, temperature):
    with torch.no_grad():
        logits = model(torch.tensor([prompt + completion])).logits[0].double() / temperature
    logp = logits.log_softmax(-1)
    return [logp[len(prompt) - 1 + t, token].item() for t, token in enumerate(completion)]


@pytest.mark.parametrize("make", [tiny_gpt2, sharp_llama, lambda: adapted(sharp_llama())])
@pytest.mark.parametrize("rows_per_pass", [1, 3, 9])
def test_each_token_is_scored_as_in_a_row_of_its_own(make, rows_per_pass):
    model = make().eval()
    found = sampled_logps(model, PROMPTS, COMPLETIONS, 0.7, rows_per_pass)
    assert [len(row) for row in found] == [4, 1, 0, 5]
    for prompt, completion, row in zip(PROMPTS, COMPLETIONS, found, strict=True):
        assert row == pytest.approx(by_hand(model, prompt, completion, 0.7), abs=2e-5)


def test_it_is_the_law_that_was_sampled_from():
    """Σ over all one-token completions of exp(logp) is 1, and frequencies follow it."""
    model = tiny_gpt2()
    every = [[token] for token in range(23)]
    (logps,) = zip(*sampled_logps(model, [PROMPTS[0]] * 23, every, 0.6, 8), strict=True)
    probabilities = torch.tensor(logps).exp()
    assert probabilities.sum().item() == pytest.approx(1.0, abs=1e-5)
    torch.manual_seed(0)
    config = generation_config(max_new_tokens=1, temperature=0.6)
    drawn = sample(model, [PROMPTS[0]] * 4000, config, eos_token_ids=[EOS])
    counts = torch.bincount(torch.tensor(drawn).flatten(), minlength=23) / 4000
    assert (counts - probabilities).abs().max() < 0.04
