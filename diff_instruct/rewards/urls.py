"""URLs of judges elsewhere, as the command line has them. Imports no networks."""

from urllib.parse import urlsplit


TOKEN = "REWARD_TOKEN"  # in the environment, for `Authorization: Bearer`: arguments are recorded


def is_url(name):
    """Whether a reward's name is a URL."""
    return name.startswith(("http://", "https://"))


def check_url(url):
    """What is wrong with the URL of a judge, in words; None if it can be asked."""
    parts = urlsplit(url)
    try:
        if not parts.hostname or parts.port == 0:
            return "it names no host"
    except ValueError:
        return "its port is no number"
    if parts.username is not None or parts.query or parts.fragment:
        return f"a URL is recorded with the arguments: put a token into the environment variable {TOKEN}"
    if not parts.path.rpartition("/")[2]:
        return "its path is empty, whose last part names the judge, as in http://localhost:8000/ocr"
    return None
