"""Settings come from the environment or from credential files, and what is wrong is said without secrets."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from pydantic import ValidationError

from app.core.config import ConfigurationError, Settings, get_settings

DSN = "postgresql://u:geheim@h/d"


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in Settings.model_fields:
        monkeypatch.delenv(name.upper(), raising=False)
    monkeypatch.delenv("CREDENTIALS_DIRECTORY", raising=False)
    get_settings.cache_clear()
    yield
    get_settings.cache_clear()


def test_broker_and_results_are_derived(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DATABASE_URL", "postgresql+asyncpg://u:pw@h/d")
    assert get_settings().broker_url == "sqla+postgresql://u:pw@h/d"
    assert get_settings().result_backend_url == "db+postgresql://u:pw@h/d"


def test_broker_and_results_may_be_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DATABASE_URL", DSN)
    monkeypatch.setenv("CELERY_BROKER_URL", "amqp://guest@rabbit//")
    monkeypatch.setenv("CELERY_RESULT_BACKEND", "db+postgresql+asyncpg://u:pw@other/d?channel_binding=prefer")
    assert get_settings().broker_url == "amqp://guest@rabbit//"
    assert get_settings().result_backend_url == "db+postgresql://u:pw@other/d"


def test_a_credential_file_serves_and_the_environment_outranks_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "database_url").write_text("postgresql://file/d\n")
    (tmp_path / "skeldir_queue_overrides").write_text('{"llm": {"concurrency": 7}}')
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(tmp_path))
    assert get_settings().database_url.get_secret_value() == "postgresql://file/d"
    assert get_settings().topology.queues["llm"].concurrency == 7
    get_settings.cache_clear()
    monkeypatch.setenv("DATABASE_URL", "postgresql://environment/d")
    assert get_settings().database_url.get_secret_value() == "postgresql://environment/d"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("DATABASE_URL", None),
        ("DATABASE_URL", "mysql://u:geheim@h/d"),
        ("CELERY_BROKER_URL", "sqla+postgresql://u:geheim@h:port/d"),
        ("CELERY_METRICS_PORT", "geheim"),
        ("CELERY_METRICS_PORT", "70000"),
        ("SKELDIR_QUEUE_OVERRIDES", "geheim"),
        ("SKELDIR_QUEUE_OVERRIDES", '["geheim"]'),
    ],
)
def test_what_is_unusable_is_named_without_its_value(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str | None
) -> None:
    monkeypatch.setenv("DATABASE_URL", DSN)
    if value is None:
        monkeypatch.delenv(name)
    else:
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigurationError) as refused:
        get_settings()
    assert refused.value.exit_code == 78
    assert name in refused.value.message
    assert "geheim" not in refused.value.message
    assert "\n" not in refused.value.message
    assert refused.value.__context__ is None


def test_settings_that_are_made_directly_repeat_no_value_either(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DATABASE_URL", "mysql://u:geheim@h/d")
    with pytest.raises(ValidationError) as refused:
        Settings()
    assert "geheim" not in str(refused.value)


def test_settings_show_no_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DATABASE_URL", DSN)
    assert "geheim" not in repr(get_settings())
