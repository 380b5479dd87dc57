"""The figures for Prometheus."""

import re
from types import SimpleNamespace

import pytest

pytest.importorskip("prometheus_client")

from mpt_eqx.serve.engine import Stats
from mpt_eqx.serve.metrics import CONTENT_TYPE, Metrics

STATS = Stats(
    slots=8, active=3, queued=2, prompt_tokens=100, cached_tokens=40, new_tokens=50, ended={"stop": 4, "deadline": 1},
    rebuilds=1, weight_bytes=6_000_000, cache_bytes=1_000, prefix_bytes=10, peak_bytes=None,
)  # fmt: skip


def made(stats=STATS, health="ready"):
    return Metrics(SimpleNamespace(stats=lambda: stats, health=lambda: health))


def values(metrics):
    """Returns the samples by name and labels."""
    text = metrics.render().decode()
    return {name: float(value) for name, value in re.findall(r"^(mpt_eqx\S+) (\S+)$", text, re.MULTILINE)}


def test_what_the_engine_counts_is_read_when_it_is_asked_for():
    found = values(made())
    assert found["mpt_eqx_slots"] == 8 and found["mpt_eqx_active"] == 3 and found["mpt_eqx_queued"] == 2
    assert found["mpt_eqx_prompt_tokens_total"] == 100 and found["mpt_eqx_cached_tokens_total"] == 40
    assert found["mpt_eqx_new_tokens_total"] == 50 and found["mpt_eqx_rebuilds_total"] == 1
    assert found['mpt_eqx_sequences_total{reason="stop"}'] == 4
    assert found['mpt_eqx_sequences_total{reason="deadline"}'] == 1
    assert found["mpt_eqx_weight_bytes"] == 6_000_000 and found["mpt_eqx_cache_bytes"] == 1_000
    assert found["mpt_eqx_prefix_bytes"] == 10 and "mpt_eqx_peak_bytes" not in found
    assert found["mpt_eqx_ready"] == 1 and values(made(health="dead"))["mpt_eqx_ready"] == 0


def test_every_field_of_the_stats_is_told():
    import dataclasses

    every = {field.name for field in dataclasses.fields(Stats)} - {"ended"}
    found = values(made(dataclasses.replace(STATS, peak_bytes=7)))
    assert {name for name in every if {f"mpt_eqx_{name}", f"mpt_eqx_{name}_total"} & set(found)} == every


def test_requests_count_by_path_and_status():
    metrics = made()
    metrics.observe_request("/v1/models", 200, 0.02)
    metrics.observe_request("/v1/models", 401, 0.0)
    for number in range(100):  # a client cannot make series
        metrics.observe_request(f"/{number}", 404, 0.1)
    found = values(metrics)
    assert found['mpt_eqx_requests_total{path="/v1/models",status="200"}'] == 1
    assert found['mpt_eqx_requests_total{path="other",status="404"}'] == 100
    assert found['mpt_eqx_request_seconds_count{path="/v1/models"}'] == 2
    assert found['mpt_eqx_request_seconds_bucket{le="0.01",path="/v1/models"}'] == 1


def test_what_clients_wait_for_is_a_histogram():
    metrics = made()
    metrics.observe_queue("base", 0.3)
    metrics.observe_first_token("base", 0.5)
    metrics.observe_next_tokens("base", 4, 0.08)
    found = values(metrics)
    assert found['mpt_eqx_queue_seconds_sum{model="base"}'] == 0.3
    assert found['mpt_eqx_first_token_seconds_bucket{le="0.5",model="base"}'] == 1
    assert found['mpt_eqx_next_token_seconds_count{model="base"}'] == 4
    assert found['mpt_eqx_next_token_seconds_sum{model="base"}'] == pytest.approx(0.08)


def test_two_servers_in_one_process_have_figures_of_their_own():
    one, other = made(), made()
    one.observe_queue("base", 1.0)
    assert not any("queue_seconds_count" in name for name in values(other))
    assert CONTENT_TYPE.startswith("text/plain")
