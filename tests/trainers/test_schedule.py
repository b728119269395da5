"""One step ahead: how old samples are, that staleness 0 is the synchronous run, and how it ends.

Most runs use `Inline`, which does the background process's work on its snapshot in this process;
`test_the_process_does_what_the_inline_sampler_does` says that this stands for the real one.
"""

import copy
import signal
import time
from types import SimpleNamespace

import psutil
import pytest
import torch
from transformers import TrainerCallback

import trl_ext.trainers.background as background
from tests.runs import (
    METHODS,
    OF_GROUPS,
    OURS,
    TOKENIZER,
    Inline,
    build,
    by_letters,
    case,
    logged,
    parameters,
    settings,
    speak,
)
from tests.tiny import tiny_llama, tiny_prompts
from trl_ext import (
    AGROTrainer,
    GRPOConfig,
    GRPOTrainer,
    JEPOTrainer,
    NashTrainer,
    OnlineDPOTrainer,
    PassAtKTrainer,
)
from trl_ext.rollouts import ProcessSampler, SamplerError, sampled_logps
from trl_ext.rollouts._worker import Worker

each_trainer = pytest.mark.parametrize("trainer", OURS, ids=lambda t: t.__name__)
STALENESS_0 = {
    "grpo": (GRPOTrainer, {}),
    "pass_at_k": (PassAtKTrainer, {"num_iterations": 2}),
    "online_dpo": (OnlineDPOTrainer, {"steps_per_generation": 2}),
    "nash_md": (NashTrainer, {}),
    "nash_mp": (NashTrainer, {"algorithm": "nash_mp", "proximal_steps": 1}),
    "xpo": (OnlineDPOTrainer, {"loss_type": "xpo", "num_generations": 2}),
}


@pytest.fixture
def inline(monkeypatch):
    monkeypatch.setattr(background, "ProcessSampler", Inline)


def ahead(trainer, folder, **options):
    return build(trainer, folder, **{"schedule": "one_step", **options})


def run_of(run):
    run.train()
    return parameters(run), logged(run)[:-1]


def children():
    return psutil.Process().children(recursive=True)


# How old samples are


def window(N, T):
    return {"steps_per_generation": N, "num_iterations": T, "max_steps": 4 * N * T}


def ages(run):
    run.train()
    rows = run.state.log_history[:-1]
    mean, oldest = ([row[f"sampling/staleness_{x}"] for row in rows] for x in ("mean", "max"))
    assert mean == oldest, "one version per round"
    return mean


def expected_ages(N, T, schedule):
    steps = range(4 * N * T)
    if schedule == "sync":
        return [step % (N * T) for step in steps]
    return [step % (N * T) + (0 if step < N * T else N * T) for step in steps]


def test_the_papers_table_of_four_rounds():
    table = {
        (1, "sync"): [0, 0, 0, 0],
        (1, "one_step"): [0, 1, 1, 1],
        (2, "sync"): [0, 1, 0, 1, 0, 1, 0, 1],
        (2, "one_step"): [0, 1, 2, 3, 2, 3, 2, 3],
        (3, "one_step"): [0, 1, 2, 3, 4, 5, 3, 4, 5, 3, 4, 5],
    }
    for (N, schedule), row in table.items():
        assert expected_ages(N, 1, schedule) == row


@pytest.mark.parametrize("schedule", ["sync", "one_step"])
@pytest.mark.parametrize(("N", "T"), [(1, 1), (2, 1), (3, 1), (1, 2), (2, 2)])
def test_staleness_is_that_of_the_paper(N, T, schedule, inline, tmp_path):
    trainer = OnlineDPOTrainer if (N, T) != (2, 2) else GRPOTrainer
    found = ages(build(trainer, tmp_path, schedule=schedule, **window(N, T)))
    assert found == expected_ages(N, T, schedule)


def test_staleness_counts_optimizer_steps_not_micro_batches(inline, tmp_path):
    options = dict(gradient_accumulation_steps=2, steps_per_generation=4, max_steps=8)
    run = ahead(OnlineDPOTrainer, tmp_path, per_device_train_batch_size=4, **options)
    assert ages(run) == expected_ages(2, 1, "one_step")


def test_staleness_0_has_the_ages_of_sync(inline, tmp_path):
    run = ahead(OnlineDPOTrainer, tmp_path, max_staleness=0, **window(2, 1))
    assert ages(run) == expected_ages(2, 1, "sync")


# Staleness 0 is the synchronous run


def unlike_sync(case, folder):
    trainer, options = STALENESS_0[case]
    start, rows = run_of(build(trainer, folder, max_steps=4, **options))
    again, rows_again = run_of(ahead(trainer, folder, max_steps=4, max_staleness=0, **options))
    drift = ("sampling/behaviour_drift", "sampling/effective_sample_size")
    kept = [{k: v for k, v in row.items() if k not in drift} for row in rows_again]
    return (start - again).abs().max().item() + float(rows != kept)


@pytest.mark.parametrize("case", STALENESS_0)
def test_staleness_0_equals_sync_bit_for_bit(case, inline, tmp_path):
    assert unlike_sync(case, tmp_path) == 0.0


@pytest.mark.parametrize("case", ["grpo", "nash_md"])
def test_staleness_0_equals_sync_bit_for_bit_in_a_real_process(case, tmp_path):
    assert unlike_sync(case, tmp_path) == 0.0
    assert children() == []


@pytest.mark.parametrize("case", ["grpo", "online_dpo", "nash_md"])
def test_mutation_sampler_one_version_behind(case, inline, monkeypatch, tmp_path):
    honest, taken = Inline.submit, []

    def late(self, request):
        if self._snapshot is not None:
            taken.append(request.version)
            model = self.models[0]
            now = copy.deepcopy(model.state_dict())
            model.load_state_dict(self.before)
            honest(self, request)
            model.load_state_dict(now)
        else:
            honest(self, request)
        self.before = copy.deepcopy(self.models[0].state_dict())

    monkeypatch.setattr(Inline, "submit", late)
    assert unlike_sync(case, tmp_path) > 1e-4 and taken


def test_one_step_ahead_is_another_run(inline, tmp_path):
    sync, _ = run_of(build(OnlineDPOTrainer, tmp_path, max_steps=3))
    stale, _ = run_of(ahead(OnlineDPOTrainer, tmp_path, max_steps=3))
    assert not torch.equal(sync, stale)


@each_trainer
def test_two_runs_one_step_ahead_are_equal(trainer, inline, tmp_path):
    first, second = (run_of(ahead(trainer, tmp_path, max_steps=3)) for _ in range(2))
    assert torch.equal(first[0], second[0]) and first[1] == second[1]


def test_the_process_does_what_the_inline_sampler_does(monkeypatch, tmp_path):
    options = dict(max_steps=3, judge=by_letters)
    real = run_of(ahead(NashTrainer, tmp_path, **options))
    monkeypatch.setattr(background, "ProcessSampler", Inline)
    inline = run_of(ahead(NashTrainer, tmp_path, **options))
    assert torch.equal(real[0], inline[0]) and real[1] == inline[1]


# Off-policy corrections


class Weights(TrainerCallback):
    """The policy at the beginning of each optimizer step."""

    def __init__(self):
        self.before = []

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        bare = tiny_llama(len(TOKENIZER)).eval()
        bare.load_state_dict(model.state_dict())
        self.before.append(bare)


@pytest.mark.parametrize(
    ("trainer", "temperature"),
    # AGRO has no use for who sampled; JEPO's thoughts must be the policy's own.
    [
        (trainer, temperature)
        for trainer in OURS
        for temperature in (1.0, 0.7)
        if trainer is not AGROTrainer and not (trainer is JEPOTrainer and temperature < 1)
    ],
    ids=case,
)
def test_old_log_probabilities_are_those_of_the_snapshot(trainer, temperature, inline, tmp_path):
    tempered: dict = {"temperature": temperature}
    if trainer in OF_GROUPS:
        tempered["scale_logps_by_temperature"] = True
    if trainer is OnlineDPOTrainer:
        tempered["loss_type"] = "proximal_rloo"  # the one that asks who sampled
    weights, seen = Weights(), []
    arguments = {"callbacks": [weights]}
    run = ahead(trainer, tmp_path, max_steps=3, arguments=arguments, **tempered)
    scored = run._compute_loss

    def watched(model, inputs):
        seen.append(inputs)
        return scored(model, inputs)

    run._compute_loss = watched
    run.train()
    key = "old_logp" if "old_logp" in seen[0] else "old_per_token_logps"
    for step, batch in enumerate(seen):
        version = {int(v) for v in batch["version"].flatten()}
        assert version == {max(step - 1, 0)}
        prompts, completions, old = by_row(batch, key)
        expected = sampled_logps(
            weights.before[max(step - 1, 0)], prompts, completions, temperature, 8
        )
        wrong = sampled_logps(weights.before[step], prompts, completions, temperature, 8)
        assert largest_difference(old, expected) <= 1e-5
        assert step == 0 or largest_difference(old, wrong) > 1e-3


def by_row(batch, key):
    """Prompts, completions and their log-probabilities, one list per row, without pads."""
    T = batch["completion_ids"].size(-1)
    mask = batch["completion_mask"].reshape(-1, T).bool()
    prompt_mask = batch["prompt_mask"].flatten(0, -2).bool()
    prompt_ids = zip(batch["prompt_ids"].flatten(0, -2), prompt_mask, strict=True)
    prompts = [r[m].tolist() for r, m in prompt_ids]
    completion_ids = zip(batch["completion_ids"].reshape(-1, T), mask, strict=True)
    ids = [r[m].tolist() for r, m in completion_ids]
    logps = zip(batch[key].reshape(-1, T), mask, strict=True)
    return prompts, ids, [r[m].tolist() for r, m in logps]


def largest_difference(left, right):
    pairs = zip(left, right, strict=True)
    return max(abs(a - b) for rows in pairs for a, b in zip(*rows, strict=True))


def test_drift_is_logged_where_the_sampler_is_stale(inline, tmp_path):
    run = ahead(GRPOTrainer, tmp_path, max_steps=3)
    run.train()
    first, second, _ = run.state.log_history[:-1]
    assert abs(first["sampling/behaviour_drift"]) < 1e-5
    assert first["sampling/effective_sample_size"] == pytest.approx(1.0, abs=1e-5)
    assert abs(second["sampling/behaviour_drift"]) > 1e-3
    assert 0.0 < second["sampling/effective_sample_size"] < 1 - 1e-4
    for row in run.state.log_history[:-1]:
        assert row["perf/generation_wait_s"] >= 0 and row["perf/training_wait_s"] >= 0


# How it ends


class At(TrainerCallback):
    """Does something at the end of an optimizer step."""

    def __init__(self, step, what):
        self.step, self.what = step, what

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            self.what()


def kill_the_child():
    (child,) = children()
    child.send_signal(signal.SIGKILL)  # its parent is the one to ask how it ended


def test_a_killed_sampler_ends_the_run_at_once_and_the_checkpoint_resumes(tmp_path, inline):
    saving = dict(save_strategy="steps", save_steps=2, max_steps=5)
    expected, rows = run_of(ahead(OnlineDPOTrainer, tmp_path / "whole", **saving))
    with pytest.MonkeyPatch.context() as real:
        real.setattr(background, "ProcessSampler", ProcessSampler)
        arguments = {"callbacks": [At(3, kill_the_child)]}
        run = ahead(OnlineDPOTrainer, tmp_path / "cut", arguments=arguments, **saving)
        killed = time.monotonic()
        with pytest.raises(SamplerError, match=r"killed by SIGKILL.*resume from it"):
            run.train()
    assert time.monotonic() - killed < 60 and run.state.global_step in (3, 4)
    assert children() == []
    again = ahead(OnlineDPOTrainer, tmp_path / "cut", **saving)
    again.train(resume_from_checkpoint=True)
    assert torch.equal(parameters(again), expected) and logged(again)[:-1] == rows


@pytest.mark.parametrize("end", ["normal", "exception", "interrupt"])
def test_no_child_outlives_its_training(end, tmp_path, monkeypatch):
    errors = {"exception": RuntimeError("said no"), "interrupt": KeyboardInterrupt()}
    present = []

    def stop():
        present.extend(children())
        if end in errors:
            raise errors[end]

    run = ahead(GRPOTrainer, tmp_path, max_steps=2, arguments={"callbacks": [At(1, stop)]})
    if end in errors:
        with pytest.raises(type(errors[end])):
            run.train()
    else:
        run.train()
    assert len(present) == 1 and not psutil.pid_exists(present[0].pid)
    assert children() == []


def test_a_trainer_trains_twice(inline, tmp_path):
    run = ahead(GRPOTrainer, tmp_path, max_steps=2)
    run.train()
    run.args.max_steps = 3
    before = parameters(run)
    run.train()
    assert not torch.equal(before, parameters(run))


def test_a_failure_in_the_sampler_is_shown(tmp_path, inline, monkeypatch):
    def broken(self, job):
        raise SamplerError("The sampling process failed:\nout of memory")

    monkeypatch.setattr(Worker, "answer", broken)
    with pytest.raises(SamplerError, match="out of memory"):
        ahead(GRPOTrainer, tmp_path).train()


def test_evaluation_between_rounds_samples_in_place(inline, tmp_path):
    """With the weights of now, and without a round of the sampler's being lost."""
    options = dict(max_steps=4, eval_strategy="steps", eval_steps=1, per_device_eval_batch_size=4)
    arguments = {"eval_dataset": tiny_prompts(2)}
    run = ahead(OnlineDPOTrainer, tmp_path, arguments=arguments, **options)
    run.train()
    assert sum("eval_loss" in row for row in run.state.log_history) == 4
    assert [row["sampling/staleness_mean"] for row in run.state.log_history if "loss" in row] == [
        *(0, 1, 1, 1)
    ]


# TRL's vLLM server


class FakeServer:
    """What of TRL's `VLLMGeneration` a trainer uses in server mode; it samples one letter."""

    repetition_penalty, temperature, top_p, top_k, min_p = 1.0, 1.0, 1.0, 0, None
    max_completion_length, structured_outputs_regex, generation_kwargs = 6, None, None

    def __init__(self, logprob):
        self.published, self.asked, self.logprob = 0, [], logprob
        self.vllm_client = SimpleNamespace(generate=self._generate)

    def sync_weights(self):
        self.published += 1

    def _generate(self, prompts, n, **options):
        self.asked.append((len(prompts), n, options))
        letters = [4 + 7 * i for _ in prompts for i in range(n)]
        ids = [[letter, letter + 1, TOKENIZER.eos_token_id] for letter in letters]
        return {"completion_ids": ids, "logprobs": [[[self.logprob]] * 3 for _ in ids]}


@pytest.mark.parametrize("logprob", [-2.0, None])
@pytest.mark.parametrize("trainer", [GRPOTrainer, OnlineDPOTrainer], ids=lambda t: t.__name__)
def test_a_vllm_server_is_asked_ahead(trainer, logprob, tmp_path):
    run = ahead(trainer, tmp_path, max_steps=4, steps_per_generation=2)
    server = run.vllm_generation = FakeServer(logprob)
    run.use_vllm = True
    before = parameters(run)
    run.train()
    rows = run.state.log_history[:-1]
    assert [row["sampling/staleness_mean"] for row in rows] == [0, 1, 2, 3]
    assert server.published == len(server.asked) == 3  # the first round, and one ahead of each
    assert all((n, g) == (4, 4) and o["max_tokens"] == 6 for n, g, o in server.asked)
    assert not torch.equal(before, parameters(run)) and torch.isfinite(parameters(run)).all()
    drift = rows[0].get("sampling/behaviour_drift", 0.0)
    assert drift == drift and (logprob is not None or abs(drift) < 1e-5)


# Refusals


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"schedule": "async"}, "schedule='async' is none of sync, one_step"),
        ({"max_staleness": 2}, "max_staleness=2 is not applied: schedule='sync'.*Leave it at None"),
        ({"sampler_device": "cpu"}, "sampler_device='cpu' is not applied"),
        ({"sampler_timeout": 3.0}, "sampler_timeout=3.0 is not applied"),
        (
            {"schedule": "one_step", "max_staleness": 3, "steps_per_generation": 4},
            "max_staleness=3 would discard every round.*4 optimizer steps.*max_staleness ≥ 4",
        ),
        (
            {"schedule": "one_step", "max_staleness": 1, "num_iterations": 2},
            "max_staleness=1 would discard.*2 optimizer steps",
        ),
        (
            {"schedule": "one_step", "use_vllm": True, "vllm_mode": "colocate"},
            "vllm_mode='colocate'.*vllm_mode='server' or schedule='sync'",
        ),
        (
            {"schedule": "one_step", "use_transformers_continuous_batching": True},
            "use_transformers_continuous_batching=True.*Set it to False",
        ),
        ({"schedule": "one_step", "sampler_timeout": 0.0}, "sampler_timeout=0.0.*positive"),
        (
            {"schedule": "one_step", "max_staleness": -1},
            "max_staleness=-1.*0 to wait for the current",
        ),
    ],
    ids=str,
)
def test_refused(options, message):
    with pytest.raises(ValueError, match=message):
        GRPOConfig("out", **settings(**options))


def test_max_staleness_of_a_whole_round_is_accepted():
    GRPOConfig("out", **settings(schedule="one_step", max_staleness=4, steps_per_generation=4))
    GRPOConfig("out", **settings(schedule="one_step", max_staleness=0, steps_per_generation=4))


@each_trainer
def test_every_config_has_the_schedule(trainer):
    config, own = METHODS[trainer]
    assert config("out", **settings(**own, schedule="one_step")).steps_per_round == 1


def add(a: int, b: int) -> int:
    """Adds.

    Args:
        a: first.
        b: second.

    Returns:
        The sum.
    """
    return a + b


@pytest.mark.parametrize("what", ["rollout_func", "sees images"])
def test_what_needs_the_trainers_own_objects_is_refused(what, tmp_path):
    arguments = {"rollout_func": speak(lambda p, i: "ab")} if what == "rollout_func" else {}
    message = f"{what if arguments else 'a vision-language model'} is not supported with schedule="
    with pytest.raises(ValueError, match=f"{message}'one_step'.*Use schedule='sync'"):
        run = ahead(GRPOTrainer, tmp_path, arguments=arguments)
        run._is_vlm = True
        run._refuse_unsupported()


@pytest.mark.parametrize("what", ["tools", "environment_factories"])
def test_tools_and_environments_are_refused(what, tmp_path):
    run = ahead(GRPOTrainer, tmp_path)
    setattr(run, what, [add])
    with pytest.raises(ValueError, match=f"{what[:5]}.*schedule='one_step'.*schedule='sync'"):
        run._refuse_unsupported()


def test_a_column_that_a_checkpoint_cannot_keep_is_named(inline, tmp_path):
    import datetime

    data = tiny_prompts(8).add_column("day", [datetime.date(2026, 1, 1)] * 8)
    options = dict(save_strategy="steps", save_steps=1, max_steps=2)
    run = ahead(GRPOTrainer, tmp_path, arguments={"train_dataset": data}, **options)
    with pytest.raises(ValueError, match=r"column 'day' holds a date.*schedule='sync'"):
        run.train()


def test_the_child_is_told_the_trainers_options(tmp_path):
    run = ahead(
        OnlineDPOTrainer,
        tmp_path,
        model=tiny_llama(len(TOKENIZER)),
        temperature=0.7,
        sampler_timeout=7.0,
        sampler_device="cpu",
    )
    sampler = background.background_sampler(run)
    assert sampler.timeout_s == 7.0
    assert sampler._options["device"] == torch.device("cpu")
    assert sampler._options["temperature"] == 1.0, "as policy and reference are scored"
    assert sampler._options["generation_config"].temperature == 0.7
