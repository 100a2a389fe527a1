"""Jobs: pods until enough have succeeded, or too many failed.

Ends of pods are counted once each by UID, also when the pod is gone afterwards. A pod that is deleted before it ended counts
as failed. New pods after a failure wait for a delay that doubles with every failure.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import datetime, timedelta

from tightship.sandbox.plane.api import Api
from tightship.sandbox.plane.controllers.base import Controller, Mapper, own_key, owner_key
from tightship.sandbox.plane.controllers.pods import from_template, is_finished, is_going, is_ready
from tightship.sandbox.plane.errors import Obj
from tightship.sandbox.plane.store import Key, Storage
from tightship.sandbox.plane.values import condition, dig, key_of, now, parse_time, set_condition, stamp

_MAX_BACKOFF = 600.0


@dataclass
class _Tally:
    """The pods of a job that have ended, by UID."""

    succeeded: set[str] = field(default_factory=set)
    failed: set[str] = field(default_factory=set)
    ignored: set[str] = field(default_factory=set)
    last_failure: datetime | None = None


class Jobs(Controller):
    """Reconciles Jobs.

    Args:
        backoff: seconds before the first retry.
    """

    name = "job-controller"

    def __init__(self, api: Api, backoff: float = 10.0) -> None:
        super().__init__(api)
        self.backoff = backoff
        self._tallies: dict[str, _Tally] = {}

    def watches(self) -> dict[Storage, Mapper]:
        """The jobs themselves and their pods."""
        return {("batch", "jobs"): own_key, ("", "pods"): owner_key("Job")}

    def reconcile(self, key: Key) -> float | None:
        """Brings one job in order; returns when a retry or a deadline is due."""
        job = self.find("batch", "jobs", key)
        if job is None or job["metadata"].get("deletionTimestamp"):
            return None
        ended = condition(job, "Complete") or condition(job, "Failed")
        if ended and ended["status"] == "True":
            return self._expire(job)
        pods = self.pods_of(job)
        tally = self._count(job, pods)
        active = [pod for pod in pods if not is_finished(pod) and not is_going(pod)]
        verdict = self._verdict(job, pods, tally)
        if verdict:
            self._finish(job, active, tally, verdict)
            return 0.01
        delay = None
        if job["spec"].get("suspend"):
            self._suspend(active)
        else:
            delay = self._start(job, active, tally)
        self._report(job, self.pods_of(job), tally)
        due = self._deadline(job)
        return min((value for value in (delay, due) if value is not None), default=None)

    def _count(self, job: Obj, pods: list[Obj]) -> _Tally:
        tally = self._tallies.setdefault(job["metadata"]["uid"], _Tally())
        for pod in pods:
            uid, phase = pod["metadata"]["uid"], dig(pod, "status", "phase")
            if uid in tally.succeeded | tally.failed | tally.ignored:
                continue
            if phase == "Succeeded":
                tally.succeeded.add(uid)
            elif phase == "Failed" or is_going(pod):
                ignored = self._policy(job, pod) == "Ignore"
                (tally.ignored if ignored else tally.failed).add(uid)
                tally.last_failure = now()
        return tally

    def _policy(self, job: Obj, pod: Obj) -> str:
        """What the job's failure policy says about a failed pod: FailJob, Ignore, Count or nothing."""
        statuses = [
            *dig(pod, "status", "initContainerStatuses", default=[]),
            *dig(pod, "status", "containerStatuses", default=[]),
        ]
        for rule in dig(job, "spec", "podFailurePolicy", "rules", default=[]):
            codes = rule.get("onExitCodes")
            if codes:
                for status in statuses:
                    code = dig(status, "state", "terminated", "exitCode", default=0)
                    named = codes.get("containerName") in (None, status["name"])
                    if code and named and (code in codes["values"]) == (codes["operator"] == "In"):
                        return str(rule["action"])
            for pattern in rule.get("onPodConditions") or []:
                found = condition(pod, pattern["type"])
                if found and found["status"] == pattern.get("status", "True"):
                    return str(rule["action"])
        return ""

    def _verdict(self, job: Obj, pods: list[Obj], tally: _Tally) -> tuple[str, str, str] | None:
        """(condition, reason, message) of a job that is over."""
        spec = job["spec"]
        for pod in pods:
            if dig(pod, "status", "phase") == "Failed" and self._policy(job, pod) == "FailJob":
                where = "/".join(key_of(pod))
                return (
                    "Failed",
                    "PodFailurePolicy",
                    f"Pod {where} failed and matches a FailJob rule of the pod failure policy",
                )
        restarts = 0
        if spec["template"]["spec"]["restartPolicy"] == "OnFailure":
            statuses = [entry for pod in pods for entry in dig(pod, "status", "containerStatuses", default=[])]
            restarts = sum(entry.get("restartCount", 0) for entry in statuses)
        wanted = spec.get("completions")
        running = any(not is_finished(pod) for pod in pods)
        enough = len(tally.succeeded) >= wanted if wanted is not None else bool(tally.succeeded) and not running
        if enough:
            return "Complete", "CompletionsReached", "Reached expected number of succeeded pods"
        limit = spec["backoffLimit"]
        if len(tally.failed) > limit or (restarts and restarts > limit):
            return "Failed", "BackoffLimitExceeded", "Job has reached the specified backoff limit"
        due = self._deadline(job)
        if due is not None and due <= 0:
            return "Failed", "DeadlineExceeded", "Job was active longer than specified deadline"
        return None

    def _deadline(self, job: Obj) -> float | None:
        limit, start = job["spec"].get("activeDeadlineSeconds"), dig(job, "status", "startTime")
        if limit is None or start is None or job["spec"].get("suspend"):
            return None
        return (parse_time(start) + timedelta(seconds=limit) - now()).total_seconds()

    def _start(self, job: Obj, active: list[Obj], tally: _Tally) -> float | None:
        """Creates the pods that are missing; returns the seconds until a retry may start."""
        spec = job["spec"]
        left = spec["parallelism"]
        if spec.get("completions") is not None:
            left = min(left, spec["completions"] - len(tally.succeeded))
        elif tally.succeeded:
            left = 0
        missing = left - len(active)
        if missing <= 0:
            for pod in active[: max(0, -missing)]:
                self.delete("", "pods", pod)
            return None
        if tally.last_failure is not None and tally.failed:
            wait: float = min(_MAX_BACKOFF, self.backoff * 2.0 ** (len(tally.failed) - 1))
            rest = wait - (now() - tally.last_failure).total_seconds()
            if rest > 0:
                return rest
        name = job["metadata"]["name"]
        for _ in range(missing):
            try:
                made = self.create("", "pods", from_template(job, spec["template"], generate=f"{name}-"))
            except Exception as error:
                self.event(job, "Warning", "FailedCreate", f"Error creating: {error}")
                raise
            self.event(job, "Normal", "SuccessfulCreate", f"Created pod: {made['metadata']['name']}")
        return None

    def _suspend(self, active: list[Obj]) -> None:
        for pod in active:
            self.delete("", "pods", pod)

    def _finish(self, job: Obj, active: list[Obj], tally: _Tally, verdict: tuple[str, str, str]) -> None:
        kind, reason, message = verdict
        for pod in active:
            self.delete("", "pods", pod)
            tally.failed.add(pod["metadata"]["uid"])
        self._report(job, self.pods_of(job), tally)

        def change(status: Obj) -> None:
            early = "SuccessCriteriaMet" if kind == "Complete" else "FailureTarget"
            set_condition(status, early, "True", reason, message)
            set_condition(status, kind, "True", reason, message)
            if kind == "Complete":
                status["completionTime"] = stamp()

        self.set_status("batch", "jobs", job, change)
        if kind == "Complete":
            self.event(job, "Normal", "Completed", "Job completed")
        else:
            self.event(job, "Warning", reason, message)

    def _report(self, job: Obj, pods: list[Obj], tally: _Tally) -> None:
        active = [pod for pod in pods if not is_finished(pod) and not is_going(pod)]
        counts = {
            "active": len(active),
            "succeeded": len(tally.succeeded),
            "failed": len(tally.failed),
        }

        def change(status: Obj) -> None:
            for name, value in counts.items():
                status.pop(name, None)
                if value:
                    status[name] = value
            status["ready"] = sum(is_ready(pod) for pod in active)
            status["terminating"] = sum(is_going(pod) and not is_finished(pod) for pod in pods)
            status.setdefault("uncountedTerminatedPods", {})
            if job["spec"].get("suspend"):
                status.pop("startTime", None)
                set_condition(status, "Suspended", "True", "JobSuspended", "Job suspended")
            else:
                status.setdefault("startTime", stamp())
                if any(entry["type"] == "Suspended" for entry in status.get("conditions") or []):
                    set_condition(status, "Suspended", "False", "JobResumed", "Job resumed")

        self.set_status("batch", "jobs", job, change)

    def _expire(self, job: Obj) -> float | None:
        self._tallies.pop(job["metadata"]["uid"], None)
        ttl = job["spec"].get("ttlSecondsAfterFinished")
        if ttl is None:
            return None
        ended = condition(job, "Complete") or condition(job, "Failed") or {}
        left = (parse_time(ended["lastTransitionTime"]) + timedelta(seconds=ttl) - now()).total_seconds()
        if left > 0:
            return left
        self.delete("batch", "jobs", job)
        return None
