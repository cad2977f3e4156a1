"""An API server in miniature for the real kubectl: what it asks for to apply, get, delete and read logs, no more.

It stores what it is given, bumps generations, refuses objects of a namespace that does not exist, checks for unknown
fields with the published schemas, and makes a pod for a Deployment as controllers would. Everything else (admission,
scheduling, defaults) it does not do.
"""

import copy
import json
import os
import re
import shutil
import sys
import threading
import uuid
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import kubernetes_validate

VERSION = "v1.37.0"
GROUPS = {
    "v1": {"namespaces": "Namespace", "services": "Service", "secrets": "Secret", "pods": "Pod",
           "persistentvolumes": "PersistentVolume",
           "persistentvolumeclaims": "PersistentVolumeClaim"},
    "apps/v1": {"deployments": "Deployment"},
    "policy/v1": {"poddisruptionbudgets": "PodDisruptionBudget"},
    "networking.k8s.io/v1": {"networkpolicies": "NetworkPolicy"},
    "storage.k8s.io/v1": {"storageclasses": "StorageClass"},
}  # fmt: skip
CLUSTER_WIDE = {"namespaces", "persistentvolumes", "storageclasses"}
VERBS = ["get", "list", "watch", "create", "patch", "delete", "deletecollection", "update"]
PATH = re.compile(
    r"^/(?:api|apis)/(?P<group>v1|[a-z0-9.]+/v1)"
    r"(?:/namespaces/(?P<namespace>[^/]+)(?=/[a-z]))?/(?P<resource>[a-z]+)(?:/(?P<name>[^/]+))?(?P<log>/log)?$"
)


def find_kubectl():
    """Return the kubectl of the dev extra, which lies beside this Python; else the one on the PATH."""
    kubectl = shutil.which("kubectl", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
    assert kubectl, "kubectl is missing: install the dev extra"
    return kubectl


class KubernetesApi(ThreadingHTTPServer):
    """The server; tests read `objects` and `requests` and set what it should say (`log_text`, `warning`, `refuse`)."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.objects = {}
        self.requests = []
        self.warning = ""
        self.log_text = ""
        self.log_failure = None
        self.hold_logs = None
        self.deletions = {}
        self.refuse = None
        self.clock = 0
        self.mutex = threading.RLock()
        self.thread = threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        self.thread.start()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_address[1]}"

    def close(self):
        self.shutdown()
        self.server_close()
        self.thread.join()

    def names(self, resource):
        return sorted(name for kind, _, name in self.objects if kind == resource)

    def get(self, resource, name, namespace="zops"):
        return self.objects[resource, "" if resource in CLUSTER_WIDE else namespace, name]

    def writes(self):
        return [(method, path) for method, path in self.requests if method != "GET"]

    def kubeconfig(self):
        return {
            "apiVersion": "v1",
            "kind": "Config",
            "current-context": "loopback",
            "clusters": [{"name": "loopback", "cluster": {"server": self.url}}],
            "users": [{"name": "tester", "user": {}}],
            "contexts": [{"name": "loopback", "context": {"cluster": "loopback", "user": "tester"}}],
        }

    def store(self, resource, namespace, name, applied):
        """Create or replace what is applied, as server-side apply does for the only manager of all fields."""
        key = (resource, namespace, name)
        before = self.objects.get(key)
        self.clock += 1
        after = copy.deepcopy(applied)
        born = {"uid": str(uuid.uuid4()), "creationTimestamp": f"2026-01-01T00:00:{self.clock:02d}Z", "generation": 1}
        old = before["metadata"] if before else born
        generation = old["generation"] + (1 if before and before.get("spec") != after.get("spec") else 0)
        after["metadata"] |= {
            "uid": old["uid"],
            "creationTimestamp": old["creationTimestamp"],
            "generation": generation,
            "resourceVersion": str(self.clock),
        }
        self.objects[key] = after
        if resource == "deployments" and (before is None or before["spec"]["template"] != after["spec"]["template"]):
            self._recreate_pod(after)
        return after, before is None

    def _recreate_pod(self, deployment):
        meta, template = deployment["metadata"], deployment["spec"]["template"]
        for key in [key for key in self.objects if key[0] == "pods" and key[2].startswith(meta["name"] + "-")]:
            del self.objects[key]
        pod = {
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": copy.deepcopy(template["metadata"]) | {"namespace": meta["namespace"]},
            "spec": copy.deepcopy(template["spec"]),
            "status": {"phase": "Pending"},
        }
        pod["metadata"]["name"] = f"{meta['name']}-{self.clock}"
        self.store("pods", meta["namespace"], pod["metadata"]["name"], pod)

    def remove(self, key):
        del self.objects[key]
        if key[0] == "deployments":
            for pod in [k for k in self.objects if k[0] == "pods" and k[2].startswith(key[2] + "-")]:
                del self.objects[pod]


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    # Head and body are two writes; without this, each answer would wait 40 ms for an acknowledgement.
    disable_nagle_algorithm = True

    def log_message(self, *_):
        pass

    def do_GET(self):
        url = urlsplit(self.path)
        query = {key: values[0] for key, values in parse_qs(url.query).items()}
        self.server.requests.append(("GET", url.path))
        match = PATH.match(url.path)
        if url.path == "/version":
            self._send({"major": "1", "minor": "37", "gitVersion": VERSION})
        elif url.path == "/api":
            self._send({"kind": "APIVersions", "versions": ["v1"]})
        elif url.path == "/apis":
            self._send({"kind": "APIGroupList", "apiVersion": "v1", "groups": [_group(g) for g in GROUPS if "/" in g]})
        elif url.path.partition("/")[2].partition("/")[2] in GROUPS:
            self._send(_resources(url.path.partition("/")[2].partition("/")[2]))
        elif url.path == "/openapi/v3":
            paths = {("api/" if g == "v1" else "apis/") + g: {"serverRelativeURL": f"/openapi/v3/{g}"} for g in GROUPS}
            self._send({"paths": paths})
        elif url.path.startswith("/openapi/v3/"):
            self._send(_openapi(url.path.removeprefix("/openapi/v3/")))
        elif match and match["log"]:
            self._logs(query)
        elif match and match["name"]:
            self._with_object(match, self._send)
        elif match:
            self._list(match, query)
        else:
            self._status(404, "NotFound", f"the server could not find {url.path}")

    def _logs(self, query):
        if self.server.log_failure:
            return self._status(*self.server.log_failure)
        lines = self.server.log_text.splitlines(keepends=True)
        body = "".join(lines[-int(query["tailLines"]) :] if "tailLines" in query else lines).encode()
        self.send_response(200)
        self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(body)
        if self.server.hold_logs:
            self.server.hold_logs.wait(30)
        self.close_connection = True
        return None

    def do_PATCH(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        url = urlsplit(self.path)
        self.server.requests.append(("PATCH", url.path))
        match = PATH.match(url.path)
        resource, namespace, name = match["resource"], match["namespace"] or "", match["name"]
        with self.server.mutex:
            if self.headers["Content-Type"] != "application/apply-patch+yaml" or "fieldManager=zops" not in url.query:
                return self._status(415, "UnsupportedMediaType", "only server-side apply by zops is known here")
            if namespace and ("namespaces", "", namespace) not in self.server.objects:
                return self._status(404, "NotFound", f'namespaces "{namespace}" not found')
            if self.server.refuse:
                return self._status(*self.server.refuse)
            try:
                kubernetes_validate.validate(body, VERSION, strict="fieldValidation=Strict" in url.query)
            except kubernetes_validate.ValidationError as error:
                return self._status(400, "BadRequest", f"strict decoding error: {error.message}")
            stored, created = self.server.store(resource, namespace, name, body)
            return self._send(stored, 201 if created else 200)

    def do_DELETE(self):
        options = json.loads(self.rfile.read(int(self.headers.get("Content-Length", 0))) or b"{}")
        url = urlsplit(self.path)
        self.server.requests.append(("DELETE", url.path))
        match = PATH.match(url.path)
        with self.server.mutex:
            self.server.deletions[match["resource"]] = options
            self._with_object(match, lambda item: self._delete(match, item))

    def _delete(self, match, item):
        self.server.remove((match["resource"], match["namespace"] or "", match["name"]))
        self._send(
            {"kind": "Status", "apiVersion": "v1", "status": "Success", "details": {"uid": item["metadata"]["uid"]}}
        )

    def _with_object(self, match, use):
        item = self.server.objects.get((match["resource"], match["namespace"] or "", match["name"]))
        if item is None:
            self._status(404, "NotFound", f'{match["resource"]} "{match["name"]}" not found')
        else:
            use(item)

    def _list(self, match, query):
        kind = GROUPS[match["group"]][match["resource"]]
        with self.server.mutex:
            items = [
                item
                for (resource, namespace, _), item in self.server.objects.items()
                if resource == match["resource"] and namespace == (match["namespace"] or "") and _selected(item, query)
            ]
        self._send(
            {"kind": f"{kind}List", "apiVersion": match["group"], "metadata": {"resourceVersion": "1"}, "items": items}
        )

    def _status(self, code, reason, message):
        body = {
            "kind": "Status",
            "apiVersion": "v1",
            "status": "Failure",
            "message": message,
            "reason": reason,
            "code": code,
        }
        self._send(body, code)

    def _send(self, body, code=200):
        self._write(json.dumps(body).encode(), code)

    def _write(self, body, code):
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        if self.server.warning and self.command == "PATCH" and "deployments" in self.path:
            self.send_header("Warning", f'299 - "{self.server.warning}"')
        self.end_headers()
        self.wfile.write(body)


def _selected(item, query):
    labels = item["metadata"].get("labels", {})
    for term in filter(None, query.get("labelSelector", "").split(",")):
        key, separator, value = term.partition("=")
        if key not in labels or (separator and labels[key] != value):
            return False
    name = query.get("fieldSelector", "").removeprefix("metadata.name=")
    return not name or item["metadata"]["name"] == name


def _group(group_version):
    version = {"groupVersion": group_version, "version": "v1"}
    return {"name": group_version.partition("/")[0], "versions": [version], "preferredVersion": version}


def _resources(group_version):
    resources = [
        {
            "name": name,
            "singularName": kind.lower(),
            "namespaced": name not in CLUSTER_WIDE,
            "kind": kind,
            "verbs": VERBS,
        }
        for name, kind in GROUPS[group_version].items()
    ]
    return {"kind": "APIResourceList", "apiVersion": "v1", "groupVersion": group_version, "resources": resources}


def _openapi(group_version):
    """Say only that PATCH knows `fieldValidation`: kubectl then leaves the checking of fields to the server."""
    group, _, version = group_version.rpartition("/")
    paths = {}
    for name, kind in GROUPS[group_version].items():
        patch = {
            "parameters": [{"name": "fieldValidation", "in": "query"}],
            "x-kubernetes-group-version-kind": {"group": group, "version": version, "kind": kind},
        }
        paths[f"/{name}/{{name}}"] = {"patch": patch}
    return {"openapi": "3.0.0", "info": {"title": "loopback", "version": VERSION}, "paths": paths}
