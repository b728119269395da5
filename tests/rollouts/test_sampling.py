"""Sampling in place: token for token what TRL samples, and who answers in which row."""

import pytest
import torch
import trl

from tests.rollouts.models import (
    EOS,
    PROMPTS,
    adapted,
    generation_config,
    sharp_llama,
    tiny_gpt2,
)
from tests.tiny import tiny_llama, tiny_prompts, tiny_tokenizer
from trl_ext.rollouts import Opponent, sample


def host_trainer(folder, **options):
    tokenizer = tiny_tokenizer()
    model = tiny_llama(len(tokenizer))
    model.generation_config.eos_token_id = list(range(20, 30))  # next to the tokenizer's own
    config = {"bf16": False, "num_generations": 2, "per_device_train_batch_size": 4}
    config |= {"max_completion_length": 12, "report_to": [], "save_strategy": "no"}
    return trl.GRPOTrainer(
        model,
        lambda completions, **_: [0.0] * len(completions),
        trl.GRPOConfig(str(folder), **{**config, **options}),
        train_dataset=tiny_prompts(4),
        processing_class=tokenizer,
    )


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 0.6, "top_k": 5, "pad_to_multiple_of": 8},
        {"disable_dropout": False, "gradient_checkpointing": False, "repetition_penalty": 1.3},
    ],
)
def test_it_is_trl_token_for_token(tmp_path, options):
    trainer = host_trainer(tmp_path, **options)
    if "disable_dropout" in options:
        trainer.model.config.attention_dropout = 0.1  # TRL samples in training mode
        for module in trainer.model.modules():
            if hasattr(module, "attention_dropout"):
                module.attention_dropout = 0.1
    trainer.model.train()
    prompts = [[5, 6, 7], [8], [9, 10], list(range(11, 20))] * 3
    torch.manual_seed(1)
    theirs, _ = trainer._generate_single_turn(prompts, None, {}, 2)
    state = torch.get_rng_state()
    torch.manual_seed(1)
    trainer.model.gradient_checkpointing_disable()
    ours = sample(
        trainer.accelerator.unwrap_model(trainer.model),
        prompts,
        trainer.generation_config,
        eos_token_ids=trainer.eos_token_ids,
        pad_to_multiple_of=trainer.pad_to_multiple_of,
    )
    assert ours == theirs and torch.equal(torch.get_rng_state(), state)
    assert len({len(row) for row in ours}) > 1, "no completion ended early: nothing was cut"


def test_prompts_are_padded_to_a_multiple():
    widths, model = [], tiny_gpt2()
    model.register_forward_pre_hook(
        lambda _, __, kwargs: widths.append(kwargs["input_ids"].size(1)), with_kwargs=True
    )
    for multiple in (None, 3, 4, 8):
        sample(
            model,
            PROMPTS,
            generation_config(max_new_tokens=1),
            eos_token_ids=[EOS],
            pad_to_multiple_of=multiple,
        )
    assert widths == [4, 6, 4, 8]


def test_a_completion_ends_with_its_first_end():
    torch.manual_seed(0)
    rows = sample(tiny_gpt2(), PROMPTS * 8, generation_config(), eos_token_ids=[EOS, 5])
    ended = [row for row in rows if row[-1] in (EOS, 5)]
    assert ended and all(not {EOS, 5} & set(row[:-1]) for row in rows)
    assert all(len(row) == 8 for row in rows if row not in ended)


def greedy(model, **options):
    config = generation_config(do_sample=False, temperature=None, top_p=None, top_k=None)
    return sample(model, PROMPTS, config, eos_token_ids=[EOS], **options)


@pytest.mark.parametrize("make", [tiny_gpt2, sharp_llama])
def test_the_second_half_of_each_group_is_the_opponents(make):
    policy, opponent = make(0), make(1)
    rows = greedy(policy, opponent_model=opponent, opponent=Opponent(1.0, 2))
    own, other = greedy(policy), greedy(opponent)
    assert rows == [own[0], other[1], own[2], other[3]]
    assert own[1] != other[1] and own[3] != other[3]
    rows = greedy(policy, opponent_model=opponent, opponent=Opponent(1.0, 4))
    assert rows == [*own[:2], *other[2:]]


def test_an_opponent_without_a_group_takes_part_in_every_row():
    """Of any number of rows: in a conversation some end earlier than others."""
    policy, opponent = sharp_llama(), sharp_llama(1)
    everywhere = Opponent(1.0, group_size=None)
    assert everywhere.in_every_row and not Opponent(1.0, 2).in_every_row
    rows = greedy(policy, opponent_model=opponent, opponent=everywhere)
    assert rows == greedy(opponent) != greedy(policy)
    assert Opponent(0.3, group_size=None).coefficients(3).tolist() == [pytest.approx(0.3)] * 3


def test_an_opponent_of_weight_zero_is_nobody():
    policy = sharp_llama()
    torch.manual_seed(0)
    plain = sample(policy, PROMPTS, generation_config(), eos_token_ids=[EOS])
    torch.manual_seed(0)
    rows = sample(
        policy,
        PROMPTS,
        generation_config(),
        eos_token_ids=[EOS],
        opponent_model=sharp_llama(1),
        opponent=Opponent(0.0, 2),
    )
    assert rows == plain


def test_an_adapter_turned_off_is_the_opponent():
    policy = adapted(sharp_llama())
    own, rows = greedy(policy), greedy(policy, opponent=Opponent(1.0, 4))
    with policy.disable_adapter():
        base = greedy(policy)
    assert rows == [*own[:2], *base[2:]] and own[2:] != base[2:]
    assert greedy(policy) == own, "the adapter must be on again"


@pytest.mark.parametrize("wrong", [(-0.1, 2), (1.1, 2), (float("nan"), 2), (0.5, 3), (0.5, 0)])
def test_an_impossible_opponent_is_refused(wrong):
    with pytest.raises(ValueError, match=r"coefficient=|group_size="):
        Opponent(*wrong)


@pytest.mark.parametrize("option", [{"repetition_penalty": 1.2}, {"num_beams": 2}])
def test_options_that_only_the_policy_would_feel_are_refused(option):
    with pytest.raises(ValueError, match=next(iter(option))):
        sample(
            sharp_llama(),
            PROMPTS,
            generation_config(**option),
            eos_token_ids=[EOS],
            opponent_model=sharp_llama(1),
            opponent=Opponent(0.5, 2),
        )


def test_a_group_that_is_cut_is_refused():
    with pytest.raises(ValueError, match="prompt_ids has 4 rows"):
        greedy(sharp_llama(), opponent_model=sharp_llama(1), opponent=Opponent(0.5, 6))
