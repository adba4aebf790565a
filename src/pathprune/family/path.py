"""SolutionPath: the ranking that a search found, as an object and as an artifact on disk."""

from __future__ import annotations

import os
import zlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from typing import Any, Self

import numpy as np

from pathprune.errors import ArtifactError, MismatchError, SettingError
from pathprune.family.artifact import from_tensors, read_artifact, to_tensors, write_artifact
from pathprune.family.budget import Budget
from pathprune.family.checks import CHECKS, checks
from pathprune.family.costs import Family
from pathprune.family.learned import LARGE, LEARNED, check_learned, selected
from pathprune.family.order import Order, Unit, check_widths, removal_order
from pathprune.family.pair_list import PairList
from pathprune.family.pairs import whole
from pathprune.family.selection import Selection, same
from pathprune.family.serialise import base_to_json, pair_to_json, pairs_from_json
from pathprune.family.trajectory import Trajectory
from pathprune.types import Floats
from pathprune.versions import library_versions

FORMAT = 1


@dataclass(frozen=True, eq=False)
class SolutionPath:
    """A ranking of every unit, and with it a model of every size.

    Args:
        pairs: the pairs of the base model.
        ranking: pair name -> (G, U); a unit with a larger number stays longer.
        unit: what an attention layer may lose (``pathprune.family.order.removal_order``).
        multiple: widths stay multiples of this many units.
        seq_len: sequence length, in tokens, at which MACs are counted.
        fill: pair name -> (G, D), see ``Selection``.
        basis: pair name -> (G, D, D), see ``Selection``.
        slope: pair name -> (G, U); where a fraction r of the prunable parameters is kept, the ``Selection``'s
            scale is 1 + (1 - r) slope.
        output: pair name -> (2, d), g and s; there, what the consumer of a pair that loses units puts out is multiplied
            by 1 + (1 - r) g, and (1 - r) s is added.
        fill_sum: pair name -> (d,), what the consumer makes of the fill of all units; a sorted path has it
            (``transform.sorting``), so that a size can be loaded without the weights of the units that it lacks.
        normal: pair name -> (N, d), the covariance times the consumer's weight, for the same; where there is one.
        delta: parameter name -> array of its shape, what ``elastic`` has trained; see ``Selection``.
        delta_sum, delta_normal: ``fill_sum`` and ``normal`` of the consumer's delta.
        centre, covariance: pair name -> (N,) and (N, N), see ``Selection``. They are most of the path's bytes,
            about as many as the model's; without them (``centre={}, covariance={}``), every size is worse.
        trajectory: what the search did.
        config: how the search was set up; empty for a ranking from elsewhere.
        versions: of the libraries that made the path.

    Example:
        >>> path.save(folder / "run")
        >>> again = pp.SolutionPath.load(folder / "run")  # neither torch nor the model is needed
        >>> again == path
        True
        >>> again.select(pp.Budget(params=0.8)).params <= 0.8 * path.pairs.base.params
        True
    """

    pairs: PairList
    ranking: dict[str, Floats]
    unit: Unit = "mixed"
    multiple: int = 1
    seq_len: int = 128
    fill: dict[str, Floats] = field(default_factory=dict)
    basis: dict[str, Floats] = field(default_factory=dict)
    slope: dict[str, Floats] = field(default_factory=dict)
    output: dict[str, Floats] = field(default_factory=dict)
    centre: dict[str, Floats] = field(default_factory=dict)
    covariance: dict[str, Floats] = field(default_factory=dict)
    fill_sum: dict[str, Floats] = field(default_factory=dict)
    normal: dict[str, Floats] = field(default_factory=dict)
    delta: dict[str, Floats] = field(default_factory=dict)
    delta_sum: dict[str, Floats] = field(default_factory=dict)
    delta_normal: dict[str, Floats] = field(default_factory=dict)
    trajectory: Trajectory = field(default_factory=Trajectory)
    config: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_widths(self.unit, self.multiple)
        if not whole(self.seq_len):
            raise SettingError(f"seq_len={self.seq_len!r} must be at least 1, and an integer below 2**31")
        if not isinstance(self.config, dict) or not isinstance(self.versions, dict):
            raise SettingError("config and versions must be dicts")
        names = {pair.name for pair in self.pairs}
        if len(names) < len(self.pairs):
            raise MismatchError("two pairs have the same name")
        for part, row in LEARNED.items():  # as it will be on disk, so that saving changes no family
            with np.errstate(over="ignore"):  # what overflows is refused below
                arrays = {name: np.asarray(array, dtype=row.dtype) for name, array in getattr(self, part).items()}
            object.__setattr__(self, part, arrays)
        if set(self.ranking) != names:
            raise MismatchError(
                f"the ranking does not name the model's pairs: missing {sorted(names - set(self.ranking))[:3]}, "
                f"unknown {sorted(set(self.ranking) - names)[:3]}"
            )
        check_learned(self.pairs, self.arrays)

    def __eq__(self, other: object) -> bool:
        return same(self, other) if isinstance(other, SolutionPath) else NotImplemented

    def __hash__(self) -> int:
        return hash((self.pairs.base, tuple(self.pairs), self.unit, self.multiple, self.seq_len))

    @classmethod
    def from_scores(
        cls,
        pairs: PairList,
        scores: Mapping[str, Any],
        *,
        unit: Unit = "mixed",
        multiple: int = 1,
        seq_len: int = 128,
    ) -> Self:
        """A path from any ranking: a baseline's, or your own.

        Args:
            pairs: from ``find_pairs``.
            scores: pair name -> tensor or array of ``pair.shape``; larger stays longer. Scores of
                all pairs are compared as they are: divide by ``pair.unit_params`` to rank by
                gain per parameter.
            unit, multiple, seq_len: see ``SolutionPath``.

        Raises:
            MismatchError: names or shapes are not those of the pairs, or a score is not finite.
            SettingError: ``unit``, ``multiple`` or ``seq_len`` is out of range.
        """
        ranking = {
            name: np.asarray(score.detach().cpu().float() if hasattr(score, "detach") else score, dtype=np.float32)
            for name, score in scores.items()
        }
        return cls(pairs, ranking, unit=unit, multiple=multiple, seq_len=seq_len, versions=library_versions())

    @property
    def arrays(self) -> dict[str, dict[str, Floats]]:
        """Name (``pathprune.family.learned``) -> pair name -> array."""
        return {part: getattr(self, part) for part in LEARNED}

    @cached_property
    def order(self) -> Order:
        """The family, as a sequence of removals."""
        return removal_order(self.pairs, self.ranking, unit=self.unit, multiple=self.multiple)

    def family(self, itemsize: int | None = None) -> Family:
        """All sizes, as costs see them.

        Args:
            itemsize: bytes of a weight as it will be saved; by default those of the model that was searched.
        """
        return Family(self.pairs, self.order, self.seq_len, frozenset(self.fill), itemsize)

    def select(self, budget: Budget, *, itemsize: int | None = None) -> Selection:
        """The largest architecture within ``budget``.

        The budget is never exceeded, and the selection falls short of it by less than the cost of the next removal on
        the path. Selections of one path are nested, whatever their budgets.

        Args:
            itemsize: bytes of a weight as it will be saved, for ``Budget(bytes=...)``; by default those of the model
                that was searched.

        Raises:
            BudgetError: even the path's smallest architecture is larger, or the dense model is smaller than an
                absolute budget (naming a larger number is taken for a slip).
        """
        removals = budget.removals(self.family(itemsize))
        keep = self.order.keep(removals)
        bare = Selection(self.pairs, keep, budget, removals, self.seq_len)
        return replace(bare, **selected(self.arrays, keep, bare.sparsity))

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write ``path.json`` and its tensors into ``folder``, replacing a path that is there.

        Raises:
            ArtifactError: the folder cannot be written; what was there is unchanged.
        """
        steps = {name: np.asarray(array, np.float32) for name, array in asdict(self.trajectory).items()}
        arrays = self.arrays
        tensors = to_tensors({**arrays, "trajectory": steps})
        if self.fill_sum:
            for part in LARGE:
                for name, array in arrays[part].items():
                    tensors |= checks(f"{part}/{name}", array, LEARNED[part].symmetric)
        meta = {
            "format": FORMAT,
            "base": base_to_json(self.pairs.base),
            "pairs": [pair_to_json(pair) for pair in self.pairs],
            "refused": self.pairs.refused,
            "unit": self.unit,
            "multiple": self.multiple,
            "seq_len": self.seq_len,
            "config": self.config,
            "versions": self.versions,
            "checksums": {
                name: zlib.crc32(array.tobytes())
                for name, array in sorted(tensors.items())
                if name.partition("/")[0] not in LARGE
            },
        }
        write_artifact(folder, "path", meta, tensors)

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> Self:
        """Read a path; the model is not needed.

        Raises:
            ArtifactError: missing, truncated or malformed.
        """
        return cls.from_artifact(folder, *read_artifact(folder, "path", FORMAT))

    @classmethod
    def from_artifact(
        cls, folder: str | os.PathLike[str], meta: Mapping[str, Any], tensors: Mapping[str, Floats]
    ) -> Self:
        """The path of what was read from ``folder``.

        Raises:
            ArtifactError: malformed.
        """
        try:
            content = {key: array for key, array in tensors.items() if key.partition("/")[0] not in CHECKS}
            for key, array in content.items():
                if array.dtype.kind != "f":
                    raise ValueError(f"{key} holds {array.dtype}, not floating-point numbers")
            parts = from_tensors(content, (*LEARNED, "trajectory"))
            trajectory = Trajectory(**parts.pop("trajectory"))
            shapes = [array.shape for array in (trajectory.loss, trajectory.level, trajectory.gamma_l1)]
            steps, of = max(map(len, (trajectory.loss, trajectory.level, trajectory.gamma_l1))), len(meta["pairs"])
            if {*shapes[:2]} - {(0,), (steps,)} or shapes[2] not in ((0, 0), (steps, of)):
                raise ValueError(f"its trajectory has arrays of the shapes {shapes}")
            return cls(
                pairs_from_json(meta["pairs"], meta["base"], meta["refused"]),
                unit=meta["unit"],
                multiple=meta["multiple"],
                seq_len=meta["seq_len"],
                **parts,
                trajectory=trajectory,
                config=meta["config"],
                versions=meta["versions"],
            )
        except (KeyError, TypeError, AttributeError, ValueError, OverflowError, MismatchError) as error:
            raise ArtifactError(
                f"{folder}/path.json is not a valid path: {error!r}. Copy it again, or search again"
            ) from error
