"""Numbers that recipes report and nobody trains on."""

from trl_ext.evals.callback import GenerationEvaluator
from trl_ext.evals.drift import Drift, DriftOptions, policy_drift
from trl_ext.evals.generation import evaluate_generations
from trl_ext.evals.kl_budget import KLBudget
from trl_ext.evals.metrics import generation_metrics, pass_hat_k
from trl_ext.evals.options import BatchOptions, EvaluationOptions, SamplingOptions
from trl_ext.evals.preference_classifier import (
    PreferenceClassifier,
    PreferenceOptions,
    PreferenceResult,
    evaluate_preferences,
)
from trl_ext.evals.result import EvaluationResult
from trl_ext.evals.win_rate import (
    WinRateEvaluator,
    WinRateOptions,
    WinRateResult,
    evaluate_win_rate,
    sample_opponent,
)

__all__ = [
    "BatchOptions",
    "Drift",
    "DriftOptions",
    "EvaluationOptions",
    "EvaluationResult",
    "GenerationEvaluator",
    "KLBudget",
    "PreferenceClassifier",
    "PreferenceOptions",
    "PreferenceResult",
    "SamplingOptions",
    "WinRateEvaluator",
    "WinRateOptions",
    "WinRateResult",
    "evaluate_generations",
    "evaluate_preferences",
    "evaluate_win_rate",
    "generation_metrics",
    "pass_hat_k",
    "policy_drift",
    "sample_opponent",
]
