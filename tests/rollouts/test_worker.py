"""A trainer's model on its way into the sampling process, with all that TRL hung onto it."""

import gc
import os

import pytest
import torch
import trl
from peft import LoraConfig
from transformers import GPT2Config, GPT2LMHeadModel

import trl_ext
from tests.rollouts.models import EOS, PROMPTS, adapted, generation_config, sharp_llama, tiny_gpt2
from tests.tiny import tiny_llama, tiny_prompts, tiny_tokenizer
from trl_ext.rollouts import Opponent, Request, process, sample
from trl_ext.rollouts._snapshot import Snapshot, named_tensors
from trl_ext.rollouts._worker import Job, Numerics, Setup, Worker, training_flags

TOKENIZER = tiny_tokenizer()
LORA = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)


def absolute_model():
    config = GPT2Config(
        vocab_size=len(TOKENIZER), n_positions=64, n_embd=16, n_layer=2, n_head=2, bos_token_id=1
    )
    config.eos_token_id = 2
    return GPT2LMHeadModel(config)


def trainer_of(folder, model=None, source=trl, **options):
    """A trainer whose model is prepared as `train` prepares it."""
    peft_config = options.pop("peft_config", None)
    model = tiny_llama(len(TOKENIZER)) if model is None else model
    model.save_pretrained(folder / "base")  # where TRL loads the reference from
    model.config._name_or_path = str(folder / "base")
    config = {
        "bf16": False,
        "use_cpu": True,
        "num_generations": 2,
        "per_device_train_batch_size": 4,
    }
    config |= {"max_completion_length": 8, "report_to": [], "save_strategy": "no", "beta": 0.1}
    trainer = source.GRPOTrainer(
        model,
        lambda completions, **_: [0.0] * len(completions),
        source.GRPOConfig(str(folder), **{**config, **options}),
        train_dataset=tiny_prompts(4),
        processing_class=TOKENIZER,
        peft_config=peft_config,
    )
    if trainer.args.gradient_checkpointing:
        trainer.model.gradient_checkpointing_enable()
    trainer.model = trainer.model_wrapped = trainer.accelerator.prepare_model(trainer.model)
    return trainer


def worker_of(models, config, temperature=1.0, autocast_dtype=None):
    """A worker in this process, and the snapshot that it reads."""
    snapshot = Snapshot(models)
    snapshot.take()
    setup = Setup(
        models=snapshot.pickled_models(),
        places=list(snapshot.places.values()),
        memory_size=snapshot.memory.size,
        memory_file=os.dup(snapshot.memory.file),
        device=torch.device("cpu"),
        generation_config=config,
        eos_token_ids=[EOS],
        pad_to_multiple_of=None,
        temperature=temperature,
        rows_per_pass=4,
        autocast_dtype=autocast_dtype,
        numerics=Numerics.here(),
    )
    return Worker(setup), snapshot


CASES = {
    "plain": {},
    "checkpointing off": {"gradient_checkpointing": False},
    "bf16 autocast": {"bf16": True},
    "bf16 weights": {"model": tiny_llama(len(TOKENIZER)).bfloat16()},
    "adapter": {"peft_config": LORA, "bf16": True},
    "absolute positions": {"model": absolute_model()},
    "dropout": {"model": absolute_model().train(), "disable_dropout": False},
}


@pytest.mark.parametrize("case", CASES)
def test_a_trainers_model_samples_there_as_here(tmp_path, case):
    """Fused head, autocast, checkpointing, hooks, adapters: bit for bit TRL's own sampling."""
    trainer = trainer_of(tmp_path, temperature=0.7, **CASES[case])
    policy = trainer.accelerator.unwrap_model(trainer.model)
    opponent_model = trainer.ref_model
    policy.train()
    dtype = torch.bfloat16 if trainer.args.bf16 else None
    worker, _ = worker_of((policy, opponent_model), trainer.generation_config, 0.7, dtype)
    prompts = [[5, 6, 7], [8], [9, 10], list(range(11, 20))] * 2
    torch.manual_seed(4)
    state = torch.get_rng_state()
    theirs, _ = trainer._generate_single_turn(prompts, None, {}, 2)
    after = torch.get_rng_state()
    flags = training_flags((policy, opponent_model))
    rollout = worker.answer(Job(Request(prompts, 0, rng_state=state), flags))
    assert rollout.completion_ids == theirs
    assert torch.equal(rollout.rng_state, after)
    answer = worker.answer(Job(Request(prompts, 0, seed=1, opponent=Opponent(1.0, 2)), flags))
    assert len(answer.completion_ids) == len(prompts)


def test_absolute_positions_stay_numbered_there(tmp_path):
    trainer = trainer_of(tmp_path, absolute_model(), trl_ext)
    worker, _ = worker_of((trainer.model, None), trainer.generation_config)
    copied = worker.models[0].eval()
    assert list(copied._forward_pre_hooks.values()) == list(
        trainer.model._forward_pre_hooks.values()
    )
    ids, mask = torch.tensor([[0, 0, 5, 6], [7, 8, 9, 10]]), torch.tensor([[0, 0, 1, 1], [1] * 4])
    alone = copied(input_ids=ids[:1, 2:]).logits
    padded = copied(input_ids=ids, attention_mask=mask).logits[:1, 2:]
    torch.testing.assert_close(padded, alone, atol=1e-5, rtol=0)


def test_only_what_belongs_to_the_model_travels(tmp_path):
    trainer = trainer_of(tmp_path, peft_config=LORA, bf16=True)
    policy = trainer.model
    policy.register_full_backward_hook(lambda *_: None)  # says nothing about sampling
    worker, snapshot = worker_of((policy, None), trainer.generation_config)
    copied = worker.models[0]
    assert not any("forward" in vars(module) for module in copied.modules())
    assert not any(getattr(m, "gradient_checkpointing", False) for m in copied.modules())
    names = [name for name, _ in named_tensors((policy, None))]
    assert names == [name for name, _ in named_tensors(worker.models)] == list(snapshot.places)
    assert len(snapshot.pickled_models()) < snapshot.memory.size / 4, (
        "the weights are in the pickle"
    )
    assert trainer.model is policy and "forward" in vars(policy), "the trainer's stays as it was"


def test_tied_weights_stay_tied():
    model = tiny_gpt2()
    worker, snapshot = worker_of((model, None), generation_config())
    copied = worker.models[0]
    assert copied.lm_head.weight is copied.transformer.wte.weight
    assert "0.lm_head.weight" not in snapshot.places
    with torch.no_grad():
        model.lm_head.weight.mul_(2.0)
    assert not torch.equal(copied.lm_head.weight, model.lm_head.weight)
    snapshot.take()
    assert torch.equal(copied.lm_head.weight, model.lm_head.weight)


def test_policy_and_opponent_may_share_weights():
    policy = adapted(sharp_llama())
    worker, _ = worker_of((policy, None), generation_config())
    request = Request(PROMPTS, 0, seed=2, opponent=Opponent(1.0, 4))
    rollout = worker.answer(Job(request, training_flags((policy, None))))
    torch.manual_seed(2)
    here = sample(
        policy, PROMPTS, generation_config(), eos_token_ids=[EOS], opponent=request.opponent
    )
    assert rollout.completion_ids == here


def test_another_device_copies_the_snapshot_before_each_request(monkeypatch):
    """As on a GPU, where the models do not read the snapshot in place."""
    model = sharp_llama()
    worker, snapshot = worker_of((model, None), generation_config())
    worker._taken = list(map(snapshot.memory.view, snapshot.places.values()))
    for own in worker._own:
        own.data = own.data.clone()
    with torch.no_grad():
        model.lm_head.weight.mul_(-1.0)
    snapshot.take()
    flags = training_flags((model, None))
    rollout = worker.answer(Job(Request(PROMPTS, 0, seed=2), flags))
    torch.manual_seed(2)
    assert rollout.completion_ids == sample(
        model, PROMPTS, generation_config(), eos_token_ids=[EOS]
    )


def test_each_module_samples_in_its_own_mode():
    model = absolute_model().train()
    worker, _ = worker_of((model, None), generation_config())
    model.eval()
    model.transformer.h[1].train()
    worker.answer(Job(Request(PROMPTS, 0), training_flags((model, None))))
    assert training_flags(worker.models) == training_flags((model, None))


def test_the_block_of_memory_is_given_back():
    gc.collect()
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        worker, snapshot = worker_of((sharp_llama(), None), generation_config())
        del worker, snapshot
        gc.collect()
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_system_without_anonymous_memory_uses_a_file(monkeypatch):
    monkeypatch.delattr(os, "memfd_create", raising=False)
    model = sharp_llama()
    worker, _ = worker_of((model, None), generation_config())
    for (_, copied), (_, own) in zip(
        named_tensors(worker.models), named_tensors((model, None)), strict=True
    ):
        assert torch.equal(copied, own)


def refused(model, match):
    with pytest.raises(ValueError, match=match):
        snapshot = Snapshot((model, None))
        snapshot.pickled_models()


def test_what_cannot_travel_is_refused(tmp_path):
    model = sharp_llama()
    model.model.layers[0].register_forward_hook(lambda *_: None)
    refused(model, r"cannot be sent .*schedule='sync'")
    refused(
        trainer_of(tmp_path, cast_lm_head_to_fp32=True, bf16=False).model,
        "Linear whose forward was replaced.*cast_lm_head_to_fp32",
    )
    model = sharp_llama()
    model.lm_head.weight.ds_id = 3
    refused(model, r"lm_head\.weight is a Parameter that is sharded")

    class Quantised(torch.nn.Parameter):
        pass

    model = sharp_llama()
    model.lm_head.weight = Quantised(model.lm_head.weight.data)
    refused(model, r"lm_head\.weight is a Quantised")


def test_the_process_gets_the_numerics_of_the_trainer():
    options = process.ProcessSampler(
        sharp_llama(), generation_config(), eos_token_ids=[EOS], temperature=1.0, rows_per_pass=1
    )
    numerics = options._setup(Snapshot(options.models)).numerics
    assert numerics.threads == torch.get_num_threads()
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.float64)
        assert Numerics.here().default_dtype == torch.float64
    finally:
        numerics.apply()
    assert torch.get_default_dtype() == before
