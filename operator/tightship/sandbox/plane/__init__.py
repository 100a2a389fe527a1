"""An embedded Kubernetes control plane: API server, scheduler and controllers in one process, in memory.

Enough of Kubernetes for an operator and its users on one machine: unmodified kubectl, the Python client and kopf work
against it. Everything is lost when it stops.
"""

from tightship.sandbox.plane.plane import Plane, Timing

__all__ = ["Plane", "Timing"]
