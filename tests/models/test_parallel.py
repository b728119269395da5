"""Two processes that share out heads, parameters, layers or rows equal one process."""

import pytest
import torch

from tests.models.variants import BOTH, VARIANTS, gradients, largest, tiny, tokens
from tests.processes import run_two_ranks

CLOSE = 1e-5
NEW = 4
MASK = torch.ones(2, 9, dtype=torch.long)
MASK[0, :3] = 0
IDS = tokens(2, 9)
BATCH = {"input_ids": IDS, "attention_mask": MASK, "labels": IDS}
SHARED = {"tensor": list(VARIANTS), "sharded": BOTH, "pipeline": BOTH, "replicated": BOTH}
EACH = [(way, variant) for way, variants in SHARED.items() for variant in variants]


def without(left_out):
    return [(way, variant) for way, variant in EACH if way != left_out]


@pytest.fixture(scope="module")
def facts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    for variant in VARIANTS:
        tiny(variant).save_pretrained(folder / variant)
    run_two_ranks(lambda rank: ["-m", "tests.models.two_ranks", str(folder)])
    return torch.load(folder / "facts.pt")


@pytest.mark.parametrize(("way", "variant"), without("pipeline"))
def test_gradients(facts, way, variant):
    model = tiny(variant)
    expected = gradients(model, model(**BATCH).loss)
    difference = facts[f"{way} {variant}"]["gradients"] - expected
    assert difference.norm() < CLOSE * expected.norm()


@pytest.mark.parametrize(("way", "variant"), without("replicated"))
def test_logits_and_generation(facts, way, variant):
    model, fact = tiny(variant), facts[f"{way} {variant}"]
    assert largest(fact["logits"], model(**BATCH).logits) < CLOSE
    said = model.generate(IDS, attention_mask=MASK, max_new_tokens=NEW, do_sample=False)
    assert torch.equal(fact["said None"], said) and torch.equal(fact["said static"], said)


@pytest.mark.parametrize(("way", "variant"), EACH)
def test_a_rank_keeps_about_half(facts, way, variant):
    """Or else nothing was shared out, and two processes computed the same."""
    share = facts[f"{way} {variant}"]["kept"] / tiny(variant).num_parameters()
    assert share == 1 if way == "replicated" else 0.45 < share < 0.65
