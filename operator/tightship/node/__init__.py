"""Inside the holder pod: the part that has the GPU, and the part that tells about it.

    tightship node prepare    (root, once)   gives the pack's directory to the replicas' user
    tightship node mps        (has the GPU)  runs the MPS daemon and holds `holder.lock` while it lives
    tightship node watch                     publishes GPU, MPS health and clients on its own pod

Two containers, because a crash of what watches must not take the daemon, and with it every replica, along. What must always
hold: the lock is held only while the pack owns its GPU and the daemon may serve; the daemon goes last, after its clients; what is
published is what was seen, and is written only when it changed. Standard library and httpx only.
"""
