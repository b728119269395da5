"""AGRO's completions from elsewhere: listed ones, recorded ones, and some beside fresh samples."""

import math

import pytest
import torch
import trl
from datasets import Dataset

from tests.runs import (
    TOKENIZER,
    Gradients,
    build,
    by_letters,
    case,
    different,
    logged,
    parameters,
    relative,
    settings,
    speak,
    vowels,
)
from tests.tiny import tiny_llama, tiny_prompts
from trl_ext import AGROConfig, AGROTrainer
from trl_ext.data import load_record
from trl_ext.trainers.replay_buffer import ReplayBuffer

G = 4


def listed(n=8, per_prompt=G, conversational=False, **columns):
    """Prompts, each with a list of completions of different lengths."""

    def said(text):
        return [{"role": "assistant", "content": text}] if conversational else text

    prompts = tiny_prompts(n, conversational)["prompt"]
    texts = [different("x" * i, place) for i in range(n) for place in range(per_prompt)]
    lists = [texts[i * per_prompt : (i + 1) * per_prompt] for i in range(n)]
    scores = {"scores": [vowels(texts) for texts in lists]}
    return Dataset.from_dict(
        {
            "prompt": prompts,
            "responses": [[said(text) for text in texts] for texts in lists],
            **({} if "scores" in columns else scores),
            **{name: value for name, value in columns.items() if value is not None},
        }
    )


def run(folder, dataset, source, **options):
    trainer = build(
        AGROTrainer,
        folder,
        arguments={"train_dataset": dataset, **options.pop("arguments", {})},
        data_source=source,
        shuffle_dataset=False,
        **options,
    )
    trainer.train()
    return trainer


TOPR = {"loss_type": "topr", "beta": 0.0}


def negatives(logp):
    """Only wrong completions, of a writer who gave each of them this log-probability."""
    return listed(scores=[[-1.0] * G] * 8, logps=[[logp] * G] * 8)


@pytest.mark.parametrize("conversational", [False, True])
def test_offline_is_the_same_as_if_the_policy_had_said_it(conversational, tmp_path):
    """Nothing is asked about the origin: listed completions and sampled ones train alike."""
    offline = run(tmp_path / "a", listed(conversational=conversational), "offline")
    if conversational:
        assert offline.state.global_step == 2 and parameters(offline).isfinite().all()
        return
    spoken = dict(zip(tiny_prompts(8)["prompt"], listed()["responses"], strict=True))
    arguments = {"rollout_func": speak(lambda prompt, place: spoken[prompt][place])}
    online = run(tmp_path / "b", listed(), "online", arguments=arguments)
    assert torch.equal(parameters(offline), parameters(online))


def test_on_fresh_samples_it_is_trls_rloo(tmp_path):
    """TRL's trainer with the KL in the reward, on the same completions and another reference."""
    tiny_llama(len(TOKENIZER)).save_pretrained(tmp_path / "start")
    options = settings(max_steps=1, max_grad_norm=0.0, learning_rate=0.0, shuffle_dataset=False)
    options |= {"beta": 0.3, "gradient_checkpointing": False}
    gradients = []
    for trainer, config in ((AGROTrainer, AGROConfig), (trl.RLOOTrainer, trl.RLOOConfig)):
        caught = Gradients()
        run = trainer(
            str(tmp_path / "start"),
            lambda completions, **_: [float(len(c) % 3) for c in completions],
            config(str(tmp_path), **options),
            tiny_prompts(16),
            processing_class=TOKENIZER,
            callbacks=[caught],
        )
        run._generate_single_turn = (
            said if trainer is trl.RLOOTrainer else lambda *a: (said(*a), None)
        )
        run.ref_model.load_state_dict(tiny_llama(len(TOKENIZER), seed=1).state_dict())
        run.train()
        gradients.append(caught.steps[0])
    assert gradients[0].norm() > 1e-2
    assert relative(*gradients) <= 1e-5


def said(prompt_ids, *_):
    """Token ids in place of samples, of several lengths in each group."""
    texts = [different("", row % G) for row in range(len(prompt_ids))]
    return [[*TOKENIZER(text).input_ids, TOKENIZER.eos_token_id] for text in texts]


def test_mixed_groups_begin_with_the_list(tmp_path):
    table = []
    trainer = build(
        AGROTrainer,
        tmp_path,
        arguments={"train_dataset": listed(per_prompt=2)},
        data_source="mixed",
        shuffle_dataset=False,
    )
    scored = trainer._calculate_rewards

    def watched(inputs, prompts, completions, ids):
        table.extend(completions)
        return scored(inputs, prompts, completions, ids)

    trainer._calculate_rewards = watched
    trainer.train()
    given = [text for texts in listed(per_prompt=2)["responses"] for text in texts]
    assert [text for i, text in enumerate(table) if i % G < 2] == given[: len(table) // 2]
    assert len({text for i, text in enumerate(table) if i % G >= 2}) > 2


@pytest.mark.parametrize("options", [{}, {"num_iterations": 2}, {"steps_per_generation": 2}])
def test_an_ordered_replay_is_the_run(options, tmp_path):
    online = build(
        AGROTrainer,
        tmp_path / "online",
        record_path=str(tmp_path / "record"),
        max_steps=4,
        **options,
    )
    online.train()
    replay = run(
        tmp_path / "replay", load_record(tmp_path / "record"), "replay", max_steps=4, **options
    )
    assert torch.equal(parameters(online), parameters(replay))
    names = ("return", "return_variance", "kl")
    for a, b in zip(logged(online)[:-1], logged(replay)[:-1], strict=True):
        assert {name: a[name] for name in names} == {name: b[name] for name in names}


def versions(trainer):
    """Optimizer steps at which the groups of each micro-batch were sampled."""
    seen, scored = [], trainer._compute_loss

    def watched(model, inputs):
        seen.append(inputs["version"][:, 0].tolist())
        return scored(model, inputs)

    trainer._compute_loss = watched
    trainer.train()
    return seen


def test_the_buffer_gives_groups_of_earlier_rounds(tmp_path):
    options = {"replay_rounds": 2, "replay_share": 0.5, "per_device_train_batch_size": 16}
    seen = versions(build(AGROTrainer, tmp_path, max_steps=6, **options))
    assert seen[0] == [0] * 4
    for step, of_groups in enumerate(seen[1:], start=1):
        old = [version for version in of_groups if version < step]
        assert len(old) == 2 and set(old) <= {step - 2, step - 1}, (step, of_groups)


def test_any_group_of_the_buffer_may_be_taken_again_none_twice():
    """One by one and in turn all, by torch's generator alone."""

    def round_of(first):
        names = torch.arange(first, first + 3)
        texts = [str(name) for name in names.tolist()]
        return {"completion_ids": names.view(3, 1, 1).expand(3, 2, 1), "prompt": texts}

    taken = set()
    for seed in range(60):
        buffer = ReplayBuffer(2, 2 / 3)
        torch.manual_seed(seed)
        for first in (0, 3, 6):
            batch = buffer.exchange(round_of(first))
        names = batch["completion_ids"][:, 0, 0].tolist()
        assert batch["prompt"] == [str(name) for name in names]
        assert names[2] == 8 and len(set(names)) == 3
        taken.add(tuple(names[:2]))
        torch.manual_seed(seed)
        again = ReplayBuffer(2, 2 / 3)
        for first in (0, 3, 6):
            repeated = again.exchange(round_of(first))
        assert torch.equal(repeated["completion_ids"], batch["completion_ids"])
    assert len(taken) > 20 and {name for pair in taken for name in pair} == set(range(6))


def test_groups_of_different_widths_are_padded_where_their_tokens_end():
    """Prompts on the left, completions on the right, each with its mask."""

    def round_of(asked, said):
        tokens = {"prompt_ids": asked, "completion_ids": said, "old_logp": said}
        batch = {key: torch.full((1, 2, n), n) for key, n in tokens.items()}
        masks = {"prompt_mask": asked, "completion_mask": said}
        return batch | {key: torch.ones(1, 2, n) for key, n in masks.items()}

    for first, second in ((round_of(4, 1), round_of(2, 3)), (round_of(2, 3), round_of(4, 1))):
        buffer = ReplayBuffer(1, 0.5)
        buffer.exchange({key: value.repeat(2, 1, 1) for key, value in first.items()})
        batch = buffer.exchange({key: value.repeat(2, 1, 1) for key, value in second.items()})
        rows = {tuple(map(tuple, group)) for group in batch["prompt_ids"].tolist()}
        assert rows == {((4,) * 4,) * 2, ((0, 0, 2, 2),) * 2}
        for key in ("completion_ids", "old_logp"):
            rows = {tuple(map(tuple, group)) for group in batch[key].tolist()}
            assert rows == {((1, 0, 0),) * 2, ((3, 3, 3),) * 2}
        for kind in ("prompt", "completion"):
            assert torch.equal(batch[f"{kind}_mask"].bool(), batch[f"{kind}_ids"] > 0)


def test_groups_of_the_buffer_are_whole(tmp_path):
    """Each group that is taken again has the rewards of its own completions, padded as it was."""
    trainer = build(AGROTrainer, tmp_path, max_steps=5, replay_rounds=3, replay_share=1.0)
    scored = trainer._compute_loss

    def watched(model, inputs):
        mask, ids = inputs["completion_mask"].bool(), inputs["completion_ids"]
        for p in range(len(ids)):
            texts = [
                TOKENIZER.decode(row[m], skip_special_tokens=True)
                for row, m in zip(ids[p], mask[p], strict=True)
            ]
            assert vowels(texts) == inputs["rewards"][p].tolist()
        return scored(model, inputs)

    trainer._compute_loss = watched
    trainer.train()
    assert trainer.state.global_step == 5


@pytest.mark.parametrize("step", [1, 2, 3])
def test_a_resumed_run_has_its_buffer(step, tmp_path):
    options = {
        "replay_rounds": 2,
        "max_steps": 5,
        "steps_per_generation": 2,
        "save_strategy": "steps",
        "save_steps": 1,
    }
    whole = build(AGROTrainer, tmp_path, **options)
    whole.train()
    resumed = build(AGROTrainer, tmp_path, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
    assert torch.equal(parameters(whole), parameters(resumed))
    assert logged(whole)[step:-1] == logged(resumed)[step:-1]


def test_a_missing_score_is_a_completion_never_listed(tmp_path):
    scores = [[1.0, None, 0.0, math.nan] for _ in range(8)]
    trainer = run(tmp_path, listed(scores=scores), "offline")
    rows = logged(trainer)[:-1]
    assert all(math.isfinite(row["return_variance"]) and row["return_variance"] > 0 for row in rows)


def test_what_is_logged_is_the_variance_of_the_returns(tmp_path):
    """At the first step policy and reference are one, and R is the reward."""
    trainer = run(tmp_path, listed(), "offline", max_steps=1)
    rewards = torch.tensor(listed()["scores"][:2])
    row = logged(trainer)[0]
    assert row["return"] == pytest.approx(rewards.mean().item())
    assert row["return_variance"] == pytest.approx(rewards.var(1).mean().item(), rel=1e-5)


def test_the_loss_needs_the_policy_of_now(tmp_path):
    """The second pass over a round sees other returns: it is not the first one again."""
    options = {"num_iterations": 2, "learning_rate": 0.05, "max_steps": 2, "beta": 1.0}
    rows = logged(run(tmp_path, listed(), "offline", **options))
    assert rows[0]["return"] != rows[1]["return"]


def test_topr_reads_who_wrote_a_listed_completion(tmp_path):
    """What its writer found far likelier than the policy does is left alone; w is at most 1."""
    before = parameters(build(AGROTrainer, tmp_path))
    left = run(tmp_path, negatives(0.0), "offline", learning_rate=1e-3, max_steps=1, **TOPR)
    whole, unlikelier = (
        run(tmp_path, negatives(logp), "offline", learning_rate=1e-3, max_steps=1, **TOPR)
        for logp in (-1e3, -1e4)
    )
    assert logged(left)[0]["taper"] < 1e-3 and logged(whole)[0]["taper"] == 1.0
    assert logged(left)[0]["grad_norm"] < 1e-3 * logged(whole)[0]["grad_norm"]
    assert torch.equal(parameters(whole), parameters(unlikelier))
    assert not torch.equal(before, parameters(whole))


def test_topr_of_positives_needs_no_writer(tmp_path):
    """Their weight is 1 whatever the writer: offline it is maximum likelihood of what was right."""
    scores = [[1.0] * G] * 8
    runs = [
        run(tmp_path, listed(scores=scores, logps=[[logp] * G] * 8), "offline", **TOPR)
        for logp in (0.0, -1e3)
    ]
    assert torch.equal(*map(parameters, runs))
    assert [row["taper"] for row in logged(runs[0])[:-1]] == [1.0, 1.0]


def test_copg_logs_how_far_the_optimum_is(tmp_path):
    """Its loss is the variance of the returns over 2β, and its step is AGRO's but for rounding."""
    copg = run(tmp_path, listed(), "offline", loss_type="copg", max_steps=1)
    row = logged(copg)[0]
    assert row["loss"] == pytest.approx(row["return_variance"] / (2 * 0.1), rel=1e-4)
    agro = run(tmp_path, listed(), "offline", max_steps=1)
    assert row["grad_norm"] == pytest.approx(logged(agro)[0]["grad_norm"], rel=1e-4)


def test_an_offline_run_is_evaluated_on_lists(tmp_path):
    """Its loss at the start is that of the listed scores: policy and reference are still one."""
    arguments = {"train_dataset": listed(), "eval_dataset": listed(2)}
    options = {"data_source": "offline", "loss_type": "copg", "learning_rate": 0.0}
    metrics = build(AGROTrainer, tmp_path, arguments=arguments, **options).evaluate()
    variance = torch.tensor(listed(2)["scores"]).var(1).mean().item()
    assert metrics["eval_return_variance"] == pytest.approx(variance, rel=1e-5)
    assert metrics["eval_loss"] == pytest.approx(variance / (2 * 0.1), rel=1e-5)


def test_prompts_with_one_score_say_nothing_of_the_variance(tmp_path):
    """One of two prompts per step has a single score, the other two that differ."""
    scores = [[1.0, None, None, None] if i % 2 else [1.0, 0.0, None, None] for i in range(8)]
    row = logged(run(tmp_path, listed(scores=scores), "offline", max_steps=1))[0]
    assert row["return_variance"] == pytest.approx(0.5) and row["return"] == pytest.approx(2 / 3)


# Each option does something of its own, in the third step of a run.
ACTS = [
    *({"beta": 1.0}, {"mode": "full"}, {"loss_type": "topr", "beta": 0.0}),
    *({"judge": by_letters}, {"temperature": 0.5, "scale_logps_by_temperature": True}),
    *({"replay_rounds": 1}, {"replay_rounds": 1, "replay_share": 1.0}, {"replay_rounds": 2}),
]


@pytest.mark.parametrize("options", ACTS, ids=case)
def test_each_option_acts(options, tmp_path):
    common = {"max_steps": 4, "per_device_train_batch_size": 16}
    without = {"temperature": {"temperature": 0.5}, "replay_share": {"replay_rounds": 1}}
    other = next((own for name, own in without.items() if name in options), {})
    other = {"replay_rounds": 1} if options == {"replay_rounds": 2} else other
    runs = []
    for own in (options, other, other):
        trainer = build(AGROTrainer, tmp_path, **common, **own)
        trainer.train()
        runs.append(parameters(trainer))
    assert torch.equal(*runs[1:]) and relative(*runs[:2]) > 1e-6


def test_a_judges_win_rates_are_the_rewards(tmp_path):
    trainer = build(AGROTrainer, tmp_path, judge=by_letters, max_steps=1)
    trainer.train()
    assert logged(trainer)[0]["return"] == pytest.approx(0.5, abs=1e-6)
    assert logged(trainer)[0]["return_variance"] > 0


REFUSED = {
    "full replay": ({"mode": "full", "replay_rounds": 1}, "replay_rounds=1"),
    "share alone": ({"replay_share": 0.3}, "replay_share=0.3"),
    "share": ({"replay_rounds": 1, "replay_share": 0.0}, "replay_share=0.0"),
    "replay offline": ({"replay_rounds": 1, "data_source": "offline"}, "replay_rounds=1"),
    "beta": ({"beta": 0.0}, "beta=0.0"),
    "mode": ({"mode": "half"}, "mode='half'"),
    "data_source": ({"data_source": "elsewhere"}, "data_source='elsewhere'"),
    "loss_type": ({"loss_type": "grpo"}, "loss_type='grpo' is none of agro, copg, topr"),
    "copg full": ({"loss_type": "copg", "mode": "full"}, "mode='full'"),
    "topr kl": ({"loss_type": "topr", "beta": 0.1}, "beta=0.1 is not applied"),
    "topr mixed": ({"loss_type": "topr", "data_source": "mixed"}, "data_source='mixed'"),
    "topr replay": ({"loss_type": "topr", "data_source": "replay"}, "data_source='replay'"),
    "topr buffer": ({"loss_type": "topr", "replay_rounds": 1}, "replay_rounds=1"),
    "topr truncated": ({"loss_type": "topr", "top_p": 0.9}, "top_p=0.9"),
    "topr tempered": ({"loss_type": "topr", "temperature": 0.7}, "temperature=0.7"),
    "epsilon": ({"epsilon": 0.3}, "epsilon=0.3"),
    "full offline": ({"mode": "full", "data_source": "offline"}, "data_source='offline'"),
    "full stale": ({"mode": "full", "num_iterations": 2}, "2 optimizer steps"),
    "full truncated": ({"mode": "full", "top_p": 0.9}, "top_p=0.9"),
    "full tempered": ({"mode": "full", "temperature": 0.7}, "temperature=0.7"),
    "judge": ({"data_source": "offline", "judge": "bradley_terry"}, "judge"),
    "schedule": ({"data_source": "replay", "schedule": "one_step"}, "schedule"),
    "no number": ({"beta": math.nan}, "beta=nan must be positive and finite"),
    "infinite": ({"beta": math.inf}, "beta=inf must be positive and finite"),
    "rewards judged": ({"judge": "bradley_terry"}, "judge='bradley_terry' is not applied"),
    "no replay": (
        {"replay_rounds": 2, "per_device_train_batch_size": 4, "num_generations": 4},
        r"replay_share=0\.5 of the 1 groups.*is none",
    ),
    "kwargs": (
        {"mode": "full", "generation_kwargs": {"temperature": 0.5}},
        r"temperature=0\.5 in generation_kwargs is not supported with mode='full'",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused(name, tmp_path):
    options, says = REFUSED[name]
    with pytest.raises(ValueError, match=says.replace("(", r"\(")):
        AGROConfig(str(tmp_path), use_cpu=True, bf16=False, **options)


@pytest.mark.parametrize(
    ("dataset", "source", "says"),
    [
        (lambda: tiny_prompts(8), "offline", "no column 'responses'"),
        (lambda: listed(scores=None), "offline", "no column 'scores'"),
        (lambda: listed(per_prompt=2), "offline", "lists 2"),
        (lambda: listed(per_prompt=5), "mixed", "lists 5"),
        (lambda: tiny_prompts(8), "replay", "no record"),
        (
            lambda: listed(responses=["abcd"] * 8),
            "offline",
            "'responses' holds 'abcd'.*give a list",
        ),
        (lambda: listed(responses=[[None, *"abc"]] * 8), "offline", r"holds \"\[None, 'a',"),
        (lambda: listed(scores=[["1"] * G] * 8), "offline", r"'scores' holds .*a number or None"),
        (
            lambda: listed(scores=[1.0] * 8),
            "offline",
            r"'scores' holds '1\.0'.*give a list per row",
        ),
        (
            lambda: listed(responses=[["x" * 600, *"abc"]] * 8),
            "offline",
            r"prompt and response of one row have 605 .*max_position_embeddings=512",
        ),
    ],
    ids=[
        *("no responses", "no scores", "too few", "too many", "no record"),
        *("a text", "a gap", "texts for scores", "one score", "beyond the context"),
    ],
)
def test_a_dataset_that_does_not_fit(dataset, source, says, tmp_path):
    with pytest.raises(ValueError, match=says):
        run(tmp_path, dataset(), source)


@pytest.mark.parametrize(
    ("logps", "says"),
    [(None, "no column 'logps'"), (0.5, "'logps' holds 0.5"), (math.nan, "'logps' holds nan")],
)
def test_a_writer_without_log_probabilities(logps, says, tmp_path):
    columns = {} if logps is None else {"logps": [[logps] * G] * 8}
    with pytest.raises(ValueError, match=says):
        run(tmp_path, listed(**columns), "offline", **TOPR)


def test_vllm_needs_equally_long_lists(tmp_path):
    """It is asked once per prompt for a number of samples."""
    trainer = build(AGROTrainer, tmp_path, arguments={"train_dataset": listed()})
    trainer.args.data_source, trainer.use_vllm = "mixed", True
    rows = [{"prompt": "1=", "responses": ["a"] * n} for n in (1, 2) for _ in range(G)]
    ids = [TOKENIZER("1=").input_ids] * len(rows)
    given = trainer.given_completions(rows[:G], ids[:G])
    assert [row is None for row in given] == [False, True, True, True]
    with pytest.raises(ValueError, match=r"lists of different lengths.*use_vllm=False"):
        trainer.given_completions(rows, ids)
    trainer.use_vllm = False
    given = trainer.given_completions(rows, ids)
    assert [row is None for row in given] == [False, True, True, True, False, False, True, True]


def test_samples_of_another_temperature_are_welcome(tmp_path):
    trainer = build(AGROTrainer, tmp_path, temperature=0.7, top_p=0.9)
    trainer.train()
    assert relative(parameters(trainer), parameters(build(AGROTrainer, tmp_path))) > 0
