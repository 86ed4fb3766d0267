"""Which Strategy fits a memory budget and is the fastest that does: candidates, forecasts, search. No torch."""

from wanvram.planner.budget import Budget
from wanvram.planner.forecasts import Forecast, StageForecast
from wanvram.planner.result import Alternative, Offer, Plan, Refusal, Rejected, Trade
from wanvram.planner.search import Options, search

__all__ = [
    "Alternative",
    "Budget",
    "Forecast",
    "Offer",
    "Options",
    "Plan",
    "Refusal",
    "Rejected",
    "StageForecast",
    "Trade",
    "search",
]
