"""Runs replicas as a deployment of Ray Serve.

Ray Serve starts them, replaces lost ones, adds some while many requests wait, and sends a request
to a replica that has its model (model multiplexing). Its own HTTP server is not used: clients reach
the front end (front.py).
"""

from __future__ import annotations

import logging
import secrets
from collections.abc import AsyncIterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from starlette.types import Message

from veneer.comparison.ray_cluster import connect
from veneer.errors import DoesNotFitError, LostProcessError, QueueFullError, VeneerError
from veneer.serve.replicas.replica import AdminChange, ForwardedRequest, Replica, ReplicaConfig

MODELS_KNOWN = 256
"""Most models that a replica is remembered for, the last used ones."""
ADOPT_SECONDS = 60.0
QUIET = {"log_level": "ERROR", "enable_access_log": False}


@dataclass(frozen=True)
class ReplicaSize:
    """How many replicas to start, and how many at most while requests wait.

    cpus: of each replica; None: the cluster's are divided among them.
    """

    replicas: int
    most: int
    cpus: int | None = None


class RayReplicas:
    """Starts replicas and returns once all have loaded their base. address: of the cluster; None
    starts one here.

    DoesNotFitError: the cluster has too few processors. VeneerError: a replica could not start.
    """

    def __init__(self, address: str | None, served: ReplicaConfig, size: ReplicaSize) -> None:
        self._ray = connect(address)
        from ray import serve

        self._serve: Any = serve
        self._name = f"veneer-{secrets.token_hex(4)}"
        limits, drain = served.settings.limits, served.settings.drain_seconds
        gpus = 1 if self._ray.cluster_resources().get("GPU", 0) else 0
        self._most_waiting = limits.max_waiting
        deployment = self._serve.deployment(
            _RayReplica,
            name="replica",
            ray_actor_options={"num_cpus": self._cpus(size), "num_gpus": gpus},
            max_ongoing_requests=limits.rows + limits.max_waiting,
            max_queued_requests=limits.max_waiting,
            graceful_shutdown_timeout_s=drain,
            autoscaling_config={
                "min_replicas": size.replicas,
                "initial_replicas": size.replicas,
                "max_replicas": size.most,
                "target_ongoing_requests": limits.rows,
            },
        )
        try:
            self._serve.start(proxy_location="Disabled", logging_config=QUIET)
            logging.getLogger("ray.serve").setLevel(logging.ERROR)
            bound = deployment.bind(served)
            self._handle: Any = self._serve.run(
                bound, name=self._name, route_prefix=None, logging_config=QUIET
            )
        except BaseException as fault:  # an error of a replica, or Ctrl-C: nothing may be left
            self.close()
            if not isinstance(fault, Exception):
                raise
            lines = [line for line in str(fault).splitlines() if line.strip()]
            raise VeneerError(
                "the replicas could not be started", lines[-6:], "Fix that, then start them again."
            ) from None

    def _cpus(self, size: ReplicaSize) -> int:
        nodes = [
            int(node["Resources"].get("CPU", 0)) for node in self._ray.nodes() if node["Alive"]
        ]
        cpus = size.cpus or max(1, min(max(nodes), sum(nodes) // size.most))
        if (room := sum(count // cpus for count in nodes)) < size.replicas:
            raise DoesNotFitError(
                f"{size.replicas} replicas need {cpus} processors each; there is room for {room}",
                [f"a node has {count}" for count in nodes],
                "Add nodes, or give fewer --replicas or --cpus.",
            )
        return cpus

    async def answer(
        self, request: ForwardedRequest, model: str, changes: Sequence[AdminChange]
    ) -> AsyncIterator[Message]:
        replica = self._handle.options(
            stream=True, method_name="answer", multiplexed_model_id=model
        )
        response = replica.remote(request, model, changes)
        ended = False
        try:
            async for message in response:
                ended = message["type"] == "http.response.body" and not message.get(
                    "more_body", False
                )
                yield message
        except Exception as fault:
            ended = True
            raise self._translate(fault) from None
        finally:
            if not ended:  # the client has gone
                response.cancel()

    async def adopt(self, changes: Sequence[AdminChange]) -> None:
        with suppress(Exception):  # a replica that missed this gets it with its next request
            await self._handle.broadcast("adopt", changes).results_async(timeout_s=ADOPT_SECONDS)

    async def metrics(self) -> dict[str, str]:
        return dict(await self._broadcast("metrics"))

    async def shown(self) -> dict[str, list[dict[str, Any]]]:
        return dict(await self._broadcast("shown"))

    async def _broadcast(self, method: str) -> list[Any]:
        try:
            return list(await self._handle.broadcast(method).results_async(timeout_s=ADOPT_SECONDS))
        except Exception as fault:
            raise self._translate(fault) from None

    def _translate(self, fault: Exception) -> Exception:
        """Turns Ray's errors into ours."""
        from ray.serve.exceptions import (
            BackPressureError,
            DeploymentUnavailableError,
            ReplicaUnavailableError,
        )

        errors = self._ray.exceptions
        if isinstance(fault, BackPressureError):
            return QueueFullError(self._most_waiting, self._most_waiting)
        lost = (
            errors.RayActorError,
            errors.WorkerCrashedError,
            errors.NodeDiedError,
            errors.ActorUnavailableError,
        )
        if isinstance(fault, (*lost, DeploymentUnavailableError, ReplicaUnavailableError)):
            return LostProcessError("a replica is gone")
        return fault

    def close(self) -> None:
        """Ends the replicas once open requests are answered, and a cluster started here."""
        with suppress(Exception):
            self._serve.delete(self._name)
        self._ray.shutdown()


class _RayReplica(Replica):
    """A replica that Ray Serve starts on a node."""

    def __init__(self, served: ReplicaConfig) -> None:
        from ray import serve

        async def known(model: str) -> str:
            return model

        name = serve.get_replica_context().replica_id.unique_id
        super().__init__(
            served, name, serve.multiplexed(max_num_models_per_replica=MODELS_KNOWN)(known)
        )
