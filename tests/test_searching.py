"""The search loop: what it visits, what it leaves on disk, and what it refuses."""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import fields
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM, ViTConfig, ViTForImageClassification, ViTModel

import pathprune as pp
from helpers import VOCAB, tiny_batches, tiny_bert
from pathprune.data.batches import Batches
from pathprune.family.budget import Budget
from pathprune.family.path import SolutionPath
from pathprune.objectives.embedding import EmbeddingObjective
from pathprune.objectives.targets import Targets
from pathprune.ranking import run as searching
from pathprune.ranking.config import SearchConfig
from pathprune.ranking.dynamics import Driver, Gradients, Member, State, Visited
from pathprune.registry import DYNAMICS


def run(model: nn.Module, **settings: Any) -> SolutionPath:
    return pp.search(model, tiny_batches(), **{"steps": 12, "multiple": 2, "progress": False, **settings})


def same_path(a: SolutionPath, b: SolutionPath) -> None:
    for name in a.ranking:
        np.testing.assert_array_equal(a.ranking[name], b.ranking[name])
    for name in a.fill:
        np.testing.assert_array_equal(a.fill[name], b.fill[name])
    np.testing.assert_array_equal(a.trajectory.loss, b.trajectory.loss)


def interrupt(monkeypatch: pytest.MonkeyPatch, data: Any, **settings: Any) -> None:
    """A search that Ctrl-C ends at its eighth step."""
    step, calls = pp.Search.step, iter(range(100))

    def interrupted(self: Any) -> Any:
        if next(calls) == 7:
            raise KeyboardInterrupt
        return step(self)

    with monkeypatch.context() as patch:
        patch.setattr(pp.Search, "step", interrupted)
        with pytest.raises(KeyboardInterrupt):
            pp.search(tiny_bert(), data, **settings)


@pytest.mark.parametrize("dynamics", ["sampled", "lbi", "spp-released"])
def test_search_gives_a_complete_path(dynamics: str, tmp_path: Path) -> None:
    model = tiny_bert()
    path = run(model, dynamics=dynamics, out=tmp_path)
    steps = 12 if dynamics == "spp-released" else 9  # it asks for no curvature, and for no bases
    assert path.trajectory.gamma_l1.shape == (steps, len(path.pairs))
    assert path.config["dynamics"] == dynamics
    assert path.config["seed"] == 0
    assert {"torch", "transformers", "pathprune"} <= set(path.versions)
    again = SolutionPath.load(tmp_path)
    same_path(path, again)
    assert not list(tmp_path.glob("checkpoint*"))
    sizes = [path.select(Budget(keep=keep)).pair_params for keep in (1.0, 0.7, 0.4)]
    assert sizes == sorted(sizes, reverse=True)


@pytest.mark.parametrize("dynamics", ["sampled", "lbi", "spp-released"])
@pytest.mark.parametrize("steps", [3, 12, 49])
def test_steps_are_all_the_backward_passes_there_are(
    dynamics: str, steps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    original = torch.autograd.grad

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls.append(args)
        return original(*args, **kwargs)

    monkeypatch.setattr(torch.autograd, "grad", counted)
    path = run(tiny_bert(), dynamics=dynamics, steps=steps)
    assert len(calls) == steps
    assert len(path.trajectory.loss) == SearchConfig(dynamics=dynamics, steps=steps).path_steps


def test_every_visited_mask_is_what_the_path_would_ship() -> None:
    """Masks, fills, bases, compensation, and scales of outputs: the model computes in a step what it will be."""
    model, ran = tiny_bert(), []
    model.register_forward_hook(lambda module, args, kwargs, out: ran.append((kwargs, out[0])), with_kwargs=True)
    search = pp.Search(model, tiny_batches(), SearchConfig(steps=12, multiple=2, unit="mixed", output_lr=0.01))
    search.start()
    densities = set()
    while search.steps_left:
        path = search.path()
        seen = search.step()
        batch, output = ran[-1]
        densities.add(seen.density)
        shipped = path.select(Budget(keep=seen.density))
        with pp.masked(model, shipped), torch.no_grad():
            torch.testing.assert_close(model(**batch)[0], output, rtol=1e-4, atol=1e-4)
    assert len(densities) == search.steps_done == 9
    assert any(len(np.unique(shipped.mask(pair))) > 2 for pair in path.pairs), "masks were scaled"
    assert any((part != [[1], [0]]).any() for part in shipped.output.values()), "outputs were scaled"


def shuffled() -> DataLoader[Any]:
    samples: Any = [{key: tensor[0] for key, tensor in batch.items()} for batch in tiny_batches(count=8)]
    return DataLoader(samples, batch_size=2, shuffle=True)


SHORT = SearchConfig(steps=12, multiple=2)


@pytest.mark.parametrize("held", [False, True])
def test_a_search_stepped_from_outside_finds_the_path_of_search(held: bool) -> None:
    """Whatever the caller does with model and randomness between its steps."""
    expected = pp.search(tiny_bert(), shuffled(), steps=12, multiple=2, progress=False)
    model = tiny_bert().train()
    search = pp.Search(model, shuffled(), SHORT)
    seen = []
    with search if held else nullcontext():
        search.start()
        while search.steps_left:
            torch.rand(3)
            if not held:
                assert all(parameter.requires_grad for parameter in model.parameters())
                assert model.training
                assert not hooks(model)
                model(**tiny_batches()[0])[0].sum().backward()
            seen.append(search.step())
    same_path(search.path(), expected)
    assert search.path().config == expected.config
    assert [step.step for step in seen] == list(range(9))
    np.testing.assert_array_equal(np.array([step.loss for step in seen], np.float32), expected.trajectory.loss)
    np.testing.assert_array_equal(np.array([step.density for step in seen], np.float32), expected.trajectory.level)


def hooks(model: nn.Module) -> list[Any]:
    return [hook for module in model.modules() for hook in (module._forward_hooks, module._forward_pre_hooks) if hook]


def test_hooks_and_flags_come_off_whatever_happens() -> None:
    model = tiny_bert().train()
    model.pooler.requires_grad_(False)
    flags = [parameter.requires_grad for parameter in model.parameters()]
    search = pp.Search(model, tiny_batches(), SHORT)

    def fail() -> None:
        with search:
            search.start()
            search.step()
            assert hooks(model)
            assert not any(parameter.requires_grad for parameter in model.parameters())
            raise RuntimeError("a caller's own")

    with pytest.raises(RuntimeError, match="a caller's own"):
        fail()
    assert not hooks(model)
    assert model.training
    assert [parameter.requires_grad for parameter in model.parameters()] == flags
    with search:  # it goes on in another block
        search.step()
    assert search.steps_done == 2
    assert not hooks(model)


def test_a_step_that_fails_never_happened() -> None:
    """The next one reads the same batch, of data that shuffles itself, too."""

    class Breaking(EmbeddingObjective):
        calls = 0

        def loss(self, *args: Any) -> Any:
            self.calls += 1
            if self.calls == 5:
                raise KeyboardInterrupt
            return super().loss(*args)

    search = pp.Search(tiny_bert(), shuffled(), SHORT, objective=Breaking())
    search.start()
    for _ in range(4):
        search.step()
    with pytest.raises(KeyboardInterrupt):
        search.step()
    assert (search.steps_done, search.steps_left) == (4, 5)
    while search.steps_left:
        search.step()
    same_path(search.path(), pp.search(tiny_bert(), shuffled(), steps=12, multiple=2, progress=False))


def test_a_search_goes_on_from_its_checkpoint(tmp_path: Path) -> None:
    begun, other = (pp.Search(tiny_bert(), shuffled(), SHORT, out=tmp_path) for _ in range(2))
    begun.start()
    for _ in range(4):
        begun.step()
    begun.checkpoint()
    other.resume()
    assert (other.steps_done, other.steps_left) == (4, 5)
    same_path(begun.path(), other.path())
    for search in (begun, other):
        while search.steps_left:
            search.step()
    same_path(begun.path(), other.path())
    same_path(other.save(), SolutionPath.load(tmp_path))
    assert len(list(tmp_path.iterdir())) == 2  # nothing of the checkpoint


def test_a_search_says_what_comes_first(tmp_path: Path) -> None:
    search = pp.Search(tiny_bert(), tiny_batches(), SearchConfig(steps=3, multiple=2))
    for early in (search.step, search.path):
        with pytest.raises(pp.SettingError, match=r"was not started; call search\.start\(\) or search\.resume\(\)"):
            early()
    search.start()
    with pytest.raises(pp.SettingError, match="was started already; make another Search"):
        search.start()
    with pytest.raises(pp.SettingError, match="no folder for checkpoints; make it with out="):
        search.checkpoint()
    with search, pytest.raises(pp.SettingError, match="in a with block already"):
        search.__enter__()
    search.step()
    with pytest.raises(pp.SettingError, match=r"all 1 steps are done; take the path by search\.path\(\)"):
        search.step()


class ByCurvature(Driver):
    """Units in the order of their curvature, all of them visited dense; nothing is learned."""

    CURVATURE = True
    begun: ClassVar[list[Any]] = []

    def begin(self, probes: Tensor, outputs: int) -> State:
        self.begun.append((probes.shape, outputs))
        return {"worth": probes.square().mean(0) / self.units.params}

    def visit(self, state: State, step: int, member: Member) -> Visited:
        return Visited(torch.ones(len(self.units)), 1.0)

    def update(self, state: State, step: int, visited: Visited, gradients: Gradients) -> State:
        return state

    def ranking(self, state: State) -> Tensor:
        return state["worth"]


class ByRows(ByCurvature):
    ROWS = BASES = True


@pytest.mark.parametrize(("dynamics", "rows"), [(ByCurvature, False), (ByRows, True)])
def test_a_registered_dynamics_is_searched_with(dynamics: Any, rows: bool, tmp_path: Path) -> None:
    """By its name, from data to a smaller model, and on from a checkpoint; it is given what it asks for and no more."""
    name = dynamics.__name__
    DYNAMICS.register(name, dynamics)
    dynamics.begun.clear()
    model = tiny_bert()
    layer: Any = model.encoder.layer[0]
    with torch.no_grad():
        layer.output.dense.weight[:, :8] = 0  # eight idle neurons
    path = run(model, dynamics=name, out=tmp_path)
    size = sum(pair.groups * pair.units for pair in path.pairs)
    assert dynamics.begun == [((8 if rows else 1, size), 0)]  # two batches of four measure curvature
    assert path.config["dynamics"] == name
    assert len(path.trajectory.loss) == 12 - 2 - rows  # a step finds bases
    assert bool(path.basis) == rows
    assert not path.covariance
    np.testing.assert_allclose(path.trajectory.loss, 0, atol=1e-6)  # it is dense wherever it is looked at
    assert path.ranking["encoder.layer.0.mlp"][0, :8].max() < path.ranking["encoder.layer.0.mlp"][0, 8:].min()
    selection = path.select(Budget(keep=0.6))
    with pp.masked(model, selection), torch.no_grad():
        expected = model(**tiny_batches()[0])[0]
    small = pp.slice_model(model, selection)
    torch.testing.assert_close(small(**tiny_batches()[0])[0], expected, rtol=1e-4, atol=1e-4)
    with pytest.raises(KeyboardInterrupt):
        pp.search(model, Interrupting(9), steps=12, multiple=2, dynamics=name, out=tmp_path / "half", progress=False)
    same_path(path, run(model, dynamics=name, out=tmp_path / "half", resume=True))


def test_every_setting_is_a_keyword_of_search() -> None:
    parameters = inspect.signature(pp.search).parameters
    for field in fields(SearchConfig):
        assert parameters[field.name].kind is inspect.Parameter.KEYWORD_ONLY
        assert parameters[field.name].default == field.default
    assert not [one for one in parameters.values() if one.kind is inspect.Parameter.VAR_KEYWORD]


def test_every_setting_reaches_the_config() -> None:
    given: dict[str, Any] = {
        "dynamics": "lbi",
        "steps": 9,
        "seed": 5,
        "unit": "dim",
        "multiple": 2,
        "basis": False,
        "fill": False,
        "compensate": False,
        "lr": 0.5,
        "fill_lr": 0.25,
        "slope_lr": 0.125,
        "output_lr": 0.0625,
        "temperature": 0.3,
        "lowest_level": 0.4,
        "bf16": True,
    }
    assert {"objective", *given} == {field.name for field in fields(SearchConfig)}
    config = run(tiny_bert(), objective="hidden", **given).config
    assert {key: value for key, value in config.items() if key != "data"} == {"objective": "hidden", **given}


def test_outputs_are_learned_of_language_models_alone() -> None:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2)).eval()
    data = [{"input_ids": batch["input_ids"]} for batch in tiny_batches()]
    path = pp.search(model, data, steps=12, multiple=2, progress=False)
    assert (path.config["objective"], path.config["output_lr"]) == ("logits", 0.01)
    assert set(path.output) == {pair.name for pair in path.pairs if pair.adjustable}
    assert all((output != 0).any() for output in path.output.values())
    path = run(tiny_bert())
    assert (path.config["objective"], path.config["output_lr"], path.output) == ("embedding", 0.0, {})
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    classifier = ViTForImageClassification(ViTConfig(**sizes, image_size=8, patch_size=4)).eval()
    path = pp.search(classifier, [{"pixel_values": torch.randn(3, 3, 8, 8)}], steps=3, multiple=2, progress=False)
    assert (path.config["objective"], path.config["output_lr"], path.output) == ("logits", 0.0, {})


def test_the_ranking_follows_the_loss() -> None:
    """A neuron that the model cannot do without ends above neurons that do nothing."""
    model = tiny_bert()
    layer: Any = model.encoder.layer[0]
    with torch.no_grad():
        layer.output.dense.weight[:, :8] = 0  # eight idle neurons
    path = run(model, steps=40, multiple=1)
    ranking = path.ranking["encoder.layer.0.mlp"][0]
    assert ranking[:8].max() < np.median(ranking[8:])


def test_same_seed_same_path_and_other_seed_other_path() -> None:
    first, second, third = run(tiny_bert()), run(tiny_bert()), run(tiny_bert(), seed=1)
    same_path(first, second)
    assert any((first.ranking[name] != third.ranking[name]).any() for name in first.ranking)


def test_mixed_precision_finds_nearly_the_same_path() -> None:
    exact, rough = run(tiny_bert()), run(tiny_bert(), bf16=True)
    assert (exact.trajectory.loss != rough.trajectory.loss).all()
    a, b = (path.select(Budget(keep=0.5)).keep for path in (exact, rough))
    same = np.concatenate([(a[name] == b[name]).ravel() for name in a])
    assert same.mean() > 0.8


def test_model_is_as_it_was(tmp_path: Path) -> None:
    model = tiny_bert().train()
    model.pooler.requires_grad_(False)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    flags = [parameter.requires_grad for parameter in model.parameters()]
    run(model)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert [parameter.requires_grad for parameter in model.parameters()] == flags
    assert all(module.training for module in model.modules())
    assert all(not module._forward_hooks and not module._forward_pre_hooks for module in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())


class Interrupting:
    """Data that is interrupted once, at its ``at``-th batch."""

    def __init__(self, at: int) -> None:
        self.at, self.seen = at, 0

    def __iter__(self) -> Iterator[Any]:
        for batch in tiny_batches():
            self.seen += 1
            if self.seen == self.at:
                raise KeyboardInterrupt
            yield batch


@pytest.mark.parametrize("dynamics", ["sampled", "lbi", "spp-released"])
@pytest.mark.parametrize("at", [9, 14])
def test_interrupted_and_resumed_equals_uninterrupted(
    dynamics: str, at: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(searching, "CHECKPOINT_EVERY", 3)
    whole = run(tiny_bert(), dynamics=dynamics)
    settings: dict[str, Any] = {"steps": 12, "multiple": 2, "dynamics": dynamics, "progress": False, "out": tmp_path}
    with pytest.raises(KeyboardInterrupt):
        pp.search(tiny_bert(), Interrupting(at), **settings)
    assert (tmp_path / "checkpoint.json").exists()
    resumed = pp.search(tiny_bert(), tiny_batches(), resume=True, **settings)
    same_path(whole, resumed)
    same_path(whole, pp.search(tiny_bert(), tiny_batches(), resume=True, **settings))  # now it is finished


def test_data_that_shuffles_itself_comes_in_the_order_of_the_seed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the state of randomness, which stays; and again where the search goes on."""
    monkeypatch.setattr(searching, "CHECKPOINT_EVERY", 3)
    settings: dict[str, Any] = {"steps": 12, "multiple": 2, "progress": False}

    whole = pp.search(tiny_bert(), shuffled(), **settings)
    model = tiny_bert()
    torch.rand(3)
    state = torch.get_rng_state()
    same_path(whole, pp.search(model, shuffled(), **settings))
    assert not np.array_equal(whole.trajectory.loss, pp.search(model, shuffled(), seed=1, **settings).trajectory.loss)
    assert torch.equal(torch.get_rng_state(), state)

    interrupt(monkeypatch, shuffled(), out=tmp_path, **settings)
    same_path(whole, pp.search(tiny_bert(), shuffled(), out=tmp_path, resume=True, **settings))


@pytest.mark.parametrize("dynamics", ["sampled", "lbi", "spp-released"])
def test_a_step_that_is_interrupted_midway_never_happened(
    dynamics: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C after the state was updated, before the step was recorded."""
    whole = run(tiny_bert(), dynamics=dynamics)
    driver = DYNAMICS[dynamics]
    gamma, calls = driver.gamma, iter(range(100))

    def interrupting(self: Any, state: Any) -> Any:
        if next(calls) == 5:
            raise KeyboardInterrupt
        return gamma(self, state)

    monkeypatch.setattr(driver, "gamma", interrupting)
    with pytest.raises(KeyboardInterrupt):
        run(tiny_bert(), dynamics=dynamics, out=tmp_path)
    assert json.loads((tmp_path / "checkpoint.json").read_text())["step"] == 5
    same_path(whole, run(tiny_bert(), dynamics=dynamics, out=tmp_path, resume=True))


def test_resume_refuses_other_settings_other_models_and_nothing(tmp_path: Path) -> None:
    model = tiny_bert()
    with pytest.raises(pp.ArtifactError, match="does not exist"):
        run(model, out=tmp_path / "empty", resume=True)
    with pytest.raises(pp.SettingError, match="needs out="):
        run(model, resume=True)
    with pytest.raises(KeyboardInterrupt):
        pp.search(model, Interrupting(4), steps=12, multiple=2, progress=False, out=tmp_path)
    assert json.loads((tmp_path / "checkpoint.json").read_text())["step"] is None
    for _ in ("stopped before the first update", "finished"):
        with pytest.raises(pp.MismatchError, match="begun with steps=12, now 20"):
            run(model, out=tmp_path, resume=True, steps=20)
        with pytest.raises(pp.MismatchError, match="another model"):
            run(tiny_bert(seed=1), out=tmp_path, resume=True)
        with pytest.raises(pp.MismatchError, match=r"begun with other data: another first batch\. Resume"):
            pp.search(model, tiny_batches(seed=1), steps=12, multiple=2, out=tmp_path, resume=True)
        run(model, out=tmp_path, resume=True)


def test_a_search_is_replaced_only_when_asked(tmp_path: Path) -> None:
    """And is refused before the model is run."""
    with pytest.raises(KeyboardInterrupt):
        pp.search(tiny_bert(), Interrupting(4), steps=12, multiple=2, progress=False, out=tmp_path)
    unfinished = r"holds an unfinished search; give resume=True to go on with it, overwrite=True to search anew"
    with pytest.raises(pp.ArtifactError, match=unfinished):
        run(nn.Linear(2, 2), out=tmp_path)
    first = run(tiny_bert(), out=tmp_path, overwrite=True)
    with pytest.raises(pp.ArtifactError, match=r"holds a finished path; give resume=True to load it, overwrite=True"):
        run(nn.Linear(2, 2), out=tmp_path)
    with pytest.raises(pp.SettingError, match="give one of them"):
        run(nn.Linear(2, 2), out=tmp_path, overwrite=True, resume=True)
    same_path(SolutionPath.load(tmp_path), first)
    with pytest.raises(KeyboardInterrupt):
        pp.search(tiny_bert(), Interrupting(14), steps=12, multiple=2, progress=False, out=tmp_path, overwrite=True)
    same_path(SolutionPath.load(tmp_path), first)
    second = run(tiny_bert(), out=tmp_path, overwrite=True, seed=1)
    same_path(SolutionPath.load(tmp_path), second)
    assert len(list(tmp_path.iterdir())) == 2


def test_files_that_cannot_be_deleted_cost_no_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The search is finished; going on with what is left of it ends where it did."""
    real = Path.unlink

    def unlink(path: Path, missing_ok: bool = False) -> None:
        if path.name == "checkpoint.json":
            raise PermissionError("Operation not permitted")
        real(path, missing_ok)

    monkeypatch.setattr(searching, "CHECKPOINT_EVERY", 3)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", unlink)
        whole = run(tiny_bert(), out=tmp_path)
    same_path(SolutionPath.load(tmp_path), whole)
    same_path(run(tiny_bert(), out=tmp_path, resume=True), whole)
    assert len(list(tmp_path.iterdir())) == 2


def test_nan_loss_names_the_step_and_keeps_the_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(searching, "CHECKPOINT_EVERY", 2)

    class Breaking(EmbeddingObjective):
        calls = 0

        def loss(self, *args: Any) -> Any:
            self.calls += 1
            return super().loss(*args) * (float("nan") if self.calls == 5 else 1)

    model = tiny_bert()
    with pytest.raises(pp.DataError, match=r"loss is nan at step 4.*float32"):
        run(model, objective=Breaking(), out=tmp_path)
    assert json.loads((tmp_path / "checkpoint.json").read_text())["step"] == 4
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_bad_data_is_refused() -> None:
    model = tiny_bert()
    with pytest.raises(pp.DataError, match="data is empty"):
        pp.search(model, [])
    with pytest.raises(pp.DataError, match="only once"):
        pp.search(model, iter(tiny_batches()))
    with pytest.raises(pp.DataError, match=r"BertModel does not take labels, texts; it takes .*input_ids"):
        pp.search(model, [{"texts": torch.ones(1, 2), "labels": torch.ones(1)}])
    with pytest.raises(pp.DataError, match="must be a dict"):
        pp.search(model, [torch.ones(2, 2)])  # type: ignore[list-item]
    with pytest.raises(pp.DataError, match="must be a tensor"):
        pp.search(model, [{"input_ids": [[1, 2]]}])  # type: ignore[dict-item]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"steps": 1}, "steps=1 must be an integer, at least 3"),
        ({"steps": 12.5}, "steps=12.5 must be an integer, at least 3"),
        ({"seed": 10**30}, f"seed={10**30} must be an integer from 0 to"),
        ({"seed": 1.5}, r"seed=1\.5 must be an integer"),
        ({"lr": float("nan")}, "lr=nan is not a finite number"),
        ({"lr": float("inf")}, "lr=inf is not a finite number"),
        ({"lr": "0.1"}, "lr='0.1' is not a finite number"),
        ({"temperature": float("inf")}, "temperature=inf is not a finite number"),
        ({"lowest_level": float("nan")}, "lowest_level=nan is not a finite number"),
        ({"slope_lr": float("nan")}, "slope_lr=nan is not a finite number"),
        ({"output_lr": float("nan")}, "output_lr=nan is not a finite number"),
        ({"multiple": 10**30}, f"multiple={10**30} must be at least 1, and an integer"),
        ({"multiple": 2.0}, r"multiple=2\.0 must be at least 1, and an integer"),
        ({"dynamics": "magic"}, "dynamics='magic' is not one of sampled, lbi, spp-released"),
        ({"objective": "magic"}, "objective='magic' is not one of"),
        ({"unit": "magic"}, "unit='magic' is not one of"),
        ({"multiple": 0}, "multiple=0 must be at least 1, and an integer"),
        ({"lowest_level": 1.0}, "lowest_level=1.0"),
        ({"lr": -1.0}, "lr=-1.0"),
        ({"fill_lr": -1.0, "output_lr": -2.0}, "fill_lr=-1.0 and output_lr=-2.0 must not be negative"),
        ({"learning_rate": 1.0}, "unknown search setting 'learning_rate'; SearchConfig has basis, bf16"),
        ({"lowest_levl": 0.2}, "unknown search setting 'lowest_levl'; .*; did you mean 'lowest_level'?"),
    ],
)
def test_bad_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(pp.SettingError, match=message):
        run(tiny_bert(), **settings)


@pytest.mark.parametrize(("name", "reason"), [("x" * 300, "File name too long"), ("a\0b", "null byte")])
def test_a_name_that_no_folder_can_have_is_refused_before_the_search(
    tmp_path: Path, name: str, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pairs = pp.find_pairs(tiny_bert())
    path = SolutionPath.from_scores(pairs, {pair.name: np.ones(pair.shape) for pair in pairs})
    small = pp.slice_model(tiny_bert(), path.select(pp.Budget(keep=0.5)))
    monkeypatch.setattr("pathprune.ranking.problem.find_pairs", None)
    for write in (
        lambda: run(tiny_bert(), out=tmp_path / name),
        lambda: run(tiny_bert(), out=tmp_path / name, resume=True),
        lambda: path.save(tmp_path / name),
        lambda: pp.save_model(small, tmp_path / name),
    ):
        with pytest.raises(pp.ArtifactError, match=rf"can be no folder: .*{reason}; choose another out="):
            write()
    assert not list(tmp_path.iterdir())


def test_a_search_is_of_its_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of its first batch and, where that is known, of the number of batches; old checkpoints say neither."""
    monkeypatch.setattr(searching, "CHECKPOINT_EVERY", 3)
    settings: dict[str, Any] = {"steps": 12, "multiple": 2, "progress": False, "out": tmp_path}
    data = tiny_batches()
    interrupt(monkeypatch, data, **settings)
    other = [{**data[0], "input_ids": data[0]["input_ids"].flip(0)}, *data[1:]]
    for _ in ("unfinished", "finished"):
        with pytest.raises(pp.MismatchError, match="begun with other data: another first batch"):
            pp.search(tiny_bert(), other, resume=True, **settings)
        with pytest.raises(pp.MismatchError, match="begun with other data: 6 batches, now 5"):
            pp.search(tiny_bert(), data[:5], resume=True, **settings)
        path = pp.search(tiny_bert(), data, resume=True, **settings)
    same_path(path, run(tiny_bert()))
    description = json.loads((tmp_path / "path.json").read_text())
    del description["config"]["data"], description["sha256"]
    (tmp_path / "path.json").write_text(json.dumps(description))
    same_path(path, pp.search(tiny_bert(), other, resume=True, **settings))


def test_unwritable_out_fails_before_the_search(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("in the way")
    with pytest.raises(pp.ArtifactError, match="cannot write checkpoint"):
        run(tiny_bert(), out=file / "run")
    assert file.read_text() == "in the way"


def test_batches_start_over_and_move_to_the_model() -> None:
    model = tiny_bert()
    batches = Batches(model, tiny_batches()[:2])
    taken = batches.take(5)
    assert len(taken) == 5
    assert torch.equal(taken[0]["input_ids"], taken[2]["input_ids"])
    assert torch.equal(batches.first["input_ids"], taken[0]["input_ids"])


def test_dense_outputs_are_computed_once_per_batch() -> None:
    model = tiny_bert()
    calls = []
    model.register_forward_hook(lambda *args: calls.append(1))
    targets = Targets(model, EmbeddingObjective())
    first, second = tiny_batches()[:2]
    assert torch.equal(targets(first), targets({key: value.clone() for key, value in first.items()}))
    targets(second)
    assert len(calls) == 2


def test_a_step_runs_the_model_once_where_statistics_have_seen_its_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_bert()
    calls, by_step = [], []
    model.register_forward_hook(lambda *args: calls.append(1))
    monkeypatch.setattr("pathprune.ranking.measuring.STATISTICS_BATCHES", 4)
    search = pp.Search(model, tiny_batches(), SearchConfig(steps=12, multiple=2))
    search.start()
    while search.steps_left:
        before = len(calls)
        search.step()
        by_step.append(len(calls) - before)
    assert by_step == [1, 1, 2, 2, 1, 1, 1, 1, 1]  # of six batches the first two measure curvature


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_gradients_that_the_caller_switched_off_do_not_matter(mode: Any) -> None:
    model, expected = tiny_bert(), run(tiny_bert())
    with mode():
        same_path(run(model), expected)
        assert not torch.is_grad_enabled()


def test_one_row_of_positions_may_serve_all_samples() -> None:
    data = [{"position_ids": torch.arange(7)[None], **batch} for batch in tiny_batches()]
    same_path(pp.search(tiny_bert(), data, steps=12, multiple=2, progress=False), run(tiny_bert()))


def test_a_checkpoint_beyond_its_search_is_refused(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        pp.search(tiny_bert(), Interrupting(14), steps=12, multiple=2, progress=False, out=tmp_path)
    file = tmp_path / "checkpoint.json"
    meta = json.loads(file.read_text())
    assert 0 < meta["step"] < 9
    del meta["sha256"]  # as 0.1.0 wrote it
    file.write_text(json.dumps({**meta, "step": 99}))
    with pytest.raises(pp.ArtifactError, match=r"not valid: .*step 99 of 9.* Search again"):
        run(tiny_bert(), out=tmp_path, resume=True)


def test_statistics_that_a_stop_left_behind_a_finished_search_go(tmp_path: Path) -> None:
    expected = run(tiny_bert(), out=tmp_path)
    (tmp_path / "statistics.json").write_text("{}")
    same_path(run(tiny_bert(), out=tmp_path, resume=True), expected)
    assert not list(tmp_path.glob("statistics*"))
    (tmp_path / "checkpoint-0123456789ab.safetensors").write_text("its description went first")
    same_path(run(tiny_bert(), out=tmp_path, resume=True), expected)
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("later", [False, True])
def test_data_without_content_is_refused(later: bool) -> None:
    bert, good = tiny_bert(), tiny_batches(1)
    mask = torch.zeros_like(good[0]["attention_mask"])
    for bad in ({**good[0], "attention_mask": mask}, {name: part[:0] for name, part in good[0].items()}):
        with pytest.raises(pp.DataError, match="has no sample or no real token"):
            pp.search(bert, [*good, bad] if later else [bad], steps=12, progress=False)
    sizes: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48}
    sizes |= {"num_hidden_layers": 2, "num_attention_heads": 4}
    vit = ViTModel(ViTConfig(**sizes, image_size=8, patch_size=4)).eval()
    pictures = [{"pixel_values": torch.randn(3, 3, 8, 8)} for _ in range(2)]
    pictures[later]["pixel_values"][0, 0, 0, 0] = float("nan")
    with pytest.raises(pp.DataError, match="pixel_values has values that are not a number"):
        pp.search(vit, pictures, steps=12, progress=False)


def test_a_model_without_weights_is_refused_before_it_runs() -> None:
    model: Any = tiny_bert()
    with pytest.raises(pp.UnsupportedModelError, match="are on the meta device"):
        run(model.to("meta"))
