"""What a model's source says of its licence: its card's front matter, else its LICENSE file, else what mskd knows.

    licence_of("smollm2-135m", folder)            # Licence("apache-2.0", where="known to mskd")
    together([teacher_licence, student_licence])  # what the card of a model made from both can claim

Nothing is guessed: of a source that says nothing the licence is None.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mskd.models.sources import KNOWN, hub_id

ID = re.compile(r"[a-z0-9][a-z0-9.+_-]*")  # what the hub's names of licences look like

# How the texts of licences begin, and how the hub names them.
TEXTS = (
    (r"apache license,? version 2\.0", "apache-2.0"),
    (r"(the )?mit license", "mit"),
    (r"llama 2 community license", "llama2"),
    (r"(meta )?llama 3 community license", "llama3"),
    (r"llama 3\.1 community license", "llama3.1"),
    (r"llama 3\.2 community license", "llama3.2"),
    (r"llama 3\.3 community license", "llama3.3"),
    (r"gemma terms of use", "gemma"),
)


@dataclass(frozen=True)
class Licence:
    """A licence as cards on the hub have it: `id` is one of the hub's; "other" has a name, and a link where known."""

    id: str
    name: str | None = None
    link: str | None = None
    where: str = ""  # it was found

    @property
    def shown(self) -> str:
        return self.name if self.id == "other" and self.name else self.id


def front_matter(folder: Path) -> dict[str, Any]:
    """The metadata of a model folder's own card, {} where it has none or it cannot be read."""
    from huggingface_hub import metadata_load

    path = folder / "README.md"
    if not path.is_file():  # a pipe would keep us for ever
        return {}
    try:
        return metadata_load(path) or {}
    except Exception:  # no such file, no UTF-8, no YAML: a folder may hold anything
        return {}


def licence_of(source: str, folder: Path) -> Licence | None:
    """The licence of a source that was resolved to `folder`; None where nothing says it."""
    said = _of_card(front_matter(folder), hub_id(source)) or _of_file(folder)
    if said is None and source in KNOWN and hub_id(source) == KNOWN[source].hub:
        return Licence(KNOWN[source].licence, where="known to mskd")
    return said


def languages_of(folder: Path) -> list[str]:
    """The languages that a folder's card names."""
    said = front_matter(folder).get("language")
    return [x for x in (said if isinstance(said, list) else [said]) if isinstance(x, str)]


def together(licences: Iterable[Licence | None]) -> Licence:
    """The licence that a model made from several can claim: theirs if it is one, else "other" with a name."""
    found = list(licences)
    known = {x.shown: x for x in found if x is not None}
    if len(known) == 1 and None not in found:
        return next(iter(known.values()))
    return Licence("other", "see-the-teacher" if None in found or not known else "-and-".join(sorted(known)))


def _of_card(said: dict[str, Any], hub: str | None) -> Licence | None:
    identity = said.get("license")
    if isinstance(identity, list) and len(identity) == 1:
        identity = identity[0]
    if not isinstance(identity, str) or not ID.fullmatch(identity.strip().lower()):
        return None
    identity = identity.strip().lower()
    if identity != "other":
        return None if identity == "unknown" else Licence(identity, where="by its card")
    name, link = (x if isinstance(x, str) else None for x in (said.get("license_name"), said.get("license_link")))
    if link and "://" not in link:  # a file beside the card
        link = f"https://huggingface.co/{hub}/blob/main/{link}" if hub else None
    return Licence("other", _slug(name), link, "by its card") if name else None


def _of_file(folder: Path) -> Licence | None:
    """The licence whose text stands in the folder; a text that is not known gives its title as a name."""
    for path in sorted(f for f in folder.glob("[Ll][Ii][Cc][Ee][Nn][CcSs][Ee]*") if f.is_file()):
        text = path.read_text(encoding="utf-8", errors="replace")[:4000]
        stripped = [line.strip(" #*=-\t") for line in text.splitlines()]
        lines = [line for line in stripped if line and not line.lower().startswith("copyright")]
        start = " ".join(" ".join(lines).lower().split())
        known = next((identity for begins, identity in TEXTS if re.match(begins, start)), None)
        if known:
            return Licence(known, where=f"by its file {path.name}")
        if start:
            name = _slug(lines[0]) if len(lines[0]) <= 60 else ""
            return Licence("other", name or "see-the-license-file", where=f"by its file {path.name}")
    return None


def _slug(name: str) -> str:
    """A licence's name as `license_name` has it: my-license-1.0."""
    return re.sub(r"[^a-z0-9.]+", "-", name.lower()).strip("-.")
