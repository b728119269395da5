"""Run by `test_invariance.py` on two ranks: one optimizer step of each trainer on two ranks."""

import sys
from pathlib import Path

import torch
import trl

import tests.conftest  # noqa: F401  the settings of every test
from tests.processes import leave
from tests.runs import OF_TOKENS, build, parameters
from tests.trainers.test_invariance import GROUP_CASES, ON_TWO_RANKS, gradient_of_one_step
from trl_ext import GRPOTrainer, OnlineDPOTrainer, VinePPOTrainer

# Four rows on each rank: a group of eight is split over both.
CASES = {
    "dr_grpo": {"loss_type": "dr_grpo", "num_generations": 8},
    "dapo": {"loss_type": "dapo", "num_generations": 8},
    "baseline": {"loss_type": "dr_grpo", "kl_baseline": "leave_one_out", "num_generations": 8},
    "vocab": {"loss_type": "luspo", "kl_gradient": "sequence_vocab"},
}


def main(folder: Path) -> None:
    found: dict = {"groups": {}, "rows": {}}
    for trainer in OF_TOKENS:
        for name, options in CASES.items():
            gradient, _ = gradient_of_one_step(trainer, folder, rows=4, **options)
            found[f"{trainer.__name__} {name}"] = gradient
    for name in ON_TWO_RANKS:
        trainer, options = GROUP_CASES[name]
        gradient, row = gradient_of_one_step(trainer, folder, rows=4, **options)
        found["groups"][name], found["rows"][name] = gradient, row
    whitened = dict(CASES["dr_grpo"], whiten=True)
    found["whitened"], _ = gradient_of_one_step(VinePPOTrainer, folder, rows=4, **whitened)
    found["mutated: local token count"] = with_local_token_count(folder)
    found["mutated: rewards of rank 0"] = with_rewards_of_rank_0(folder)
    for name, trainer, own in (
        ("ours", GRPOTrainer, {"beta": 0.0}),
        ("theirs", trl.GRPOTrainer, {}),
    ):
        run = build(trainer, folder / name, max_steps=3, per_device_train_batch_size=2, **own)
        run.train()
        found[name] = parameters(run)
    if torch.distributed.get_rank() == 0:
        torch.save(found, folder / "gradients.pt")
    leave()


def with_local_token_count(folder: Path) -> torch.Tensor:
    """The bug of row 2: each rank divides by its own tokens."""
    honest = GRPOTrainer._generate_and_score_completions

    def local(self, inputs):
        output = honest(self, inputs)
        output["num_items_in_batch"] = output["completion_mask"].sum() * 2
        return output

    GRPOTrainer._generate_and_score_completions = local
    try:
        return gradient_of_one_step(GRPOTrainer, folder, rows=4, **CASES["dapo"])[0]
    finally:
        GRPOTrainer._generate_and_score_completions = honest


def with_rewards_of_rank_0(folder: Path) -> torch.Tensor:
    """A bug of row 2: each rank takes the first of the gathered rewards for its own."""
    honest = OnlineDPOTrainer._calculate_rewards

    def first(self, *args):
        rewards_BF = honest(self, *args)
        self._rewards_B = self._rewards_B[: len(self._rewards_B) // 2].repeat(2)
        return rewards_BF

    OnlineDPOTrainer._calculate_rewards = first
    try:
        return gradient_of_one_step(OnlineDPOTrainer, folder, rows=4)[0]
    finally:
        OnlineDPOTrainer._calculate_rewards = honest


if __name__ == "__main__":
    main(Path(sys.argv[1]))
