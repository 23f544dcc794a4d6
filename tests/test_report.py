"""summary.json, report.html and the closing table."""

import base64
import io
import json
import math
import re
from pathlib import Path

import pytest
from matplotlib.image import imread
from rich.console import Console

from fastdraft.report import REQUIRED, _kept, _smooth, render_summary, write_report, write_summary

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
    "by_position": [
        {"start": 0, "end": 128, "means": {"acceptance": [0.7, 0.6, 0.5], "num_live": [90, 80, 70]}},
        {"start": 128, "end": None, "means": {"acceptance": [0.6, 0.5, None], "num_live": [9, 2, 0]}},
    ],
    "decode_sample": [["Say <hi> & bye\n", None], ["The", 0], [" cat", 1], [" sat", 1], ["</div>", 2]],
}
EVERY_PICTURE = {"loss", "acceptance", "tau_sim", "accepted_length", "steps", "position"}


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


def test_a_full_report_carries_every_picture_in_itself(tmp_path):
    write_metrics(tmp_path)
    page = write_report(tmp_path, NEEDED | OPTIONAL).read_text()
    files = {path.stem: path.read_bytes() for path in (tmp_path / "report").iterdir()}
    assert set(files) == EVERY_PICTURE
    inline = [base64.b64decode(x) for x in re.findall(r"data:image/png;base64,([A-Za-z0-9+/=]+)", page)]
    assert sorted(inline) == sorted(files.values())
    for content in files.values():
        pixels = imread(io.BytesIO(content))
        assert pixels.shape[1] >= 800 and pixels[..., :3].std() > 0.05
    assert not re.search(r"(src|href)=\"(?!data:)", page)  # nothing to fetch


def test_the_sample_is_escaped_and_coloured_by_forward(tmp_path):
    write_metrics(tmp_path)
    page = write_report(tmp_path, NEEDED | OPTIONAL).read_text()
    assert "Say &lt;hi&gt; &amp; bye" in page and "&lt;/div&gt;</span>" in page
    assert "4 tokens in 3 target forwards" in page
    color = {text: c for c, text in re.findall(r'<span(?: class="first")? style="background:(#\w+)">([^<]*)</span>', page)}
    assert color["The"] == color["&lt;/div&gt;"] == color["1"]
    assert color[" cat"] == color[" sat"] == color["2"] != color["1"]
    assert re.search(r'class="first" style="[^"]*"> cat<', page) and not re.search(r'class="first"[^>]*> sat<', page)


def test_pictures_without_data_are_left_out(tmp_path):
    write_metrics(tmp_path)
    write_report(tmp_path, NEEDED | OPTIONAL)
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "lr": 0.1}\n')
    page = write_report(tmp_path, NEEDED).read_text()
    assert {path.stem for path in (tmp_path / "report").iterdir()} == {"accepted_length", "steps"}
    assert page.count("<img") == 2 and "Decoded text" not in page


def test_a_run_with_hardly_any_data_still_reports(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": null, "eval/a0": 0.1}\n')
    summary = NEEDED | {"accepted_length": None, "accepted_length_untrained": math.nan, "step_acceptance": [None]}
    page = write_report(tmp_path, summary).read_text()
    assert "not measured" in page


def test_a_missing_metrics_file_is_said(tmp_path):
    with pytest.raises(ValueError, match=r"metrics.jsonl is missing"):
        write_report(tmp_path, NEEDED)


@pytest.mark.parametrize("width", [20, 60, 120])
def test_the_table_says_it_all_at_any_width(width):
    out = io.StringIO()
    render_summary(NEEDED | OPTIONAL | {"report": "runs/[demo]/report.html"}, Console(file=out, width=width))
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
            "runs/[demo]/report.html",
        ):
            assert part in text


def test_kept_is_the_running_product():
    assert _kept([0.5, 0.5, None, 0.5]) == [0.5, 0.25]
    assert _kept([]) == []


def test_smoothing_skips_gaps_and_keeps_a_constant():
    smooth = _smooth([2.0] * 50 + [math.nan] + [2.0] * 50)
    assert smooth == pytest.approx([2.0] * 101)
