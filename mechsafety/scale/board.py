"""Who computes which item: the driver's record of a call on several replicas, free of any cluster."""

import statistics
from collections import deque
from dataclasses import dataclass, field

from mechsafety.errors import MechsafetyError
from mechsafety.scale.work import Store, Sweep

# an item is given to a second replica if it has taken so many times the median, and so many seconds
SLOW, SLOW_SECONDS = 4.0, 5.0
# so many replicas may die at one item
DEATHS = 3


@dataclass(eq=False)
class Open:
    """A sweep under way.

    Attributes:
        sweep: The sweep.
        done: Outcome of each item that is known.
        waiting: Numbers of the items that nobody computes yet, in order, by group.
        under_way: For each item that is computed now, when each replica began, in seconds.
        took: Seconds per item so far.
        last_group: Group of the item that each replica computed last.
        deaths: How many replicas died at each item.
    """

    sweep: Sweep
    done: dict[int, bytes]
    waiting: dict[int, deque[int]]
    under_way: dict[int, dict[int, float]] = field(default_factory=dict)
    took: list[float] = field(default_factory=list)
    last_group: dict[int, int] = field(default_factory=dict)
    deaths: dict[int, int] = field(default_factory=dict)

    @property
    def complete(self) -> bool:
        """Whether every outcome is known."""
        return len(self.done) == self.sweep.n

    @classmethod
    def of(cls, sweep: Sweep, done: dict[int, bytes]) -> "Open":
        """A sweep of which nobody computes anything yet."""
        here = cls(sweep, done, {})
        for item in range(sweep.n):
            if item not in done:
                here.waiting.setdefault(here.group(item), deque()).append(item)
        return here

    def group(self, item: int) -> int:
        """Group of an item; each is its own where the sweep has none."""
        return self.sweep.groups[item] if self.sweep.groups else item

    def next(self, replica: int) -> int | None:
        """The next item for a replica: of its own group, of a group that nobody is at, or of any."""
        while self.waiting:
            own = self.last_group.get(replica)
            others = {group for who, group in self.last_group.items() if who != replica}
            first = next(iter(self.waiting))
            group = own if own in self.waiting else next((one for one in self.waiting if one not in others), first)
            item = self.waiting[group].popleft()
            if not self.waiting[group]:
                del self.waiting[group]
            if item not in self.done:
                return item
        return None


@dataclass(eq=False)
class Board:
    """Gives items to replicas, and keeps what they return.

    Replicas are numbers. Times are in seconds, from any clock.

    Attributes:
        store: Where outcomes are kept, and found from an earlier run.
        sweeps: The sweeps of the call so far.
        repeated: Number of items that were given to a second replica because the first was slow.
    """

    store: Store
    sweeps: dict[int, Open] = field(default_factory=dict)
    repeated: int = 0

    def seen(self, sweep: Sweep) -> Open:
        """The record of a sweep that a replica has come to.

        Raises:
            MechsafetyError: Another replica came to another sweep at this point.
        """
        known = self.sweeps.get(sweep.number)
        if known is None:
            found = {k: self.store.bytes_of(sweep.folder, sweep.place(self.store.run, k)) for k in range(sweep.n)}
            done = {k: data for k, data in found.items() if data is not None}
            known = self.sweeps[sweep.number] = Open.of(sweep, done)
        elif known.sweep != sweep:
            raise MechsafetyError(
                f"two replicas came to different work (step {sweep.number}: {known.sweep.name}, {sweep.name})",
                expected="replicas that compute the same numbers",
                hint="use nodes with the same processors, and the same versions of everything",
                page="replicas-that-differ",
            )
        return known

    def take(self, number: int, replica: int, now: float) -> int | None:
        """The next item for a free replica (see `Open.next`); None if there is none.

        If no item waits, a slow one is computed a second time.
        """
        here = self.sweeps[number]
        item = here.next(replica)
        if item is None:
            item = self._slow(here, replica, now)
            if item is None:
                return None
            self.repeated += 1
        here.under_way.setdefault(item, {})[replica] = now
        here.last_group[replica] = here.group(item)
        return item

    def put(self, number: int, item: int, replica: int, data: bytes, now: float) -> bool:
        """Keep an outcome; False if another replica was first."""
        here = self.sweeps[number]
        began = here.under_way.get(item, {}).pop(replica, None)
        if not here.under_way.get(item):
            here.under_way.pop(item, None)
        if began is not None:
            here.took.append(now - began)
        if item in here.done:
            return False
        self.store.put(here.sweep.folder, here.sweep.place(self.store.run, item), data)
        here.done[item] = data
        return True

    def lost(self, replica: int) -> None:
        """A replica died: what it computed waits again.

        Raises:
            MechsafetyError: Too many replicas died at the same item.
        """
        for here in self.sweeps.values():
            for item, by in list(here.under_way.items()):
                if by.pop(replica, None) is None:
                    continue
                here.deaths[item] = here.deaths.get(item, 0) + 1
                if here.deaths[item] >= DEATHS:
                    raise MechsafetyError(
                        f"{DEATHS} workers died at item {item} of {here.sweep.name}",
                        expected="workers with enough memory",
                        hint="pass a smaller max_batch_tokens, or fewer replicas per node",
                    )
                if not by:
                    del here.under_way[item]
                    if item not in here.done:
                        here.waiting.setdefault(here.group(item), deque()).appendleft(item)
        for here in self.sweeps.values():
            here.last_group.pop(replica, None)

    def _slow(self, here: Open, replica: int, now: float) -> int | None:
        """The item that has taken longest, if it is slow and this replica does not compute it."""
        if not here.took:
            return None
        limit = max(SLOW * statistics.median(here.took), SLOW_SECONDS)
        late = {
            item: min(by.values())
            for item, by in here.under_way.items()
            if len(by) == 1 and replica not in by and now - min(by.values()) > limit
        }
        return min(late, key=lambda item: late[item]) if late else None
