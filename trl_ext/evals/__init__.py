"""Numbers that recipes report and nobody trains on."""

from trl_ext.evals.callback import GenerationEvaluator
from trl_ext.evals.generation import evaluate_generations
from trl_ext.evals.metrics import generation_metrics, pass_hat_k
from trl_ext.evals.options import EvaluationOptions
from trl_ext.evals.result import EvaluationResult

__all__ = [
    "EvaluationOptions",
    "EvaluationResult",
    "GenerationEvaluator",
    "evaluate_generations",
    "generation_metrics",
    "pass_hat_k",
]
