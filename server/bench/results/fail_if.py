"""Rules of `--fail-if`: which change between two runs fails a check in CI."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from server.bench.results.statistics import QUANTILES
from server.config.base import ConfigError

_read = re.compile(r"\s*(?P<figure>\S+?)\s*(?P<sign>[<>])\s*(?P<factor>\d+\.?\d*)\s*x\s*").fullmatch
_short = re.compile(r"\.(ttft|tpot|itl|e2e|ttft_due|e2e_due)\.")
_RIGHT = "'memory.ttft_s.p99 > 1.1x' or 'whole.requests_per_s < 0.9x'"


@dataclass(frozen=True, slots=True)
class Rule:
    """A figure of B that is more, or less, than so many times that of A.

    Attributes:
        text: as it was given. figure: such as `memory.ttft_s.p99`.
    """

    text: str
    figure: str
    is_more: bool
    factor: float

    def judge(self, figures: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
        """Return whether the rule holds, and a sentence.

        Where a ratio has an interval, all of it has to be beyond the factor: chance alone fails
        a rule that allows no change in one of 40 comparisons, and one with a margin less often.
        A change that the interval leaves open doesn't fail it; the sentence says so.

        Raises:
            ConfigError: A or B has no such figure.
        """
        found = figures.get(self.figure)
        if found is None:
            have = sorted({name.partition(".")[0] for name in figures})
            message = f"both runs should have {self.figure}; they have figures of {', '.join(have)}"
            raise ConfigError([f"--fail-if: {message}, with statistics {_STATISTICS}"])
        is_beyond = self._is_beyond(found["b"], found["a"] * self.factor)
        near = found["low"] if self.is_more else found["high"]
        holds = is_beyond and (near is None or self._is_beyond(near, self.factor))
        ratio = "from 0" if found["ratio"] is None else f"{found['ratio']:.3g}x"
        if near is not None:
            ratio += f" ({found['low']:.3g}x to {found['high']:.3g}x)"
        text = f"{self.figure} is {ratio}: {self.text.strip()} "
        if holds:
            text += "holds"
        elif is_beyond:
            text += "may hold, but chance explains it too; more requests would tell"
        else:
            text += "doesn't hold"
        return {"rule": self.text, "holds": holds, "text": text}

    def _is_beyond(self, value: float, limit: float) -> bool:
        return value > limit if self.is_more else value < limit


_STATISTICS = ", ".join(("mean", *QUANTILES))


def parse(text: str) -> Rule:
    """Return the rule that a text means; `ttft` and `ttft_s` are the same.

    Raises:
        ConfigError: the text isn't a rule.
    """
    found = _read(text)
    if found is None or float(found["factor"]) == 0:
        raise ConfigError([f"--fail-if: should be such as {_RIGHT}; {text!r} can't be read"])
    figure = _short.sub(r".\1_s.", found["figure"])
    return Rule(text, figure, found["sign"] == ">", float(found["factor"]))
