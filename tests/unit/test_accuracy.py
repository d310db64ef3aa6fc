"""UA, RA and TA."""

import pytest
from scored import make_outputs, report

import metrics
from metrics import accuracy


@pytest.mark.parametrize("forgotten", [False, True])
def test_accuracies_of_a_report_are_measured_on_their_images(forgotten):
    outputs = make_outputs(num_draws=2, forgotten=forgotten)
    actual, rows = report(accuracy, outputs, metrics.Settings((0.1,)))
    right = [
        (output.logits.argmax(dim=1) == output.labels).double()
        for output in (outputs.forget, outputs.retain, outputs.held_out)
    ]
    tested = [
        number
        for number in range(50, 150)
        if not (forgotten and outputs.held_out.labels[number] == 2)
    ]
    expected = {"UA": 1 - right[0].mean(), "RA": right[1].mean(), "TA": right[2][tested].mean()}
    if forgotten:
        of_class = [number for number in range(50, 150) if outputs.held_out.labels[number] == 2]
        expected["UA_test"] = 1 - right[2][of_class].mean()
    assert rows == {}
    assert actual == {key: pytest.approx(value.item()) for key, value in expected.items()}
    assert len(set(actual.values())) == len(actual)


def test_accuracy_of_forgotten_class_without_test_images_is_omitted():
    outputs = make_outputs(forgotten=True)
    outputs.forgotten[outputs.draws[0, 50:]] = False
    assert "UA_test" not in report(accuracy, outputs, metrics.Settings((0.1,)))[0]
