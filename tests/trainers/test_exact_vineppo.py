"""VinePPO through the trainer, over every trajectory with every outcome of its rollouts.

V1 to V3 of the specification on its binary tree of three steps, where a state is the whole history;
then whole groups, whose rows share the values of the prefixes they have in common.
"""

import itertools

import pytest
import torch
from datasets import Dataset

from tests.exact import (
    COMPLETIONS,
    EOS,
    PROMPTS,
    TOKENIZER,
    A,
    B,
    Enumeration,
    OneHot,
    Recorder,
    T,
    TabularConfig,
    TabularForCausalLM,
    assert_same_gradient,
    double_precision,
    expectation,
    gradient_of,
    nothing_to_collect,
    probability,
    settings,
    table,
    token_logps,
)
from tests.objectives.test_vineppo import (
    GRADIENT,
    LOGITS,
    REWARD,
    STATES,
    TRAJECTORIES,
    logp,
    value,
)
from tests.runs import each_letter
from trl_ext import VinePPOConfig, VinePPOTrainer

PROMPT = PROMPTS[0]
ACTIONS = {"0": A, "1": B}


def taken(ids):
    """The actions of a trajectory behind its prompt."""
    return "".join("1" if token == B else "0" for token in ids)


# The tree


class Nodes(OneHot):
    """The hidden state is the node to which the actions behind the prompt lead."""

    def forward(self, input_ids, attention_mask=None, use_cache=None, **_):
        nodes = [torch.zeros_like(input_ids[:, 0])]
        for action in (input_ids[:, 1:] == B).long().T:
            nodes.append(2 * nodes[-1] + 1 + action)
        return super().forward(torch.stack(nodes, dim=1).clamp(max=len(STATES) - 1))


def tree_model():
    model = TabularForCausalLM(TabularConfig())
    model.model = Nodes(model.config)
    logits = torch.full((len(TOKENIZER), len(TOKENIZER)), -1e9, dtype=torch.float64)
    logits[[A, B], : len(STATES)] = LOGITS.T
    model.double().lm_head.weight.data.copy_(logits)
    return model


def tree_trainer(folder, trajectories):
    """One step per trajectory, which stands for a whole group; rollouts are left to the test."""
    spoken = iter([ACTIONS[action] for action in y] for y in trajectories)

    def rollout(prompts, trainer):
        ids = [next(spoken)] * len(prompts)
        return {"prompt_ids": [[PROMPT]] * len(ids), "completion_ids": ids, "logprobs": None}

    def reward(completion_ids, **_):
        return [REWARD[taken(ids)] for ids in completion_ids]

    options = settings(max_completion_length=3, max_steps=len(trajectories), beta=0.0)
    config = VinePPOConfig(str(folder), num_rollouts=1, splitter=each_letter, **options)
    prompts = Dataset.from_dict({"prompt": [TOKENIZER.decode([PROMPT])] * len(trajectories)})
    tokenizer = {"processing_class": TOKENIZER, "rollout_func": rollout}
    return VinePPOTrainer(tree_model(), reward, config, prompts, **tokenizer)


def rest(prefix, reward):
    """A rollout from here that earns this."""
    leaf = next(y for y in TRAJECTORIES if y.startswith(prefix) and REWARD[y] == reward)
    return [ACTIONS[action] for action in leaf[len(prefix) :]]


def outcomes():
    """Each trajectory with each reward of one rollout per step: rollouts, and the probability."""
    for y, *rewards in itertools.product(TRAJECTORIES, *[(0.0, 1.0)] * 3):
        plan, chance = dict(zip([y[:h] for h in range(3)], rewards, strict=True)), logp(y).exp()
        for prefix, reward in plan.items():
            chance = chance * (value(prefix) if reward else 1 - value(prefix))
        if chance > 0:
            yield y, {prefix: rest(prefix, reward) for prefix, reward in plan.items()}, chance


def tree_gradient(folder):
    """What one update does on average."""
    steps = list(outcomes())
    plans = (plan for _, plan, _ in steps)

    def continued(prefix_ids, max_new_tokens, K):
        plan = next(plans)
        assert max_new_tokens == [3 - len(ids[1:]) for ids in prefix_ids]
        return [[plan[taken(ids[1:])]] for ids in prefix_ids]

    with double_precision(), nothing_to_collect():
        trainer = tree_trainer(folder, [y for y, *_ in steps])
        trainer._continued = continued
        weight = trainer.model.lm_head.weight.data
        recorder = Recorder([chance for *_, chance in steps], 1, weight, weight)
        trainer.add_callback(recorder)
        trainer.train()
    return -3 * recorder.total[[A, B], : len(STATES)].T.flatten()


def test_golden_gradient_of_the_tree_from_one_rollout_per_step(tmp_path):
    """V1"""
    assert float(sum(chance for *_, chance in outcomes())) == pytest.approx(1.0)
    torch.testing.assert_close(tree_gradient(tmp_path), GRADIENT, rtol=0, atol=1e-6)


def test_mutation_the_own_trajectory_among_the_rollouts(tmp_path, monkeypatch):
    honest = VinePPOTrainer._values

    def with_own(self, sampled, prefixes):
        own = sampled.rewards_B[[prefix.row for prefix in prefixes]]
        return (honest(self, sampled, prefixes) + own) / 2

    monkeypatch.setattr(VinePPOTrainer, "_values", with_own)
    torch.testing.assert_close(tree_gradient(tmp_path), GRADIENT / 2, rtol=0, atol=1e-6)


def test_with_exact_values_advantages_telescope_and_vanish_on_average(tmp_path):
    """V2 and V3"""
    seen = []
    with double_precision(), nothing_to_collect():
        trainer = tree_trainer(tmp_path, TRAJECTORIES)
        trainer._continued = lambda prefix_ids, *_: [[[]] for _ in prefix_ids]
        trainer._rewarded = lambda _, places, ids: torch.tensor([value(taken(row)) for row in ids])
        loss = trainer._compute_loss

        def watched(model, inputs):
            seen.append(inputs["advantages"][0])
            return loss(model, inputs)

        trainer._compute_loss = watched
        trainer.train()
    advantages = dict(zip(TRAJECTORIES, seen, strict=True))
    for y, of_tokens in advantages.items():
        assert float(of_tokens.sum()) == pytest.approx(REWARD[y] - value(""), abs=1e-6)
    for state in STATES:
        through = [y for y in TRAJECTORIES if y.startswith(state)]
        mean = sum(logp(y).exp() * advantages[y][len(state)] for y in through)
        assert float(mean) == pytest.approx(0.0, abs=1e-6)


# Groups, with completions that end early

REWARDS = dict(zip(COMPLETIONS, [1.0, 0.0, 1.0, 0.0, 1.0, 0.0, 0.0], strict=True))


def never_ending_behind(weights, tokens):
    weights = weights.clone()
    weights[EOS, list(tokens)] = -1e9
    return weights


POLICY = table(1)
NO_END_BEHIND_A_STEP = never_ending_behind(POLICY, (A, B))


class WithRollouts(Enumeration):
    """Every group, with every reward of one rollout from each of its distinct prefixes.

    Attributes:
        eos_step: the trainer's option.
    """

    eos_step = True

    def _batches(self, G):
        self.plans, batches = [], []
        for group, weight in super()._batches(G):
            prefixes = list(dict.fromkeys(c[:h] for c in group for h in self._starts(c)))
            for rewards in itertools.product((0.0, 1.0), repeat=len(prefixes)):
                plan = dict(zip(prefixes, rewards, strict=True))
                chance = weight * self._chance(plan)
                if chance > 0:
                    self.plans.append({p: self._rest(p, reward) for p, reward in plan.items()})
                    batches.append((group, chance))
        return batches

    def _built(self, *arguments):
        trainer, plans = super()._built(*arguments), iter(self.plans)

        def continued(prefix_ids, max_new_tokens, K):
            plan = next(plans)
            assert sorted(plan) == sorted(tuple(ids[1:]) for ids in prefix_ids)
            return [[plan[tuple(ids[1:])]] for ids in prefix_ids]

        trainer._continued = continued
        return trainer

    def _starts(self, completion):
        spoken = len([token for token in completion if token != EOS])
        return range(len(completion) if self.eos_step else spoken or 1)

    def _through(self, prefix):
        return [c for c in COMPLETIONS if c[: len(prefix)] == prefix and len(c) > len(prefix)]

    def _chance(self, plan):
        total = torch.ones((), dtype=torch.float64)
        for prefix, reward in plan.items():
            each = [
                token_logps(self.policy, self.prompt, c)[len(prefix) :].sum().exp()
                for c in self._through(prefix)
                if self.reward(c) == reward
            ]
            total = total * sum(each)
        return total

    def _rest(self, prefix, reward):
        likely = [c for c in self._through(prefix) if self.reward(c) == reward]
        return list(max(likely, key=lambda c: probability(self.policy, self.prompt, [c])))[
            len(prefix) :
        ]


def of_groups(folder, policy=POLICY, eos_step=True, **options):
    options = settings(num_rollouts=1, splitter=each_letter, eos_step=eos_step, beta=0.0, **options)
    case = WithRollouts(
        VinePPOTrainer, lambda f: VinePPOConfig(f, **options), policy, reward=REWARDS.__getitem__
    )
    case.eos_step = eos_step
    return -case.expected_gradient(str(folder)) * (T if options["loss_type"] == "dr_grpo" else 1)


def expected(policy=POLICY):
    return gradient_of(lambda w: expectation(w, PROMPT, 1, REWARDS.__getitem__), policy)


@pytest.mark.parametrize("loss_type", ["dr_grpo", "luspo"])
def test_groups_that_share_prefixes_are_unbiased(loss_type, tmp_path):
    assert_same_gradient(of_groups(tmp_path, loss_type=loss_type), expected())


def test_an_end_that_belongs_to_the_step_before_it_is_biased(tmp_path):
    """The authors' rule: any other token would begin a step; who decides looks at the action."""
    actual, target = of_groups(tmp_path, eos_step=False), expected()
    assert float((actual - target).norm() / target.norm()) > 0.05


def test_where_no_end_stands_behind_a_step_the_two_rules_agree(tmp_path):
    policy = NO_END_BEHIND_A_STEP
    assert_same_gradient(of_groups(tmp_path, policy, eos_step=False), expected(policy))
