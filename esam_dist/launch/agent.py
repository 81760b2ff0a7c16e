"""torchrun's agent, which does not restart what no restart mends."""

from __future__ import annotations

from torch.distributed.elastic.agent.server.api import DEFAULT_ROLE, RunResult, WorkerGroup, WorkerState
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.launcher import api

USER_ERROR = 2


class Agent(LocalElasticAgent):
    """As torch's; but status 2 of a rank, a mistake of the user's, ends the job whatever `--max-restarts` says."""

    def run(self, role: str = DEFAULT_ROLE) -> RunResult:
        """See `ElasticAgent`; a spare node whose job is over has succeeded, where torch's returns None and fails."""
        return super().run(role) or RunResult(state=WorkerState.SUCCEEDED)

    def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
        result: RunResult = super()._monitor_workers(worker_group)
        if any(failure.exitcode == USER_ERROR for failure in result.failures.values()):
            self._remaining_restarts = 0
        return result


def register() -> None:
    """Let torchrun use this agent in this process."""
    # It has no option for that: it looks the class up by this name, which `api` imports for itself and does not export.
    api.LocalElasticAgent = Agent  # type: ignore[attr-defined]
