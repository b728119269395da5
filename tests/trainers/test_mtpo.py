"""MTPO in a run: real conversations with an environment, who led them, and what is left out."""

import json
import math

import pytest
import torch
import trl
from datasets import Dataset
from peft import LoraConfig

import trl_ext.trainers._seam as seam
from tests.data.test_education_dialogue import LESSON, STORIES, chat_tokenizer, talk
from tests.runs import TOKENIZER, Gradients, build, by_letters, different, parameters, speak, vowels
from tests.tiny import tiny_llama, tiny_prompts
from trl_ext import GRPOTrainer, MTPOConfig, MTPOTrainer, NashTrainer, OnlineDPOTrainer
from trl_ext.data.education_dialogue import Classroom, education_judge
from trl_ext.trainers._seam import GroupTrainer
from trl_ext.trainers.mtpo import reward_credit

FIXED = dict(max_steps=1, learning_rate=0.0, max_grad_norm=0.0, shuffle_dataset=False)


# In a classroom


class Scripted:
    """Writes the next line of each row's script as a call of `say`, or else a farewell."""

    def __init__(self, tokenizer, scripts):
        self.tokenizer, self.scripts = tokenizer, scripts
        self.opponents = []

    def __call__(self, model, prompt_ids, config, *, opponent=None, **_):
        self.opponents.append((len(prompt_ids), opponent))
        spoken = [self.tokenizer.decode(ids).count("</tool_response>") for ids in prompt_ids]
        rows = range(len(prompt_ids)) if len(prompt_ids) == len(self.scripts) else self.going_on
        self.going_on, texts = [], []
        for row, number in zip(rows, spoken, strict=True):
            line = self.scripts[row][number : number + 1]
            call = {"name": "say", "arguments": {"message": "".join(line)}}
            texts.append(f"<tool_call>\n{json.dumps(call)}\n</tool_call>" if line else "goodbye")
            self.going_on += [row] if line else []
        return [self.tokenizer(text + "<|im_end|>")["input_ids"] for text in texts]


@pytest.fixture
def classroom(tmp_path, monkeypatch):
    """A run of two conversations of three messages and one; with tau, so that we sample."""
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    tokenizer = chat_tokenizer()
    model = tiny_llama(len(tokenizer))
    model.config.max_position_embeddings = 4096
    script = Scripted(tokenizer, [STORIES, ["a game about lava"]])
    monkeypatch.setattr(seam, "sample", script)
    row = {"prompt": [{"role": "user", "content": "teach your student"}], **LESSON}
    sizes = dict.fromkeys(("per_device_train_batch_size", "per_device_eval_batch_size"), 2)
    sizes |= {"num_generations": 2, "max_completion_length": 3000}
    seen = []

    def judge(prompts, first, second):
        seen.extend(zip(first, second, strict=True))
        return education_judge(prompts, first, second)

    def make(trainer=MTPOTrainer, **options):
        options = FIXED | sizes | {"judge": judge, "tau": 0.2} | options
        return build(
            trainer,
            tmp_path,
            model=model,
            arguments={
                "train_dataset": Dataset.from_list([row] * 2),
                "eval_dataset": Dataset.from_list([row]),
                "processing_class": tokenizer,
                "environment_factory": Classroom,
            },
            **{name: value for name, value in options.items() if value is not None},
        )

    return make, script, seen


def test_conversations_with_an_environment(classroom):
    """Judged with what the student said; the mixture leads every turn; only the policy's tokens
    have a gradient."""
    make, script, seen = classroom
    run = make()
    told, honest = [], run.group_loss

    def watched(group):
        logp = group.logp_PMT.detach().requires_grad_()
        loss_P, _ = honest(type(group)(**{**vars(group), "logp_PMT": logp}))
        (gradient,) = torch.autograd.grad(loss_P.sum(), logp)
        told.append((gradient, group.stored))
        return honest(group)

    run.group_loss = watched
    run.train()
    ((first, second),) = seen
    heard = [m["content"] for m in first if m["role"] == "tool"]
    assert heard == talk(*STORIES) and first[-1]["content"] == "goodbye"
    assert [message["role"] for message in second] == ["assistant", "tool", "assistant"]
    (row, _) = run.state.log_history
    assert (row["turns"], row["rewards/win_rate/mean"]) == (3.0, 0.5)
    ((gradient_PMT, stored),) = told
    others_PMT = (stored["completion_mask"] * (1 - stored["tool_mask"])).bool()
    own_PMT = (stored["completion_mask"] * stored["tool_mask"]).bool()
    assert others_PMT.any() and (gradient_PMT[~own_PMT] == 0).all()
    assert (gradient_PMT[own_PMT] != 0).all()
    assert (gradient_PMT[0, 0] <= 0).all() and (gradient_PMT[0, 1] >= 0).all()
    assert [rows for rows, _ in script.opponents] == [2, 2, 1, 1]
    assert all(o.in_every_row and o.coefficient == 0.2 for _, o in script.opponents)


def kept(run):
    """What the loss finds stored with each micro-batch of a run."""
    batches, honest = [], run.group_loss

    def watched(group):
        batches.append(group.stored)
        return honest(group)

    run.group_loss = watched
    run.train()
    return batches


CALL, ANSWER = "assistant", "tool"


@pytest.mark.parametrize(
    ("length", "roles", "turns"),
    [
        (150, [CALL], 1),
        (260, [CALL, ANSWER, CALL], 2),
        (330, [CALL, ANSWER, CALL, ANSWER, CALL], 3),
    ],
)
def test_a_conversation_is_cut_where_no_answer_fits_and_in_the_middle_of_a_turn(
    length, roles, turns, classroom
):
    """The judge reads what is trained on: an answer that was rolled back is in neither."""
    make, script, seen = classroom
    (batch,) = kept(make(max_completion_length=length))
    ((first, _),) = seen
    assert [message["role"] for message in first] == roles
    mask_T = (batch["completion_mask"] * batch["tool_mask"])[0, 0]
    assert int((mask_T.diff(prepend=mask_T.new_zeros(1)) > 0).sum()) == turns
    ids_T = batch["completion_ids"][0, 0][batch["completion_mask"][0, 0].bool()]
    text = script.tokenizer.decode(ids_T)
    assert text.count("<tool_response>") == roles.count(ANSWER) and len(ids_T) <= length
    assert all(m["content"] in text for m in first if m["role"] == ANSWER)


def test_an_environment_that_fails_is_heard_and_not_learned(classroom, monkeypatch):
    def say(self, message: str) -> str:
        """Says something.

        Args:
            message: What.
        """
        raise RuntimeError("nobody there")

    monkeypatch.setattr(Classroom, "say", say)
    make, script, seen = classroom
    run = make()
    (batch,) = kept(run)
    ((first, second),) = seen
    heard = [m["content"] for m in first if m["role"] == ANSWER]
    assert heard == ["{'error': 'nobody there'}"] * 3 and len(second) == 3
    assert run.state.log_history[0]["tools/failure_frequency"] == 1.0
    assert batch["win"].tolist() == [[0.0, 1.0]], "of two in vain the shorter one"
    own = script.tokenizer.decode(batch["completion_ids"][0, 0][batch["tool_mask"][0, 0].bool()])
    assert "nobody" not in own


@pytest.mark.parametrize("trainer", [GRPOTrainer, OnlineDPOTrainer, MTPOTrainer])
def test_every_base_converses_by_trls_sampler(trainer, classroom, monkeypatch):
    make, script, _ = classroom
    monkeypatch.setattr(
        trl.GRPOTrainer,
        "_generate_single_turn",
        lambda run, prompt_ids, *_, **__: (script(None, prompt_ids, None), None),
    )
    options = {} if issubclass(trainer, GroupTrainer) else {"judge": None}
    run = make(trainer, tau=None, **options)
    run.train()
    assert run.state.log_history[0]["tools/call_frequency"] == 2.0


def test_evaluation_in_a_classroom(classroom):
    make, _, seen = classroom
    metrics = make().evaluate()
    assert metrics["eval_turns"] == 3.0 and metrics["eval_win_rate"] == 0.5 and len(seen) == 1


def test_an_environment_cannot_work_ahead(classroom):
    make, *_ = classroom
    with pytest.raises(ValueError, match=r"tools is not supported with schedule='one_step'"):
        make(tau=0.0, schedule="one_step")


# Turns by a mask


def masked(masks, texts=different):
    """`rollout_func` whose i-th completion of a group has the i-th mask."""
    rollout = speak(texts)

    def spoken(prompts, trainer):
        output, G = rollout(prompts, trainer), trainer.num_generations
        lengths = map(len, output["completion_ids"])
        told = [masks(i % G, n) for i, n in enumerate(lengths)]
        return output | {"env_mask": told}

    return spoken


def one_step(folder, rollout, **options):
    caught = Gradients()
    arguments = {"callbacks": [caught], "rollout_func": rollout, **options.pop("arguments", {})}
    run = build(MTPOTrainer, folder, arguments=arguments, **{**FIXED, **options})
    run.train()
    return caught.steps[0], run.state.log_history[0]


def test_turns_are_counted_and_one_without_any_learns_nothing(tmp_path):
    def masks(i, n):
        return [int(i > 0 and not (i > 1 and t == 1)) for t in range(n)]

    gradient, row = one_step(tmp_path, masked(masks))
    assert row["turns"] == (0 + 1 + 2 + 2) / 4 and gradient.norm() > 0
    gradient, row = one_step(tmp_path, masked(lambda i, n: [0] * n))
    assert row["turns"] == 0 and row["loss"] == 0.0 and (gradient == 0).all()


def test_a_conversation_that_was_cut_is_judged_as_far_as_it_went(tmp_path):
    """Without an end of sequence, and yet the winner."""

    def cut(prompts, trainer):
        output = speak(different)(prompts, trainer)
        output["completion_ids"][3] = output["completion_ids"][3][:-1]
        return output

    def longest(prompts, first, second):
        return [float(len(a) > len(b)) for a, b in zip(first, second, strict=True)]

    run = build(MTPOTrainer, tmp_path, judge=longest, arguments={"rollout_func": cut}, **FIXED)
    (batch,) = kept(run)
    winners = batch["win"].argmax(1)
    assert winners.tolist() == [3, 3]
    assert sorted(batch["completion_mask"][:, 3].sum(1).tolist()) == [4, 5]


@pytest.mark.parametrize("rewarded", [False, True])
def test_an_unscorable_conversation_is_as_if_never_drawn(rewarded, tmp_path):
    def texts(prompt, i):
        return ("ab", "abc", "abcd")[i]

    def unknown(text):
        return len(text) == 4

    def judge(prompts, first, second):
        pairs = zip(by_letters(prompts, first, second), first, second, strict=True)
        return [None if unknown(a) or unknown(b) else p for p, a, b in pairs]

    def reward(completions, **_):
        return [None if unknown(c) else float(len(c)) for c in completions]

    found = []
    for G in (3, 2):
        options = dict(num_generations=G, per_device_train_batch_size=2 * G)
        options |= {"judge": None if rewarded else judge}
        arguments = {"reward_funcs": reward if rewarded else None}
        gradient, row = one_step(tmp_path, speak(texts), arguments=arguments, **options)
        found.append(gradient)
        if not rewarded:
            assert row["win_rate"] == row["rewards/win_rate/mean"] == 0.5, "somebody wins each time"
    assert found[1].norm() > 1e-2
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-7)


def test_rewards_are_credited_among_the_scored_and_one_alone_is_as_if_never_drawn():
    nan = math.nan
    rewards = torch.tensor([[1.0, nan, nan], [2.0, 4.0, nan], [0.0, 3.0, 6.0], [nan, nan, nan]])
    expected = [[nan, nan, nan], [-2.0, 2.0, nan], [-4.5, 0.0, 4.5], [nan, nan, nan]]
    torch.testing.assert_close(reward_credit(rewards), torch.tensor(expected), equal_nan=True)


def test_one_turn_is_self_play_preference_optimisation(tmp_path):
    """Trainer against trainer, step after step: MTPO without turns is SPO."""
    options = dict(judge=by_letters, beta=0.3, max_steps=3, max_grad_norm=0.0)
    found = []
    for trainer, own in (
        (NashTrainer, {"algorithm": "spo"}),
        (MTPOTrainer, {"kl_baseline": "none"}),
    ):
        run = build(trainer, tmp_path, **options, **own)
        run.train()
        found.append(parameters(run))
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)


# The mixture


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_what_was_sampled_is_scored_under_the_mixture(temperature, tmp_path):
    """By normalising both laws' product by hand, without pads."""
    options = {"scale_logps_by_temperature": True} if temperature < 1 else {}
    run = build(MTPOTrainer, tmp_path, tau=0.3, temperature=temperature, **options)
    torch.manual_seed(1)
    for p in run.ref_model.parameters():
        p.data.add_(0.05 * torch.randn_like(p))
    batch, models = kept(run)[0], (tiny_llama(len(TOKENIZER)), run.ref_model)
    for row in range(4):
        prompt = batch["prompt_ids"][0, row][batch["prompt_mask"][0, row].bool()]
        spoken = batch["completion_ids"][0, row][batch["completion_mask"][0, row].bool()]
        text = torch.cat([prompt, spoken])[None]
        own, reference = (m(text).logits[0, len(prompt) - 1 : -1] / temperature for m in models)
        mixed = (0.7 * own + 0.3 * reference).log_softmax(-1)
        expected = mixed.gather(1, spoken[:, None]).squeeze(1)
        told = batch["sampled_logp"][0, row, : len(spoken)]
        torch.testing.assert_close(told, expected.detach(), rtol=0, atol=1e-5)
        alone = own.log_softmax(-1).gather(1, spoken[:, None]).squeeze(1)
        assert (told - alone).abs().max() > 1e-3


def test_an_adapter_turned_off_is_the_reference_in_the_mixture(tmp_path):
    lora = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    run = build(MTPOTrainer, tmp_path, tau=0.3, arguments={"peft_config": lora}, **FIXED)
    (batch,) = kept(run)
    text, masks = (
        torch.cat([batch[f"prompt_{name}"], batch[f"completion_{name}"]], dim=2).flatten(0, 1)
        for name in ("ids", "mask")
    )
    T = batch["completion_ids"].size(2)
    with torch.no_grad():
        own = run.model(text, attention_mask=masks).logits[:, -T - 1 : -1]
        with run.model.disable_adapter():
            base = run.model(text, attention_mask=masks).logits[:, -T - 1 : -1]
    expected = (0.7 * own + 0.3 * base).log_softmax(-1).gather(2, text[:, -T:, None]).squeeze(2)
    mask = batch["completion_mask"].flatten(0, 1)
    told = batch["sampled_logp"].flatten(0, 1)
    torch.testing.assert_close(told * mask, expected * mask, rtol=0, atol=1e-5)
    assert (own - base).abs().max() > 1e-2


def test_all_of_the_mixture_is_the_reference(tmp_path):
    for batch in kept(build(MTPOTrainer, tmp_path, tau=1.0)):
        mask = batch["completion_mask"]
        torch.testing.assert_close(batch["sampled_logp"] * mask, batch["ref_logp"] * mask)


# Options


@pytest.mark.parametrize(
    ("options", "beta"),
    [
        ({"judge": by_letters}, 0.005),
        ({"judge": by_letters, "tau": 0.0375}, 0.0025),
        ({"judge": "bradley_terry"}, 0.005),
        ({}, 0.01),
        ({"judge": by_letters, "beta": 0.3}, 0.3),
    ],
    ids=["judge", "tau", "bradley_terry", "reward", "given"],
)
def test_an_unset_weight_of_the_kl_is_the_papers(options, beta, tmp_path):
    args = MTPOConfig(str(tmp_path), use_cpu=True, bf16=False, **options)
    assert (args.beta, args.num_generations) == (beta, 2)


TAU = {"tau": 0.1}
REFUSED = {
    "tau": ({"tau": 1.5}, r"tau=1\.5 is no weight. Give a number from 0 to 1\.0"),
    "no tau": ({"tau": None}, "tau=None is no weight"),
    "beta": ({"beta": -0.1}, r"beta=-0\.1 is no weight. Give a number from 0 to inf"),
    "NaN": ({"beta": math.nan}, "beta=nan is no weight"),
    "epsilon": ({"epsilon": 1.5}, r"epsilon=1.5 must lie in \(0, 1\)"),
    "mixture of one": ({**TAU, "beta": 0.0}, "no reference to mix with"),
    "turn_kl": ({"turn_kl": "token"}, "turn_kl='token' is none of sampled, vocab"),
    "kl_baseline": ({"kl_baseline": "mean"}, "kl_baseline='mean' is none of"),
    "no KL": ({"beta": 0.0, "turn_kl": "vocab"}, "turn_kl='vocab' is not applied: beta=0"),
    "loss_type": ({"loss_type": "grpo"}, "loss_type='grpo' is not applied"),
    "vllm": ({**TAU, "use_vllm": True}, r"use_vllm=True is not supported with tau=0\.1"),
    "ahead": ({**TAU, "schedule": "one_step"}, "schedule='one_step' is not supported with tau"),
    "batching": (
        {**TAU, "use_transformers_continuous_batching": True},
        "use_transformers_continuous_batching=True is not supported with tau",
    ),
    "truncated": ({"top_p": 0.9}, "top_p=0.9 is not supported with MTPO"),
    "tempered": ({"temperature": 0.7}, "temperature=0.7.*scale_logps_by_temperature=True"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused(name, tmp_path):
    options, says = REFUSED[name]
    with pytest.raises(ValueError, match=says):
        MTPOConfig(str(tmp_path), use_cpu=True, bf16=False, **options)


def test_each_option_acts(tmp_path):
    found, common = {}, dict(judge=by_letters, beta=0.3, epsilon=0.02)
    common |= dict(num_iterations=2, max_steps=3, learning_rate=1e-3)
    for options in (
        {},
        {"turn_kl": "vocab"},
        {"kl_baseline": "none"},
        {"tau": 0.3},
        {"beta": 0.2},
        {"epsilon": 0.9},
        {"num_generations": 2},
        {"judge": "bradley_terry"},
    ):
        run = build(MTPOTrainer, tmp_path, **{**common, **options})
        run.train()
        found[str(options)] = parameters(run)
    plain = found.pop("{}")
    assert [name for name, other in found.items() if torch.equal(plain, other)] == []


@pytest.mark.parametrize("options", [{}, {"tau": 0.3}, {"turn_kl": "vocab"}], ids=str)
def test_equal_conversations_and_policies_teach_nothing(options, tmp_path):
    """At the reference the KL has no gradient but the one that next-token laws show: none."""
    arguments = {"reward_funcs": lambda completions, **_: [1.0] * len(completions)}
    gradient, row = one_step(tmp_path, speak(different), arguments=arguments, **options)
    assert gradient.abs().max() < 1e-7 and row["turns"] == 1.0


def test_several_passes_are_clipped_by_turn(tmp_path):
    """At a large step the second pass finds its ratios outside of the clip."""
    options = dict(num_iterations=2, max_steps=2, learning_rate=1.0, beta=0.0, max_grad_norm=0.0)
    arguments = {"reward_funcs": vowels, "train_dataset": tiny_prompts(16)}
    caught = Gradients()
    arguments |= {"callbacks": [caught], "rollout_func": speak(different)}
    build(MTPOTrainer, tmp_path, arguments=arguments, **options).train()
    first, second = caught.steps
    assert first.norm() > 0 and math.isfinite(second.norm()) and second.norm() < first.norm()
