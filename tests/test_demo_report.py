"""The demo's summary.json, report.png and the closing table."""

import io
import json
import math
from pathlib import Path

import demo_report
import pytest
from demo_report import REQUIRED, _kept, _smooth, render_summary, write_report, write_summary
from matplotlib.image import imread
from rich.console import Console

NEEDED = {
    "accepted_length": 2.314,
    "accepted_length_untrained": 1.021,
    "tau_sim": 2.672,
    "step_acceptance": [0.75, 0.5, 0.25],
    "tokens_per_s": 912.3,
    "seconds_total": 534.2,
    "export_dir": Path("runs/demo/export"),
}
OPTIONAL = {
    "step_top1": [0.8, 0.6, None],
    "decode_step_acceptance": [0.66, 0.41, 0.24],
    "decode_tokens_per_s": 31.2,
    "plain_tokens_per_s": 20.8,
    "dtype": "fp32 on a slow CPU",
    "cut": ["95 of 300 training steps", "6 of 8 prompts decoded"],
    "decode_sample": [["Say <hi> & bye\n", None], ["The", 0], [" cat", 1], [" sat", 1], ["</div>", 2]],
}


def write_metrics(run_dir, steps=60):
    records = []
    for step in range(1, steps + 1):
        records.append({"step": step, "loss": None if step == 7 else 5 / step, "tau_sim": 1.5, "a0": 0.5, "a1": 0.4})
        if step % 20 == 0:
            records.append({"step": step, "eval/loss": 5.5 / step, "eval/tau_sim": 1.4, "eval/a0": 0.4, "eval/a1": 0.3})
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))


def test_summary_is_plain_json_and_whole(tmp_path):
    path = write_summary(tmp_path, NEEDED | {"decode_tokens_per_s": math.nan, "nested": {"x": (1, math.inf)}})
    read = json.loads(path.read_text(), parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert read["accepted_length"] == 2.314 and read["step_acceptance"] == [0.75, 0.5, 0.25]
    assert read["export_dir"] == "runs/demo/export"
    assert read["decode_tokens_per_s"] is None and read["nested"] == {"x": [1, None]}
    assert [p.name for p in tmp_path.iterdir()] == ["summary.json"]


def test_a_failed_write_keeps_the_old_summary(tmp_path):
    write_summary(tmp_path, NEEDED)
    with pytest.raises(TypeError):
        write_summary(tmp_path, NEEDED | {"accepted_length": 9.0, "bad": object()})
    assert json.loads((tmp_path / "summary.json").read_text())["accepted_length"] == 2.314


@pytest.mark.parametrize("missing", REQUIRED)
def test_missing_keys_are_named_everywhere(tmp_path, missing):
    summary = {key: value for key, value in NEEDED.items() if key != missing}
    for write in (
        lambda: write_summary(tmp_path, summary),
        lambda: write_report(tmp_path, summary),
        lambda: render_summary(summary, Console(file=io.StringIO())),
    ):
        with pytest.raises(ValueError, match=f"lacks {missing};"):
            write()
    assert not list(tmp_path.iterdir())


def axes_of(tmp_path, monkeypatch, summary):
    """Writes the report; its three panels as they were drawn."""
    kept = []
    panels = demo_report.panels

    def keep(*titles):
        figure, axes = panels(*titles)
        kept.extend(axes)
        return figure, axes

    monkeypatch.setattr(demo_report, "panels", keep)
    path = write_report(tmp_path, summary)
    assert [p.name for p in tmp_path.iterdir() if p.suffix != ".jsonl"] == ["report.png"] == [path.name]
    pixels = imread(path)
    assert pixels.shape[1] >= 1500 and pixels[..., :3].std() > 0.05
    return kept


def test_a_full_report_shows_the_runs_own_numbers(tmp_path, monkeypatch):
    write_metrics(tmp_path)
    loss, acceptance, depth = axes_of(tmp_path, monkeypatch, NEEDED | OPTIONAL)
    measured, smooth, held_out = loss.get_lines()
    assert list(measured.get_ydata()[:3]) == [5.0, 2.5, 5 / 3] and math.isnan(measured.get_ydata()[6])
    assert 5 / 60 < smooth.get_ydata()[-1] < 0.1
    assert held_out.get_xydata().tolist() == [[20, 5.5 / 20], [40, 5.5 / 40], [60, 5.5 / 60]]
    assert [t.get_text() for t in loss.get_legend().get_texts()] == ["loss", "loss, held-out"]
    curves = acceptance.get_lines()
    assert [line.get_ydata()[-1] for line in curves] == pytest.approx([0.5, 0.5, 0.4, 0.4, 0.4, 0.3])
    heights = [[bar.get_height() for bar in bars] for bars in depth.containers]
    assert heights == [[0.75, 0.375, 0.09375], pytest.approx([0.8, 0.48]), [0.66, 0.41, 0.24]]


def test_the_sample_tells_one_forward_from_the_next():
    text = demo_report._sample(OPTIONAL["decode_sample"])
    assert text.plain == "Decoded text: 4 tokens in 3 target forwards\nSay <hi> & bye\nThe cat sat</div>"
    prompt, first, second, same, third = (span.style for span in text.spans)
    assert prompt == "dim" and first == third != second == same


def test_panels_without_data_say_so(tmp_path, monkeypatch):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "lr": 0.1}\n')
    loss, acceptance, depth = axes_of(tmp_path, monkeypatch, NEEDED)
    assert [t.get_text() for axes in (loss, acceptance) for t in axes.texts] == ["not measured"] * 2
    assert len(depth.containers) == 1


def test_a_run_with_hardly_any_data_still_reports(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": null, "eval/a0": 0.1}\n')
    summary = NEEDED | {"accepted_length": None, "accepted_length_untrained": math.nan, "step_acceptance": [None]}
    assert write_report(tmp_path, summary).exists()
    out = io.StringIO()
    render_summary(summary, Console(file=out, width=120))
    assert "not measured" in out.getvalue()


def test_a_missing_metrics_file_is_said(tmp_path):
    with pytest.raises(ValueError, match=r"metrics.jsonl is missing"):
        write_report(tmp_path, NEEDED)


@pytest.mark.parametrize("width", [20, 60, 120])
def test_the_table_says_it_all_at_any_width(width):
    out = io.StringIO()
    render_summary(NEEDED | OPTIONAL | {"report": "runs/[demo]/report.png"}, Console(file=out, width=width))
    text = out.getvalue()
    assert max(map(len, text.splitlines())) <= width
    if width == 120:
        for part in (
            "1.021 tokens per target forward",
            "2.314 tokens per target forward",
            "0.750  0.500  0.250",
            "31.2 tokens/s (1.50x)",
            "20.8 tokens/s",
            "912 tokens/s",
            "fp32 on a slow CPU",
            "95 of 300 training steps; 6 of 8 prompts decoded",
            "0:08:54 (534 s)",
            "runs/demo/export",
            "runs/[demo]/report.png",
        ):
            assert part in text


def test_kept_is_the_running_product():
    assert _kept([0.5, 0.5, None, 0.5]) == [0.5, 0.25]
    assert _kept([]) == []


def test_smoothing_skips_gaps_and_keeps_a_constant():
    smooth = _smooth([2.0] * 50 + [math.nan] + [2.0] * 50)
    assert smooth == pytest.approx([2.0] * 101)
