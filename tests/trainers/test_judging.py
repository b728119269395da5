"""A judge inside a run: what it is shown, what becomes of its answers, and which are refused."""

import pytest
import torch

from tests.runs import JUDGED, Gradients, build, by_letters, different, parameters, speak
from tests.tiny import tiny_prompts
from trl_ext import NashTrainer, OnlineDPOTrainer
from trl_ext.trainers.judging import bradley_terry, judged

each_judged = pytest.mark.parametrize("trainer", JUDGED, ids=lambda t: t.__name__)


def first_place(prompts, first, second):
    """A judge who looks at the position only."""
    return [0.9] * len(prompts)


def longer(prompts, first, second):
    sides = zip(first, second, strict=True)
    return [0.5 * ((len(a) > len(b)) - (len(a) < len(b))) + 0.5 for a, b in sides]


def test_every_pair_of_a_group_is_asked_once():
    asked = []

    def judge(prompts, first, second):
        asked.extend(zip(prompts, first, second, strict=True))
        return [0.75] * len(prompts)

    prompts, completions = ["p"] * 3 + ["q"] * 3, list("abcxyz")
    pairs = [(0, 1), (0, 2), (1, 2)]
    told, inconsistent = judged(judge, prompts, completions, 3, pairs, False)
    assert asked == [
        *(("p", "a", "b"), ("p", "a", "c"), ("p", "b", "c")),
        *(("q", "x", "y"), ("q", "x", "z"), ("q", "y", "z")),
    ]
    expected = torch.tensor([[0.5, 0.75, 0.75], [0.25, 0.5, 0.75], [0.25, 0.25, 0.5]])
    assert torch.equal(told, expected.expand(2, 3, 3)) and inconsistent == 0.0


def test_both_orders_cancel_a_taste_for_a_position():
    told, inconsistent = judged(first_place, ["p"] * 2, ["a", "b"], 2, [(0, 1)], True)
    assert torch.equal(told, torch.full((1, 2, 2), 0.5)) and inconsistent == 1.0
    told, inconsistent = judged(longer, ["p"] * 2, ["aa", "b"], 2, [(0, 1)], True)
    assert told[0].tolist() == [[0.5, 1.0], [0.0, 0.5]] and inconsistent == 0.0


def test_unasked_pairs_and_missing_answers_are_nan():
    def silent(prompts, first, second):
        return [None if a == "a" else 1.0 for a in first]

    told, _ = judged(silent, ["p"] * 4, list("abcd"), 4, [(0, 2), (1, 3)], False)
    assert told[0, 0, 2].isnan() and told[0, 2, 0].isnan() and told[0, 0, 1].isnan()
    assert (told[0, 1, 3], told[0, 3, 1], told[0, 0, 0]) == (1.0, 0.0, 0.5)


def test_an_answer_in_one_order_only_counts_neither_way():
    def half(prompts, first, second):
        return [1.0 if (a, b) == ("a", "b") else None for a, b in zip(first, second, strict=True)]

    told, inconsistent = judged(half, ["p"] * 2, ["a", "b"], 2, [(0, 1)], True)
    assert told[0, 0, 1].isnan() and inconsistent == 0.0


def test_bradley_and_terry():
    told = bradley_terry(torch.tensor([[0.0, 1.0, torch.nan]]))
    assert told[0, 1, 0] == pytest.approx(0.7310586) and told[0, 0, 0] == 0.5
    assert told[0, :, 2].isnan().all()


# Inside a run


def test_who_is_compared_with_whom(tmp_path):
    """Against an opponent, each own completion with each of the opponent's; else all pairs."""
    counts = {}
    for trainer, options in (
        (NashTrainer, {}),
        (NashTrainer, {"algorithm": "spo"}),
        (OnlineDPOTrainer, {}),
        (OnlineDPOTrainer, {"pair_rule": "first_two"}),
        (OnlineDPOTrainer, {"judge_both_orders": True}),
    ):
        asked = []

        def judge(prompts, first, second, asked=asked):
            asked.append(len(prompts))
            return by_letters(prompts, first, second)

        build(trainer, tmp_path, judge=judge, max_steps=1, **options).train()
        counts[(trainer.__name__, *options.values())] = asked
    assert counts == {  # two prompts, four completions each
        ("NashTrainer",): [8],
        ("NashTrainer", "spo"): [12],
        ("OnlineDPOTrainer",): [12],
        ("OnlineDPOTrainer", "first_two"): [2],
        ("OnlineDPOTrainer", True): [24],
    }


@pytest.mark.parametrize("conversational", [False, True])
def test_a_judge_sees_prompts_and_completions_as_reward_functions_do(conversational, tmp_path):
    seen = []

    def judge(prompts, first, second):
        seen.append((prompts[0], first[0]))
        return by_letters(prompts, first, second)

    data = {"train_dataset": tiny_prompts(16, conversational)}
    build(OnlineDPOTrainer, tmp_path, judge=judge, arguments=data, max_steps=1).train()
    ((prompt, completion),) = seen
    if conversational:
        assert prompt[0]["role"] == "user" and completion[0]["role"] == "assistant"
    else:
        assert isinstance(prompt, str) and isinstance(completion, str)


def gradient_of(judge, folder, trainer=OnlineDPOTrainer, **options):
    caught = Gradients()
    arguments = {"callbacks": [caught], "rollout_func": speak(different)}
    fixed = dict(max_steps=1, learning_rate=0.0, max_grad_norm=0.0, shuffle_dataset=False)
    run = build(trainer, folder, arguments=arguments, judge=judge, **fixed, **options)
    run.train()
    return caught.steps[0], run.state.log_history[0]


def test_a_position_biased_judge_gives_ties_in_both_orders_and_is_logged(tmp_path):
    gradient, row = gradient_of(first_place, tmp_path, judge_both_orders=True)
    assert (gradient == 0).all() and row["frac_ties"] == 1.0
    assert row["judge/inconsistency"] == 1.0
    gradient, row = gradient_of(first_place, tmp_path)
    assert gradient.norm() > 1e-2, "asked once, its taste is taken for a preference"
    assert "judge/inconsistency" not in row


def test_half_a_bias_leaves_half_a_judge(tmp_path):
    """Right about the length, and for the first besides: both orders give the unbiased gradient."""

    def biased(prompts, first, second):
        return [min(1.0, 0.5 * p + 0.4) for p in longer(prompts, first, second)]

    fair, _ = gradient_of(longer, tmp_path, judge_both_orders=True)
    twice, row = gradient_of(biased, tmp_path, judge_both_orders=True)
    assert torch.equal(fair, twice) and row["judge/inconsistency"] == 0.0


def test_a_judge_of_lengths_prefers_as_rewards_by_length_would(tmp_path):
    judged_gradient, row = gradient_of(longer, tmp_path)
    caught = Gradients()
    arguments = {
        "callbacks": [caught],
        "rollout_func": speak(different),
        "reward_funcs": lambda completions, **_: [float(len(c)) for c in completions],
    }
    fixed = dict(max_steps=1, learning_rate=0.0, max_grad_norm=0.0, shuffle_dataset=False)
    build(OnlineDPOTrainer, tmp_path, arguments=arguments, **fixed).train()
    assert torch.equal(judged_gradient, caught.steps[0])
    assert row["rewards/win_rate/mean"] == 0.5, "win rates in a group sum to half its size"


@each_judged
@pytest.mark.parametrize("missing", [None, float("nan")])
def test_a_judge_that_cannot_tell_teaches_nothing(trainer, missing, tmp_path):
    gradient, row = gradient_of(lambda p, a, b: [missing] * len(p), tmp_path, trainer)
    assert (gradient == 0).all() and row["loss"] == 0.0


def test_some_missing_answers_leave_the_others(tmp_path):
    """Of three completions only (0, 1) can be compared: as if the third had not been drawn."""

    def first_pair(prompts, first, second):
        known = [{len(a), len(b)} == {2, 3} for a, b in zip(first, second, strict=True)]
        return [
            p if k else None for p, k in zip(longer(prompts, first, second), known, strict=True)
        ]

    def texts(prompt, i):
        return ("ab", "abc", "abcd")[i]

    found = []
    for judge, G in ((first_pair, 3), (longer, 2)):
        caught = Gradients()
        arguments = {"callbacks": [caught], "rollout_func": speak(texts)}
        fixed = dict(max_steps=1, learning_rate=0.0, max_grad_norm=0.0, shuffle_dataset=False)
        sizes = dict(num_generations=G, per_device_train_batch_size=2 * G)
        build(
            OnlineDPOTrainer, tmp_path, arguments=arguments, judge=judge, **fixed, **sizes
        ).train()
        found.append(caught.steps[0])
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-7)


def test_an_asynchronous_judge(tmp_path):
    async def later(prompts, first, second):
        return by_letters(prompts, first, second)

    now, _ = gradient_of(by_letters, tmp_path)
    then, _ = gradient_of(later, tmp_path)
    assert torch.equal(now, then)


@pytest.mark.parametrize(
    ("answers", "message"),
    [
        (lambda n: [0.5] * (n - 1), "got 11 answers for 12 pairs"),
        (lambda n: 0.5, "got float answers for 12 pairs"),
        (lambda n: [1.5] * n, "answer 1.5 to pair 0 is no probability"),
        (lambda n: [0.5] * (n - 1) + [-0.1], "answer -0.1 to pair 11"),
    ],
)
@each_judged
def test_a_wrong_answer_ends_the_run(trainer, answers, message, tmp_path):
    options = {"algorithm": "spo"} if trainer is NashTrainer else {}
    with pytest.raises(ValueError, match=message):
        gradient_of(lambda p, a, b: answers(len(p)), tmp_path, trainer, **options)


@each_judged
def test_rewards_beside_a_judge_are_refused(trainer, tmp_path):
    arguments = {"reward_funcs": lambda completions, **_: [0.0] * len(completions)}
    with pytest.raises(ValueError, match=r"reward_funcs=.*not applied.*win rate score"):
        build(trainer, tmp_path, arguments=arguments, judge=by_letters)


def test_evaluation_asks_the_judge_too(tmp_path):
    arguments = {"eval_dataset": tiny_prompts(2)}
    options = dict(per_device_eval_batch_size=4, judge=by_letters, judge_both_orders=True)
    run = build(NashTrainer, tmp_path, arguments=arguments, **options)
    before = parameters(run)
    metrics = run.evaluate()
    assert 0 < metrics["eval_win_rate"] < 1 and "eval_judge/inconsistency" in metrics
    assert torch.equal(before, parameters(run))
