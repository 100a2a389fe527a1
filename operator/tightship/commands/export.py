"""`tightship profile export`: a measured profile out of a cluster, as a manifest that can be kept in Git and applied elsewhere.

A status is lost on the way through Git and `kubectl apply`; what was measured therefore moves to `spec.results`, and a cluster
that gets the manifest takes it from there without measuring. The rest that belongs to the cluster it came from is left out.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import Any, Final

import yaml
from pydantic import ValidationError

from tightship.api.v1alpha1 import batchprofile as api
from tightship.api.v1alpha1 import labels
from tightship.commands import manifest
from tightship.commands.manifest import InputError
from tightship.commands.output import say
from tightship.decide import ProfileError, curve_from_profile

EXIT_USAGE: Final = 2
TIMEOUT_SECONDS: Final = 30


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> argparse.ArgumentParser:
    """Add the subcommand `export`."""
    parser = subparsers.add_parser(
        "export",
        help="a profile from a cluster, as a manifest for Git",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    # Destinations of its own: the options of `tightship profile` around it have defaults that must not get here.
    parser.add_argument("name", nargs="?", metavar="NAME", help="the BatchProfile in the cluster")
    parser.add_argument("-n", "--namespace", dest="from_namespace", help="its namespace (default: the context's)")
    parser.add_argument("--kubeconfig", help="default: $KUBECONFIG, or ~/.kube/config")
    parser.add_argument("--context", help="context of the kubeconfig (default: its current one)")
    parser.add_argument(
        "-f",
        "--filename",
        dest="from_file",
        metavar="FILE",
        help="instead of a cluster: what `kubectl get bprof NAME -o yaml` printed; - reads stdin",
    )
    parser.add_argument("-o", "--output", dest="to_file", default="-", metavar="FILE", help="default: standard output")
    return parser


def run(args: argparse.Namespace) -> int:
    """Fetch, clean, write; returns the exit status."""
    try:
        if (args.name is None) == (args.from_file is None):
            raise InputError("give either the NAME of a BatchProfile in the cluster, or -f FILE")
        manifest.write(args.to_file, _text(args))
    except InputError as error:
        say(f"tightship profile export: {error}")
        return EXIT_USAGE
    return 0


def _text(args: argparse.Namespace) -> str:
    """What is to be written; an error names what it is about."""
    if args.from_file is not None:
        obj = manifest.read_profile(args.from_file)
        origin = "a manifest" if args.from_file == "-" else args.from_file
    try:
        if args.from_file is None:
            obj = fetch(args.name, args.from_namespace, args.kubeconfig, args.context)
            origin = f"BatchProfile {obj['metadata'].get('namespace')}/{args.name}"
        return to_text(obj, origin)
    except (InputError, ProfileError) as error:
        raise InputError(f"{args.name or args.from_file}: {error}") from error


def to_text(obj: Mapping[str, Any], origin: str) -> str:
    """The manifest with the measurement of `obj` (its status, or the results it was itself given).

    Raises:
        InputError: it isn't a BatchProfile with a key, or not one that a cluster would take.
        ProfileError: nothing was measured yet, or it can't be read.
    """
    spec = obj.get("spec")
    if not isinstance(spec, Mapping) or not isinstance(spec.get("key"), Mapping) or not spec["key"].get("hash"):
        raise InputError("has no spec.key: not a BatchProfile as a cluster returns it")
    curve_from_profile(obj)  # refuses what can't be decided from, in words
    try:
        given = api.BatchProfile.model_validate(obj)
    except ValidationError as error:
        raise InputError(f"not a BatchProfile that a cluster would take: {manifest.first_error(error)}") from error
    status = obj.get("status") or {}
    # As the API writes it: a number that a person put in quotes is one again.
    measured = (given.status if status.get("points") else given.spec.results or given.status).to_dict()
    outcome = status.get("outcome") or {}
    unfinished = "" if outcome or spec.get("results") else "; not finished when it was exported: only these points"
    ended = f"; {outcome['state']}: {outcome.get('message', '')}".rstrip(": ") if outcome else ""
    points = f"{len(measured['points'])} points"
    return manifest.to_yaml(manifest.manifest(obj, measured), f"Exported from {origin}: {points}{ended}{unfinished}")


def fetch(name: str, namespace: str | None, kubeconfig: str | None, context: str | None) -> Mapping[str, Any]:
    """A BatchProfile from a cluster, found as kubectl finds it.

    Raises:
        InputError: no cluster, no such profile, or no right to read it.
    """
    # Slow to load, and only this needs it.
    from kubernetes import client, config  # noqa: PLC0415
    from kubernetes.client.exceptions import ApiException  # noqa: PLC0415
    from kubernetes.config.config_exception import ConfigException  # noqa: PLC0415
    from urllib3.exceptions import HTTPError  # noqa: PLC0415

    try:
        # The library falls back to localhost where there is no kubeconfig; `list_kube_config_contexts` says so instead.
        contexts, active = config.list_kube_config_contexts(config_file=kubeconfig)
        chosen = active if context is None else next((each for each in contexts if each["name"] == context), None)
        if chosen is None:
            raise InputError(f"there is no context {context} in the kubeconfig")
        api_client = config.new_client_from_config(config_file=kubeconfig, context=context)
    except (ConfigException, OSError, yaml.YAMLError) as error:
        raise InputError(
            f"no cluster to read from: {str(error).strip()}; pass --kubeconfig, set KUBECONFIG, or give -f"
        ) from error
    where = namespace or chosen["context"].get("namespace") or "default"
    api_client.configuration.retries = False
    try:
        found: Mapping[str, Any] = client.CustomObjectsApi(api_client).get_namespaced_custom_object(
            labels.GROUP, labels.VERSION, where, api.PLURAL, name, _request_timeout=TIMEOUT_SECONDS
        )
    except ApiException as error:
        words = {
            401: "the API server doesn't accept the credentials of this context",
            403: f"this context may not read BatchProfiles in namespace {where}",
            404: f"no BatchProfile of this name in namespace {where} (kubectl get bprof -A)",
        }
        raise InputError(words.get(error.status, f"the API server answered {error.status} {error.reason}")) from error
    except (HTTPError, OSError) as error:
        raise InputError(f"no answer from {api_client.configuration.host}: {error}") from error
    finally:
        api_client.close()
    return found
