"""The toy world of the study: a teacher of 0.1 million parameters, and a reward learned from pairs.

The student and the judge are those of `trl_ext.data.education_dialogue`. A teacher learns from the
conversations of a clumsy one (SFT), and a reward model from pairs of that teacher's conversations,
of which the judge preferred one.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import trl
from datasets import Dataset, DatasetDict
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    GenerationConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    set_seed,
)

from trl_ext.data.education_dialogue import (
    Classroom,
    education_demonstrations,
    education_judge,
    education_lessons,
)
from trl_ext.data.education_dialogue.classroom import MOST_TURNS
from trl_ext.rollouts import sample
from trl_ext.studies import cpu_arguments, fit, word_llama, word_tokenizer

MOST_TOKENS = 256  # of a conversation: eleven turns and answers
TURN_TOKENS = 16  # a turn of the clumsy teacher has six
Conversation = list[dict[str, Any]]

# A turn is `<say> a story about lava <eos>`, or `goodbye <eos>`. The one argument of the one tool
# goes without its name.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message.role == 'assistant' %}<assistant> {% generation %}"
    "{% for call in message.tool_calls or [] %}<{{ call.function.name }}>"
    "{% for name, value in call.function.arguments.items() %}"
    "{% if name != 'message' %} {{ name }}{% endif %} {{ value }}{% endfor %} {% endfor %}"
    "{{ message.content }} {{ eos_token }}{% endgeneration %} "
    "{% else %}<{{ message.role }}> {{ message.content }} {{ eos_token }} {% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<assistant> {% endif %}"
)
CALL = {"name": "say", "arguments": {"message": "{content}"}}
RESPONSE_TEMPLATE = {
    "defaults": {"role": "assistant"},
    "start_anchor": "<assistant>",
    "fields": {
        "tool_calls": {
            "open": "<say>",
            "close_pattern": "<eos>",
            "content": "text",
            "repeats": True,
            "transform": {"type": "function", "function": CALL},
        },
        "content": {"close_pattern": "<eos>", "content": "text"},
    },
}


@dataclass(frozen=True)
class World:
    """What all methods share, for one seed.

    Attributes:
        lessons: splits `train` and `held_out` of `education_lessons`.
        tokenizer: one token per word.
        policy: folder of the SFT teacher, start and reference of every run.
        reward: folder of the reward model.
    """

    lessons: DatasetDict
    tokenizer: PreTrainedTokenizerFast
    policy: str
    reward: str


@dataclass(frozen=True)
class Size:
    """How much of a world is made; the smoke test makes little."""

    lessons: int = 2000
    held_out: int = 128
    sft_steps: int = 250
    judged: int = 800  # lessons of which the judge saw two conversations
    reward_epochs: int = 4


SMALL = Size(lessons=48, held_out=4, sft_steps=3, judged=24, reward_epochs=1)


def make_world(folder: Path, seed: int, size: Size) -> World:
    """Makes the world of a seed, or loads it where `folder` holds it already."""
    home, made = folder / f"world-{seed}", {**vars(size), "seed": seed}
    lessons = education_lessons(size.lessons, size.held_out, seed=seed)
    world = World(lessons, make_tokenizer(), str(home / "policy"), str(home / "reward"))
    record = home / "world.json"
    if not record.exists() or json.loads(record.read_text()) != made:
        record.unlink(missing_ok=True)
        train_policy(world, seed, size)
        train_reward(world, seed, size)
        record.write_text(json.dumps(made))  # last: a world without it is made again
    return world


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token per word of the world, and a template whose tool calls TRL can read."""
    special = ("<pad>", "<unk>", "<eos>", "<user>", "<assistant>", "<tool>", "<say>")
    shown = education_demonstrations(education_lessons(2000, 1)["train"])
    words = sorted({word for row in shown for word in _words(row["prompt"] + row["completion"])})
    tokenizer = word_tokenizer(words, special)
    tokenizer.chat_template, tokenizer.response_template = CHAT_TEMPLATE, RESPONSE_TEMPLATE
    return tokenizer


def _words(conversation: Conversation) -> list[str]:
    said = [message["content"] for message in conversation]
    said += [message_of(message) or "" for message in conversation]
    return " ".join(said).split()


def message_of(turn: dict[str, Any]) -> str | None:
    """What a turn of the teacher says to the student; None if it says nothing to them."""
    calls = turn.get("tool_calls") or []
    return calls[0]["function"]["arguments"]["message"] if calls else None


def train_policy(world: World, seed: int, size: Size) -> None:
    """SFT on the clumsy teacher's turns; the student's answers are read, not learned."""
    set_seed(seed)
    # Two layers, without which it cannot look things up.
    architecture = word_llama(world.tokenizer, width=64, layers=2, context=512)
    trainer = trl.SFTTrainer(
        model=LlamaForCausalLM(architecture),
        args=trl.SFTConfig(
            **cpu_arguments(world.policy, seed),
            max_steps=size.sft_steps,
            per_device_train_batch_size=32,
            learning_rate=3e-3,
            lr_scheduler_type="cosine",
            warmup_steps=10,
            assistant_only_loss=True,
            max_length=MOST_TOKENS,
        ),
        train_dataset=education_demonstrations(world.lessons["train"], seed=seed),
        processing_class=world.tokenizer,
    )
    fit(trainer).save_model()


def train_reward(world: World, seed: int, size: Size) -> None:
    """A reward model on pairs of the SFT teacher's conversations, the better one by the judge."""
    set_seed(seed)
    trainer = trl.RewardTrainer(
        model=LlamaForSequenceClassification.from_pretrained(world.policy, num_labels=1),
        args=trl.RewardConfig(
            **cpu_arguments(world.reward, seed),
            num_train_epochs=size.reward_epochs,
            per_device_train_batch_size=32,
            learning_rate=1e-3,
            lr_scheduler_type="cosine",
            max_length=None,
            center_rewards_coefficient=0.01,  # pairs leave the zero of the scores open
        ),
        train_dataset=judged_pairs(world, seed, size.judged),
        processing_class=world.tokenizer,
    )
    fit(trainer).save_model()


def judged_pairs(world: World, seed: int, lessons: int) -> Dataset:
    """Columns `prompt`, `chosen` and `rejected`: two conversations of a lesson, without ties."""
    taught = world.lessons["train"].select(range(lessons))
    first, second = (play(load_policy(world), world, taught, seed + i) for i in (0, 1))
    answers = education_judge(taught["prompt"], first, second)
    rows = []
    for prompt, one, other, won in zip(taught["prompt"], first, second, answers, strict=True):
        if won != 0.5:
            chosen, rejected = (one, other) if won else (other, one)
            rows.append({"prompt": prompt, "chosen": chosen, "rejected": rejected})
    return Dataset.from_list(rows)


def load_policy(world: World) -> PreTrainedModel:
    """A fresh copy of the SFT teacher."""
    return AutoModelForCausalLM.from_pretrained(world.policy)


def play(
    model: PreTrainedModel, world: World, lessons: Dataset, seed: int, rows: int = 512
) -> list[Conversation]:
    """One conversation per lesson, sampled from the policy; as TRL's loop over tools has them."""
    starts = range(0, len(lessons), rows)
    parts = [lessons.select(range(i, min(i + rows, len(lessons)))) for i in starts]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return [talk for part in parts for talk in _play(model.eval(), world.tokenizer, part)]


def _play(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, lessons: Dataset
) -> list[Conversation]:
    config = GenerationConfig(
        max_new_tokens=TURN_TOKENS,
        do_sample=True,
        top_k=0,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    rooms, talks = [Classroom() for _ in lessons], [[] for _ in lessons]
    for room, lesson in zip(rooms, lessons, strict=True):
        room.reset(**lesson)
    going_on = list(range(len(rooms)))
    for _ in range(MOST_TURNS + 1):
        texts = [lessons[i]["prompt"] + talks[i] for i in going_on]
        prompts = tokenizer.apply_chat_template(
            texts, add_generation_prompt=True, return_dict=False
        )
        spoken = sample(model, prompts, config, eos_token_ids=[tokenizer.eos_token_id])
        turns = [
            tokenizer.parse_response(ids, prefix=prompt)
            for ids, prompt in zip(spoken, prompts, strict=True)
        ]
        for i, turn in zip(going_on, turns, strict=True):
            talks[i].append(turn)
            if message_of(turn) is not None:
                answer = rooms[i].say(message_of(turn))
                talks[i].append({"role": "tool", "name": "say", "content": answer})
        going_on = [
            i for i, turn in zip(going_on, turns, strict=True) if message_of(turn) is not None
        ]
        if not going_on:
            break
    return talks


def conversation_reward(world: World) -> Callable[[Sequence[Conversation]], list[float]]:
    """The learned reward of whole conversations, or of beginnings, prompt and all."""
    model = AutoModelForSequenceClassification.from_pretrained(world.reward).eval()

    @torch.no_grad()
    def reward(conversations: Sequence[Conversation]) -> list[float]:
        ids = world.tokenizer.apply_chat_template(list(conversations), return_dict=False)
        inputs = world.tokenizer.pad({"input_ids": ids}, return_tensors="pt")
        return model(**inputs).logits[:, 0].tolist()

    return reward
