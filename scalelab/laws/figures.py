"""`fit.plot`: figures of a fit and of its studies. matplotlib is imported on the first call."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from scalelab.laws.calibrate import Calibration
    from scalelab.laws.fit import Fit
    from scalelab.laws.table import Table


class Plot:
    """Each method draws into `ax` (or a new figure) and returns it. Studies that need refits run here."""

    def __init__(self, fit: Fit):
        self._fit = fit

    def surface(self, ax: Any = None) -> Any:
        """Loss over N and D with the compute-optimal frontier."""
        from scalelab import plots

        return plots.surface(self._fit, None, ax)

    def residuals(self, ax: Any = None) -> Any:
        """Measured against fitted loss."""
        from scalelab import plots

        return plots.measured(self._fit, ax)

    def frontier(self, flops: Sequence[float], ax: Any = None) -> Any:
        """N* and D* against C (FLOPs, lowest and highest), with bands; two axes."""
        from scalelab import plots

        return plots.allocation({self._fit.law.name: self._fit}, flops, ax)

    def holdout(self, ax: Any = None) -> Any:
        """The held-out runs, predicted and measured."""
        from scalelab import plots

        return plots.holdout(self._fit, ax)

    def prediction(self, table: Table | None = None, x: str | None = None, ax: Any = None) -> Any:
        """The curve's interval and a new run's: along the compute-optimal line, an input, or a table of inputs."""
        from scalelab import study_plots

        return study_plots.prediction(self._fit, table, x, ax)

    def profile(self, name: str, level: float = 0.95, ax: Any = None) -> Any:
        """The profile of a parameter with its interval, and the bootstrap's."""
        from scalelab import study_plots

        return study_plots.profile(self._fit.profile(name, level), self._fit, ax)

    def plane(self, first: str, second: str, level: float = 0.95, ax: Any = None) -> Any:
        """The joint region of two parameters, over the bootstrap's draws."""
        from scalelab import study_plots

        return study_plots.plane(self._fit.plane(first, second, level), self._fit, ax)

    def sensitivity(self, C: float | None = None, ax: Any = None) -> Any:
        """D/N* (or the target) under other objectives, rows dropped and kinds of N."""
        from scalelab import study_plots

        return study_plots.sensitivity(self._fit, C, ax)

    def trim_drift(self, ax: Any = None) -> Any:
        """The parameters as more of the highest losses are dropped."""
        from scalelab import study_plots

        return study_plots.trim_drift(self._fit, ax)

    def expanding(self, ax: Any = None) -> Any:
        """Error against distance in decades, over an expanding window, beside baselines."""
        from scalelab import study_plots

        return study_plots.expanding({self._fit.law.name: self._fit}, ax)

    def leave_group_out(self, group: str, ax: Any = None) -> Any:
        """Error on each group (a role, or "budget") predicted by a fit to the others, beside baselines."""
        from scalelab import study_plots

        return study_plots.leave_group_out(self._fit, group, ax)

    def beside_isoflop(self, ax: Any = None) -> Any:
        """N* of the law and of IsoFLOP parabolas at each budget."""
        from scalelab import study_plots

        return study_plots.beside_isoflop(self._fit, ax)

    def coverage(self, calibration: Calibration | None = None, ax: Any = None) -> Any:
        """How often intervals hold the truth on this design; without a `calibration`, `fit.calibrate()` is run."""
        from scalelab import study_plots

        return study_plots.coverage(self._fit.calibrate() if calibration is None else calibration, ax)
