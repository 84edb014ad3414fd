"""What tasks promise before any database is asked: tenants, payloads, retries."""

from typing import Any
from uuid import UUID, uuid4

import pytest
from celery import Celery
from celery.exceptions import Retry

from app.celery_app import celery_app
from app.core.config import ConfigurationError
from app.core.topology import RetryPolicy
from app.db.session import TenantRequired
from app.observability.context import current_context
from app.tasks import housekeeping, llm, maintenance
from app.tasks.base import PolicyTask, retry_options
from app.tasks.context import tenant_task

TENANT = uuid4()


@tenant_task
def _who(note: str, tenant_id: UUID) -> tuple[str, UUID, UUID | None]:
    return note, tenant_id, current_context().tenant_id


def test_the_tenant_arrives_as_a_uuid_however_it_is_given() -> None:
    expected = ("note", TENANT, TENANT)
    assert _who("note", TENANT) == expected
    assert _who("note", str(TENANT)) == expected  # type: ignore[arg-type]
    assert _who(tenant_id=TENANT.hex, note="note") == expected  # type: ignore[arg-type]


def test_the_tenant_is_forgotten_after_a_direct_call() -> None:
    _who("note", TENANT)
    assert current_context().tenant_id is None


@pytest.mark.parametrize("tenant", [None, "", "acme", 7, "' OR 1=1"])
def test_without_a_tenants_id_nothing_runs(tenant: Any) -> None:
    with pytest.raises(TenantRequired):
        _who("note", tenant)
    with pytest.raises(TenantRequired):
        maintenance.scan_for_pii_contamination(tenant_id=tenant)


def test_without_any_tenant_nothing_runs() -> None:
    with pytest.raises(TenantRequired):
        _who("note")  # type: ignore[call-arg]


def test_a_tenant_task_must_take_a_tenant() -> None:
    with pytest.raises(TypeError, match="tenant_id"):
        tenant_task(lambda: None)


RIGHT: dict[str, dict[str, Any]] = {
    "route": {"prompt": "Who?"},
    "explanation": {"metric": "clicks", "value": 7},
    "investigation": {"question": "Why?"},
    "budget_optimization": {"budget": 100, "channels": ["mail"]},
}


@pytest.mark.parametrize(("name", "payload"), RIGHT.items())
def test_an_llm_task_says_that_there_is_no_model(name: str, payload: dict[str, Any]) -> None:
    assert getattr(llm, name)(payload, str(TENANT))["status"] == "no_model"


@pytest.mark.parametrize(
    ("name", "payload"),
    [
        *((name, {}) for name in RIGHT),
        *((name, None) for name in RIGHT),
        *((name, payload | {"more": "geheim"}) for name, payload in RIGHT.items()),
        ("route", {"prompt": ""}),
        ("budget_optimization", {"budget": -1, "channels": ["geheim"]}),
        ("budget_optimization", {"budget": 1, "channels": []}),
    ],
)
def test_an_llm_task_refuses_a_wrong_payload_without_repeating_it(name: str, payload: Any) -> None:
    with pytest.raises(llm.InvalidPayload) as refused:
        getattr(llm, name)(payload, TENANT)
    assert "geheim" not in str(refused.value)


def test_retention_refuses_to_delete_everything() -> None:
    with pytest.raises(ValueError, match="days"):
        maintenance.enforce_data_retention(TENANT, days=0)


def _countdown(task: Any, retries: int, monkeypatch: pytest.MonkeyPatch) -> float:
    waits: list[float] = []
    monkeypatch.setattr(
        "celery.app.task.Task.retry", lambda self, *args, countdown, **options: waits.append(countdown)
    )
    task.push_request(retries=retries)
    try:
        task.retry()
    finally:
        task.pop_request()
    return waits[0]


def test_the_wait_before_a_retry_doubles_up_to_the_sheets_maximum(monkeypatch: pytest.MonkeyPatch) -> None:
    task = celery_app.tasks["app.tasks.maintenance.refresh_all_materialized_views"]
    assert (task.backoff, task.backoff_max) == (5, 300)
    for retries, wait in [(0, 5), (1, 10), (2, 20), (20, 300)]:
        assert wait / 2 <= _countdown(task, retries, monkeypatch) <= wait


def test_a_retry_is_a_retry(monkeypatch: pytest.MonkeyPatch) -> None:
    published: list[Any] = []
    monkeypatch.setattr("celery.canvas.Signature.apply_async", lambda self, **_: published.append(self))
    task = celery_app.tasks[housekeeping.ping.name]
    delivery = {"exchange": "", "routing_key": "llm"}
    task.push_request(id="1", retries=0, args=[], kwargs={}, delivery_info=delivery, called_directly=False)
    try:
        with pytest.raises(Retry):
            task.retry()
    finally:
        task.pop_request()
    assert published[0].options["queue"] == "llm", "it stays on the queue it came from"


def test_a_transient_error_is_retried_without_a_word_in_the_task(monkeypatch: pytest.MonkeyPatch) -> None:
    published: list[Any] = []
    monkeypatch.setattr("celery.canvas.Signature.apply_async", lambda self, **_: published.append(self))
    app = Celery("policy", task_cls=PolicyTask, set_as_current=False)
    policy = RetryPolicy(
        max_retries=1, backoff=4, backoff_max=4, jitter=0, transient=("builtins.LookupError",)
    )
    app.conf.task_annotations = {"t.some": retry_options(policy)}

    @app.task(name="t.some")
    def some(error: Exception) -> None:
        raise error

    def run(error: Exception, retries: int = 0) -> None:
        some.push_request(id="1", retries=retries, args=[], kwargs={}, called_directly=False)
        try:
            some.run(error)
        finally:
            some.pop_request()

    with pytest.raises(Retry):
        run(KeyError("may pass"))
    assert published[0].options["countdown"] == 4
    with pytest.raises(KeyError):  # its retries are used up
        run(KeyError("may pass"), retries=1)
    with pytest.raises(ValueError, match="permanent"):
        run(ValueError("permanent"))
    assert len(published) == 1


def test_a_policy_that_names_no_exception_is_refused() -> None:
    for name in ("builtins.str", "builtins.Nothing", "nowhere.Error", "builtins.KeyboardInterrupt"):
        with pytest.raises(ConfigurationError, match=name):
            retry_options(RetryPolicy(max_retries=1, backoff=1, backoff_max=1, transient=(name,)))
