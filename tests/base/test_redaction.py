"""Which texts hold secrets, and what is left of them."""

import pytest

from orchestrator.base.redaction import redact, redact_all
from orchestrator.tracking.store import tracking_uri, ui_command

SECRET = "s3cr3t-of-16-characters"


@pytest.mark.parametrize(
    "text",
    [
        f"postgresql://host/db?password={SECRET}",
        f"postgresql://host/db?user=me&password={SECRET}&sslmode=require",
        f"postgresql+psycopg2://host/db?sslmode=require&sslpassword={SECRET}",
        f"mysql://host/db?passwd={SECRET}",
        f"http://host/?token={SECRET}",
        f"http://host:5000/api?access_token={SECRET}#part",
        f"http://host/?refresh-token={SECRET}",
        f"https://host/?API_KEY={SECRET}",
        f"https://host/?a=1;apikey={SECRET}",
        f"https://host/?key={SECRET}",
        f"https://host/?sig={SECRET}&se=2026",
        f"https://host/?signature={SECRET}",
        f"https://host/?client_secret={SECRET}",
        f"s3://bucket/a?access_key={SECRET}&region=eu",
        f"s3://bucket/a?AWSAccessKeyId={SECRET}",
        f"https://b.s3.amazonaws.com/k?X-Amz-Date=2&X-Amz-Credential={SECRET}/2&X-Amz-Signature={SECRET}",
        f"https://{SECRET}@host/x",
        f"https://{SECRET}:@host/x",
        f"https://:{SECRET}@host/x",
        f"git+https://{SECRET}@host/x",
        f"https://me:{SECRET}/a@b@host:1/x",
        f"POSTGRESQL://me:{SECRET}@host/db",
        f"Authorization: Bearer {SECRET}",
        f"authorization: basic {SECRET}",
        f"{{'Authorization': 'Bearer {SECRET}', 'Accept': '*/*'}}",
        f'"Proxy-Authorization": "{SECRET}"',
        f"401 for bearer {SECRET}",
        f"connect failed: host=h user=me password={SECRET} port=1",
        f"PGPASSWORD={SECRET} psql",
    ],
)
def test_secrets_are_neither_shown_nor_logged(text):
    for mask in (redact, redact_all):
        assert SECRET not in mask(f"see {text}, then")
        assert mask(f"see {text}, then").startswith("see ")
        assert mask(f"see {text}, then").endswith("then")


@pytest.mark.parametrize(
    "text",
    [
        "s3://bucket/a?region=eu-west-1",
        "s3://bucket/a?region=eu&endpoint_override=http://host:9000&scheme=http",
        "gs://bucket/keys/token/password.txt",
        "http://host:5000/path",
        "sqlite:////home/me/mlflow.db",
        "http://host/?page=2&keyboard=us&monkey=1&sort=asc&signal=9",
        "token ring, bearer of news, bearer authentication, password: see client.env",
        "authorization failed",
        "me@host.example",
        "lr = 0.01, seed = 7",
        "--token is no flag",
        "a key=value pair",
    ],
)
def test_what_is_no_secret_stays(text):
    assert redact(text) == text
    assert redact_all(text) == text


def test_the_address_in_use_keeps_its_query_and_is_shown_without(monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://host/?token={SECRET}")
    assert tracking_uri() == f"http://host/?token={SECRET}"
    assert ui_command(tracking_uri()) == "open http://host/?token=*** in a browser"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"postgresql://host/db?password={SECRET}")
    assert SECRET not in ui_command(tracking_uri())
