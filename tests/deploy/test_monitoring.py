"""Alerts and the dashboard ask for metrics that there are, by labels that they have; none tells of one client."""

from __future__ import annotations

import asyncio
import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from tests.deploy.unit_files import DEPLOY
from tests.families import tiny_model
from tests.server.worker_states import worker_state
from tsqp import LLM, AsyncLLM
from tsqp.server.metrics import PrometheusMeters

ALERTS = DEPLOY / "prometheus" / "alerts.yml"
DASHBOARD = DEPLOY / "grafana" / "tsqp.json"
NAME = re.compile(r"\b(?:vllm|tsqp):\w+")
# A label is kept for ever, and shown to whoever may read metrics. "le" is the bound of a histogram's bucket.
LABELS = {"model_name", "endpoint", "status", "finished_reason", "le"}
needs_promtool = pytest.mark.skipif(
    shutil.which("promtool") is None, reason="no promtool here: install the package prometheus"
)


@pytest.fixture(scope="module")
def samples() -> Iterator[dict[str, set[str]]]:
    """Every metric of a masked server, with the labels of its samples."""
    llm = LLM(str(tiny_model("llama").directory), protection="masked")
    model = AsyncLLM(llm)
    try:
        meters = PrometheusMeters(model, "tiny")
        meters.began("chat")
        meters.answered(200)
        meters.first_token(0.1)
        meters.token(0.1)
        meters.ended("stop", 3, 3, 0.1)
        found: dict[str, set[str]] = {}
        for family in text_string_to_metric_families(meters.page().decode()):
            for sample in family.samples:
                found.setdefault(sample.name, set()).update(sample.labels)
        yield found
    finally:
        asyncio.run(model.close())


def rules() -> list[dict[str, Any]]:
    return [rule for group in yaml.safe_load(ALERTS.read_text("utf-8"))["groups"] for rule in group["rules"]]


def panels() -> list[dict[str, Any]]:
    return json.loads(DASHBOARD.read_text("utf-8"))["panels"]


def expressions() -> list[str]:
    """All that is asked of Prometheus."""
    return [rule["expr"] for rule in rules()] + [
        target["expr"] for panel in panels() for target in panel.get("targets", ())
    ]


def test_no_label_is_of_a_client(samples: dict[str, set[str]]) -> None:
    assert {label for labels in samples.values() for label in labels} == LABELS


def test_what_is_asked_for_is_there(samples: dict[str, set[str]]) -> None:
    asked = {name for expression in expressions() for name in NAME.findall(expression)}
    assert len(asked) > 25
    assert sorted(asked - samples.keys()) == []
    for expression in expressions():
        labels = {name for inside in re.findall(r"\{([^}]*)\}", expression) for name in re.findall(r"(\w+)=", inside)}
        grouped = {name.strip() for inside in re.findall(r"by \(([^)]*)\)", expression) for name in inside.split(",")}
        metrics = NAME.findall(expression)
        known = set().union(*(samples[name] for name in metrics)) | ({"job"} if not metrics else set())
        assert labels | grouped <= known, expression


def test_each_figure_of_worker_and_pads_is_on_the_dashboard(samples: dict[str, set[str]]) -> None:
    shown = {name for panel in panels() for target in panel.get("targets", ()) for name in NAME.findall(target["expr"])}
    own = {name for name in samples if name.startswith("tsqp:") and not name.endswith("_created")}
    assert sorted(own - shown - {"tsqp:requests_added_total"}) == []  # added is running, waiting and ended


def test_each_alert_says_what_to_do() -> None:
    assert len({rule["alert"] for rule in rules()}) == len(rules())
    for rule in rules():
        assert rule["labels"]["severity"] in ("critical", "warning")
        assert rule["annotations"].keys() == {"summary", "action"}
        assert all(text.endswith(".") for text in rule["annotations"].values())
    page = (DEPLOY.parent / "docs" / "operations.md").read_text("utf-8")
    assert [rule["alert"] for rule in rules() if rule["alert"] not in page] == []


def test_the_dashboard_has_its_parts_beside_each_other() -> None:
    numbers = [panel["id"] for panel in panels()]
    assert len(set(numbers)) == len(numbers)
    taken: set[tuple[int, int]] = set()
    for panel in panels():
        at = panel["gridPos"]
        cells = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
        assert at["x"] + at["w"] <= 24
        assert not cells & taken, panel["title"]
        taken |= cells
    assert all(panel["datasource"]["uid"] == "${datasource}" for panel in panels() if panel["type"] != "row")


def test_a_worker_that_is_lost_is_one_that_the_alerts_see(monkeypatch: pytest.MonkeyPatch) -> None:
    """The alert compares with 0: the metric is there while the worker is not."""
    model = AsyncLLM(LLM(str(tiny_model("llama").directory), protection="local"))
    monkeypatch.setattr(AsyncLLM, "worker_state", worker_state("reconnecting"))
    page = PrometheusMeters(model, "tiny").page().decode()
    asyncio.run(model.close())
    assert 'tsqp:worker_up{model_name="tiny"} 0.0' in page


def promtool(*arguments: object, cwd: Path) -> None:
    done = subprocess.run(["promtool", *map(str, arguments)], capture_output=True, text=True, check=False, cwd=cwd)
    assert done.returncode == 0, done.stdout + done.stderr


@needs_promtool
def test_prometheus_understands_scrape_and_rules_and_they_fire() -> None:
    promtool("check", "config", "prometheus.yml", cwd=ALERTS.parent)
    promtool("test", "rules", "alerts_test.yml", cwd=ALERTS.parent)


@needs_promtool
def test_prometheus_understands_the_dashboard(tmp_path: Path) -> None:
    made = [
        {"record": f"panel:{number}", "expr": expression.replace("$__rate_interval", "5m").replace("$model", ".*")}
        for number, expression in enumerate(expressions())
    ]
    rules_file = tmp_path / "rules.yml"
    rules_file.write_text(yaml.safe_dump({"groups": [{"name": "dashboard", "rules": made}]}))
    promtool("check", "rules", rules_file, cwd=tmp_path)
