"""launch/kubernetes.yaml against Kubernetes' own schemas, which the package kubernetes-validate brings along."""

import re
from pathlib import Path

import pytest

MANIFEST = Path(__file__).resolve().parent.parent / "launch" / "kubernetes.yaml"


def documents() -> list[dict]:
    yaml = pytest.importorskip("yaml", reason="needs kubernetes-validate: pip install -e .[dev]")
    return list(yaml.safe_load_all(MANIFEST.read_text()))


def test_the_manifest_is_what_kubernetes_takes():
    validator = pytest.importorskip("kubernetes_validate", reason="needs kubernetes-validate: pip install -e .[dev]")
    service, job = documents()
    for document in (service, job):
        validator.validate(document, validator.latest_version(), strict=True)
    job["spec"]["template"]["spec"]["container"] = job["spec"]["template"]["spec"].pop("containers")
    with pytest.raises(validator.ValidationError):
        validator.validate(job, validator.latest_version(), strict=True)


def test_its_parts_fit_together():
    service, job = documents()
    pod = job["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    env = {entry["name"]: entry["value"] for entry in container["env"]}
    assert (
        env["MASTER"] == f"{job['metadata']['name']}-0.{service['metadata']['name']}" and pod["subdomain"] == "saddle"
    )
    assert env["NODES"].rpartition(":")[2] == str(job["spec"]["completions"]) == str(job["spec"]["parallelism"])
    assert pod["terminationGracePeriodSeconds"] > int(env["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"])
    mounts = {mount["name"] for mount in container["volumeMounts"]}
    assert mounts == {volume["name"] for volume in pod["volumes"]}
    script = MANIFEST.parent.parent / container["command"][0]
    asked = set(re.findall(r"^#   ([A-Z_]+)=", script.read_text(), re.MULTILINE))
    assert {"MASTER", "NODES"} <= asked and set(env) - asked == {"TORCH_ELASTIC_SHUTDOWN_TIMEOUT"}
