"""What must not change a run, and for each row the bug that would: it is put back, and must show.

Rows are those of the reliability page: 1 factorings of a batch, 2 two processes, 4 pads, 6 scored
against sampled log-probabilities, 7 KL at step 0, 12 two runs with one seed. Rows 3 and 8 have
files of their own (`test_resume.py`, `test_exact_*.py`).
"""

import copy
import os
from pathlib import Path

import pytest
import torch
import trl
from peft import LoraConfig
from transformers import GPT2Config, GPT2LMHeadModel
from trl.trainer import grpo_trainer

import trl_ext.trainers._seam as seam
from tests.processes import run_two_ranks
from tests.runs import (
    ALGORITHMS,
    JUDGED,
    OF_GROUPS,
    OF_TOKENS,
    OURS,
    TOKENIZER,
    Gradients,
    build,
    by_letters,
    different,
    logged,
    parameters,
    relative,
    speak,
    told_rollouts,
    vowels,
)
from tests.their_online_dpo import their_online_dpo
from tests.tiny import tiny_llama, tiny_prompts
from trl_ext import (
    AGROTrainer,
    GRPOTrainer,
    JEPOTrainer,
    NashTrainer,
    OnlineDPOTrainer,
    VinePPOTrainer,
)

each_trainer = pytest.mark.parametrize("trainer", OURS, ids=lambda t: t.__name__)
each_of_tokens = pytest.mark.parametrize("trainer", OF_TOKENS, ids=lambda t: t.__name__)
LOSSES = ("grpo", "dr_grpo", "dapo", "luspo", "sapo", "cispo")


def earned_by_few(prompts, completions, **_):
    """Rewards in the groups of the longest prompt alone: the others are left to JEPO's bound."""
    return [float(len(p) == 7) * len(c) for p, c in zip(prompts, completions, strict=True)]


# Per loss of a trainer over groups; unequal scores, so that every pair counts.
GROUP_CASES: dict[str, tuple[type, dict]] = {
    **{
        loss: (OnlineDPOTrainer, {"loss_type": loss, "pair_rule": "all_pairs"})
        for loss in ("sigmoid", "ipo", "hinge", "robust", "rpo")
    },
    "best_worst": (OnlineDPOTrainer, {}),
    "best_of_k_sft": (OnlineDPOTrainer, {"loss_type": "best_of_k_sft"}),
    "rloo": (OnlineDPOTrainer, {"loss_type": "rloo"}),
    "judged": (OnlineDPOTrainer, {"judge": by_letters, "judge_both_orders": True}),
    "agro": (AGROTrainer, {}),
    "copg": (AGROTrainer, {"loss_type": "copg"}),
    # Some of its completions have a marker, some have none.
    "jepo": (JEPOTrainer, {"marker": "c", "answer_prefix": "", "reward_funcs": earned_by_few}),
    "nash_md": (NashTrainer, {}),
    "judged game": (NashTrainer, {"judge": by_letters, "judge_both_orders": True}),
    **ALGORITHMS,
}
each_group_case = pytest.mark.parametrize("case", GROUP_CASES)
# One per way to gather: rewards, a judge's answers, opponents, anchors, snapshots.
ON_TWO_RANKS = (
    *("sigmoid", "best_worst", "judged", "rloo", "agro", "jepo"),
    *("judged game", "inpo", "nash_mp"),
)


def moved_reference(run):
    """A reference that differs from the policy, so that the KL has a gradient."""
    if run.ref_model is not None:
        torch.manual_seed(1)
        for p in run.ref_model.parameters():
            p.data.add_(0.02 * torch.randn_like(p))


def lengths(completions, **_):
    """Scores that never tie in a group of `different` completions, in another order in another."""
    return [(ord(c[0]) + 2.0 * len(c)) % 7 for c in completions]


def some_ties(prompts, completions, **_):
    """Like `lengths`, but silent on the shortest prompts."""
    pairs = zip(prompts, lengths(completions), strict=True)
    return [0.0 if len(prompt) == 4 else score for prompt, score in pairs]


def gradient_of_one_step(trainer, folder, rows=16, accumulation=1, reward_funcs=None, **options):
    """Gradient of one optimizer step over four fixed groups, before clipping; nothing is drawn."""
    options = dict(
        max_steps=1,
        per_device_train_batch_size=rows // accumulation,
        gradient_accumulation_steps=accumulation,
        max_grad_norm=0.0,
        learning_rate=0.0,
        shuffle_dataset=False,
        max_completion_length=8,
        **options,
    )
    caught = Gradients()
    given = {"callbacks": [caught], "rollout_func": speak(different)}
    if trainer in OF_GROUPS and not callable(options.get("judge")):
        given["reward_funcs"] = reward_funcs or lengths
    if trainer in OF_GROUPS:
        given["train_dataset"] = tiny_prompts(16).select([0, 5, 11, 4, 1, 10, 2, 3])
    run = build(trainer, folder, arguments=given, **options)
    moved_reference(run)
    if trainer is VinePPOTrainer:
        run._continued = told_rollouts
    run.train()
    return caught.steps[0], logged(run)[0]


# Row 1


def worst_factoring(trainer, folder, factorings=(2, 4, 16), **options):
    whole, _ = gradient_of_one_step(trainer, folder, **options)
    assert whole.norm() > 1e-4
    parts = [
        gradient_of_one_step(trainer, folder, accumulation=a, **options)[0] for a in factorings
    ]
    return max(relative(part, whole) for part in parts)


@each_of_tokens
@pytest.mark.parametrize("loss_type", LOSSES)
@pytest.mark.filterwarnings("ignore:loss_type")
def test_factorings_of_a_batch_give_one_gradient(trainer, loss_type, tmp_path):
    assert worst_factoring(trainer, tmp_path, loss_type=loss_type) <= 1e-5


def test_bnpo_is_exempt_because_it_normalises_each_micro_batch_by_definition(tmp_path):
    assert worst_factoring(GRPOTrainer, tmp_path, loss_type="bnpo") > 1e-3


@each_group_case
def test_factorings_of_a_batch_of_groups_give_one_gradient(case, tmp_path):
    """Down to a single group per micro-batch: a smaller one would split it."""
    trainer, options = GROUP_CASES[case]
    assert worst_factoring(trainer, tmp_path, factorings=(4,), **options) <= 1e-5


def test_factorings_of_trls_online_dpo_do_not(tmp_path):
    whole, quarters = (their_online_dpo(tmp_path, accumulation=a)[0] for a in (1, 4))
    ratio = (quarters.norm() / whole.norm()).item()
    print("gradient at four micro-batches over that at one: TRL", ratio)
    assert ratio == pytest.approx(4.0, rel=1e-4)


def test_mutation_group_loss_not_divided_by_the_accumulation(tmp_path, monkeypatch):
    whole, _ = gradient_of_one_step(OnlineDPOTrainer, tmp_path)
    honest = OnlineDPOTrainer._compute_loss

    def undivided(self, model, inputs):
        return honest(self, model, inputs) * self.current_gradient_accumulation_steps

    monkeypatch.setattr(OnlineDPOTrainer, "_compute_loss", undivided)
    parts, _ = gradient_of_one_step(OnlineDPOTrainer, tmp_path, accumulation=4)
    assert (parts.norm() / whole.norm()).item() == pytest.approx(4.0, rel=1e-4)


def test_mutation_ties_left_out_of_the_normaliser(tmp_path, monkeypatch):
    """Dividing by the pairs that have a winner weighs prompts by their micro-batch."""
    honest = OnlineDPOTrainer.group_loss

    def over_decided(self, group):
        loss_P, metrics = honest(self, group)
        decided = (group.stored["weight"] > 0).any(1).float().mean().clamp(min=1e-3)
        return loss_P / decided, metrics

    monkeypatch.setattr(OnlineDPOTrainer, "group_loss", over_decided)
    options = {"reward_funcs": some_ties, "factorings": (4,)}
    assert worst_factoring(OnlineDPOTrainer, tmp_path, **options) > 1e-2
    monkeypatch.setattr(OnlineDPOTrainer, "group_loss", honest)
    assert worst_factoring(OnlineDPOTrainer, tmp_path, **options) <= 1e-5


def test_mutation_kl_not_divided_by_the_accumulation(tmp_path, monkeypatch):
    def undivided(*args, accumulation, **kwargs):
        return reduce(*args, accumulation=1, **kwargs)

    reduce = seam.reduce_tokens
    monkeypatch.setattr(seam, "reduce_tokens", undivided)
    assert worst_factoring(GRPOTrainer, tmp_path, loss_type="dr_grpo") > 1e-2


# Row 2


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    """Every trainer in two processes; groups of eight are split over both ranks."""
    script, folder = Path(__file__).with_name("two_processes.py"), tmp_path_factory.mktemp("two")
    run_two_ranks(lambda rank: [str(script), str(folder)])
    return torch.load(folder / "gradients.pt", weights_only=True)


def one_process(trainer, folder, name):
    from tests.trainers.two_processes import CASES

    return gradient_of_one_step(trainer, folder, rows=8, **CASES[name])[0]


@each_of_tokens
@pytest.mark.parametrize("case", ["dr_grpo", "dapo", "baseline", "vocab"])
def test_two_processes_equal_one(trainer, case, two_processes, tmp_path):
    one = one_process(trainer, tmp_path, case)
    assert relative(two_processes[f"{trainer.__name__} {case}"], one) <= 1e-5


def test_two_processes_whiten_over_the_tokens_of_both(two_processes, tmp_path):
    from tests.trainers.two_processes import CASES

    options = dict(CASES["dr_grpo"], whiten=True)
    one, _ = gradient_of_one_step(VinePPOTrainer, tmp_path, rows=8, **options)
    assert relative(two_processes["whitened"], one) <= 1e-5


@pytest.mark.parametrize("case", ON_TWO_RANKS)
def test_two_processes_over_groups_equal_one(case, two_processes, tmp_path):
    trainer, options = GROUP_CASES[case]
    one, row = gradient_of_one_step(trainer, tmp_path, rows=8, **options)
    assert one.norm() > 1e-4
    assert relative(two_processes["groups"][case], one) <= 1e-5
    for name, value in two_processes["rows"][case].items():
        assert value == pytest.approx(row[name], rel=1e-4, abs=1e-6), name


def test_mutation_the_other_processes_rewards(two_processes, tmp_path):
    """Without the slice of the gathered rewards, rank 1 would train on those of rank 0."""
    one, _ = gradient_of_one_step(OnlineDPOTrainer, tmp_path, rows=8)
    assert relative(two_processes["mutated: rewards of rank 0"], one) > 1e-2


def test_two_processes_equal_trl_bit_for_bit(two_processes):
    assert torch.equal(two_processes["ours"], two_processes["theirs"])


def test_mutation_local_token_count(two_processes, tmp_path):
    one = one_process(GRPOTrainer, tmp_path, "dapo")
    error = relative(two_processes["mutated: local token count"], one)
    print("honest", relative(two_processes["GRPOTrainer dapo"], one), "mutated", error)
    assert error > 1e-2


# Row 4


@pytest.fixture
def pad_more(monkeypatch):
    """Appends masked tokens to prompts (left) and completions (right)."""
    pad, extra = grpo_trainer.pad, {"left": 0, "right": 0}

    def padded(tensors, padding_value=0, padding_side="right", **kwargs):
        out = pad(tensors, padding_value=padding_value, padding_side=padding_side, **kwargs)
        n = extra[padding_side]
        sides = (n, 0) if padding_side == "left" else (0, n)
        return torch.nn.functional.pad(out, sides, value=padding_value)

    monkeypatch.setattr(grpo_trainer, "pad", padded)
    return extra


PADS = ((1, 0), (7, 0), (0, 20), (7, 20))


def worst_padding(trainer, folder, pad_more, pads=PADS, **options):
    expected, row = gradient_of_one_step(trainer, folder, **options)
    worst = 0.0
    for left, right in pads:
        pad_more.update(left=left, right=right)
        actual, padded_row = gradient_of_one_step(trainer, folder, **options)
        worst = max(worst, relative(actual, expected))
        for name, value in row.items():
            worst = max(worst, abs(padded_row[name] - value) / max(abs(value), 1.0))
    return worst


@each_of_tokens
@pytest.mark.parametrize("kl_gradient", ["sequence", "sequence_vocab"])
def test_pads_change_nothing(trainer, kl_gradient, pad_more, tmp_path):
    options = dict(kl_gradient=kl_gradient, kl_baseline="leave_one_out")
    assert worst_padding(trainer, tmp_path, pad_more, **options) <= 1e-6


@each_group_case
def test_pads_change_nothing_in_a_batch_of_groups(case, pad_more, tmp_path):
    """Loss, gradient and every metric: a micro-batch is trimmed to its longest row."""
    trainer, options = GROUP_CASES[case]
    pads = PADS if case == "best_worst" else PADS[-1:]
    worst = worst_padding(trainer, tmp_path, pad_more, pads, **options)
    print(case, worst)
    assert worst <= 1e-6


def test_pads_change_what_trls_online_dpo_logs(tmp_path):
    row, padded = (their_online_dpo(tmp_path, pads=n)[1] for n in (0, 20))
    print("TRL", *((name, row[name], padded[name]) for name in ("objective/kl",)))
    assert abs(padded["objective/kl"] - row["objective/kl"]) > 0.1
    assert padded["objective/entropy"] > 2 * row["objective/entropy"]


def test_mutation_groups_without_trim_and_mask(pad_more, tmp_path, monkeypatch):
    monkeypatch.setattr(seam, "trimmed", lambda batch: batch)
    monkeypatch.setattr(seam, "_loss_mask", lambda batch: torch.ones_like(batch["completion_mask"]))
    assert worst_padding(OnlineDPOTrainer, tmp_path, pad_more, PADS[-1:]) > 1e-3


def test_mutation_kl_summed_without_its_mask(pad_more, tmp_path, monkeypatch):
    k3 = seam.k3
    monkeypatch.setattr(seam, "_loss_mask", lambda batch: torch.ones_like(batch["completion_mask"]))
    assert k3 is seam.k3
    assert worst_padding(GRPOTrainer, tmp_path, pad_more) > 1e-3


# Row 6


def absolute_positions():
    """GPT-2 with positions that matter: at its initial scale they would hardly show."""
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=len(TOKENIZER),
        n_positions=64,
        n_embd=32,
        n_layer=2,
        n_head=2,
        tie_word_embeddings=False,
    )
    model = GPT2LMHeadModel(config)
    model.transformer.wpe.weight.data.normal_(std=1.0)
    model.lm_head.weight.data.normal_(std=0.3)
    return model


MODELS = {"rotary": lambda: tiny_llama(len(TOKENIZER)), "absolute": absolute_positions}


def scored_minus_sampled(trainer, folder, model, **own):
    """Largest difference, in nats, over the tokens of completions that end and that are cut."""
    own = own or {"beta": 0.0}
    options = dict(temperature=0.7, max_completion_length=12, num_generations=8, **own)
    run = build(trainer, folder, model=model, **options)
    run.model.eval()
    encoded = TOKENIZER(["1=", "1+2+3+4="], return_tensors="pt", padding=True, padding_side="left")
    encoded = {k: v.repeat_interleave(64, 0) for k, v in encoded.items() if k != "token_type_ids"}
    config = copy.deepcopy(run.generation_config)
    config.update(return_dict_in_generate=True, output_scores=True)
    torch.manual_seed(0)
    out = run.model.generate(**encoded, generation_config=config)
    T = len(out.scores)
    ids = out.sequences[:, -T:]
    ended = (ids == TOKENIZER.eos_token_id).cumsum(1)
    mask = (ended - (ids == TOKENIZER.eos_token_id).long()) == 0
    sampled = torch.stack(out.scores, 1).log_softmax(-1).gather(2, ids.unsqueeze(2)).squeeze(2)
    attention = torch.cat([encoded["attention_mask"], mask.long()], dim=1)
    with torch.no_grad():
        scored = run._get_per_token_logps_and_entropies(run.model, out.sequences, attention, T)[0]
    assert mask.all(1).any() and not mask.all(), "some completions end and some are cut"
    return float((scored - sampled)[mask].abs().max())


@pytest.mark.parametrize("model", MODELS)
def test_scored_equals_sampled_log_probability(model, tmp_path):
    assert scored_minus_sampled(GRPOTrainer, tmp_path, MODELS[model]()) <= 1e-5


@pytest.mark.parametrize("trainer", JUDGED, ids=lambda t: t.__name__)
@pytest.mark.parametrize("model", MODELS)
def test_groups_are_scored_as_sampled_where_asked_to(trainer, model, tmp_path):
    own = {"scale_logps_by_temperature": True}
    assert scored_minus_sampled(trainer, tmp_path, MODELS[model](), **own) <= 1e-5


def test_groups_are_else_scored_at_temperature_1(tmp_path):
    own = {"scale_logps_by_temperature": False}
    assert scored_minus_sampled(OnlineDPOTrainer, tmp_path, MODELS["rotary"](), **own) > 1e-2


def test_mutation_positions_count_pads(tmp_path, monkeypatch):
    """What TRL does with absolute positions."""
    monkeypatch.setattr(seam, "_has_absolute_positions", lambda model: False)
    ours = scored_minus_sampled(GRPOTrainer, tmp_path, absolute_positions())
    theirs = scored_minus_sampled(trl.GRPOTrainer, tmp_path, absolute_positions())
    assert ours == theirs > 0.1


# Row 7


def changed_in_memory(folder):
    model = tiny_llama(len(TOKENIZER))
    model.save_pretrained(folder / "start")
    model = type(model).from_pretrained(folder / "start")
    for p in model.parameters():
        p.data.mul_(1.5)
    return model


def first_kl(trainer, folder, model, **arguments):
    run = build(trainer, folder, model=model, arguments=arguments, beta=0.1, max_steps=1)
    run.train()
    return run.state.log_history[0]["kl"]


@pytest.mark.parametrize("trainer", [GRPOTrainer, *OF_GROUPS], ids=lambda t: t.__name__)
@pytest.mark.parametrize("source", ["instance", "changed instance", "path", "lora", "custom class"])
def test_kl_at_step_0_is_0(source, trainer, tmp_path):
    arguments = {}
    if source == "instance":
        model = tiny_llama(len(TOKENIZER))
    elif source == "changed instance":
        model = changed_in_memory(tmp_path)
    elif source == "path":
        changed_in_memory(tmp_path)
        model = str(tmp_path / "start")
    elif source == "lora":
        model = changed_in_memory(tmp_path)
        arguments = {"peft_config": LoraConfig(r=2, target_modules=["q_proj"])}
    else:
        model = type("Custom", (type(tiny_llama(len(TOKENIZER))),), {})(
            tiny_llama(len(TOKENIZER)).config
        )
    assert first_kl(trainer, tmp_path, model, **arguments) == 0.0


def test_mutation_reference_reloaded_from_the_path(tmp_path, monkeypatch):
    import contextlib

    monkeypatch.setattr(seam, "_reference_copied_from", contextlib.nullcontext)
    assert first_kl(GRPOTrainer, tmp_path, changed_in_memory(tmp_path)) > 1e-3


def after_another_trainer(folder):
    """Gradient at the second trainer of one model, and at the first trainer of its twin."""
    model, gradients = tiny_llama(len(TOKENIZER)), []
    build(GRPOTrainer, folder, model=model, learning_rate=0.0).train()
    for policy in (model, tiny_llama(len(TOKENIZER))):
        options = dict(kl_gradient="sequence_vocab", model=policy)
        gradients.append(gradient_of_one_step(GRPOTrainer, folder, **options)[0])
    return relative(*gradients)


def test_a_model_that_was_trained_before_has_a_reference_of_its_own(tmp_path):
    assert after_another_trainer(tmp_path) <= 1e-6


def test_mutation_reference_runs_the_policys_forward(tmp_path, monkeypatch):
    monkeypatch.setattr(seam, "_copied", copy.deepcopy)
    assert after_another_trainer(tmp_path) > 1e-3


def test_the_reference_stays_where_it_was(tmp_path):
    run = build(GRPOTrainer, tmp_path, beta=0.1)
    before = copy.deepcopy(run.ref_model.state_dict())
    run.train()
    assert all(torch.equal(v, before[k]) for k, v in run.ref_model.state_dict().items())


# Row 12


def unlike(trainer, folder, **options):
    runs = []
    for part in ("first", "second"):
        run = build(trainer, folder / part, max_steps=3, **options)
        run.train()
        runs.append((parameters(run), logged(run)[:-1]))
    (left, rows), (right, rows_again) = runs
    return (left - right).abs().max().item() + float(rows != rows_again)


@each_trainer
def test_two_runs_with_one_seed_are_equal(trainer, tmp_path):
    assert unlike(trainer, tmp_path) == 0.0


def test_mutation_one_draw_from_an_unseeded_generator(tmp_path, monkeypatch):
    def unseeded(prompt, i):
        return "abcdefgh"[: 1 + int.from_bytes(os.urandom(1), "big") % 7]

    arguments = {"rollout_func": speak(unseeded)}
    assert unlike(GRPOTrainer, tmp_path, arguments=arguments) > 0.0


# The host


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"beta": 0.1},
        {"loss_type": "grpo", "scale_rewards": "batch"},
        {"num_iterations": 2, "steps_per_generation": 2},
        {"gradient_accumulation_steps": 4, "per_device_train_batch_size": 2},
        {"loss_type": "cispo", "epsilon_high": 2.0, "temperature": 0.8},
        {"beta": 0.1, "use_bias_correction_kl": False},
        {"importance_sampling_level": "sequence", "loss_type": "grpo", "num_iterations": 2},
    ],
    ids=str,
)
def test_without_options_of_its_own_grpo_is_trl_bit_for_bit(options, tmp_path):
    tiny_llama(len(TOKENIZER)).save_pretrained(tmp_path / "start")
    model = str(tmp_path / "start")
    evaluated = dict(
        max_steps=4, eval_strategy="steps", eval_steps=2, per_device_eval_batch_size=4, **options
    )
    ours = {"kl_gradient": "token"} if options.get("use_bias_correction_kl", True) else {}
    ours = ours or {"kl_gradient": "forward_token"}
    runs = []
    for trainer, own in ((trl.GRPOTrainer, {}), (GRPOTrainer, {"beta": 0.0, **ours})):
        arguments = {"eval_dataset": tiny_prompts(4), "reward_funcs": vowels}
        given = {**own, **evaluated}
        run = build(
            trainer, tmp_path / trainer.__module__, model=model, arguments=arguments, **given
        )
        run.train()
        runs.append((parameters(run), logged(run, without=("sampling/staleness",))[:-1]))
    (theirs, rows), (mine, my_rows) = runs
    assert torch.equal(theirs, mine)
    assert rows == my_rows
