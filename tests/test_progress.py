"""Progress bars: one at a time, and lines where no bar can be drawn."""

import io
import re
from contextlib import redirect_stderr

import pytest

import mechsafety as ms
from mechsafety import progress
from mechsafety.progress import progress_bar, stages

# once one stage of known work is done, a line says the time left
LEFT = r"\(about \d+ (s|min) left\)"


class Terminal(io.StringIO):
    """A stderr on which a bar can be drawn over itself."""

    def isatty(self) -> bool:
        return True


@pytest.fixture
def terminal(monkeypatch):
    """A function that opens a terminal in place of stderr; pytest sets its own again once the test begins."""
    monkeypatch.setattr(progress, "EVERY", 0.0)
    return lambda: redirect_stderr(Terminal())


def test_a_bar_inside_another_one_becomes_words_beside_it(terminal):
    seen = []
    with terminal() as screen, progress_bar(total=2, desc="outer") as bar:
        for item in progress_bar([3, 4, 5], desc="inner"):
            seen.append(item)
        with progress_bar(total=7, desc="second") as inner:
            inner.update(4)
        with progress_bar(total=9, desc="hidden", show=False) as none:
            none.update(9)
        bar.update()
    text = screen.getvalue()
    assert seen == [3, 4, 5] and inner.n == 4
    assert "inner 2 of 3" in text and "second 4 of 7" in text and "hidden" not in text
    assert all("outer" in part for part in text.split("\r") if "inner" in part), "never a bar of its own"
    with terminal() as screen:
        assert list(progress_bar(range(2), desc="again")) == [0, 1]
    assert "again" in screen.getvalue(), "the next bar is an outer one again"


def test_a_loop_that_is_left_closes_its_bar(terminal):
    with terminal() as screen:
        for _ in progress_bar(range(5), desc="left"):
            break
        with pytest.raises(ValueError, match="gone"), progress_bar(total=1, desc="failed"):
            raise ValueError("gone")
        with progress_bar(total=1, desc="next"):
            pass
    assert "next" in screen.getvalue()


def test_stages_on_a_terminal(terminal):
    with terminal() as screen, stages(2, show=True) as stage:
        stage.begin("first")
        with progress_bar(total=3, desc="steps") as bar:
            bar.update(2)
        stage.begin("second")
    text = screen.getvalue()
    assert "first: 0 of 2 stages done" in text and "steps 2 of 3" in text and "second: 1 of 2 stages done" in text
    assert "\n" not in text.rstrip("\n") and "?" not in text, "one line, and no time that nobody knows"


def test_stages_of_known_work_say_the_time_left(terminal):
    """Twice the seconds per unit in the second stage: the third is expected to take as long per unit."""
    now = [0.0]
    with terminal() as screen, stages(3, show=True) as stage:
        stage.clock, stage.since = lambda: now[0], 0.0
        stage.begin("first", work=10, rest=30)
        assert stage.seconds_left() is None, "no speed is known yet"
        now[0] = 20.0
        stage.begin("second", work=10, rest=20)
        assert stage.seconds_left() == pytest.approx(2 * 30)
        now[0] = 30.0
        with progress_bar(total=3, desc="steps") as bar:
            bar.update(1)
        assert stage.seconds_left() == pytest.approx(2 * 30 - 10)
        now[0] = 60.0  # 40 seconds for 10 units so far
        assert stage.seconds_left() == pytest.approx(4 * 20)
        stage.begin("third", work=20)
        assert stage.seconds_left() == pytest.approx(60 / 20 * 20)
        stage.begin("last, of unknown work")
        assert stage.seconds_left() is None
    assert "about 50 s left, steps 1 of 3" in screen.getvalue()


def test_time_left_in_words(monkeypatch):
    with stages(1, show=False) as stage:
        for seconds, words in (
            (None, ""),
            (0, "about 5 s left"),
            (62, "about 60 s left"),
            (92, "about 1.5 min left"),
            (170, "about 3 min left"),
        ):
            monkeypatch.setattr(stage, "seconds_left", lambda seconds=seconds: seconds)
            assert stage.left() == words


def test_without_a_terminal_a_map_writes_one_line_per_stage(planted, capsys):
    model, pairs = planted
    options = ms.MapOptions(limit=8, n_random=0, n_resamples=0, n_added=0, shortlist=0)
    metric = ms.RefusalLogOdds.of(model, ["sorry"], ["sure"])
    ms.map_refusal_circuit(model, pairs, metric, options)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 6
    for k, line in enumerate(lines, 1):
        assert re.fullmatch(rf"\[{k}/6\] [a-z ,]+{LEFT * (k > 2)}", line)
    ms.map_refusal_circuit(model, pairs, metric, options, progress=False)
    assert capsys.readouterr().err == ""
