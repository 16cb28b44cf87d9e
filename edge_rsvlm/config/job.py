"""``JOB.toml``: several tasks over many scenes with one set of loaded models.

version = 1
tasks = ["caption", "detect"]      # also "ask", "ground", "classify", "segment"
inputs = ["scenes/*.tif"]          # relative to the job file
output = "results"                 # one GeoJSON per input and task, and results.jsonl

[detect]
query = ["airplane"]               # or like = ["scenes/a.tif#10,20,30,40"], boxes x, y, w, h

[ask]                              # for the task "ask"; "ground" needs [ground] phrase
question = "is there a river?"

[classify]                         # for the task "classify"
labels = ["airport", "beach"]

[segment]                          # for the task "segment", which also writes masks
labels = ["trees", "water"]

[[change]]
before = "2018.tif"
after = "2020.tif"

[limits]
memory = "512MiB"
deadline = "30s"
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field

from edge_rsvlm.config.model import Model
from edge_rsvlm.config.toml import load_toml
from edge_rsvlm.errors import UsageError


class DetectOptions(Model):
    query: tuple[str, ...] = ()
    like: tuple[str, ...] = ()
    score: float | None = Field(default=None, ge=0.01, le=0.99)


class AskOptions(Model):
    question: str = Field(min_length=1)


class GroundOptions(Model):
    phrase: str = Field(min_length=1)


class ClassifyOptions(Model):
    labels: tuple[str, ...] = Field(min_length=1)


class SegmentOptions(Model):
    labels: tuple[str, ...] = Field(min_length=1)


class Pair(Model):
    before: str
    after: str


class JobLimits(Model):
    memory: str | None = None
    deadline: str | None = None
    threads: int | None = Field(default=None, ge=1)
    resolution: float | None = Field(default=None, gt=0)
    profile: str = "host"


class Job(Model):
    version: Literal[1]
    tasks: tuple[Literal["caption", "ask", "ground", "detect", "classify", "segment"], ...] = ()
    inputs: tuple[str, ...] = ()
    output: str
    detect: DetectOptions = DetectOptions()
    ask: AskOptions | None = None
    ground: GroundOptions | None = None
    classify: ClassifyOptions | None = None
    segment: SegmentOptions | None = None
    change: tuple[Pair, ...] = ()
    limits: JobLimits = JobLimits()

    def texts(self, task: str) -> tuple[str, ...]:
        """What a task is asked in words."""
        said: dict[str, tuple[str, ...]] = {
            "detect": self.detect.query,
            "ask": (self.ask.question,) if self.ask else (),
            "ground": (self.ground.phrase,) if self.ground else (),
            "classify": self.classify.labels if self.classify else (),
            "segment": self.segment.labels if self.segment else (),
        }
        return said.get(task, ())


def load_job(path: Path) -> Job:
    """Read and check a job; UsageError names the wrong key or line. Paths stay as written."""
    job = load_toml(Job, path, "job")
    if bool(job.tasks) != bool(job.inputs) or not (job.tasks or job.change):
        raise UsageError(f"job {path} has nothing to do", fix="give tasks with inputs, or [[change]] pairs")
    for task, needed in (("ask", "question"), ("ground", "phrase"), ("classify", "labels"), ("segment", "labels")):
        if task in job.tasks and getattr(job, task) is None:
            raise UsageError(
                f"job {path} has the task '{task}' without its {needed}", fix=f"add [{task}] with {needed}"
            )
    return job
