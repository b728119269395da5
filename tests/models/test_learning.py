"""Associative recall learned at one length and asked at four times that length.

A row names one value for each key, early on and among filler; later tokens ask for keys. Nothing
but the row itself says the answer, so that without recall one answer in four is right.
"""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.models.variants import CAUSAL, VARIANTS

LENGTH = 16
KEYS = VALUES = FILLERS = 4
NAMED, ASKED = KEYS * VALUES, KEYS  # tokens: (key, value), key, filler
VOCABULARY = NAMED + ASKED + FILLERS


def rows(n: int, length: int, draw: torch.Generator) -> tuple[Tensor, Tensor]:
    """Tokens and answers, both `(n, length)`; -100 where nothing is asked."""
    ids = torch.randint(NAMED + ASKED, VOCABULARY, (n, length), generator=draw)
    half, questions = length // 2, length // 4
    values = torch.randint(VALUES, (n, KEYS), generator=draw)
    places = torch.rand(n, half, generator=draw).argsort(1)[:, :KEYS]
    ids.scatter_(1, places, torch.arange(KEYS) * VALUES + values)
    places = half + torch.rand(n, half, generator=draw).argsort(1)[:, :questions]
    asked = torch.randint(KEYS, (n, questions), generator=draw)
    ids.scatter_(1, places, NAMED + asked)
    return ids, torch.full_like(ids, -100).scatter_(1, places, values.gather(1, asked))


def learn(variant: str, seed: int, rate: float, steps: int = 150):
    """One layer, from scratch, with a warm-up and a linear decay."""
    config, _ = VARIANTS[variant]
    torch.manual_seed(seed)
    model = CAUSAL[config](
        config(
            vocab_size=VOCABULARY,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=1,
            num_attention_heads=2,
            initializer_range=0.1,
            use_cache=False,
        )
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.95), weight_decay=0)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1, (step + 1) / 20) * (1 - step / steps)
    )
    draw = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        ids, answers = rows(64, LENGTH, draw)
        loss = F.cross_entropy(model(ids).logits.flatten(0, 1), answers.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return model.eval()


@torch.no_grad()
def right(model, length: int) -> float:
    """Share of right answers."""
    ids, answers = rows(256, length, torch.Generator().manual_seed(99))
    asked = answers != -100
    return (model(ids).logits.argmax(-1) == answers)[asked].float().mean().item()


SEEDS = [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in (1, 2))]


@pytest.mark.parametrize("seed", SEEDS)
class TestRecall:
    def test_stick_breaking_keeps_it_at_four_times_the_length(self, seed):
        model = learn("stickbreaking", seed, rate=5e-3)
        assert right(model, LENGTH) > 0.99 and right(model, 4 * LENGTH) > 0.99

    def test_tapa_keeps_most_of_it(self, seed):
        """Its softmax spreads over four times the filler."""
        model = learn("tapa", seed, rate=3e-3)
        assert right(model, LENGTH) > 0.99 and right(model, 4 * LENGTH) > 0.8
