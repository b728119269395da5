"""The sampler that works ahead for a trainer: a process on this machine, or TRL's vLLM server."""

import dataclasses
import math
from typing import Any

import torch
from accelerate.utils import broadcast_object_list

from trl_ext.rollouts import ProcessSampler, Rollout, Sampler, ServerSampler

AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


def background_sampler(trainer: Any) -> Sampler:
    """The engine of `schedule="one_step"` that fits this trainer's options."""
    args = trainer.args
    if trainer.use_vllm:
        return ServerSampler(
            trainer.vllm_generation.sync_weights,
            lambda prompt_ids, _: _served(trainer, prompt_ids),
            timeout_s=args.sampler_timeout,
        )
    return ProcessSampler(
        trainer.accelerator.unwrap_model(trainer.model),
        trainer.generation_config,
        eos_token_ids=trainer.eos_token_ids,
        temperature=args.scoring_temperature,
        rows_per_pass=args.per_device_train_batch_size,
        pad_to_multiple_of=trainer.pad_to_multiple_of,
        opponent_model=trainer.opponent_model if trainer.opponent else None,
        device=args.sampler_device,
        timeout_s=args.sampler_timeout,
        autocast_dtype=AUTOCAST.get(trainer.accelerator.mixed_precision),
    )


def refuse_what_a_sampler_lacks(trainer: Any, *, sees_images: bool) -> None:
    """What needs the trainer's own objects cannot be sampled elsewhere."""
    refused = {
        "tools": (trainer.tools, "the sampler calls none"),
        "environment_factory": (trainer.environment_factories, "the sampler has no environment"),
        "rollout_func": (trainer.rollout_func, "it samples in the trainer itself"),
        "a vision-language model": (sees_images, "the sampler is sent token ids only"),
        "FSDP or DeepSpeed without vLLM": (
            trainer.sharded and not trainer.use_vllm,
            "no process holds all the weights that a background sampler needs",
        ),
    }
    for what, (given, reason) in refused.items():
        if given:
            raise ValueError(
                f"{what} is not supported with schedule='one_step': {reason}. Use schedule='sync'."
            )


def _served(trainer: Any, prompt_ids: list[list[int]]) -> tuple[list, list]:
    """In a thread: the completions of all processes' prompts, asked for by the main process."""
    if not trainer.accelerator.is_main_process:
        return [], []
    server = trainer.vllm_generation
    samples = len(prompt_ids) * trainer.num_generations // trainer.args.generation_batch_size
    answer = server.vllm_client.generate(
        prompts=prompt_ids[::samples],
        n=samples,
        repetition_penalty=server.repetition_penalty,
        temperature=server.temperature,
        top_p=server.top_p,
        top_k=server.top_k,
        min_p=0.0 if server.min_p is None else server.min_p,
        max_tokens=server.max_completion_length,
        logprobs=0,
        structured_outputs_regex=server.structured_outputs_regex,
        generation_kwargs=server.generation_kwargs,
    )
    logprobs = [[math.nan if p[0] is None else p[0] for p in row] for row in answer["logprobs"]]
    return answer["completion_ids"], logprobs


def own_share(trainer: Any, rollout: Rollout) -> Rollout:
    """This process's rows of what the server told the main process."""
    accelerator = trainer.accelerator
    if not trainer.use_vllm or accelerator.num_processes == 1:
        return rollout
    told = [(rollout.completion_ids, rollout.logprobs)]
    broadcast_object_list(told)
    rows = len(told[0][0]) // accelerator.num_processes
    mine = slice(rows * accelerator.process_index, rows * (accelerator.process_index + 1))
    ids, logprobs = told[0]
    own = logprobs and logprobs[mine]
    return dataclasses.replace(rollout, completion_ids=ids[mine], logprobs=own)
