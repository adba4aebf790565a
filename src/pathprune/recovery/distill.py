"""Train a model to imitate the dense one on unlabelled data."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import register_parametrization, remove_parametrizations
from tqdm import tqdm
from transformers.pytorch_utils import Conv1D

from pathprune.data import Batches, check_finite
from pathprune.errors import DataError
from pathprune.modes import mixed, seeded
from pathprune.objectives import Objective, Targets, get_objective


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
        raise DataError(f"lora_rank={rank} must be positive")
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


def distill(
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
    trained: Sequence[nn.Parameter] | None = None,
    beside: Sequence[Tensor] = (),
    beside_lr: float = 0.0,
    before: Callable[[int], object] | None = None,
) -> None:
    """Train in place with AdamW on a one-cycle schedule; weights of 16 bits by way of copies of 32.

    Args:
        hidden: whether the bar is; ``None`` shows it on a terminal only.
        trained: parameters to train; by default all but the embedding tables.
        beside: tensors to train beside the weights, without weight decay, at ``beside_lr``.
        before: is called with the number of each step before the student runs.

    Raises:
        DataError: ``steps`` or ``lr`` is not positive, or the loss is not finite.
    """
    if steps < 1 or lr <= 0:
        raise DataError(f"steps={steps} and lr={lr} must be positive")
    if isinstance(teacher, nn.Module):
        teacher = Targets(teacher, get_objective(objective, teacher, batches.first, encoder="hidden"))
    trained = trainable(student) if trained is None else trained
    flags = [(p, p.requires_grad) for p in student.parameters()]
    try:
        for parameter in student.parameters():
            parameter.requires_grad_(False)
        for parameter in trained:
            parameter.requires_grad_(True)
        masters = [p.detach().float() if p.itemsize < 4 else p for p in trained]  # small steps would round away
        optimizer, peaks = torch.optim.AdamW(masters, lr=lr, betas=(0.95, 0.98), weight_decay=0.01), [lr]
        if beside:
            optimizer.add_param_group({"params": list(beside), "weight_decay": 0.0})
            peaks.append(beside_lr)
        warm_up = 0.1 if steps >= 10 else 0.0  # OneCycleLR divides by its length in steps less one, which may be 0
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, peaks, total_steps=steps + 1, pct_start=warm_up)
        stream = iter(batches)
        bar = tqdm(range(steps), desc="distil", unit="step", disable=hidden)
        with bar, torch.inference_mode(False), torch.enable_grad(), seeded(seed, batches.device):
            for step in bar:
                batch = next(stream)
                if before is not None:
                    before(step)
                with mixed(student, bf16):
                    target, outputs = teacher(batch), student(**batch)
                loss = teacher.objective.loss(outputs, batch, target)
                value = check_finite(loss, f"at distillation step {step}")
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                halves = [(p, master) for p, master in zip(trained, masters, strict=True) if p is not master]
                for parameter, master in halves:
                    master.grad = None if parameter.grad is None else parameter.grad.float()
                    parameter.grad = None
                torch.nn.utils.clip_grad_norm_(masters, 1.0)
                optimizer.step()
                with torch.no_grad():
                    for parameter, master in halves:
                        parameter.copy_(master)
                schedule.step()
                bar.set_postfix(loss=f"{value:.4f}", refresh=False)
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
            parameter.grad = None


def trainable(model: nn.Module) -> list[nn.Parameter]:
    """All parameters but what slicing left empty, and embedding tables.

    Slicing did not touch the tables, and their optimizer state would cost more than the rest of the model's.
    """
    tables = {id(p) for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}
    return [p for p in model.parameters() if id(p) not in tables and p.numel()]
