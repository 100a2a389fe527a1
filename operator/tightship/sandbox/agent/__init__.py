"""The node agent: one process that is the kubelet of every simulated node.

It registers nodes, runs the containers of their pods as local processes in private mount and network namespaces, and
reports what a kubelet reports. It works against any API server that speaks the Kubernetes API, and knows nothing of
Tightship's kinds: what it does for a pod, it does for every pod.

What must always hold: a container's processes never outlive the agent; nothing is created on the machine's file system
outside the sandbox's state directory; a pod's status says what its processes do, not what was asked of them.
"""
