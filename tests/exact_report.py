"""`python -m tests.exact_report`: the harness as a table, TRL's own estimators beside ours.

Cosine and relative error between what a trainer gives the optimizer on average, by enumeration, and
autograd of the objective named in the row. The length is the ratio of the norms.
"""

import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
import trl
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor
from trl.trainer import grpo_trainer

import tests.conftest  # noqa: F401  the settings of every test
from tests.exact import PROMPTS, cosine, gradient_of, sequence_kl, tabular
from tests.trainers import test_exact_credit as credit
from tests.trainers import test_exact_kl as kl
from trl_ext import PassAtKConfig, PassAtKTrainer

Row = tuple[str, str, Callable[[Path], Tensor], Tensor]


def kl_rows() -> list[Row]:
    target = gradient_of(lambda w: sequence_kl(w, kl.REFERENCE, PROMPTS[0]), kl.POLICY)
    ours = [(f"trl_ext kl_gradient={name}", {"kl_gradient": name}) for name in kl.GRADIENTS]
    rows: list[Row] = [
        (name, "∇KL(π‖ref)", lambda f, o=options: kl.run(f, **o), target) for name, options in ours
    ]
    for corrected in (True, False):
        options = dict(config=trl.GRPOConfig, trainer=trl.GRPOTrainer)
        options["use_bias_correction_kl"] = corrected
        name = f"TRL use_bias_correction_kl={corrected}"
        rows.append((name, "∇KL(π‖ref)", lambda f, o=options: kl.run(f, **o), target))
    return rows


def credit_rows() -> list[Row]:
    rows: list[Row] = []
    for name, k, G, objective in [*credit.CASES, ("analytic", 2, 4, 2)]:
        rewards = credit.BINARY if name == "analytic" else credit.CONTINUOUS
        options = dict(k=k, estimator=name, num_generations=G)
        arguments = (PassAtKConfig, PassAtKTrainer, rewards, PROMPTS[0])
        target = credit.pass_at_k(objective, rewards, PROMPTS[0])
        run = lambda f, a=arguments, o=options: credit.run(f, *a, **o)  # noqa: E731
        rows.append((f"trl_ext {name}, k={k}, G={G}", f"∇F_{objective}", run, target))
    for k, G in ((2, 3), (3, 4)):
        run = lambda f, k=k, G=G: credit.run_vote(f, k=k, num_generations=G)  # noqa: E731
        target = credit.vote_gradient(k, "null")
        rows.append((f"trl_ext majority vote, k={k}, G={G}", f"∇maj@{k}", run, target))
    for scale, loss_type, k in (("none", "dr_grpo", 1), ("group", "dapo", 1), ("group", "dapo", 2)):
        options = dict(num_generations=3, scale_rewards=scale, loss_type=loss_type)
        arguments = (trl.GRPOConfig, trl.GRPOTrainer, credit.CONTINUOUS, PROMPTS[0])
        target = credit.pass_at_k(k, credit.CONTINUOUS, PROMPTS[0])
        run = lambda f, a=arguments, o=options: credit.run(f, *a, **o)  # noqa: E731
        rows.append((f"TRL {loss_type}, scale_rewards={scale}, G=3", f"∇F_{k}", run, target))
    return rows


def main() -> None:
    reload = grpo_trainer.create_model_from_path
    table = Table("Estimator", "Objective", "1 − cosine", "length", "relative error")
    try:
        grpo_trainer.create_model_from_path = lambda *_, **__: tabular(kl.REFERENCE)
        for name, objective, run, target in track([*kl_rows(), *credit_rows()], "Enumerating"):
            with tempfile.TemporaryDirectory() as folder:
                actual = run(Path(folder))
            table.add_row(
                name,
                objective,
                f"{abs(1 - cosine(actual, target)):.1e}",
                f"{float(actual.norm() / target.norm()):.6f}",
                f"{float((actual - target).norm() / target.norm()):.1e}",
            )
    finally:
        grpo_trainer.create_model_from_path = reload
    Console(width=110).print(table)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
