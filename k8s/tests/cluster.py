"""As much of a Kubernetes API server as Helm needs for a dry run: it looks objects up, and nothing else."""

from __future__ import annotations

import base64
import json
import subprocess
import tempfile
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Any
from urllib.parse import urlsplit

import yaml

from chart import CHART, HIGHEST, Object, helm

GROUPS = {
    "apps/v1": ["StatefulSet", "Deployment", "DaemonSet"],
    "batch/v1": ["Job"],
    "policy/v1": ["PodDisruptionBudget"],
    "networking.k8s.io/v1": ["NetworkPolicy"],
    "autoscaling/v2": ["HorizontalPodAutoscaler"],
}
CORE = ["Secret", "ConfigMap", "Service", "ServiceAccount", "Pod", "Namespace"]
CERT_MANAGER = {"cert-manager.io/v1": ["Issuer", "Certificate"]}


def plural(kind: str) -> str:
    """The name of a kind in paths."""
    return kind.lower()[:-1] + "ies" if kind.endswith("y") else kind.lower() + "s"


class Cluster:
    """A cluster of one namespace with what was applied to it."""

    def __init__(self, cert_manager: bool = False) -> None:
        self.groups = GROUPS | (CERT_MANAGER if cert_manager else {})
        self.objects: dict[str, Object] = {}
        cluster = self

        class Handler(BaseHTTPRequestHandler):
            """Answers GET."""

            def do_GET(self) -> None:
                """One request."""
                answer = cluster.answer(urlsplit(self.path).path)
                content = json.dumps(answer).encode()
                self.send_response(200 if answer.get("kind") != "Status" else 404)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, format: str, *args: object) -> None:  # noqa: A002
                """Says nothing."""

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)

    def __enter__(self) -> Cluster:
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.server.shutdown()
        self.server.server_close()

    def answer(self, path: str) -> dict[str, Any]:
        """What the API server says to a path."""
        if path == "/version":
            major, minor = HIGHEST.split(".")
            return {"major": major, "minor": minor, "gitVersion": f"v{HIGHEST}.0"}
        if path == "/api":
            return {"kind": "APIVersions", "versions": ["v1"]}
        if path == "/apis":
            return {"kind": "APIGroupList", "apiVersion": "v1", "groups": [self.group(version) for version in self.groups]}
        if path == "/api/v1":
            return self.resources("v1", CORE)
        if path.removeprefix("/apis/") in self.groups:
            version = path.removeprefix("/apis/")
            return self.resources(version, self.groups[version])
        if path.endswith("/secrets"):
            return {"kind": "SecretList", "apiVersion": "v1", "metadata": {}, "items": []}
        gone = {
            "kind": "Status",
            "apiVersion": "v1",
            "status": "Failure",
            "reason": "NotFound",
            "code": 404,
            "message": f"{path} not found",
        }
        return self.objects.get(path, gone)

    @staticmethod
    def group(version: str) -> dict[str, Any]:
        """An API group."""
        names = {"groupVersion": version, "version": version.split("/")[1]}
        return {"name": version.split("/")[0], "versions": [names], "preferredVersion": names}

    @staticmethod
    def resources(version: str, kinds: list[str]) -> dict[str, Any]:
        """The kinds of a version."""
        listed = [
            {
                "name": plural(kind),
                "singularName": kind.lower(),
                "kind": kind,
                "namespaced": kind != "Namespace",
                "verbs": ["get", "list"],
            }
            for kind in kinds
        ]
        return {"kind": "APIResourceList", "apiVersion": "v1", "groupVersion": version, "resources": listed}

    def apply(self, found: list[Object]) -> None:
        """Takes what a rendering holds, as an upgrade would."""
        self.objects = {}
        for each in found:
            version = each["apiVersion"]
            root = "/api/v1" if version == "v1" else f"/apis/{version}"
            name = each["metadata"]["name"]
            self.objects[f"{root}/namespaces/train/{plural(each['kind'])}/{name}"] = each

    def helm(self, which: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Runs Helm with this cluster."""
        port = self.server.server_address[1]
        config = {
            "apiVersion": "v1",
            "kind": "Config",
            "clusters": [{"name": "test", "cluster": {"server": f"http://127.0.0.1:{port}"}}],
            "contexts": [{"name": "test", "context": {"cluster": "test", "user": ""}}],
            "current-context": "test",
        }
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "config"
            path.write_text(yaml.safe_dump(config))
            where = ["--kubeconfig", str(path), "--namespace", "train", "--disable-openapi-validation"]
            return helm(which, *arguments, *where)

    def upgrade(self, *flags: str, which: str = "helm3") -> list[Object]:
        """Renders with a look into the cluster, and applies it."""
        # Helm 3 asks the cluster what it can do only if it also validates.
        looks = ["--dry-run=server", "--is-upgrade", *(["--validate"] if which == "helm3" else [])]
        done = self.helm(which, "template", "demo", str(CHART), *looks, *flags)
        assert done.returncode == 0, done.stderr
        found = [document for document in yaml.safe_load_all(done.stdout) if document]
        self.apply(found)
        return found


def text(secret: Object, key: str) -> str:
    """A key of a secret."""
    return base64.b64decode(secret["data"][key]).decode()
