"""The judge: a model behind an OpenAI-compatible endpoint, asked with patience.

Busy or broken endpoints are asked again, later and later. What remains without an answer stays without a verdict: it is
never taken for a wrong answer.
"""

from __future__ import annotations

import email.utils
import json
import os
import random
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from megatron_sr1.bounded_answers import bounded_client
from megatron_sr1.config import ConfigError, Endpoint

if TYPE_CHECKING:
    from openai import OpenAI

_MAY_PASS = (408, 409, 425, 429)  # and 500 to 599
_REFUSED = (401, 403, 404)  # the key, its rights, the path or the model: no question can be answered
_NO_KEY = "none"  # endpoints that need no key take any


class NoVerdict(Exception):
    """The judge could not be asked, or gave no answer that can be graded; the message says why."""


def judge_key(endpoint: Endpoint) -> str:
    """The key for the endpoint, from the environment.

    Raises:
        ConfigError: the variable that its `api_key_env` names is not set.
    """
    name = endpoint.api_key_env
    if not name:
        return _NO_KEY
    if not os.environ.get(name):
        raise ConfigError(
            f"{endpoint.section}api_key_env={name!r} is not allowed: it must be the name of an environment variable "
            "that holds the key. Export it, or leave the name empty if the endpoint needs no key."
        )
    return os.environ[name]


class Judge:
    """Asks one question at a time from as many threads as one likes."""

    def __init__(self, endpoint: Endpoint, sleep: Callable[[float], None] = time.sleep) -> None:
        """`sleep`: waits that many seconds between two attempts.

        Raises:
            ConfigError: as `judge_key`.
        """
        from openai import OpenAI

        self._endpoint = endpoint
        self._sleep = sleep
        self._parameters = {name: value for name, value in endpoint.parameters.items() if value is not None}
        # attempts are counted here, because the client's own ones do not know of damaged answers and of long waits
        self._client: OpenAI = OpenAI(
            base_url=endpoint.url,
            api_key=judge_key(endpoint),
            timeout=endpoint.timeout,
            max_retries=0,
            http_client=bounded_client(endpoint.timeout),
        )

    def __enter__(self) -> Judge:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends its connections."""
        self._client.close()

    def ask(self, question: str, *, cut: bool = False) -> str:
        r"""The judge's complete response to a text.

        Args:
            cut: one that its limit of tokens has cut is taken as it is.

        Raises:
            NoVerdict: it failed in a way that may pass, `retries` times more; it refused this question; or its
                response is empty or was cut before a \boxed answer.
            ConfigError: it refuses every question, because of the key, the URL or the model.
        """
        reason = ""
        for attempt in range(self._endpoint.retries + 1):
            wait, reason = self._attempt(question, cut)
            if wait is None:
                return reason
            if attempt < self._endpoint.retries:
                self._sleep(self._delay(attempt, wait))
        raise NoVerdict(f"{self._endpoint.retries + 1} attempts failed, the last with: {reason}")

    def _attempt(self, question: str, cut: bool) -> tuple[float | None, str]:
        """(None, response), or (seconds that the endpoint asks to wait, what went wrong)."""
        from openai import APIConnectionError, APIStatusError

        try:
            response = self._client.chat.completions.with_raw_response.create(
                model=self._endpoint.model,
                messages=[{"role": "user", "content": question}],
                extra_body=self._parameters,
            )
            return None, _text(response.http_response.content, cut)
        except APIStatusError as error:
            if error.status_code in _REFUSED:
                raise ConfigError(
                    f"{self._endpoint.section}url={self._endpoint.url!r} answers with HTTP {error.status_code}: check "
                    f"the URL, {self._endpoint.section}model={self._endpoint.model!r} and the key that "
                    f"{self._endpoint.section}api_key_env names."
                ) from None  # the endpoint's own text may hold a part of the key
            if error.status_code // 100 == 3:
                raise ConfigError(
                    f"{self._endpoint.section}url={self._endpoint.url!r} answers with HTTP {error.status_code}, a "
                    "redirection, which is not followed: questions would go elsewhere. Give the URL that it leads to."
                ) from None
            if error.status_code not in _MAY_PASS and error.status_code < 500:
                raise NoVerdict(f"the endpoint refuses this question with HTTP {error.status_code}") from None
            return _retry_after(error.response.headers), f"HTTP {error.status_code}"
        except APIConnectionError as error:  # a timeout is one
            return 0.0, f"{type(error).__name__}: {error.__cause__ or error}"
        except _Damaged as error:
            return 0.0, str(error)

    def _delay(self, attempt: int, asked: float) -> float:
        """Backoff * 2^attempt, give or take a quarter, at least what the endpoint asks for, at most the limit."""
        backoff = self._endpoint.backoff * 2**attempt * random.uniform(0.75, 1.25)
        return min(max(backoff, asked), self._endpoint.max_wait)


class _Damaged(Exception):
    """The endpoint said that all is well, and it is not."""


def _text(body: bytes, cut: bool) -> str:
    """The text of the first choice of a chat completion; the parts that are needed are checked, and no others."""
    try:
        choice = json.loads(body)["choices"][0]
        text, reason = choice["message"]["content"] or "", choice["finish_reason"]
    except (ValueError, KeyError, IndexError, TypeError) as error:
        raise _Damaged(f"the answer is no chat completion ({type(error).__name__}: {error})") from error
    if not isinstance(text, str):
        raise _Damaged("the answer is no chat completion: its content is not text")
    text = text.encode("utf-8", "replace").decode("utf-8")  # JSON can say halves of characters, and no file can
    if reason == "length" and not cut and "\\boxed" not in text:
        raise NoVerdict("the response was cut by its limit of tokens; raise max_tokens in its parameters")
    if not text.strip():
        raise NoVerdict(f"the response is empty (finish_reason {reason!r})")
    return text


def _retry_after(headers: Mapping[str, str]) -> float:
    """Seconds: of Retry-After, a number or a date (RFC 9110, section 10.2.3); 0: none, or a damaged one."""
    value = headers.get("retry-after", "")
    if value.strip().isdecimal():
        return float(value)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    except (TypeError, ValueError, IndexError):
        return 0.0
