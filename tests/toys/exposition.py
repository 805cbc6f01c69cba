"""Prometheus's text format, read as Prometheus does, and held to its conventions."""

import re

from prometheus_client.parser import text_string_to_metric_families


def samples(text: str) -> dict[str, float]:
    """Sample, with its labels as Prometheus writes them → value."""
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    return {line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in lines}


def counters(text: str) -> dict[str, float]:
    """Return the samples that may only grow."""
    return {name: value for name, value in samples(text).items() if name.partition("{")[0].endswith("_total")}


def lint(text: str) -> list[str]:
    """Return the complaints of `promtool check metrics`, and duplicate samples."""
    complaints, names, seen = [], [], set()
    for family in text_string_to_metric_families(text):
        names.append(family.name)
        if not family.documentation:
            complaints.append(f"{family.name}: no help")
        if family.type not in ("counter", "gauge"):
            complaints.append(f"{family.name}: {family.type}")
        for sample in family.samples:
            if not re.fullmatch(r"umbel_[a-z0-9]+(_[a-z0-9]+)*", sample.name):
                complaints.append(f"{sample.name}: not snake case")
            if sample.name.endswith("_total") != (family.type == "counter"):
                complaints.append(f"{sample.name}: a {family.type}")
            if re.search(r"_(ms|milliseconds|minutes|percent|kb|mb|counter|gauge)(_|$)", sample.name):
                complaints.append(f"{sample.name}: not a base unit, or its type")
            if (key := (sample.name, *sorted(sample.labels.items()))) in seen:
                complaints.append(f"{key}: twice")
            seen.add(key)
    complaints += [f"{name}: twice" for name in sorted(set(names)) if names.count(name) > 1]
    return complaints
