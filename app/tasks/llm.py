"""Jobs for a language model. There is none behind them yet: they check their payload and say so."""

from typing import Annotated, Any
from uuid import UUID

from celery import shared_task
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from app.tasks.context import tenant_task

_Text = Annotated[str, Field(min_length=1, max_length=20_000)]


class InvalidPayload(ValueError):  # noqa: N818 - it is the name of what is wrong
    """A payload that its task can't use; the message names fields, never their values."""


class _Payload(BaseModel):
    model_config = ConfigDict(extra="forbid")


class RoutePayload(_Payload):
    """A prompt that is to be sent to the model fit for it."""

    prompt: _Text


class ExplanationPayload(_Payload):
    """A number of a report that is to be explained."""

    metric: _Text
    value: float


class InvestigationPayload(_Payload):
    """A question about the tenant's data."""

    question: _Text


class BudgetOptimizationPayload(_Payload):
    """A budget that is to be divided among channels."""

    budget: Annotated[float, Field(gt=0, allow_inf_nan=False)]
    channels: Annotated[list[_Text], Field(min_length=1)]


def _answer(model: type[_Payload], payload: dict[str, Any]) -> dict[str, str]:
    try:
        model.model_validate(payload)
    except ValidationError as error:
        problems = [
            f"{'.'.join(str(part) for part in problem['loc']) or 'payload'}: {problem['msg']}"
            for problem in error.errors(include_input=False)
        ]
    else:
        return {
            "status": "no_model",
            "detail": "The payload is valid, but there is no model behind this task.",
        }
    # Outside the handler: pydantic's error holds the payload, and must not be chained to ours.
    raise InvalidPayload("; ".join(problems))


@shared_task
@tenant_task
def route(payload: dict[str, Any], tenant_id: UUID) -> dict[str, str]:
    """Check a `RoutePayload`."""
    return _answer(RoutePayload, payload)


@shared_task
@tenant_task
def explanation(payload: dict[str, Any], tenant_id: UUID) -> dict[str, str]:
    """Check an `ExplanationPayload`."""
    return _answer(ExplanationPayload, payload)


@shared_task
@tenant_task
def investigation(payload: dict[str, Any], tenant_id: UUID) -> dict[str, str]:
    """Check an `InvestigationPayload`."""
    return _answer(InvestigationPayload, payload)


@shared_task
@tenant_task
def budget_optimization(payload: dict[str, Any], tenant_id: UUID) -> dict[str, str]:
    """Check a `BudgetOptimizationPayload`."""
    return _answer(BudgetOptimizationPayload, payload)
