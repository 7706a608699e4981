"""What a service accepts: sizes, times and numbers."""

import math
from dataclasses import dataclass

from mechsafety.codec import Amount
from mechsafety.errors import MechsafetyError
from mechsafety.inputs import Count, check_fields


@dataclass(frozen=True, slots=True)
class ServiceLimits:
    """Limits of a service; what is beyond one is refused with the status code that is given here.

    Attributes:
        body_bytes: Largest body of a request (413).
        prompt_tokens: Longest chat prompt, in tokens (413).
        new_tokens: Largest ``max_new_tokens`` of a request (422).
        prompts: Largest number of prompts to score in one request (422).
        waiting: Number of requests that may wait for the one that runs (429).
        connections: Number of open connections (503).
        seconds: Longest time from a request's arrival to the end of its answer (504; 408 while its body is read).
        grace_seconds: How long requests may go on after the service was told to stop.

    Raises:
        MechsafetyError: A limit is no number of its kind.

    Example:
        >>> ServiceLimits(waiting=8).waiting
        8
        >>> ServiceLimits(seconds=0)
        Traceback (most recent call last):
        mechsafety.errors.MechsafetyError: seconds=0; expected a number above 0
    """

    body_bytes: Count = 65_536
    prompt_tokens: Count = 2048
    new_tokens: Count = 512
    prompts: Count = 32
    waiting: Amount = 64
    connections: Count = 512
    seconds: float = 60.0
    grace_seconds: float = 30.0

    def __post_init__(self) -> None:
        check_fields(self)
        for name in ("seconds", "grace_seconds"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
                raise MechsafetyError(f"{name}={value!r}", expected="a number above 0")
