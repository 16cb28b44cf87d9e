"""Alerts to an MQTT 5 broker, with its acknowledgement (OASIS MQTT 5.0, QoS 1)."""

from __future__ import annotations

import ssl
from dataclasses import dataclass, field
from threading import Event
from typing import Any

from edge_rsvlm.errors import DeliveryError, UsageError
from edge_rsvlm.sinks.features import alert_feature
from edge_rsvlm.sinks.records import dumps
from edge_rsvlm.types import Alert

REFUSED = frozenset({0x87, 0x90, 0x95, 0x99})
"""PUBACK reasons that no later try changes: not authorised, topic name invalid, packet too large, payload invalid."""


@dataclass
class Mqtt:
    """Publishes the GeoJSON feature to ``topic`` and returns when the broker has acknowledged it.

    The alert's id is the correlation data and the user property ``alert``. After any failure the next alert begins with
    a new connection and a clean session: what was not acknowledged is still in the outbox.
    """

    host: str
    topic: str
    port: int | None = None
    tls: bool = False
    username: str | None = None
    password: str | None = None
    timeout_s: float = 30
    _client: Any = field(default=None, repr=False)
    _reasons: dict[int, Any] = field(default_factory=dict, repr=False)
    """PUBACK reasons by message."""
    _settled: Event = field(default_factory=Event, repr=False)
    """An acknowledgement came, or the connection went."""

    def __post_init__(self) -> None:
        _library()

    def send(self, alert: Alert) -> None:
        try:
            client = self._client
            if client is None or not client.is_connected():
                self.close()
                client = self._connected()
            reason = self._published(client, alert)
        except (OSError, ValueError, RuntimeError) as exc:
            self.close()
            raise DeliveryError(
                f"the broker {self.host} cannot be reached ({exc})", fix="check the link, host and port", retry=True
            ) from exc
        except DeliveryError:
            self.close()
            raise
        if reason.is_failure:
            raise DeliveryError(
                f"the broker {self.host} refused the alert ({reason})",
                fix="correct the topic or the rights on it",
                retry=reason.value not in REFUSED,
            )

    def close(self) -> None:
        """End the connection; the next alert opens another."""
        client, self._client = self._client, None
        if client is not None:
            client.disconnect()
            client.loop_stop()

    def _connected(self) -> Any:
        """A client of a clean session, after its CONNACK."""
        mqtt = _library()
        client = mqtt.Client(mqtt.CallbackAPIVersion.VERSION2, protocol=mqtt.MQTTv5, reconnect_on_failure=False)
        if self.username is not None:
            client.username_pw_set(self.username, self.password)
        if self.tls:
            client.tls_set_context(ssl.create_default_context())
        answered, answers = Event(), []

        def connected(_client: Any, _data: Any, _flags: Any, reason: Any, _properties: Any) -> None:
            answers.append(reason)
            answered.set()

        client.on_connect = connected
        client.on_publish = self._acknowledged
        client.on_disconnect = lambda *_: self._settled.set()
        client.connect_timeout = self.timeout_s
        self._client = client
        client.connect(self.host, self.port or (8883 if self.tls else 1883), clean_start=True)
        client.loop_start()
        if not answered.wait(self.timeout_s):
            raise TimeoutError("no answer")
        if answers[0].is_failure:
            raise ConnectionRefusedError(str(answers[0]))
        return client

    def _acknowledged(self, _client: Any, _data: Any, mid: int, reason: Any, _properties: Any) -> None:
        self._reasons[mid] = reason
        self._settled.set()

    def _published(self, client: Any, alert: Alert) -> Any:
        """The reason in the broker's acknowledgement; TimeoutError without one."""
        from paho.mqtt.packettypes import PacketTypes
        from paho.mqtt.properties import Properties

        properties = Properties(PacketTypes.PUBLISH)
        properties.CorrelationData = alert.id.encode()
        properties.UserProperty = ("alert", alert.id)
        properties.ContentType = "application/geo+json"
        self._reasons.clear()
        self._settled.clear()
        message = client.publish(self.topic, dumps(alert_feature(alert)).encode(), qos=1, properties=properties)
        if message.rc:
            raise ConnectionError("the connection is gone")
        self._settled.wait(self.timeout_s)
        if message.mid not in self._reasons:
            raise TimeoutError("it did not acknowledge the alert")
        return self._reasons[message.mid]


def _library() -> Any:
    try:
        from paho.mqtt import client
    except ModuleNotFoundError as exc:
        raise UsageError("MQTT needs paho-mqtt", fix="pip install 'edge-rsvlm[field]'") from exc
    return client
