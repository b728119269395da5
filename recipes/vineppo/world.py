"""The world of the study: calculator runs of many keys, and a policy taught by a pupil in doubt.

    +7 *3 rev -1 +7 *3 from 10               # the prompt
    17 51 15 14 21 63 is 63                  # each step, then the answer

A step looks up a row of a table: what a key makes of a display. Of some rows the pupil remembers
two versions and writes either, one as often as the other, and so does the policy that learned from
him. No key takes two displays to the same one: after a wrong display all is lost, unless another
mistake happens to lead back. The verifier reads the answer, and says nothing of the step.

To be surer of oneself does not help here: of each row in doubt it must be found out which version
is right. The pupil of `calculator_runs` slips anywhere, now and then; what he taught is mended by
being surer of everything, and then it hardly matters which step gets the credit.
"""

import itertools
import json
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import trl
from transformers import (
    AutoModelForCausalLM,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    set_seed,
)

from trl_ext import evaluate_generations
from trl_ext.data import calculator_runs
from trl_ext.data.calculator import KEYS
from trl_ext.studies import cpu_arguments, fit, word_llama, word_tokenizer, words_of

MARKER = " is "
Versions = dict[tuple[str, int], list[int]]  # a key, and the display that it is pressed at


@dataclass(frozen=True)
class Size:
    """How much of a world is made; the smoke test makes little.

    Attributes:
        keys: steps of a run.
        doubts: share of the table's rows of which the pupil remembers two versions.
    """

    keys: int = 8
    doubts: float = 0.4
    train: int = 8000
    held_out: int = 256
    start_steps: int = 300

    @property
    def most_tokens(self) -> int:
        """All displays, the marker, the answer and the end."""
        return self.keys + 3


@dataclass(frozen=True)
class World:
    """What the runs of one seed share.

    Attributes:
        size: how much was made.
        data: splits `train` and `held_out` with `prompt`, `completion` (the pupil's), `answer`.
        tokenizer: one token per word.
        start: folder of the policy that every run starts from.
    """

    size: Size
    data: datasets.DatasetDict
    tokenizer: PreTrainedTokenizerFast
    start: str


def each_word(text: str) -> list[int]:
    """A step per word, as lines are in longer texts; the tokens of this world are whole words."""
    return [match.end() for match in re.finditer(r"\S+", text)]


def make_world(folder: Path, seed: int, size: Size) -> World:
    """Makes the world of a seed, or loads it where `folder` holds it already."""
    home, made = folder / f"seed-{seed}" / "start", {**vars(size), "seed": seed}
    data = make_data(size, seed)
    world = World(size, data, word_tokenizer(words_of(data)), str(home))
    record = home / "world.json"
    if not record.exists() or json.loads(record.read_text()) != made:
        record.unlink(missing_ok=True)
        train_start(world, seed)
        record.write_text(json.dumps(made))  # last: a world without it is made again
    return world


def make_data(size: Size, seed: int) -> datasets.DatasetDict:
    """Runs, with what a pupil in doubt writes down as their completions."""
    data = calculator_runs(size.train, size.held_out, keys=size.keys, slips=0.0, seed=seed)
    rng = random.Random(seed)
    versions = draw_versions(size.doubts, rng)
    return data.map(lambda row: {"completion": written(row["prompt"], versions, rng)})


def draw_versions(doubts: float, rng: random.Random) -> Versions:
    """What the pupil remembers of each row of the table, first what is right."""
    versions = {}
    for key, shown in itertools.product(KEYS, range(100)):
        right = KEYS[key](shown)
        others = {press(shown) for press in KEYS.values()} - {right}
        versions[key, shown] = [right]
        if others and rng.random() < doubts:
            versions[key, shown].append(rng.choice(sorted(others)))
    return versions


def written(prompt: str, versions: Versions, rng: random.Random) -> str:
    """What the pupil writes under a prompt, `+7 *3 from 10`."""
    keys, _, start = prompt.partition(" from ")
    displays = itertools.accumulate(
        keys.split(), lambda shown, key: rng.choice(versions[key, shown]), initial=int(start)
    )
    thought = [f"{shown:02d}" for shown in displays][1:]
    return f"{' '.join(thought)}{MARKER}{thought[-1]}"


def train_start(world: World, seed: int) -> None:
    """SFT on the pupil's completions."""
    set_seed(seed)
    arguments = trl.SFTConfig(
        **cpu_arguments(world.start, seed, adam_beta2=0.98),
        max_steps=world.size.start_steps,
        per_device_train_batch_size=64,
        learning_rate=3e-3,
        lr_scheduler_type="cosine",
        warmup_steps=10,
    )
    model = LlamaForCausalLM(word_llama(world.tokenizer))
    rows = world.data["train"].select_columns(["prompt", "completion"])
    trainer = trl.SFTTrainer(model, arguments, train_dataset=rows, processing_class=world.tokenizer)
    fit(trainer).save_model()


def load_start(world: World) -> PreTrainedModel:
    """A fresh copy of the policy that every run starts from."""
    return AutoModelForCausalLM.from_pretrained(world.start)


def correct(completions: Sequence[str], answer: Sequence[str], **kwargs: Any) -> list[float]:
    """The verifier: 1 where what stands behind the marker is the answer, else 0."""
    told = [completion.partition(MARKER)[2] for completion in completions]
    return [float(text == right) for text, right in zip(told, answer, strict=True)]


def measure(world: World, model: PreTrainedModel, *, samples: int = 8) -> dict[str, float]:
    """Held-out `accuracy`, its standard error over prompts, and `mean_length` in tokens."""
    result = evaluate_generations(
        model,
        world.tokenizer,
        world.data["held_out"],
        correct,
        num_generations=samples,
        max_completion_length=world.size.most_tokens,
        batch_size=2048,
        disable_tqdm=True,
    )
    told = result.metrics("")
    names = {"accuracy": "pass@1", "accuracy_se": "pass@1_se", "mean_length": "mean_length"}
    return {name: told[key] for name, key in names.items()}
