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
from tests.exact import PROMPTS, cosine, gradient_of, law_of, sequence_kl, tabular
from tests.trainers import test_exact_agro as agro
from tests.trainers import test_exact_credit as credit
from tests.trainers import test_exact_jepo as jepo
from tests.trainers import test_exact_kl as kl
from tests.trainers import test_exact_mtpo as mtpo
from tests.trainers import test_exact_nash as nash
from tests.trainers import test_exact_pairs as pairs
from tests.trainers import test_exact_vineppo as vineppo
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


def pair_rows() -> list[Row]:
    rows: list[Row] = []
    drawn, exact = pairs.drawn_pairs(pairs.REWARDS), pairs.policy_gradient()
    for name, (options, loss) in pairs.LOSSES.items():
        run = lambda f, o={"loss_type": name, **options}: pairs.run(f, **o)  # noqa: E731
        rows.append((f"trl_ext {name}", "∇E ℓ", run, pairs.gradient_of_pairs(drawn, loss)))
    for name, (options, loss) in pairs.DIVERGENCES.items():
        run = lambda f, o={"f_divergence": name, **options}: pairs.run(f, **o)  # noqa: E731
        rows.append((f"trl_ext f-DPO, {name}", "∇E ℓ", run, pairs.gradient_of_pairs(drawn, loss)))
    second = dict(sampler=pairs.NEAR, num_iterations=2)
    for name, options in {
        "rloo": dict(loss_type="rloo"),
        "rloo, stale samples": dict(loss_type="rloo", **second),
        "proximal_rloo, stale samples": dict(loss_type="proximal_rloo", epsilon=0.9, **second),
    }.items():
        run = lambda f, o=options: pairs.run(f, **o)  # noqa: E731
        rows.append((f"trl_ext {name}", "∇(βKL − E r)", run, exact))
    laws = [law_of(pairs.POLICY), law_of(pairs.REFERENCE)]
    xpo = lambda f: pairs.run(f, loss_type="xpo", xpo_alpha=0.3, laws=laws)  # noqa: E731
    rows.append(("trl_ext xpo", "∇E ℓ", xpo, pairs.xpo_gradient(0.3)))
    target = pairs.hybrid_gradient(kl_coef=0.7)
    return [*rows, ("trl_ext hybrid, K=4", "∇(ℓ + λ KL)", pairs.hybrid, target)]


def nash_rows() -> list[Row]:
    beta, policy, old = nash.BETA, law_of(nash.POLICY), law_of(nash.OTHER)
    mixed = law_of(nash.mixture(nash.POLICY))
    self_play, step = nash.game_gradient(policy), dict(eta=nash.ETA, sampler=nash.OTHER)
    inpo = gradient_of(nash.inpo_loss(nash.OTHER), nash.POLICY)
    fresh, stale = dict(beta=beta), dict(beta=beta, sampler=nash.OTHER)
    rows: list[Row] = []
    for name, objective, options, target in [
        ("spo", "β∇KL − ∇P(π ≻ sg π)", fresh, self_play),
        ("spo, stale samples", "… sg π_t", stale, nash.game_gradient(old)),
        ("nash_md", "… sg mixture", dict(laws=[policy, mixed], **fresh), nash.game_gradient(mixed)),
        ("inpo", "∇ loss (7)", dict(beta=nash.TAU, **step), inpo),
        ("dno", "∇ cross-entropy", step, nash.dno_gradient(2)),
        ("dno_prct", "∇E −log σ", step, nash.dno_prct_gradient(2)),
    ]:
        algorithm = name.partition(",")[0]
        run = lambda f, a=algorithm, o=options: nash.run(f, a, **o)  # noqa: E731
        rows.append((f"trl_ext {name}", objective, run, target))
    token = lambda f: nash.regulariser(f, nash.TokenByToken)  # noqa: E731
    return [
        *rows,
        ("trl_ext nash_mp", "… and KL(π‖target)", nash.mirror_prox, nash.mirror_prox_gradient()),
        (
            "trl_ext online IPO, soft labels",
            "4/β · self-play",
            nash.online_ipo,
            4 / beta * self_play,
        ),
        ("trl_ext nash_md, regulariser", "∇KL(π‖ref)", nash.regulariser, nash.kl_gradient()),
        ("TRL's former Nash-MD, regulariser", "∇KL(π‖ref)", token, nash.kl_gradient()),
    ]


def agro_rows() -> list[Row]:
    policy, foreign = agro.POLICY, agro.FOREIGN
    other = gradient_of(lambda w: agro.half_variance(w, foreign), policy)
    rows: list[Row] = []
    for name, objective, options, target in [
        ("agro", "∇(βKL − E r)", {}, gradient_of(agro.regularised_objective, policy)),
        ("agro, any completions", "∇½Var_μ(R)/β", dict(laws=[foreign] * 2), other),
        (
            "agro, stale samples",
            "∇½Var_μ(R)/β",
            dict(sampler=agro.OTHER, num_iterations=2),
            other,
        ),
        (
            "agro, mode=full",
            "∇½Var_π(R)/β",
            dict(mode="full"),
            gradient_of(lambda w: agro.half_variance(w, law_of(w)), policy),
        ),
        (
            "copg, any completions",
            "∇½Var_μ(R)/β",
            dict(loss_type="copg", laws=[foreign] * 2),
            other,
        ),
        (
            "topr, stale samples",
            "−E_μ w r ∇log π",
            dict(agro.TOPR, sampler=agro.OTHER, num_iterations=2),
            gradient_of(agro.tapered(agro.OTHER), policy),
        ),
    ]:
        run = lambda f, o=options: agro.run(f, **o)  # noqa: E731
        rows.append((f"trl_ext {name}", objective, run, target))
    return rows


def jepo_rows() -> list[Row]:
    rows: list[Row] = []
    for name, n, objective in (("single", 2, 1), ("multi", 2, 2), ("multi", 3, 3)):
        target = gradient_of(lambda w, n=objective: -jepo.bound(w, n), jepo.POLICY)
        run = lambda f, o=dict(bound=name, num_generations=n): jepo.run(f, **o)  # noqa: E731
        rows.append((f"trl_ext jepo, {name}, n={n}", f"−∇L_{objective}", run, target))
    verifree = lambda f: jepo.run(f, bound="verifree", num_generations=2)  # noqa: E731
    likelihood = gradient_of(jepo.negative_likelihood, jepo.POLICY)
    return [*rows, ("trl_ext jepo, verifree", "−∇π(a*|x)", verifree, likelihood)]


def mtpo_rows() -> list[Row]:
    tree, mixture = mtpo.SHORT, mtpo.MIXTURE
    self_play = tree.game(tree.beaten_by(mtpo.POLICY))
    step = tree.mirror_step(mixture, tree.beaten_by(mixture))
    near = tree.mirror_step(mtpo.NEAR, tree.beaten_by(mtpo.NEAR))
    rows: list[Row] = []
    for name, objective, options, target in [
        ("mtpo, two turns", "∇(βKL_p − P(π ≻ sg π))", {}, self_play),
        ("mtpo, two turns, turn_kl=vocab", "the same", dict(turn_kl="vocab"), self_play),
        (
            "mtpo, second pass",
            "mirror step from π_t",
            dict(sampler=mtpo.NEAR, leader=mtpo.NEAR),
            near,
        ),
        ("mtpo, tau", "… from the mixture", dict(tau=mtpo.TAU, leader=mixture), step),
    ]:
        run = lambda f, o=options: mtpo.dialogues(f, **o)  # noqa: E731
        rows.append((f"trl_ext {name}", objective, run, target))
    return rows


def vineppo_rows() -> list[Row]:
    rows: list[Row] = []
    for name, eos_step in (("", True), (", eos_step=False where a step may end the text", False)):
        run = lambda f, own=eos_step: vineppo.of_groups(f, eos_step=own)  # noqa: E731
        rows.append((f"trl_ext vineppo, K=1{name}", "∇E r", run, vineppo.expected()))
    return rows


def main() -> None:
    rows = [*kl_rows(), *credit_rows(), *pair_rows(), *nash_rows(), *agro_rows(), *jepo_rows()]
    rows += [*mtpo_rows(), *vineppo_rows()]
    reload = grpo_trainer.create_model_from_path
    table = Table("Estimator", "Objective", "1 − cosine", "length", "relative error")
    try:
        grpo_trainer.create_model_from_path = lambda *_, **__: tabular(kl.REFERENCE)
        for name, objective, run, target in track(rows, "Enumerating"):
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
