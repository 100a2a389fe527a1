"""The controllers of the plane: what kube-controller-manager and kube-scheduler do, as far as it is needed."""
