"""Condition types and reasons: the vocabulary that users script against with `kubectl wait`.

A reason is CamelCase, stable, and listed here; messages are free text with numbers and a next step.
"""

from __future__ import annotations

from typing import Final

# Types of an LLMService, in the order of its gates.
ACCEPTED: Final = "Accepted"
PROFILED: Final = "Profiled"
RECOMMENDED: Final = "Recommended"
PACKED: Final = "Packed"
AVAILABLE: Final = "Available"
READY: Final = "Ready"
RECONCILING: Final = "Reconciling"
STALLED: Final = "Stalled"
SLO_MET: Final = "SLOMet"
PROFILE_STALE: Final = "ProfileStale"

LLMSERVICE_GATES: Final = (ACCEPTED, PROFILED, RECOMMENDED, PACKED, AVAILABLE)
"""The conditions that must be True, in this order, before `Ready` can be."""

# Types of a BatchProfile.
PROGRESSING: Final = "Progressing"
COMPLETE: Final = "Complete"
FAILED: Final = "Failed"

# Types of a GPUPack, in the order of its gates.
HELD: Final = "Held"
SHARING_READY: Final = "SharingReady"
REPLICAS_READY: Final = "ReplicasReady"
GPUPACK_GATES: Final = (HELD, SHARING_READY, REPLICAS_READY)


class Reason:
    """Every reason, by the conditions that use it."""

    # Accepted
    VALID: Final = "Valid"
    INVALID_SPEC: Final = "InvalidSpec"
    UNSUPPORTED_ACCELERATOR: Final = "UnsupportedAccelerator"
    NAME_CONFLICT: Final = "NameConflict"
    # Profiled; Complete and Failed of a profile
    COMPLETED: Final = "Completed"
    CACHE_HIT: Final = "CacheHit"
    IMPORTED: Final = "Imported"
    BUDGET_EXCEEDED: Final = "BudgetExceeded"
    WAITING: Final = "Waiting"
    MEASURING: Final = "Measuring"
    UNSCHEDULABLE: Final = "Unschedulable"
    ENGINE_FAILED: Final = "EngineFailed"
    NO_POINT_IN_BUDGET: Final = "NoPointInBudget"
    JOB_FAILED: Final = "JobFailed"
    # Recommended
    MEASURED: Final = "Measured"
    ESTIMATED: Final = "Estimated"
    SLO_INFEASIBLE: Final = "SLOInfeasible"
    EFFICIENCY_FLOOR_NOT_MET: Final = "EfficiencyFloorNotMet"
    INSUFFICIENT_MEMORY: Final = "InsufficientMemory"
    # Packed
    PLACED: Final = "Placed"
    EXCLUSIVE_NO_GAIN: Final = "ExclusiveNoGain"
    AWAITING_APPROVAL: Final = "AwaitingApproval"
    INSUFFICIENT_GPUS: Final = "InsufficientGPUs"
    SHARING_UNAVAILABLE: Final = "SharingUnavailable"
    # Available
    MINIMUM_REPLICAS_READY: Final = "MinimumReplicasReady"
    TOO_FEW_REPLICAS: Final = "TooFewReplicas"
    # Ready, Reconciling
    ROLLOUT_STOPPED: Final = "RolloutStopped"
    FULLY_REALISED: Final = "FullyRealised"
    NOT_YET_KNOWN: Final = "NotYetKnown"
    PROGRESSING: Final = "Progressing"
    # GPUPack
    GPU_HELD: Final = "GPUHeld"
    MPS_ACTIVE: Final = "MPSActive"
    CPU_SET: Final = "CPUSet"
    EXCLUSIVE: Final = "Exclusive"
    DEVICE_LIMITS_FORCED: Final = "DeviceLimitsForced"
    MPS_FAULT: Final = "MPSFault"
    MPS_NOT_ATTACHED: Final = "MPSNotAttached"
    GPU_MISMATCH: Final = "GPUMismatch"
    GPU_NOT_VISIBLE: Final = "GPUNotVisible"
    HOLDER_LOST: Final = "HolderLost"
    WAITING_FOR_START_SLOT: Final = "WaitingForStartSlot"
    REPLICAS_READY: Final = "ReplicasReady"
    REPLICAS_STARTING: Final = "ReplicasStarting"
    OOM_KILLED: Final = "OOMKilled"
    CRASH_LOOP: Final = "CrashLoop"
    ENGINE_HUNG: Final = "EngineHung"
    IMAGE_PULL_FAILED: Final = "ImagePullFailed"
    NOT_ASSIGNED: Final = "NotAssigned"
