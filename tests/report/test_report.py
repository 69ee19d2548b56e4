"""What a person sees of a run: the page, the live lines."""

import re
from xml.etree import ElementTree

import pytest

from lora_sft import finetune
from lora_sft.report.page import _chart
from lora_sft.report.progress import LiveDisplay, _clock
from tests.conftest import FEW, HARBOUR


@pytest.fixture(scope="module")
def page(base, tmp_path_factory) -> str:
    settings = FEW | {"eval_size": 3, "eval_strategy": "steps", "eval_steps": 1}
    run = finetune(base, HARBOUR, output_dir=tmp_path_factory.mktemp("runs") / "run<1>", **settings)
    return (run.output_dir / "report.html").read_text()


def test_the_page_shows_the_losses_and_what_is_learned(page):
    assert len(re.findall(r'<polyline class="(train|evaluation)"', page)) == 2
    assert re.search(r"<mark>[^<]*&lt;\|im_end\|&gt;</mark>", page)
    assert "<td>lora_r</td><td>8</td>" in page


def test_the_page_needs_no_other_file_and_escapes_names(page):
    assert "<h1>run&lt;1&gt;</h1>" in page
    assert "http" not in page
    assert "src=" not in page


def test_a_run_that_logged_nothing_has_a_page_too(base, tmp_path):
    run = finetune(base, HARBOUR, output_dir=tmp_path / "run", **FEW | {"logging_steps": 100})
    assert "not logged" in (run.output_dir / "report.html").read_text()
    assert run.metrics["train_loss"] > 0


def test_the_chart_is_drawn_to_scale():
    svg = ElementTree.fromstring(_chart({"train": [(1, 5.0), (3, 3.0), (5, 1.0)], "evaluation": []}))
    points = [tuple(map(float, point.split(","))) for point in svg.find("polyline").get("points").split()]
    assert points == [(44, 44), (360, 130), (676, 216)]


def test_a_run_without_numbers_has_no_chart():
    assert _chart({"train": [], "evaluation": []}) == "<p>Nothing was logged.</p>"


def test_without_a_terminal_progress_is_plain_lines(capsys):
    display = LiveDisplay()
    display.started(2, 0)
    display.logged(1, {"loss": 1.5, "learning_rate": 2e-4, "tokens_per_second": 1234.0})
    display.logged(2, {"loss": 1.0, "learning_rate": 1e-4})
    display.logged(2, {"eval_loss": 1.25, "eval_mean_token_accuracy": 0.5})
    display.ended()
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "step 1/2  loss 1.5000  lr 2.0e-04  1,234 tokens/s  0:00 left"
    assert lines[2] == "step 2/2  evaluation: loss 1.2500  token accuracy 50.0%"


@pytest.mark.parametrize(("seconds", "shown"), [(5, "0:05"), (65.4, "1:05"), (3725, "1:02:05")])
def test_time_left_is_a_clock(seconds, shown):
    assert _clock(seconds) == shown
