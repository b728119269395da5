"""Small models whose padding, positions and adapters matter, and how tests sample from them."""

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import GenerationConfig, GPT2Config, GPT2LMHeadModel

from tests.tiny import tiny_llama

VOCAB, EOS, PAD = 23, 2, 0
PROMPTS = [[5, 6, 7, 8], [9], [10, 11], [12, 13, 14]]


def tiny_gpt2(seed: int = 0) -> GPT2LMHeadModel:
    """Absolute positions: a model that notices when pads are counted."""
    config = GPT2Config(
        vocab_size=VOCAB, n_positions=64, n_embd=16, n_layer=2, n_head=2, initializer_range=0.5
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return GPT2LMHeadModel(config).eval()


def sharp_llama(seed: int = 0):
    """Logits far from uniform, so that two of these models disagree."""
    model = tiny_llama(VOCAB, seed, hidden=16).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(10.0)
    return model


def adapted(model, seed: int = 0) -> PeftModel:
    """The model under a LoRA that changes it."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = LoraConfig(
            r=2, lora_alpha=32, target_modules=["q_proj", "v_proj"], init_lora_weights=False
        )
        return get_peft_model(model, config)


def generation_config(**options) -> GenerationConfig:
    """As TRL builds it."""
    defaults = {
        "max_new_tokens": 8,
        "do_sample": True,
        "temperature": 1.0,
        "top_k": 0,
        "top_p": 1.0,
        "repetition_penalty": 1.0,
        "pad_token_id": PAD,
        "eos_token_id": [EOS],
        "disable_compile": True,
    }
    return GenerationConfig(**{**defaults, **options})
