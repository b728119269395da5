"""The geometric mixture: its law by full forward passes, its cache, its padding."""

import pytest
import torch
from transformers import LogitsProcessorList

from tests.rollouts.models import (
    PAD,
    PROMPTS,
    adapted,
    generation_config,
    sharp_llama,
    tiny_gpt2,
)
from tests.tiny import tiny_llama
from trl_ext.rollouts import GeometricMixture, mixed_logps
from trl_ext.rollouts._inputs import pad_left

COEFFICIENTS = torch.tensor([0.0, 0.3, 0.75, 1.0])


def generated(policy, opponent, coefficient_B=COEFFICIENTS, width=1, use_cache=True, **options):
    """Sequences, their prompts' width, and the scores of each step, `(B, T, V)`."""
    torch.manual_seed(0)
    input_ids, mask = pad_left(PROMPTS, PAD, width)
    mixture = GeometricMixture(
        policy, coefficient_B, mask, opponent_model=opponent, use_cache=use_cache
    )
    out = policy.generate(
        input_ids=input_ids,
        attention_mask=mask,
        logits_processor=LogitsProcessorList([mixture]),
        generation_config=generation_config(eos_token_id=None, **options),
        return_dict_in_generate=True,
        output_scores=True,
    )
    return out.sequences, input_ids.size(1), torch.stack(out.scores, dim=1)


@torch.no_grad()
def law(policy, opponent, coefficient, text):
    """log of the normalised mixture after `text`, by forward passes without pads."""
    logits = [model(torch.tensor([text])).logits[0, -1].double() for model in (policy, opponent)]
    logp, opponent_logp = (x.log_softmax(-1) for x in logits)
    return ((1 - coefficient) * logp + coefficient * opponent_logp).log_softmax(-1)


@pytest.mark.parametrize("make", [tiny_gpt2, sharp_llama])
@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_each_token_has_the_law_of_the_mixture(make, temperature):
    policy, opponent = make(0), make(1)
    sequences, width, scores_BTV = generated(policy, opponent, temperature=temperature)
    for row, (prompt, coefficient) in enumerate(zip(PROMPTS, COEFFICIENTS.tolist(), strict=True)):
        for step in range(scores_BTV.size(1)):
            text = [*prompt, *sequences[row, width : width + step].tolist()]
            expected = law(policy, opponent, coefficient, text)
            got = scores_BTV[row, step].double() * temperature  # applied after the mixture
            if coefficient == 0.0:
                got = got.log_softmax(-1)
            torch.testing.assert_close(got, expected, atol=2e-5, rtol=0)
            assert not torch.allclose(expected, law(policy, opponent, 0.5, text), atol=0.1)


def test_the_mixture_of_laws_is_normalised_and_has_them_at_its_ends():
    logits, other = torch.randn(2, 3, 5, dtype=torch.float64, generator=torch.manual_seed(0))
    logits[0, 1] = -torch.inf
    mixed = mixed_logps(logits, other, 0.3)
    torch.testing.assert_close(mixed.logsumexp(-1), torch.zeros(3, dtype=torch.float64))
    assert mixed[0, 1] == -torch.inf and not mixed.isnan().any()
    torch.testing.assert_close(mixed_logps(logits + 3, other - 1, 0.3), mixed)
    torch.testing.assert_close(mixed_logps(logits, other, 0.0), logits.log_softmax(-1))
    torch.testing.assert_close(mixed_logps(logits, other, 1.0)[1:], other.log_softmax(-1)[1:])
    log_odds = 0.7 * (logits[1, 0] - logits[1, 1]) + 0.3 * (other[1, 0] - other[1, 1])
    torch.testing.assert_close(mixed[1, 0] - mixed[1, 1], log_odds)


@pytest.mark.parametrize("make", [tiny_gpt2, sharp_llama])
def test_the_cache_changes_nothing(make):
    policy, opponent = make(0), make(1)
    with_cache, _, scores = generated(policy, opponent)
    without, _, scores_without = generated(policy, opponent, use_cache=False)
    assert torch.equal(with_cache, without)
    torch.testing.assert_close(scores, scores_without, atol=1e-5, rtol=0)


def test_the_opponent_reads_each_token_once_and_only_in_its_rows():
    read = []
    opponent = sharp_llama(1)
    opponent.register_forward_pre_hook(
        lambda _, __, kwargs: read.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    generated(sharp_llama(), opponent)
    assert read == [(3, 4)] + [(3, 1)] * 7


@pytest.mark.parametrize("make", [tiny_gpt2, sharp_llama])
def test_padding_changes_nothing(make):
    policy, opponent = make(0), make(1)
    narrow, width, scores = generated(policy, opponent)
    wide, wide_width, wide_scores = generated(policy, opponent, width=16)
    assert (width, wide_width) == (4, 16)
    assert torch.equal(narrow[:, width:], wide[:, wide_width:])
    torch.testing.assert_close(scores, wide_scores, atol=2e-5, rtol=0)


@pytest.mark.parametrize("make", [tiny_gpt2, sharp_llama])
def test_the_opponent_alone_samples_as_if_it_had_been_asked(make):
    opponent = make(1)
    sequences, *_ = generated(make(0), opponent, torch.ones(4), temperature=0.7)
    torch.manual_seed(0)
    input_ids, mask = pad_left(PROMPTS, PAD)
    config = generation_config(eos_token_id=None, temperature=0.7)
    asked = opponent.generate(input_ids=input_ids, attention_mask=mask, generation_config=config)
    assert torch.equal(sequences, asked)


def test_rows_without_opponent_keep_their_scores_to_the_bit():
    ids, mask = pad_left(PROMPTS, PAD)
    scores = torch.randn(4, 23, generator=torch.manual_seed(0)) * 7
    mixture = GeometricMixture(sharp_llama(), COEFFICIENTS, mask, opponent_model=sharp_llama(1))
    mixed = mixture(ids, scores)
    assert torch.equal(mixed[0], scores[0]) and not torch.equal(mixed[1], scores[1])
    torch.testing.assert_close(mixed[1:].logsumexp(-1), torch.zeros(3), atol=1e-5, rtol=0)
    nobody = GeometricMixture(sharp_llama(), torch.zeros(4), mask, opponent_model=sharp_llama(1))
    assert torch.equal(nobody(ids, scores), scores)


def test_a_second_generate_starts_anew():
    ids, mask = pad_left(PROMPTS, PAD)
    scores = torch.zeros(4, 23)
    mixture = GeometricMixture(sharp_llama(), COEFFICIENTS, mask, opponent_model=sharp_llama(1))
    first = mixture(ids, scores)
    longer = torch.cat([ids, torch.full((4, 1), 9)], dim=1)
    after_one = mixture(longer, scores)
    torch.testing.assert_close(mixture(ids, scores), first)
    torch.testing.assert_close(mixture(longer, scores), after_one)


def test_a_forbidden_token_stays_forbidden():
    *_, scores = generated(sharp_llama(), sharp_llama(1), torch.ones(4), suppress_tokens=[3, 4])
    assert scores[..., 3:5].isneginf().all() and not scores.isnan().any()
    probabilities = scores.exp()
    torch.testing.assert_close(probabilities.sum(-1), torch.ones(scores.shape[:2]))


def test_an_adapter_turned_off_or_its_frozen_copy_is_the_opponent():
    base = sharp_llama()
    policy = adapted(sharp_llama())
    _, _, scores = generated(policy, None)
    _, _, expected = generated(policy, base)
    torch.testing.assert_close(scores, expected, atol=1e-5, rtol=0)
    assert policy.active_adapter == "default"

    policy.add_adapter("ref", policy.peft_config["default"])
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            if ".ref." in name:
                parameter.copy_(0.5 * policy.get_parameter(name.replace(".ref.", ".default.")))
    policy.set_adapter("ref")
    _, _, expected = generated(base, policy, torch.ones(4))
    policy.set_adapter("default")
    _, _, scores = generated(policy, None, torch.ones(4))
    torch.testing.assert_close(scores, expected, atol=1e-5, rtol=0)
    assert policy.active_adapter == "default"


def test_what_cannot_be_mixed_is_refused():
    ids, mask = pad_left(PROMPTS, PAD)
    with pytest.raises(ValueError, match="opponent_model=None with a policy of type Llama"):
        GeometricMixture(sharp_llama(), COEFFICIENTS, mask)
    mixture = GeometricMixture(
        sharp_llama(), COEFFICIENTS, mask, opponent_model=tiny_llama(31, hidden=16)
    )
    with pytest.raises(ValueError, match="31 scores where the policy gives 23"):
        mixture(ids, torch.zeros(4, 23))
