"""When the planner lets the residual stream wait in RAM: where it fits more, and not where slicing or nothing at all does."""

from __future__ import annotations

from dataclasses import replace

import pytest

from planner_card import Card, plan
from wanvram.config import Request, RunConfig
from wanvram.knobs import smaller_values
from wanvram.planner import Budget, Options, Refusal, StageForecast, search
from wanvram.planner.forecasts import situation
from wanvram.units import GIB

LARGE = Request.for_task("t2v-14B", size="1280*720")


def where(request: Request, gibibytes: float, card: Card | None = None, ram: float | None = None) -> str:
    budget = Budget(int(gibibytes * GIB), ram_bytes=None if ram is None else int(ram * GIB))
    return plan(request, budget, Options(offers=False), card or Card()).strategy.residual_in


def test_a_small_budget_takes_the_stream_off_the_device_and_a_larger_one_does_not() -> None:
    assert [where(LARGE, gibibytes) for gibibytes in (4.0, 4.5, 9.0, 40.0)] == ["pinned", "pinned", "device", "device"]


def test_where_slicing_fits_too_the_faster_one_is_taken() -> None:
    class SlowSlicing(Card):
        def __call__(self, config: RunConfig, component: str) -> StageForecast:
            found = super().__call__(config, component)
            if component != "dit" or not config.strategy.attention_slicing:
                return found
            assert found.seconds_per_step is not None
            return replace(found, seconds_per_step=1.2 * found.seconds_per_step)

    assert where(LARGE, 6.5, SlowSlicing()) == "pinned"
    assert where(LARGE, 6.5, SlowSlicing(copy_rate=5e9)) == "device", (
        "over a slow link the stream costs more than slicing"
    )


@pytest.mark.parametrize(
    "request_",
    [Request.for_task("vace-14B", size="1280*720"), Request.for_task("t2v-14B", size="1280*720", frame_num=17)],
)
def test_a_second_stream_and_a_short_one_stay_on_the_device(request_: Request) -> None:
    card = Card()
    search(request_, Budget(3 * GIB), Options(), card)
    assert {strategy.residual_in for _, strategy, request in card.calls if request == request_} == {"device"}


def test_advice_tries_it_where_there_is_one_stream_and_nothing_refuses_it() -> None:
    def tried(request: Request, **strategy: object) -> bool:
        from wanvram.config import Strategy

        changes = smaller_values(Strategy(**strategy), situation(request))  # type: ignore[arg-type]
        return ("residual_in", "pinned") in [(knob.name, value) for knob, value in changes]

    assert tried(LARGE)
    assert not tried(Request.for_task("vace-14B"))
    assert not tried(LARGE, attention_slicing=True)
    assert not tried(LARGE, residual_in="pinned")


def test_where_ram_does_not_hold_the_stream_slicing_in_few_rows_is_planned() -> None:
    """14B from disk in 6 GiB of device memory: 1.4 GiB of stream and 1.3 of buffers beside the process and the system."""
    assert where(LARGE, 5.6, ram=9.0) == "device"
    assert where(LARGE, 5.6, ram=12.0) == "pinned"
    assert isinstance(search(LARGE, Budget(int(4.5 * GIB), ram_bytes=9 * GIB), Options(), Card()), Refusal)
