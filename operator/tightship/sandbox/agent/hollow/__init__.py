"""The hollow runtime: pods as state machines instead of processes, for scale and for long runs of faults.

The node agent stays what it is: it registers nodes, admits pods, gives each GPU to one container at a time, restarts what ends, and
writes the same statuses. Only its ports are others: a container is a task that behaves as the program its command names would
(`programs.py`), a probe is answered from that task's state, volumes have no content and pods no network namespace. A thousand GPUs
fit into one process, and every fault can be asked for by name (`machine.py`, `control.py`).

What must always hold: what two real processes could not both have (a holder's lock, a start lock, a GPU's memory) two tasks
cannot have either; a container's task has let go of all it held before its end is reported; what was held, started and ended is
in the journal in the order in which it happened.
"""
