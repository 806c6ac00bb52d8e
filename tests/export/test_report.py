"""The report states what was measured, and shows it on one page."""

import html.parser
import re

import exported
import numpy as np
import onnx
import pytest

from keras_peft.export import measure
from keras_peft.export.report import ExportReport
from keras_peft.export.report import Step
from keras_peft.export.report import WeightError
from keras_peft.export.report_html import render

VOID = {"meta", "line", "br"}


class Balanced(html.parser.HTMLParser):
    """Collects tags that are not closed where they should be."""

    def __init__(self):
        super().__init__()
        self.stack, self.wrong = [], []

    def handle_starttag(self, tag, attributes):
        if tag not in VOID:
            self.stack.append(tag)

    def handle_startendtag(self, tag, attributes):
        pass

    def handle_endtag(self, tag):
        if not self.stack or self.stack.pop() != tag:
            self.wrong.append(tag)


def graph_of(**weights):
    graph = onnx.helper.make_graph(
        [],
        "weights",
        [],
        [],
        [onnx.numpy_helper.from_array(v, n) for n, v in weights.items()],
    )
    return onnx.helper.make_model(graph)


def test_the_report_holds_every_step():
    folder, _, report = exported.exported()
    assert [step.name for step in report.steps] == ["keras", "float32", "int8"]
    saved = exported.read(folder, "report.json")
    assert [step["name"] for step in saved["steps"]] == [
        step.name for step in report.steps
    ]
    assert saved["num_samples"] == len(exported.TEXTS)
    assert all(step.latency_ms > 0 for step in report.steps)
    assert "1 processor thread" in report.latency


def test_size_is_the_size_of_the_file():
    folder, _, report = exported.exported()
    assert report.final.num_bytes == (folder / "model.onnx").stat().st_size


def test_accuracy_is_measured_on_the_samples_given():
    _, model, report = exported.exported()
    outputs = np.asarray(model.predict(exported.TEXTS, verbose=0))
    right = outputs.argmax(-1) == np.array(exported.CLASSES)
    assert report.steps[0].accuracy == pytest.approx(right.mean())
    assert {sample.text for sample in report.worst_samples} == set(
        exported.TEXTS
    )


def test_the_table_names_every_step():
    _, _, report = exported.exported()
    lines = str(report).split("\n")
    assert [line.split()[0] for line in lines[1:]] == [
        "keras",
        "float32",
        "int8",
    ]


def test_an_int8_weight_is_off_by_half_a_step_at_most():
    rng = np.random.default_rng(0)
    weight = rng.normal(size=(64, 32)).astype("float32")
    scale = np.abs(weight).max(axis=0) / 127
    stored = np.rint(weight / scale).astype("int8")
    before = graph_of(w=weight, bias=np.ones(4, "float32"))
    after = graph_of(**{"w/int8": stored, "w/scale": scale})
    (error,) = measure.weight_errors(before, after)
    bound = np.linalg.norm(0.5 * scale) * np.sqrt(64) / np.linalg.norm(weight)
    assert 0 < error.relative <= bound
    assert (error.name, error.stored, error.shape) == ("w", "int8", (64, 32))


def test_weights_come_worst_first():
    _, _, report = exported.exported()
    errors = [weight.relative for weight in report.weights]
    assert len(errors) > 3 and errors == sorted(errors, reverse=True)


def test_a_changed_class_comes_before_a_larger_difference():
    keras_outputs = np.array([[0.0, 9.0], [0.0, 0.1], [5.0, 0.0]])
    exported_outputs = np.array([[0.0, 5.0], [0.0, -0.1], [4.0, 0.0]])
    labels = np.array([1, 1, 0])
    found = measure.worst_samples(
        keras_outputs, exported_outputs, labels, None, ["no", "yes"]
    )
    assert [sample.index for sample in found] == [1, 0, 2]
    assert (found[0].keras, found[0].exported) == ("yes", "no")


@pytest.mark.parametrize(
    ("outputs", "expected"),
    [
        ([[0.2], [0.7]], [0, 1]),
        ([[-3.0], [0.4]], [0, 1]),
        ([[1.0, 3.0, 2.0], [5.0, 0.0, 0.0]], [1, 0]),
    ],
    ids=["probability", "logit", "classes"],
)
def test_the_class_is_the_one_the_outputs_choose(outputs, expected):
    assert measure.classes(np.array(outputs)).tolist() == expected


def test_labels_may_be_one_hot_or_a_column():
    outputs = np.zeros((3, 2))
    one_hot = np.array([[1, 0], [0, 1], [0, 1]])
    assert measure.class_ids(one_hot, outputs).tolist() == [0, 1, 1]
    assert measure.class_ids([[0], [1], [1]], outputs).tolist() == [0, 1, 1]
    with pytest.raises(ValueError, match="one label per sample"):
        measure.class_ids([0, 1], outputs)


def test_the_page_is_whole_and_takes_nothing_from_elsewhere():
    folder, _, _ = exported.exported()
    page = (folder / "report.html").read_text("utf-8")
    parser = Balanced()
    parser.feed(page)
    assert not parser.wrong and not parser.stack
    assert not re.search(r"(?:src|href)=|@import|url\(|https?:|<script", page)
    assert "prefers-color-scheme: dark" in page and "@media print" in page


def test_text_of_a_user_is_not_markup():
    folder, _, _ = exported.exported()
    page = (folder / "report.html").read_text("utf-8")
    assert "&lt;b&gt; awful" in page and "<b> awful" not in page


def test_the_picture_has_a_column_per_weight():
    errors = [
        WeightError(f"w{i}", (2, 2), 0.1 / (i + 1), "int8") for i in range(50)
    ]
    report = ExportReport(
        "m", (Step("keras", 4), Step("int8", 1)), weights=tuple(errors)
    )
    heights = re.findall(r"<rect [^>]*height='([\d.]+)'", render(report))
    assert len(heights) == 50 and float(heights[0]) == 100
    assert float(heights[1]) == pytest.approx(50, abs=0.01)


def test_a_report_without_measurements_renders():
    page = render(ExportReport("m", (Step("keras", 4), Step("float32", 4))))
    assert "<h1>m</h1>" in page


def test_every_int8_weight_is_reported_under_the_name_of_its_variable():
    folder, model, report = exported.exported()
    graph = onnx.load(folder / "model.onnx")
    stored = {
        initializer.name.removesuffix("/int8")
        for initializer in graph.graph.initializer
        if initializer.data_type == onnx.TensorProto.INT8
    }
    assert stored == {weight.name for weight in report.weights}
    variables = {variable.path for variable in model.variables}
    assert stored <= variables
    # A kernel whose rows were evened out for its inputs is compared as it
    # multiplies them; by itself it would be off by the factors.
    assert max(weight.relative for weight in report.weights) < 0.05
