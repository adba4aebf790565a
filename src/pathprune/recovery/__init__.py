"""Give a sliced model back what slicing cost it, from unlabelled data and the dense model.

What a closed form can give back, every size has from the start: ``pathprune.transform.reconstruction``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import nullcontext

from torch import Tensor, nn

from pathprune.data.batches import Batches
from pathprune.errors import MismatchError
from pathprune.model.contexts import M, copied, evaluating
from pathprune.model.wrapped import check_bare
from pathprune.objectives.base import Objective
from pathprune.objectives.targets import Targets
from pathprune.recovery.nested import elastic as elastic
from pathprune.recovery.training import Outcome as Outcome
from pathprune.recovery.training import distill, low_rank, trainable, warn_of_nothing


def recover(
    small: M,
    teacher: nn.Module | Targets,
    data: Iterable[Mapping[str, Tensor]],
    *,
    steps: int = 300,
    lr: float | None = None,
    objective: str | Objective = "auto",
    seed: int = 0,
    bf16: bool = False,
    lora_rank: int | None = None,
    validation: Iterable[Mapping[str, Tensor]] | None = None,
    progress: bool | None = None,
) -> M:
    """A copy of ``small``, of the same shape, trained to imitate ``teacher``; both are untouched.

    One sample in ten (of few, more) is held back, and the weights that were best on those come back: never worse than
    ``small`` by the ``fidelity`` to the dense model. Where nothing was gained a warning says so, and ``small`` comes
    back as it is. ``.recovery`` of the returned model has the figures (``Outcome``).

    Args:
        small: sliced from ``teacher``.
        teacher: the dense model; or its remembered outputs, where several sizes are distilled on the same data.
        data: re-iterable of model-input dicts.
        lr: peak learning rate; by default it goes by what is imitated and by the share of the trained parameters that
            slicing took away (``default_lr``). Where training makes things worse, it is lowered on the way.
        steps: batches to train on at most, with AdamW on a one-cycle schedule; fewer where nothing more is gained.
        objective: what is imitated, as for ``search``; but of an encoder ``"auto"`` imitates every token's last
            hidden state (``hidden``), not the embedding alone. Where ``teacher`` is a ``Targets``, its own counts.
        seed: of everything random.
        bf16: multiply matrices in bfloat16, weights staying as they are: twice as fast where the hardware can.
        lora_rank: train an update of this rank of every linear map, and biases and norms; by default all weights but
            the embedding tables. A low rank wants about three times the learning rate.
        validation: data to choose the best weights on, in place of samples held back; where ``data`` gives every
            sample in another form at each pass (augmented images), none can be held back.
        progress: show a bar; by default only on a terminal.

    Raises:
        UnsupportedModelError: one of the models is a wrapper, or hides its maps.
        MismatchError: ``small`` was not sliced from a model like ``teacher``.
        SettingError: a setting is out of range.
        DataError: empty data or one sample alone, wrong keys, or a loss that is not finite.

    Example:
        >>> small = pp.slice_model(model, path.select(pp.Budget(keep=0.5)))
        >>> better = pp.recover(small, model, batches, steps=5)
        >>> better.recovery.after[0] <= better.recovery.before[0]
        True
    """
    dense = teacher.teacher if isinstance(teacher, Targets) else teacher
    for model in (small, dense):
        check_bare(model)
    _check_sliced(small, dense)
    batches = Batches(dense, data)
    student = copied(small)
    update = nullcontext() if lora_rank is None else low_rank(student, lora_rank, seed)
    with evaluating(dense), evaluating(student), update as trained:
        outcome = distill(
            student,
            teacher,
            batches,
            progress=progress,
            steps=steps,
            lr=lr,
            gone=1 - _trained_size(small) / _trained_size(dense),
            objective=objective,
            seed=seed,
            bf16=bf16,
            validation=None if validation is None else Batches(dense, validation),
            trained=trained,
        )
    warn_of_nothing(outcome)
    student.recovery = outcome  # type: ignore[assignment]
    return student


def _trained_size(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in trainable(model))


def _check_sliced(small: nn.Module, teacher: nn.Module) -> None:
    large = dict(teacher.named_parameters())
    ours = dict(small.named_parameters())
    biases = {name for name in set(ours) - set(large) if name.endswith(".bias")}  # slicing adds some, for fills
    fits = set(ours) - biases == set(large) and all(
        a <= b for name in large for a, b in zip(ours[name].shape, large[name].shape, strict=True)
    )
    if fits and sum(p.numel() for p in ours.values()) >= sum(p.numel() for p in large.values()):
        raise MismatchError(f"the {type(small).__name__} is no smaller than its teacher: there is nothing to recover")
    if not fits:
        raise MismatchError(
            f"the {type(small).__name__} to recover was not sliced from the {type(teacher).__name__} given as teacher; "
            "pass the dense model that it was cut from"
        )
