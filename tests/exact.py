"""The exact-enumeration harness: what one update of a real trainer does on average.

A tabular policy (the previous token's one-hot under an LM head that is the table) is small enough
to visit every group of completions. The trainer runs `train()` at learning rate 0, one group per
step, fed through `rollout_func`; its gradient is caught before the optimizer step and weighted with
the group's probability. No sampling noise is left: a wrong scale, a baseline that contains its own
sample, a gradient through the credit or a length normaliser all show.
"""

import contextlib
import gc
import itertools
import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers import (
    GenerationMixin,
    PretrainedConfig,
    PreTrainedModel,
    PrinterCallback,
    TrainerCallback,
)
from transformers.modeling_outputs import BaseModelOutput, CausalLMOutput

from tests.tiny import tiny_tokenizer

TOKENIZER = tiny_tokenizer("ab")
A, B, EOS = (TOKENIZER.convert_tokens_to_ids(t) for t in ("a", "b", TOKENIZER.eos_token))
PROMPTS = (TOKENIZER.convert_tokens_to_ids("<user>"), TOKENIZER.bos_token_id)
SPOKEN = (A, B, EOS)
T = 2  # EOS may end a completion early, so that lengths differ

Completion = tuple[int, ...]
COMPLETIONS: tuple[Completion, ...] = (
    (EOS,),
    *((first, second) for first in (A, B) for second in SPOKEN),
)


class TabularConfig(PretrainedConfig):
    model_type = "tabular"
    vocab_size = len(TOKENIZER)
    is_decoder = True


class OneHot(PreTrainedModel):
    config_class = TabularConfig

    def __init__(self, config: TabularConfig) -> None:
        super().__init__(config)
        self.register_buffer("eye", torch.eye(config.vocab_size), persistent=False)

    def forward(self, input_ids: Tensor, attention_mask=None, use_cache=None, **_: Any):
        return BaseModelOutput(last_hidden_state=self.eye[input_ids])


class TabularForCausalLM(PreTrainedModel, GenerationMixin):
    config_class = TabularConfig
    base_model_prefix = "model"

    def __init__(self, config: TabularConfig) -> None:
        super().__init__(config)
        self.model = OneHot(config)
        self.lm_head = nn.Linear(config.vocab_size, config.vocab_size, bias=False)

    def get_output_embeddings(self) -> nn.Linear:
        return self.lm_head

    def forward(self, input_ids: Tensor, attention_mask=None, logits_to_keep=0, **_: Any):
        hidden = self.model(input_ids).last_hidden_state
        return CausalLMOutput(logits=self.lm_head(hidden[:, -logits_to_keep:]))


def table(seed: int) -> Tensor:
    """Random logits `(next, previous)`; tokens that are never spoken have probability 0."""
    logits = torch.full((len(TOKENIZER), len(TOKENIZER)), -1e9, dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(len(SPOKEN), len(TOKENIZER), generator=generator, dtype=torch.float64)
    logits[list(SPOKEN)] = noise
    return logits


def tabular(weights: Tensor) -> TabularForCausalLM:
    model = TabularForCausalLM(TabularConfig()).double()
    model.lm_head.weight.data.copy_(weights)
    return model


def token_logps(weights: Tensor, prompt: int, completion: Completion) -> Tensor:
    previous = (prompt, *completion[:-1])
    return weights.log_softmax(0)[list(completion), list(previous)]


def probability(weights: Tensor, prompt: int, completions: Sequence[Completion]) -> Tensor:
    return torch.stack([token_logps(weights, prompt, c).sum() for c in completions]).sum().exp()


def sequence_logps(weights: Tensor, prompt: int = PROMPTS[0]) -> Tensor:
    """`(C,)`: log-probability of each of `COMPLETIONS`."""
    return torch.stack([token_logps(weights, prompt, c).sum() for c in COMPLETIONS])


def law_of(weights: Tensor, prompt: int = PROMPTS[0]) -> Tensor:
    """`(C,)`: probability of each of `COMPLETIONS`."""
    return sequence_logps(weights, prompt).exp()


def only(completion: Completion) -> Tensor:
    """The law `(C,)` of a completion that is always the same."""
    return torch.tensor([float(c == completion) for c in COMPLETIONS], dtype=torch.float64)


def differences(values_C: Tensor) -> Tensor:
    """`(C, C)`: the row's value minus the column's."""
    return values_C[:, None] - values_C[None, :]


def table_of(law_C: Tensor, prompt: int = PROMPTS[0]) -> Tensor:
    """The table whose completions have this law: two tokens let it have any."""
    mass = torch.zeros(len(TOKENIZER), len(TOKENIZER), dtype=torch.float64)
    for completion, p in zip(COMPLETIONS, law_C.tolist(), strict=True):
        for previous, token in itertools.pairwise((prompt, *completion)):
            mass[token, previous] += p
    return mass.log().clamp(min=-1e9)


@contextlib.contextmanager
def double_precision() -> Iterator[None]:
    """TRL allocates rewards in the default dtype."""
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


@contextlib.contextmanager
def nothing_to_collect() -> Iterator[None]:
    """The host collects garbage before it trains, among all modules: half of a short run."""
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


Batches = list[tuple[tuple[Completion, ...], Tensor]]  # completions of one step, probability


def batches_of(laws: Sequence[Tensor]) -> Batches:
    """Every sequence of completions of which the i-th has the i-th law `(C,)`."""
    supports = [law.nonzero().flatten().tolist() for law in laws]
    return [
        (
            tuple(COMPLETIONS[i] for i in indices),
            torch.stack([law[i] for law, i in zip(laws, indices, strict=True)]).prod(),
        )
        for indices in itertools.product(*supports)
    ]


def groups_of(G: int) -> list[tuple[tuple[Completion, ...], int]]:
    """Every multiset of G completions in a shuffled order, with its number of orders."""
    generator = torch.Generator().manual_seed(0)
    groups = []
    for group in itertools.combinations_with_replacement(COMPLETIONS, G):
        order = torch.randperm(G, generator=generator).tolist()
        counts = Counter(group).values()
        orders = math.factorial(G) // math.prod(map(math.factorial, counts))
        groups.append((tuple(group[i] for i in order), orders))
    return groups


@dataclass
class Enumeration:
    """One trainer, one prompt, every group.

    Args:
        reward: None where completions are not scored one by one.
        sampler: logits of the policy that samples; the trained policy's own unless given. With
            `num_iterations=2` it is an older policy, and the gradient is caught in the second
            iteration; else it is a server, which reports its log-probabilities as vLLM does.
        laws: one `(C,)` per row of a step's batch, where not all completions have the same law.
        columns: of the dataset, where its completions come first in each group; the sampler is
            asked for the rest only.
        facts: further columns of the dataset.
        logs: what the trainer logged.
    """

    trainer: type
    config: Callable[[str], Any]
    policy: Tensor
    reference: Tensor | None = None
    prompt: int = PROMPTS[0]
    reward: Callable[[Completion], float | None] | None = lambda completion: 0.0
    sampler: Tensor | None = None
    laws: Sequence[Tensor] | None = None
    columns: dict[str, str] = field(default_factory=dict)
    facts: dict[str, str] = field(default_factory=dict)
    arguments: dict[str, Any] = field(default_factory=dict)
    logs: list[dict[str, float]] = field(default_factory=list, init=False)

    def expected_gradient(self, folder: str) -> Tensor:
        """`(V, V)`: Σ over groups of P(group) · ∇loss."""
        with double_precision(), nothing_to_collect():
            return self._run(self.config(folder))

    def _run(self, config: Any) -> Tensor:
        batches = self._batches(config.num_generations)
        config.max_steps = len(batches) * config.num_iterations
        law = self.policy if self.sampler is None else self.sampler
        weights = [weight for _, weight in batches]
        recorder = Recorder(weights, config.num_iterations, self.policy, law)
        model = tabular(law if config.num_iterations > 1 else self.policy)
        trainer = self._built(config, model, recorder, [answers for answers, _ in batches])
        if self.sampler is not None and config.num_iterations == 1:
            trainer.use_vllm, trainer._last_loaded_step = True, -1
            trainer.vllm_generation = SimpleNamespace(sync_weights=lambda: None)
        if self.reference is not None:
            trainer.ref_model.lm_head.weight.data.copy_(self.reference)
        trainer.train()
        assert recorder.step == config.max_steps
        self.logs = trainer.state.log_history
        return recorder.total

    def _built(self, config: Any, model: Any, recorder: Any, batches: list) -> Any:
        prompts = len(batches) * config.per_device_train_batch_size // config.num_generations
        answers = ([list(completion) for completion in batch] for batch in batches)
        row = {"prompt": TOKENIZER.decode([self.prompt]), **self.columns, **self.facts}
        trainer = self.trainer(
            model,
            None if self.reward is None else self._score,
            config,
            Dataset.from_dict({name: [text] * prompts for name, text in row.items()}),
            processing_class=TOKENIZER,
            callbacks=[recorder],
            rollout_func=None if self.columns else self._speak(answers),
            **self.arguments,
        )
        trainer.remove_callback(PrinterCallback)
        if self.columns:
            trainer._sampled = lambda *_: (next(answers), None)
        return trainer

    def _batches(self, G: int) -> Batches:
        if self.laws is not None:
            return batches_of(self.laws)
        law = self.policy if self.sampler is None else self.sampler
        groups = groups_of(G - len(self.columns))
        return [(group, n * probability(law, self.prompt, group)) for group, n in groups]

    def _sampled_logps(self, completion: Completion) -> list[float]:
        return token_logps(self.sampler, self.prompt, completion).tolist()

    def _score(self, completion_ids: list[list[int]], **_: Any) -> list[float | None]:
        return [self.reward(tuple(ids)) for ids in completion_ids]

    def _speak(self, answers: Iterator) -> Callable[[list, Any], dict]:
        def rollout(prompts: list, trainer: Any) -> dict:
            ids = next(answers)
            assert len(ids) == len(prompts)
            reported = self.sampler is not None and trainer.use_vllm
            return {
                "prompt_ids": [[self.prompt]] * len(ids),
                "completion_ids": ids,
                "logprobs": [self._sampled_logps(tuple(c)) for c in ids] if reported else None,
            }

        return rollout


class Recorder(TrainerCallback):
    def __init__(self, weights: list[Tensor], repeats: int, policy: Tensor, law: Tensor) -> None:
        self.weights, self.repeats, self.policy, self.law = weights, repeats, policy, law
        self.step, self.total = 0, torch.zeros_like(policy)

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        group, iteration = divmod(self.step, self.repeats)
        if iteration == self.repeats - 1:
            self.total += self.weights[group] * model.lm_head.weight.grad
        self.step += 1

    def on_step_end(self, args, state, control, model=None, **kwargs):
        last = self.step % self.repeats == 0
        if self.repeats > 1:
            model.lm_head.weight.data.copy_(self.law if last else self.policy)


def settings(**options: Any) -> dict[str, Any]:
    """Config arguments under which the gradient is that of the loss and nothing else."""
    G = options.get("num_generations", 2)
    return {
        "num_generations": G,
        "per_device_train_batch_size": G,
        "max_completion_length": T,
        "learning_rate": 0.0,
        "lr_scheduler_type": "constant",
        "weight_decay": 0.0,
        "max_grad_norm": 0.0,
        "loss_type": "dr_grpo",
        "scale_rewards": "none",
        "gradient_checkpointing": False,
        "shuffle_dataset": False,
        "bf16": False,
        "use_cpu": True,
        "report_to": "none",
        "save_strategy": "no",
        "logging_steps": 10**9,
        "logging_nan_inf_filter": False,
        "disable_tqdm": True,
        **options,
    }


def group_settings(**options: Any) -> dict[str, Any]:
    """`settings` for a trainer that has a loss of its own."""
    policy_loss = {"loss_type", "scale_rewards"}
    return {k: v for k, v in settings(**options).items() if k not in policy_loss - set(options)}


def gradient_of(objective: Callable[[Tensor], Tensor], weights: Tensor) -> Tensor:
    """Autograd of the definition."""
    leaf = weights.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(objective(leaf), leaf)
    return gradient


def sequence_kl(weights: Tensor, reference: Tensor, prompt: int) -> Tensor:
    """KL(π(·|x)‖ref(·|x)) over whole completions, by enumeration."""
    terms = [
        probability(weights, prompt, [c])
        * (token_logps(weights, prompt, c) - token_logps(reference, prompt, c)).sum()
        for c in COMPLETIONS
    ]
    return torch.stack(terms).sum()


def expectation(weights: Tensor, prompt: int, n: int, f: Callable[..., float]) -> Tensor:
    """E f(y₁ … yₙ) for independent completions, by enumeration."""
    logp = torch.stack([token_logps(weights, prompt, c).sum() for c in COMPLETIONS])
    total = torch.zeros((), dtype=torch.float64)
    for indices in itertools.product(range(len(COMPLETIONS)), repeat=n):
        value = f(*(COMPLETIONS[i] for i in indices))
        if value:
            total = total + value * logp[list(indices)].sum().exp()
    return total


def cosine(left: Tensor, right: Tensor) -> float:
    return float(nn.functional.cosine_similarity(left.flatten(), right.flatten(), dim=0))


def assert_same_gradient(actual: Tensor, expected: Tensor, tolerance: float = 1e-6) -> None:
    """Same direction to 1e-9 *and* same length: TRL's fused head works in float32."""
    assert expected.norm() > 1e-3, "a vanishing gradient proves nothing"
    assert cosine(actual, expected) >= 1 - 1e-9, cosine(actual, expected)
    assert (actual - expected).norm() <= tolerance * expected.norm()
