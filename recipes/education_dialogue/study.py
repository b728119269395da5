"""Trains a teacher by each method, from one SFT teacher, and lets all of them play each other.

| method         | unit       | what it learns from                                               |
|----------------|------------|-------------------------------------------------------------------|
| `single_turn`  | one turn   | learned reward of the conversation up to the student's answer     |
| `rlhf`         | all turns  | learned reward of the whole conversation                          |
| `mtpo_learned` | all turns  | preferences that the learned reward gives: σ(r − r′)              |
| `mtpo`         | all turns  | the judge, between two conversations of the policy                |
| `mtpo_tau`     | all turns  | the judge, between two conversations of its mixture with SFT      |

All see 32 conversations (or turns) per step and take the same number of steps; each has its own
learning rate, the better of the same two.

Source: Shani et al., arXiv:2405.14655, section 6.
"""

import dataclasses
import json
import multiprocessing
import os
import random
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from datasets import Dataset
from rich.progress import track
from transformers import AutoModelForCausalLM, TrainerCallback, set_seed
from world import (
    MOST_TOKENS,
    SMALL,
    Conversation,
    Size,
    World,
    conversation_reward,
    load_policy,
    make_world,
    message_of,
    play,
)

from trl_ext import MTPOConfig, MTPOTrainer
from trl_ext.data.education_dialogue import (
    Classroom,
    education_demonstrations,
    education_judge,
)
from trl_ext.data.education_dialogue.classroom import MOST_TURNS
from trl_ext.data.education_dialogue.judge import LEARNED
from trl_ext.studies import cpu_arguments, fit, mean_and_error, quiet_process

# Options of each method: the paper's α and τ.
METHODS: dict[str, dict[str, Any]] = {
    "single_turn": {},
    "rlhf": {},
    "mtpo_learned": {"judge": "bradley_terry"},
    "mtpo": {"judge": education_judge},
    "mtpo_tau": {"judge": education_judge, "tau": 0.0375},
}
RATES = (1e-4, 3e-4)
SWEEP_SEED = 100
GENERATIONS, ROWS = 4, 32  # conversations of a context, and of a step
Row = dict[str, Any]


@dataclass(frozen=True)
class Plan:
    """How much is run.

    Attributes:
        steps: optimizer steps of each method.
        rates: learning rate of each method: the better one of RATES on SWEEP_SEED, by the win rate
            against SFT at the end.
        points: how often a teacher is compared with SFT, at equal distances up to the last step.
        samples: conversations per held-out lesson in the comparison of all with all.
        world: how much of a world is made.
    """

    steps: int = 100
    rates: dict[str, float] = field(default_factory=lambda: dict.fromkeys(METHODS, 3e-4))
    points: int = 4
    samples: int = 4
    world: Size = field(default_factory=Size)

    @property
    def measured(self) -> set[int]:
        """Steps after which a teacher is compared with SFT."""
        return {round(self.steps * i / self.points) for i in range(1, self.points + 1)}


QUICK = Plan(steps=2, points=2, samples=2, world=SMALL)
LONG = Plan(steps=400, points=8, rates=Plan().rates | {"single_turn": 1e-4, "rlhf": 1e-4})


class Curve(TrainerCallback):
    """Win rate against SFT on the way, on held-out lessons."""

    def __init__(self, world: World, plan: Plan) -> None:
        self.world, self.plan = world, plan
        self.lessons = world.lessons["held_out"]
        self.opponents = play(load_policy(world), world, self.lessons, seed=1)
        self.points: list[Row] = []

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step in self.plan.measured:
            talks = play(model.eval(), self.world, self.lessons, seed=2)
            model.train()
            wins = education_judge(self.lessons["prompt"], talks, self.opponents)
            rate, error = mean_and_error(wins)
            point = {"step": state.global_step, "win_rate": rate, "win_rate_se": error}
            self.points.append(point)


def study(folder: Path, seeds: Sequence[int], plan: Plan, processes: int) -> Row:
    """Runs the study and keeps its figures in `folder/study.json`.

    Args:
        folder: holds the worlds, which are made where missing, and each trained teacher.
        seeds: of worlds, training and sampling.
        plan: how much is run.
        processes: training runs at a time, one core each.

    Returns:
        `curves`: seed, method, step and win rate against SFT. `matches`: seed, row, column, the
        rate at which the row's conversations beat the column's, and its standard error over
        lessons. `teaching`: seed, policy, things learned and messages of a conversation.
    """
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, context, quiet_process) as pool:
        runs = [(folder, s, m, plan.rates[m], plan) for s in seeds for m in METHODS]
        # Each world once, before several runs ask for it.
        worlds = pool.map(make_world, *zip(*[(folder, s, plan.world) for s in seeds], strict=True))
        for _ in track(worlds, "worlds", len(seeds), transient=True):
            pass
        curves = pool.map(curve_of, *zip(*runs, strict=True))
        found = [*track(curves, ", ".join(METHODS), len(runs), transient=True)]
        played = pool.map(tournament, *zip(*[(folder, s, plan) for s in seeds], strict=True))
        tables = [*track(played, "all against all", len(seeds), transient=True)]
    figures = {
        "curves": [point for curve in found for point in curve],
        "matches": [match for matches, _ in tables for match in matches],
        "teaching": [row for _, teaching in tables for row in teaching],
    }
    (folder / "study.json").write_text(json.dumps(figures, indent=1))
    return figures


def sweep(folder: Path, plan: Plan, processes: int) -> list[Row]:
    """Each method at each rate, measured at the end; rows are kept in `folder/sweep.json`."""
    plan = dataclasses.replace(plan, points=1)
    runs = [(folder, SWEEP_SEED, method, rate, plan) for method in METHODS for rate in RATES]
    make_world(folder, SWEEP_SEED, plan.world)
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, context, quiet_process) as pool:
        curves = pool.map(curve_of, *zip(*runs, strict=True))
        found = [*track(curves, "rates", len(runs), transient=True)]
    rows = [point for curve in found for point in curve]
    (folder / "sweep.json").write_text(json.dumps(rows, indent=1))
    return rows


def curve_of(folder: Path, seed: int, method: str, rate: float, plan: Plan) -> list[Row]:
    """Trains by one method, measures on the way and saves the teacher with its card."""
    world = make_world(folder, seed, plan.world)
    set_seed(seed)
    curve = Curve(world, plan)
    trainer = make_trainer(world, folder, seed, method, plan.steps, learning_rate=rate)
    trainer.add_callback(curve)
    fit(trainer).save_model()
    last = curve.points[-1]  # the card shows what was logged with its standard error
    trainer.log({f"win_rate_against_sft{s}": last[f"win_rate{s}"] for s in ("", "_se")})
    trainer.create_model_card(model_name=f"education-dialogue-{method}")
    named = {"seed": seed, "method": method, "rate": rate}
    return [{**named, **point} for point in curve.points]


def make_trainer(
    world: World, folder: Path, seed: int, method: str, steps: int, *, learning_rate: float
) -> MTPOTrainer:
    """One trainer for all methods: what differs is who scores, and who else speaks."""
    # The environments of TRL are marked as an experiment.
    os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
    reward = conversation_reward(world)
    by_turn = method == "single_turn"
    arguments = MTPOConfig(
        **cpu_arguments(policy_folder(folder, seed, method), seed),
        **METHODS[method],
        learning_rate=learning_rate,
        lr_scheduler_type="constant_with_warmup",
        warmup_steps=3,
        max_steps=steps,
        per_device_train_batch_size=ROWS,
        num_generations=GENERATIONS,
        max_completion_length=MOST_TOKENS,
        max_tool_calling_iterations=MOST_TURNS + 1,
    )
    return MTPOTrainer(
        model=load_policy(world),
        reward_funcs=None if arguments.asks_judge else (turn if by_turn else whole)(reward),
        args=arguments,
        train_dataset=beginnings(world, seed) if by_turn else world.lessons["train"],
        processing_class=world.tokenizer,
        environment_factory=None if by_turn else Classroom,
    )


def whole(reward: Callable[[Sequence[Conversation]], list[float]]) -> Callable[..., list[float]]:
    """Reward function of whole conversations, student's answers included."""

    def learned_reward(prompts: list, completions: list, **_: Any) -> list[float]:
        return reward([p + c for p, c in zip(prompts, completions, strict=True)])

    return learned_reward


def turn(reward: Callable[[Sequence[Conversation]], list[float]]) -> Callable[..., list[float]]:
    """Reward function of one turn: that of the conversation up to the student's answer to it."""

    def learned_reward_of_turn(prompts: list, completions: list, **facts: Any) -> list[float]:
        lessons = zip(facts["things"], facts["preference"], facts["reaction"], strict=True)
        talks = zip(prompts, completions, lessons, strict=True)
        return reward([answered(p + c, *lesson) for p, c, lesson in talks])

    return learned_reward_of_turn


def answered(talk: Conversation, things: list[str], preference: str, reaction: str) -> Conversation:
    """The conversation with the student's answer to the teacher's last turn."""
    room, answer = Classroom(), None
    room.reset(things=things, preference=preference, reaction=reaction)
    for message in (message_of(said) for said in talk if said["role"] == "assistant"):
        answer = None if message is None else room.say(message)
    if answer is None:
        return talk
    return [*talk, {"role": "tool", "name": "say", "content": answer}]


def beginnings(world: World, seed: int) -> Dataset:
    """Conversations of the clumsy teacher up to a turn of theirs, drawn at random."""
    rng, rows = random.Random(seed), []
    lessons = world.lessons["train"]
    shown = education_demonstrations(lessons, seed=seed)
    for lesson, row in zip(lessons, shown, strict=True):
        turns = [i for i, m in enumerate(row["completion"]) if m["role"] == "assistant"]
        prompt = row["prompt"] + row["completion"][: rng.choice(turns)]
        rows.append({**lesson, "prompt": prompt})
    return Dataset.from_list(rows)


def tournament(folder: Path, seed: int, plan: Plan) -> tuple[list[Row], list[Row]]:
    """All teachers against all on the held-out lessons, and how each of them teaches."""
    world = make_world(folder, seed, plan.world)
    lessons, talks = world.lessons["held_out"], {}
    for i, policy in enumerate(("sft", *METHODS)):
        home = world.policy if policy == "sft" else policy_folder(folder, seed, policy)
        model = AutoModelForCausalLM.from_pretrained(home)
        seeds = [1000 * (i + 1) + sample for sample in range(plan.samples)]
        talks[policy] = [play(model, world, lessons, s) for s in seeds]
    matches = [
        {"seed": seed, "row": row, "column": column, **match(talks[row], talks[column])}
        for row in talks
        for column in talks
        if row != column
    ]
    return matches, [{"seed": seed, "policy": p, **teaching(played)} for p, played in talks.items()]


def match(rows: list[list[Conversation]], columns: list[list[Conversation]]) -> dict[str, float]:
    """How often the row wins, over all pairs of samples, and the standard error over lessons."""
    pairs = [education_judge([None] * len(one), one, other) for one in rows for other in columns]
    by_lesson = [sum(wins) / len(wins) for wins in zip(*pairs, strict=True)]
    mean, n = sum(by_lesson) / len(by_lesson), len(by_lesson)
    variance = sum((win - mean) ** 2 for win in by_lesson) / (n - 1)
    return {"win_rate": mean, "standard_error": (variance / n) ** 0.5}


def teaching(played: list[list[Conversation]]) -> dict[str, float]:
    """Means over conversations: things learned, with delight, and messages to the student."""
    talks = [talk for sample in played for talk in sample]
    answers = [[str(m["content"]) for m in talk if m["role"] == "tool"] for talk in talks]
    n = len(answers)
    return {
        "learned": sum(text.startswith(LEARNED) for talk in answers for text in talk) / n,
        "delighted": sum(text.startswith("great !") for talk in answers for text in talk) / n,
        "messages": sum(map(len, answers)) / n,
    }


def policy_folder(folder: Path, seed: int, method: str) -> Path:
    return folder / f"policies-{seed}" / method
