"""Win rate of what a policy generates, against references or against a fixed opponent."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerState

from trl_ext.completions import completion_texts, completion_token_ids
from trl_ext.evals import sampling, scoring
from trl_ext.evals.evaluator import Evaluator
from trl_ext.evals.metrics import summarise, won
from trl_ext.evals.options import SamplingOptions
from trl_ext.evals.scoring import RewardFunc
from trl_ext.evals.shares import Columns, first_rows, rows_of_all_processes, whole_model
from trl_ext.judges import Judge, ask
from trl_ext.objectives.pair_rules import consistent, debiased

# A column of the dataset, a model, or the texts of its completions, one or G per prompt.
Opponent = str | PreTrainedModel | Sequence[Sequence[str]]

# Set the opponent's noise apart from the policy's: equal noise would make equal policies tie.
OURS, THEIRS = 0, 1


@dataclass(frozen=True, kw_only=True)
class WinRateOptions(SamplingOptions):
    """Options of `evaluate_win_rate` and `WinRateEvaluator`, and [`SamplingOptions`].

    Args:
        both_orders: ask the judge twice, each completion shown first once, and average: what it
            owes to the order cancels.
    """

    both_orders: bool = True


@dataclass(frozen=True)
class WinRateResult:
    """How G completions of each of P prompts fared, float64, NaN where not judged.

    Attributes:
        wins_PG: P(ours beats theirs), in [0, 1]; a tie is 1/2.
        lengths_PG: tokens of ours, end of sequence included.
        truncated_PG: 1 where ours has no end of sequence within the limit.
        disagreements_PG: 1 where the judge's two orders do not name the same winner; `None` unless
            both were asked.
        gold_PG, opponent_gold_PG: gold rewards of ours and of theirs; `None` under a judge.
    """

    wins_PG: Tensor
    lengths_PG: Tensor
    truncated_PG: Tensor
    disagreements_PG: Tensor | None = None
    gold_PG: Tensor | None = None
    opponent_gold_PG: Tensor | None = None

    def per_prompt(self) -> dict[str, Tensor]:
        """Each number before averaging, `(P,)`; what was not judged counts neither way."""
        numbers = {
            "win_rate": self.wins_PG.nanmean(1),
            "unjudged_rate": self.wins_PG.isnan().double().mean(1),
            "mean_length": self.lengths_PG.mean(1),
            "truncation_rate": self.truncated_PG.mean(1),
        }
        if self.disagreements_PG is not None:
            numbers["judge_inconsistency"] = self.disagreements_PG.nanmean(1)
        if self.gold_PG is not None and self.opponent_gold_PG is not None:
            numbers["gold_score"] = self.gold_PG.nanmean(1)
            numbers["gold_margin"] = (self.gold_PG - self.opponent_gold_PG).nanmean(1)
        return numbers

    def metrics(self, prefix: str = "generation/") -> dict[str, float]:
        """Means over prompts and their standard errors, as `{prefix + name: number}`."""
        return {prefix + k: v for k, v in summarise(self.per_prompt()).items()}


def evaluate_win_rate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    dataset: Dataset,
    *,
    judge: Judge | None = None,
    reward_func: RewardFunc | None = None,
    opponent: Opponent = "completion",
    trainer_state: Any = None,
    **options: Any,
) -> WinRateResult:
    """Samples completions and compares each with one of the opponent's.

    The result depends on the arguments alone, `batch_size` included, and not on the number of
    processes. Random states and training modes are left as they were found.

    Args:
        model: the policy.
        tokenizer: its tokenizer, and that of an opponent that is a model.
        dataset: a column `prompt` of strings or of message lists.
        judge: `(prompts, first, second)` to P(first beats second) of each pair, or `None` where it
            cannot tell; plain or asynchronous. Completions have the form of their prompts.
        reward_func: a gold reward by TRL's contract, in place of a judge: the higher one wins, and
            a tie is half a win. All further columns go to it.
        opponent: the column that holds each prompt's reference completion; a model, which samples
            under the same options with noise of its own; or, from `sample_opponent`, its texts.
        trainer_state: handed to the gold reward.
        options: fields of [`WinRateOptions`]; one completion per prompt unless told.

    Raises:
        ValueError: an argument out of range, neither or both of judge and gold reward, an answer of
            the judge outside [0, 1], or a model sharded by FSDP or ZeRO-3.

    A completion that cannot be judged (`None` or NaN, in either order) is left out and counted in
    `unjudged_rate`. Sources: arXiv:2410.18252 (gold reward), arXiv:2405.08448 (both orders).
    """
    checked = WinRateOptions(**options)
    _check_one_of(judge, reward_func)
    dataset = first_rows(dataset, checked.max_prompts)
    if isinstance(opponent, torch.nn.Module):
        opponent = sample_opponent(opponent, tokenizer, dataset, **options)
    texts = _texts_of(opponent, dataset, checked.num_generations)
    contest = _Contest(tokenizer, judge, reward_func, checked, trainer_state)
    model = whole_model(model)

    def rows_of(start: int, columns: Columns) -> list[tuple[float, ...]]:
        ours = _sampled(model, tokenizer, columns["prompt"], checked)
        theirs = [text for group in texts[start : start + len(columns["prompt"])] for text in group]
        return contest.rows(columns, ours, theirs)

    rows = _chunks(rows_of, dataset, model, checked, OURS)
    return contest.result(torch.tensor(rows, dtype=torch.float64).view(len(texts), -1, 6))


def sample_opponent(
    opponent: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, dataset: Dataset, **options: Any
) -> list[list[str]]:
    """Completions of a fixed opponent, to be compared with more than one policy.

    Args:
        opponent: a model.
        tokenizer, dataset, options: as in `evaluate_win_rate`.

    Returns:
        P lists of G texts.
    """
    checked = WinRateOptions(**options)
    opponent, G = whole_model(opponent), checked.num_generations

    def rows_of(_: int, columns: Columns) -> list[str]:
        sampled = _sampled(opponent, tokenizer, columns["prompt"], checked)
        return _decoded(tokenizer, sampled)

    texts = _chunks(rows_of, first_rows(dataset, checked.max_prompts), opponent, checked, THEIRS)
    return [texts[i : i + G] for i in range(0, len(texts), G)]


@dataclass(frozen=True)
class _Contest:
    """Compares completions, row by row."""

    tokenizer: PreTrainedTokenizerBase
    judge: Judge | None
    reward_func: RewardFunc | None
    options: WinRateOptions
    trainer_state: Any

    def rows(
        self, columns: Columns, ours: list[sampling.Completion], theirs: list[str]
    ) -> list[tuple[float, ...]]:
        """Win, length, truncation, disagreement, gold and opponent's gold of each completion."""
        G = self.options.num_generations
        repeated = {name: [x for x in column for _ in range(G)] for name, column in columns.items()}
        texts, ids = _decoded(self.tokenizer, ours), [completion.token_ids for completion in ours]
        nothing = torch.full((len(ours),), torch.nan)
        if self.judge is None:
            gold = self.gold(repeated, texts, ids)
            their_ids = [completion_token_ids(self.tokenizer, "", text, []) for text in theirs]
            their_gold = self.gold(repeated, theirs, their_ids)
            judged = (won(gold - their_gold), nothing, gold, their_gold)
        else:
            asked = self.judged(self.judge, repeated["prompt"], texts, theirs)
            judged = (*asked, nothing, nothing)
        wins, *further = (column.tolist() for column in judged)
        truncated = [float(completion.truncated) for completion in ours]
        return list(zip(wins, [float(len(row)) for row in ids], truncated, *further, strict=True))

    def result(self, table_PGN: Tensor) -> WinRateResult:
        """Rows of `rows`, without the columns that nobody asked for."""
        wins_PG, lengths_PG, truncated_PG, disagreements_PG, *gold = table_PGN.unbind(-1)
        result = WinRateResult(wins_PG, lengths_PG, truncated_PG)
        if self.judge is None:
            return replace(result, gold_PG=gold[0], opponent_gold_PG=gold[1])
        both = self.options.both_orders
        return replace(result, disagreements_PG=disagreements_PG) if both else result

    def judged(
        self, judge: Judge, prompts: list, ours: list[str], theirs: list[str]
    ) -> tuple[Tensor, Tensor]:
        """P(ours beats theirs), and whether the two orders disagree, `(B,)` each."""
        first, second = (
            [sampling.as_message(p, text) for p, text in zip(prompts, texts, strict=True)]
            for texts in (ours, theirs)
        )
        forward = ask(judge, prompts, first, second)
        if not self.options.both_orders:
            return forward, torch.full_like(forward, torch.nan)
        backward = ask(judge, prompts, second, first)
        wins = debiased(forward, backward)
        disagree = (~consistent(forward, backward)).double()
        return wins, disagree.masked_fill(wins.isnan(), torch.nan)

    def gold(self, columns: Columns, texts: list[str], ids: list[list[int]]) -> Tensor:
        """Gold rewards, `(B,)`, NaN where unscorable."""
        prompts = columns["prompt"]
        taken = ("prompt", "completion", "completion_ids")
        rewards = scoring.score(
            [self.reward_func] if self.reward_func else [],
            [1.0],
            prompts,
            [sampling.as_message(p, text) for p, text in zip(prompts, texts, strict=True)],
            ids,
            {name: column for name, column in columns.items() if name not in taken},
            self.trainer_state,
        )
        return torch.tensor(rewards, dtype=torch.float64)


def _sampled(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[sampling.Prompt],
    options: WinRateOptions,
) -> list[sampling.Completion]:
    prompt_ids = sampling.tokenize_prompts(
        tokenizer, prompts, options.chat_template_kwargs, repeat=options.num_generations
    )
    config = sampling.generation_config(model, tokenizer, options.sampling)
    return sampling.sample_all(model, prompt_ids, config, options.batch_size)


def _decoded(
    tokenizer: PreTrainedTokenizerBase, completions: list[sampling.Completion]
) -> list[str]:
    ids = [completion.token_ids for completion in completions]
    return tokenizer.batch_decode(ids, skip_special_tokens=True)


def _chunks(
    rows_of: Callable[[int, Columns], list],
    dataset: Dataset,
    model: PreTrainedModel,
    options: WinRateOptions,
    side: int,
) -> list:
    return rows_of_all_processes(
        rows_of,
        dataset,
        model,
        size=max(1, options.batch_size // options.num_generations),
        seed=[options.seed, side],
        title="Sampling",
        disable_tqdm=options.disable_tqdm,
    )


def _check_one_of(judge: Judge | None, reward_func: RewardFunc | None) -> None:
    if (judge is None) == (reward_func is None):
        given = "neither" if judge is None else "both"
        raise ValueError(
            f"{given} of judge and reward_func given: exactly one decides who wins. Pass "
            "judge=<(prompts, first, second) -> probabilities> or reward_func=<a gold reward>."
        )
    if reward_func is not None:
        scoring.checked_reward_funcs([reward_func])


def _texts_of(opponent: str | Sequence[Sequence[str]], dataset: Dataset, G: int) -> list[list[str]]:
    """P lists of G texts; one text per prompt meets all of its G completions."""
    if isinstance(opponent, str):
        if opponent not in dataset.column_names:
            raise ValueError(
                f"opponent={opponent!r} is no column of the dataset, which has "
                f"{dataset.column_names}. Name the column of reference completions, or give a "
                "model."
            )
        return [[text] * G for text in completion_texts(dataset[opponent])]
    texts = [list(group) * (G if len(group) == 1 else 1) for group in opponent]
    if len(texts) != len(dataset) or any(len(group) != G for group in texts):
        raise ValueError(
            f"opponent holds {len(texts)} groups of {sorted({len(g) for g in texts})} texts for "
            f"{len(dataset)} prompts with num_generations={G}. Give each prompt one text or "
            f"{G}, as sample_opponent does under the same options."
        )
    return texts


class WinRateEvaluator(Evaluator):
    """Adds win rate, gold score and length to every evaluation of a trainer.

    The numbers are named `eval_generation/win_rate` and so on, apart from those of
    `PreferenceClassifier`. Training is the same to the bit with and without this callback.

    Args:
        judge, reward_func, opponent: as in `evaluate_win_rate`. An opponent that is a model samples
            once per evaluation set: its completions are kept, and it must not be trained meanwhile.
        dataset: default the dataset under evaluation.
        tokenizer: default the trainer's `processing_class`.
        options: fields of [`WinRateOptions`]; those that say how to sample, `batch_size` and
            `disable_tqdm` default to the trainer's config.

    Attributes:
        results: prefix of each evaluation set (`"eval"`) to the latest [`WinRateResult`].
    """

    options_class = WinRateOptions
    metrics_prefix = "generation/"

    def __init__(
        self,
        judge: Judge | None = None,
        reward_func: RewardFunc | None = None,
        opponent: Opponent = "completion",
        dataset: Dataset | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        **options: Any,
    ):
        super().__init__(dataset, tokenizer, **options)
        _check_one_of(judge, reward_func)
        self.judge, self.reward_func, self.opponent = judge, reward_func, opponent
        self._kept: dict[str, list[list[str]]] = {}

    def evaluate(self, model, tokenizer, dataset: Dataset, state: TrainerState, **options) -> Any:
        """A [`WinRateResult`]."""
        opponent = self.opponent
        if isinstance(opponent, torch.nn.Module):
            key = f"{dataset._fingerprint}"
            if key not in self._kept:
                self._kept[key] = sample_opponent(opponent, tokenizer, dataset, **options)
            opponent = self._kept[key]
        return evaluate_win_rate(
            model,
            tokenizer,
            dataset,
            judge=self.judge,
            reward_func=self.reward_func,
            opponent=opponent,
            trainer_state=state,
            **options,
        )
