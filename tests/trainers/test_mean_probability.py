"""RLPR's reward: what it is worth, in which trainers, and what it leaves alone."""

import math

import pytest
import torch
import trl

from tests.runs import TOKENIZER, build, logged, settings, speak
from tests.tiny import tiny_llama, tiny_prompts
from trl_ext import (
    AGROTrainer,
    GRPOTrainer,
    JEPOTrainer,
    MajorityVoteTrainer,
    MeanProbabilityReward,
    NashTrainer,
    OnlineDPOTrainer,
    PassAtKTrainer,
)

OPTIONS = {"marker": "#", "answer_prefix": ""}
REWARDED = [
    *(GRPOTrainer, PassAtKTrainer, MajorityVoteTrainer),
    *(OnlineDPOTrainer, NashTrainer, AGROTrainer, JEPOTrainer),
]


def attached(folder, model=None, **options):
    """A reward and the model that it asks."""
    reward = MeanProbabilityReward(**{**OPTIONS, **options})
    trainer = build(GRPOTrainer, folder, model=model, arguments={"reward_funcs": reward})
    return reward, trainer.model


def ids_of(text):
    return TOKENIZER(text, add_special_tokens=False).input_ids


def mean_probability(model, context, answer):
    """By hand, of a row alone: no padding, no batch."""
    context, answer = TOKENIZER(context).input_ids, ids_of(answer)
    with torch.no_grad():
        logp_TV = model(torch.tensor([context + answer])).logits[0].double().log_softmax(-1)
    places = range(len(context) - 1, len(context) + len(answer) - 1)
    told = [logp_TV[t, token].exp().item() for t, token in zip(places, answer, strict=True)]
    return sum(told) / len(told)


def clipped(x):
    return min(1.0, max(0.0, x))


PROMPTS, COMPLETIONS = ["1+1=", "1+1=", "20+400="], ["ab#xyz", "c#", "#q"]
ANSWERS = ["2", "2", "seventeen"]


ROWS = (PROMPTS, COMPLETIONS, ANSWERS)


def scored(reward, prompts=PROMPTS, completions=COMPLETIONS, answers=ANSWERS):
    ids = [ids_of(completion) for completion in completions]
    return reward(prompts=prompts, completion_ids=ids, answer=answers, completions=completions)


@pytest.mark.parametrize("debias", [True, False])
def test_it_is_the_mean_probability_computed_by_hand(debias, tmp_path):
    reward, model = attached(tmp_path, debias=debias)
    told = ["1+1=ab#", "1+1=c#", "20+400=#"]
    expected = [mean_probability(model, *row) for row in zip(told, ANSWERS, strict=True)]
    if debias:
        bare = [mean_probability(model, p + "#", a) for p, a in zip(PROMPTS, ANSWERS, strict=True)]
        expected = [clipped(x - b) for x, b in zip(expected, bare, strict=True)]
        assert expected[2] == 0 and max(expected) > 0  # the last thought is the bare marker
    assert scored(reward) == pytest.approx(expected, abs=1e-6)


def test_the_end_of_sequence_counts_if_asked(tmp_path):
    reward, model = attached(tmp_path, debias=False, answer_eos=True, answer_prefix=" ")
    expected = mean_probability(model, "1+1=ab#", f" 2{TOKENIZER.eos_token}")
    assert scored(reward)[0] == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("batch_size", [1, 2, 64])
def test_neighbours_and_their_padding_change_nothing(batch_size, tmp_path):
    reward, _ = attached(tmp_path, batch_size=batch_size)
    alone = [scored(reward, *([x] for x in row))[0] for row in zip(*ROWS, strict=True)]
    crowd = (["9" * 60, *PROMPTS], ["y" * 50 + "#", *COMPLETIONS], ["z" * 40, *ANSWERS])
    assert scored(reward) == pytest.approx(alone, abs=1e-6)
    assert scored(reward, *crowd)[1:] == pytest.approx(alone, abs=1e-6)


def test_conversations_are_rendered_by_the_chat_template(tmp_path):
    reward, model = attached(tmp_path, debias=False)
    (found,) = scored(reward, [[{"role": "user", "content": "1+1="}]], ["ab#"], ["2"])
    expected = mean_probability(model, "<s><user>1+1=<assistant>ab#", "2")
    assert found == pytest.approx(expected, abs=1e-6)


def test_without_marker_nothing_is_earned_and_without_answer_nothing_is_said(tmp_path):
    reward, _ = attached(tmp_path, debias=False)
    for blank in ("", " "):
        found = scored(reward, ["1="] * 4, ["ab", "a#", "", "c#"], ["2", None, None, blank])
        assert found == [0.0, None, None, None]
    assert scored(reward, ["1="], ["ab"], ["2"]) == [0.0]
    assert scored(reward, [], [], []) == []


def test_neither_gradient_nor_mode_nor_dropout_is_touched(tmp_path):
    model = tiny_llama(len(TOKENIZER))
    model.config.attention_dropout = 0.5
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.5
    reward, model = attached(tmp_path, model=model)
    model.train()
    model.lm_head.eval()
    modes = [module.training for module in model.modules()]
    state = torch.get_rng_state()
    first, again = scored(reward), scored(reward)
    assert first == again and first[0] != 0
    assert torch.equal(torch.get_rng_state(), state)
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert [module.training for module in model.modules()] == modes


@pytest.mark.parametrize("trainer", REWARDED, ids=lambda trainer: trainer.__name__)
def test_every_trainer_attaches_it_and_learns_from_it(trainer, tmp_path):
    reward = MeanProbabilityReward(**OPTIONS, debias=False)
    texts = ["ab#x", "c#", "#", "d"]
    arguments = {"reward_funcs": reward, "rollout_func": speak(lambda _, place: texts[place])}
    run = build(trainer, tmp_path, arguments=arguments, max_steps=1)
    run.train()
    row = logged(run)[0]
    assert 0 < row["rewards/mean_probability_reward/mean"] < 1
    assert row["grad_norm"] > 0 and math.isfinite(row["grad_norm"])


def test_the_reward_is_that_of_the_policy_of_now(tmp_path):
    reward, model = attached(tmp_path)
    before = scored(reward)
    with torch.no_grad():
        model.lm_head.weight.mul_(2)
    assert scored(reward) != before


def test_a_trainer_of_trl_is_attached_by_hand(tmp_path):
    reward = MeanProbabilityReward(**OPTIONS)
    config = trl.GRPOConfig(str(tmp_path), **settings(max_steps=1))
    model = tiny_llama(len(TOKENIZER))
    trainer = trl.GRPOTrainer(model, reward, config, tiny_prompts(8), processing_class=TOKENIZER)
    with pytest.raises(ValueError, match=r"reward\.attach\(trainer\)"):
        trainer.train()
    reward.attach(trainer)
    trainer.train()
    with pytest.raises(ValueError, match="another trainer"):
        reward.attach(build(GRPOTrainer, tmp_path))


def test_what_is_refused(tmp_path):
    with pytest.raises(ValueError, match="batch_size=0"):
        MeanProbabilityReward(batch_size=0)
    with pytest.raises(ValueError, match=r"marker='' leaves no thought.*earn the same"):
        MeanProbabilityReward(marker="")
    with pytest.raises(ValueError, match="marker='→' is '<unk>' once tokenised"):
        attached(tmp_path, marker="→")
    reward, _ = attached(tmp_path)
    with pytest.raises(ValueError, match="prompt, thought and reference answer of one row have 60"):
        scored(reward, answers=["2", "2", "9" * 600])
    with pytest.raises(ValueError, match=r"no column 'answer'.*got \['topic'\]"):
        reward(prompts=["1="], completion_ids=[ids_of("a#")], topic=["sums"])
    with pytest.raises(ValueError, match="column 'answer' holds 2"):
        scored(reward, answers=[2, 2, 3])
    trainer = build(GRPOTrainer, tmp_path)
    trainer.is_deepspeed_enabled = True
    with pytest.raises(ValueError, match="DeepSpeed"):
        MeanProbabilityReward().attach(trainer)
    trainer.is_deepspeed_enabled, trainer.processing_class = False, object()
    with pytest.raises(ValueError, match="processing_class is a object"):
        MeanProbabilityReward().attach(trainer)
