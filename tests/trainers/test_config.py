"""Options that break an objective are refused at construction: value, reason, remedy."""

import json
import pickle
import warnings

import pytest
import trl

from tests.runs import METHODS, OURS, build, first_letter, settings, vowels
from tests.tiny import tiny_llama, tiny_prompts, tiny_tokenizer
from trl_ext import (
    GRPOConfig,
    GRPOTrainer,
    MajorityVoteConfig,
    PassAtKConfig,
    PassAtKTrainer,
)

K_SAMPLE = {PassAtKConfig: {}, MajorityVoteConfig: {"answer_extractor": first_letter, "k": 2}}


def config(cls, folder="out", **options):
    return cls(folder, **settings(**{**K_SAMPLE.get(cls, {}), **options}))


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


@pytest.mark.parametrize(("cls", "options", "message"), REFUSED, ids=str)
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


@pytest.mark.parametrize("cls", [GRPOConfig, *K_SAMPLE])
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
