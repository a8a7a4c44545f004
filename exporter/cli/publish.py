"""exporter publish: proved artifacts on the Hugging Face Hub, in one commit."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from exporter.cli import options
from exporter.cli.failures import stoppable
from exporter.cli.output import print_json, print_table, progress, say

if TYPE_CHECKING:
    from exporter.pipeline.publish import Published, PublishPlan


@click.command()
@click.argument("artifacts", metavar="ARTIFACT...", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--repo", metavar="USER/NAME", required=True, help="Where to; made when it is not there.")
@click.option("-n", "--dry-run", is_flag=True, help="Show what would be published, and end. Asks nothing of the Hub.")
@click.option("-y", "--yes", is_flag=True, help="Do not ask before publishing.")
@click.option("--private", is_flag=True, help="A private repository. One that is there keeps its visibility.")
@click.option(
    "--revision", metavar="BRANCH", default="main", show_default=True, help="Branch; made when it is not there."
)
@click.option("--create-pr", is_flag=True, help="As a pull request, for a repository of others.")
@click.option("--tag", metavar="NAME", default="", help="Tag the commit.")
@click.option("--message", metavar="TEXT", default="", help="Of the commit.  [default: names the artifacts]")
@click.option("--license", "licence", metavar="ID", default="", help="For the card; gpt-oss itself is apache-2.0.")
@click.option("--base-model", metavar="ID", default="", help="For the card, of artifacts made from a folder.")
@click.option("--folder", metavar="NAME", default="", help="Put the one artifact into this folder, not at the root.")
@click.option("--overwrite-card", is_flag=True, help="Replace a README.md that exporter did not write.")
@click.option("--allow-unproven", is_flag=True, help="Also artifacts without a passed proof; the card says so.")
@options.quiet
@options.as_json
def command(
    artifacts: tuple[Path, ...],
    repo: str,
    dry_run: bool,
    yes: bool,
    private: bool,
    revision: str,
    create_pr: bool,
    tag: str,
    message: str,
    licence: str,
    base_model: str,
    folder: str,
    overwrite_card: bool,
    allow_unproven: bool,
    quiet: bool,
    as_json: bool,
) -> None:
    """Put proved artifacts on the Hugging Face Hub, in one commit.

    Each ARTIFACT is a folder that exporter made and proved. One goes to the root of the repository, several
    of the same model get a folder each; a model card of all of them is written. All is there afterwards or
    nothing: one commit, compared with the files here by hash. After any failure the same command goes on.

    The token is that of `hf auth login`, of HF_TOKEN, or of a trusted publisher in a GitHub workflow.

    \b
    Examples:
      exporter publish artifacts/gpt-oss-20b/16gb/gguf-mxfp4-q8 --repo me/gpt-oss-20b-GGUF
      exporter publish artifacts/gpt-oss-20b/16gb/onnx-* --repo me/gpt-oss-20b-ONNX --dry-run
      exporter publish artifacts/my-model/16gb/gguf-mxfp4-q8 --repo me/my-model-GGUF --private --yes --tag v1
    """
    from exporter.errors import UsageError
    from exporter.pipeline.publish import PublishAsk, plan_publish, publish

    stoppable()
    ask = PublishAsk(
        artifacts=artifacts,
        repo=repo,
        revision=revision,
        private=private,
        create_pr=create_pr,
        tag=tag,
        message=message,
        license=licence,
        base_model=base_model,
        allow_unproven=allow_unproven,
        overwrite_card=overwrite_card,
        folder=folder,
    )
    if not (dry_run or yes) and (as_json or not sys.stdin.isatty()):
        raise UsageError("publishing asks first, and nobody is there to answer", hint="--yes, or --dry-run to look")
    watch = progress(quiet or as_json)
    plan = plan_publish(ask, watch)
    if not (as_json or (quiet and yes)):
        _show_plan(plan)
    if dry_run:
        if as_json:
            print_json(_plan_json(plan))
        return
    if not yes and not click.confirm(f"Publish to {repo}?", err=True):
        say("nothing was published")
        return
    done = publish(plan, watch)
    if as_json:
        print_json({"status": "published", **vars(done)})
    else:
        _show(done)


def _show_plan(plan: PublishPlan) -> None:
    from exporter.pipeline.publish import role
    from exporter.types.sizes import format_size

    rows = [(each.name, format_size(each.size), role(each.name)) for each in plan.uploads]
    print_table(("file", "size", "what it is"), rows, right=(1,))
    say(f"{len(rows)} files, {format_size(plan.nbytes)}, to {_where(plan)}")


def _where(plan: PublishPlan) -> str:
    ask = plan.ask
    way = "a pull request of" if ask.create_pr else f"{ask.revision} of"
    seen = "private" if ask.private else "public if it is new, unless its organisation says otherwise"
    return f"{way} {ask.repo} ({seen}){f', tag {ask.tag}' if ask.tag else ''}"


def _plan_json(plan: PublishPlan) -> dict[str, Any]:
    from exporter.pipeline.publish import role

    ask = plan.ask
    return {
        "status": "planned",
        "repo": ask.repo,
        "revision": ask.revision,
        "private": ask.private,
        "create_pr": ask.create_pr,
        "tag": ask.tag,
        "message": plan.message,
        "artifacts": [
            {"path": str(each.folder), "folder": prefix, "name": each.name} for prefix, each in plan.artifacts.items()
        ],
        "files": [
            {"name": each.name, "bytes": each.size, "sha256": each.sha256, "what": role(each.name)}
            for each in plan.uploads
        ],
        "bytes": plan.nbytes,
    }


def _show(done: Published) -> None:
    from exporter.types.sizes import format_size

    if done.made:
        there = f"; {done.already} were there already" if done.already else ""
        say(f"published {done.files} files, {format_size(done.nbytes)}{there}")
    else:
        say(f"all {done.already} files are there already")
    say(done.url)
    if done.tag:
        say(f"tag {done.tag}")
    say(f"check it anywhere: {done.verify}")
