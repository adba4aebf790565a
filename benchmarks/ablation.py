"""What each part of the search is worth: the family without it, on the articles on which settings are chosen.

    python benchmarks/ablation.py --model minilm --out benchmarks/results/ablation-minilm.json

The same data, budget and measures as ``benchmarks/frontier.py``. Runs that ``--out`` already holds are kept.
"""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

from baselines.learned import ours
from frontier import Bench, bench_parser, held, measure, summary
from recording import command, write_record

VARIANTS: dict[str, dict[str, Any]] = {
    "as shipped": {},
    "without compensation": {"compensate": False},
    "without compensation and fills": {"fill": False},
    "without slopes": {"slope_lr": 0.0},
    "without gains and shifts of outputs": {"output_lr": 0.0},  # what all but language models have as shipped
    "fills stay at the mean": {"fill_lr": 0.0},
    "without rotations": {"basis": False},
    "dual step twice as large": {"lr": 0.01},
    "dual step half as large": {"lr": 0.0025},
    "slope step half as large": {"slope_lr": 0.01},
    "slope step twice as large": {"slope_lr": 0.04},
    "fill step four times as large": {"fill_lr": 0.02},
    "temperature 0.1": {"temperature": 0.1},
    "dimensions only": {"unit": "dim"},
    "the same dimensions in every head": {"unit": "shared"},
    "heads only": {"unit": "head"},
}


def main() -> None:
    arguments = bench_parser(__doc__, seeds=1)
    arguments.set_defaults(split="choice")
    arguments.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=list(VARIANTS), metavar="VARIANT")
    args = arguments.parse_args()

    bench = Bench(args)
    subject = bench.subject
    setting = {"model": subject.label, "split": args.split, "steps": bench.steps, "settings": bench.settings}
    runs = held(args.out, setting)
    for seed in range(args.seeds):
        for name in args.variants:
            done = runs.setdefault(name, [])
            if any(run["seed"] == seed for run in done):
                continue
            problem = replace(bench.problem(seed), settings={**bench.settings, **VARIANTS[name]})
            done.append({"seed": seed, **measure(ours, problem, subject)})
            print(json.dumps({"variant": name, **done[-1]}), flush=True)
            record = {
                "command": command(),
                **setting,
                "loss": subject.loss_label,
                "variants": {name: summary(runs[name]) for name in VARIANTS if runs.get(name)},
                "runs": runs,
            }
            write_record(args.out, record)


if __name__ == "__main__":
    main()
