"""Estimators of the KL against the exact law, and what must not enter them: pads."""

import copy
import math

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model

from tests import exact
from tests.tiny import tiny_llama, tiny_prompts, tiny_tokenizer
from trl_ext.evals import Drift, likelihood, policy_drift
from trl_ext.evals.drift import DriftOptions, drift_of_rows

TOKENIZER = tiny_tokenizer()
USER = exact.TOKENIZER.convert_tokens_to_ids("<user>")
SYMBOLS = [exact.A, exact.B, exact.TOKENIZER.bos_token_id]
SEQUENCES = [[SYMBOLS[i], SYMBOLS[j]] for i in range(3) for j in range(3)]


def fixture_c(logit):
    """A sequence policy of 3 symbols and 2 steps; prefix 0 is empty, prefix i + 1 the symbol i."""
    size = len(exact.TOKENIZER)
    weights = torch.full((size, size), -1e9, dtype=torch.float64)
    for prefix, previous in enumerate([USER, *SYMBOLS]):
        for j, symbol in enumerate(SYMBOLS):
            weights[symbol, previous] = logit(prefix, j)
    model = exact.tabular(weights)
    model.config.num_hidden_layers = 1  # `generate` asks for it
    return model


def policy_c():
    return fixture_c(lambda i, j: 2 * math.sin(1 + i * i + 2 * j))


def reference_c():
    return fixture_c(lambda i, j: 2 * math.cos(3 * i + j * j))


def rows_c():
    """Probability of each of the nine sequences, and their drift `(9, 5)`."""
    model, rows = policy_c(), [([USER], ids) for ids in SEQUENCES]
    drift = list(drift_of_rows(model, reference_c(), rows, DriftOptions()))
    logps = likelihood.completion_logps(model, rows)
    return torch.tensor(logps, dtype=torch.float64).exp(), torch.tensor(drift, dtype=torch.float64)


def test_each_estimator_has_the_expectation_and_deviation_of_the_exact_law():
    p, drift = rows_c()
    exact_kl, k1, k3 = drift.T[:3]
    # k3 of the whole sequence, which the specification gives, is noisier than the sum over tokens.
    deviations = {0.69506119: exact_kl, 1.87481387: k1, 2.42590131: (-k1).exp() - 1 + k1}
    deviations[2.05179043] = k3
    assert p.sum().item() == pytest.approx(1, abs=1e-8)
    for deviation, estimate in deviations.items():
        mean = (p * estimate).sum()
        assert mean.item() == pytest.approx(2.51418555, abs=1e-7)
        assert (p * (estimate - mean) ** 2).sum().sqrt().item() == pytest.approx(
            deviation, abs=1e-7
        )


def test_single_samples_of_the_exact_estimator():
    _, drift = rows_c()
    assert drift[1, 0].item() == pytest.approx(2.86457343, abs=1e-7)  # (0, 1)
    assert drift[6, 0].item() == pytest.approx(0.02881163, abs=1e-7)  # (2, 0)
    assert drift[[1, 6], 1].tolist() == pytest.approx([-0.43191406, 0.35957550], abs=1e-7)


def test_sampled_drift_agrees_with_the_exact_law_within_its_error_bars():
    prompts = Dataset.from_dict({"prompt": ["<user>"] * 4000})
    drift = policy_drift(
        policy_c(),
        exact.TOKENIZER,
        prompts,
        reference=reference_c(),
        max_completion_length=2,
        batch_size=4000,
        disable_tqdm=True,
    )
    numbers, (p, table) = drift.metrics(""), rows_c()
    for name, deviation in {"exact": 0.69506119, "k1": 1.87481387, "k3": 2.05179043}.items():
        error = numbers[f"kl_{name}_se"]
        assert error == pytest.approx(deviation / math.sqrt(4000), rel=0.1)
        assert abs(numbers[f"kl_{name}"] - 2.51418555) < 3 * error
    perplexity = math.exp((p * table[:, 3]).sum() / 2)
    assert (
        abs(numbers["reference_perplexity"] - perplexity) < 3 * numbers["reference_perplexity_se"]
    )
    assert numbers["mean_length"] == 2 and numbers["mean_length_se"] == 0


def drift(policy=None, reference=None, prompts=None, **options):
    policy = tiny_llama(len(TOKENIZER)) if policy is None else policy
    reference = tiny_llama(len(TOKENIZER), seed=1) if reference is None else reference
    options = {"max_completion_length": 6, "disable_tqdm": True, **options}
    prompts = tiny_prompts(5) if prompts is None else prompts
    return policy_drift(policy, TOKENIZER, prompts, reference=reference, **options)


def test_padding_changes_no_number():
    """Rows of unequal prompts and completions together, each alone, and with long neighbours."""
    policy, reference = tiny_llama(len(TOKENIZER)), tiny_llama(len(TOKENIZER), seed=1)
    rows = [([7, 8], [9, 10, 2]), ([11, 12, 13, 14, 15], [16]), ([20], [21, 22, 23, 24, 25, 26])]
    longest = ([5] * 40, [6] * 40)

    def measured(rows):
        return torch.tensor(list(drift_of_rows(policy, reference, rows, DriftOptions())))

    alone = torch.cat([measured([row]) for row in rows])
    torch.testing.assert_close(measured(rows), alone, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(measured([*rows, longest])[:3], alone, atol=1e-6, rtol=1e-5)
    with torch.no_grad():  # a row alone, by hand
        ids = torch.tensor([[7, 8, 9, 10, 2]])
        logps = [m(ids).logits[0, 1:-1].log_softmax(-1) for m in (policy, reference)]
    ours, theirs = (logp[torch.arange(3), ids[0, 2:]].sum().item() for logp in logps)
    assert alone[0, 1].item() == pytest.approx(ours - theirs, abs=1e-6)
    assert alone[0, 3].item() == pytest.approx(-theirs, abs=1e-6)
    assert alone[:, 4].tolist() == [3, 1, 6]


def test_small_parts_add_up_to_the_whole(monkeypatch):
    whole = drift(num_generations=3).metrics()
    monkeypatch.setattr("trl_ext.evals.likelihood.LOGITS_AT_ONCE", 1)
    monkeypatch.setattr("trl_ext.evals.drift.PROBABILITIES_AT_ONCE", 1)
    parts = drift(num_generations=3).metrics()
    assert parts == {name: pytest.approx(value, abs=1e-5) for name, value in whole.items()}


def test_equal_policies_have_no_drift_at_all():
    policy = tiny_llama(len(TOKENIZER))
    result = drift(policy, copy.deepcopy(policy))
    for kl_PG in (result.kl_exact_PG, result.kl_k1_PG, result.kl_k3_PG):
        assert (kl_PG == 0).all()
    assert result.reference_perplexity()[0] > 1


def test_temperature_divides_both_laws():
    policy, reference = tiny_llama(len(TOKENIZER)), tiny_llama(len(TOKENIZER), seed=1)
    warm = drift(policy, reference, temperature=2.0, max_completion_length=4)
    for model in (policy, reference):
        model.lm_head.weight.data /= 2
    scaled = drift(policy, reference, max_completion_length=4)
    assert torch.equal(warm.lengths_PG, scaled.lengths_PG)
    torch.testing.assert_close(warm.kl_exact_PG, scaled.kl_exact_PG, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(warm.reference_nll_PG, scaled.reference_nll_PG, atol=1e-5, rtol=1e-5)


def test_filters_of_the_model_do_not_bias_the_samples():
    policy = tiny_llama(len(TOKENIZER))
    plain = drift(policy)
    policy.generation_config.update(min_p=0.5, typical_p=0.2, epsilon_cutoff=0.1, top_k=1)
    assert torch.equal(drift(policy).kl_k1_PG, plain.kl_k1_PG)


def adapted(seed=0):
    config = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return get_peft_model(tiny_llama(len(TOKENIZER)), config)


def test_policy_without_its_adapter_is_the_default_reference():
    policy = adapted()
    frozen = next(p for n, p in policy.named_parameters() if "lora_A" in n)
    frozen.requires_grad = False
    flags = [p.requires_grad for p in policy.parameters()]
    prompts, options = tiny_prompts(4), {"max_completion_length": 6, "disable_tqdm": True}
    default = policy_drift(policy, TOKENIZER, prompts, **options)
    base = policy_drift(policy, TOKENIZER, prompts, reference=tiny_llama(len(TOKENIZER)), **options)
    assert default.metrics()["drift/kl_exact"] > 0
    torch.testing.assert_close(default.kl_exact_PG, base.kl_exact_PG, atol=1e-7, rtol=1e-5)
    assert [p.requires_grad for p in policy.parameters()] == flags


def test_adapter_named_ref_is_the_reference():
    policy = adapted()
    policy.add_adapter("ref", policy.peft_config["default"])
    flags = [p.requires_grad for p in policy.parameters()]
    for name, parameter in policy.named_parameters():
        if ".ref." in name:
            parameter.data.copy_(policy.get_parameter(name.replace(".ref.", ".default.")))
    options = {"max_completion_length": 6, "disable_tqdm": True}
    result = policy_drift(policy, TOKENIZER, tiny_prompts(4), **options)
    assert (result.kl_exact_PG == 0).all()
    assert policy.active_adapter == "default"
    assert [p.requires_grad for p in policy.parameters()] == flags


def test_error_of_the_perplexity_is_that_of_a_ratio():
    """Against the spread of the perplexity over many replications."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, 9, (400, 100, 1), generator=generator).double()
    nll = lengths + 0.5 * torch.randn(400, 100, 1, generator=generator, dtype=torch.float64)
    zero = torch.zeros(100, 1, dtype=torch.float64)
    found = [
        Drift(zero, zero, zero, n, length).reference_perplexity()
        for n, length in zip(nll, lengths, strict=True)
    ]
    values, errors = torch.tensor(found, dtype=torch.float64).unbind(1)
    assert errors.mean().item() == pytest.approx(values.std().item(), rel=0.1)


def test_random_states_and_modes_are_left_as_found():
    policy, reference = tiny_llama(len(TOKENIZER)).train(), tiny_llama(len(TOKENIZER)).train()
    before = torch.get_rng_state()
    first = drift(policy, reference)
    assert torch.equal(torch.get_rng_state(), before)
    assert policy.training and reference.training
    torch.manual_seed(7)
    assert torch.equal(first.kl_k1_PG, drift(policy, reference).kl_k1_PG)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": 0}, "temperature=0"),
        ({"top_p": 0.9}, "top_p=0.9"),
        ({"top_k": 5}, "top_k=5"),
        ({"generation_kwargs": {"min_p": 0.1}}, "min_p"),
        ({"num_generations": 0}, "num_generations=0"),
        ({"prompts": [{"prompt": "1"}]}, "datasets.Dataset"),
        ({"prompts": Dataset.from_dict({"prompt": [""]})}, "no tokens"),
        ({"reference": tiny_llama(len(TOKENIZER) + 8)}, "different vocabularies"),
    ],
)
def test_bad_arguments_are_refused_by_name(options, message):
    with pytest.raises(ValueError, match=message):
        drift(**options)


def test_a_reference_is_needed():
    with pytest.raises(ValueError, match="reference=None"):
        policy_drift(tiny_llama(len(TOKENIZER)), TOKENIZER, tiny_prompts(1))
