"""Draws acceptance against GPU seconds from the rows of `bench.quality`, and prints the table of docs/quality.md:
python -m bench.quality_plot

A line is one run of bench/results/quality.jsonl: held-out tau_sim at each evaluation over the seconds of its training loop.
Of each trainer the runs of at least half the seconds of its longest are drawn, and only those of one number of TTT steps,
since tau_sim counts all of them. A line of the table is one recipe for so many steps, with all its seeds.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from statistics import mean

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt

from bench.gate import load
from bench.timing import RESULTS

IMAGE = Path(__file__).parents[1] / "docs" / "img" / "quality.svg"


def draw(rows: list[dict], num_steps: int, path: Path) -> None:
    """ValueError where no row has so many TTT steps."""
    rows = long_runs([row for row in rows if len(row["acceptance"]) == num_steps])
    if not rows:
        raise ValueError(f"no row has {num_steps} TTT steps")
    plt.rcParams.update({"svg.hashsalt": "fastdraft", "svg.fonttype": "none"})  # the same file from the same rows
    figure, axes = plt.subplots(figsize=(7.5, 4.5), layout="constrained")
    names = sorted({(row["provider"], row["recipe"]) for row in rows})
    for row in rows:
        name = row["provider"], row["recipe"]
        first = row is next(other for other in rows if (other["provider"], other["recipe"]) == name)
        seconds, tau = [point[2] for point in row["curve"]], [point[4] for point in row["curve"]]
        style = "--" if row["provider"] != "fastdraft" else "-"
        label = ", ".join(name) if first else None
        axes.plot(seconds, tau, style, marker=".", color=f"C{names.index(name)}", label=label)
    axes.set(xscale="log", xlabel="GPU seconds of the training loop", ylabel=f"held-out tau_sim over {num_steps} steps")
    axes.grid(alpha=0.3)
    axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


def long_runs(rows: list[dict]) -> list[dict]:
    """Of each trainer those of at least half the seconds of its longest."""
    longest = {row["provider"]: max(r["seconds"] for r in rows if r["provider"] == row["provider"]) for row in rows}
    return [row for row in rows if row["seconds"] >= longest[row["provider"]] / 2]


def table(rows: list[dict]) -> list[str]:
    """The lines of docs/quality.md that say what came of each recipe, for so many steps of one commit: means over seeds."""
    lines = [
        "| trainer | recipe | GPU | seeds | steps | tokens | seconds | the target's | tau_sim | chain | of 7 | tree |",
        "| --- | --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    of_recipe: dict[tuple, list[dict]] = {}
    for row in rows:
        of_recipe.setdefault(tuple(row[key] for key in ("provider", "recipe", "gpu", "commit", "steps")), []).append(row)
    for (provider, recipe, gpu, _, steps), runs in of_recipe.items():
        low, high = (f"{of(run['tau_sim'] for run in runs):.3f}" for of in (min, max))
        tau = f"{mean(run['tau_sim'] for run in runs):.3f}" + (f" ({low} to {high})" if low != high else "")
        decoded = []
        for name in ("chain", "long_chain", "tree"):
            found = [run[name]["accepted_length"] for run in runs if name in run]
            decoded.append(f"{mean(found):.2f}" if found else "")
        seconds, of_target = (f"{mean(run[key] for run in runs):.1f}" for key in ("seconds", "target_seconds"))
        card = gpu.removeprefix("NVIDIA ").split()[0]
        about = f"{provider} | {recipe} | {card} | {len({run['seed'] for run in runs})} | {steps} | {runs[0]['tokens']:,}"
        lines.append(f"| {about} | {seconds} | {of_target} | {tau} | {' | '.join(decoded)} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=Path, default=RESULTS / "quality.jsonl")
    parser.add_argument("--ttt-length", type=int, default=7)
    parser.add_argument("--out", type=Path, default=IMAGE)
    args = parser.parse_args()
    rows = [row for row in load(args.rows) if row["gpu"]]
    draw(rows, args.ttt_length, args.out)
    print("\n".join(table(rows)))


if __name__ == "__main__":
    main()
