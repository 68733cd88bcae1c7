"""What is balanced: the shape of one model's experts, and of the machines they live on.

Shape suffixes, everywhere in the project: T windows, L MoE layers, E logical experts, P slots of all ranks, S slots per
rank, R ranks, N nodes, K length of a dispatch table's row.
"""

import hashlib

import msgspec

from eplb_async.core.errors import SpecError

__all__ = ["MoESpec", "Topology"]


class Topology(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Where slots are: slot p lives on rank p // S, rank r on node r // (R / N). All a policy knows of the hardware.

    Fields:
        num_ranks: R.
        slots_per_rank: S.
        num_nodes: N; divides R.
        num_expert_groups: expert groups of the router (DeepSeek's n_group); group g holds experts
            g * E / groups .. (g + 1) * E / groups - 1. 1: no groups.
        max_replicas: most slots that one expert may have in a layer (K, the length of its dispatch row).
    """

    num_ranks: int
    slots_per_rank: int
    num_nodes: int = 1
    num_expert_groups: int = 1
    max_replicas: int = 1024

    def __post_init__(self) -> None:
        for name in ("num_ranks", "slots_per_rank", "num_nodes", "num_expert_groups", "max_replicas"):
            if getattr(self, name) < 1:
                raise SpecError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if self.num_ranks % self.num_nodes:
            raise SpecError(
                f"{self.num_ranks} ranks do not divide over {self.num_nodes} nodes; every node needs the same number of ranks"
            )

    @property
    def num_slots(self) -> int:
        """P = S * R."""
        return self.num_ranks * self.slots_per_rank

    @property
    def ranks_per_node(self) -> int:
        """R / N."""
        return self.num_ranks // self.num_nodes


class MoESpec(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The experts of one model served by one group of ranks. A second model on the same ranks is a second group.

    Fields:
        num_layers: L, MoE layers only; dense layers have no index.
        num_experts: E, logical experts per MoE layer.
        num_ranks: R, expert-parallel workers that serve the model together.
        num_redundant: slots beyond one per expert; E + num_redundant = P must be divisible by R.
        num_nodes: hosts; divides R. Policies keep traffic inside a node where they can.
        num_expert_groups: the router's expert groups (DeepSeek's n_group); divides E.
        table_length: K, most dispatch entries per expert; 0 picks what any even placement can need.

    Raises:
        SpecError: the numbers do not fit together; the message says which.
    """

    num_layers: int
    num_experts: int
    num_ranks: int
    num_redundant: int = 0
    num_nodes: int = 1
    num_expert_groups: int = 1
    table_length: int = 0

    def __post_init__(self) -> None:
        for name, least in (
            ("num_layers", 1),
            ("num_experts", 1),
            ("num_ranks", 1),
            ("num_redundant", 0),
            ("table_length", 0),
        ):
            if getattr(self, name) < least:
                raise SpecError(f"{name} is {getattr(self, name)}; it must be at least {least}")
        if self.num_slots % self.num_ranks:
            below, above = self._nearest_redundant()
            raise SpecError(
                f"{self.num_experts} experts + {self.num_redundant} redundant = {self.num_slots} slots do not divide over "
                f"{self.num_ranks} ranks; use num_redundant={above}" + (f" or {below}" if below >= 0 else "")
            )
        if self.num_expert_groups < 1 or self.num_experts % self.num_expert_groups:
            raise SpecError(f"{self.num_experts} experts do not divide into {self.num_expert_groups} expert groups")
        least = -(-self.num_slots // self.num_experts)
        if 0 < self.table_length < least:
            raise SpecError(
                f"table_length is {self.table_length}, but {self.num_slots} slots for {self.num_experts} experts "
                f"need {least} replicas of some; use 0 for the default"
            )
        _ = self.topology

    @property
    def num_slots(self) -> int:
        """P, slots per layer over all ranks."""
        return self.num_experts + self.num_redundant

    @property
    def slots_per_rank(self) -> int:
        """S."""
        return self.num_slots // self.num_ranks

    @property
    def max_replicas(self) -> int:
        """K, the length of a dispatch row: as given, else enough for one replica on every rank."""
        if self.table_length:
            return self.table_length
        return min(self.num_redundant + 1, max(self.num_ranks, 2 * -(-self.num_slots // self.num_experts)))

    @property
    def topology(self) -> Topology:
        """The part that policies need."""
        return Topology(
            num_ranks=self.num_ranks,
            slots_per_rank=self.slots_per_rank,
            num_nodes=self.num_nodes,
            num_expert_groups=self.num_expert_groups,
            max_replicas=self.max_replicas,
        )

    def digest(self) -> str:
        """16 hex digits that differ when any field does."""
        return hashlib.sha256(msgspec.json.encode(self)).hexdigest()[:16]

    def _nearest_redundant(self) -> tuple[int, int]:
        rest = self.num_slots % self.num_ranks
        return self.num_redundant - rest, self.num_redundant + self.num_ranks - rest
