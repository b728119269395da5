"""trl_ext: post-training methods that TRL lacks or gets wrong, as ordinary TRL trainers."""

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0.dev0"

# Python runs this file before any `trl_ext.objectives...`, so one eager import here would end the
# purity of that floor. One line per method: public name -> the module that defines it.
_PUBLIC = {
    "AGROConfig": "trl_ext.trainers.agro",
    "AGROTrainer": "trl_ext.trainers.agro",
    "GRPOConfig": "trl_ext.trainers.grpo",
    "GRPOTrainer": "trl_ext.trainers.grpo",
    "GenerationEvaluator": "trl_ext.evals",
    "JEPOConfig": "trl_ext.trainers.jepo",
    "JEPOTrainer": "trl_ext.trainers.jepo",
    "KLBudget": "trl_ext.evals",
    "MTPOConfig": "trl_ext.trainers.mtpo",
    "MTPOTrainer": "trl_ext.trainers.mtpo",
    "MajorityVoteConfig": "trl_ext.trainers.majority_vote",
    "MajorityVoteTrainer": "trl_ext.trainers.majority_vote",
    "MeanProbabilityReward": "trl_ext.trainers.mean_probability",
    "NashConfig": "trl_ext.trainers.nash",
    "NashTrainer": "trl_ext.trainers.nash",
    "OnlineDPOConfig": "trl_ext.trainers.online_dpo_config",
    "OnlineDPOTrainer": "trl_ext.trainers.online_dpo",
    "PassAtKConfig": "trl_ext.trainers.pass_at_k",
    "PassAtKTrainer": "trl_ext.trainers.pass_at_k",
    "PreferenceClassifier": "trl_ext.evals",
    "StickBreakingConfig": "trl_ext.models",
    "StickBreakingForCausalLM": "trl_ext.models",
    "StickBreakingModel": "trl_ext.models",
    "TapaConfig": "trl_ext.models",
    "TapaForCausalLM": "trl_ext.models",
    "TapaModel": "trl_ext.models",
    "VinePPOConfig": "trl_ext.trainers.vineppo",
    "VinePPOTrainer": "trl_ext.trainers.vineppo",
    "WinRateEvaluator": "trl_ext.evals",
    "evaluate_generations": "trl_ext.evals",
    "evaluate_preferences": "trl_ext.evals",
    "evaluate_win_rate": "trl_ext.evals",
    "policy_drift": "trl_ext.evals",
}

__all__ = ["__version__", *_PUBLIC]

if TYPE_CHECKING:
    from trl_ext.evals import GenerationEvaluator as GenerationEvaluator
    from trl_ext.evals import KLBudget as KLBudget
    from trl_ext.evals import PreferenceClassifier as PreferenceClassifier
    from trl_ext.evals import WinRateEvaluator as WinRateEvaluator
    from trl_ext.evals import evaluate_generations as evaluate_generations
    from trl_ext.evals import evaluate_preferences as evaluate_preferences
    from trl_ext.evals import evaluate_win_rate as evaluate_win_rate
    from trl_ext.evals import policy_drift as policy_drift
    from trl_ext.models import StickBreakingConfig as StickBreakingConfig
    from trl_ext.models import StickBreakingForCausalLM as StickBreakingForCausalLM
    from trl_ext.models import StickBreakingModel as StickBreakingModel
    from trl_ext.models import TapaConfig as TapaConfig
    from trl_ext.models import TapaForCausalLM as TapaForCausalLM
    from trl_ext.models import TapaModel as TapaModel
    from trl_ext.trainers.agro import AGROConfig as AGROConfig
    from trl_ext.trainers.agro import AGROTrainer as AGROTrainer
    from trl_ext.trainers.grpo import GRPOConfig as GRPOConfig
    from trl_ext.trainers.grpo import GRPOTrainer as GRPOTrainer
    from trl_ext.trainers.jepo import JEPOConfig as JEPOConfig
    from trl_ext.trainers.jepo import JEPOTrainer as JEPOTrainer
    from trl_ext.trainers.majority_vote import MajorityVoteConfig as MajorityVoteConfig
    from trl_ext.trainers.majority_vote import MajorityVoteTrainer as MajorityVoteTrainer
    from trl_ext.trainers.mean_probability import MeanProbabilityReward as MeanProbabilityReward
    from trl_ext.trainers.mtpo import MTPOConfig as MTPOConfig
    from trl_ext.trainers.mtpo import MTPOTrainer as MTPOTrainer
    from trl_ext.trainers.nash import NashConfig as NashConfig
    from trl_ext.trainers.nash import NashTrainer as NashTrainer
    from trl_ext.trainers.online_dpo import OnlineDPOTrainer as OnlineDPOTrainer
    from trl_ext.trainers.online_dpo_config import OnlineDPOConfig as OnlineDPOConfig
    from trl_ext.trainers.pass_at_k import PassAtKConfig as PassAtKConfig
    from trl_ext.trainers.pass_at_k import PassAtKTrainer as PassAtKTrainer
    from trl_ext.trainers.vineppo import VinePPOConfig as VinePPOConfig
    from trl_ext.trainers.vineppo import VinePPOTrainer as VinePPOTrainer


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(importlib.import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
