"""The base vanishes: our route with TRL's formula computes what TRL computes."""

import pytest
import torch

from tests.runs import build, parameters, relative
from tests.trainers.test_invariance import LOSSES, gradient_of_one_step
from trl_ext import GRPOTrainer
from trl_ext.objectives.kl import k3
from trl_ext.trainers._seam import CreditTrainer, Tokens


class OwnRouteToTheTokenKL(GRPOTrainer):
    """TRL's default KL, computed by `kl_loss` and `reduce_tokens` instead of TRL."""

    owns_kl = True

    def kl_loss(self, tokens: Tokens) -> torch.Tensor:
        ratio_BT = torch.exp(tokens.logp_BT - tokens.old_logp_BT)
        return ratio_BT * k3(tokens.logp_BT, tokens.ref_logp_BT)


class OwnRouteToTheAdvantage(GRPOTrainer):
    """TRL's advantage, computed by `credit`."""

    def credit(self, rewards_PG: torch.Tensor) -> torch.Tensor:
        return rewards_PG - rewards_PG.mean(1, keepdim=True)


@pytest.fixture(autouse=True)
def as_grpo(monkeypatch):
    import tests.runs as runs

    for own in (OwnRouteToTheTokenKL, OwnRouteToTheAdvantage):
        monkeypatch.setitem(runs.METHODS, own, runs.METHODS[GRPOTrainer])


@pytest.mark.parametrize("accumulation", [1, 4])
@pytest.mark.parametrize("loss_type", [*LOSSES, "bnpo", "vespo"])
def test_kl_is_normalised_as_trl_normalises_it(loss_type, accumulation, tmp_path):
    options = dict(loss_type=loss_type, accumulation=accumulation, beta=1.0, kl_gradient="token")
    ours, row = gradient_of_one_step(OwnRouteToTheTokenKL, tmp_path, **options)
    theirs, their_row = gradient_of_one_step(GRPOTrainer, tmp_path, **options)
    assert relative(ours, theirs) <= 1e-5
    assert row["loss"] == pytest.approx(their_row["loss"], rel=1e-4, abs=1e-7)
    assert row["kl"] == pytest.approx(their_row["kl"], rel=1e-5)


def test_kl_is_not_divided_by_the_accumulation_in_evaluation(tmp_path):
    from tests.tiny import tiny_prompts

    losses = []
    for trainer in (OwnRouteToTheTokenKL, GRPOTrainer):
        options = dict(kl_gradient="token", gradient_accumulation_steps=2, learning_rate=0.1)
        arguments = {"eval_dataset": tiny_prompts(4)}
        run = build(trainer, tmp_path, arguments=arguments, beta=1.0, **options)
        run.train()
        torch.manual_seed(0)
        losses.append(run.evaluate()["eval_loss"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_credit_equal_to_trls_advantage_gives_trls_parameters(tmp_path):
    runs = []
    for trainer in (OwnRouteToTheAdvantage, GRPOTrainer):
        run = build(trainer, tmp_path, scale_rewards="none", beta=0.0, max_steps=3)
        run.train()
        runs.append(parameters(run))
    assert torch.equal(*runs)


def test_completions_table_shows_our_credit(tmp_path):
    import pandas as pd

    from trl_ext import PassAtKTrainer

    run = build(PassAtKTrainer, tmp_path, log_completions=True, max_steps=1, k=2)
    run.train()
    table = pd.read_parquet(tmp_path / "completions" / "completions_00001.parquet")
    rewards = torch.tensor(table["vowels"].to_numpy()).view(-1, 4)
    expected = run.credit(rewards).flatten()
    torch.testing.assert_close(
        torch.tensor(table["advantage"].to_numpy()), expected, rtol=1e-6, atol=0
    )
    assert expected.sum() > 0, "TRL's own advantages sum to 0"


def test_hooks_left_alone_are_not_called():
    for hook in ("credit", "kl_loss"):
        with pytest.raises(NotImplementedError):
            getattr(CreditTrainer, hook)(None, None)
