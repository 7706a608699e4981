"""Keep the progress bars and warnings of other libraries off the user's screen while a model loads."""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from logging import ERROR, getLogger


@contextmanager
def quiet() -> Iterator[None]:
    """Context in which transformers, accelerate and the hub's client show no bars and log errors alone.

    The user's own settings come back at the end.

    Example:
        >>> from transformers.utils import logging
        >>> before = logging.get_verbosity()
        >>> with quiet():
        ...     logging.is_progress_bar_enabled()
        False
        >>> logging.get_verbosity() == before
        True
    """
    from huggingface_hub.utils.tqdm import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
    from transformers.utils import logging

    placing = getLogger("accelerate")
    placing_level = placing.level
    level, bars, hub_bars = logging.get_verbosity(), logging.is_progress_bar_enabled(), not are_progress_bars_disabled()

    def show(own: bool, hub: bool) -> None:
        """Set transformers' bars, which sets the hub's too, then the hub's."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the hub warns where an environment variable decides
            bar: Callable[[], None] = logging.enable_progress_bar if own else logging.disable_progress_bar
            bar()
            (enable_progress_bars if hub else disable_progress_bars)()

    logging.set_verbosity_error()
    placing.setLevel(ERROR)
    show(False, False)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module="transformers")
            yield
    finally:
        logging.set_verbosity(level)
        placing.setLevel(placing_level)
        show(bars, hub_bars)
