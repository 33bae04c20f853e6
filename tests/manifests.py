"""JSON schemas of the fields that the Kubernetes manifests use, KubeRay's and those of pods.

Strict: what is not named here is refused, so that a misspelt field is.
"""

from __future__ import annotations

from typing import Any

TEXT = {"type": "string", "minLength": 1}
COUNT = {"type": "integer", "minimum": 0}
TEXTS = {"type": "object", "additionalProperties": {"type": "string"}}


def fields(required: dict[str, Any], **optional: Any) -> dict[str, Any]:
    return {
        "type": "object",
        "additionalProperties": False,
        "required": list(required),
        "properties": {**required, **optional},
    }


def listed(item: dict[str, Any]) -> dict[str, Any]:
    return {"type": "array", "minItems": 1, "items": item}


QUANTITY = {"type": "string", "pattern": r"^[0-9]+(m|Mi|Gi)?$"}
AMOUNTS = fields({"cpu": QUANTITY, "memory": QUANTITY}, **{"nvidia.com/gpu": QUANTITY})
CONTAINER = fields(
    {"name": TEXT, "image": TEXT, "resources": fields({"requests": AMOUNTS, "limits": AMOUNTS})},
    volumeMounts=listed(fields({"name": TEXT, "mountPath": TEXT})),
)
MEMORY = fields({"medium": {"const": "Memory"}, "sizeLimit": QUANTITY})
TOLERATION = fields(
    {"key": TEXT, "operator": {"enum": ["Exists", "Equal"]}},
    effect={"enum": ["NoSchedule", "PreferNoSchedule", "NoExecute"]},
    value={"type": "string"},
)
POD = fields(
    {
        "spec": fields(
            {"containers": listed(CONTAINER)},
            serviceAccountName=TEXT,
            nodeSelector=TEXTS,
            tolerations=listed(TOLERATION),
            volumes=listed(fields({"name": TEXT, "emptyDir": MEMORY})),
        )
    }
)
HEAD = fields(
    {"rayStartParams": TEXTS, "template": POD},
    serviceType={"enum": ["ClusterIP", "NodePort", "LoadBalancer"]},
)
GROUP = fields(
    {
        "groupName": TEXT,
        "replicas": COUNT,
        "minReplicas": COUNT,
        "maxReplicas": COUNT,
        "rayStartParams": TEXTS,
        "template": POD,
    }
)
CLUSTER = fields(
    {"rayVersion": TEXT, "headGroupSpec": HEAD, "workerGroupSpecs": listed(GROUP)},
    authOptions=fields({"mode": {"enum": ["token", "disabled"]}}),
)
JOB = fields(
    {"entrypoint": TEXT, "rayClusterSpec": CLUSTER},
    backoffLimit=COUNT,
    shutdownAfterJobFinishes={"type": "boolean"},
    ttlSecondsAfterFinished=COUNT,
    submitterConfig=fields({"backoffLimit": COUNT}),
)


def manifest(kind: str, spec: dict[str, Any]) -> dict[str, Any]:
    return fields(
        {
            "apiVersion": {"const": "ray.io/v1"},
            "kind": {"const": kind},
            "metadata": fields({"name": {"type": "string", "pattern": "^[a-z][a-z0-9-]{0,62}$"}}),
            "spec": spec,
        }
    )


RAY_CLUSTER = manifest("RayCluster", CLUSTER)
RAY_JOB = manifest("RayJob", JOB)
