"""Batches of whole groups: ties, selection, the trim, and what a round looks like."""

import pytest
import torch

import trl_ext.trainers._seam as seam
from tests.runs import (
    ALGORITHMS,
    JUDGED,
    OF_GROUPS,
    Gradients,
    build,
    by_letters,
    case,
    different,
    parameters,
    speak,
)
from tests.their_online_dpo import their_online_dpo
from tests.tiny import tiny_prompts
from trl_ext import NashTrainer, OnlineDPOTrainer
from trl_ext.trainers.group_rows import (
    Selection,
    flattened,
    grouped,
    record_rows,
    trimmed,
    without_eos,
)

each_of_groups = pytest.mark.parametrize("trainer", OF_GROUPS, ids=lambda t: t.__name__)


def same(completions, **_):
    return [1.0] * len(completions)


def undecided(prompts, first, second):
    return [0.5] * len(prompts)


# Ties


OF_PAIRS = [
    (OnlineDPOTrainer, {"loss_type": loss, "pair_rule": rule})
    for loss in ("sigmoid", "ipo", "hinge", "rpo", "best_of_k_sft")
    for rule in ("best_worst", "all_pairs")
]


@pytest.mark.parametrize(
    ("trainer", "options"),
    [
        *OF_PAIRS,
        (OnlineDPOTrainer, {"judge": undecided}),
        (OnlineDPOTrainer, {"loss_type": "xpo", "num_generations": 2, "xpo_alpha": 0.0}),
        ALGORITHMS["dno_prct"],
    ],
    ids=case,
)
def test_nothing_is_learned_from_ties(trainer, options, tmp_path):
    caught = Gradients()
    arguments = {"callbacks": [caught]}
    if options.get("judge") is not undecided:
        arguments["reward_funcs"] = same
    run = build(trainer, tmp_path, arguments=arguments, **options)
    before = parameters(run)
    run.train()
    assert all((gradient == 0).all() for gradient in caught.steps)
    assert torch.equal(before, parameters(run))
    rows = run.state.log_history[:-1]
    assert [row["frac_ties"] for row in rows] == [1.0, 1.0]
    assert [(row["loss"], row["grad_norm"]) for row in rows] == [(0.0, 0.0)] * 2


def test_on_ties_xpo_explores_and_nothing_else(tmp_path):
    """Its bonus is of the reference's sample, whoever won: linear in its weight, without β."""
    found = []
    for options in ({"xpo_alpha": 0.1}, {"xpo_alpha": 0.2}, {"xpo_alpha": 0.1, "beta": 3.0}):
        caught = Gradients()
        arguments = {"callbacks": [caught], "reward_funcs": same, "rollout_func": speak(different)}
        fixed = dict(max_steps=1, learning_rate=0.0, max_grad_norm=0.0, num_generations=2)
        build(
            OnlineDPOTrainer, tmp_path, arguments=arguments, loss_type="xpo", **fixed, **options
        ).train()
        found.append(caught.steps[0])
    assert found[0].norm() > 1e-2
    torch.testing.assert_close(2 * found[0], found[1], rtol=1e-5, atol=1e-8)
    assert torch.equal(found[0], found[2])


def test_trls_online_dpo_learns_from_ties(tmp_path):
    gradient, row = their_online_dpo(tmp_path, reward=same)
    print("TRL on ties: gradient norm", gradient.norm().item())
    assert gradient.norm() > 0.1 and row["grad_norm"] > 0.1


def test_a_policy_gradient_on_equal_rewards_has_only_its_kl(tmp_path):
    """RLOO of equal rewards, without a KL, is silent."""
    options = dict(loss_type="rloo", beta=0.0)
    run = build(OnlineDPOTrainer, tmp_path, arguments={"reward_funcs": same}, **options)
    before = parameters(run)
    run.train()
    assert torch.equal(before, parameters(run))


def test_half_of_the_prompts_tie(tmp_path):
    """They stay in the mean over prompts with exactly 0: half the gradient of the others alone."""
    prompts = tiny_prompts(2)["prompt"]

    def second_only(prompts, completions, **_):
        scores = [float(len(c)) for c in completions]
        return [s * (p == last) for s, p in zip(scores, prompts, strict=True)]

    last, gradients, rows = prompts[1], [], []
    for chosen in ([0, 1], [1, 1]):
        caught = Gradients()
        arguments = {"callbacks": [caught], "train_dataset": tiny_prompts(2).select(chosen)}
        arguments |= {"reward_funcs": second_only, "rollout_func": speak(different)}
        fixed = dict(max_steps=1, learning_rate=0.0, shuffle_dataset=False, max_grad_norm=0.0)
        run = build(OnlineDPOTrainer, tmp_path, arguments=arguments, **fixed)
        run.train()
        gradients.append(caught.steps[0])
        rows.append(run.state.log_history[0]["frac_ties"])
    assert rows == [0.5, 0.0]
    torch.testing.assert_close(2 * gradients[0], gradients[1], rtol=1e-4, atol=1e-7)


def test_mutation_a_tie_with_a_weight(tmp_path, monkeypatch):
    """As TRL has it: the first of two equal completions wins."""
    from dataclasses import replace

    import trl_ext.trainers.online_dpo as online_dpo

    honest = online_dpo.best_worst

    def first_wins(*args, **kwargs):
        pairs = honest(*args, **kwargs)
        return replace(pairs, weight_PN=torch.ones_like(pairs.weight_PN))

    monkeypatch.setitem(online_dpo.PAIR_RULES, "best_worst", first_wins)
    run = build(OnlineDPOTrainer, tmp_path, arguments={"reward_funcs": same})
    run.train()
    assert run.state.log_history[0]["grad_norm"] > 0.1


# Unscorable completions


def test_an_unscorable_completion_is_never_in_a_pair(tmp_path):
    """A None is not a low score: the worst that was scored is rejected."""
    seen = []

    def some(completions, **_):
        return [None if i % 4 == 2 else 1.0 + i % 4 for i in range(len(completions))]

    arguments = {"reward_funcs": some, "rollout_func": speak(different)}
    run = build(OnlineDPOTrainer, tmp_path, arguments=arguments)
    honest = run.group_loss

    def watched(group):
        seen.extend(group.stored["rewards"].tolist())
        return honest(group)

    run.group_loss = watched
    run.train()
    assert seen == [[4.0, 1.0]] * 4


@pytest.mark.parametrize("trainer", JUDGED, ids=lambda t: t.__name__)
@pytest.mark.parametrize("scored", [0, 1])
def test_a_group_with_less_than_two_scores_teaches_nothing(trainer, scored, tmp_path):
    def few(completions, **_):
        return [1.0 if i % 4 < scored else None for i in range(len(completions))]

    run = build(trainer, tmp_path, arguments={"reward_funcs": few}, max_steps=1)
    before = parameters(run)
    run.train()
    assert torch.equal(before, parameters(run)) and run.state.log_history[0]["loss"] == 0.0


def test_one_nan_reward_leaves_the_others_alone(tmp_path):
    """Three scored of four: the same pairs as if the fourth had never been drawn."""

    def three(completions, **_):
        return [float("nan") if i % 4 == 3 else 1.0 + i % 4 for i in range(len(completions))]

    def spoken(completions, **_):
        return [float(i % 3) for i in range(len(completions))]

    found = []
    for reward, G in ((three, 4), (spoken, 3)):
        caught = Gradients()
        arguments = {"reward_funcs": reward, "rollout_func": speak(different)}
        arguments |= {"callbacks": [caught], "train_dataset": tiny_prompts(2)}
        fixed = dict(max_steps=1, learning_rate=0.0, shuffle_dataset=False, max_grad_norm=0.0)
        sizes = dict(num_generations=G, per_device_train_batch_size=2 * G)
        run = build(OnlineDPOTrainer, tmp_path, arguments=arguments, **fixed, **sizes)
        run.train()
        found.append(caught.steps[0])
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-7)


# Rounds


def test_all_groups_of_a_round_are_trained_on_once_per_pass_and_shuffled(tmp_path):
    seen = []
    options = dict(steps_per_generation=4, num_iterations=2, max_steps=8, learning_rate=0.0)
    options |= dict(per_device_train_batch_size=4)
    run = build(OnlineDPOTrainer, tmp_path, **options)
    scored = run._compute_loss

    def watched(model, inputs):
        seen.append([tuple(ids) for ids in inputs["completion_ids"][:, 0].tolist()])
        return scored(model, inputs)

    run._compute_loss = watched
    run.train()
    assert seen[:4] == seen[4:] and len({ids for batch in seen for ids in batch}) == 4


@pytest.mark.parametrize("steps", [1, 2])
def test_only_selected_completions_are_scored(steps, tmp_path):
    """Two of eight: that is where the time goes."""
    rows = []
    options = dict(num_generations=8, steps_per_generation=steps, max_steps=steps)
    run = build(OnlineDPOTrainer, tmp_path, **options)
    score = run._get_per_token_logps_and_entropies

    def counted(model, ids, *args, **kwargs):
        if not run._unscored:
            rows.append(ids.size(0))
        return score(model, ids, *args, **kwargs)

    run._get_per_token_logps_and_entropies = counted
    run.train()
    assert rows == [2] * (2 * steps), "the pair of each prompt, by the policy and the reference"


@pytest.mark.parametrize("num_iterations", [1, 2])
def test_the_anchor_is_the_policy_that_sampled(num_iterations, tmp_path):
    """INPO's π_t stays at the round's first weights while the policy moves on."""
    _, options = ALGORITHMS["inpo"]
    drift = []
    run = build(NashTrainer, tmp_path, num_iterations=num_iterations, **options)
    honest = run.group_loss

    def watched(group):
        drift.append((group.logp_PM - group.old_logp_PM).abs().max().item())
        return honest(group)

    run.group_loss = watched
    run.train()
    assert drift[0] <= 1e-5
    assert (drift[1] > 1e-3) == (num_iterations == 2)


def test_mutation_the_anchor_moves_with_the_policy(tmp_path, monkeypatch):
    _, options = ALGORITHMS["inpo"]
    honest = build(NashTrainer, tmp_path, num_iterations=2, **options)
    honest.train()
    monkeypatch.setattr(NashTrainer, "uses_old_logp", False)
    moving = build(NashTrainer, tmp_path, num_iterations=2, **options)
    moving.train()
    assert (parameters(honest) - parameters(moving)).abs().max() > 1e-3


# The opponent


def test_half_steps_of_nash_mp_change_the_opponent_and_the_target(tmp_path):
    """Proximal steps of two: at 0 and 4 both are the policy of now, at 2 and 6 the opponent is."""
    _, options = ALGORITHMS["nash_mp"]
    run = build(NashTrainer, tmp_path, max_steps=8, **options)
    taken = []
    honest = run.take_snapshot

    def watched(name):
        taken.append((run.state.global_step, name))
        honest(name)

    run.take_snapshot = watched
    run.train()
    assert taken == [
        *((0, "opponent"), (0, "target"), (2, "opponent")),
        *((4, "opponent"), (4, "target"), (6, "opponent")),
    ]


def test_snapshots_are_copies_that_stand_still(tmp_path):
    run = build(NashTrainer, tmp_path, max_steps=2, **ALGORITHMS["nash_mp"][1])
    start = parameters(run)
    run.train()
    kept = torch.cat([p.flatten() for p in run.snapshots["target"].parameters()])
    assert torch.equal(kept, start) and not torch.equal(parameters(run), start)
    assert not any(p.requires_grad for p in run.snapshots["target"].parameters())


def test_a_snapshot_scores_with_its_own_weights(tmp_path):
    """A copy that kept the fused head of the policy would follow it."""
    run = build(NashTrainer, tmp_path, **ALGORITHMS["nash_mp"][1])
    run.take_snapshot("target")
    ids = torch.randint(6, 50, (2, 10))
    inputs = (ids, torch.ones_like(ids), 4)
    before = run._get_per_token_logps_and_entropies(run.snapshots["target"], *inputs)[0]
    with torch.no_grad():
        for p in run.model.parameters():
            p.mul_(1.5)
    after = run._get_per_token_logps_and_entropies(run.snapshots["target"], *inputs)[0]
    assert torch.equal(before, after)


def test_only_the_policys_own_half_is_trained_on(tmp_path):
    run = build(NashTrainer, tmp_path, max_steps=1)
    sizes = []
    honest = run.group_loss
    run.group_loss = lambda group: sizes.append(tuple(group.logp_PM.shape)) or honest(group)
    run.train()
    assert sizes == [(2, 2)]


# The pieces


def batch_of(P=2, M=2, lengths=((1, 3), (2, 2)), prompts=(2, 1)):
    T, S = 5, 4
    ids = torch.arange(P * M * T).view(P, M, T) + 10
    mask = torch.zeros(P, M, T, dtype=torch.long)
    prompt_mask = torch.zeros(P, M, S, dtype=torch.long)
    for p in range(P):
        prompt_mask[p, :, S - prompts[p] :] = 1
        for m in range(M):
            mask[p, m, : lengths[p][m]] = 1
    prompt_ids = torch.arange(P * M * S).view(P, M, S)
    return {
        "prompt_ids": prompt_ids,
        "prompt_mask": prompt_mask,
        "completion_ids": ids,
        "completion_mask": mask,
        "version": torch.tensor([[3, 3], [3, 3]]),
        "rewards": torch.tensor([[1.0, 0.0], [0.5, 0.25]]),
        "weight": torch.tensor([[1.0], [1.0]]),
    }


def test_the_trim_cuts_what_is_padding_in_every_row():
    cut = trimmed(batch_of())
    assert cut["completion_ids"].shape == (2, 2, 3) and cut["prompt_ids"].shape == (2, 2, 2)
    whole = batch_of()
    assert torch.equal(cut["completion_ids"], whole["completion_ids"][..., :3])
    assert torch.equal(cut["prompt_ids"], whole["prompt_ids"][..., 2:])
    assert cut["completion_mask"].sum() == whole["completion_mask"].sum()
    assert cut["weight"] is not None and trimmed(cut)["prompt_ids"].shape == (2, 2, 2)


def test_groups_become_rows_and_keep_their_order():
    rows = flattened(batch_of())
    assert rows["completion_ids"].shape == (4, 5)
    assert torch.equal(rows["completion_ids"][1], batch_of()["completion_ids"][0, 1])
    assert "rewards" not in rows, "what has no row of its own stays with its group"


def test_selected_completions_bring_all_of_theirs_along():
    output = {
        "completion_ids": torch.arange(12).view(6, 2),
        "completion_mask": torch.ones(6, 2),
        "old_logp": None,
        "version": torch.arange(6),
        "advantages": torch.zeros(6),
    }
    rewards = torch.tensor([[0.0, 1.0, 2.0], [5.0, 4.0, 3.0]])
    index = torch.tensor([[2, 0], [0, 2]])
    kept = Selection(index, {"weight": torch.ones(2, 1)}, torch.zeros(2, 3))
    inputs = [{"prompt": name} for name in "aaabbb"]
    batch = grouped(output, rewards, kept, inputs, named=True)
    assert batch["version"].tolist() == [[2, 0], [3, 5]]
    assert batch["rewards"].tolist() == [[2.0, 0.0], [5.0, 3.0]]
    assert batch["completion_ids"].tolist() == [[[4, 5], [0, 1]], [[6, 7], [10, 11]]]
    assert batch["prompt"] == ["a", "b"] and "advantages" not in batch and "old_logp" not in batch


def test_a_recorded_row_holds_no_padding():
    batch = {**batch_of(), "prompt": ["x", "y"], "ref_logp": torch.zeros(2, 2, 5)}
    first, second = record_rows(batch)
    assert first["prompt_ids"] == [2, 3] and second["prompt_ids"] == [11]
    assert first["completion_ids"] == [[10], [15, 16, 17]]
    assert first["rewards"] == [1.0, 0.0] and second["selected_weight"] == [1.0]
    assert not any("ref" in key for key in first)


def test_without_eos_looks_at_the_last_sampled_token():
    output = {
        "completion_ids": torch.tensor([[7, 2, 0], [7, 7, 7], [2, 7, 0], [2, 0, 0]]),
        "completion_mask": torch.tensor([[1, 1, 0], [1, 1, 1], [1, 1, 0], [1, 0, 0]]),
    }
    assert without_eos(output, [2, 3]).tolist() == [False, True, True, False]


# Refusals


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"per_device_train_batch_size": 2, "steps_per_generation": 2},
            "per_device_train_batch_size=2 must be a multiple of the 4 completions",
        ),
        (
            {"per_device_eval_batch_size": 4, "num_generations_eval": 1},
            "at least 2",
        ),
        (
            {"per_device_eval_batch_size": 6, "num_generations_eval": 3},
            None,
        ),
    ],
)
def test_a_group_never_splits(options, message, tmp_path):
    arguments = {"eval_dataset": tiny_prompts(4)}
    if message is None:
        assert build(OnlineDPOTrainer, tmp_path, arguments=arguments, **options)
        return
    with pytest.raises(ValueError, match=message):
        build(OnlineDPOTrainer, tmp_path, arguments=arguments, **options)


@each_of_groups
def test_vision_models_are_refused(trainer, tmp_path):
    run = build(trainer, tmp_path)
    run._is_vlm = True
    with pytest.raises(ValueError, match=r"vision-language.*trl_ext\.GRPOTrainer"):
        run._refuse_unsupported()


def test_copies_of_an_adapter_are_refused(tmp_path):
    from peft import LoraConfig

    arguments = {"peft_config": LoraConfig(r=2, target_modules=["q_proj"])}
    run = build(NashTrainer, tmp_path, arguments=arguments, **ALGORITHMS["nash_mp"][1])
    with pytest.raises(ValueError, match=r"keeps copies of the policy.*adapter.*Train all weights"):
        run.train()


@pytest.mark.parametrize("name", ["tools", "use_transformers_continuous_batching"])
@pytest.mark.parametrize("case", ["nash_md", "xpo"])
def test_an_opponent_answers_in_one_turn(case, name, tmp_path):
    trainer, options = ALGORITHMS.get(case, (NashTrainer, {}))
    run = build(trainer, tmp_path, **options)
    setattr(run, name, [by_letters])
    with pytest.raises(ValueError, match=f"{name} is not supported with .*{case}"):
        run._refuse_unsupported()


@pytest.mark.parametrize("hook", ["select", "group_loss"])
def test_hooks_must_be_bound(hook):
    with pytest.raises(NotImplementedError):
        getattr(seam.GroupTrainer, hook)(None, *[None] * (3 if hook == "select" else 1))
