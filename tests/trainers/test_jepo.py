"""JEPO through the trainer: what is scored and masked, what is refused, and that it learns."""

import math
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset

from tests.runs import TOKENIZER, Inline, build, logged, parameters, relative
from tests.tiny import tiny_llama, tiny_prompts, tiny_tokenizer
from trl_ext import JEPOConfig, JEPOTrainer
from trl_ext.completions import tokenize_prompt
from trl_ext.objectives.kl import k3
from trl_ext.objectives.sequence_policy import effective_sample_size
from trl_ext.trainers import background, jepo
from trl_ext.trainers.group_rows import Group

MARKED = {"marker": "#", "answer_prefix": "", "combine_with_reward": False}
CUT = "~"  # a completion that ends so was cut short, without an end of sequence


def spoken(texts):
    """The completions of each prompt, in a conversation or not."""

    def rollout(prompts, trainer):
        said = [texts[row % trainer.num_generations] for row in range(len(prompts))]
        ids = [TOKENIZER(text.removesuffix(CUT)).input_ids for text in said]
        ends = [[] if text.endswith(CUT) else [TOKENIZER.eos_token_id] for text in said]
        return {
            "prompt_ids": [tokenize_prompt(TOKENIZER, prompt) for prompt in prompts],
            "completion_ids": [row + end for row, end in zip(ids, ends, strict=True)],
            "logprobs": None,
        }

    return {"rollout_func": rollout}


def seen(trainer):
    """The micro-batches that the loss was computed on."""
    batches, scored = [], trainer._compute_loss

    def watched(model, inputs):
        batches.append(inputs)
        return scored(model, inputs)

    trainer._compute_loss = watched
    trainer.train()
    return batches


def texts_of(ids_MT, mask_MT):
    return [TOKENIZER.decode(ids[m]) for ids, m in zip(ids_MT, mask_MT.bool(), strict=True)]


@pytest.mark.parametrize(("prefix", "eos"), [("", True), (" ", False)])
@pytest.mark.parametrize("conversational", [False, True])
def test_the_answer_stands_behind_the_thought(conversational, prefix, eos, tmp_path):
    """What was sampled behind the marker is gone; without one all is kept, cut short or not."""
    arguments = spoken(["ab#xy", "nothing", "cut" + CUT, "c#" + CUT])
    arguments["train_dataset"] = tiny_prompts(16, conversational)
    options = MARKED | {"answer_prefix": prefix, "answer_eos": eos, "max_steps": 1}
    (batch,) = seen(build(JEPOTrainer, tmp_path, arguments=arguments, **options))
    answers = dict(zip(tiny_prompts(16)["prompt"], tiny_prompts(16)["answer"], strict=True))
    for p in range(2):
        prompt = TOKENIZER.decode(batch["prompt_ids"][p, 0][batch["prompt_mask"][p, 0].bool()])
        assert conversational == prompt.startswith("<s><user>")
        asked = prompt.removeprefix("<s><user>").removesuffix("<assistant>")
        rows = texts_of(batch["completion_ids"][p], batch["completion_mask"][p])
        told = texts_of(batch["completion_ids"][p], batch["answer_mask"][p])
        answer = prefix + answers[asked] + "</s>" * eos
        assert rows == [f"ab#{answer}", "nothing</s>", "cut", f"c#{answer}"]
        assert told == [answer, "", "", answer]
    assert batch["marked"].tolist() == [[True, False, False, True]] * 2


def test_the_thought_keeps_the_tokens_that_were_sampled(tmp_path):
    """Its text could be tokenised in another way, of which the policy never thought."""
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["ab"])
    letters = tokenizer.convert_tokens_to_ids([*"ab#", "7", tokenizer.eos_token])
    assert tokenizer("ab").input_ids != letters[:2]

    def rollout(prompts, trainer):
        ids = tokenizer(list(prompts)).input_ids
        return {"prompt_ids": ids, "completion_ids": [letters] * len(ids), "logprobs": None}

    arguments = {"rollout_func": rollout, "processing_class": tokenizer}
    model = tiny_llama(len(tokenizer))
    trainer = build(JEPOTrainer, tmp_path, model=model, arguments=arguments, max_steps=1, **MARKED)
    (batch,) = seen(trainer)
    assert (batch["completion_ids"][..., :3] == torch.tensor(letters[:3])).all()
    assert not batch["answer_mask"][..., :3].any() and batch["answer_mask"][..., 3].all()


def test_a_solved_prompt_keeps_what_was_sampled(tmp_path):
    """Its completions stay whole, and those with a marker are known to the format's penalty."""
    dataset = Dataset.from_dict({"prompt": ["1+1=", "1+2="], "answer": ["2", "3"]})
    arguments = {"train_dataset": dataset, **spoken(["ab#xy", "c", "#z", "d"])}
    arguments["reward_funcs"] = lambda prompts, **_: [float(p == "1+2=") for p in prompts]
    options = MARKED | {"combine_with_reward": True, "max_steps": 1}
    (batch,) = seen(build(JEPOTrainer, tmp_path, arguments=arguments, **options))
    (solved,) = (~batch["by_bound"]).nonzero().flatten().tolist()
    ids, mask = batch["completion_ids"][solved], batch["completion_mask"][solved]
    assert texts_of(ids, mask) == ["ab#xy</s>", "c</s>", "#z</s>", "d</s>"]
    assert batch["answer_mask"][solved].sum() == 0 < batch["answer_mask"][1 - solved].sum()
    assert batch["marked"].tolist() == [[True, False, True, False]] * 2


def test_the_share_with_a_marker_is_logged(tmp_path):
    arguments = spoken(["ab#xy", "c#", "#z", "nothing"])
    trainer = build(JEPOTrainer, tmp_path, arguments=arguments, max_steps=1, **MARKED)
    trainer.train()
    row = logged(trainer)[0]
    assert row["marked"] == row["reward"] == 0.75 and row["bound/L1"] is None


def test_bounds_are_logged_where_all_thoughts_have_a_marker(tmp_path):
    options = {"max_steps": 1, **MARKED}
    trainer = build(JEPOTrainer, tmp_path, arguments=spoken(["a#", "bb#", "c#", "#"]), **options)
    trainer.train()
    row = logged(trainer)[0]
    assert row["bound/L1"] < row["bound/L2"] < row["bound/L4"] < 0


@pytest.mark.parametrize("conversational", [False, True])
def test_answers_of_any_length(conversational, tmp_path):
    prompts = tiny_prompts(16, conversational)["prompt"]
    answers = ["x" * (1 + i % 5 * 7) for i in range(16)]
    dataset = Dataset.from_dict({"prompt": prompts, "answer": answers})
    arguments = {"train_dataset": dataset, **spoken(["a#b", "#", "cc#", "d"])}
    trainer = build(JEPOTrainer, tmp_path, arguments=arguments, **MARKED)
    before = parameters(trainer)
    trainer.train()
    after = parameters(trainer)
    assert after.isfinite().all() and not torch.equal(before, after)


@pytest.mark.parametrize("schedule", ["sync", "one_step"])
def test_what_is_logged_of_tokens_is_of_sampled_ones(schedule, monkeypatch, tmp_path):
    """KL, drift and sample size: a reference answer was not sampled by anyone."""
    monkeypatch.setattr(background, "ProcessSampler", Inline)
    options = {"num_iterations": 2} if schedule == "sync" else {"schedule": schedule}
    arguments = spoken(["ab#", "c#", "#", "nothing"]) if schedule == "sync" else {}
    trainer = build(JEPOTrainer, tmp_path, arguments=arguments, **options, **MARKED)
    trainer._thought_length = lambda ids: None if ids[0] % 5 == 0 else len(ids) // 2
    groups, honest = [], trainer.group_loss

    def watched(group):
        groups.append(group)
        return honest(group)

    trainer.group_loss = watched
    trainer.train()
    row, group = logged(trainer)[1], groups[1]
    thought_PMT = group.mask_PMT * (1 - group.stored["answer_mask"])
    assert group.stored["answer_mask"].sum() > 0 and thought_PMT.sum() > 0
    log_ratio = group.logp_PMT - group.old_logp_PMT
    assert log_ratio[thought_PMT.bool()].abs().min() > 0
    drift = (log_ratio * thought_PMT).sum(-1)
    assert row["sampling/behaviour_drift"] == pytest.approx(drift.mean().item(), rel=1e-4)
    size = effective_sample_size(drift).item() / drift.numel()
    assert row["sampling/effective_sample_size"] == pytest.approx(size, rel=1e-4)
    kl = (k3(group.logp_PMT, group.ref_logp_PMT) * thought_PMT).sum() / thought_PMT.sum()
    assert row["kl"] == pytest.approx(kl.item(), rel=1e-4)


# Each option does something of its own, in two steps from one round of samples.
ACTS = [
    *({"bound": name} for name in ("single", "verifree", "latro")),
    *({"beta": 0.0}, {"kl_gradient": "sequence_total"}, {"epsilon": 0.01}),
    *({"marker": "c"}, {"answer_prefix": " "}, {"answer_eos": False}),
    *({"supervised_coef": 0.5}, {"format_penalty": 0.0}, {"combine_with_reward": True}),
    *({"advantage_clip": 0.5}, {"advantage_scale": "batch"}, {"advantage_scale": "none"}),
]


@pytest.mark.parametrize("options", ACTS, ids=str)
def test_each_option_acts(options, tmp_path):
    texts = ["abc#", "c#", "#ccc", "nothing"]
    reward = {"reward_funcs": lambda completions, **_: [float("abc" in c) for c in completions]}
    runs = []
    for own in ({}, options):
        arguments = spoken(texts) | (reward if "combine_with_reward" in own else {})
        common = {"num_iterations": 2, "max_steps": 2, "learning_rate": 0.05}
        chosen = MARKED | {"supervised_coef": 1.0} | common | own
        trainer = build(JEPOTrainer, tmp_path, arguments=arguments, **chosen)
        trainer.train()
        runs.append(parameters(trainer))
    assert relative(*runs) > 1e-4


def group_of(rewards, marked, by_bound, thought_logp, answer_logp):
    """A micro-batch of thoughts of one token, with answers of one behind the marked ones."""
    P, M = torch.tensor(rewards).shape
    logp = torch.stack([torch.tensor(thought_logp), torch.tensor(answer_logp)], -1).double()
    answered = torch.tensor(marked) & torch.tensor(by_bound)[:, None]
    answer_mask = torch.stack([torch.zeros(P, M), answered.double()], -1)
    mask = torch.stack([torch.ones(P, M).double(), answered.double()], -1)
    stored = {
        "answer_mask": answer_mask,
        "marked": torch.tensor(marked),
        "by_bound": torch.tensor(by_bound),
        "rewards": torch.tensor(rewards, dtype=torch.float64),
    }
    logp.requires_grad_()
    return Group(logp, logp.detach(), logp.detach(), mask, stored, SimpleNamespace())


def slopes(group, **options):
    """∂ loss / ∂ log π of each token, `(P, M, 2)`, once per completion."""
    plain = {"beta": 0.0, "epsilon": 0.2, "bound": "single", "supervised_coef": 1.0}
    plain |= {"format_penalty": 0.0, "advantage_clip": 1.0, "advantage_scale": "group"}
    plain |= {"kl_gradient": "sequence", "combine_with_reward": True}
    loss_P, metrics = jepo.group_loss(SimpleNamespace(**plain | options), group)
    (slope,) = torch.autograd.grad(loss_P.sum(), group.logp_PMT)
    return -slope * group.logp_PMT.size(1), metrics


def test_an_unscorable_reward_does_not_enter_the_deviation():
    """Three rewards beside one that is missing weigh as three of three do."""
    known = [[True] * 3], [False], [[-1.0] * 3], [[-2.0] * 3]
    more = [[True] * 4], [False], [[-1.0] * 4], [[-2.0] * 4]
    three, _ = slopes(group_of([[1.0, 0.0, 0.0]], *known), advantage_clip=math.inf)
    four, _ = slopes(group_of([[1.0, 0.0, 0.0, math.nan]], *more), advantage_clip=math.inf)
    assert four[0, 3, 0] == 0
    torch.testing.assert_close(four[0, :3, 0], three[0, :, 0], rtol=1e-3, atol=0)


def test_a_solved_prompt_keeps_the_penalty_of_the_format():
    """Half of its samples have no marker, and half another reward: the advantages add up."""
    marked = [[True, False, True, False]]
    group = group_of([[1.0, 1.0, 0.0, 0.0]], marked, [False], [[-1.0] * 4], [[-2.0] * 4])
    slope, metrics = slopes(group, format_penalty=2.0)
    deviation = math.sqrt(1 / 3)  # of ± 1/2, with three degrees of freedom
    expected = torch.tensor([1.0, 0.0, 0.0, -1.0]).double() / deviation
    torch.testing.assert_close(slope[0, :, 0], expected, rtol=1e-3, atol=1e-3)
    assert not slope[..., 1].any() and metrics["marked"][0].mean() == 0.5


def test_in_one_batch_each_prompt_learns_by_its_own_rule():
    """By reward: nothing of the answers. By the bound: nothing of rewards below zero."""
    rewards = [[1.0, 0.0], [-3.0, 0.0]]
    apart = [[-1.0, -5.0], [-1.0, -5.0]]
    everyone = [[True, True], [True, True]]
    group = group_of(rewards, everyone, [False, True], [[-1.0] * 2] * 2, apart)
    slope, metrics = slopes(group, advantage_scale="none", advantage_clip=math.inf)
    torch.testing.assert_close(slope[0], torch.tensor([[1.0, 0.0], [-1.0, 0.0]]).double())
    torch.testing.assert_close(slope[1], torch.tensor([[4.0, 1.0], [-4.0, 1.0]]).double())
    value_P, weight_P = metrics["bound/L1"]
    assert weight_P.tolist() == [0.0, 1.0] and value_P[1] == -3.0


def test_a_prompt_with_a_thought_without_marker_has_no_bound_to_log():
    marked = [[True, True], [True, False]]
    group = group_of([[0.0] * 2] * 2, marked, [True] * 2, [[-1.0] * 2] * 2, [[-2.0, -4.0]] * 2)
    for name, expected in (
        ("bound/L1", -3.0),
        ("bound/L2", -2.0 + math.log(0.5 + math.exp(-2) / 2)),
    ):
        value_P, weight_P = slopes(group)[1][name]
        assert weight_P.tolist() == [1.0, 0.0] and value_P.isfinite().all()
        assert value_P[0].item() == pytest.approx(expected)


def test_answers_keep_their_gradient_and_thoughts_lose_it_outside_the_clip():
    group = group_of([[0.0, 0.0]], [[True, True]], [True], [[-1.0] * 2], [[-1.0, -5.0]])
    stale = group.old_logp_PMT.clone()
    stale[..., 0] -= torch.tensor([[1.0, 0.0]]).double()
    stale = Group(**{**vars(group), "old_logp_PMT": stale})
    slope, _ = slopes(stale, advantage_scale="none", advantage_clip=math.inf)
    expected = torch.tensor([[[0.0, 1.0], [-4.0, 1.0]]]).double()
    torch.testing.assert_close(slope, expected)


REFUSED = {
    "bound": ({"bound": "tight"}, "bound='tight'"),
    "temperature": ({"temperature": 0.7}, "temperature=0.7"),
    "top_p": ({"top_p": 0.9}, "top_p=0.9"),
    "judge": ({"judge": "bradley_terry"}, "judge"),
    "penalty": ({"format_penalty": -1.0}, "format_penalty=-1.0"),
    "clip": ({"advantage_clip": 0.0}, "advantage_clip=0.0"),
    "latro": ({"bound": "latro", "kl_gradient": "sequence_total"}, "kl_gradient"),
    "loss_type": ({"loss_type": "grpo"}, "loss_type"),
    "coef": ({"supervised_coef": -0.1}, "supervised_coef=-0.1"),
    "infinite penalty": ({"format_penalty": math.inf}, "format_penalty=inf"),
    "beta": ({"beta": math.nan}, "beta=nan"),
    "epsilon": ({"epsilon": 1.5}, r"epsilon=1\.5 must lie in \(0, 1\)"),
    "scale": ({"advantage_scale": "prompt"}, "advantage_scale='prompt' is none of group, batch"),
    "vocab": ({"kl_gradient": "sequence_vocab"}, "kl_gradient='sequence_vocab' is none of"),
    "no kl": ({"beta": 0.0, "kl_gradient": "sequence_total"}, "beta=0 leaves no KL"),
    "record": ({"record_path": "record"}, "record_path='record' is not applied"),
    "kwargs": ({"generation_kwargs": {"temperature": 0.7}}, r"temperature=0\.7 in generation_kw"),
    "filter": ({"generation_kwargs": {"typical_p": 0.9}}, r"typical_p=0\.9 in generation_kwargs"),
    "greedy": ({"generation_kwargs": {"do_sample": False}}, "do_sample=False in generation_kwargs"),
    "one sample": ({"num_generations": 1}, "at least 2 generations per prompt"),
}
HARMLESS = {"generation_kwargs": {"temperature": 1.0, "typical_p": 1.0, "max_time": 60.0}}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused(name, tmp_path):
    options, says = REFUSED[name]
    with pytest.raises(ValueError, match=says):
        JEPOConfig(str(tmp_path), use_cpu=True, bf16=False, **options)
    JEPOConfig(str(tmp_path), use_cpu=True, bf16=False, **HARMLESS)


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        (None, r"column 'answer' holds None, columns \['prompt'\].*Fill it in"),
        ("", "column 'answer' holds '', .*leave the row out"),
        (7, "column 'answer' holds 7"),
        (
            "9" * 600,
            r"prompt, thought and reference answer of one row have 6.*embeddings=512.*short",
        ),
    ],
    ids=["no column", "empty", "a number", "too long"],
)
def test_answers_that_cannot_be_scored(answer, says, tmp_path):
    dataset = tiny_prompts(8).remove_columns("answer")
    if answer is not None:
        dataset = dataset.add_column("answer", [answer] * 8)
    arguments = {"train_dataset": dataset, **spoken(["a#", "b#", "#", "c"])}
    trainer = build(JEPOTrainer, tmp_path, arguments=arguments, **MARKED)
    with pytest.raises(ValueError, match=says):
        trainer.train()


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"marker": "→"}, "marker='→' is '<unk>' once tokenised"),
        ({"marker": None}, "marker=None is no text"),
    ],
)
def test_markers_that_no_completion_could_have(options, says, tmp_path):
    with pytest.raises(ValueError, match=says):
        build(JEPOTrainer, tmp_path, **MARKED | options)


@pytest.mark.parametrize("name", ["tools", "environment_factories"])
def test_what_others_write_is_no_thought(name, tmp_path):
    trainer = build(JEPOTrainer, tmp_path, **MARKED)
    setattr(trainer, name, [len])
    says = name.replace("factories", "factory")
    with pytest.raises(ValueError, match=f"{says} is not supported with JEPOTrainer"):
        trainer._refuse_unsupported()


def test_rewards_are_refused_where_they_are_not_read(tmp_path):
    with pytest.raises(ValueError, match="reward_funcs"):
        build(JEPOTrainer, tmp_path, arguments={"reward_funcs": len}, **MARKED)


@pytest.mark.slow
def test_a_thought_that_tells_the_answer_is_learned(tmp_path):
    """The answer depends on a letter that only the thought can hold: the bound must rise."""
    tokenizer = tiny_tokenizer("ab#01")
    rows = {"prompt": ["a", "b"] * 16, "answer": ["00", "11"] * 16}
    trainer = build(
        JEPOTrainer,
        tmp_path,
        model=tiny_llama(len(tokenizer), hidden=64),
        arguments={"train_dataset": Dataset.from_dict(rows), "processing_class": tokenizer},
        max_steps=60,
        per_device_train_batch_size=32,
        num_generations=8,
        max_completion_length=4,
        learning_rate=3e-3,
        beta=0.0,
        **MARKED,
    )
    trainer.train()
    marked = [row["marked"] for row in logged(trainer)[:-1]]
    bounds = [row["bound/L1"] for row in logged(trainer)[:-1] if row["bound/L1"] is not None]
    assert sum(marked[-5:]) / 5 > 0.9 > sum(marked[:5]) / 5
    assert bounds[-1] > -0.5 and bounds[-1] > bounds[0]
