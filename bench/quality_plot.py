"""Draws acceptance against GPU seconds from the rows of `bench.quality`, and prints the table of docs/quality.md:
python -m bench.quality_plot

A line is one run of bench/results/quality.jsonl: held-out tau_sim at each evaluation over the seconds of its training loop.
Only runs of one number of TTT steps are drawn together, since tau_sim counts all of them.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt

from bench.gate import load
from bench.timing import RESULTS

IMAGE = Path(__file__).parents[1] / "docs" / "img" / "quality.svg"


def draw(rows: list[dict], num_steps: int, path: Path) -> None:
    """ValueError where no row has so many TTT steps."""
    rows = [row for row in rows if len(row["acceptance"]) == num_steps]
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


def table(rows: list[dict]) -> list[str]:
    """The lines of docs/quality.md that say what came of each run."""
    lines = [
        "| trainer | recipe | seed | steps | tokens | seconds | of these the target's | tau_sim | chain | of 7 | tree |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in rows:
        decoded = (f"{row[name]['accepted_length']:.2f}" if name in row else "" for name in ("chain", "long_chain", "tree"))
        numbers = f"{row['seconds']:.1f} | {row['target_seconds']:.1f} | {row['tau_sim']:.3f} | {' | '.join(decoded)}"
        about = f"{row['provider']} | {row['recipe']} | {row['seed']} | {row['steps']} | {row['tokens']:,}"
        lines.append(f"| {about} | {numbers} |")
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
