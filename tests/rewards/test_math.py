"""`math_reward`: right on ordinary answers, bounded and calm on hostile ones."""

import logging
import random
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from recipes.hostile_answers import HOSTILE
from trl_ext.rewards import _pool, math_reward, with_options

LIMIT_S, SLACK_S = 1.0, 5.0
TOWER = r"\boxed{9^{9^{9^{9}}}}"
graded = with_options(math_reward, workers=2)
quick = with_options(math_reward, workers=2, limit_s=LIMIT_S)


def still_right(reward=quick) -> bool:
    completions = [r"\boxed{\frac{2}{6}}", r"\boxed{\frac{2}{5}}"]
    return reward(completions, [r"\frac{1}{3}"] * 2) == [1.0, 0.0]


def ordinary(n: int) -> list[tuple[str, str, float]]:
    """`n` rows of completion, reference and reward; every second one is wrong by one."""
    rng, rows = random.Random(0), []
    for row in range(n):
        a, b, c, wrong = rng.randint(2, 99), rng.randint(2, 99), rng.randint(2, 9), row % 2
        said, reference = [
            (f"{a + wrong}", f"{a}"),
            (rf"\frac{{{c * a}}}{{{c * (a + b + wrong)}}}", rf"\frac{{{a}}}{{{a + b}}}"),
            (rf"{c * a + wrong}\sqrt{{{b}}}", rf"{a}\sqrt{{{c * c * b}}}"),
            (f"x^2 + {b}x + {a + wrong}", f"{a} + x({b} + x)"),
            (rf"({b}, {a + wrong}\pi)", rf"({b}, {a}\pi)"),
        ][row // 2 % 5]
        rows.append((rf"\boxed{{0}}, no: $\boxed{{{said}}}$.", reference, float(not wrong)))
    return rows


def test_a_hundred_ordinary_answers():
    completions, answers, rewards = map(list, zip(*ordinary(100), strict=True))
    assert graded(completions, answer=answers) == rewards


@pytest.mark.parametrize(
    ("completion", "answer", "reward"),
    [
        (r"\boxed{5} \boxed{6}", "5", 0.0),  # the last box counts
        (r"\boxed{1} and \boxed{2}", r"\{1, 2\}", 0.0),
        (r"\boxed{6} \boxed{5", "6", 1.0),
        (r"the answer is 5: \boxed{}", "5", 0.0),
        ("", "5", 0.0),
        ("5", "5", 0.0),  # neither boxed nor announced
        (r"The final answer is $\frac{2}{6}$. I hope it is correct.", r"\frac{1}{3}", 1.0),
        ("x" * 50_000 + r" \boxed{5}" + "y" * 50_000, "5", 1.0),
        ("x" * 50_000 + r" The final answer is $5$. I hope it is correct.", "5", 1.0),
        (r"The final answer is $5$. I hope it is correct." + "y " * 5_000, "5", 0.0),  # too early
        (r"\boxed{2}", r"2\sqrt{3}", 0.0),  # TRL reads this reference as 2
        (r"\boxed{\text{even}}", r"\text{even}", 1.0),
        (r"\boxed{42}", "6 times 7 is <<6*7=42>>42\n#### 42", 1.0),  # GSM8K
        (r"\boxed{42}", r"because $6 \cdot 7$ is \boxed{42}", 1.0),
        (r"\boxed{42}", 42, 1.0),
        ("\\boxed{\ud800\x00}", "5", 0.0),
        (r"\boxed{5}", None, None),
        (r"\boxed{5}", " ", None),
        (r"\boxed{}", "####", None),
        (TOWER, "", None),
    ],
)
def test_one_answer(completion, answer, reward):
    assert graded([completion], answer=[answer]) == [reward]


def test_a_worked_solution_is_searched():
    solutions = [r"Thus $x = \boxed{\frac{1}{2}}$.", "The answer is 7.", "???"]
    completions = [r"\boxed{0.5}", r"\boxed{7}", r"\boxed{7}"]
    assert graded(completions, solution=solutions) == [1.0, 1.0, None]
    assert graded(completions, solution=solutions, answer=["1", "7", "8"]) == [0.0, 1.0, 0.0]


def test_a_reference_column_is_required():
    with pytest.raises(ValueError, match="answer=None is not a column"):
        math_reward([r"\boxed{5}"])


@pytest.mark.parametrize("row", HOSTILE, ids=lambda row: row.name)
def test_a_hostile_answer_is_bounded_and_the_pool_survives(row):
    assert still_right()
    start = time.perf_counter()
    assert quick([row.completion], answer=[row.reference]) == [row.reward]
    assert time.perf_counter() - start < LIMIT_S + SLACK_S
    assert still_right()


def test_failures_are_counted_and_said(caplog):
    metrics = {}
    completions = [TOWER, rf"\boxed{{{'7' * 5000}}}", r"\boxed{5}", r"\boxed{5}"]
    with caplog.at_level(logging.WARNING):
        rewards = quick(completions, answer=["5", "5", "5", None], log_metric=metrics.__setitem__)
    assert rewards == [0.0, 0.0, 1.0, None]
    assert metrics == {"math_reward/failed_fraction": 0.5}
    assert "2 of 4 answers" in caplog.text
    assert "time limit 1" in caplog.text and "length limit 1" in caplog.text


def test_no_failure_is_logged_as_zero(caplog):
    metrics = {}
    assert quick([r"\boxed{5}"], answer=["5"], log_metric=metrics.__setitem__) == [1.0]
    assert metrics == {"math_reward/failed_fraction": 0.0} and not caplog.text


def test_equal_answers_of_a_group_are_graded_once():
    assert still_right()
    start = time.perf_counter()
    assert quick([TOWER] * 16, answer=["5"] * 16) == [0.0] * 16
    assert time.perf_counter() - start < LIMIT_S + SLACK_S


def test_threads_take_turns():
    batches = {n: ordinary(40)[n::4] for n in range(4)}
    found = {}

    def score(n):
        completions, answers, _ = zip(*batches[n], strict=True)
        found[n] = quick([TOWER, *completions], answer=["5", *answers])

    threads = [threading.Thread(target=score, args=(n,)) for n in batches]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=30)
    assert found == {n: [0.0, *(row[2] for row in rows)] for n, rows in batches.items()}


def test_missing_math_verify_names_the_extra(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r'pip install "trl-ext\[math\]"'):
        math_reward([r"\boxed{5}"], answer=["5"])


@pytest.mark.parametrize("option", ["limit_s", "max_chars", "memory_mb", "workers"])
@pytest.mark.parametrize("value", [0, -1, "2", [2, 2], True, float("nan"), float("inf")])
def test_options_out_of_range_are_refused(option, value):
    with pytest.raises(ValueError, match=f"^{option}="):
        math_reward([r"\boxed{5}"], answer=["5"], **{option: value})


def test_ranks_share_the_cpus(monkeypatch):
    from trl_ext.rewards.math import _share_of_cpus

    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(64)), raising=False)
    assert _share_of_cpus() == 8
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "16")
    assert _share_of_cpus() == 4
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "128")
    assert _share_of_cpus() == 1


def test_grading_works_in_a_trainer(tmp_path):
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    from tests.tiny import tiny_llama, tiny_tokenizer

    tokenizer = tiny_tokenizer()
    texts = [r"\boxed{7}", r"\boxed{8}", TOWER, r"\boxed{\frac{14}{2}}"]

    def rollout(prompts, trainer):
        ids = [tokenizer(text, add_special_tokens=False).input_ids for text in texts]
        prompt_ids = [tokenizer(prompt).input_ids for prompt in prompts]
        return {"prompt_ids": prompt_ids, "completion_ids": ids, "logprobs": None}

    trainer = GRPOTrainer(
        model=tiny_llama(len(tokenizer)),
        reward_funcs=quick,
        args=GRPOConfig(
            output_dir=str(tmp_path),
            per_device_train_batch_size=4,
            num_generations=4,
            max_steps=1,
            logging_steps=1,
            max_completion_length=64,
            report_to="none",
            save_strategy="no",
            use_cpu=True,
            bf16=False,
        ),
        train_dataset=Dataset.from_dict({"prompt": ["3 + 4 ="] * 4, "answer": ["7"] * 4}),
        processing_class=tokenizer,
        rollout_func=rollout,
    )
    trainer.train()
    logs = trainer.state.log_history[0]
    assert logs["rewards/math_reward/mean"] == 0.5
    assert logs["math_reward/failed_fraction"] == 0.25


def test_a_worker_sees_no_token_and_hashes_as_every_other(monkeypatch):
    """sympy orders terms by Python's hashes: with seeds of their own, two workers may disagree."""
    monkeypatch.setenv("HF_TOKEN", "canary")
    monkeypatch.setenv("PYTHONHASHSEED", "7")
    worker = _pool.Worker(_pool.Limits(1.0, 512))
    try:
        worker.receive()  # that it is ready
        environment = Path(f"/proc/{worker.process.pid}/environ").read_text()
    finally:
        worker.kill()
    assert "canary" not in environment and "PYTHONHASHSEED=0" in environment


def test_the_worker_loads_neither_torch_nor_trl():
    code = (
        "import sys, trl_ext.rewards._worker as w; w.grade('1', '1');"
        "print({'torch', 'transformers', 'trl', 'numpy'} & sys.modules.keys())"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "set()"
