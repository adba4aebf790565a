"""Train a sliced model to imitate the dense one on unlabelled data."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from tqdm import tqdm

from pathprune.data import Batches, check_finite
from pathprune.errors import DataError
from pathprune.modes import mixed
from pathprune.objectives import Objective, Targets, get_objective


def distill(
    student: nn.Module,
    teacher: nn.Module | Targets,
    batches: Batches,
    *,
    hidden: bool | None,
    steps: int = 300,
    lr: float = 3e-4,
    objective: str | Objective = "auto",
    seed: int = 0,
    bf16: bool = False,
) -> None:
    """Train in place with AdamW on a one-cycle schedule.

    All weights but the embedding tables are trained: slicing did not touch those, and their
    optimizer state would cost more than the rest of the model's.

    Args:
        steps: batches to train on.
        lr: peak learning rate.
        objective: what is imitated, as for ``search``; but of an encoder ``"auto"`` imitates every token's last
            hidden state (``hidden``), not the embedding alone. Where ``teacher`` is a ``Targets``, its own counts.
        bf16: multiply matrices in bfloat16, weights staying as they are: twice as fast where the hardware can.

    Raises:
        DataError: ``steps`` or ``lr`` is not positive, or the loss is not finite.
    """
    imitate(student, teacher, batches, hidden=hidden, steps=steps, lr=lr, objective=objective, seed=seed, bf16=bf16)


def imitate(
    student: nn.Module,
    teacher: nn.Module | Targets,
    batches: Batches,
    *,
    hidden: bool | None,
    steps: int,
    lr: float,
    objective: str | Objective,
    seed: int,
    bf16: bool,
    beside: Sequence[Tensor] = (),
    beside_lr: float = 0.0,
    before: Callable[[int], object] | None = None,
) -> None:
    """``distill``, with what ``elastic`` needs more.

    Args:
        beside: tensors to train beside the weights, without weight decay, at ``beside_lr``.
        before: is called with the number of each step before the student runs.
    """
    if steps < 1 or lr <= 0:
        raise DataError(f"steps={steps} and lr={lr} must be positive")
    if isinstance(teacher, nn.Module):
        teacher = Targets(teacher, get_objective(objective, teacher, batches.first, encoder="hidden"))
    torch.manual_seed(seed)
    tables = {id(p) for m in student.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}
    trained = [p for p in student.parameters() if id(p) not in tables and p.numel()]
    flags = [(p, p.requires_grad) for p in student.parameters()]
    try:
        for parameter in student.parameters():
            parameter.requires_grad_(False)
        for parameter in trained:
            parameter.requires_grad_(True)
        optimizer, peaks = torch.optim.AdamW(trained, lr=lr, betas=(0.9, 0.98), weight_decay=0.01), [lr]
        if beside:
            optimizer.add_param_group({"params": list(beside), "weight_decay": 0.0})
            peaks.append(beside_lr)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, peaks, total_steps=steps + 1, pct_start=0.1)
        stream = iter(batches)
        with tqdm(range(steps), desc="distil", unit="step", disable=hidden) as bar:
            for step in bar:
                batch = next(stream)
                if before is not None:
                    before(step)
                with mixed(batches.device, bf16):
                    target, outputs = teacher(batch), student(**batch)
                loss = teacher.objective.loss(outputs, batch, target)
                value = check_finite(loss, f"at distillation step {step}")
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                torch.nn.utils.clip_grad_norm_(trained, 1.0)
                optimizer.step()
                schedule.step()
                bar.set_postfix(loss=f"{value:.4f}", refresh=False)
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
            parameter.grad = None
