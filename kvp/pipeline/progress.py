"""The lines of a run: which stage of which model, how many of all, and how long the rest will take."""

from __future__ import annotations

import logging

from kvp import bars
from kvp.pipeline.experiment import Experiment
from kvp.pipeline.forecast import Forecast, device_of
from kvp.pipeline.foretell import foretell
from kvp.pipeline.session import Session
from kvp.store import Finished

log = logging.getLogger(__name__)


class Progress:
    """Follows a session from its first stage to its last."""

    def __init__(self, x: Experiment) -> None:
        self._stages, _ = foretell(x)
        self._forecast = Forecast(x.store, device_of(x.device))
        missing = [stage for stage in self._stages if not stage.stands]
        self._forecast.learn(stage.name for stage in missing)
        left = self._forecast.left([stage.work for stage in missing])
        counts = (
            f"{len(self._stages)} stages: {len(self._stages) - len(missing)} stand, {len(missing)} to compute"
        )
        log.info("%s%s", counts, f", {left}" if left else "")

    def follow(self, session: Session) -> None:
        """Print a line after each stage, and name the bars of the stage in progress."""
        watch = session.watch

        def before(place: str) -> None:
            bars.label(self._where(len(session.finished)))
            watch(place)

        def after(done: Finished) -> None:
            number = len(session.finished)
            if not done.found:
                self._forecast.add(self._stages[number].work, done.seconds)
            rest = [stage.work for stage in self._stages[number + 1 :] if not stage.stands]
            left = self._forecast.left(rest)
            how = f"{'found' if done.found else 'computed'} ({done.seconds:.1f} s)"
            log.info("%s  %s%s", self._where(number), how, f", {left}" if left else "")

        session.watch, session.after = before, after

    def _where(self, number: int) -> str:
        """Return a stage, counted from 0, as "[ 7/19] dense · measure"."""
        stage, all_ = self._stages[number], len(self._stages)
        return f"[{number + 1:>{len(str(all_))}}/{all_}] {stage.model} · {stage.name}"
