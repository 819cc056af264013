"""A model behind an OpenAI-compatible endpoint, and how patiently it is asked."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from megatron_sr1.config.rules import ConfigError, Range, check_numbers, require

_DAY = 86_400  # seconds
JUDGE_NUMBERS = {
    "concurrency": Range(1, 10**5),
    "timeout": Range(0, _DAY, above=True),
    "retries": Range(0, 10**4),
    "backoff": Range(0, _DAY, above=True),
    "max_wait": Range(0, _DAY),
}


@dataclass(frozen=True)
class Endpoint:
    """See `JudgeConfig` for what is not said here."""

    section: str  # how its keys begin: "rewards.judge."
    url: str
    model: str
    api_key_env: str
    parameters: Mapping[str, Any]
    concurrency: int
    timeout: float
    retries: int
    backoff: float
    max_wait: float

    def check(self) -> None:
        """
        Raises:
            ConfigError: no URL of an endpoint, no model, or parameters that JSON cannot say.
        """
        try:
            json.dumps(dict(self.parameters), allow_nan=False)
        except (ValueError, TypeError) as error:
            raise ConfigError(
                f"{self.section}parameters={self.parameters!r} is not allowed: it must be what JSON can say "
                f"({error}). Leave what is infinite or no number out."
            ) from error
        parts = urlsplit(self.url)
        require(
            parts.scheme in ("http", "https") and bool(parts.hostname) and not (parts.username or parts.query),
            f"{self.section}url",
            f"{parts.scheme}://{parts.hostname}",
            "the http or https base URL of an endpoint, without a user name, password or query",
            f"For example http://127.0.0.1:8000/v1; the key is in the variable that {self.section}api_key_env names.",
        )
        require(
            bool(self.model),
            f"{self.section}model",
            self.model,
            f"the name of a model where {self.section}url is set",
            "The endpoint lists those it has under /models.",
        )


@dataclass(frozen=True)
class JudgeConfig:
    """A model behind any OpenAI-compatible endpoint that rewards ask."""

    url: str = ""  # for example http://127.0.0.1:8000/v1; empty: no reward may ask
    model: str = ""  # the name that the endpoint knows it by
    api_key_env: str = ""  # NAME of the environment variable that holds the key; empty: the endpoint needs none
    # of each request, by the endpoint's own names; null leaves one out
    parameters: dict[str, Any] = field(default_factory=lambda: {"temperature": 0.0, "max_tokens": 2048})
    concurrency: int = 16  # requests of a rank at once
    timeout: float = 120.0  # seconds of one request, to the last byte of its answer
    retries: int = 6  # of one question, after a failure that may pass
    backoff: float = 1.0  # seconds before the first retry, about; doubled before each further one
    max_wait: float = 120.0  # seconds before a retry, at most, also where the endpoint asks for more

    def __post_init__(self) -> None:
        check_numbers("rewards.judge", self, JUDGE_NUMBERS)
        if self.url:
            self.endpoint.check()

    @property
    def endpoint(self) -> Endpoint:
        """With the names of these keys."""
        how = (self.concurrency, self.timeout, self.retries, self.backoff, self.max_wait)
        return Endpoint("rewards.judge.", self.url, self.model, self.api_key_env, self.parameters, *how)
