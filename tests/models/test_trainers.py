"""Every trainer of TRL and of trl_ext trains both models; the fused head is the plain one."""

import pytest
import torch
import trl
from datasets import Dataset
from transformers import AutoModelForCausalLM
from trl.trainer import add_fused_lm_head

from tests.models.variants import BOTH, CLASSIFIER, gradients, largest, tiny, tokens
from tests.runs import METHODS, TOKENIZER, build, case, logged, parameters, settings, vowels
from trl_ext import GRPOTrainer

OF_TOKENIZER = {"vocab_size": len(TOKENIZER), "max_position_embeddings": 512}
ROWS = [(f"{i}+{i * i}=", str(i + i * i)) for i in range(16)]
PROMPTS, ANSWERS = map(list, zip(*ROWS, strict=True))
TEXTS = {"text": [f"{prompt}{answer}" for prompt, answer in ROWS]}
PAIRS = {"prompt": PROMPTS, "chosen": ANSWERS, "rejected": ["no", "wrong"] * 8}
JUDGED = {"prompt": PROMPTS, "completion": ANSWERS, "label": [True, False] * 8}
ANSWERED = {"prompt": PROMPTS, "completion": ANSWERS}
SAMPLED = {"max_completion_length": 5, "num_generations": 2}

# One row per way of training: trainer, config, its options, columns.
THEIRS = {
    "sft": (trl.SFTTrainer, trl.SFTConfig, {}, TEXTS),
    "sft_bf16": (trl.SFTTrainer, trl.SFTConfig, {"bf16": True}, TEXTS),
    "sft_packing": (trl.SFTTrainer, trl.SFTConfig, {"packing": True, "max_length": 32}, TEXTS),
    "sft_wrapped": (
        trl.SFTTrainer,
        trl.SFTConfig,
        {"packing": True, "packing_strategy": "wrapped", "max_length": 16},
        TEXTS,
    ),
    "sft_padding_free": (
        trl.SFTTrainer,
        trl.SFTConfig,
        {"padding_free": True, "max_length": None},
        TEXTS,
    ),
    "sft_dft": (trl.SFTTrainer, trl.SFTConfig, {"loss_type": "dft"}, TEXTS),
    "dpo": (trl.DPOTrainer, trl.DPOConfig, {}, PAIRS),
    "kto": (trl.KTOTrainer, trl.KTOConfig, {}, JUDGED),
    "reward": (trl.RewardTrainer, trl.RewardConfig, {}, PAIRS),
    "grpo": (trl.GRPOTrainer, trl.GRPOConfig, {**SAMPLED, "beta": 0.1}, PAIRS),
    "rloo": (trl.RLOOTrainer, trl.RLOOConfig, SAMPLED, PAIRS),
    "distillation": (
        trl.DistillationTrainer,
        trl.DistillationConfig,
        {"max_completion_length": 5},
        ANSWERED,
    ),
}


def saved(variant, folder):
    """As a user has it, from a folder: TRL reads a reference model from there once more."""
    tiny(variant, **OF_TOKENIZER).save_pretrained(folder)
    return AutoModelForCausalLM.from_pretrained(folder)


def trained(row, variant, folder, **options):
    trainer, config, own, columns = THEIRS[row]
    given = {}
    if row in ("grpo", "rloo"):
        given["reward_funcs"] = vowels
    if row == "distillation":
        given["teacher_model"] = tiny(variant, seed=1, **OF_TOKENIZER)
    model = saved(variant, folder / "model")
    if row == "reward":
        model = tiny(variant, classes=CLASSIFIER, num_labels=1, **OF_TOKENIZER)
    options = {**settings(per_device_train_batch_size=4), **own, **options}
    known = {f for f in options if f in config.__dataclass_fields__}
    run = trainer(
        model,
        args=config(str(folder / "run"), **{f: options[f] for f in known}),
        train_dataset=Dataset.from_dict(columns),
        processing_class=TOKENIZER,
        **given,
    )
    before = parameters(run)
    run.train()
    return run, before


def test_no_trainer_of_trl_is_left_out():
    theirs = {getattr(trl, name) for name in trl.__all__ if name.endswith("Trainer")}
    assert {trainer for trainer, *_ in THEIRS.values()} == theirs


def steps(run, key):
    return [row[key] for row in run.state.log_history if key in row]


@pytest.mark.parametrize("variant", BOTH)
class TestTrainersOfTRL:
    @pytest.mark.parametrize("row", THEIRS)
    def test_trains(self, row, variant, tmp_path):
        run, before = trained(row, variant, tmp_path)
        assert len(steps(run, "loss")) == 2 and parameters(run).isfinite().all()
        assert steps(run, "grad_norm")[-1] > 0 and largest(parameters(run), before) > 1e-4

    @pytest.mark.parametrize("row", ["sft_packing", "sft_padding_free"])
    def test_packed_as_padded(self, row, variant, tmp_path):
        """All rows in one batch, however they are laid out: the same loss and gradient."""
        options = {"per_device_train_batch_size": 16, "max_steps": 1}
        packed, _ = trained(row, variant, tmp_path / "packed", **options)
        padded, _ = trained("sft", variant, tmp_path / "padded", **options)
        for key in ("loss", "grad_norm"):
            assert steps(packed, key) == pytest.approx(steps(padded, key), rel=1e-4)

    def test_from_a_path(self, variant, tmp_path):
        saved(variant, tmp_path / "model")
        config = trl.SFTConfig(str(tmp_path / "run"), bf16=False, use_cpu=True, report_to="none")
        run = trl.SFTTrainer(
            str(tmp_path / "model"),
            args=config,
            train_dataset=Dataset.from_dict(TEXTS),
            processing_class=TOKENIZER,
        )
        assert run.model.config.model_type == variant

    def test_a_checkpoint_of_a_run_is_a_model(self, variant, tmp_path):
        run, _ = trained("sft", variant, tmp_path, save_strategy="steps", save_steps=2)
        again = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "checkpoint-2")
        ids = tokens(1, 7)
        assert torch.equal(again(ids).logits, run.model.eval()(ids).logits)

    def test_continuous_batching_is_refused(self, variant, tmp_path):
        with pytest.raises(ValueError, match=r"Continuous batching .* cannot run this model"):
            trained("grpo", variant, tmp_path, use_transformers_continuous_batching=True)

    def test_weight_decay_is_for_matrices(self, variant, tmp_path):
        """It spares the remainder bias and the head norm, which are two-dimensional as well."""
        own = {"attention_bias": True} if variant == "tapa" else {"head_norm": True}
        model = tiny(variant, **own)
        config = trl.SFTConfig(str(tmp_path), bf16=False, use_cpu=True, report_to="none")
        data = Dataset.from_dict({"input_ids": [[3, 4, 5]] * 4})
        run = trl.SFTTrainer(model, args=config, train_dataset=data, processing_class=TOKENIZER)
        matrices = {
            f"{name}.weight"
            for name, module in model.named_modules()
            if isinstance(module, torch.nn.Linear | torch.nn.Embedding)
        }
        assert set(run.get_decay_parameter_names(model)) == matrices


@pytest.mark.parametrize("variant", BOTH)
class TestTrainersOfOurs:
    @pytest.mark.parametrize("trainer", METHODS, ids=case)
    def test_trains(self, trainer, variant, tmp_path):
        run = build(trainer, tmp_path, model=tiny(variant, **OF_TOKENIZER))
        before = parameters(run)
        run.train()
        assert largest(parameters(run), before) > 1e-4 and parameters(run).isfinite().all()

    def test_a_resumed_run_is_the_whole_one(self, variant, tmp_path):
        """To the bit: parameters, optimizer, random state and logged rows."""
        options = {"max_steps": 3, "save_strategy": "steps", "save_steps": 2}

        def run(**resume):
            trainer = build(GRPOTrainer, tmp_path, model=tiny(variant, **OF_TOKENIZER), **options)
            trainer.train(**resume)
            state = trainer.optimizer.state_dict()["state"]
            return trainer, torch.cat([s["exp_avg"].flatten() for s in state.values()])

        whole, momenta = run()
        options["save_strategy"] = "no"
        again, momenta_again = run(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
        assert torch.equal(parameters(whole), parameters(again))
        assert torch.equal(momenta, momenta_again)
        assert logged(whole)[:-1] == logged(again)[:-1] and len(logged(whole)) == 4


class TestFusedHead:
    @pytest.mark.parametrize("temperature", [1.0, 0.7])
    def test_log_probabilities_and_gradients(self, model, temperature):
        ids, mask = tokens(2, 9), torch.ones(2, 9, dtype=torch.long)
        mask[0, :3] = 0
        labels = ids.masked_fill(mask == 0, -100)
        logits = model(ids, attention_mask=mask).logits[:, :-1] / temperature
        chosen = labels[:, 1:] != -100
        logp = logits.log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0].masked_fill(~chosen, 0)
        expected = gradients(model, logp.sum())
        add_fused_lm_head(model, temperature=temperature)
        fused = model(ids, attention_mask=mask, labels=labels, fused_lm_head=True).log_probs
        assert largest(fused, logp) < 1e-5
        assert (gradients(model, fused.sum()) - expected).norm() < 1e-5 * expected.norm()

    def test_packed_documents(self, model):
        ids, positions = tokens(1, 9), torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4]])
        logits = model(ids, position_ids=positions).logits[:, :-1]
        logp = logits.log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
        add_fused_lm_head(model)
        fused = model(ids, position_ids=positions, labels=ids, fused_lm_head=True).log_probs
        assert largest(fused, logp) < 1e-5
