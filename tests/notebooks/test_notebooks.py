"""Every notebook of the course runs in a fresh kernel and shows what is stored, in kind (``make test-notebooks``)."""

import pytest

from notebooks import execute, kinds, read, sources, stored


@pytest.mark.parametrize("source", [pytest.param(path, id=path.stem) for path in sources()])
def test_it_runs_and_shows_what_is_stored(source):
    executed, kept = execute(source), read(stored(source))
    for now, then in zip(executed.cells, kept.cells, strict=True):
        assert kinds(now) == kinds(then), now.source
        assert ("stderr",) not in kinds(now), now.source
