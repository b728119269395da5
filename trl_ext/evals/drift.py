"""How far a policy has moved from its reference, measured on samples of the policy.

Dropped: the length-normalised KL. A budget is spent by whole completions.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from trl_ext.evals import likelihood, sampling
from trl_ext.evals.metrics import standard_error, summarise
from trl_ext.evals.options import SamplingOptions
from trl_ext.evals.shares import first_rows, rows_of_all_processes, whole_model
from trl_ext.objectives.kl import k3, vocab_kl

# Probabilities that exist at once while two next-token laws are compared.
PROBABILITIES_AT_ONCE = 2**22


@dataclass(frozen=True, kw_only=True)
class DriftOptions(SamplingOptions):
    """Options of `policy_drift`: those of [`SamplingOptions`] that leave the policy what it is.

    The temperature divides the logits of the sampler, of the policy and of the reference alike:
    the numbers are those of the laws at that temperature.
    """

    def __post_init__(self):
        super().__post_init__()
        if self.temperature == 0 or self.top_p != 1 or self.top_k != 0 or self.generation_kwargs:
            raise ValueError(
                f"temperature={self.temperature}, top_p={self.top_p}, top_k={self.top_k}, "
                f"generation_kwargs={self.generation_kwargs}: a KL is estimated from samples of "
                "the policy itself, and these sample from another. Set a temperature above 0, "
                "top_p=1, top_k=0 and no generation_kwargs."
            )


@dataclass(frozen=True)
class Drift:
    """Drift of each sampled completion, P prompts with G completions each, float64.

    Attributes:
        kl_exact_PG: nats per completion; exact KL of the next-token laws, summed over its steps.
        kl_k1_PG: nats; Σ log π/ref over its tokens.
        kl_k3_PG: nats; Σ (ref/π − 1 + log π/ref) over its tokens, each with the ratio of that token
            alone, as trainers log it.
        reference_nll_PG: nats; −Σ log ref over its tokens.
        lengths_PG: tokens, end of sequence included.

    Each of the three estimates KL(π‖ref) over completions without bias, and `kl_exact` never with
    more variance than `kl_k1`, the only one that can be negative.
    """

    kl_exact_PG: Tensor
    kl_k1_PG: Tensor
    kl_k3_PG: Tensor
    reference_nll_PG: Tensor
    lengths_PG: Tensor

    def per_prompt(self) -> dict[str, Tensor]:
        """Each number that is a mean over prompts, before that mean, `(P,)`."""
        return {
            "kl_exact": self.kl_exact_PG.mean(1),
            "kl_k1": self.kl_k1_PG.mean(1),
            "kl_k3": self.kl_k3_PG.mean(1),
            "mean_length": self.lengths_PG.mean(1),
        }

    def metrics(self, prefix: str = "drift/") -> dict[str, float]:
        """Numbers with standard errors over prompts, as `{prefix + name: number}`."""
        perplexity, error = self.reference_perplexity()
        numbers = {"reference_perplexity": perplexity, "reference_perplexity_se": error}
        return {prefix + k: v for k, v in {**summarise(self.per_prompt()), **numbers}.items()}

    def reference_perplexity(self) -> tuple[float, float]:
        """Perplexity of the reference on the policy's samples, and its standard error.

        exp(R),   R = Σ −log ref / Σ tokens;   se = exp(R) · sd(nllₚ − R lengthₚ) / (√P mean length)

        The error is that of a ratio of means to first order; NaN for a single prompt.
        Source: arXiv:2410.18252, where it is called KL (PPL).
        """
        nll_P, length_P = self.reference_nll_PG.sum(1), self.lengths_PG.sum(1)
        rate = nll_P.sum() / length_P.sum()
        error = standard_error(nll_P - rate * length_P) / length_P.mean().item()
        return math.exp(rate), math.exp(rate) * error


def policy_drift(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Dataset,
    *,
    reference: PreTrainedModel | None = None,
    **options,
) -> Drift:
    """Samples from the policy and measures KL(π‖ref) and the reference's perplexity.

    The result depends on the arguments alone, `batch_size` included, and not on the number of
    processes. Random states and training modes are left as they were found.

    Args:
        model: the policy π.
        tokenizer: of both models.
        prompts: a column `prompt` of strings or of message lists.
        reference: of the same vocabulary; default the policy without its PEFT adapter, or with the
            adapter named "ref" where it has one.
        options: fields of [`DriftOptions`]; one sample per prompt unless told.

    Raises:
        ValueError: an option out of range, no reference, or a model sharded by FSDP or ZeRO-3.

    Equal policies give KL exactly 0. Source: arXiv:2405.08448 (256 prompts, one sample each).
    """
    checked = DriftOptions(**options)
    model = likelihood.check_reference(whole_model(model), reference)
    unfiltered = {**sampling.UNFILTERED, **checked.sampling}
    config = sampling.generation_config(model, tokenizer, unfiltered)

    def rows_of(_: int, columns: dict) -> list[tuple[float, ...]]:
        prompt_ids = sampling.tokenize_prompts(
            tokenizer,
            columns["prompt"],
            checked.chat_template_kwargs,
            repeat=checked.num_generations,
        )
        completions = sampling.sample_all(model, prompt_ids, config, checked.batch_size)
        rows = [(p, c.token_ids) for p, c in zip(prompt_ids, completions, strict=True)]
        return list(drift_of_rows(model, reference, rows, checked))

    rows = rows_of_all_processes(
        rows_of,
        first_rows(prompts, checked.max_prompts),
        model,
        size=max(1, checked.batch_size // checked.num_generations),
        seed=[checked.seed],
        title="Measuring drift",
        disable_tqdm=checked.disable_tqdm,
    )
    table = torch.tensor(rows, dtype=torch.float64).view(-1, checked.num_generations, 5)
    return Drift(*table.unbind(-1))


def drift_of_rows(
    model: PreTrainedModel,
    reference: PreTrainedModel | None,
    rows: list[likelihood.Row],
    options: DriftOptions,
) -> Iterator[tuple[float, ...]]:
    """Exact KL, k1, k3, reference's NLL, and length of each completion."""
    for batch in likelihood.in_batches(model, rows, options.batch_size):
        ours = likelihood.completion_logits(model, batch)
        with likelihood.reference_policy(model, reference) as ref:
            theirs = likelihood.completion_logits(ref, batch)
        for (_, ids), logits_TV, ref_logits_TV in zip(batch, ours, theirs, strict=True):
            yield completion_drift(logits_TV, ref_logits_TV, ids, options.temperature)


def completion_drift(
    logits_TV: Tensor, ref_logits_TV: Tensor, token_ids: list[int], temperature: float = 1.0
) -> tuple[float, ...]:
    """Drift of one completion: exact KL, k1, k3 and the reference's NLL in nats, and its length.

    Args:
        logits_TV, ref_logits_TV: `(T, V)`, of both next-token laws before each token.
        token_ids: T sampled tokens.
        temperature: divides both logits.
    """
    if logits_TV.shape != ref_logits_TV.shape:
        raise ValueError(
            f"reference has {ref_logits_TV.size(1)} logits per token and model "
            f"{logits_TV.size(1)}: they have different vocabularies. Resize both embeddings alike."
        )
    total = torch.zeros(4, dtype=torch.float64)
    steps = max(1, PROBABILITIES_AT_ONCE // logits_TV.size(1))
    for t in range(0, len(token_ids), steps):
        ids = token_ids[t : t + steps]
        ours = likelihood.at_least_float32(logits_TV[t : t + steps]) / temperature
        theirs = ref_logits_TV[t : t + steps].to(ours) / temperature
        logp_T = likelihood.token_logps(ours, ids)
        ref_logp_T = likelihood.token_logps(theirs, ids)
        terms = (vocab_kl(ours, theirs), logp_T - ref_logp_T, k3(logp_T, ref_logp_T), -ref_logp_T)
        total += torch.stack([term.double().sum() for term in terms]).cpu()
    return (*total.tolist(), float(len(token_ids)))
