"""TRL's experimental Online DPO on fixed completions: the oracle of faults that ours lacks."""

from typing import Any

import torch
from torch import Tensor
from trl.experimental.online_dpo import OnlineDPOConfig, OnlineDPOTrainer

from tests.runs import TOKENIZER, Gradients, vowels
from tests.tiny import tiny_llama, tiny_prompts

WORDS = ("a", "bcd", "efgh", "b")  # the first completion of each prompt; the second is one longer


def their_online_dpo(
    folder: Any, accumulation: int = 1, pads: int = 0, reward: Any = vowels
) -> tuple[Tensor, dict[str, float]]:
    """Gradient of one optimizer step over four fixed pairs, before clipping, and what was logged.

    The reference is another model, so that there is a KL to log.
    """
    caught = Gradients()
    run = OnlineDPOTrainer(
        tiny_llama(len(TOKENIZER)),
        tiny_llama(len(TOKENIZER), seed=1),
        reward,
        OnlineDPOConfig(
            str(folder),
            per_device_train_batch_size=4 // accumulation,
            gradient_accumulation_steps=accumulation,
            max_steps=1,
            max_grad_norm=0.0,
            learning_rate=0.0,
            bf16=False,
            use_cpu=True,
            report_to="none",
            logging_steps=1,
            save_strategy="no",
            disable_tqdm=True,
        ),
        train_dataset=tiny_prompts(4),
        processing_class=TOKENIZER,
        callbacks=[caught],
    )
    run._generate = lambda model, prompts, images=None: (*_fixed(prompts, pads), None)
    run.train()
    return caught.steps[0], run.state.log_history[0]


def _fixed(prompts: list[str], pads: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    words = [WORDS[len(p) % 4] for p in prompts]
    completions = [*words, *(word + "e" for word in words)]
    width = 6 + pads
    ids = torch.full((len(completions), width), TOKENIZER.pad_token_id)
    mask = torch.zeros_like(ids)
    for row, text in enumerate(completions):
        tokens = [*TOKENIZER(text).input_ids, TOKENIZER.eos_token_id]
        ids[row, : len(tokens)], mask[row, : len(tokens)] = torch.tensor(tokens), 1
    prompt = TOKENIZER(prompts * 2, return_tensors="pt", padding=True)
    return prompt["input_ids"], prompt["attention_mask"], ids, mask
