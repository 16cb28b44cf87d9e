"""Alerts to a web service: each is one POST."""

from __future__ import annotations

from types import ModuleType

from edge_rsvlm.errors import DeliveryError, UsageError
from edge_rsvlm.sinks.features import alert_feature
from edge_rsvlm.sinks.records import dumps
from edge_rsvlm.types import Alert

MAY_PASS = frozenset({401, 403, 408, 425, 429})
"""Of the answers that blame the request, those that a later try may not get: with another token, or at another time."""


class Poster:
    """POSTs to one address over connections that are kept open.

    2xx: taken. Other answers that blame the request, but for 408, 425 and 429: refused for good. The rest is tried
    again. A repeat has the same Idempotency-Key (draft-ietf-httpapi-idempotency-key-header).
    """

    def __init__(self, url: str, *, token: str | None, timeout_s: float, media_type: str) -> None:
        self._httpx, self._url = _library(), url
        try:
            self._httpx.URL(url)
        except self._httpx.InvalidURL as exc:
            raise UsageError(
                f"'{url}' is no address ({exc})", fix="write it like https://ops.example.org/alerts"
            ) from exc
        headers = {"Content-Type": media_type, **({"Authorization": f"Bearer {token}"} if token else {})}
        self._client = self._httpx.Client(headers=headers, timeout=timeout_s)

    def post(self, key: str, body: bytes) -> None:
        try:
            answer = self._client.post(self._url, content=body, headers={"Idempotency-Key": key})
        except self._httpx.HTTPError as exc:
            raise DeliveryError(
                f"{self._url} cannot be reached ({exc or type(exc).__name__})",
                fix="check the link and the url",
                retry=True,
            ) from exc
        if answer.is_success:
            return
        code = answer.status_code
        retry = not 400 <= code < 500 or code in MAY_PASS
        raise DeliveryError(
            f"{self._url} answered {code} {answer.reason_phrase}",
            fix="see the token and the receiver's log" if retry else "correct the url or the receiver",
            retry=retry,
        )


class Webhook:
    """The alert as a GeoJSON feature (application/geo+json)."""

    def __init__(self, url: str, *, token: str | None = None, timeout_s: float = 30) -> None:
        self._poster = Poster(url, token=token, timeout_s=timeout_s, media_type="application/geo+json")

    def send(self, alert: Alert) -> None:
        self._poster.post(alert.id, dumps(alert_feature(alert)).encode())


def _library() -> ModuleType:
    try:
        import httpx
    except ModuleNotFoundError as exc:
        raise UsageError("a webhook needs httpx", fix="pip install 'edge-rsvlm[field]'") from exc
    module: ModuleType = httpx
    return module
