"""Secrets out of text that others read: logs, error bodies, the audit log (reliability S17).

The last guard. Nothing is to write one there in the first place, but the text of an exception, of
another program's answer or of a field that a user has mixed up is not ours to know.
"""

import re

PATTERNS = {
    "API keys": re.compile(r"(\btml-)[\w-]{8,}"),
    "Hub tokens": re.compile(r"(\bhf_)[A-Za-z0-9]{8,}"),
    "passwords in URLs": re.compile(r"(://[^/\s:@]*:)[^/\s@]+(?=@)"),
    # Of S3, in its links and in what it says of a wrong one, and of our own links.
    "signatures": re.compile(
        r"((?:Signature|Credential|Security-Token|AccessKeyId|SignatureProvided)[=>])[^&\s<'\"]+",
        re.IGNORECASE,
    ),
    "tokens in headers": re.compile(r"(\bBearer )[\w.~+/=-]+", re.IGNORECASE),
}
"""What is matched -> a pattern whose first group stays."""


def redact(text: str) -> str:
    """The text with `***` for every secret that can be told by its form."""
    for pattern in PATTERNS.values():
        text = pattern.sub(r"\1***", text)
    return text
