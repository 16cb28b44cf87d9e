"""``SINKS.toml``: who is told of alerts.

version = 1

[[sink]]
type = "geojson"                   # newline-delimited, grows
path = "alerts.geojsonl"           # relative to this file
name = "log"                       # each sink needs a name of its own; by default its type
order = "score"                    # the most certain first; by default "oldest"

[[sink]]
type = "gpkg"                      # GeoPackage
path = "alerts.gpkg"

[[sink]]
type = "webhook"                   # each alert is posted as a GeoJSON feature
url = "https://ops.example.org/alerts"
token_env = "OPS_TOKEN"            # the environment variable that holds the token; never the token itself
timeout_s = 30

[[sink]]
type = "mqtt"                      # version 5, QoS 1; also port, tls = true, username, password_env
host = "10.0.0.2"
topic = "alerts/field-3"

[[sink]]
type = "cot"                       # Cursor on Target
host = "239.2.3.1"
port = 6969
protocol = "udp"                   # by default "tcp"
stale_s = 86400                    # how long a map shows the point

[[sink]]
type = "cap"                       # Common Alerting Protocol 1.2: files in a folder (path), or posted (url)
path = "cap"
sender = "uav-3@example.org"
addresses = "ops@example.org"
status = "Actual"                  # or Exercise, System, Test, Draft
category = "Env"                   # as CAP has them; by default "Other"
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from edge_rsvlm.config.model import Model
from edge_rsvlm.config.toml import load_toml
from edge_rsvlm.errors import UsageError

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]{1,64}$")]
Variable = Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")]
Port = Annotated[int, Field(ge=1, le=65535)]
Seconds = Annotated[float, Field(gt=0, le=600)]
WebUrl = Annotated[str, Field(pattern=r"^https?://\S+$")]


class AnySink(Model):
    name: Name = ""
    order: Literal["oldest", "score"] = "oldest"

    @property
    def key(self) -> str:
        """What its deliveries are known by in the journal."""
        return self.name or str(getattr(self, "type"))  # noqa: B009 - every member of the union has one


class GeoJsonSink(AnySink):
    """Newline-delimited GeoJSON that grows."""

    type: Literal["geojson"]
    path: str


class GeoPackageSink(AnySink):
    type: Literal["gpkg"]
    path: str


class WebhookSink(AnySink):
    type: Literal["webhook"]
    url: WebUrl
    token_env: Variable | None = None
    timeout_s: Seconds = 30


class MqttSink(AnySink):
    type: Literal["mqtt"]
    host: str
    topic: str = Field(min_length=1, pattern=r"^[^#+]+$")
    port: Port | None = None
    tls: bool = False
    username: str | None = None
    password_env: Variable | None = None
    timeout_s: Seconds = 30


class CotSink(AnySink):
    """Cursor on Target. ``stale_s`` is how long a map shows the point."""

    type: Literal["cot"]
    host: str
    port: Port
    protocol: Literal["tcp", "udp"] = "tcp"
    stale_s: float = Field(default=86_400, gt=0, le=366 * 86_400)
    timeout_s: Seconds = 10


class CapSink(AnySink):
    """Common Alerting Protocol: files in the folder ``path``, or a POST to ``url``."""

    type: Literal["cap"]
    path: str | None = None
    url: WebUrl | None = None
    token_env: Variable | None = None
    sender: str = Field(pattern=r"^[^\s,<&]+$")
    addresses: str = Field(min_length=1)
    status: Literal["Actual", "Exercise", "System", "Test", "Draft"]
    category: Literal[
        "Geo", "Met", "Safety", "Security", "Rescue", "Fire", "Health", "Env", "Transport", "Infra", "CBRNE", "Other"
    ] = "Other"
    timeout_s: Seconds = 30


Sink = Annotated[GeoJsonSink | GeoPackageSink | WebhookSink | MqttSink | CotSink | CapSink, Field(discriminator="type")]


class Sinks(Model):
    version: Literal[1]
    sink: tuple[Sink, ...] = Field(min_length=1)


def load_sinks(path: Path) -> tuple[Sink, ...]:
    """Read and check a file of sinks; UsageError names the wrong key or line. Paths become those that they mean."""
    sinks = load_toml(Sinks, path, "file of sinks").sink
    keys = [sink.key for sink in sinks]
    for key in keys:
        if keys.count(key) > 1:
            raise UsageError(f"{path} has two sinks called '{key}'", fix="give each its own name = ")
    for sink in sinks:
        if isinstance(sink, CapSink) and (sink.path is None) == (sink.url is None):
            raise UsageError(f"{path}: sink '{sink.key}' goes to a path or to a url", fix="give one of the two")
    return tuple(_placed(sink, path.parent) for sink in sinks)


def _placed(sink: Sink, folder: Path) -> Sink:
    place = getattr(sink, "path", None)
    return sink if place is None else sink.model_copy(update={"path": str(folder / place)})


def secret(variable: str | None) -> str | None:
    """The value of an environment variable that a sink names; UsageError when it is not set."""
    if variable is None:
        return None
    value = os.environ.get(variable)
    if not value:
        raise UsageError(f"the environment variable {variable} is not set", fix=f"set it: export {variable}=...")
    return value
