"""Where profiles and recipes are found: beside the package in a checkout, inside it once installed."""

from __future__ import annotations

from pathlib import Path

from exporter.errors import UsageError, did_you_mean
from exporter.types.profile import Profile
from exporter.types.recipe import Recipe


def _shipped() -> Path:
    package = Path(__file__).resolve().parent.parent
    inside = package / "profiles"
    return inside if inside.is_dir() else package.parent / "profiles"


def profile_names() -> list[str]:
    return sorted(p.stem for p in _shipped().glob("*.toml"))


def recipe_names() -> list[str]:
    return sorted(p.stem for p in (_shipped() / "recipes").glob("*.toml"))


def load_profile(name: str) -> Profile:
    """A shipped profile by name, or one from a .toml file."""
    return Profile.from_toml(*_text(name, _shipped(), profile_names(), "profile"))


def load_recipe(name: str) -> Recipe:
    """A shipped recipe by name, or one from a .toml file."""
    return Recipe.from_toml(*_text(name, _shipped() / "recipes", recipe_names(), "recipe"))


def _text(name: str, folder: Path, known: list[str], kind: str) -> tuple[str, str, str]:
    """(text, short name, where) of a TOML file that `name` points at."""
    path = folder / f"{name}.toml" if name in known else Path(name)
    if name not in known and path.suffix != ".toml":
        raise UsageError(
            f'unknown {kind} "{name}".{did_you_mean(name, known)}',
            hint=f"{kind}s: {', '.join(known)}, or a path to a .toml file",
        )
    try:
        return path.read_text(encoding="utf-8"), path.stem, f"{kind} {path.name}"
    except FileNotFoundError:
        raise UsageError(f"{kind} file {name} does not exist", hint=f"{kind}s: {', '.join(known)}") from None
    except (OSError, UnicodeDecodeError) as e:
        raise UsageError(f"{kind} file {name} cannot be read: {e}") from None


def source_text(name: str) -> str:
    """The TOML of a shipped profile or recipe, as it is."""
    folders = {**{n: _shipped() for n in profile_names()}, **{n: _shipped() / "recipes" for n in recipe_names()}}
    if name not in folders:
        raise UsageError(
            f'unknown profile or recipe "{name}".{did_you_mean(name, folders)}', hint=f"one of: {', '.join(folders)}"
        )
    return (folders[name] / f"{name}.toml").read_text(encoding="utf-8")
