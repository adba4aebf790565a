"""Train a model to imitate the dense one on unlabelled data."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import register_parametrization, remove_parametrizations
from transformers.pytorch_utils import Conv1D

from pathprune.data.batches import Batch, Batches
from pathprune.data.checks import check_finite
from pathprune.errors import SettingError
from pathprune.model.contexts import check_seed, mixed, seeded
from pathprune.model.outputs import samples
from pathprune.objectives.base import Objective
from pathprune.objectives.choose import get_objective
from pathprune.objectives.logits import LogitsObjective
from pathprune.objectives.targets import Targets
from pathprune.objectives.task import TaskObjective
from pathprune.progress import track
from pathprune.recovery.holdout import HeldOut

LR, LOGITS_LR = 1e-3, 3e-4  # of a model that has lost everything; logits of few classes are soon learned by heart
MOST_READ = 128  # batches, for samples to hold back
LOWERED = 3  # times, the learning rate where training did harm
HARM = 0.25  # of the loss may be added in the first half of the steps: a high learning rate pays off when it falls
MOST_FALLS = 4


class _LowRank(nn.Module):
    """Adds an update, zero at first, to a weight (rows, columns)."""

    def __init__(self, weight: Tensor, rank: int, noise: torch.Generator) -> None:
        super().__init__()
        rows, columns = weight.shape
        self.up = nn.Parameter(weight.new_zeros(rows, rank, dtype=torch.float32))
        down = torch.randn(rank, columns, generator=noise)
        self.down = nn.Parameter(down.to(self.up) / math.sqrt(max(columns, 1)))

    def forward(self, weight: Tensor) -> Tensor:
        return weight + (self.up @ self.down).to(weight.dtype)


@contextmanager
def low_rank(student: nn.Module, rank: int, seed: int) -> Iterator[list[nn.Parameter]]:
    """Give every linear map an update to train, which is part of its weight in the end; yields what to train.

    (LoRA: Hu et al., ICLR 2022.)
    """
    if rank < 1:
        raise SettingError(f"lora_rank={rank} must be positive")
    check_seed(seed)
    noise = torch.Generator().manual_seed(seed)
    weights = {id(parameter) for parameter in trainable(student)}
    maps = [m for m in student.modules() if isinstance(m, nn.Linear | Conv1D) and id(m.weight) in weights]
    trained = [p for p in trainable(student) if p.dim() < 2]
    for module in maps:
        update = _LowRank(module.weight, rank, noise)
        register_parametrization(module, "weight", update)
        trained += update.parameters()
    try:
        yield trained
    finally:
        for module in maps:
            remove_parametrizations(module, "weight")


@dataclass(frozen=True)
class Outcome:
    """What training did, by the loss on samples that it did not train on.

    Attributes:
        before, after: mean loss at the start and of what was kept; of each size, where several are trained at once.
            One minus it is the ``fidelity`` that ``pathprune evaluate`` gives.
        samples: held back to measure on.
        kept: the step after which the weights were best; 0 where nothing was gained.
        steps: that were run.
        lr: peak learning rate, after it was lowered where training did harm.
    """

    before: tuple[float, ...]
    after: tuple[float, ...]
    samples: int
    kept: int
    steps: int
    lr: float

    def __str__(self) -> str:
        parts = ", ".join(f"{a:.4f} -> {b:.4f}" for a, b in zip(self.before, self.after, strict=True))
        return f"loss on {self.samples} samples held back {parts} (step {self.kept} of {self.steps}, lr {self.lr:.1e})"


def distill(
    student: nn.Module,
    teacher: nn.Module | Targets,
    batches: Batches,
    *,
    progress: bool | None,
    steps: int,
    lr: float | None,
    gone: float,
    objective: str | Objective,
    seed: int,
    bf16: bool,
    validation: Batches | None = None,
    trained: Sequence[nn.Parameter] | None = None,
    beside: Sequence[Tensor] = (),
    beside_lr: float = 0.0,
    before: Callable[[int], object] | None = None,
    sizes: Sequence[Callable[[], object]] = (lambda: None,),
) -> Outcome:
    """Train in place with AdamW on a one-cycle schedule; weights of 16 bits by way of copies of 32.

    Some samples are held back. The loss on them (of an encoder that of its embeddings, as in ``fidelity``) is measured
    at the start and up to twelve times on the way, and the best weights are what is left in the end: the start itself,
    if nothing was better by more than chance would have it. Where training has made things worse than they were at the
    start (in the first half of the steps, by a quarter), it goes on from the best weights at a third of the learning
    rate; after four such falls, it stops.

    Args:
        progress: see ``pathprune.progress.track``.
        lr: peak learning rate; ``None`` goes by the loss and by ``gone``.
        gone: share of the trained parameters that slicing took away.
        validation: data to measure on, in place of samples held back.
        trained: parameters to train; by default all but the embedding tables.
        beside: tensors to train beside the weights, without weight decay, at ``beside_lr``.
        before: is called with the number of each step before the student runs.
        sizes: each brings the student to a size at which it is measured; none may end worse than it began.

    Raises:
        SettingError: ``steps`` or ``lr`` is out of range.
        DataError: the loss is not finite, or the data is one sample.
    """
    if steps < 1 or (lr is not None and not 0 < lr < math.inf):
        raise SettingError(f"steps={steps} and lr={lr} must be positive, and finite")
    if isinstance(teacher, nn.Module):
        goal, measure = (get_objective(objective, teacher, batches.first, encoder=e) for e in ("hidden", "embedding"))
        judge = Targets(teacher, measure)
        teacher = judge if type(goal) is type(measure) else Targets(teacher, goal)
    else:
        judge = teacher
    lr = default_lr(teacher.objective, gone) if lr is None else lr
    trained = trainable(student) if trained is None else trained
    flags = [(p, p.requires_grad) for p in student.parameters()]
    try:
        for parameter in student.parameters():
            parameter.requires_grad_(False)
        for parameter in trained:
            parameter.requires_grad_(True)
        with torch.inference_mode(False), torch.enable_grad(), seeded(seed, batches.device):
            run = _Training(student, teacher, judge, bf16, trained, beside, lr, beside_lr, steps)
            held = HeldOut(batches, min(max(steps // 2, 16), MOST_READ), validation)
            marks = {round(steps * (i + 1) / run.checks) for i in range(run.checks)}

            def measured() -> Tensor:
                losses = []
                for size in sizes:
                    size()
                    losses.append(run.losses(held.batches))
                return torch.stack(losses)

            stream = held.training()
            run.begin(measured(), torch.tensor([samples(batch) for batch in held.batches], dtype=torch.float64))
            with track(total=steps, desc="distil", unit="step", progress=progress) as bar:
                for step in range(steps):
                    if before is not None:
                        before(step)
                    value = run.step(next(stream), step)
                    bar.set_postfix(loss=f"{value:.4f}", held_out=f"{run.mean(run.after).mean():.4f}", refresh=False)
                    bar.update()
                    if not math.isfinite(value):
                        run.fall()
                    elif step + 1 in marks:
                        run.judged(measured(), step + 1)
                    if run.falls == MOST_FALLS:
                        break
            run.restore()
            start, end = (tuple(run.mean(losses).tolist()) for losses in (run.before, run.after))
            return Outcome(start, end, held.samples, run.kept, step + 1, lr * run.cut)
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
            parameter.grad = None


class _Training:
    """The weights while they are trained, and the best so far."""

    def __init__(
        self,
        student: nn.Module,
        teacher: Targets,
        judge: Targets,
        bf16: bool,
        trained: Sequence[nn.Parameter],
        beside: Sequence[Tensor],
        lr: float,
        beside_lr: float,
        steps: int,
    ) -> None:
        self.student, self.teacher, self.judge, self.bf16 = student, teacher, judge, bf16
        self.trained, self.beside, self.steps = trained, beside, steps
        self.checks = min(steps, min(max(steps // 15, 4), 12))
        self.masters = [p.detach().float() if p.itemsize < 4 else p for p in trained]  # small steps would round away
        self.optimizer, peaks = torch.optim.AdamW(self.masters, lr=lr, betas=(0.95, 0.98), weight_decay=0.01), [lr]
        if beside:
            self.optimizer.add_param_group({"params": list(beside), "weight_decay": 0.0})
            peaks.append(beside_lr)
        warm_up = 0.1 if steps >= 10 else 0.0  # OneCycleLR divides by its length in steps less one, which may be 0
        self.schedule = torch.optim.lr_scheduler.OneCycleLR(
            self.optimizer, peaks, total_steps=steps + 1, pct_start=warm_up
        )
        self.kept, self.cut, self.falls, self.updates = 0, 1.0, 0, 0

    def begin(self, losses: Tensor, weights: Tensor) -> None:
        """Take (sizes, batches) losses as those of the start, and how much each batch counts."""
        self.before = self.after = losses
        self.weights = weights / weights.sum()
        self._remember()

    def losses(self, batches: Sequence[Batch]) -> Tensor:
        """(batches,), of each; not finite where training has led astray."""
        values = []
        with torch.no_grad():
            for batch in batches:
                with mixed(self.student, self.bf16):
                    target, outputs = self.judge(batch), self.student(**batch)
                loss = self.judge.objective.loss(outputs, batch, target)
                values.append(float(loss) if self.updates else check_finite(loss, "on the samples held back"))
        return torch.tensor(values, dtype=torch.float64)

    def mean(self, losses: Tensor) -> Tensor:
        """(sizes,), over the samples."""
        return losses @ self.weights

    def step(self, batch: Batch, number: int) -> float:
        """One update; the loss before it, which is not finite where training has led astray."""
        with mixed(self.student, self.bf16):
            target, outputs = self.teacher(batch), self.student(**batch)
        loss = self.teacher.objective.loss(outputs, batch, target)
        if not torch.isfinite(loss) and (not self.updates or not torch.isfinite(target).all()):
            check_finite(loss, f"at distillation step {number}")
        self.updates += 1
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        for parameter, master in self._halves():
            master.grad = None if parameter.grad is None else parameter.grad.float()
            parameter.grad = None
        torch.nn.utils.clip_grad_norm_(self.masters, 1.0)
        self.optimizer.step()
        self._round()
        self.schedule.step()
        return float(loss.detach())

    def judged(self, losses: Tensor, step: int) -> None:
        """Keep the weights if they are the best so far, better than the start by more than chance would have it, one
        standard error, and at no size worse; go back if they are worse than at the start, in the first half much worse.
        """
        start = self.mean(self.before).clamp_min(1e-12)[:, None]
        change = ((losses - self.before) / start).mean(0)  # (batches,)
        mean = change @ self.weights
        spread = ((change - mean) * self.weights).norm()
        best = ((self.after - self.before) / start).mean(0) @ self.weights
        if mean < best and mean + spread <= 0 and (self.mean(losses) <= self.mean(self.before)).all():
            self.after, self.kept = losses, step
            self._remember()
        elif not mean <= (HARM if 2 * step <= self.steps else 0):
            self.fall()

    def fall(self) -> None:
        """Go on from the best weights at a lower learning rate."""
        self.falls += 1
        self.cut /= LOWERED
        self.restore()
        self.optimizer.state.clear()
        for group in self.optimizer.param_groups:
            for name in ("initial_lr", "max_lr", "min_lr"):
                group[name] /= LOWERED

    def restore(self) -> None:
        """Back to the best weights."""
        with torch.no_grad():
            for tensor, best in zip((*self.masters, *self.beside), self.best, strict=True):
                tensor.copy_(best)
        self._round()

    def _remember(self) -> None:
        self.best = [tensor.detach().clone() for tensor in (*self.masters, *self.beside)]

    def _halves(self) -> list[tuple[nn.Parameter, Tensor]]:
        return [(p, master) for p, master in zip(self.trained, self.masters, strict=True) if p is not master]

    def _round(self) -> None:
        with torch.no_grad():
            for parameter, master in self._halves():
                parameter.copy_(master)


def warn_of_nothing(outcome: Outcome) -> None:
    """Say so where training gained nothing."""
    if not outcome.kept:
        warnings.warn(
            f"training gained nothing on the {outcome.samples} samples that were held back, at learning rates down to "
            f"{outcome.lr:.1e}: what comes back is what was given. More samples, or more like those that the model "
            "will read, may help",
            stacklevel=3,
        )


def default_lr(objective: Objective, gone: float) -> float:
    """Peak learning rate: what lost little has little to make good, and is harmed by steps that help what lost much.

    Args:
        gone: share of the trained parameters that slicing took away.
    """
    return (LOGITS_LR if isinstance(objective, LogitsObjective | TaskObjective) else LR) * gone**1.5


def trainable(model: nn.Module) -> list[nn.Parameter]:
    """All parameters but what slicing left empty, and embedding tables.

    Slicing did not touch the tables, and their optimizer state would cost more than the rest of the model's.
    """
    tables = {id(p) for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}
    return [p for p in model.parameters() if id(p) not in tables and p.numel()]
