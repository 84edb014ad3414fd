"""Settings: the environment, or files of the same names in `$CREDENTIALS_DIRECTORY`, typed and checked."""

import os
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from click import ClickException
from pydantic import Field, SecretStr, ValidationError, field_validator
from pydantic_settings import BaseSettings, SettingsConfigDict, SettingsError

from app.core import dsn
from app.core.topology import DEFAULT_METRICS_PORT, Topology, load_topology

EX_CONFIG = os.EX_CONFIG
"""Exit status of a process that its configuration keeps from starting (sysexits.h); units don't retry it."""


class ConfigurationError(ClickException):
    """The configuration can't be used; one sentence a line, never a secret.

    Celery's command line and ours both run on click, which prints it and exits with its status.
    """

    exit_code = EX_CONFIG


class SheetSettings(BaseSettings):
    """What the environment says of the sheet; it outranks the files of `$CREDENTIALS_DIRECTORY`."""

    model_config = SettingsConfigDict(frozen=True, extra="ignore", hide_input_in_errors=True)

    skeldir_queue_overrides: dict[str, dict[str, Any]] = {}

    @property
    def topology(self) -> Topology:
        """The sheet with this environment's overrides.

        Raises:
            TopologyError: the sheet or an override can't be used.
        """
        return load_topology(overrides=self.skeldir_queue_overrides)


class Settings(SheetSettings):
    """All that the environment says."""

    database_url: SecretStr
    celery_broker_url: SecretStr | None = None
    celery_result_backend: SecretStr | None = None
    celery_metrics_port: int = Field(default=DEFAULT_METRICS_PORT, ge=1, le=65535)
    celery_metrics_addr: str = "127.0.0.1"
    skeldir_drained: Path | None = None
    skeldir_connection_budget: int | None = Field(default=None, ge=1)

    @field_validator("database_url")
    @classmethod
    def _is_postgres(cls, url: SecretStr) -> SecretStr:
        return SecretStr(dsn.plain_dsn(url.get_secret_value()))

    @field_validator("celery_broker_url", "celery_result_backend")
    @classmethod
    def _usable_if_postgres(cls, url: SecretStr | None) -> SecretStr | None:
        if url and dsn.is_postgres(url.get_secret_value()):
            dsn.plain_dsn(url.get_secret_value())
        return url

    @property
    def broker_url(self) -> str:
        """`sqla+postgresql://…`, or the broker that `CELERY_BROKER_URL` names."""
        given = self.celery_broker_url or self.database_url
        url = given.get_secret_value()
        return dsn.broker_url(url) if dsn.is_postgres(url) else url

    @property
    def result_backend_url(self) -> str:
        """`db+postgresql://…`, or the store that `CELERY_RESULT_BACKEND` names."""
        given = self.celery_result_backend or self.database_url
        url = given.get_secret_value()
        return dsn.result_backend_url(url) if dsn.is_postgres(url) else url

    @property
    def drained(self) -> str:
        """Why an operator wants no work done here, from the file SKELDIR_DRAINED; empty without that file.

        Raises:
            OSError: the file is there and can't be read.
        """
        try:
            reason = self.skeldir_drained.read_text().strip() if self.skeldir_drained else ""
        except FileNotFoundError:
            return ""
        return reason or ("no reason was given" if self.skeldir_drained else "")


_Settings = TypeVar("_Settings", bound=SheetSettings)


@cache
def get_settings() -> Settings:
    """The settings of this process, read once.

    Raises:
        ConfigurationError: something is missing or unusable.
    """
    return _read(Settings)


def get_sheet_settings() -> SheetSettings:
    """Those of the sheet alone, which need no database.

    Raises:
        ConfigurationError: they can't be used.
    """
    return _read(SheetSettings)


def _read(kind: type[_Settings]) -> _Settings:
    directory = os.environ.get("CREDENTIALS_DIRECTORY")
    credentials = directory if directory and Path(directory).is_dir() else None
    try:
        return kind(_secrets_dir=credentials)
    except ValidationError as error:
        sentences = [
            _sentence(".".join(str(part) for part in problem["loc"]), problem)
            for problem in error.errors(include_input=False)
        ]
    except SettingsError:
        sentences = ['SKELDIR_QUEUE_OVERRIDES is not valid JSON; write it like {"llm": {"concurrency": 4}}.']
    # Raised outside the handlers: the original errors can hold a DSN, and must not be chained to this one.
    raise ConfigurationError("\n".join(sentences))


def _sentence(field: str, problem: Any) -> str:
    name = field.partition(".")[0].upper()
    if problem["type"] == "missing":
        return (
            f"{name} is not set: put it in the environment, such as "
            f"{name}=postgresql://user:password@host:5432/database, "
            f"or into the file {name.lower()} of $CREDENTIALS_DIRECTORY."
        )
    reason = (
        str(problem["ctx"]["error"]) if problem["type"] == "value_error" else f"is refused: {problem['msg']}"
    )
    return f"{name} {reason}."
