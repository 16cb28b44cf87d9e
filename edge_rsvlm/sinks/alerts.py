"""The sink that a table of SINKS.toml describes."""

from __future__ import annotations

from pathlib import Path

from edge_rsvlm.config.watch import CapSink, CotSink, GeoJsonSink, GeoPackageSink, MqttSink, Sink, WebhookSink, secret
from edge_rsvlm.types import AlertSink


def alert_sink(spec: Sink) -> AlertSink:
    """Ready to send; UsageError when its library or its secret is missing. Nothing is connected yet."""
    if isinstance(spec, GeoJsonSink):
        from edge_rsvlm.sinks.geojson_lines import GeoJsonLines

        return GeoJsonLines(Path(spec.path))
    if isinstance(spec, GeoPackageSink):
        from edge_rsvlm.sinks.geopackage import GeoPackage

        return GeoPackage(Path(spec.path))
    if isinstance(spec, WebhookSink):
        from edge_rsvlm.sinks.webhook import Webhook

        return Webhook(spec.url, token=secret(spec.token_env), timeout_s=spec.timeout_s)
    if isinstance(spec, MqttSink):
        return _mqtt(spec)
    if isinstance(spec, CotSink):
        from edge_rsvlm.sinks.cot import CursorOnTarget

        return CursorOnTarget(spec.host, spec.port, spec.protocol, spec.stale_s, spec.timeout_s)
    return _cap(spec)


def _mqtt(spec: MqttSink) -> AlertSink:
    from edge_rsvlm.sinks.mqtt import Mqtt

    return Mqtt(
        spec.host,
        spec.topic,
        port=spec.port,
        tls=spec.tls,
        username=spec.username,
        password=secret(spec.password_env),
        timeout_s=spec.timeout_s,
    )


def _cap(spec: CapSink) -> AlertSink:
    from edge_rsvlm.sinks.cap import CapFiles, CapHeader, CapPost

    header = CapHeader(spec.sender, spec.addresses, spec.status, spec.category)
    if spec.url is not None:
        return CapPost(spec.url, header, token=secret(spec.token_env), timeout_s=spec.timeout_s)
    assert spec.path is not None
    return CapFiles(Path(spec.path), header)
