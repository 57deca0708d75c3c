"""What is asked of a server, what is not sent to it, and which dashboards get nothing."""

import os
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from pipeline import submit
from pipeline.distributed.dashboard import ask, is_loopback, look_at_dashboard, ray_token

TOKEN = "a" * 64


class Server:
    """A dashboard that wants ``token`` (none: it is open), and remembers what it was shown."""

    def __init__(self, token: str = "") -> None:
        seen = self.seen = list[tuple[str, str]]()

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                shown = self.headers.get("Authorization", "")
                seen.append((self.path, shown))
                if self.path.startswith("/elsewhere"):
                    self.send_response(302)
                    self.send_header("Location", "/stolen")
                    self.end_headers()
                    return
                good = not token or shown == f"Bearer {token}"
                self.send_response(200 if good else 403 if shown else 401)
                self.end_headers()
                self.wfile.write(b'{"ray_version": "2.60.0"}' if good else b"refused")

            def log_message(self, *_: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("0.0.0.0", 0), Handler)
        self.port = self.server.server_port
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    @property
    def remote(self) -> str:
        """An address that is not loopback by its looks, and leads to this machine."""
        return f"http://0.0.0.0:{self.port}"

    @property
    def local(self) -> str:
        return f"http://127.0.0.1:{self.port}"


@pytest.fixture
def opened() -> Iterator[Server]:
    made = Server()
    yield made
    made.server.shutdown()


@pytest.fixture
def closed() -> Iterator[Server]:
    made = Server(TOKEN)
    yield made
    made.server.shutdown()


@pytest.fixture(autouse=True)
def no_token(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("RAY_AUTH_TOKEN", raising=False)
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "none"))
    monkeypatch.setenv("RAY_AUTH_MODE", "token")


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    calls: list[list[str]] = []

    def call(words: list[str]) -> int:
        calls.append([os.environ["RAY_AUTH_MODE"], *words])
        return 0

    monkeypatch.setattr(submit.subprocess, "call", call)
    return calls


COMMAND = ["--", "python", "-m", "pipeline.train", "epochs=1"]


@pytest.mark.parametrize(
    ("url", "want"),
    [
        ("http://127.0.0.1:8265", True),
        ("http://127.9.9.9", True),
        ("http://[::1]:8265", True),
        ("http://localhost:8265", True),
        ("http://127.0.0.1.example.com", False),
        ("http://localhost@example.com", False),
        ("http://0.0.0.0:8265", False),
        ("http://10.0.0.1:8265", False),
        ("", False),
    ],
)
def test_only_addresses_of_this_machine_are_loopback(url: str, want: bool) -> None:
    assert is_loopback(url) is want


def test_token_is_found_where_ray_finds_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert ray_token() == ""
    (tmp_path / "file").write_text(f"{TOKEN}\n")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "file"))
    assert ray_token() == TOKEN
    monkeypatch.setenv("RAY_AUTH_TOKEN", "b" * 64)
    assert ray_token() == "b" * 64


def test_states_of_a_dashboard(
    opened: Server, closed: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert look_at_dashboard(opened.local).state == "open"
    assert look_at_dashboard(closed.local).state == "no token"
    monkeypatch.setenv("RAY_AUTH_TOKEN", "b" * 64)
    assert look_at_dashboard(closed.local).state == "wrong token"
    monkeypatch.setenv("RAY_AUTH_TOKEN", TOKEN)
    assert look_at_dashboard(closed.local).state == "ready"
    assert look_at_dashboard("http://127.0.0.1:9").state == "away"


def test_open_dashboard_is_never_shown_the_token(
    opened: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_AUTH_TOKEN", TOKEN)
    look_at_dashboard(opened.local)
    assert [shown for _, shown in opened.seen] == [""]


def test_redirect_is_not_followed_with_the_token(closed: Server) -> None:
    answer = ask(f"{closed.local}/elsewhere", headers={"Authorization": f"Bearer {TOKEN}"})
    assert answer.status == 302
    assert [path for path, _ in closed.seen] == ["/elsewhere"]


# Submission --------------------------------------------------------------------------------------


def test_nothing_is_sent_to_an_open_remote_dashboard_unless_insecure_is_said(
    opened: Server,
    monkeypatch: pytest.MonkeyPatch,
    sent: list[list[str]],
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", opened.remote)
    assert submit.run(COMMAND) == 1
    err = capsys.readouterr().err
    assert len(err.splitlines()) == 1
    assert "is open" in err
    assert "--insecure" in err
    assert not sent
    assert submit.run(["--insecure", *COMMAND]) == 0
    assert len(sent) == 1
    monkeypatch.setenv("RAY_ADDRESS", opened.local)
    assert submit.run(COMMAND) == 0, "on loopback it is this machine's own affair"
    assert sent[1][0] == "disabled", "so Ray does not send the token either"


def test_closed_dashboard_gets_the_command_with_the_right_token_alone(
    closed: Server,
    monkeypatch: pytest.MonkeyPatch,
    sent: list[list[str]],
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", closed.local)
    assert submit.run(COMMAND) == 1
    assert "wants a token" in capsys.readouterr().err
    monkeypatch.setenv("RAY_AUTH_TOKEN", "b" * 64)
    assert submit.run(["--insecure", *COMMAND]) == 1
    assert "refused the token" in capsys.readouterr().err
    assert not sent
    monkeypatch.setenv("RAY_AUTH_TOKEN", TOKEN)
    assert submit.run(["id=grid-1", "--no-wait", *COMMAND]) == 0
    (words,) = sent
    assert words[0] == "token"
    assert words[-5:] == COMMAND
    assert words[words.index("--submission-id") + 1] == "grid-1"
    assert TOKEN not in " ".join(words)
    assert capsys.readouterr().err == ""
    monkeypatch.setenv("RAY_ADDRESS", closed.remote)
    assert submit.run(COMMAND) == 0
    assert "unencrypted" in capsys.readouterr().err


def test_dashboard_that_is_away_ends_with_one_line(
    monkeypatch: pytest.MonkeyPatch, sent: list[list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "http://127.0.0.1:9")
    assert submit.run(COMMAND) == 1
    assert "no dashboard answers at http://127.0.0.1:9" in capsys.readouterr().err
    assert not sent


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--wrong", *COMMAND], "no option '--wrong'"),
        (["name=a", *COMMAND], "no key 'name', only id"),
        (["id=a"], "no command"),
        (["python", *COMMAND], "at most 0 name"),
    ],
)
def test_bad_command_line_of_submit_is_refused(argv: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        submit.run(argv)


def test_runtime_environment_passes_places_and_no_secret() -> None:
    environ = {
        "MLFLOW_TRACKING_URI": "http://mlflow:5000",
        "MLFLOW_TRACKING_PASSWORD": "hunter2",
        "RAY_AUTH_TOKEN": TOKEN,
        "AWS_SECRET_ACCESS_KEY": "hunter2",
    }
    made = submit.runtime_environment(environ)
    assert made["env_vars"]["MLFLOW_TRACKING_URI"] == "http://mlflow:5000"
    assert made["env_vars"]["ROBUST_MOE_COMMIT"]
    assert "hunter2" not in str(made)
    assert TOKEN not in str(made)


def test_password_in_a_uri_is_not_sent() -> None:
    with pytest.raises(ValueError, match="MLFLOW_TRACKING_URI must not hold a password") as caught:
        submit.runtime_environment({"MLFLOW_TRACKING_URI": "http://me:hunter2@mlflow:5000"})
    assert "hunter2" not in str(caught.value)
