"""The exercises with their answers run in a fresh kernel, and every check passes (``make test-notebooks``)."""

import nbclient
import pytest
from exercises import notebook, sources


@pytest.mark.parametrize("source", [pytest.param(path, id=path.stem) for path in sources()])
def test_the_answers_run_and_pass(source, tmp_path):
    solved = notebook(source, solved=True)
    nbclient.NotebookClient(
        solved, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}
    ).execute()
    code = [cell for cell in solved.cells if cell.cell_type == "code"]
    shown = [output for cell in code for output in cell.outputs]
    assert not [output for output in shown if output.get("name") == "stderr"]
    passed = [output.data["text/plain"] for output in shown if output.output_type == "execute_result"]
    checked = [cell.source for cell in code if cell.source.startswith("checks.")]
    assert len([text for text in passed if text.startswith("passed: ")]) == len(checked) >= 2


def test_a_stub_shows_one_line(tmp_path):
    made = notebook(sources()[0])
    client = nbclient.NotebookClient(made, timeout=300, kernel_name="python3", allow_errors=True)
    client.execute()
    failed = next(cell for cell in made.cells if cell.source.startswith("checks."))
    (error,) = failed.outputs
    assert error.traceback == ["CheckFailed: token_positions is not written yet"]
