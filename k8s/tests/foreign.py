"""Kinds that Kubernetes itself does not have: the parts of their schemas that the chart uses, strictly."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jsonschema

from chart import Object


def closed(required: str, **properties: Any) -> dict[str, Any]:
    """An object with these properties and no other."""
    return {"type": "object", "additionalProperties": False, "required": required.split(), "properties": properties}


def listed(items: dict[str, Any]) -> dict[str, Any]:
    """A list that is not empty."""
    return {"type": "array", "minItems": 1, "items": items}


TEXT = {"type": "string", "minLength": 1}
TEXTS = listed(TEXT)
WORDS = {"type": "object", "additionalProperties": TEXT}
DURATION = {"type": "string", "pattern": "^[0-9]+(ms|s|m|h)$"}
SELECTOR = closed("matchLabels", matchLabels=WORDS)
RELABELING = closed(
    "", sourceLabels=TEXTS, separator=TEXT, targetLabel=TEXT, regex=TEXT, modulus={"type": "integer"}, replacement=TEXT,
    action={"enum": ["replace", "keep", "drop", "hashmod", "labelmap", "labeldrop", "labelkeep"]},
)  # fmt: skip
ENDPOINT = closed(
    "port path interval", port=TEXT, path=TEXT, interval=DURATION, scrapeTimeout=DURATION,
    relabelings=listed(RELABELING), metricRelabelings=listed(RELABELING),
)  # fmt: skip
RULE = closed(
    "expr", alert=TEXT, record=TEXT, expr={"type": ["string", "integer"]}, labels=WORDS, annotations=WORDS,
    keep_firing_for=DURATION, **{"for": DURATION},
)  # fmt: skip
ISSUER = closed("name", name=TEXT, kind={"enum": ["Issuer", "ClusterIssuer"]}, group={"const": "cert-manager.io"})
USAGES = ["digital signature", "cert sign", "crl sign", "server auth", "client auth"]

SPECS = {
    "ServiceMonitor": closed("selector endpoints", jobLabel=TEXT, selector=SELECTOR, endpoints=listed(ENDPOINT)),
    "PodMonitor": closed("selector podMetricsEndpoints", jobLabel=TEXT, selector=SELECTOR, podMetricsEndpoints=listed(ENDPOINT)),
    "PrometheusRule": closed("groups", groups=listed(closed("name rules", name=TEXT, interval=DURATION, rules=listed(RULE)))),
    "Issuer": {
        "oneOf": [
            closed("selfSigned", selfSigned=closed("")),
            closed("ca", ca=closed("secretName", secretName=TEXT)),
        ]
    },
    "Certificate": closed(
        "secretName issuerRef commonName",
        commonName={"type": "string", "maxLength": 64},
        secretName=TEXT,
        isCA={"type": "boolean"},
        duration={"type": "string", "pattern": "^([0-9]+h)?([0-9]+m)?([0-9]+s)?$"},
        renewBefore={"type": "string", "pattern": "^([0-9]+h)?([0-9]+m)?([0-9]+s)?$"},
        privateKey=closed(
            "", algorithm={"enum": ["RSA", "ECDSA", "Ed25519"]}, size={"type": "integer"}, encoding=TEXT,
            rotationPolicy={"enum": ["Always", "Never"]},
        ),
        usages=listed({"enum": USAGES}),
        dnsNames=TEXTS,
        ipAddresses=TEXTS,
        issuerRef=ISSUER,
    ),
}  # fmt: skip


def _check(version: str) -> Callable[[Object], None]:
    def check(each: Object) -> None:
        assert each["apiVersion"] == version
        assert set(each) == {"apiVersion", "kind", "metadata", "spec"}
        jsonschema.Draft202012Validator(SPECS[each["kind"]]).validate(each["spec"])

    return check


#: Checks by API group. A kind that is not above is a KeyError.
FOREIGN = {
    "monitoring.coreos.com": _check("monitoring.coreos.com/v1"),
    "cert-manager.io": _check("cert-manager.io/v1"),
}
