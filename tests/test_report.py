"""Reports: every picture, the page and the card, from records made by hand."""

from __future__ import annotations

import copy
import inspect
import json
import os
import re
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from alterations import altered
from pathprune.errors import ArtifactError, PathpruneError
from pathprune.family.budget import Budget
from pathprune.family.pair_list import BaseModel, PairList
from pathprune.family.pairs import Pair, Slot
from pathprune.family.path import SolutionPath
from pathprune.family.trajectory import Trajectory
from pathprune.report import model_card, plots, write_report
from pathprune.report.record import count, layer_labels, loader, read_family

LAYERS = 3
STEPS = 12
HOSTILE = "<script>alert('x')</script> & $\\frac{$ | \"q\""


def pair_list() -> PairList:
    pairs = []
    for i in range(LAYERS):
        block = f"encoder.layer.{i}"
        maps = {
            "qk": (Slot("query", "out", 16), Slot("key", "out", 16)),
            "vo": (Slot("value", "out", 16), Slot("output", "in", 16)),
        }
        pairs.append(Pair(f"{block}.mlp", "mlp", block, 1, 32, (Slot("up", "out", 16), Slot("down", "in", 16))))
        pairs += [
            Pair(f"{block}.attention.{kind}", "qk" if kind == "qk" else "vo", f"{block}.attention", 4, 4, slots)
            for kind, slots in maps.items()
        ]
    prunable = sum(pair.params for pair in pairs)
    return PairList(pairs, BaseModel("BertModel", "config", "weights", prunable + 2_000_000, prunable))


@pytest.fixture(scope="module")
def path() -> SolutionPath:
    rng = np.random.default_rng(0)
    pairs = pair_list()
    made = SolutionPath.from_scores(pairs, {pair.name: rng.random(pair.shape) for pair in pairs})
    trajectory = Trajectory(
        rng.uniform(0.01, 1, STEPS).astype(np.float32),
        rng.uniform(0.1, 1, STEPS).astype(np.float32),
        rng.random((STEPS, len(pairs))).cumsum(0).astype(np.float32),
    )
    return SolutionPath(pairs, made.ranking, trajectory=trajectory, config={"steps": STEPS})


@pytest.fixture
def family(path: SolutionPath) -> dict[str, Any]:
    def member(name: str, keep: float, before: float, after: float) -> dict[str, Any]:
        sizes = path.select(Budget(keep=keep)).to_dict()
        return {
            "name": name,
            "folder": None if name == "dense" else name,
            "keep": keep,
            **sizes,
            "bytes_on_disk": round(40_000_000 * keep),
            "latency_ms": {"1": 5.0 * keep, "32": 200.0 * keep},
            "quality": {
                "before": {"cosine": before, "accuracy": before - 0.1},
                "after": {"cosine": after, "accuracy": after - 0.1},
            },
        }

    record = {
        "format": 1,
        "model": {
            "name": "org/tiny-bert",
            "architecture": "BertModel",
            "params": path.pairs.base.params,
            "prunable_params": path.pairs.prunable_params,
        },
        "metrics": {
            "cosine": {"label": "cosine to dense", "text": "mean cosine on unseen texts", "dense": 1.0},
            "accuracy": {"label": "BBC accuracy", "text": "linear probe", "dense": 0.9},
        },
        "members": [
            member("dense", 1.0, 1.0, 1.0),
            member("keep-75", 0.75, 0.957, 0.981),
            member("keep-25", 0.25, 0.613, 0.842),
        ],
        "latency_tokens": 128,
        "settings": {"search": {"steps": 300, "basis": True}, "recover": {"steps": 350}},
        "seconds": {"search": 150.0, "recover": 90.0},
        "machine": {"processor": "a processor", "cores": 2},
        "versions": {"pathprune": "0.1.0", "torch": "2.13.0"},
        "date": "2026-11-22",
    }
    plain: dict[str, Any] = json.loads(json.dumps(record))
    return plain


def without_recovery(family: dict[str, Any]) -> dict[str, Any]:
    for member in family["members"]:
        del member["quality"]["after"]
    return family


def publish(folder: Path, family: Mapping[str, Any], path: SolutionPath) -> str:
    path.save(folder / "path")
    (folder / "family.json").write_text(json.dumps(family))
    written = write_report(folder)
    assert written == folder / "report.html"
    return written.read_text(encoding="utf-8")


def texts(svg: str) -> list[str]:
    """Text of every text element; fails where the picture is not XML."""
    root = ElementTree.fromstring(svg)
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    return ["".join(element.itertext()) for element in root.iter("{http://www.w3.org/2000/svg}text")]


def draw(name: str, family: dict[str, Any], path: SolutionPath) -> str:
    arguments: dict[str, tuple[Any, ...]] = {
        "quality_by_size": (family,),
        "widths_by_layer": (family,),
        "latency": (family,),
        "solution_path": (path,),
        "loss_by_level": (path,),
        "kept_widths": (path, [0.75, 0.25]),
    }
    svg: str = getattr(plots, name)(*arguments[name])
    return svg


def figure(draw_it: Any, *records: Any) -> Any:
    """The matplotlib figure behind a picture, to read its data back."""
    return inspect.unwrap(draw_it)(*records)


PICTURES = {
    "quality_by_size": ["cosine to dense", "BBC accuracy", "keep-25", "before recovery", "after recovery", "dense"],
    "widths_by_layer": ["layer 0", "layer 2", "keep-75", "query–key", "MLP", "4 × 4", "32"],
    "latency": ["keep-25", "1.33×", "4.00×", "batch 32 (dense: 200 ms)", "multiply-accumulates, at 128 tokens"],
    "solution_path": ["layer 0", "layer 2", "query–key", "value–output", "MLP", "search step"],
    "loss_by_level": ["loss", "prunable parameters kept", "search step"],
    "kept_widths": ["layer 0", "layer 2", "query–key", "value–output", "MLP", "25%"],
}


@pytest.mark.parametrize("name", PICTURES)
def test_pictures_are_xml_with_their_labels_and_the_same_each_time(
    name: str, family: dict[str, Any], path: SolutionPath
) -> None:
    svg = draw(name, family, path)
    assert set(PICTURES[name]) <= set(texts(svg))
    assert svg == draw(name, family, path)


def test_no_two_pictures_of_a_page_share_an_id(family: dict[str, Any], path: SolutionPath) -> None:
    ids = [i for name in PICTURES for i in re.findall(r' id="([^"]+)"', draw(name, family, path))]
    assert ids
    assert len(ids) == len(set(ids))


def test_solution_path_draws_each_pair_in_the_panel_of_its_kind(path: SolutionPath) -> None:
    panels = figure(plots.solution_path, path).axes[:3]
    for kind, panel in zip(("qk", "vo", "mlp"), panels, strict=True):
        columns = [i for i, pair in enumerate(path.pairs) if pair.kind == kind]
        assert [line.get_ydata().tolist() for line in panel.lines] == path.trajectory.gamma_l1[:, columns].T.tolist()
        assert panel.lines[0].get_xdata().tolist() == list(range(1, STEPS + 1))
        assert len({line.get_color() for line in panel.lines}) == LAYERS


def test_a_long_search_is_thinned_but_keeps_its_ends(path: SolutionPath) -> None:
    steps = 5 * plots.MOST_STEPS
    norms = np.arange(steps * len(path.pairs), dtype=np.float32).reshape(steps, -1)
    long = SolutionPath(path.pairs, path.ranking, trajectory=Trajectory(gamma_l1=norms))
    drawn = figure(plots.solution_path, long).axes[0].lines[0].get_xdata()
    assert len(drawn) == plots.MOST_STEPS
    assert (drawn[0], drawn[-1]) == (1, steps)


@pytest.mark.parametrize("draw_path", [plots.solution_path, plots.loss_by_level])
def test_a_path_without_steps_says_so(draw_path: Any, path: SolutionPath) -> None:
    empty = SolutionPath(path.pairs, path.ranking)
    assert any("no search steps" in text for text in texts(draw_path(empty)))


def test_losses_that_have_no_logarithm_are_drawn_all_the_same(path: SolutionPath) -> None:
    loss = np.linspace(-1, 1, STEPS, dtype=np.float32)
    odd = SolutionPath(path.pairs, path.ranking, trajectory=Trajectory(loss, path.trajectory.level, np.zeros((0, 0))))
    assert figure(plots.loss_by_level, odd).axes[0].get_yscale() == "linear"
    assert figure(plots.loss_by_level, path).axes[0].get_yscale() == "log"
    assert plots.loss_by_level(odd).count("<use") >= STEPS


def test_kept_widths_shows_what_the_path_selects(path: SolutionPath) -> None:
    panel = figure(plots.kept_widths, path, []).axes[2]
    shown = panel.images[0].get_array()
    assert shown.shape == (LAYERS, len(plots.LEVELS))
    assert (shown[:, -1] == 1).all()
    for column in (0, 20):
        selection = path.select(Budget(keep=float(plots.LEVELS[column])))
        kept = [selection.kept(pair) / 32 for pair in path.pairs if pair.kind == "mlp"]
        assert shown[:, column].tolist() == kept


def test_kept_widths_marks_each_fraction_in_each_panel(path: SolutionPath) -> None:
    def marks(fractions: list[float]) -> int:
        return plots.kept_widths(path, fractions).lower().count(f"stroke: {plots.VERMILLION.lower()}")

    assert marks([]) == 0
    assert marks([0.3, 0.6]) == 2 * 3


def test_kinds_that_a_model_lacks_get_no_panel(path: SolutionPath) -> None:
    pairs = PairList([pair for pair in path.pairs if pair.kind == "mlp"], path.pairs.base)
    alone = SolutionPath(pairs, {pair.name: path.ranking[pair.name] for pair in pairs})
    shown = texts(plots.kept_widths(alone, [0.5]))
    assert "MLP" in shown
    assert "query–key" not in shown


def test_bars_are_as_long_as_the_share_that_stays(family: dict[str, Any]) -> None:
    family["members"][1]["widths"]["encoder.layer.0.attention.qk"] = [2, 3]
    bars = figure(plots.widths_by_layer, family).axes[1].patches
    ground, bar = [patch for patch in bars if patch.get_x() == 0 and round(patch.get_y()) == 0]
    assert bar.get_width() / ground.get_width() == pytest.approx(2 * 3 / (4 * 4))


def test_a_layer_that_is_gone_reads_none(family: dict[str, Any]) -> None:
    family["members"][2]["widths"]["encoder.layer.1.mlp"] = [0, 0]
    assert texts(plots.widths_by_layer(family)).count("none") == 1


def test_quality_without_recovery_draws_one_line(family: dict[str, Any]) -> None:
    shown = texts(plots.quality_by_size(without_recovery(family)))
    assert "without recovery" in shown
    assert "after recovery" not in shown


def test_names_are_not_read_as_mathematics(family: dict[str, Any]) -> None:
    family["metrics"]["cosine"]["label"] = HOSTILE
    assert HOSTILE in texts(plots.quality_by_size(family))


@pytest.mark.parametrize(
    ("names", "labels"),
    [
        (["encoder.layer.0.attention.qk", "encoder.layer.11.attention.qk"], ["layer 0", "layer 11"]),
        (["model.encoder.layers.0.self_attn.vo", "model.decoder.layers.0.self_attn.vo"], ["encoder", "decoder"]),
        (["a.layers.0.x.qk", "a.layers.1.y.qk"], ["0.x", "1.y"]),
        (["a.0.mlp", "b.c.0.mlp"], ["a.0", "b.c.0"]),
        (["only.one.mlp"], ["only.one"]),
    ],
)
def test_layer_labels_keep_what_tells_layers_apart(names: list[str], labels: list[str]) -> None:
    assert layer_labels(names) == labels


@pytest.mark.parametrize(
    ("number", "text"), [(999, "999"), (45_300, "45.3 k"), (22_713_216, "22.7 M"), (1_240_000_000, "1.24 B")]
)
def test_count(number: int, text: str) -> None:
    assert count(number) == text


def test_the_page_holds_every_number_and_needs_nothing_else(
    tmp_path: Path, family: dict[str, Any], path: SolutionPath
) -> None:
    page = publish(tmp_path, family, path)
    for member in family["members"]:
        row = re.search(rf'<th scope="row">{member["name"]}</th>(.*?)</tr>', page, re.DOTALL)
        assert row, member["name"]
        for number in (
            f"{member['bytes_on_disk'] / 1e6:.1f} MB",
            count(member["params"]),
            f"{member['prunable_params_kept_fraction']:.1%}",
            count(member["macs_per_token"]),
            f"{member['latency_ms']['1']:.2f} ms",
            f"{member['latency_ms']['32']:.0f} ms",
            f"{1 / member['keep']:.2f}×",
            *(f"{value:.3f}" for part in member["quality"].values() for value in part.values()),
        ):
            assert number in row[1], (member["name"], number)
    for text in ("One search ranked", 'from_pretrained("keep-75")', "search.steps", "2.5 min", "a processor"):
        assert text in page
    assert page.count("<svg") == page.count("<figure>") == page.count("<figcaption>") == len(PICTURES)
    assert "<script" not in page
    assert not re.search(r"""(src|href)=["'](?!#|data:)""", page)
    assert not re.search(r"url\((?!#)", page)


def test_the_solution_path_is_drawn_where_it_starts_from_zero(
    tmp_path: Path, family: dict[str, Any], path: SolutionPath
) -> None:
    """The sampled dynamics start from a ranking: their lines are flat, and say nothing."""
    for dynamics, drawn in (("sampled", False), ("lbi", True), ("spp-released", True)):
        page = publish(tmp_path, family, replace(path, config={"dynamics": dynamics}))
        assert ("The solution path" in page) == drawn
        assert page.count("<svg") == len(PICTURES) - (not drawn)


def test_the_page_follows_a_dark_screen_and_says_where_to_scroll(
    tmp_path: Path, family: dict[str, Any], path: SolutionPath
) -> None:
    page = publish(tmp_path, family, path)
    dark = page.split("@media (prefers-color-scheme: dark) {")[1].split("\n}\n")[0]
    assert ".drawing svg { filter: invert" in dark  # see the pictures' own grounds, below
    assert "scroll it sideways for all columns" in page.split("<table>")[0]
    assert "costs" not in page  # a correlation may rise as a model shrinks
    for name in PICTURES:
        grounds = re.findall(r'<path d="[^"]*" style="fill: #ffffff', draw(name, family, path))
        assert not grounds, name


def test_the_page_escapes_names(tmp_path: Path, family: dict[str, Any], path: SolutionPath) -> None:
    family["model"]["name"] = HOSTILE
    family["members"][1]["name"] = HOSTILE
    family["members"][1]["folder"] = HOSTILE
    family["metrics"]["cosine"]["label"] = HOSTILE
    family["machine"]["processor"] = HOSTILE
    page = publish(tmp_path, family, path)
    assert "<script" not in page
    assert "&lt;script&gt;alert(" in page


def test_the_page_copes_without_recovery_latency_and_trajectory(
    tmp_path: Path, family: dict[str, Any], path: SolutionPath
) -> None:
    for member in without_recovery(family)["members"]:
        member["latency_ms"] = {}
    page = publish(tmp_path, family, SolutionPath(path.pairs, path.ranking))
    assert "without recovery" in page
    assert "after recovery" not in page
    assert "batch" not in page
    assert "latency" not in page
    assert page.count("<svg") == 3


def test_one_member_is_one_smaller_model(tmp_path: Path, family: dict[str, Any], path: SolutionPath) -> None:
    del family["members"][1]
    page = publish(tmp_path, family, path)
    assert "one search, 1 smaller model<" in page
    assert "other members" not in page


def test_a_report_replaces_the_last_and_leaves_nothing_beside(
    tmp_path: Path, family: dict[str, Any], path: SolutionPath
) -> None:
    publish(tmp_path, family, path)
    family["model"]["name"] = "another name"
    assert "another name" in publish(tmp_path, family, path)
    assert {file.name for file in tmp_path.iterdir()} == {"family.json", "path", "report.html"}


def test_a_report_that_cannot_be_written_leaves_the_last(
    tmp_path: Path, family: dict[str, Any], path: SolutionPath, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = publish(tmp_path, family, path)

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(
        ArtifactError, match=r"report\.html: No space left on device; what was there is unchanged. Free some space"
    ):
        write_report(tmp_path)
    assert (tmp_path / "report.html").read_text(encoding="utf-8") == before
    assert {file.name for file in tmp_path.iterdir()} == {"family.json", "path", "report.html"}


@pytest.mark.parametrize("library", ["jinja2", "matplotlib"])
def test_a_missing_library_is_named_with_the_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, library: str
) -> None:
    monkeypatch.setattr("pathprune.report.html.find_spec", lambda name: None if name == library else object())
    with pytest.raises(PathpruneError, match=rf"needs {library}, .*pip install 'pathprune\[report\]'"):
        write_report(tmp_path)


def test_a_missing_record_is_named_with_the_remedy(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"family\.json does not exist\. .* `pathprune demo` makes one"):
        write_report(tmp_path)


def test_a_missing_path_is_named(tmp_path: Path, family: dict[str, Any]) -> None:
    (tmp_path / "family.json").write_text(json.dumps(family))
    with pytest.raises(ArtifactError, match=r"path\.json does not exist"):
        write_report(tmp_path)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "\xff", '{"format": 2}', '{"format": 1}'])
def test_a_record_that_is_none_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "family.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(ArtifactError, match=r"family\.json is not a readable family: .*Copy it again"):
        write_report(tmp_path)


REMOVE = object()


@pytest.mark.parametrize(
    ("where", "value", "message"),
    [
        (["model"], "bert", "no valid 'model'"),
        (["model", "params"], REMOVE, "model has no valid 'params' .absent"),
        (["metrics"], {}, "at least one metric"),
        (["metrics", "cosine", "dense"], None, "metrics.cosine has no valid 'dense'"),
        (["members"], [], "one dense member"),
        (["members", 0, "folder"], "dense", "one dense member"),
        (["members", 1, "params"], "many", r"members\[1\] has no valid 'params' .'many'"),
        (["members", 1, "quality", "before"], REMOVE, "keep-75: quality.before is None"),
        (["members", 1, "quality", "after", "cosine"], REMOVE, "keep-75: quality.after has no valid 'cosine'"),
        (["members", 2, "latency_ms", "32"], REMOVE, "keep-25: latency_ms has no valid '32'"),
        (["members", 2, "latency_ms", "32"], 0, "positive times"),
        (["members", 2, "latency_ms", "many"], 3.0, "invalid literal"),
        (["members", 2, "widths", "encoder.layer.1.mlp"], [3], "must be .heads, dimensions"),
        (["seconds", "search"], "long", "seconds has no valid 'search'"),
        (["versions", "torch"], 2, "versions has no valid 'torch'"),
    ],
)
def test_a_record_that_lacks_something_says_what(
    tmp_path: Path, family: dict[str, Any], where: list[Any], value: Any, message: str
) -> None:
    broken = copy.deepcopy(family)
    place: Any = broken
    for key in where[:-1]:
        place = place[key]
    if value is REMOVE:
        del place[where[-1]]
    else:
        place[where[-1]] = value
    (tmp_path / "family.json").write_text(json.dumps(family))
    assert read_family(tmp_path) == family
    (tmp_path / "family.json").write_text(json.dumps(broken))
    with pytest.raises(ArtifactError, match=message):
        read_family(tmp_path)


def front_matter(card: str) -> dict[str, Any]:
    matter: dict[str, Any] = yaml.safe_load(card.split("---\n")[1])
    return matter


def test_the_card_names_the_model_its_numbers_and_how_to_load_it(family: dict[str, Any]) -> None:
    card = model_card(family, family["members"][2])
    assert front_matter(card) == {
        "library_name": "transformers",
        "tags": ["pathprune", "structured-pruning"],
        "base_model": "org/tiny-bert",
    }
    for text in (
        "| parameters | 2.01 M | 2.00 M |",
        "| size on disk | 40.0 MB | 10.0 MB |",
        "| latency, batch 32 | 200 ms | 50 ms (4.00×) |",
        "| cosine to dense, before recovery | 1.000 | 0.613 |",
        "| BBC accuracy, after recovery | 0.900 | 0.742 |",
        'AutoModel.from_pretrained("keep-25")',
        "- search.basis: true",
        "torch 2.13.0",
        "A recovery followed.",
        f"keeps\n{family['members'][2]['prunable_params_kept_fraction']:.1%} of the prunable parameters",
    ):
        assert text in card
    code = card.split("```python\n")[1].split("```")[0]
    compile(code, "card", "exec")


def test_the_card_without_recovery(family: dict[str, Any]) -> None:
    card = model_card(without_recovery(family), family["members"][1])
    assert "No recovery was run." in card
    assert "| cosine to dense | 1.000 | 0.957 |" in card
    assert "after recovery" not in card.lower()


@pytest.mark.parametrize("name", [None, "", "/home/someone/model", "../model", "bert base", HOSTILE])
def test_the_card_names_a_base_model_only_where_the_hub_could_know_it(family: dict[str, Any], name: str | None) -> None:
    family["model"]["name"] = name
    card = model_card(family, family["members"][1])
    assert "base_model" not in front_matter(card)
    assert "# " + ("BertModel" if not name else "") in card


def test_the_card_keeps_names_inside_their_place(family: dict[str, Any]) -> None:
    family["model"]["name"] = family["members"][1]["name"] = HOSTILE + "\n---\n# Another"
    family["metrics"]["cosine"]["label"] = HOSTILE
    card = model_card(family, family["members"][1])
    assert not re.search(r"(?<!\\)<script", card)
    assert not re.search("^# Another", card, re.MULTILINE)
    rows = [line for line in card.splitlines() if line.startswith("| ")]
    assert {len(re.findall(r"(?<!\\)\|", row)) for row in rows} == {4}


@pytest.mark.parametrize(
    ("architecture", "name"),
    [
        ("BertModel", "AutoModel"),
        ("GPT2LMHeadModel", "GPT2LMHeadModel"),
        ("LlamaForCausalLM", "LlamaForCausalLM"),
    ],
)
def test_models_with_a_head_load_with_it(architecture: str, name: str) -> None:
    assert loader({"model": {"architecture": architecture}}) == name


def test_reports_need_no_model_library() -> None:
    code = (
        "import sys, pathprune.report\n"
        "light = {'torch', 'transformers', 'matplotlib', 'jinja2'} & set(sys.modules)\n"
        "import pathprune.report.plots\n"
        "print(sorted(light), sorted({'torch', 'transformers', 'matplotlib.pyplot'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[] []"


def test_an_altered_record_is_refused_or_makes_cards(tmp_path: Path, family: dict[str, Any]) -> None:
    @settings(max_examples=300)
    @given(st.randoms(use_true_random=False))
    def attack(random: Random) -> None:
        (tmp_path / "family.json").write_text(json.dumps(altered(family, random)))
        try:
            found = read_family(tmp_path)
        except ArtifactError:
            return
        for member in found["members"]:
            if member["folder"] is not None:
                model_card(found, member).encode()

    attack()


@pytest.mark.parametrize(
    ("where", "value", "message"),
    [
        (["model", "architecture"], "x\nimport os", "is no name of a class"),
        (["model", "name"], "\ud800", "surrogates not allowed"),
        (["members", 1, "params"], 10**30, "all must be finite"),
        (["members", 1, "macs_per_token"], float("inf"), "all must be finite"),
        (["members", 1, "keep"], True, "no valid 'keep'"),
        (["members", 1, "folder"], REMOVE, "no valid 'folder' .absent"),
        (["members", 1, "widths", "encoder.layer.1.mlp"], ["x", 3], "must be .heads, dimensions"),
        (["members", 0, "widths", "x"], [1, 1], "no pair of the kinds"),
        (["members", 1, "latency_ms", "64"], 1.0, "which the dense model has not"),
        (["date"], "x" * 20_000, "a text of 20000 characters"),
    ],
)
def test_a_record_that_no_page_could_hold_is_refused(
    tmp_path: Path, family: dict[str, Any], where: list[Any], value: Any, message: str
) -> None:
    test_a_record_that_lacks_something_says_what(tmp_path, family, where, value, message)


def test_code_in_a_card_names_a_class(family: dict[str, Any]) -> None:
    family["model"]["architecture"] = "x\nimport os"
    with pytest.raises(ArtifactError, match="is no name of a class"):
        model_card(family, family["members"][1])
