"""The pairs of one model, and its identity."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from pathprune.errors import SettingError
from pathprune.family.pairs import Pair, check_fields


@dataclass(frozen=True)
class BaseModel:
    """Identity and size of the model that the pairs were found in.

    Args:
        architecture: class name.
        config_hash: SHA-256 of the configuration without what loading or saving adds.
        fingerprint: two SHA-256 of parameter names, shapes and a sample of the values (``discovery.identify``).
        params: parameters of the whole model.
        macs_per_token: multiply-accumulates of the linear maps that run at every token, per token of input.
        macs_per_sequence: of those that run once a sequence (poolers, classification heads).
        bytes: of the weights on disk, as safetensors; 0 where a path of 0.1.0 does not say.
        itemsize: bytes of one prunable weight; of the narrowest, where they differ.
    """

    architecture: str
    config_hash: str
    fingerprint: str
    params: int
    macs_per_token: int
    macs_per_sequence: int = 0
    bytes: int = 0
    itemsize: int = 0

    def __post_init__(self) -> None:
        check_fields("the base model", {str: (self.architecture, self.config_hash, self.fingerprint)})
        for name in ("params", "macs_per_token", "macs_per_sequence", "bytes", "itemsize"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 2**63:
                raise SettingError(f"the base model's {name} is {value!r}, which is no count")


class PairList(list[Pair]):
    """The pairs of one model: a list, with the model's identity and what was refused.

    Args:
        pairs: in forward order.
        base: the model they were found in.
        refused: sublayer name -> why it offers no pair.

    Example:
        >>> pairs = pp.find_pairs(model)
        >>> len(pairs), pairs.prunable_params
        (6, 14624)
    """

    def __init__(self, pairs: Iterable[Pair], base: BaseModel, refused: dict[str, str] | None = None) -> None:
        super().__init__(pairs)
        self.base = base
        self.refused = dict(refused or {})

    def __eq__(self, other: object) -> bool:
        return super().__eq__(other) and (not isinstance(other, PairList) or self.base == other.base)

    def __ne__(self, other: object) -> bool:
        return not self == other

    __hash__ = None  # as of any list

    @property
    def prunable_params(self) -> int:
        """Parameters that belong to some pair."""
        return sum(pair.params for pair in self)
