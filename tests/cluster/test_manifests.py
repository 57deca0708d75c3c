"""Every manifest is well formed, pinned, without a secret, and names only what is there."""

import ast
import configparser
import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipeline.cli.arguments import read_arguments
from pipeline.grid.grid_request import read_request

ROOT = Path(__file__).parents[2]
CLUSTER = ROOT / "cluster"
FILES = sorted(path for path in CLUSTER.iterdir() if path.is_file())
TEXTS = [*FILES, ROOT / ".rayignore", ROOT / "docs" / "SECURITY.md"]
MANIFESTS = [path for path in FILES if path.suffix == ".yaml"]
LAUNCHER = ("ray-cluster.yaml", "ray-on-prem.yaml")
SAID = {  # variables that the manifests may ask for: ours, Ray's, MLflow's, of the servers
    "MINIO_ROOT_PASSWORD",
    "MINIO_ROOT_USER",
    "MLFLOW_ADMIN_PASSWORD",
    "MLFLOW_ADMIN_USERNAME",
    "MLFLOW_SECRET_KEY",
    "POSTGRES_PASSWORD",
    "RAY_AUTH_TOKEN",
}


def load(name: str) -> Any:
    return yaml.safe_load((CLUSTER / name).read_text())


def compose() -> dict[str, Any]:
    found: dict[str, Any] = load("compose.yaml")
    return found


def ray_job() -> dict[str, Any]:
    documents = list(yaml.safe_load_all((CLUSTER / "kuberay-job.yaml").read_text()))
    assert [document["kind"] for document in documents] == ["RayJob", "PersistentVolumeClaim"]
    return dict(documents[0])


def walk(node: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    items = node.items() if isinstance(node, dict) else enumerate(node)
    for key, value in items:
        here = f"{path}/{key}"
        if isinstance(value, (dict, list)):
            yield from walk(value, here)
        else:
            yield here, value


def named(files: list[Path]) -> list[Any]:
    return [pytest.param(file, id=file.name) for file in files]


@pytest.mark.parametrize("file", named(TEXTS))
def test_every_command_of_the_project_in_it_exists(file: Path) -> None:
    for command in re.findall(r"python -m (pipeline(?:\.\w+)*)", file.read_text()):
        module = ROOT / command.replace(".", "/")
        entry = module / "__main__.py" if module.is_dir() else module.with_suffix(".py")
        assert entry.is_file(), command
        tree = ast.parse(entry.read_text())
        assert any(isinstance(node, ast.FunctionDef) and node.name == "run" for node in tree.body)


@pytest.mark.parametrize("file", named(TEXTS))
def test_every_file_of_the_project_that_it_names_exists(file: Path) -> None:
    for path in re.findall(r"(?<![\w/.])cluster/[\w.-]*\w", file.read_text()):
        if path not in ("cluster/secrets", "cluster/.env"):  # users make them, git ignores them
            assert (ROOT / path).exists(), path
    if file.name == "Dockerfile":
        for line in re.findall(r"^COPY (.+)", file.read_text(), re.MULTILINE):
            *sources, _ = [word for word in line.split() if not word.startswith("--")]
            for source in sources:
                assert (ROOT / source).exists(), source


@pytest.mark.parametrize("file", named([f for f in FILES if f.suffix == ".sh"]))
def test_every_script_is_one_that_bash_can_read(file: Path) -> None:
    subprocess.run(["bash", "-n", str(file)], check=True)
    assert os.access(file, os.X_OK)
    assert "set -euo pipefail" in file.read_text()


@pytest.mark.parametrize("file", named(MANIFESTS))
def test_no_manifest_holds_a_secret(file: Path) -> None:
    """What is named like a secret comes from the environment, a file or the cluster."""
    for document in yaml.safe_load_all(file.read_text()):
        for path, value in walk(document):
            if re.search(r"(?i)passw|secret|token|access_key", path.rpartition("/")[2]):
                where = r"\$\{\w+:\?|/shared/secrets/|false$"
                assert isinstance(value, bool) or re.match(where, str(value)), path
            for password in re.findall(r"://[^/\s:]+:([^@\s]+)@", str(value)):
                assert re.fullmatch(r"\$\{\w+:\?[^}]+\}", password), path
    assert not re.search(r"\b[0-9a-f]{32,}\b|AKIA|BEGIN [A-Z ]*PRIVATE", file.read_text())


def test_images_and_packages_are_pinned() -> None:
    images = [value for path, value in walk(compose()) if path.endswith("/image")]
    images += [value for path, value in walk(ray_job()) if path.endswith("/image")]
    images += [load("ray-cluster.yaml")["docker"]["image"]]
    dockerfile = (CLUSTER / "Dockerfile").read_text()
    images += [name for name in re.findall(r"^FROM (\S+)", dockerfile, re.MULTILINE) if ":" in name]
    assert len(images) >= 9
    for image in images:
        tag = image.rpartition(":")[2]
        assert re.search(r"\d+\.\d+|\d{4}-\d\d-\d\d", tag), image
    for line in (CLUSTER / "mlflow-requirements.txt").read_text().split():
        assert re.fullmatch(r"[\w\[\]-]+==[\d.]+", line)
    pinned = dict(
        line.split("==") for line in (ROOT / "constraints.txt").read_text().split() if "==" in line
    )
    assert str(ray_job()["spec"]["rayClusterSpec"]["rayVersion"]) == pinned["ray"]
    assert f"mlflow[auth]=={pinned['mlflow']}" in (CLUSTER / "mlflow-requirements.txt").read_text()
    for command in re.findall(r"pip install (.+)", dockerfile):
        assert "-c constraints.txt" in command


def test_images_run_as_a_user_without_rights_and_want_a_token() -> None:
    lines = (CLUSTER / "Dockerfile").read_text().splitlines()
    users = [line for line in lines if line.startswith("USER")]
    assert users == ["USER robust"], "and none goes back to root"
    first = next(i for i, line in enumerate(lines) if line.startswith("USER"))
    assert not any("pip install" in line for line in lines[:first])
    assert any("RAY_AUTH_MODE=token" in line for line in lines)
    assert any("MLFLOW_ALLOW_PICKLE_DESERIALIZATION=false" in line for line in lines)


def test_no_image_takes_a_secret_or_data_along() -> None:
    """Files with passwords lie beside compose.yaml: neither copied, nor even in the context."""
    text = (CLUSTER / "Dockerfile").read_text()
    sources = re.findall(r"^COPY --chown=robust (.+)", text, re.MULTILINE)
    assert sources
    assert not {"cluster", "."} & {word for line in sources for word in line.split()[:-1]}
    ignored = (ROOT / ".dockerignore").read_text().split()
    assert {".git", "data", "runs", "**/.env", "**/secrets"} <= set(ignored)
    assert {".env", "/cluster/secrets/"} <= set((ROOT / ".gitignore").read_text().split())


# Compose -----------------------------------------------------------------------------------------

SERVICE_KEYS = set(
    "image build shm_size restart cap_drop security_opt volumes command entrypoint environment "
    "ports healthcheck depends_on deploy".split()
)


def test_compose_has_the_shape_of_the_compose_specification() -> None:
    found = compose()
    assert {key for key in found if not key.startswith("x-")} == {"name", "services", "volumes"}
    for name, service in found["services"].items():
        assert set(service) <= SERVICE_KEYS, name
        assert "image" in service
        for other, how in service.get("depends_on", {}).items():
            assert other in found["services"]
            condition = how["condition"]
            assert condition in ("service_healthy", "service_completed_successfully")
            healthy = "healthcheck" in found["services"][other]
            assert healthy or condition != "service_healthy", f"{name} would wait for ever"
        for volume in service.get("volumes", ()):
            source = re.sub(r"\$\{[^}]*\}", "./", volume).split(":")[0]
            assert source.startswith(".") or source in found["volumes"], volume
        if build := service.get("build"):
            assert (CLUSTER / build["context"] / build["dockerfile"]).is_file()
            stages = re.findall(r"^FROM \S+ AS (\S+)", (CLUSTER / "Dockerfile").read_text(), re.M)
            assert build["target"] in stages
    urls = {
        host
        for _, value in walk(found["services"])
        for host in re.findall(r"(?:https?://|@)([a-z]+):\d+", str(value))
    }
    assert urls <= set(found["services"]), "each server that is named is a service"


def test_compose_listens_on_loopback_alone() -> None:
    ports = [port for s in compose()["services"].values() for port in s.get("ports", ())]
    assert len(ports) == 2
    for port in ports:
        assert re.fullmatch(r"127\.0\.0\.1:\d+:\d+", port), port


def test_compose_wants_every_password_from_the_environment() -> None:
    text = (CLUSTER / "compose.yaml").read_text()
    assert set(re.findall(r"\$\{(\w+):\?", text)) == SAID
    assert set(re.findall(r"\$\{(\w+):-", text)) == {"ROBUST_MOE_DATA"}
    assert not re.search(r"\$\{\w+\}", text), "a variable without either"
    readme = (CLUSTER / "README.md").read_text()
    for name in SAID:
        assert name in readme, name


def test_mlflow_has_hosts_accounts_and_no_pickle() -> None:
    service = compose()["services"]["mlflow"]
    assert "--app-name=basic-auth" in service["command"]
    (hosts,) = [w for w in service["command"] if w.startswith("--allowed-hosts=")]
    assert hosts.split("=")[1].split(",") == ["mlflow:*", "localhost:*", "127.0.0.1:*"]
    assert service["environment"]["MLFLOW_ALLOW_PICKLE_DESERIALIZATION"] == "false"
    config = configparser.ConfigParser()
    config.read(CLUSTER / "mlflow-auth.ini")
    assert set(config["mlflow"]) == {"default_permission", "database_uri", "authorization_function"}
    folder = config["mlflow"]["database_uri"].removeprefix("sqlite:///").rpartition("/")[0]
    assert f"auth:{folder}" in service["volumes"], "accounts outlive the container"


def test_mlflow_knows_every_option_and_variable() -> None:
    from click.testing import CliRunner
    from mlflow import environment_variables
    from mlflow.cli import server

    options = CliRunner().invoke(server, ["--help"]).output
    service = compose()["services"]["mlflow"]
    for word in service["command"][2:]:
        assert word.split("=")[0] in options, word
    for name in service["environment"]:
        known = hasattr(environment_variables, name) or name in options
        assert known or name.startswith("AWS_") or name == "MLFLOW_BACKEND_STORE_URI", name


@pytest.mark.skipif(
    shutil.which("docker") is None
    or subprocess.run(
        ["docker", "compose", "version"], capture_output=True, check=False
    ).returncode,
    reason="docker's compose plugin is not installed",
)
def test_compose_itself_reads_the_file(tmp_path: Path) -> None:
    environment = os.environ | dict.fromkeys(SAID, "aaaaaaaaaaaa")
    command = ["docker", "compose", "-f", str(CLUSTER / "compose.yaml"), "config", "--quiet"]
    subprocess.run(command, env=environment, check=True)
    environment.pop("RAY_AUTH_TOKEN")
    assert subprocess.run(command, env=environment, check=False).returncode


# Ray's launcher ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LAUNCHER)
def test_launcher_takes_the_file_and_not_one_with_a_typing_error(name: str) -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config

    validate_config(prepare_config(load(name)))
    wrong = load(name)
    wrong["max_wrkers"] = 3
    with pytest.raises(Exception, match="max_wrkers"):
        validate_config(prepare_config(wrong))


def test_cloud_file_obeys_the_schema_that_ray_ships() -> None:
    import jsonschema
    import ray

    schema = Path(ray.__file__).parent / "autoscaler" / "ray-schema.json"
    jsonschema.validate(load("ray-cluster.yaml"), json.loads(schema.read_text()))


@pytest.mark.parametrize("name", LAUNCHER)
def test_every_ray_start_of_the_launcher_wants_a_token_and_knows_its_options(name: str) -> None:
    from click.testing import CliRunner
    from ray.scripts.scripts import start

    options = CliRunner().invoke(start, ["--help"]).output
    found = load(name)
    for key in ("head_start_ray_commands", "worker_start_ray_commands"):
        (command,) = [line for line in found[key] if "ray start" in line]
        assert "RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH=/shared/secrets/ray-token" in command
        for option in re.findall(r"(--[a-z-]+)", command.partition("ray start")[2]):
            assert option in options
        if "--head" in command:
            assert "--dashboard-host=127.0.0.1" in command, "reached through ray dashboard, or SSH"
        subprocess.run(["bash", "-n"], input=command, text=True, check=True)


def test_cloud_head_is_on_demand_workers_are_spot_and_capacity_is_what_may_start() -> None:
    found = load("ray-cluster.yaml")
    kinds = dict(found["available_node_types"])
    head = kinds.pop(found["head_node_type"])
    assert "InstanceMarketOptions" not in head["node_config"]
    (worker,) = kinds.values()
    assert worker["node_config"]["InstanceMarketOptions"] == {"MarketType": "spot"}
    assert found["max_workers"] == worker["max_workers"]
    want = {k: v * worker["max_workers"] for k, v in worker["resources"].items()}
    (told,) = re.findall(r"ROBUST_MOE_CAPACITY=(\S+)", (CLUSTER / "ray-cluster.yaml").read_text())
    assert {k: int(v) for k, v in (item.split("=") for item in told.split(","))} == want


# KubeRay -----------------------------------------------------------------------------------------

JOB_KEYS = set(
    "entrypoint submissionMode shutdownAfterJobFinishes ttlSecondsAfterFinished "
    "activeDeadlineSeconds backoffLimit runtimeEnvYAML rayClusterSpec".split()
)
GROUP_KEYS = set("groupName replicas minReplicas maxReplicas rayStartParams template".split())
POD_KEYS = {"automountServiceAccountToken", "securityContext", "containers", "volumes"}


def test_ray_job_has_the_shape_that_kuberay_takes() -> None:
    """The keys of its resource definition, ray.io/v1; that file is too large to keep."""
    job = ray_job()
    assert (job["apiVersion"], job["kind"]) == ("ray.io/v1", "RayJob")
    spec = job["spec"]
    assert set(spec) == JOB_KEYS
    assert spec["submissionMode"] in ("K8sJobMode", "HTTPMode", "SidecarMode", "InteractiveMode")
    inner = spec["rayClusterSpec"]
    assert set(inner) == {"rayVersion", "authOptions", "headGroupSpec", "workerGroupSpecs"}
    assert inner["authOptions"] == {"mode": "token"}
    assert set(inner["headGroupSpec"]) == {"rayStartParams", "template"}
    assert set(yaml.safe_load(spec["runtimeEnvYAML"])) == {"env_vars"}
    for group in inner["workerGroupSpecs"]:
        assert set(group) == GROUP_KEYS
        assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
    for group in (inner["headGroupSpec"], *inner["workerGroupSpecs"]):
        assert all(isinstance(value, str) for value in group["rayStartParams"].values())
        pod = group["template"]["spec"]
        assert set(pod) == POD_KEYS
        assert pod["securityContext"]["runAsNonRoot"] is True
        volumes = {volume["name"] for volume in pod["volumes"]}
        for container in pod["containers"]:
            assert container["securityContext"]["allowPrivilegeEscalation"] is False
            assert {mount["name"] for mount in container["volumeMounts"]} <= volumes
            assert container["resources"]["limits"] == container["resources"]["requests"]


def test_entrypoint_of_the_job_is_a_command_that_the_grid_takes() -> None:
    words = ray_job()["spec"]["entrypoint"].split()
    assert words[:3] == ["python", "-m", "pipeline.grid"]
    given = read_arguments(words[3:], usage="", most_names=0)
    assert read_request(given.settings).configs


def test_upload_leaves_out_data_results_and_secrets() -> None:
    ignored = (ROOT / ".rayignore").read_text().split()
    for entry in ("/data/", "/runs/", "/mlruns/", "/mlflow.db*", "*.pt", "*.parquet", ".env"):
        assert entry in ignored
    assert set(load("runtime-env.yaml")) == {"excludes", "env_vars"}
