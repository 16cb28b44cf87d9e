"""Alerts as features of a GeoPackage, for QGIS and whatever else reads OGC files.

OGC 12-128r17 (GeoPackage Encoding Standard 1.3): the tables of its annex C, and geometries by its clause 2.1.3, which
put a header before ISO well-known binary.
"""

from __future__ import annotations

import sqlite3
import struct
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

from edge_rsvlm.errors import DeliveryError
from edge_rsvlm.sinks.features import Polygon, bounds, polygons
from edge_rsvlm.sinks.records import dumps
from edge_rsvlm.types import Alert

APPLICATION_ID, VERSION = 0x47504B47, 10300  # "GPKG", 1.3.0
WGS84 = (
    'GEOGCS["WGS 84",DATUM["WGS_1984",SPHEROID["WGS 84",6378137,298.257223563,AUTHORITY["EPSG","7030"]],'
    'AUTHORITY["EPSG","6326"]],PRIMEM["Greenwich",0,AUTHORITY["EPSG","8901"]],UNIT["degree",0.0174532925199433,'
    'AUTHORITY["EPSG","9122"]],AUTHORITY["EPSG","4326"]]'
)
POLYGON, MULTIPOLYGON = 3, 6
_TABLES = """
CREATE TABLE gpkg_spatial_ref_sys (srs_name TEXT NOT NULL, srs_id INTEGER PRIMARY KEY, organization TEXT NOT NULL,
    organization_coordsys_id INTEGER NOT NULL, definition TEXT NOT NULL, description TEXT);
CREATE TABLE gpkg_contents (table_name TEXT NOT NULL PRIMARY KEY, data_type TEXT NOT NULL, identifier TEXT UNIQUE,
    description TEXT DEFAULT '', last_change DATETIME NOT NULL DEFAULT (strftime('%Y-%m-%dT%H:%M:%fZ','now')),
    min_x DOUBLE, min_y DOUBLE, max_x DOUBLE, max_y DOUBLE, srs_id INTEGER,
    CONSTRAINT fk_gc_r_srs_id FOREIGN KEY (srs_id) REFERENCES gpkg_spatial_ref_sys(srs_id));
CREATE TABLE gpkg_geometry_columns (table_name TEXT NOT NULL, column_name TEXT NOT NULL,
    geometry_type_name TEXT NOT NULL, srs_id INTEGER NOT NULL, z TINYINT NOT NULL, m TINYINT NOT NULL,
    CONSTRAINT pk_geom_cols PRIMARY KEY (table_name, column_name), CONSTRAINT uk_gc_table_name UNIQUE (table_name),
    CONSTRAINT fk_gc_tn FOREIGN KEY (table_name) REFERENCES gpkg_contents(table_name),
    CONSTRAINT fk_gc_srs FOREIGN KEY (srs_id) REFERENCES gpkg_spatial_ref_sys (srs_id));
CREATE TABLE alerts (fid INTEGER PRIMARY KEY AUTOINCREMENT NOT NULL, geom GEOMETRY, id TEXT NOT NULL UNIQUE,
    rule TEXT NOT NULL, time DATETIME NOT NULL, score DOUBLE NOT NULL, sentence TEXT NOT NULL, record TEXT NOT NULL);
INSERT INTO gpkg_contents (table_name, data_type, identifier, srs_id) VALUES ('alerts', 'features', 'alerts', 4326);
INSERT INTO gpkg_geometry_columns VALUES ('alerts', 'geom', 'GEOMETRY', 4326, 0, 0)
"""
_UPSERT = """
INSERT INTO alerts (geom, id, rule, time, score, sentence, record) VALUES (?, ?, ?, ?, ?, ?, ?)
ON CONFLICT (id) DO UPDATE SET geom = excluded.geom, rule = excluded.rule, time = excluded.time,
    score = excluded.score, sentence = excluded.sentence, record = excluded.record
"""
_EXTENT = """
UPDATE gpkg_contents SET last_change = strftime('%Y-%m-%dT%H:%M:%fZ', 'now'),
    min_x = min(coalesce(min_x, ?1), ?1), min_y = min(coalesce(min_y, ?2), ?2),
    max_x = max(coalesce(max_x, ?3), ?3), max_y = max(coalesce(max_y, ?4), ?4) WHERE table_name = 'alerts'
"""


class GeoPackage:
    """Upserts by the alert's id into the table ``alerts``, so that no repeat shows. The file is made when needed."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def send(self, alert: Alert) -> None:
        geometry = None if alert.geometry is None else encode(alert.geometry)
        row = (geometry, alert.id, alert.rule, alert.time, alert.score, alert.sentence, dumps(dict(alert.record)))
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with closing(sqlite3.connect(self._path, isolation_level=None)) as connection:
                connection.execute("PRAGMA synchronous = FULL")
                connection.execute("BEGIN IMMEDIATE")
                _make(connection, self._path)
                connection.execute(_UPSERT, row)
                if alert.geometry is not None:
                    connection.execute(_EXTENT, bounds(alert.geometry))
                connection.execute("COMMIT")
        except (sqlite3.Error, OSError) as exc:
            raise DeliveryError(
                f"cannot write {self._path}: {exc}",
                fix="close what holds it, make room, or give another path",
                retry=True,
            ) from exc


def _make(connection: sqlite3.Connection, path: Path) -> None:
    """The tables of an empty file; DeliveryError for a file that another program made without our table."""
    tables = {name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
    if "alerts" in tables:
        return
    if tables:
        raise DeliveryError(f"{path} is another database", fix="give the sink a path of its own", retry=True)
    connection.execute(f"PRAGMA application_id = {APPLICATION_ID}")
    connection.execute(f"PRAGMA user_version = {VERSION}")
    first, rest = _TABLES.split(";\n", 1)
    connection.execute(first)
    systems = (
        ("Undefined Cartesian SRS", -1, "NONE", -1, "undefined", "undefined Cartesian coordinate reference system"),
        ("Undefined geographic SRS", 0, "NONE", 0, "undefined", "undefined geographic coordinate reference system"),
        ("WGS 84 geodetic", 4326, "EPSG", 4326, WGS84, "longitude and latitude in degrees"),
    )
    connection.executemany("INSERT INTO gpkg_spatial_ref_sys VALUES (?, ?, ?, ?, ?, ?)", systems)
    for statement in rest.split(";\n"):
        connection.execute(statement)


def encode(geometry: Mapping[str, Any]) -> bytes:
    """StandardGeoPackageBinary of a Polygon or MultiPolygon, little-endian, with its envelope."""
    west, south, east, north = bounds(geometry)
    header = b"GP" + struct.pack("<BBi4d", 0, 0b0000_0011, 4326, west, east, south, north)
    parts = [_polygon(polygon) for polygon in polygons(geometry)]
    if geometry["type"] == "Polygon":
        return header + parts[0]
    return header + struct.pack("<BII", 1, MULTIPOLYGON, len(parts)) + b"".join(parts)


def _polygon(polygon: Polygon) -> bytes:
    rings = [
        struct.pack(f"<I{2 * len(ring)}d", len(ring), *(value for point in ring for value in point[:2]))
        for ring in polygon
    ]
    return struct.pack("<BII", 1, POLYGON, len(rings)) + b"".join(rings)
