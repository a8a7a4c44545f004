"""A card from top to bottom."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable

from exporter.publish.card.choose import choice, runs_in, where
from exporter.publish.card.facts import Item, Repository
from exporter.publish.card.head import RELEASED_UNDER, RELEASES, head, license_of
from exporter.publish.card.markup import block, bullets, cleaned, code, folded, link, picture, text
from exporter.publish.card.run import UNNAMED, how_to_run

MARK = "<!-- exporter card -->"  # the first line below the head: a card that `publish` may write anew
_UNFOLDED = 3  # artifacts; more of them are folded, or nobody finds the end of the card
_HASH = re.compile(r"[0-9a-f]{40,64}")


def page(repository: Repository) -> str:
    """README.md."""
    long = len(repository.items) > _UNFOLDED
    parts = [
        f"# {_title(repository)}",
        *_warnings(repository),
        _what(repository),
        "## Which file for which device",
        choice(repository),
        "## How to run it",
        *_each(repository, lambda item: how_to_run(item, repository.name), runs_in if long else None),
        "## Check what you downloaded",
        _verify(repository),
        "## The proof",
        *_each(repository, _proof, _verdict),
        "## Where it comes from",
        *_each(repository, _origin, (lambda item: item.recipe) if long else None),
        *_license(repository),
    ]
    body = "\n\n".join(part for part in parts if part)
    return f"{head(repository)}\n{MARK}\n\n{body}\n"


def _title(repository: Repository) -> str:
    return text(repository.name.rpartition("/")[2] or repository.items[0].model)


def _warnings(repository: Repository) -> list[str]:
    """What nobody may miss, above everything else."""
    found = []
    for item in repository.items:
        name = code(item.label)
        if item.status == "":
            found.append(
                f"**{name} WAS NOT PROVED.** Nobody compared it with the model that it is made of. It may be wrong in "
                "ways that do not show in a chat."
            )
        elif item.status == "gate failed":
            said = f" {text(item.sentence)}" if item.sentence else ""
            found.append(f"**{name} FAILED ITS PROOF.**{said}")
    if not found:
        return []
    return ["\n>\n".join(f"> ⚠️ {line}" for line in found)]


def _what(repository: Repository) -> str:
    kinds = list(dict.fromkeys(item.kind for item in repository.items))
    models = list(dict.fromkeys(item.model for item in repository.items))
    bases = [link(text(base), f"https://huggingface.co/{base}") for base in repository.bases]
    named = " and ".join(bases or [text(model) for model in models])
    said = f"{named} as {', '.join(map(text, kinds))}, quantized and exported by exporter."
    proved = [item for item in repository.items if item.status]
    if proved:
        said += (
            " Each file was opened again, every tensor compared with what was meant, and the whole run against the "
            "original model: what that found is [below](#the-proof)."
            if len(proved) == len(repository.items)
            else " What was proved, and what was not, is [below](#the-proof)."
        )
    if not repository.bases:
        said += "\n\nIt was made of a folder: which repository that came from is not recorded here."
    return said


def _each(repository: Repository, write: Callable[[Item], str], told: Callable[[Item], str] | None) -> list[str]:
    """A part for each artifact: folded below its name and what `told` says of it, or under a heading."""
    items = repository.items
    if len(items) == 1:
        return [write(items[0])]
    if told is not None:
        return [folded(f"{item.label}: {told(item)}", write(item)) for item in items]
    return [part for item in items for part in (f"### {where(item, repository.name)}", write(item))]


def _verdict(item: Item) -> str:
    return {"passed": "passed", "gate failed": "a gate FAILED", "": "not proved"}[item.status]


def _verify(repository: Repository) -> str:
    name = repository.name or UNNAMED
    folder = cleaned(name.rpartition("/")[2])
    sums = [
        f"(cd {shlex.quote(item.prefix)} && sha256sum -c SHA256SUMS)" if item.prefix else "sha256sum -c SHA256SUMS"
        for item in repository.items
    ]
    lines = [f"hf download {cleaned(name)} --local-dir {folder} && cd {folder}", *sums]
    return "\n\n".join(
        [
            "Every file against its hash, and the proof's verdict against the manifest. The Hub's own client accepts a "
            "file with a wrong byte.",
            block("sh", f"exporter verify {cleaned(name)}"),
            "Without exporter:",
            block("sh", "\n".join(lines)),
            "`manifest.json` names every tensor's digest, the recipe and the source; of what was proved, "
            "`provenance.json` says the same as an in-toto statement. Neither says who made it: a signature "
            "(`model.sig`) does, where there is one.",
        ]
    )


def _proof(item: Item) -> str:
    if not item.proof:
        return "Not proved: no gate was asked, nothing was run, and no figure above was measured."
    if not item.reported:
        return item.proof
    shown = [picture(each) for each in item.pictures]
    more = f"Everything that was measured: {link('report.md', item.path('report.md'))}; with pictures: "
    more += f"{link('report.html', item.path('report.html'))} (download it); for programs: "
    more += f"{link('report.json', item.path('report.json'))}."
    return "\n\n".join([item.proof, *shown, more])


def _origin(item: Item) -> str:
    source = link(text(item.source), f"https://huggingface.co/{item.source}") if item.source else text(item.model)
    rows = [f"made of: {source}{f' at {code(item.revision)}' if item.revision else ''}"]
    rows.append(f"recipe: {code(item.recipe)}{f', {text(item.recipe_title)}' if item.recipe_title else ''}")
    rows += [
        f"{text(label)}: {code(value) if _HASH.fullmatch(value) else text(value)}"
        for label, value in item.origin.items()
    ]
    made = f"\n\n{block('sh', cleaned(item.command))}" if item.command else ""
    return bullets(rows) + made


def _license(repository: Repository) -> list[str]:
    known = license_of(repository)
    if known == RELEASED_UNDER and not repository.license:
        return [f"## License\n\n{known}, as {code(RELEASES + '*')} was released."]
    if known:
        return [f"## License\n\n{text(known)}"]
    return ["## License\n\nThe license of the model that it is made of holds."]
