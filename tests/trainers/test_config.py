"""Options that break an objective are refused at construction: value, reason, remedy."""

import dataclasses
import json
import pickle
import warnings

import pytest
import trl

from tests.runs import METHODS, OURS, build, case, first_letter, settings, vowels
from tests.tiny import tiny_llama, tiny_prompts, tiny_tokenizer
from trl_ext import (
    GRPOConfig,
    GRPOTrainer,
    MajorityVoteConfig,
    MTPOConfig,
    NashConfig,
    OnlineDPOConfig,
    PassAtKConfig,
    PassAtKTrainer,
)
from trl_ext.trainers.group import IGNORED
from trl_ext.trainers.nash import PAPER_VALUES

K_SAMPLE = {PassAtKConfig: {}, MajorityVoteConfig: {"answer_extractor": first_letter, "k": 2}}
OF_GROUPS = {OnlineDPOConfig: {}, NashConfig: {"judge": "bradley_terry"}, MTPOConfig: {}}


def config(cls, folder="out", **options):
    return cls(folder, **settings(**{**(K_SAMPLE | OF_GROUPS).get(cls, {}), **options}))


REFUSED = [
    (PassAtKConfig, {"k": 5}, "k=5.*num_generations=4.*Lower k"),
    (PassAtKConfig, {"k": 0}, "k=0.*k ≥ 1"),
    (PassAtKConfig, {"k": 4, "estimator": "sloo"}, "k=4.*at least 5 samples"),
    (PassAtKConfig, {"k": 4, "estimator": "analytic"}, "k=4.*at least 5 samples"),
    (PassAtKConfig, {"k": 1, "estimator": "centred"}, "k=1.*centred.*k ≥ 2"),
    (PassAtKConfig, {"k": 1, "estimator": "sloo_minus_one"}, "k=1.*k ≥ 2"),
    (PassAtKConfig, {"k": 3, "num_generations_eval": 2}, "k=3.*num_generations_eval=2"),
    (PassAtKConfig, {"estimator": "lo"}, "estimator='lo' is none of loo, centred"),
    (PassAtKConfig, {"k_schedule": {5: 2}}, "k_schedule.*from step 0"),
    (PassAtKConfig, {"k_schedule": {0: 2, 10: 9}}, "k=9.*num_generations=4"),
    (MajorityVoteConfig, {"answer_extractor": None}, "answer_extractor=None.*module:function"),
    (MajorityVoteConfig, {"answer_extractor": "nowhere:f"}, "answer_extractor='nowhere:f'"),
    (MajorityVoteConfig, {"unparsable": "drop"}, "unparsable='drop'"),
    (MajorityVoteConfig, {"k": 1}, "k=1.*at least 2"),
    (MajorityVoteConfig, {"k": 5}, "k=5.*num_generations=4"),
    *[
        (cls, options, message)
        for cls in K_SAMPLE
        for options, message in [
            ({"scale_rewards": "group"}, "scale_rewards='group'.*Leave it at 'none'"),
            ({"scale_rewards": True}, "scale_rewards='group'.*Leave it at 'none'"),
            ({"multi_objective_aggregation": "normalize_then_sum"}, "sum_then_normalize"),
            ({"top_p": 0.9}, "top_p=0.9.*another policy.*top_p=1.0"),
            ({"top_k": 20}, "top_k=20.*top_k=0"),
            ({"min_p": 0.1}, "min_p=0.1"),
            ({"repetition_penalty": 1.1}, "repetition_penalty=1.1"),
        ]
    ],
    (GRPOConfig, {"kl_gradient": "reverse"}, "kl_gradient='reverse' is none of sequence"),
    (GRPOConfig, {"beta": 0.1, "kl_baseline": "mean"}, "kl_baseline='mean' is none of none"),
    (GRPOConfig, {"kl_baseline": "leave_one_out"}, "beta=0.0.*Leave it at 'none'"),
    (
        GRPOConfig,
        {"beta": 0.1, "kl_gradient": "token", "kl_baseline": "leave_one_out"},
        "kl_gradient='token'.*only the exact forms",
    ),
    (
        GRPOConfig,
        {"beta": 0.1, "use_bias_correction_kl": False},
        "use_bias_correction_kl=False.*'forward_token'",
    ),
    (GRPOConfig, {"beta": 0.1, "top_p": 0.9}, "top_p=0.9.*kl_gradient='sequence'"),
    (
        GRPOConfig,
        {"log_completions": True, "log_completions_hub_repo": "me/logs"},
        "public repository.*hub_private_repo=True",
    ),
]


DPO, NASH, HYBRID = OnlineDPOConfig, NashConfig, {"pair_source": "hybrid", "kl_coef": 0.1}
REFUSED += [
    *[
        (cls, options, message)
        for cls in OF_GROUPS
        for options, message in [
            ({"scale_rewards": "group"}, "scale_rewards='group' is not applied.*at 'none'"),
            ({"epsilon_high": 0.3}, "epsilon_high=0.3 is not applied.*Leave it at None"),
            ({"delta": 2.0}, "delta=2.0 is not applied"),
            ({"mask_truncated_completions": True}, "mask_truncated_completions=True.*at False"),
            ({"importance_sampling_level": "sequence"}, "importance_sampling_level='sequence'"),
            ({"vllm_importance_sampling_correction": True}, "vllm_importance_sampling_corr"),
            ({"judge": "nowhere:judge"}, "judge='nowhere:judge' names no function"),
            ({"judge": "bradley_terry", "judge_both_orders": True}, "rewards have no order"),
        ]
    ],
    (DPO, {"loss_type": "dapo"}, "loss_type='dapo' is none of sigmoid, ipo"),
    (DPO, {"pair_rule": "random"}, "pair_rule='random' is none of best_worst"),
    (DPO, {"pair_source": "buffer"}, "pair_source='buffer' is none of online"),
    (DPO, {"missing_eos": "drop"}, "missing_eos='drop' is none of none"),
    (DPO, {"f_divergence": "tv"}, "f_divergence='tv' is none of reverse_kl"),
    (DPO, {"loss_type": "ipo", "f_divergence": "js"}, "f_divergence='js'.*'ipo' does not read"),
    (DPO, {"label_smoothing": 0.1}, "label_smoothing=0.1.*'sigmoid' does not read it.*at 0.0"),
    (DPO, {"rpo_eta": 0.1}, "rpo_eta=0.1 is not applied"),
    (DPO, {"xpo_alpha": 0.1}, "xpo_alpha=0.1 is not applied"),
    (DPO, {"epsilon": 0.1}, "epsilon=0.1 is not applied"),
    (DPO, {"loss_type": "rpo", "length_normalised": True}, "length_normalised=True is not"),
    (DPO, {"loss_type": "rpo", "soft_labels": True}, "soft_labels=True is not applied"),
    (DPO, {"f_alpha": 0.3}, "f_alpha=0.3 is not applied.*'reverse_kl' has no α"),
    (DPO, {"f_divergence": "alpha", "f_alpha": 1.0}, "f_alpha=1.0 in \\(0, 1\\)"),
    (DPO, {"loss_type": "robust", "label_smoothing": 0.5}, "label_smoothing=0.5 must lie"),
    (DPO, {"beta": 0.0}, "beta=0.0 must be positive.*'sigmoid'.*reference"),
    (DPO, {"beta": -0.1, "loss_type": "rloo"}, "beta=-0.1"),
    (DPO, {"missing_eos": "replace"}, "missing_eos='replace'.*need one"),
    (DPO, {"missing_eos_value": -1.0}, "missing_eos='none'.*reads none"),
    (
        DPO,
        {"judge": "bradley_terry", "missing_eos": "replace", "missing_eos_value": -1.0},
        "judge='bradley_terry' is not supported with missing_eos='replace'.*missing_eos='none'",
    ),
    (DPO, {"judge": first_letter, "loss_type": "rloo"}, "loss_type='rloo'.*NashTrainer"),
    (DPO, {"soft_labels": True}, "soft_labels=True needs.*pass judge"),
    (DPO, {"kl_coef": 0.1}, "kl_coef=0.1 is not applied.*only pair_source='hybrid'"),
    *[
        (DPO, {"pair_source": source, "num_generations": G, **own, **options}, message)
        for source, G, own in [("offline", 2, {}), ("replay", 2, {}), ("hybrid", 4, HYBRID)]
        for options, message in [
            ({"judge": "bradley_terry"}, f"judge='bradley_terry'.*{source!r} has its pairs"),
            ({"pair_rule": "all_pairs"}, f"pair_rule='all_pairs'.*{source!r} has its pairs"),
            ({"loss_type": "xpo"}, f"loss_type='xpo'.*pair_source={source!r}.*'online'"),
            ({"loss_type": "rloo"}, f"loss_type='rloo'.*pair_source={source!r}.*'online'"),
        ]
    ],
    (
        DPO,
        {"pair_source": "offline", "num_generations": 2, "schedule": "one_step"},
        "schedule='one_step'.*nothing is sampled.*'sync'",
    ),
    (DPO, {"pair_source": "offline"}, "num_generations=4.*'offline' has the two"),
    (DPO, {**HYBRID, "num_generations": 2}, "num_generations=2.*at least two samples"),
    (DPO, {"pair_source": "hybrid"}, "kl_coef=None.*needs λ ≥ 0"),
    (DPO, {**HYBRID, "kl_coef": -1.0}, "kl_coef=-1.0"),
    (DPO, {**HYBRID, "top_p": 0.9}, "top_p=0.9.*another policy"),
    (DPO, {**HYBRID, "temperature": 0.7}, "temperature=0.7.*scale_logps_by_temperature=True"),
    (DPO, {"loss_type": "rloo", "top_k": 5}, "top_k=5.*another policy"),
    (DPO, {"loss_type": "proximal_rloo", "temperature": 0.7}, "temperature=0.7"),
    (DPO, {"loss_type": "xpo"}, "num_generations=4.*Set num_generations=2"),
    (DPO, {"loss_type": "xpo", "num_generations": 2, "use_vllm": True}, "use_vllm=True"),
    (NASH, {"judge": None}, "judge=None.*pairwise judge.*'bradley_terry'"),
    (NASH, {"algorithm": "ppo"}, "algorithm='ppo' is none of nash_md"),
    (NASH, {"epsilon": 0.1}, "epsilon=0.1.*not clipped"),
    (NASH, {"beta": -0.1}, "beta=-0.1 must be ≥ 0"),
    (NASH, {"algorithm": "inpo", "eta": 0.0}, "eta=0.0 positive"),
    (NASH, {"algorithm": "inpo", "beta": 0.1, "eta": 0.05}, "beta=0.1 must lie in .*eta=0.05"),
    (NASH, {"eta": 0.1}, "eta=0.1 is not applied: algorithm='nash_md' has none"),
    (NASH, {"algorithm": "spo", "mixture_coefficient": 0.1}, "mixture_coefficient=0.1.*has none"),
    (NASH, {"mixture_coefficient": 1.5}, "mixture_coefficient=1.5 must lie in"),
    (NASH, {"algorithm": "dno", "beta": 0.1}, "beta=0.1 is not applied.*Leave it at 0"),
    (NASH, {"beta": 0.0}, "beta=0.*no mixture.*mixture_coefficient=0"),
    (NASH, {"num_generations": 3, "per_device_train_batch_size": 6}, "num_generations=3.*even"),
    (NASH, {"use_vllm": True}, "use_vllm=True.*use_vllm=False"),
    (NASH, {"proximal_steps": 4}, "proximal_steps=4 is not applied"),
    (NASH, {"algorithm": "nash_mp"}, "proximal_steps=None must be a positive multiple"),
    (
        NASH,
        {"algorithm": "nash_mp", "proximal_steps": 3, "steps_per_generation": 2},
        "proximal_steps=3.*multiple of the 2 optimizer steps",
    ),
    (NASH, {"algorithm": "spo", "top_p": 0.5}, "top_p=0.5.*another policy"),
    (NASH, {"algorithm": "dno", "temperature": 0.5}, "temperature=0.5.*temperature=1.0 or"),
]


OTHER_VALUES = {str: "group", bool: True, float: 0.3, type(None): 0.3}


@pytest.mark.parametrize("cls", OF_GROUPS)
@pytest.mark.parametrize("name", IGNORED)
def test_what_a_loss_over_groups_lacks_is_refused(cls, name):
    (default,) = (f.default for f in dataclasses.fields(cls) if f.name == name)
    other = False if default is True else OTHER_VALUES[type(default)]
    words = {
        "importance_sampling_level": "sequence",
        "multi_objective_aggregation": "normalize_then_sum",
    }
    with pytest.raises(ValueError, match=f"{name}=.* is not applied: {cls.__name__} has its own"):
        config(cls, **{name: words.get(name, other)})


@pytest.mark.parametrize("algorithm", PAPER_VALUES)
def test_unset_values_of_a_game_are_the_papers(algorithm):
    given = {"proximal_steps": 1} if algorithm == "nash_mp" else {}
    args = config(NashConfig, algorithm=algorithm, **given)
    values = {name: getattr(args, name) for name in ("beta", "eta", "mixture_coefficient")}
    unset = {"beta": None, "eta": None, "mixture_coefficient": None}
    assert values == unset | PAPER_VALUES[algorithm]


@pytest.mark.parametrize(("cls", "options", "message"), REFUSED, ids=case)
def test_refused(cls, options, message):
    with pytest.raises(ValueError, match=message):
        config(cls, **options)


@pytest.mark.parametrize("cls", K_SAMPLE)
@pytest.mark.parametrize("loss_type", ["dapo", "grpo", "bnpo"])
def test_length_normalisers_are_accepted_with_a_warning(cls, loss_type):
    with pytest.warns(UserWarning, match=f"loss_type='{loss_type}' reweighs completions"):
        config(cls, loss_type=loss_type)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        config(cls, loss_type="luspo")


def test_trl_options_that_harm_nothing_are_accepted():
    config(GRPOConfig, top_p=0.9)
    config(GRPOConfig, beta=0.1, kl_gradient="token", top_k=20)
    assert config(GRPOConfig, kl_gradient="forward_token").use_bias_correction_kl is False


def test_k_schedule_from_yaml_json_and_python():
    for given in ({0: 4, 2: 1}, {"2": 1, "0": 4}, json.dumps({"0": 4, "2": 1})):
        schedule = config(PassAtKConfig, k_schedule=given)
        assert [schedule.k_at(step) for step in range(4)] == [4, 4, 1, 1]


def test_k_schedule_is_followed(tmp_path, monkeypatch):
    seen, credit = [], PassAtKTrainer.credit

    def watched(self, rewards_PG):
        seen.append(self.k)
        return credit(self, rewards_PG)

    monkeypatch.setattr(PassAtKTrainer, "credit", watched)
    build(PassAtKTrainer, tmp_path, k_schedule={0: 4, 2: 2, 3: 1}, max_steps=4).train()
    assert seen == [4, 4, 2, 1]


def test_analytic_refuses_rewards_between_0_and_1(tmp_path):
    def half(completions, **_):
        return [0.5] * len(completions)

    run = build(PassAtKTrainer, tmp_path, arguments={"reward_funcs": half}, estimator="analytic")
    with pytest.raises(ValueError, match=r"rewards of exactly 0 or 1.*sloo_minus_one"):
        run.train()


@pytest.mark.parametrize("cls", [GRPOConfig, *K_SAMPLE, *OF_GROUPS])
def test_no_token_is_pickled(cls):
    marked = config(cls, hub_token="hf_CANARY")
    assert marked.hub_token == "hf_CANARY"
    assert b"CANARY" not in pickle.dumps(marked)


def test_cpu_needs_no_bf16_option():
    given = settings()
    del given["bf16"], given["use_cpu"]
    assert GRPOConfig("out", **given).bf16 is False


def test_trl_config_is_refused_by_name(tmp_path):
    with pytest.raises(TypeError, match=r"GRPOConfig of trl_ext.*trl\.trainer"):
        GRPOTrainer(
            tiny_llama(120),
            vowels,
            trl.GRPOConfig(str(tmp_path), **settings()),
            tiny_prompts(4),
            processing_class=tiny_tokenizer(),
        )


@pytest.mark.parametrize("trainer", OURS, ids=lambda t: t.__name__)
def test_config_inherits_trl_and_adds_documented_options(trainer):
    cls, _ = METHODS[trainer]
    assert issubclass(cls, trl.GRPOConfig) and trainer.config_class is cls
