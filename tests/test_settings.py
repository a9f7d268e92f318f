"""Settings, read in this process: what is refused, how it is said, and what is not refused."""

import os
import secrets
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import asyncpg
import pytest

from bon_scheduler import declared
from bon_scheduler.addresses import describe_database
from bon_scheduler.config import Settings
from bon_scheduler.database import DatabaseUnavailableError, connections
from bon_scheduler.environment import SettingsError

USABLE = {"DATABASE_URL": "postgresql://bon@127.0.0.1/bon"}


def read(**environ: str) -> Settings:
    return declared.read_settings(USABLE | environ)


def faults(**environ: str) -> list[str]:
    """The faults that are named, one a line."""
    with pytest.raises(SettingsError) as caught:
        read(**environ)
    return [line.removeprefix("  - ") for line in str(caught.value).splitlines()[1:]]


@pytest.mark.parametrize("name", ["DATABASE_URL", "DATABASE_LISTEN_URL"])
@pytest.mark.parametrize(
    "url",
    [
        *(f"postgresql://bon:S3c{sign}77tPW@127.0.0.1:1/bon" for sign in "#/?@[]\u2100"),
        *(f"postgresql://bon:77{sign}S3ctPW@127.0.0.1:1/bon" for sign in "#/?"),
        "postgresql://bon:77?a=S3c@127.0.0.1:1/bon",
        "postgresql://bon@127.0.0.1:1/bon\nS3c",
        "postgresql://bon:77@S3c/tPW@127.0.0.1:1/bon",
    ],
)
def test_a_password_that_takes_the_address_apart_is_refused_and_no_part_of_it_is_shown(name: str, url: str) -> None:
    (fault,) = faults(**{name: url})
    assert fault.startswith(f"{name}: ")
    assert "/ as %2F" in fault
    assert "S3c" not in fault
    assert "77" not in fault
    assert "tPW" not in fault


@pytest.mark.parametrize(
    "rest",
    ["h:99999/bon", "h:0/bon", "h:-1/bon", "h:port/bon", "h:1,h2:x/bon", "/bon?port=x", "/bon?host=h:x", "[::1]:x/bon"],
)
def test_a_port_that_is_none_is_refused(rest: str) -> None:
    (fault,) = faults(DATABASE_URL=f"postgresql://{rest}")
    assert fault.startswith("DATABASE_URL: has a port that is not a number from 1 to 65535")


@pytest.mark.parametrize("rest", ["h,/bon", ",h/bon", "/bon?host=h,", "[::1/bon", "h/bon?ssl", "h/bon#1"])
def test_an_address_that_is_none_is_refused(rest: str) -> None:
    (fault,) = faults(DATABASE_URL=f"postgresql://{rest}")
    assert fault.startswith("DATABASE_URL: ")


@pytest.mark.parametrize(
    ("rest", "says"),
    [
        ("bon:S3c%23%2F%3F%40tPW@127.0.0.1:1/bon", "bon at 127.0.0.1:1"),
        ("bon:S3c%tPW@127.0.0.1:1/bon", "bon at 127.0.0.1:1"),
        ("bon:S3c tPW:a,b;c=&d@127.0.0.1:1/bon", "bon at 127.0.0.1:1"),
        ("bon%40server:S3c@127.0.0.1:1", "(default) at 127.0.0.1:1"),
        ("127.0.0.1:1,[::1]:1/bon", "bon at 127.0.0.1:1, [::1]:1"),
        ("bon:S3c@127.0.0.1:1,127.0.0.1:2/bon?target_session_attrs=read-write", "bon at 127.0.0.1:1, 127.0.0.1:2"),
        ("/bon?host=/nowhere", "bon at /nowhere"),
        ("/?host=127.0.0.1:1,127.0.0.1:2&dbname=bon&user=bon@server", "bon at 127.0.0.1:1, 127.0.0.1:2"),
        ("?host=/nowhere&port=5433&user=bon@server&database=bon", "bon at /nowhere:5433"),
        ("bon@%2Fnowhere:7/bon", "bon at /nowhere:7"),
        ("127.0.0.1:1/bon?user=bon@server&password=S3c@", "bon at 127.0.0.1:1"),
        ("bon@127.0.0.1:1/b%40n?sslmode=disable&passfile=/nowhere", "b@n at 127.0.0.1:1"),
        ("bon@127.0.0.1:1/bon?application_name=bon@prod&options=-c%20a.b%3D1&connect_timeout=3", "bon at 127.0.0.1:1"),
        ("127.0.0.1:1/bon?", "bon at 127.0.0.1:1"),
    ],
)
async def test_whatever_asyncpg_takes_is_taken_and_named_without_its_password(rest: str, says: str) -> None:
    """Nothing answers there: asyncpg has understood an address that it tried to connect to."""
    url = f"postgresql://{rest}"
    assert describe_database(url) == f"the database {says}"
    with pytest.raises(DatabaseUnavailableError, match="Is PostgreSQL running there") as caught:
        async with connections.connect(read(DATABASE_URL=url).database_url.get_secret_value()):
            pass
    assert isinstance(caught.value.__cause__, OSError), repr(caught.value.__cause__)
    assert not isinstance(caught.value.__cause__, asyncpg.InterfaceError)
    assert f"the database {says} does not answer (" in str(caught.value)
    assert "S3c" not in str(caught.value)


SECRETS: dict[str, dict[str, str]] = {
    "DATABASE_URL": {},
    "DATABASE_LISTEN_URL": {},
    "METRICS_TOKEN": {},
    "SMTP_PASSWORD": {"SMTP_USERNAME": "bon"},
    "SHAAM_ENCRYPTION_KEY": {},
    "SHAAM_CLIENT_ID": {},
    "SHAAM_CLIENT_SECRET": {},
}


@pytest.mark.parametrize("name", SECRETS)
@pytest.mark.parametrize(
    ("content", "says"), [(b"", "is empty"), (b" \n", "is empty"), (b"\xff\xfes3cret", "is not text (UTF-8)")]
)
def test_a_secrets_file_without_a_usable_secret_is_named(tmp_path: Path, name: str, content: bytes, says: str) -> None:
    file = tmp_path / "secret"
    file.write_bytes(content)
    with pytest.raises(SettingsError) as caught:
        declared.read_settings(
            {**({} if name == "DATABASE_URL" else USABLE), **SECRETS[name], f"{name}_FILE": str(file)}
        )
    (fault,) = str(caught.value).splitlines()[1:]
    assert fault.startswith(f'  - {name}_FILE: "{file}" {says}')


WEB = ("APP_ORIGIN", "SHAAM_TOKEN_URL", "DEADMAN_URL_DRAFT_CLEANUP")


@pytest.mark.parametrize("name", WEB)
@pytest.mark.parametrize(
    "url",
    ["https://[bad", "https://h:99999/x", "https://h:0", "https://h:x", "https://", "ftp://h/x", "h/x", "https://h/a b",
     'https://h/"><b>', "https://h/\tx", "ftp://bon:s3cret@h/x"],
)  # fmt: skip
def test_a_web_address_that_is_none_is_refused_and_never_shown_with_a_password(name: str, url: str) -> None:
    (fault,) = faults(**{name: url})
    assert fault.startswith(f"{name}: must be an http(s) address")
    assert "s3cret" not in fault


def test_only_an_address_that_is_a_secret_holds_a_password() -> None:
    url = "https://bon:s3cret@h/x"
    found = faults(APP_ORIGIN=url, SHAAM_TOKEN_URL=url, DEADMAN_URL_DRAFT_CLEANUP=url)
    what = "must be an http(s) address without a user or password"
    assert found == [f"APP_ORIGIN: {what}", f"SHAAM_TOKEN_URL: {what}"]


@pytest.mark.parametrize("name", ["APP_ORIGIN", "DEADMAN_URL_DRAFT_CLEANUP"])
@pytest.mark.parametrize("url", ["https://h/?y=1", "https://h#f", "https://h/x?"])
def test_an_address_that_is_the_beginning_of_others_has_no_query_or_fragment(name: str, url: str) -> None:
    (fault,) = faults(**{name: url})
    assert fault.startswith(f"{name}: must be an http(s) address without ? and #")


@pytest.mark.parametrize("url", ["https://h", "https://h:8443/x/y", "https://בון.קום/א", "http://[::1]:80/x"])
def test_a_web_address_is_taken(url: str) -> None:
    assert read(APP_ORIGIN=url, DEADMAN_URL_DRAFT_CLEANUP=url).app_origin == url


@pytest.mark.parametrize("name", ["SMTP_HOST", "HEALTH_HOST"])
@pytest.mark.parametrize("host", ["smtp://mail", "mail:25", "exa mple", "mail/", "[::1]", "mail..example"])
def test_a_host_that_is_more_than_one_is_refused(name: str, host: str) -> None:
    (fault,) = faults(**{name: host})
    assert fault.startswith(f"{name}: must be a host's name or number alone")
    assert fault.endswith(f'(it is "{host}")')


@pytest.mark.parametrize("name", ["SMTP_HOST", "HEALTH_HOST", "SMTP_PORT", "SHAAM_TOKEN_URL", "UNSUBSCRIBE_URL"])
@pytest.mark.parametrize(
    "value",
    [
        "bon:s3cret@mail.example", "smtp://bon:s3cret@mail.example:587", "smtps://bon:s3cret%40mail.example",
        "bon:s3cret", "//bon:s3cret@mail.example", "bon%40shop.example:s3cret@mail.example", "ftp://h/?key=s3cret",
    ],
)  # fmt: skip
def test_a_setting_that_may_hold_a_password_is_not_shown(name: str, value: str) -> None:
    (fault,) = faults(**{name: value})
    assert "s3cret" not in fault or (value == "bon:s3cret" and not name.endswith("_HOST"))
    assert fault.startswith(f"{name}: ")


@pytest.mark.parametrize("secret", ["hunter2-s3cret", "s3cret/with/slashes=="])
def test_a_secret_in_place_of_its_files_name_is_not_shown(secret: str) -> None:
    (fault,) = faults(METRICS_TOKEN_FILE=secret)
    assert fault == "METRICS_TOKEN_FILE: the file it names cannot be read (No such file or directory)"


@pytest.mark.parametrize(
    "host", ["mail", "mail.example.com", "mail.example.com.", "127.0.0.1", "::1", "fe80::1%eth0", "דואר.קום", "a_b-c"]
)
def test_a_host_is_taken(host: str) -> None:
    assert read(SMTP_HOST=host, HEALTH_HOST=host).smtp_host == host


def test_what_a_setting_may_be_is_said() -> None:
    assert faults(EMAIL_LANGUAGE="fr") == ["EMAIL_LANGUAGE: input should be 'he' or 'en' (it is \"fr\")"]


def test_faults_of_every_kind_are_named_at_once(tmp_path: Path) -> None:
    empty, binary = tmp_path / "empty", tmp_path / "binary"
    empty.touch()
    binary.write_bytes(b"\xff")
    found = faults(
        DATABASE_URL="postgresql://bon:S3c#t@h/bon",
        METRICS_TOKEN_FILE=str(empty),
        SMTP_PASSWORD_FILE=str(binary),
        SMTP_HOST="mail:25",
        APP_ORIGIN="https://[bad",
        DEADMAN_URL_DRAFT_CLEANUP="https://[bad",
        WORKER_CONCURRENCY="1",
    )
    assert sorted(fault.partition(":")[0] for fault in found) == [
        "APP_ORIGIN", "DATABASE_URL", "DEADMAN_URL_DRAFT_CLEANUP", "METRICS_TOKEN_FILE", "SMTP_HOST",
        "SMTP_PASSWORD_FILE", "SMTP_USERNAME", "WORKER_CONCURRENCY",
    ]  # fmt: skip


NO_PLACES = ["right/Asia/Jerusalem", "posix/UTC", "localtime", "posixrules", "Factory", "../UTC"]


@pytest.mark.parametrize("zone", NO_PLACES)
def test_a_zone_that_is_no_place_is_refused(zone: str) -> None:
    with pytest.raises(SettingsError, match="IANA name"):
        read(BON_TIMEZONE=zone)


# owner, group, mode, and what is said. The groups of this process end with the one that is given for it.
SPOOLS = [
    (None, None, 0o700, None),
    (None, None, 0o755, None),
    (None, "ours", 0o2770, None),
    (None, "ours", 0o2775, None),
    (None, "theirs", 0o2750, None),
    (None, "theirs", 0o2770, "must not be writable by a group this process is not in"),
    (None, None, 0o777, "must not be writable by everybody"),
    (None, None, 0o1777, "must not be writable by everybody"),
    (None, "ours", 0o2777, "must not be writable by everybody"),
    (65534, None, 0o700, "must belong to the user this process runs as, or to root"),
    (65534, "ours", 0o2770, "must belong to the user this process runs as, or to root"),
]


@pytest.mark.skipif(os.geteuid() != 0, reason="directories of others are root's to make")
@pytest.mark.parametrize(("owner", "group", "mode", "says"), SPOOLS)
def test_a_spool_that_others_may_write_is_refused(
    tmp_path: Path, owner: int | None, group: str | None, mode: int, says: str | None
) -> None:
    spool = tmp_path / "spool"
    spool.mkdir()
    os.chown(spool, owner or 0, {"ours": os.getgid(), "theirs": 54321, None: 0}[group])
    spool.chmod(mode)
    if says is None:
        assert read(SPOOL_DIR=str(spool)).spool_dir == spool
        return
    (fault,) = faults(SPOOL_DIR=str(spool))
    assert fault.startswith(f"SPOOL_DIR: {says}")
    assert str(spool) in fault


@pytest.mark.skipif(os.geteuid() != 0, reason="users and groups are root's to choose")
def test_a_volume_that_kubernetes_mounts_with_a_group_is_taken_by_who_is_in_that_group() -> None:
    """It is root's, and the process runs as a user whose only way in is the group: here in a process of its own."""
    code = """if True:
        import os, sys
        from pathlib import Path
        from bon_scheduler.files import fault_of_shared_directory
        os.setgroups([2000])
        os.setgid(65532)
        os.setuid(65532)
        print(fault_of_shared_directory(Path(sys.argv[1])))
        Path(sys.argv[1], "x").touch()
    """
    with tempfile.TemporaryDirectory() as name:
        os.chown(name, 0, 2000)
        Path(name).chmod(0o2770)
        told = subprocess.run([sys.executable, "-c", code, name], capture_output=True, text=True, check=False)
    assert told.stdout.strip() == "None", told.stderr
    assert told.returncode == 0, told.stderr


ASCENDING = bytes(range(32))


@pytest.mark.parametrize(
    "key",
    [bytes(32), b"\xff" * 32, b"\xab" * 32, ASCENDING, bytes(reversed(ASCENDING)), bytes(range(0, 256, 8)),
     bytes(n % 256 for n in range(240, 272)), b"\xde\xad\xbe\xef" * 8, bytes.fromhex("0123456789abcdef" * 4),
     bytes.fromhex("00112233445566778899aabbccddeeff" * 2), bytes(31) + b"\x01", bytes(16) + ASCENDING[:16]],
    ids=bytes.hex,
)  # fmt: skip
@pytest.mark.parametrize("write", [bytes.hex, lambda key: key.hex().upper()])
def test_a_key_that_anybody_would_try_is_refused_with_how_to_make_one(
    key: bytes, write: Callable[[bytes], str]
) -> None:
    (fault,) = faults(SHAAM_ENCRYPTION_KEY=write(key))
    assert fault.startswith("SHAAM_ENCRYPTION_KEY: must be random")
    assert "secrets.token_hex(32)" in fault
    assert key.hex() not in fault.lower()


def test_no_random_key_is_refused() -> None:
    for _ in range(1000):
        read(SHAAM_ENCRYPTION_KEY=secrets.token_hex(32))


def test_a_schedule_for_a_job_that_needs_a_payload_is_refused() -> None:
    (told,) = faults(SCHEDULE_NOTIFY_REAUTH="0 6 * * *")
    assert told.startswith('SCHEDULE_NOTIFY_REAUTH: "0 6 * * *" cannot be the schedule of "notify-reauth": ')
    assert "no default, and a run that a schedule asks for is given no payload" in told
    assert read(SCHEDULE_NOTIFY_REAUTH="").schedules == {"notify-reauth": ""}
