"""Who samples, when, and with which weights: in place, in a process of its own, or on a server."""

from trl_ext.rollouts._inputs import positions
from trl_ext.rollouts.branching import branch, refuse_branching_options
from trl_ext.rollouts.engine import Request, Rollout, Sampler, SamplerError
from trl_ext.rollouts.mixture import GeometricMixture, mixed_logps
from trl_ext.rollouts.onestep import OneStepAhead
from trl_ext.rollouts.process import ProcessSampler
from trl_ext.rollouts.random_state import random_state, set_random_state
from trl_ext.rollouts.sampling import Opponent, sample
from trl_ext.rollouts.scoring import sampled_logps
from trl_ext.rollouts.server import ServerSampler

__all__ = [
    "GeometricMixture",
    "OneStepAhead",
    "Opponent",
    "ProcessSampler",
    "Request",
    "Rollout",
    "Sampler",
    "SamplerError",
    "ServerSampler",
    "branch",
    "mixed_logps",
    "positions",
    "random_state",
    "refuse_branching_options",
    "sample",
    "sampled_logps",
    "set_random_state",
]
