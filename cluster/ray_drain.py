"""Draining a Ray node: telling the cluster that it goes away, and when.

Over plain gRPC with deadlines: Ray's own client ends the process that uses it when the head is away for a minute.
"""

from __future__ import annotations

import contextlib
from typing import Any

import grpc
from ray._private.grpc_utils import init_grpc_channel
from ray._raylet import AuthenticationTokenLoader  # pyright: ignore[reportAttributeAccessIssue] - compiled
from ray.core.generated import autoscaler_pb2, autoscaler_pb2_grpc, gcs_pb2, gcs_service_pb2, gcs_service_pb2_grpc
from ray.exceptions import AuthenticationError

REQUEST_TIMEOUT_S = 3.0


class NotDrained(ConnectionError):
    """The cluster did not take the drain, or did not answer: try again."""


def drain_node(address: str, node_id: str, message: str, deadline_s: float) -> None:
    """Tell the cluster that this node is preempted at `deadline_s`; a second call replaces the deadline.

    Ray schedules nothing more on the node, tells Ray Train, and shuts the node down once it is idle.

    Args:
        address: host:port of the head's GCS.
        node_id: hexadecimal.
        deadline_s: Unix time in seconds.

    Raises:
        NotDrained: the head does not answer, refuses, or does not know the node (yet), or the token cannot be read now.
    """
    # A new channel each time: one that failed waits longer and longer before it tries again.
    try:
        with contextlib.closing(init_grpc_channel(address)) as channel:
            reply = _drain(channel, node_id, message, deadline_s)
    except grpc.RpcError as error:
        raise NotDrained(_reason(address, error)) from error
    except AuthenticationError as error:
        AuthenticationTokenLoader.instance().reset_cache()
        raise NotDrained(f"the authentication token cannot be read: {error}") from error
    if not reply.is_accepted:
        raise NotDrained(f"the cluster at {address} refused: {reply.rejection_reason_message}")


def _drain(channel: Any, node_id: str, message: str, deadline_s: float) -> Any:
    _check_known(channel, node_id)
    request = autoscaler_pb2.DrainNodeRequest(  # pyright: ignore[reportAttributeAccessIssue] - generated
        node_id=bytes.fromhex(node_id),
        reason=autoscaler_pb2.DrainNodeReason.DRAIN_NODE_REASON_PREEMPTION,  # pyright: ignore
        reason_message=message,
        deadline_timestamp_ms=int(deadline_s * 1000),
    )
    state = autoscaler_pb2_grpc.AutoscalerStateServiceStub(channel)
    return state.DrainNode(request, timeout=REQUEST_TIMEOUT_S, wait_for_ready=True)


def _check_known(channel: Any, node_id: str) -> None:
    """A head that was restarted takes the drain of a node that it does not know, and forgets it."""
    request = gcs_service_pb2.GetAllNodeInfoRequest()  # pyright: ignore[reportAttributeAccessIssue] - generated
    request.node_selectors.add().node_id = bytes.fromhex(node_id)
    nodes = gcs_service_pb2_grpc.NodeInfoGcsServiceStub(channel)
    reply = nodes.GetAllNodeInfo(request, timeout=REQUEST_TIMEOUT_S, wait_for_ready=True)
    alive = gcs_pb2.GcsNodeInfo.ALIVE  # pyright: ignore[reportAttributeAccessIssue] - generated
    if not any(node.state == alive for node in reply.node_info_list):
        raise NotDrained("the cluster does not know this node as alive")


def _reason(address: str, error: Any) -> str:
    if error.code() == grpc.StatusCode.UNAUTHENTICATED:
        AuthenticationTokenLoader.instance().reset_cache()  # the token's file may have been replaced
        return f"the cluster at {address} refuses the authentication token"
    return f"no answer from the cluster at {address} within {REQUEST_TIMEOUT_S:g} s ({error.code().name})"
