"""What is heard from the metadata services of AWS and GCP, from a server that behaves as they do."""

import gc
import socket
import time

import pytest
from metadata_server import MetadataServer

from cluster import metadata_service
from cluster.metadata_service import AwsMetadata, GcpMetadata, MetadataUnavailable, Notice, detect

GONE_BY_S = 60.0  # far more than a request may take, far less than a test


@pytest.fixture
def aws():
    with MetadataServer("aws") as server:
        yield server


@pytest.fixture
def gcp():
    with MetadataServer("gcp") as server:
        server.say("preempted", "FALSE")
        server.say("maintenance-event", "NONE")
        yield server


def test_nothing_is_heard_before_the_notice_and_its_action_and_time_after(aws):
    service = AwsMetadata(aws.url)
    assert service.poll() == []
    at_s = float(int(time.time()) + 120)
    aws.interrupt("terminate", at_s)
    (notice,) = service.poll()
    assert notice.deadline_s == at_s
    assert notice.event.startswith("spot interruption: terminate at 20")
    assert service.poll() == [notice]


def test_every_question_to_aws_carries_a_token_and_one_token_serves_many(aws):
    service = AwsMetadata(aws.url)
    for _ in range(5):
        service.poll()
    assert [request[2] for request in aws.requests if request[0] == "PUT"] == [200]
    assert {status for method, _, status in aws.requests if method == "GET"} == {404}


def test_a_token_that_ends_is_replaced_before_and_after(aws, monkeypatch):
    aws.interrupt("stop", time.time() + 60)
    service = AwsMetadata(aws.url)
    service.poll()
    aws.tokens.clear()  # ended early: 401
    assert len(service.poll()) == 1
    assert ("GET", "/latest/meta-data/spot/instance-action", 401) in aws.requests
    monkeypatch.setattr(metadata_service, "AWS_TOKEN_TTL_S", 300)  # what is left is always too little
    short = AwsMetadata(aws.url)
    aws.requests.clear()
    for _ in range(2):
        short.poll()
    assert [status for method, _, status in aws.requests if method == "PUT"] == [200] * 4  # two questions each
    assert 401 not in [status for _, _, status in aws.requests]


def test_a_notice_counts_though_the_next_question_gets_no_answer(aws, gcp):
    aws.interrupt("stop", time.time() + 120)
    aws.texts["/latest/meta-data/events/recommendations/rebalance"] = "forbidden by a proxy"
    assert [notice.event[:23] for notice in AwsMetadata(aws.url).poll()] == ["spot interruption: stop"]
    del aws.texts["/latest/meta-data/spot/instance-action"]
    with pytest.raises(MetadataUnavailable):
        AwsMetadata(aws.url).poll()

    class Half(GcpMetadata):
        def _maintenance(self):
            raise MetadataUnavailable("status 503")

    with pytest.raises(MetadataUnavailable, match="503"):
        Half(gcp.url).poll()
    gcp.say("preempted", "TRUE")
    assert [notice.event for notice in Half(gcp.url).poll()] == ["preempted"]


def test_a_recommendation_to_leave_is_told_without_a_deadline(aws):
    aws.texts["/latest/meta-data/events/recommendations/rebalance"] = '{"noticeTime": "2026-11-05T08:22:00Z"}'
    (notice,) = AwsMetadata(aws.url).poll()
    assert notice.deadline_s is None
    assert "2026-11-05T08:22:00Z" in notice.event


@pytest.mark.parametrize("text", ["", "<html>login</html>", "[]", "null", '{"action": "reboot"}', '{"time": "now"}'])
def test_what_is_no_notice_is_not_taken_for_one(aws, text):
    aws.texts["/latest/meta-data/spot/instance-action"] = text
    with pytest.raises(MetadataUnavailable):
        AwsMetadata(aws.url).poll()


def test_a_notice_without_a_time_has_two_minutes_from_its_first_sight(aws):
    aws.texts["/latest/meta-data/spot/instance-action"] = '{"action": "terminate", "time": "soon"}'
    service = AwsMetadata(aws.url)
    (first,) = service.poll()
    time.sleep(0.2)
    assert service.poll() == [first]
    assert first.deadline_s == pytest.approx(time.time() + 120, abs=5)


def test_a_preempted_machine_of_gcp_has_thirty_seconds_from_the_first_sight(gcp):
    service = GcpMetadata(gcp.url)
    assert service.poll() == []
    gcp.say("preempted", "TRUE")
    (first,) = service.poll()
    assert first.event == "preempted"
    assert first.deadline_s == pytest.approx(time.time() + 30, abs=5)
    time.sleep(0.2)
    assert service.poll() == [first]


def test_maintenance_that_ends_a_machine_is_a_notice_and_a_migration_is_only_told(gcp):
    gcp.say("maintenance-event", "TERMINATE_ON_HOST_MAINTENANCE")
    (end,) = GcpMetadata(gcp.url).poll()
    assert end.deadline_s == pytest.approx(time.time() + 60, abs=5)
    gcp.say("maintenance-event", "MIGRATE_ON_HOST_MAINTENANCE")
    assert GcpMetadata(gcp.url).poll() == [Notice("maintenance: MIGRATE_ON_HOST_MAINTENANCE", None)]


def test_the_cloud_is_told_from_its_answers(aws, gcp):
    assert detect(aws.url).name == "aws"
    assert detect(gcp.url).name == "gcp"
    with MetadataServer("another cloud") as other, pytest.raises(MetadataUnavailable, match="neither"):
        detect(other.url)


def test_what_does_not_say_that_it_is_google_is_not_believed(aws):
    with pytest.raises(MetadataUnavailable, match="not Google's"):
        GcpMetadata(aws.url).poll()


def test_a_refused_connection_and_an_answer_that_never_comes_or_trickles_end_soon(aws, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as unused:
        port = unused.getsockname()[1]
    with pytest.raises(MetadataUnavailable, match="refused"):
        AwsMetadata(f"http://127.0.0.1:{port}").poll()
    service = AwsMetadata(aws.url)
    service.poll()
    monkeypatch.setattr(metadata_service, "REQUEST_TIMEOUT_S", 0.5)
    aws.interrupt("terminate", time.time() + 120)
    for name, value in (("delay_s", GONE_BY_S), ("trickle_s", 0.2)):
        aws.delay_s = aws.trickle_s = 0.0
        setattr(aws, name, value)
        started_s = time.monotonic()
        with pytest.raises(MetadataUnavailable):
            service.poll()
        assert time.monotonic() - started_s < 5
    gc.collect()  # warns of sockets that were left open, which fails the test


def test_an_environment_with_proxies_changes_nothing(aws, monkeypatch):
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    assert AwsMetadata(aws.url).poll() == []


def test_a_token_stands_in_no_message(aws):
    service = AwsMetadata(aws.url)
    service.poll()
    aws.texts["/latest/meta-data/spot/instance-action"] = "nonsense"
    with pytest.raises(MetadataUnavailable) as caught:
        service.poll()
    assert all(token not in str(caught.value) for token in aws.tokens)
