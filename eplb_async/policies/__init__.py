"""Policies: where each expert's replicas should live. Pure functions, found by name."""

from eplb_async.policies.base import Policy, PolicyFunction
from eplb_async.policies.registry import decode_options, load_policy, policy_names, run_policy

__all__ = ["Policy", "PolicyFunction", "decode_options", "load_policy", "policy_names", "run_policy"]
