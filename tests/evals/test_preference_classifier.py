"""The policy as a classifier, against log-probabilities computed one row at a time."""

import copy
import math

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model

from tests.runs import build, logged, parameters
from tests.tiny import tiny_llama, tiny_tokenizer
from trl_ext import GRPOTrainer
from trl_ext.evals import PreferenceClassifier, PreferenceResult, evaluate_preferences

TOKENIZER = tiny_tokenizer()


def pairs(n=5, conversational=False):
    rows = [(f"{i}+{i}=", f"{2 * i}", "no" * (1 + i % 3)) for i in range(n)]
    names = ("prompt", "chosen", "rejected")
    if conversational:
        roles = ("user", "assistant", "assistant")
        rows = [
            [[{"role": role, "content": text}] for role, text in zip(roles, row, strict=True)]
            for row in rows
        ]
    return Dataset.from_list([dict(zip(names, row, strict=True)) for row in rows])


def classify(policy=None, reference=None, dataset=None, **options):
    return evaluate_preferences(
        tiny_llama(len(TOKENIZER)) if policy is None else policy,
        TOKENIZER,
        pairs() if dataset is None else dataset,
        reference=tiny_llama(len(TOKENIZER), seed=1) if reference is None else reference,
        **{"disable_tqdm": True, **options},
    )


def logp(model, text_before, text_after):
    """Log-probability of what follows, by hand."""
    before = TOKENIZER(text_before, add_special_tokens=False)["input_ids"]
    after = TOKENIZER(text_after, add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        logits = model(torch.tensor([[*before, *after]])).logits[0].log_softmax(-1)
    return sum(logits[len(before) - 1 + t, token].item() for t, token in enumerate(after))


@pytest.mark.parametrize("conversational", [False, True])
def test_log_ratios_are_those_of_each_row_alone(conversational):
    models = tiny_llama(len(TOKENIZER)), tiny_llama(len(TOKENIZER), seed=1)
    result = classify(*models, dataset=pairs(conversational=conversational))
    frame = "<s><user>{}<assistant>" if conversational else "{}"
    for i, row in enumerate(pairs()):
        ratios = []
        for name in ("chosen", "rejected"):
            ours, theirs = (
                logp(model, frame.format(row["prompt"]), row[name] + "</s>") for model in models
            )
            ratios.append(ours - theirs)
        assert result.chosen_log_ratio_P[i].item() == pytest.approx(ratios[0], abs=1e-5)
        assert result.rejected_log_ratio_P[i].item() == pytest.approx(ratios[1], abs=1e-5)
        assert result.margin_P[i].item() == pytest.approx(ratios[0] - ratios[1], abs=1e-5)


def test_policy_equal_to_its_reference_is_right_half_of_the_time():
    policy = tiny_llama(len(TOKENIZER))
    numbers = classify(policy, copy.deepcopy(policy), beta=0.3).metrics()
    assert numbers["classifier/accuracy"] == 0.5
    assert numbers["classifier/margin"] == 0 and numbers["classifier/chosen_log_ratio"] == 0
    assert numbers["classifier/loss"] == pytest.approx(math.log(2))


def test_numbers_of_known_margins():
    ratios = [[2.0, 1.0, 0.0, math.nan], [0.5, 1.0, 3.0, 0.0]]
    chosen, rejected = torch.tensor(ratios, dtype=torch.float64)
    numbers = PreferenceResult(chosen, rejected, beta=2.0).metrics("")
    assert numbers["accuracy"] == pytest.approx(1.5 / 3)
    assert numbers["accuracy_se"] == pytest.approx(0.5 / math.sqrt(3))
    assert numbers["margin"] == pytest.approx((1.5 + 0 - 3) / 3)
    assert numbers["chosen_log_ratio"] == pytest.approx(1.0)
    assert numbers["rejected_log_ratio"] == pytest.approx(4.5 / 4)
    losses = [math.log(1 + math.exp(-2 * margin)) for margin in (1.5, 0.0, -3.0)]
    assert numbers["loss"] == pytest.approx(sum(losses) / 3)
    assert "loss" not in PreferenceResult(chosen, rejected).metrics("")


def test_batches_and_padding_change_nothing():
    whole = classify()
    for parts in (classify(batch_size=1), classify(batch_size=3)):
        torch.testing.assert_close(parts.margin_P, whole.margin_P, atol=1e-5, rtol=1e-5)
    assert classify(max_prompts=2).margin_P.shape == (2,)
    with_neighbour = Dataset.from_list(
        [*pairs().to_list(), {"prompt": "1" * 60, "chosen": "2" * 60, "rejected": "3"}]
    )
    longer = classify(dataset=with_neighbour).margin_P[:5]
    torch.testing.assert_close(longer, whole.margin_P, atol=1e-5, rtol=1e-5)


def test_policy_without_its_adapter_is_the_default_reference():
    config = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    policy = get_peft_model(tiny_llama(len(TOKENIZER)), config)
    default = evaluate_preferences(policy, TOKENIZER, pairs(), disable_tqdm=True)
    given = classify(policy, tiny_llama(len(TOKENIZER)))
    assert default.margin_P.abs().max() > 0
    torch.testing.assert_close(default.margin_P, given.margin_P, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"beta": 0.0}, "beta=0.0"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"dataset": pairs().remove_columns("rejected")}, "rejected"),
        ({"dataset": [{"prompt": "1"}]}, "datasets.Dataset"),
    ],
)
def test_bad_arguments_are_refused_by_name(options, message):
    with pytest.raises(ValueError, match=message):
        classify(**options)


def train(folder, *callbacks, **arguments):
    arguments = {"callbacks": list(callbacks), "eval_dataset": pairs(4), **arguments}
    trainer = build(GRPOTrainer, folder, arguments=arguments, eval_strategy="steps", eval_steps=1)
    trainer.train()
    return trainer


def test_evaluations_of_a_trainer_report_it_and_training_is_the_same_to_the_bit(tmp_path):
    classifier = PreferenceClassifier(beta=0.1)
    alone, watched = train(tmp_path / "a"), train(tmp_path / "b", classifier)
    assert torch.equal(parameters(alone), parameters(watched))
    rows = [row for row in logged(watched) if "eval_classifier/accuracy" in row]
    assert [row["step"] for row in rows] == [1, 2]
    rest = [row for row in logged(watched) if "eval_classifier/accuracy" not in row]
    assert rest == logged(alone)
    metrics = watched.evaluate()
    expected = classify(watched.model, tiny_llama(len(TOKENIZER)), pairs(4), beta=0.1, batch_size=8)
    for name, value in expected.metrics("eval_classifier/").items():
        assert metrics[name] == pytest.approx(value, rel=1e-4, abs=1e-6), name
    assert metrics["eval_classifier/margin"] != 0
    assert classifier.results["eval"].margin_P.shape == (4,)


def test_held_out_pairs_of_its_own_and_a_trainer_without_reference(tmp_path):
    classifier = PreferenceClassifier(pairs(3))
    trainer = build(GRPOTrainer, tmp_path, arguments={"callbacks": [classifier]})
    trainer.evaluate(pairs(2).select_columns("prompt"))
    assert classifier.results["eval"].metrics("")["accuracy"] == 0.5
    with pytest.raises(ValueError, match="no reference policy"):
        build(GRPOTrainer, tmp_path, arguments={"callbacks": [PreferenceClassifier()]}, beta=0.0)
