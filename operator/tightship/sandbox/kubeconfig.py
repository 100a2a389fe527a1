"""Kubeconfigs for the sandbox's one cluster."""

from __future__ import annotations

from pathlib import Path


def write_kubeconfig(path: Path, server: str, token: str | None, ca: Path) -> None:
    """Write a kubeconfig for one cluster, readable by the owner only.

    Without a token the server takes whoever asks for the administrator; the password in it only keeps kubectl from asking.
    """
    cluster = f"    server: {server}\n    certificate-authority: {ca}\n"
    user = f"    token: {token}\n" if token else "    username: admin\n    password: admin\n"
    path.touch(mode=0o600)
    path.write_text(
        "apiVersion: v1\nkind: Config\ncurrent-context: sandbox\n"
        f"clusters:\n- name: sandbox\n  cluster:\n{cluster}"
        f"users:\n- name: admin\n  user:\n{user}"
        "contexts:\n- name: sandbox\n  context:\n    cluster: sandbox\n    user: admin\n    namespace: default\n"
    )
