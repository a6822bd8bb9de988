"""Which way a step's gradients go: through the shards, or all-reduced by the process group.

Compression saves bytes and costs time; on a fast network it does not pay. So whole steps are timed both ways, and the faster way
is taken. :class:`Auto` decides from durations alone: it has no clock and no tensors, and all workers decide alike, because what
they measured is averaged over them before anything follows from it.

=============  =========================================================================================================
phase          what happens
=============  =========================================================================================================
warm-up        all-reduced steps are timed, then dense rounds through the shards; the faster way does the rest of the warm-up
compressed     once rounds are sparse, some are timed. Where that leaves doubt, both ways are timed once more, in turns
settled        the faster way goes on. Steps that take other times than they did, or many steps, have the ways timed again
=============  =========================================================================================================
"""

from __future__ import annotations

import dataclasses
import enum
from collections import deque

#: Steps that are timed of each way: first, where one look settles it, and again where it does not.
_LOOK, _LONG = 2, 4
#: Of a change of ways the first step is not like the others: it is not timed.
_SETTLE = 1
#: Within this factor of each other two ways are timed again before one is chosen.
_CLEAR = 1.25
#: Steps that take this much longer or shorter than they did make the ways be timed again.
_CHANGED = 0.2
#: Steps of the warm-up that are worth being divided between the ways.
_WORTH = 10
#: Of the last steps most must have changed.
_WINDOW = 5
#: Steps for which changes are not followed any more, once one was and has changed nothing.
_CALM = 50
#: Most steps for which either is put off because nothing came of it.
_MOST = 8000
#: Share of the time that may go into looking at the slower way, and steps between two looks at least.
_CURIOSITY, _PATIENCE = 0.005, 500


class Way(enum.Enum):
    """Where gradients are averaged."""

    #: By the shards.
    SHARDS = "arc"
    #: By the process group, densely.
    GROUP = "all-reduce"

    @property
    def other(self) -> Way:
        return Way.GROUP if self is Way.SHARDS else Way.SHARDS


def _typical(seconds: list[float]) -> float:
    """The lower median: what a step takes when nothing interferes."""
    return sorted(seconds)[(len(seconds) - 1) // 2]


@dataclasses.dataclass(frozen=True)
class Choice:
    """What was chosen, and why."""

    way: Way
    #: In one line.
    reason: str


class Auto:
    """Decides. :meth:`begin` comes before each step, and :attr:`way` is then where that step goes."""

    def __init__(self, schedule: int, update: int = 0) -> None:
        """``schedule``: updates of warm-up and ramp, in which rounds are not as sparse as they will be; ``update``: the first."""
        #: The way of the step that begins, or runs.
        self.way = Way.GROUP
        #: What was chosen last; ``None`` while nothing is.
        self.choice: Choice | None = None
        self._schedule = schedule
        self._sparse = update >= schedule
        # What is to be timed: way, and whether it counts; and the same of the steps whose times are not known yet.
        self._plan: deque[tuple[Way, bool]] = deque()
        self._untold: deque[tuple[Way, bool]] = deque()
        self._timed: dict[Way, list[float]] = {}
        # Of the ways, those of the shards in the phase that is.
        self._known: dict[Way, float] = {}
        self._doubted = False
        # Once settled: times of the last steps, steps since, and after how many the other way is looked at.
        self._recent: deque[float] = deque(maxlen=_WINDOW)
        self._since = self._look_after = 0
        self._patience = _PATIENCE
        # Whether a change made the ways be timed again, and for how many steps others are not followed.
        self._followed = False
        self._calm = 0
        self._time(Way.GROUP, _LOOK)
        if self._sparse or schedule - update >= _WORTH:
            self._time(Way.SHARDS, _LOOK)

    @property
    def settled(self) -> bool:
        """Whether the way that was chosen goes on, and nothing is being timed."""
        return self.choice is not None and not (self._plan or self._timed or any(counts for _, counts in self._untold))

    def begin(self, update: int, seconds: float | None) -> Choice | None:
        """Before the step of this update. What was chosen, if something was.

        ``seconds``: how long the earliest step took of which that is not known yet, from its first gradient to the next step's, as
        all workers measured it on average. It may come some steps later. ``None``: there is none.
        """
        choice = None
        if seconds is not None:
            way, counts = self._untold.popleft()
            if counts:
                self._timed.setdefault(way, []).append(seconds)
            elif self.settled:
                self._watch(seconds)
        if not self._sparse and update >= self._schedule:
            # Rounds are sparse from here on, which nobody has timed yet.
            self._sparse = True
            self._known.pop(Way.SHARDS, None)
            self._time(Way.SHARDS, _LONG)
        if self._timed and not self._plan and not any(counts for _, counts in self._untold):
            choice = self._weigh()
        if self._plan:
            self.way, counts = self._plan.popleft()
            self._untold.append((self.way, counts))
        else:
            if self._timed and self.choice is not None:
                # What was timed last is told later; until then nothing speaks against what was chosen before.
                self.way = self.choice.way
            self._untold.append((self.way, False))
        return choice

    def _time(self, way: Way, steps: int) -> None:
        self._plan.extend([(way, False)] * _SETTLE + [(way, True)] * steps)

    def _weigh(self) -> Choice | None:
        """What was to be timed has been: which way is faster, or what to time next."""
        self._known |= {way: _typical(seconds) for way, seconds in self._timed.items()}
        self._timed = {}
        if not self._sparse:
            self.way = min(self._known, key=self._known.__getitem__)
            return None
        if Way.SHARDS not in self._known:
            self._time(Way.SHARDS, _LONG)
            return None
        slower, faster = max(self._known.values()), min(self._known.values())
        if not self._doubted and slower < _CLEAR * faster:
            # In turns, so that what changes meanwhile changes both.
            self._doubted = True
            for way in (Way.GROUP, Way.SHARDS, Way.GROUP, Way.SHARDS):
                self._time(way, _LONG)
            return None
        return self._settle()

    def _settle(self) -> Choice:
        self._doubted = False
        self.way = min(Way, key=self._known.__getitem__)
        mine, others = self._known[self.way], self._known[self.way.other]
        reason = f"{self.way.value}: {mine:.3g} s a step, where {self.way.other.value} takes {others:.3g} s"
        same = self.choice is not None and self.choice.way is self.way
        # Whoever looks often and finds nothing should look less often.
        self._patience = min(2 * self._patience, _MOST) if same else _PATIENCE
        self._calm = min(max(_CALM, 2 * self._calm), _MOST) if same and self._followed else 0
        looking = (_SETTLE + _LONG) * max(0.0, others - mine)
        self._look_after = max(self._patience, round(looking / mine / _CURIOSITY))
        self._since, self._followed = 0, False
        self._recent.clear()
        self.choice = Choice(self.way, reason)
        return self.choice

    def _watch(self, seconds: float) -> None:
        """A step of the way that was chosen took so long."""
        self._since += 1
        # The first ones began before it was chosen.
        if self._since > _SETTLE + 1:
            self._recent.append(seconds)
        if len(self._recent) < _WINDOW:
            return
        now = _typical(list(self._recent))
        if abs(now / self._known[self.way] - 1.0) > _CHANGED and self._since >= self._calm:
            # The link, or the model: what is known of the other way is of no use either.
            self._followed = True
            self._known = {self.way: now}
            self._time(self.way.other, _LOOK)
            self._time(self.way, _LOOK)
        elif self._since >= self._look_after:
            self._known[self.way] = now
            self._time(self.way.other, _LONG)
