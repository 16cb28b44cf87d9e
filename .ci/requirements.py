"""Runtime dependencies of pyproject.toml and its search, one per line; with --lowest as pins of their lower bounds.

The names are those of a requirements file, so that pip reads what this prints.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import tomllib


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lowest", action="store_true")
    lowest = parser.parse_args().lowest
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
    for requirement in [*project["dependencies"], *project["optional-dependencies"]["search"]]:
        print(requirement.replace(">=", "==") if lowest else requirement)


if __name__ == "__main__":
    main()
