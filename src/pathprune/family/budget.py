"""How large a model may be."""

from __future__ import annotations

import math
from dataclasses import dataclass
from numbers import Integral, Real

from pathprune.errors import BudgetError
from pathprune.family.costs import Cost, Family
from pathprune.registry import BUDGETS


@dataclass(frozen=True, init=False, repr=False)
class Budget:
    """A limit on size; exactly one is given.

    Args:
        keep: fraction in (0, 1] of the prunable parameters (those that belong to a pair).
        params: parameters of the whole model; a ``float`` in (0, 1] is a fraction of the dense model's, an ``int`` an
            absolute number.
        macs: multiply-accumulates of the whole model per token at the path's sequence length; fraction or absolute
            number likewise.
        bytes: of the whole model's weights on disk (safetensors), in the precision in which they are saved; likewise.
        **other: a kind that another package has registered (``pathprune.registry.BUDGETS``).

    Raises:
        BudgetError: none or several are given, or the value is out of range.
        SettingError: there is no such kind.

    Example:
        >>> import pathprune as pp
        >>> pp.Budget(params=18_000_000)
        Budget(params=18000000)
        >>> pp.Budget(bytes=0.5).kind
        'bytes'
    """

    kind: str
    value: float | int

    def __init__(
        self,
        *,
        keep: float | None = None,
        params: float | int | None = None,
        macs: float | int | None = None,
        bytes: float | int | None = None,
        **other: float | int | None,
    ) -> None:
        named = {"keep": keep, "params": params, "macs": macs, "bytes": bytes, **other}
        given = {name: value for name, value in named.items() if value is not None}
        if len(given) != 1:
            listed = [f"{name}=" for name in ("keep", "params", "macs", "bytes")]
            raise BudgetError(
                f"a budget takes exactly one of {', '.join(listed[:-1])} or {listed[-1]}; got {[*given] or 'none'}"
            )
        ((kind, value),) = given.items()
        absolute = BUDGETS[kind].absolute
        if isinstance(value, bool) or not isinstance(value, Real):
            raise BudgetError(f"{kind}={value!r} is not a number")
        if isinstance(value, Integral) and absolute:
            if value <= 0:
                raise BudgetError(f"{kind}={value} must be positive")
        elif not 0 < value <= 1:
            raise BudgetError(
                f"{kind}={value} is not in (0, 1]; a float is the fraction kept"
                + (", an int an absolute number" if absolute else "")
            )
        object.__setattr__(self, "kind", kind)
        object.__setattr__(self, "value", value)

    @property
    def keep(self) -> float | None:
        return self.value if self.kind == "keep" else None

    @property
    def params(self) -> float | int | None:
        return self.value if self.kind == "params" else None

    @property
    def macs(self) -> float | int | None:
        return self.value if self.kind == "macs" else None

    @property
    def bytes(self) -> float | int | None:
        return self.value if self.kind == "bytes" else None

    def __str__(self) -> str:
        return f"{self.kind}={self.value}"

    def __repr__(self) -> str:
        return f"Budget({self})"

    def removals(self, family: Family) -> int:
        """How many removals along the order the largest size within the budget lies.

        Raises:
            BudgetError: even the smallest size is larger, or the dense model is smaller than an absolute budget
                (naming a larger number is taken for a slip).
        """
        cost: Cost = BUDGETS[self.kind]
        sizes = cost.sizes(family)
        dense = sizes[0]
        absolute = isinstance(self.value, Integral) and cost.absolute
        limit = self.value if absolute else self.value * dense
        if absolute and limit > dense:
            raise BudgetError(f"{self} is more than the dense model's {dense:,.0f}; ask for at most that")
        if limit < (smallest := sizes.min()):
            # Rounded up from a little more, so that the fraction times the dense size is enough in floating point.
            least = int(smallest) if absolute else min(1.0, math.ceil(smallest / dense * 1e4 + 1e-6) / 1e4)
            raise BudgetError(
                f"{self} allows {limit:,.0f}, but the path's smallest model, with every pair removed, has "
                f"{smallest:,.0f} of {dense:,.0f}; ask for {self.kind}={least} or more"
            )
        return int((sizes <= limit).argmax())
