"""JEPO through the trainer: what is scored and masked, what is refused, and that it learns."""

import pytest
import torch
from datasets import Dataset

from tests.runs import TOKENIZER, build, logged, parameters, speak
from tests.tiny import tiny_llama, tiny_prompts, tiny_tokenizer
from trl_ext import JEPOConfig, JEPOTrainer

MARKED = {"marker": "#", "answer_prefix": "", "combine_with_reward": False}


def spoken(texts):
    return {"rollout_func": speak(lambda _, place: texts[place])}


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


def test_the_answer_stands_behind_the_thought(tmp_path):
    texts = ["ab#xy", "c#", "#z", "nothing"]
    trainer = build(JEPOTrainer, tmp_path, arguments=spoken(texts), max_steps=1, **MARKED)
    (batch,) = seen(trainer)
    answers = dict(zip(tiny_prompts(16)["prompt"], tiny_prompts(16)["answer"], strict=True))
    for p in range(2):
        prompt = TOKENIZER.decode(batch["prompt_ids"][p, 0][batch["prompt_mask"][p, 0].bool()])
        rows = texts_of(batch["completion_ids"][p], batch["completion_mask"][p])
        told = texts_of(batch["completion_ids"][p], batch["answer_mask"][p])
        answer = answers[prompt.replace("<s>", "")] + "</s>"
        assert rows == [f"ab#{answer}", f"c#{answer}", f"#{answer}", "nothing</s>"]
        assert told == [answer, answer, answer, ""]
    row = logged(trainer)[0]
    assert row["marked"] == 0.75 and row["bound/L1"] is None


def test_bounds_are_logged_where_all_thoughts_have_a_marker(tmp_path):
    options = {"max_steps": 1, **MARKED}
    trainer = build(JEPOTrainer, tmp_path, arguments=spoken(["a#", "bb#", "c#", "#"]), **options)
    trainer.train()
    row = logged(trainer)[0]
    assert row["bound/L1"] < row["bound/L2"] < row["bound/L4"] < 0


@pytest.mark.parametrize("conversational", [False, True])
def test_answers_of_any_length(conversational, tmp_path):
    prompts = tiny_prompts(16, conversational)["prompt"]
    answers = ["x" * (i % 5) * 7 for i in range(16)]
    dataset = Dataset.from_dict({"prompt": prompts, "answer": answers})
    arguments = {"train_dataset": dataset, **spoken(["a#b", "#", "cc#", "d"])}
    if conversational:
        arguments.pop("rollout_func")
    trainer = build(JEPOTrainer, tmp_path, arguments=arguments, **MARKED)
    before = parameters(trainer)
    trainer.train()
    after = parameters(trainer)
    assert after.isfinite().all() and (conversational or not torch.equal(before, after))


def test_more_padding_changes_nothing(tmp_path):
    """Beside a prompt of many tokens the others are padded: the log-probabilities stay."""
    found = []
    for extra in (0, 40):
        prompts = [*tiny_prompts(16)["prompt"][:1], "y" * (1 + extra)]
        dataset = Dataset.from_dict({"prompt": prompts, "answer": ["12", "3"]})
        arguments = {"train_dataset": dataset, **spoken(["a#", "bb#", "c#", "#"])}
        options = {"shuffle_dataset": False, "max_steps": 1, "learning_rate": 0.0, **MARKED}
        trainer = build(JEPOTrainer, tmp_path / str(extra), arguments=arguments, **options)
        (batch,) = seen(trainer)
        model, p = trainer.model, int(batch["prompt_mask"][:, 0].sum(1).argmin() if extra else 0)
        if not extra:
            p = next(i for i in range(2) if int(batch["prompt_mask"][i, 0].sum()) > 2)
        ids = torch.cat([batch["prompt_ids"][p], batch["completion_ids"][p]], 1)
        mask = torch.cat([batch["prompt_mask"][p], batch["completion_mask"][p]], 1)
        logits = model(ids, attention_mask=mask).logits[:, :-1].log_softmax(-1)
        logp = logits.gather(2, ids[:, 1:, None])[..., 0]
        found.append((logp[:, -batch["answer_mask"].size(2) :] * batch["answer_mask"][p]).sum(1))
    torch.testing.assert_close(*found)


REFUSED = {
    "bound": ({"bound": "tight"}, "bound='tight'"),
    "temperature": ({"temperature": 0.7}, "temperature=0.7"),
    "top_p": ({"top_p": 0.9}, "top_p=0.9"),
    "judge": ({"judge": "bradley_terry"}, "judge"),
    "penalty": ({"format_penalty": -1.0}, "format_penalty=-1.0"),
    "clip": ({"advantage_clip": 0.0}, "advantage_clip=0.0"),
    "latro": ({"bound": "latro", "kl_gradient": "sequence_total"}, "kl_gradient"),
    "loss_type": ({"loss_type": "grpo"}, "loss_type"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused(name, tmp_path):
    options, says = REFUSED[name]
    with pytest.raises(ValueError, match=says):
        JEPOConfig(str(tmp_path), use_cpu=True, bf16=False, **options)


def test_a_dataset_without_answers(tmp_path):
    dataset = tiny_prompts(8).remove_columns("answer")
    with pytest.raises(ValueError, match="column 'answer' holds None"):
        build(JEPOTrainer, tmp_path, arguments={"train_dataset": dataset}, **MARKED).train()


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
