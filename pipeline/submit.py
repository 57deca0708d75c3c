"""Send a command to a cluster: ``python -m pipeline.submit -- python -m pipeline.train ...``."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from pipeline.cli.arguments import fail, main, read_arguments
from pipeline.distributed.dashboard import DASHBOARD, is_loopback, look_at_dashboard

USAGE = """
usage: python -m pipeline.submit [id=NAME] [--insecure] [--no-wait] -- COMMAND ...

Run a command of this project on the Ray cluster whose dashboard is RAY_ADDRESS (default:
http://127.0.0.1:8265), and show its lines until it ends; its exit code is 1 if it failed.
The project's folder goes along, without what .gitignore and .rayignore name.

  id=NAME     name of the job; must be new to the cluster
  --no-wait   leave once the job is there: ray job logs --follow NAME
  --insecure  send it although anybody who reaches the dashboard can run code there

Of your environment the job gets MLFLOW_TRACKING_URI, ROBUST_MOE_DATA and ROBUST_MOE_CACHE, which
must be good on the cluster's machines. Passwords stay behind: set them where the head starts.
"""
ROOT = Path(__file__).parents[1]
PASSED = ("MLFLOW_TRACKING_URI", "ROBUST_MOE_DATA", "ROBUST_MOE_CACHE")
SECRET = re.compile(r"PASSWORD|PASSWD|SECRET|TOKEN|CREDENTIAL|ACCESS_KEY|API_KEY", re.IGNORECASE)


def run(argv: list[str]) -> int:
    """Check the way to the cluster, then hand the command over; returns the exit code."""
    split = argv.index("--") if "--" in argv else len(argv)
    flags = ("--insecure", "--no-wait")
    given = read_arguments(argv[:split], usage=USAGE, flags=flags, most_names=0)
    if unknown := set(given.settings) - {"id"}:
        raise ValueError(f"no key {min(unknown)!r}, only id")
    if not (command := argv[split + 1 :]):
        raise ValueError("no command; write it after --: -- python -m pipeline.train epochs=1")
    address = os.environ.get("RAY_ADDRESS") or DASHBOARD
    if urlsplit(address).scheme not in ("http", "https"):
        raise ValueError(f"RAY_ADDRESS must be the dashboard's http(s) URL, got {address!r}")
    environment = runtime_environment(os.environ)
    if problem := obstacle(address, insecure="--insecure" in given.flags):
        return fail(problem, 1)
    words = ["--address", address, "--runtime-env-json", json.dumps(environment)]
    words += ["--submission-id", given.settings["id"]] if "id" in given.settings else []
    words += ["--no-wait"] if "--no-wait" in given.flags else []
    return subprocess.call([ray_command(), "job", "submit", *words, "--", *command])


def obstacle(address: str, *, insecure: bool) -> str:
    """Say why nothing may be sent to a dashboard; empty: all is well.

    Sets ``RAY_AUTH_MODE`` for the submission, since without it Ray sends no token.
    """
    found = look_at_dashboard(address)
    if found.state == "open":
        os.environ["RAY_AUTH_MODE"] = "disabled"
        if not is_loopback(address) and not insecure:
            return (
                f"the dashboard at {address} is open: whoever reaches it can run code there. Start "
                "it with RAY_AUTH_MODE=token, or say --insecure if its network is yours alone"
            )
        return ""
    os.environ["RAY_AUTH_MODE"] = "token"
    if found.state == "ready":
        if address.startswith("http://") and not is_loopback(address):
            print(
                f"warning: token and code go to {address} unencrypted; an SSH tunnel does not: "
                "ssh -L 8265:127.0.0.1:8265 HEAD",
                file=sys.stderr,
            )
        return ""
    return {
        "away": f"no dashboard answers at {address} ({found.detail}); is the head running, and "
        "the SSH tunnel open? RAY_ADDRESS names another",
        "no token": f"the dashboard at {address} wants a token and there is none here; set "
        "RAY_AUTH_TOKEN_PATH to a file with the head's token (there: ray get-auth-token)",
        "wrong token": f"the dashboard at {address} refused the token ({found.detail}); copy the "
        "head's again (there: ray get-auth-token)",
        "other": f"what answers at {address} is not Ray's dashboard ({found.detail})",
    }[found.state]


def runtime_environment(environ: Mapping[str, str]) -> dict[str, Any]:
    """Read ``cluster/runtime-env.yaml`` and add what the job gets of this environment.

    Raises:
        ValueError: It would hold a secret: the dashboard shows it to everybody who may look.
    """
    import yaml  # type: ignore[import-untyped]

    made: dict[str, Any] = yaml.safe_load((ROOT / "cluster" / "runtime-env.yaml").read_text())
    variables = {**made.get("env_vars", {}), **{k: environ[k] for k in PASSED if environ.get(k)}}
    for key, value in variables.items():
        if SECRET.search(key) or re.search(r"://[^/@\s]*:[^/@\s]*@", str(value)):
            raise ValueError(
                f"{key} must not hold a password: a job's environment is shown in the dashboard; "
                "set it where the head starts (MLFLOW_TRACKING_USERNAME, MLFLOW_TRACKING_PASSWORD)"
            )
    variables["ROBUST_MOE_COMMIT"] = commit()  # the copy on the cluster has no .git
    return made | {"working_dir": str(ROOT), "env_vars": variables}


def commit() -> str:
    """Name the commit that is sent."""
    from pipeline.tracking.open_run import commit

    return commit()


def ray_command() -> str:
    """Find the ``ray`` of this interpreter."""
    beside = Path(sys.executable).with_name("ray")
    found = str(beside) if beside.exists() else shutil.which("ray")
    if not found:
        raise ValueError("no ray command here: pip install -c constraints.txt -e .")
    return found


if __name__ == "__main__":
    main(run)
