"""What a machine costs, and the guard that stands before everything that is billed."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from gorgon.cloud.aws import Aws
from gorgon.cloud.job import Resources
from gorgon.errors import BudgetError, CloudError
from gorgon.progress import say

USES = {"training": ("Train", "Training"), "endpoint": ("Host", "Hosting")}
"""Our word for what a machine does: the price list's in `usagetype` and in `component`."""


@dataclass(frozen=True)
class Price:
    """USD per hour of a machine, or None when nobody could say; `source` says who did."""

    instance_type: str
    per_hour: float | None
    source: str

    def shown(self) -> str:
        """In words."""
        return "price unknown" if self.per_hour is None else f"{self.per_hour:.3f} USD/h ({self.source})"


def price_of(
    instance_type: str, use: str, given: Mapping[str, float], *, aws: Aws | None = None, region: str | None = None
) -> Price:
    """The price of a machine: AWS's own list when it can be reached, else the user's figure, else unknown.

    Args: use: "training" or "endpoint"; given: USD per hour by instance type, from the recipe or `--price-per-hour`.
    """
    if aws is not None:
        try:
            listed = _listed(aws, instance_type, use, region or aws.region)
        except CloudError:  # no permission, no network: the price list is a help, not a condition
            listed = None
        if listed is not None:
            return Price(instance_type, listed, "AWS price list")
    if instance_type in given:
        return Price(instance_type, given[instance_type], "given")
    return Price(instance_type, None, "unknown")


def price_query(instance_type: str, region: str) -> dict[str, Any]:
    """Parameters of GetProducts."""
    filters = [
        {"Type": "TERM_MATCH", "Field": "regionCode", "Value": region},
        {"Type": "TERM_MATCH", "Field": "instanceName", "Value": instance_type},
    ]
    return {"ServiceCode": "AmazonSageMaker", "Filters": filters}


def _listed(aws: Aws, instance_type: str, use: str, region: str) -> float | None:
    """On-demand USD per hour from the Price List API."""
    usage, component = USES[use]
    for text in aws.call("pricing", "get_products", **price_query(instance_type, region))["PriceList"]:
        product = json.loads(text)
        attributes = product["product"]["attributes"]
        if not (
            re.search(rf"(^|-){usage}:", attributes.get("usagetype", "")) or attributes.get("component") == component
        ):
            continue
        for term in product["terms"].get("OnDemand", {}).values():
            for dimension in term["priceDimensions"].values():
                if dimension.get("unit", "").lower() in ("hrs", "hours"):
                    return float(dimension["pricePerUnit"]["USD"])
    return None


@dataclass(frozen=True)
class Cost:
    """The most that one job or endpoint can cost: `hours` None has no end by itself."""

    what: str
    price: Price
    machines: int
    hours: float | None
    stop: str

    @property
    def total(self) -> float | None:
        """USD, or None when price or time are unknown."""
        return None if self.price.per_hour is None or self.hours is None else (
            self.price.per_hour * self.machines * self.hours
        )  # fmt: skip

    def line(self) -> str:
        """What is shown before it starts."""
        total = self.total
        most = "until it is deleted" if self.hours is None else f"at most {self.hours:.1f} h"
        most += "" if total is None else f", {total:.2f} USD"
        return (
            f"{self.what}: {self.machines} x {self.price.instance_type}, {self.price.shown()}, {most}\n"
            f"  ends with: {self.stop}"
        )


def job_cost(name: str, resources: Resources, price: Price) -> Cost:
    """The most that a job can cost: it is stopped at its time limit; a warm machine is billed after it too."""
    seconds = resources.max_runtime_s + resources.keep_alive_s
    return Cost(name, price, resources.instance_count, seconds / 3600, f"gorgon jobs stop {name}")


def guard(costs: Sequence[Cost], budget_usd: float | None) -> float | None:
    """Says what is about to be billed and how to end it; returns the total in USD, None when it is not known.

    Raises: BudgetError when the most it can cost exceeds the budget, or when there is a budget and no price.
    """
    for cost in costs:
        say(cost.line())
    totals = [cost.total for cost in costs]
    total = None if any(t is None for t in totals) else sum(t for t in totals if t is not None)
    say(f"at most in all: {'unknown' if total is None else f'{total:.2f} USD'}")
    unknown = sorted({cost.price.instance_type for cost in costs if cost.price.per_hour is None})
    if unknown:
        say(f"  sagemaker.price_per_hour, or --price-per-hour, takes the price in USD of {', '.join(unknown)}")
    if budget_usd is None:
        return total
    if total is None:
        endless = [c.what for c in costs if c.hours is None]
        raise BudgetError(
            "there is a budget, and what this may cost is not known", field="sagemaker.budget_usd", value=budget_usd,
            hint=f"give sagemaker.price_per_hour for {', '.join(unknown)}" if unknown
            else f"give endpoint.delete_after_minutes for {', '.join(endless)}",
        )  # fmt: skip
    if total > budget_usd:
        raise BudgetError(
            f"this may cost up to {total:.2f} USD", field="sagemaker.budget_usd", value=budget_usd,
            hint="lower sagemaker.max_runtime_s, take a smaller machine, or raise the budget",
        )  # fmt: skip
    return total
