"""What is wrong with a web address or a host in a setting. Never quotes any part of one."""

import ipaddress
import re
from urllib.parse import urlsplit

__all__ = ["fault_of_host", "fault_of_web_address"]

NOT_IN_WEB_ADDRESS = re.compile(r'[\x00-\x20\x7f-\xa0"<>\\^`{|}]')
HOST_NAME = re.compile(r"[\w-]+(\.[\w-]+)*\.?")


def fault_of_web_address(url: str, *, begins: bool = False, secret: bool = False) -> str | None:
    """Return why an http(s) address is of no use, else None. One that `begins` others is added to; a secret logs in."""
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:
        return "must be an http(s) address such as https://app.example.com, with a port up to 65535 if with any"
    if parts.scheme not in {"http", "https"} or not parts.hostname or port == 0:
        return "must be an http(s) address such as https://app.example.com"
    if NOT_IN_WEB_ADDRESS.search(url):
        return "must be an http(s) address without spaces, quotes or brackets; percent-encode them"
    if "@" in parts.netloc and not secret:
        return "must be an http(s) address without a user or password"
    if begins and ("?" in url or "#" in url):
        return "must be an http(s) address without ? and #, because it is the beginning of others"
    return None


def fault_of_host(host: str) -> str | None:
    """Return why the name or number of a host is none, else None."""
    try:
        ipaddress.ip_address(host)
    except ValueError:
        if not HOST_NAME.fullmatch(host):
            return "must be a host's name or number alone, without scheme, port, brackets or spaces"
    return None
