"""The studies of AGRO: the tables' exact gradients, the fixed data, and a small whole run."""

import json
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.recipes.runs import modules_of, quick_run
from trl_ext.cards import card_problems
from trl_ext.data.stories import vocabulary
from trl_ext.studies import word_tokenizer


@pytest.fixture(scope="module")
def recipe():
    with modules_of("agro") as modules:
        yield modules


# Tables


@pytest.fixture(scope="module")
def problem(recipe):
    return recipe.tabular.draw_problem(0)


def expected_gradient(recipe, problem, rule, logits):
    drawn = recipe.tabular.pairs_of(problem, None)
    return recipe.tabular.gradient(rule, problem, logits.unsqueeze(0), drawn)[0]


def gradient_of(objective, logits):
    leaf = logits.clone().requires_grad_()
    (found,) = torch.autograd.grad(objective(leaf.log_softmax(-1)).sum(), leaf)
    return found


def test_every_pair_has_its_probability(recipe, problem):
    index, weight, first = recipe.tabular.pairs_of(problem, None)
    torch.testing.assert_close(weight.sum(1), torch.ones(len(weight), dtype=torch.float64))
    swapped = (index[0].flip(-1)[:, None] == index[0][None]).all(-1).double().argmax(1)
    torch.testing.assert_close(first + first[:, swapped], torch.ones_like(first))


def test_agro_descends_the_variance_and_half_as_fast_with_a_plain_mean(recipe, problem):
    beta, mu = recipe.tabular.BETA, problem.writer_logp.exp()

    def half_variance(logp):
        R = problem.rewards - beta * (logp - problem.ref_logp)
        return (mu * (R - (mu * R).sum(-1, keepdim=True)).square()).sum(-1) / (2 * beta)

    expected = gradient_of(half_variance, problem.ref_logp)
    for rule, share in (("agro", 1.0), ("agro_centred", 0.5)):
        actual = expected_gradient(recipe, problem, rule, problem.ref_logp)
        torch.testing.assert_close(actual, share * expected)


def test_with_the_ratio_it_is_the_gradient_of_the_objective(recipe, problem):
    """Off policy, and away from the reference: where the KL has a gradient too."""
    beta, logits = recipe.tabular.BETA, problem.writer_logp.flip(1)

    def objective(logp):
        return (logp.exp() * (beta * (logp - problem.ref_logp) - problem.rewards)).sum(-1)

    actual = expected_gradient(recipe, problem, "ratio", logits)
    torch.testing.assert_close(actual, gradient_of(objective, logits))


def test_who_stands_still_at_the_optimum(recipe, problem):
    """DPO does on average and not on each pair; the plain policy gradient on neither."""
    tabular = recipe.tabular
    on_average = {
        rule: expected_gradient(recipe, problem, rule, problem.optimum).norm() < 1e-12
        for rule in tabular.RULES
    }
    each = {rule: tabular.pull_at_optimum(rule, problem) < 1e-12 for rule in tabular.RULES}
    assert [rule for rule, still in each.items() if still] == ["agro", "agro_centred", "ratio"]
    assert [rule for rule, still in on_average.items() if still] == [
        *("agro", "agro_centred", "ratio", "dpo")
    ]


@pytest.mark.parametrize("mode", ["expected", "sampled"])
def test_agro_reaches_the_optimum_and_the_policy_gradient_another_policy(recipe, problem, mode):
    final = {
        rule: min(
            row["kl"]
            for row in recipe.tabular.descend(rule, problem, mode, steps=200, seed=0)
            if row["step"] == 200
        )
        for rule in ("agro", "policy_gradient")
    }
    assert final["agro"] < 1e-4 and final["policy_gradient"] > 3e-3, final


# Fixed data


def test_a_story_is_right_if_its_nouns_are_those_asked_for(recipe):
    asked = [["fox", "moon"]] * 4
    stories = ["old fox near moon", "moon moon fox", "fox near river under moon", "fox"]
    assert recipe.world.right(stories, asked) == [1.0, 1.0, 0.0, 0.0]


def scored(recipe):
    rows = {
        "prompt": ["FOX\n", "MOON\n"],
        "responses": [["fox", "moon", "old fox"], ["moon", "pale moon", "moon moon"]],
        "scores": [[1.0, 0.0, 1.0], [1.0, 1.0, 1.0]],
    }
    return recipe.methods.Dataset.from_dict(rows)


def test_pairs_are_of_one_prompt_and_of_different_scores(recipe):
    pairs = recipe.methods.pairs_of(scored(recipe))
    assert [tuple(row.values()) for row in pairs] == [
        ("FOX\n", "fox", "moon"),
        ("FOX\n", "old fox", "moon"),
    ]


def test_grpo_is_given_the_recorded_completions_in_their_order(recipe):
    tokenizer = word_tokenizer(vocabulary())
    world = SimpleNamespace(tokenizer=tokenizer, scored=scored(recipe))
    prompts = ["MOON\n"] * 3 + ["FOX\n"] * 3
    rollout = recipe.methods.fixed_completions(world)
    said = rollout(prompts, SimpleNamespace(num_generations=3))["completion_ids"]
    assert tokenizer.batch_decode(said, skip_special_tokens=True) == [
        *("moon", "pale moon", "moon moon", "fox", "moon", "old fox")
    ]
    assert {ids[-1] for ids in said} == {tokenizer.eos_token_id}


# A whole run


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    folder = tmp_path_factory.mktemp("agro")
    return folder, quick_run("agro", folder, "--processes", "1")


def test_every_method_is_measured_from_one_start(recipe, quick):
    rows = json.loads((quick[0] / "task.json").read_text(encoding="utf-8"))
    (start,) = (row for row in rows if row["method"] == "start")
    assert start["kl"] == 0.0
    for method in recipe.study.METHODS:
        found = [row for row in rows if row["method"] == method]
        assert [row["step"] for row in found] == [1, 2]
        assert all(0 <= row["accuracy"] <= 1 for row in found) and found[-1]["kl"] > 0


def test_one_round_of_grpo_with_a_ratio_holds_all_of_the_data(recipe, quick, tmp_path):
    """So that its old policy is the one that wrote them, whatever the number of passes."""
    world = recipe.world.make_world(quick[0], 0, recipe.world.SMALL)
    per_pass = len(world.scored) // world.size.prompts
    for passes in (1, 2):
        options = {"seed": 0, "folder": tmp_path, "steps": passes * per_pass}
        args = recipe.methods.make_trainer(world, "grpo_old", 1e-4, **options).args
        assert (args.steps_per_generation, args.num_iterations) == (per_pass, passes)
        assert args.generation_batch_size == len(world.scored) * world.size.completions


def test_the_fixed_data_are_scored_as_they_will_be_read(recipe, quick):
    world = recipe.world.make_world(quick[0], 0, recipe.world.SMALL)
    row = world.scored[0]
    assert row["scores"] == recipe.world.right(row["responses"], [row["keywords"]] * 4)
    model = recipe.world.load_policy(world).eval()
    ids = world.tokenizer(row["prompt"] + row["responses"][1] + " <eos>", return_tensors="pt")
    start = len(world.tokenizer(row["prompt"]).input_ids)
    logp = model(ids.input_ids).logits.log_softmax(-1)[0, :-1]
    told = logp.gather(1, ids.input_ids[0, 1:, None])[start - 1 :].sum().item()
    assert row["logps"][1] == pytest.approx(told, abs=1e-4)


def test_too_few_pairs_are_refused(recipe, quick, tmp_path):
    world = recipe.world.make_world(quick[0], 0, recipe.world.SMALL)
    few = SimpleNamespace(**{**vars(world), "scored": world.scored.take(1)})
    with pytest.raises(ValueError, match="scored=1 prompts give"):
        recipe.methods.make_trainer(few, "dpo", 1e-4, seed=0, folder=tmp_path, steps=1)


def test_it_shows_tables_and_figures(quick):
    folder, said = quick
    for expected in ("pull at π*", "accuracy − 0.1 KL", "GRPO with ratio", "AGRO − RLOO"):
        assert expected in said
    for name in ("tabular", "task"):
        assert (folder / f"{name}.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("method", ["agro", "agro_on"])
def test_policies_are_saved_with_a_sound_card(quick, method):
    home = quick[0] / "task-0" / method
    assert AutoModelForCausalLM.from_pretrained(home).num_parameters() > 1e5
    card = (home / "README.md").read_text(encoding="utf-8")
    assert card_problems(card) == [] and "accuracy" in card
