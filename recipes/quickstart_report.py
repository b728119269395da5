"""What the quickstart shows: a table on the screen, curves as a PNG, a model card."""

import platform
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table
from torch import Tensor

from trl_ext import PassAtKTrainer
from trl_ext.cards import (
    CardContent,
    Paper,
    Result,
    framework_versions,
    hyperparameters_of,
    write_model_card,
)
from trl_ext.evals import EvaluationResult

if TYPE_CHECKING:
    from quickstart import Run

# Okabe and Ito's palette, which the colour-blind can tell apart.
COLOURS = {"start": "#777777", "GRPO": "#D55E00", "pass@k": "#0072B2", "majority": "#009E73"}
USAGE = """\
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("calculator-pass-at-k")
tokenizer = AutoTokenizer.from_pretrained("calculator-pass-at-k")
inputs = tokenizer("2 keys to 51 63 from 10 14\\n", return_tensors="pt")
tries = model.generate(**inputs, do_sample=True, num_return_sequences=16, max_new_tokens=10)
print(tokenizer.batch_decode(tries[:, inputs.input_ids.size(1):], skip_special_tokens=True))"""


def print_table(run: "Run", console: Console) -> None:
    """Prints each policy's numbers with standard errors, then the paired differences."""
    ks = run.results["start"].ks
    names = [f"pass@{k}" for k in ks] + [f"maj@{ks[-1]}"]
    puzzles = len(run.data["held_out"])
    title = f"{puzzles} held-out puzzles, percent, mean ± standard error"
    table = Table(title=title, title_justify="left", box=SIMPLE)
    table.add_column("policy")
    for name in names:
        table.add_column(name, justify="right")
    for policy, result in run.results.items():
        numbers = result.metrics("")
        cells = [f"{100 * numbers[n]:.1f}±{100 * numbers[f'{n}_se']:.1f}" for n in names]
        table.add_row(policy, *cells)
    console.print(table)
    for name in (names[0], f"pass@{ks[-1]}"):
        mean, error = paired(run.results["pass@k"], run.results["GRPO"], name)
        console.print(
            f"pass@k training − GRPO, {name}: {mean:+.3f} ± {error:.3f}, puzzle by puzzle"
        )


def paired(result: EvaluationResult, other: EvaluationResult, name: str) -> tuple[float, float]:
    """Mean difference over the same puzzles, and its standard error."""
    difference_P: Tensor = result.per_prompt()[name] - other.per_prompt()[name]
    return difference_P.mean().item(), (difference_P.std() / len(difference_P) ** 0.5).item()


def draw_curves(run: "Run", path: Path) -> Path:
    """Draws pass@k against k, before and after, and pass@1 and pass@16 against the step."""
    matplotlib.use("Agg")
    figure = Figure(figsize=(11, 4.4), dpi=150, layout="constrained")
    by_k, by_step = figure.subplots(1, 2)
    draw_by_k(by_k, run)
    draw_by_step(by_step, run)
    for axes in (by_k, by_step):
        axes.set_ylim(0, 1)
        axes.grid(alpha=0.25, linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    return path


def draw_by_k(axes: Axes, run: "Run") -> None:
    ks = run.results["start"].ks
    for policy, result in run.results.items():
        numbers, colour = result.metrics(""), COLOURS[policy]
        values = [numbers[f"pass@{k}"] for k in ks]
        errors = [numbers[f"pass@{k}_se"] for k in ks]
        label, dash = ("before (SFT)", "--") if policy == "start" else (policy, "-")
        axes.plot(ks, values, dash, marker="o", ms=4, color=colour, label=label)
        axes.fill_between(ks, *band(values, errors), color=colour, alpha=0.15, linewidth=0)
    axes.set_xscale("log", base=2)
    axes.set_xticks(ks, [str(k) for k in ks])
    axes.set_xlabel("k: tries per puzzle")
    axes.set_ylabel("pass@k: a right one among k tries")
    axes.set_title(f"After training, {len(run.data['held_out'])} held-out puzzles", loc="left")
    axes.legend(frameon=False, loc="upper left")


def draw_by_step(axes: Axes, run: "Run") -> None:
    most = run.results["start"].ks[-1]
    for policy, rows in run.curves.items():
        steps = [row["step"] for row in rows]
        for k, dash in ((most, "-"), (1, ":")):
            values = [row[f"eval_pass@{k}"] for row in rows]
            errors = [row[f"eval_pass@{k}_se"] for row in rows]
            colour = COLOURS[policy]
            axes.plot(steps, values, dash, marker="o", ms=3, color=colour)
            axes.fill_between(steps, *band(values, errors), color=colour, alpha=0.12, linewidth=0)
    for k, dash in ((most, "-"), (1, ":")):
        axes.plot([], [], dash, color="#444444", label=f"pass@{k}")
    axes.set_xlabel("training step")
    axes.set_ylabel("pass@k")
    axes.set_title("During training, 128 of them, 16 tries", loc="left")
    axes.legend(frameon=False, loc="upper right")


def band(values: list[float], errors: list[float]) -> tuple[list[float], list[float]]:
    """One standard error to either side."""
    pairs = list(zip(values, errors, strict=True))
    return [v - e for v, e in pairs], [v + e for v, e in pairs]


def write_card(run: "Run", folder: Path, figure: Path) -> None:
    """Writes the card of the pass@k policy, with its numbers and GRPO's beside them."""
    shutil.copy(figure, folder / figure.name)
    policy, puzzles = run.policies["pass@k"], len(run.data["held_out"])
    content = CardContent(
        title="calculator-pass-at-k",
        method="pass-at-k",
        method_name="the pass@k policy gradient",
        summary=(
            f"A Llama of {policy.num_parameters() / 1e6:.1f} million parameters that searches: it "
            "finds the keys that take a two-digit calculator from a start to a target, and shows "
            "its work. Trained so that at least one of several tries is right."
        ),
        paper=Paper(**PassAtKTrainer._paper),
        license="apache-2.0",
        dataset_note=(
            f"{len(run.data['train'])} generated calculator puzzles, "
            f"`trl_ext.data.calculator_puzzles(seed={run.options.seed})`, after a warm start on "
            f"{len(run.demonstrations)} others, worked out, that favour some of the keys."
        ),
        hyperparameters=hyperparameters_of(run.arguments["pass@k"]),
        training=training_facts(run),
        versions=framework_versions(),
        results=card_results(run.results["pass@k"], puzzles),
        figures=((figure.name, "pass@k before and after training, and during it"),),
        intended_use="To show what training for pass@k does. Sample several times and check.",
        limitations=limitations(run),
        usage=USAGE,
    )
    write_model_card(content, folder)


def training_facts(run: "Run") -> dict[str, str]:
    return {
        "Warm start": f"SFT on worked solutions, {run.seconds['warm start']:.0f} s",
        "Pass@k training": f"{run.options.steps} steps, {run.seconds['pass@k']:.0f} s",
        "Hardware": f"CPU ({platform.machine()})",
    }


def card_results(result: EvaluationResult, puzzles: int) -> tuple[Result, ...]:
    numbers = result.metrics("")
    names = [f"pass@{k}" for k in result.ks] + [f"maj@{result.ks[-1]}"]
    return tuple(
        Result("calculator puzzles", n, numbers[n], numbers[f"{n}_se"], puzzles, split="held_out")
        for n in names
    )


def limitations(run: "Run") -> str:
    most = f"pass@{run.results['start'].ks[-1]}"
    gain, one = (paired(run.results["pass@k"], run.results["GRPO"], n) for n in (most, "pass@1"))
    return (
        "It knows calculators of four keys and nothing else. Against GRPO from the same start and "
        f"with the same budget, {most} differs by {gain[0]:+.3f} ± {gain[1]:.3f} and pass@1 by "
        f"{one[0]:+.3f} ± {one[1]:.3f} (paired over puzzles)."
    )
