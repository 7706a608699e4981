"""Fixtures: tiny random models of many architectures, the demo model, and shape checks on every call.

The jaxtyping hook checks shapes and types of every annotated function of the package: on in tests, absent in use. In
each test it checks a function's first calls and then one of many, since checking all of them doubles the time.
"""

import functools
import os
import types
import typing
from collections import Counter
from io import StringIO

os.environ["HF_HUB_OFFLINE"] = "1"
if workers := int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "0")):
    # the workers share the cores; without this each would start one thread per core, and subprocesses too
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // workers)))

from pathlib import Path

import jaxtyping
from beartype import BeartypeConf, beartype
from beartype.door import is_bearable
from beartype.roar import BeartypeDecorHintException

CHECKED = 3  # calls of each function in each test; after these, one in EVERY
EVERY = 64
CALLS: Counter = Counter()
# a whole number counts as a number (PEP 484)
TYPES = beartype(conf=BeartypeConf(is_pep484_tower=True))
jaxtyped = jaxtyping.jaxtyped


def with_known_hints(found):
    """A copy of a function without the hints that cannot be checked: ``Self``, and names that only editors import."""
    copy = types.FunctionType(found.__code__, found.__globals__, found.__name__, found.__defaults__, found.__closure__)
    copy.__kwdefaults__, copy.__qualname__, copy.__module__ = found.__kwdefaults__, found.__qualname__, found.__module__

    def checkable(name):
        copy.__annotations__ = {name: found.__annotations__[name]}
        try:
            hints = typing.get_type_hints(copy, include_extras=True)
            is_bearable(None, hints[name])
        except (NameError, BeartypeDecorHintException):
            return {}
        return hints

    known = [checkable(name) for name in found.__annotations__]
    copy.__annotations__ = {name: hint for hints in known for name, hint in hints.items()}
    return copy


def sampled(*args, **options):
    """`jaxtyping.jaxtyped` for some calls; not for a function within another, which is compiled anew at every call."""
    check = jaxtyped(*args, **{**options, "typechecker": TYPES})

    def decorate(found):
        if isinstance(found, type):
            # a class without tensors that has a look at its own fields is given wrong ones by tests
            own = "__post_init__" in vars(found) and "Tensor" not in repr(found.__annotations__)
            return found if own else check(found)
        if "<locals>" in found.__qualname__:
            return found
        code, checked = id(found.__code__), None  # a code object's own hash reads all of it

        @functools.wraps(found)
        def call(*args, **kwargs):
            nonlocal checked
            CALLS[code] += 1
            if CALLS[code] > CHECKED and CALLS[code] % EVERY:
                return found(*args, **kwargs)
            checked = checked or check(with_known_hints(found))
            return checked(*args, **kwargs)

        return call

    return decorate


jaxtyping.jaxtyped = sampled
jaxtyping.install_import_hook("mechsafety", "beartype.beartype")

import hypothesis
import pytest
import torch
from architectures import tiny_tokenizer
from tiny import ARCHITECTURES, GENERATION, tiny_hf_model, tiny_model, tiny_pairs
from tqdm import tqdm

import mechsafety as ms

# the same examples every time, and no deadline on machines that are busy
hypothesis.settings.register_profile("mechsafety", deadline=None, derandomize=True)
hypothesis.settings.load_profile("mechsafety")

SHARED_DATA = Path(__file__).resolve().parents[2] / "shared" / "data"


def pytest_runtest_setup(item) -> None:
    CALLS.clear()
    # a test of what is said of wrong types gives them on purpose
    jaxtyping.config.update("jaxtyping_disable", item.get_closest_marker("unchecked") is not None)


def pytest_collection_modifyitems(config, items):
    """Leave out what cannot run here.

    These are tests for the other generation of TransformerLens, ``@pytest.mark.generation(name, reason=...)``, and
    tests of a GPU where there is none, ``@pytest.mark.gpu``.
    """
    kept, left = [], []
    for item in items:
        mark = item.get_closest_marker("generation")
        fits = mark is None or mark.args[0] == GENERATION
        fits = fits and (item.get_closest_marker("gpu") is None or torch.cuda.is_available())
        (kept if fits else left).append(item)
    items[:] = kept
    config.hook.pytest_deselected(items=left)


@pytest.fixture(scope="session", params=ARCHITECTURES)
def architecture(request) -> str:
    """Each architecture in turn."""
    return request.param


@functools.cache
def one_model(kind: str) -> ms.LensModel:
    """One tiny model per architecture and process: pytest makes a fixture with parameters anew in every file."""
    return tiny_model(kind)


@pytest.fixture(scope="session")
def shared_model():
    """Gives the tiny model of an architecture, ``shared_model(kind)``, to tests that leave it as they found it."""
    return one_model


@pytest.fixture(scope="session")
def any_model(architecture) -> ms.LensModel:
    """A tiny model of each architecture in turn."""
    return one_model(architecture)


@pytest.fixture(scope="session")
def llama() -> ms.LensModel:
    return one_model("llama")


@pytest.fixture(scope="session")
def pairs() -> ms.PromptPairs:
    """Aligned pairs under the tiny tokenizer, of different lengths."""
    return tiny_pairs()


@pytest.fixture(scope="session")
def log_odds() -> ms.RefusalLogOdds:
    return ms.RefusalLogOdds((20, 21), ("a", "b"))


@pytest.fixture(scope="session")
def logit_difference() -> ms.RefusalLogOdds:
    return ms.RefusalLogOdds((20, 21), ("a", "b"), (30,), ("c",))


@pytest.fixture(scope="session")
def demo() -> ms.LensModel:
    """The embedded demo model; about 20 s on the first use of a machine."""
    return ms.load_model("demo")


@pytest.fixture
def shared_data() -> Path:
    if not SHARED_DATA.is_dir():
        pytest.skip("the folder with evaluation data, ../shared/data, is not there")
    return SHARED_DATA


@pytest.fixture(scope="session")
def make_tokenizer():
    """Builder of the tiny tokenizer."""
    return tiny_tokenizer


@pytest.fixture
def tokenizer_with(make_tokenizer):
    """The tiny tokenizer with a template."""

    def build(source):
        tokenizer = make_tokenizer()
        tokenizer.chat_template = source
        return tokenizer

    return build


@pytest.fixture(scope="session")
def make_hf_model():
    """Builder of unwrapped tiny models: ``make_hf_model(kind, seed=0, layers=3, dtype=torch.float32)``."""
    return tiny_hf_model


@pytest.fixture(scope="session")
def make_model():
    """Builder of wrapped tiny models, for tests that change them: ``make_model(kind, seed=0)``."""
    return tiny_model


@pytest.fixture(scope="session")
def gpt2() -> ms.LensModel:
    return one_model("gpt2")


@pytest.fixture(scope="session")
def gpt_neox() -> ms.LensModel:
    return one_model("gpt_neox")


@pytest.fixture(scope="session")
def ragged() -> ms.PromptPairs:
    """Pairs of very different lengths: the longest differs first, where the shortest is all padding."""
    harmful = ["bomb the car with poison and make people write a poem", "kill", "steal my bread"]
    harmless = ["cake the car with poison and make people write a poem", "help", "bake my bread"]
    return ms.PromptPairs.from_lists(harmful, harmless)


@pytest.fixture(scope="session")
def directed() -> tuple[ms.LensModel, ms.PromptPairs, ms.RefusalLogOdds]:
    """A tiny model whose refusal is one direction by construction, prompts for it, and its metric."""
    from planted_direction import directed_model, directed_pairs

    model = directed_model(tiny_hf_model, tiny_tokenizer)
    return model, directed_pairs(), ms.RefusalLogOdds.of(model, ["sorry"])


@pytest.fixture(scope="session")
def directed_found(directed) -> ms.RefusalDirection:
    """Its refusal direction, found."""
    model, pairs, metric = directed
    return ms.refusal_direction(model, pairs, metric, progress=False)


@pytest.fixture(scope="session")
def planted() -> tuple[ms.LensModel, ms.PromptPairs]:
    """A tiny model that says "sorry" to bombs and "sure" to cakes, and pairs of two topics."""
    from planted_words import planted_words

    return planted_words()


@pytest.fixture(scope="session")
def opened() -> tuple[ms.LensModel, ms.PromptPairs, ms.RefusalLogOdds]:
    """A tiny model whose every reply begins with "I'm", its pairs, and the metric that is detected on them."""
    from planted_opener import opener_model, opener_pairs

    pairs = opener_pairs()
    model = opener_model(tiny_hf_model, tiny_tokenizer, pairs)
    return model, pairs, ms.RefusalLogOdds.detect(model, pairs)


@pytest.fixture
def recorded_bars(monkeypatch):
    """Puts bars that are kept, and shown nowhere, in the place of a module's ``progress_bar``; gives their list."""

    def record(place):
        shown = []

        def bar(*args, show, **options):
            shown.append(tqdm(*args, **options | {"delay": 0, "disable": not show, "file": StringIO()}))
            return shown[-1]

        monkeypatch.setattr(place, bar)
        return shown

    return record


@pytest.fixture
def run(capfd):
    """Runs the command: ``run("map", "--help").out``."""
    from commands import runner

    return runner(capfd)
