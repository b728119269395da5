"""Model cards: a plain description of a trained model in, a `huggingface_hub.ModelCard` out."""

from trl_ext.cards.card import (
    CardContent,
    Paper,
    Result,
    card_problems,
    model_card,
    write_model_card,
)
from trl_ext.cards.facts import framework_versions, hub_dataset_id, hub_id, hyperparameters_of

__all__ = [
    "CardContent",
    "Paper",
    "Result",
    "card_problems",
    "framework_versions",
    "hub_dataset_id",
    "hub_id",
    "hyperparameters_of",
    "model_card",
    "write_model_card",
]
