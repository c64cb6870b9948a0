"""Make the data set of the built-in model: nine styles of the same emoji, as WebDataset shards with captions.

    pip install resvg_py; python tools/prepare_emoji.py emoji --size 128
    python tools/prepare_emoji.py emoji-small --size 96 --styles "fluent 3d,noto" --no-tones --cache emoji/packages
    python tools/prepare_emoji.py contrast --size 96 --styles "high contrast" --no-tones --few 40 --cache emoji/packages

Fetches pinned packages with `npm pack` (no code in them is run), checks their digests, renders vector art with resvg,
and writes `train-*.tar`, `held-out-*.tar`, NOTICE.md and a list of the drawings left out. An interrupted run continues
when it is started again. `--few 40` writes that many drawings as PNG files with captions (`LABEL, STYLE style`) into
the folder `train`, and the others into `held-out`: such folders are what `ldm train-adapter` takes. All art is licensed
under MIT, Apache-2.0 or CC-BY-4.0; country flags are left out.

A fixed rule holds out (concept, style) pairs, so that models can be tested on combinations that were not in training;
the concept in other styles, and other concepts in the style, are in training.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import re
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from PIL import Image
from rich.progress import track

from ldm.errors import LdmError, suggestion
from ldm.files import read_json, write_json

LABELS = ("emojibase-data@17.0.0", "d01d0e2ca4e22cb402679532155342c71e2e871f25c32223c013b8b166ebdf5a")
FLAGS, COMPONENTS = 9, 2  # groups of emojibase that are left out
TONES = ("", "light", "medium-light", "medium", "medium-dark", "dark")
PER_SHARD = 1000
HELD_OUT = 0.03  # share of (concept, style) pairs that are held out
DEFAULT = "fluent 3d"  # the style that captions without a style have


@dataclass(frozen=True)
class Style:
    """One set of drawings."""

    name: str  # the style's name in captions
    package: str
    sha256: str
    licence: str
    author: str
    usual: bool = True  # whether a model of emoji is trained with it; the others are there for adapters


STYLES = (
    Style("fluent 3d", "@lobehub/fluent-emoji-3d@1.1.0",
          "c1bb7eee7de090205a232518a9ab4adb3df458bfbe8a1f78232991194c8b2e58", "MIT", "Microsoft"),
    Style("fluent gradient", "@iconify-json/fluent-emoji@1.2.7",
          "8044210dbf11e016d4de85f15d01a243423bd832457e7e2491df1b751c0e272b", "MIT", "Microsoft"),
    Style("fluent flat", "@iconify-json/fluent-emoji-flat@1.2.6",
          "7d064769dee690815f823bc5bcc511d957198caf9f5edd8dd9c1aa48a6aeb175", "MIT", "Microsoft"),
    Style("noto", "@iconify-json/noto@1.2.9",
          "3e918d88fc945c0bb3d468dbace6f88caef67f01c9f0e7bcae0915a042e8f1ad", "Apache-2.0", "Google"),
    Style("noto v1", "@iconify-json/noto-v1@1.2.5",
          "2bf62c26c2c2884aa99e90aec942cdaee17a5921f05690694f4978ad4b017c37", "Apache-2.0", "Google"),
    Style("twemoji", "@iconify-json/twemoji@1.2.5",
          "19046dff7d8707ce96212ec86468b36ac5f8e60409629dd13f809265c6d0ebb7", "CC-BY-4.0", "Twitter"),
    Style("emojione v2", "@iconify-json/emojione@1.2.3",
          "26a14f44284407e8bcde91799388dca2bfd91dbcd55a97f425524a1c5b73610e", "CC-BY-4.0", "Emoji One"),
    Style("firefox os", "@iconify-json/fxemoji@1.2.2",
          "f3e72b3c59d05e1db03b7e308d55c0d05bd7ba3f625a90da1b79313c12858eef", "CC-BY-4.0", "Mozilla"),
    Style("streamline", "@iconify-json/streamline-emojis@1.2.4",
          "5dac87c876b322500989828c5823143e0100d78881627a2e4081a4b897cbfdbc", "CC-BY-4.0", "Streamline"),
    Style("high contrast", "@iconify-json/fluent-emoji-high-contrast@1.2.6",
          "0b92d48c90d2200bd499e3cdd09a127ca6a8c8ddefd34c35eb5a1e4994012ae0", "MIT", "Microsoft", usual=False),
)  # fmt: skip


@dataclass(frozen=True)
class Concept:
    """One emoji."""

    code: str  # code points in hexadecimal, joined by hyphens
    label: str
    tags: tuple[str, ...]
    base: str  # code of the emoji without skin tone
    tone: str  # "" or a skin tone
    names: tuple[str, ...] = ()  # emojibase's other names, made of its shortcodes


@dataclass(frozen=True)
class Pair:
    """One drawing of one emoji, not yet rendered."""

    concept: Concept
    style: Style
    art: str  # SVG, or the path of an image

    @property
    def key(self) -> str:
        """The key of the drawing: code and style."""
        return f"{self.concept.code}.{self.style.name.replace(' ', '-')}"

    @property
    def held_out(self) -> bool:
        """Whether the drawing is held out from training; the same for all skin tones of an emoji."""
        digest = hashlib.sha256(f"{self.concept.base}/{self.style.name}".encode()).digest()
        return int.from_bytes(digest[:4], "big") < HELD_OUT * 2**32

    def captions(self) -> list[str]:
        """The captions from which training chooses: the label, other names, an article, keywords, with the style before
        or after them; of the default style also without it."""
        label, style = self.concept.label, self.style.name
        article = "an" if label[0].lower() in "aeiou" else "a"
        things = [label, f"{article} {label}", *self.concept.names]
        found = [f"{label}, {style} style", f"{style} emoji of {label}"]
        if self.concept.tags:
            tags = ", ".join(self.concept.tags[:4])
            found += [f"{label}, {tags}, {style} style", f"{tags}, {style} style"]
        found += [f"{style} {label}", *(f"{thing}, {style} style" for thing in things[1:])]
        return found + (things if style == DEFAULT else [])


def fetch(package: str, sha256: str, cache: Path) -> Path:
    """The unpacked folder of an npm package, from the cache or the registry.

    Raises:
        LdmError: the package cannot be fetched, or its digest is wrong.
    """
    name = package.removeprefix("@").replace("/", "-")
    folder = cache / name
    if folder.is_dir():
        return folder
    if not shutil.which("npm"):
        raise LdmError("npm is not installed; it fetches the packages")
    cache.mkdir(parents=True, exist_ok=True)
    result = subprocess.run(
        ["npm", "pack", "--silent", "--ignore-scripts", package], cwd=cache, capture_output=True, text=True, check=False
    )
    if result.returncode:
        raise LdmError(f"npm pack {package}: {result.stderr.strip() or 'failed'}")
    archive = cache / result.stdout.strip().splitlines()[-1]
    found = hashlib.sha256(archive.read_bytes()).hexdigest()
    if found != sha256:
        raise LdmError(f"{archive} has the digest {found}, not {sha256}; remove it and try again")
    temporary = folder.with_suffix(".part")
    shutil.rmtree(temporary, ignore_errors=True)
    with tarfile.open(archive) as file:
        file.extractall(temporary, filter="data")
    (temporary / "package").rename(folder)
    temporary.rmdir()
    return folder


def concepts(folder: Path) -> list[Concept]:
    """All emoji except flags, with their skin tones."""
    found = []
    shortcodes = read_json(folder / "en" / "shortcodes" / "emojibase.json")
    for row in json.loads((folder / "en" / "data.json").read_text(encoding="utf-8")):
        if row.get("group") in (None, FLAGS, COMPONENTS):
            continue
        tags = tuple(tag for tag in row.get("tags", ()) if tag not in row["label"])
        base = row["hexcode"].lower()
        found.append(Concept(base, row["label"], tags, base, "", _other_names(shortcodes, row)))
        for skin in row.get("skins", ()):
            tones = skin["tone"] if isinstance(skin["tone"], list) else [skin["tone"]]
            tone = " and ".join(TONES[number] for number in tones)
            found.append(Concept(skin["hexcode"].lower(), skin["label"], tags, base, tone))
    return found


def _other_names(shortcodes: dict[str, Any], row: dict[str, Any]) -> tuple[str, ...]:
    """What an emoji's shortcodes say in words, where its label does not."""
    codes = shortcodes.get(row["hexcode"], [])
    names = [code.replace("_", " ") for code in ([codes] if isinstance(codes, str) else codes)]
    return tuple(name for name in names if _loose(name) != _loose(row["label"]))


def names_of(folder: Path) -> dict[str, str]:
    """An icon set's names by code point, from chars.json; empty if the set has no such file."""
    chars = folder / "chars.json"
    known = json.loads(chars.read_text(encoding="utf-8")) if chars.exists() else {}
    return {_plain(code): name for code, name in known.items()}


def art_of(folder: Path, names: list[dict[str, str]]) -> Callable[[Concept], str | None]:
    """A function that finds a style's drawing of a concept, by code point or by its name in emojibase or any set."""
    if (folder / "assets").is_dir():
        paths = {_plain(path.stem): str(path) for path in sorted((folder / "assets").glob("*.webp"))}
        return lambda concept: paths.get(_plain(concept.code))
    icons = json.loads((folder / "icons.json").read_text(encoding="utf-8"))
    own = names_of(folder)
    art = {name: _svg(icons, icon) for name, icon in icons["icons"].items()}
    for alias, row in icons.get("aliases", {}).items():
        if row["parent"] in art and not row.keys() - {"parent"}:
            art[alias] = art[row["parent"]]
    loose = {_loose(name): name for name in reversed(art)}

    def find(concept: Concept) -> str | None:
        code = _plain(concept.code)
        if own:
            return art.get(own.get(code, ""))
        called = [_name(concept.label), *(known[code] for known in names if code in known)]
        return next((art[found] for name in called if (found := loose.get(_loose(name)))), None)

    return find


def _svg(icons: dict[str, Any], icon: dict[str, Any]) -> str:
    left, top = icon.get("left", 0), icon.get("top", 0)
    width, height = (icon.get(side, icons.get(side, 16)) for side in ("width", "height"))
    view = f'viewBox="{left} {top} {width} {height}"'
    links = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
    return f'<svg {links} {view} width="{width}" height="{height}">{icon["body"]}</svg>'


def _plain(code: str) -> str:
    """Code points without variation selectors."""
    return "-".join(part for part in code.lower().split("-") if part != "fe0f")


def _loose(name: str) -> str:
    """A name without hyphens and the ending -1, which differ between sets."""
    return re.sub(r"-1$", "", name).replace("-", "")


def _name(label: str) -> str:
    """A label in the spelling of icon sets: lower case, with hyphens."""
    return re.sub(r"[^a-z0-9]+", "-", label.lower().replace("’", "").replace("'", "")).strip("-")


def pairs(cache: Path) -> list[Pair]:
    """All drawings of the data set, in a fixed order.

    Emoji that Microsoft has not released openly are missing in the flat set, and are left out of the other Fluent sets.
    """
    everything = concepts(fetch(*LABELS, cache))
    found: list[Pair] = []
    open_fluent: set[str] = set()
    folders = {style: fetch(style.package, style.sha256, cache) for style in STYLES}
    names = [names_of(folder) for folder in folders.values()]
    for style in sorted(STYLES, key=lambda style: style.name != "fluent flat"):
        find = art_of(folders[style], names)
        for concept in everything:
            art = find(concept)
            if art is None or (style.name == "fluent 3d" and concept.code not in open_fluent):
                continue
            if style.name == "fluent flat":
                open_fluent.add(concept.code)
            found.append(Pair(concept, style, art))
    return sorted(found, key=lambda pair: hashlib.sha256(pair.key.encode()).digest())


def render(pair: Pair, size: int) -> bytes:
    """A PNG with `size` pixels on each side, on white, with a small margin."""
    inner = size - 2 * round(size / 16)
    if pair.art.endswith(".webp"):
        image = Image.open(pair.art).convert("RGBA")
    else:
        import resvg_py

        image = Image.open(io.BytesIO(resvg_py.svg_to_bytes(svg_string=pair.art, width=inner, height=inner)))
    image = image.convert("RGBA")
    scale = inner / max(image.size)
    image = image.resize(
        (max(1, round(image.width * scale)), max(1, round(image.height * scale))), Image.Resampling.LANCZOS
    )
    canvas = Image.new("RGBA", (size, size), "white")
    canvas.alpha_composite(image, ((size - image.width) // 2, (size - image.height) // 2))
    out = io.BytesIO()
    canvas.convert("RGB").save(out, "PNG", optimize=True)
    return out.getvalue()


def write_shard(path: Path, some: list[Pair], size: int) -> list[str]:
    """Write one tar file atomically; returns the keys of drawings that could not be rendered."""
    failed = []
    temporary = path.with_suffix(".part")
    with tarfile.open(temporary, "w") as file:
        for pair in some:
            try:
                image = render(pair, size)
            except (ValueError, OSError) as error:
                failed.append(f"{pair.key}\t{error}")
                continue
            concept = pair.concept
            facts = {
                "caption": pair.captions(), "style": pair.style.name, "licence": pair.style.licence,
                "label": concept.label, "base": concept.base, "tone": concept.tone,
            }  # fmt: skip
            for suffix, data in (("png", image), ("json", json.dumps(facts, ensure_ascii=False).encode())):
                member = tarfile.TarInfo(f"{pair.key.replace('.', '_')}.{suffix}")
                member.size = len(data)
                file.addfile(member, io.BytesIO(data))
    temporary.rename(path)
    return failed


@dataclass(frozen=True)
class Few:
    """A few drawings to train with, as a plain folder, and the others as another one."""

    count: int
    labels: str  # regular expression of their labels
    caption: str  # with {label} and {style}


def write_folder(folder: Path, some: list[Pair], size: int, caption: str) -> None:
    """Write drawings as PNG files, and a caption beside each."""
    folder.mkdir(exist_ok=True)
    for pair in track(some, folder.name):
        path = folder / f"{pair.key.replace('.', '_')}.png"
        text = caption.format(label=pair.concept.label, style=pair.style.name)
        path.with_suffix(".txt").write_text(text, encoding="utf-8")
        if not path.exists():
            path.write_bytes(render(pair, size))


def chunks(values: list[Pair]) -> Iterator[list[Pair]]:
    """The drawings of each shard."""
    rest = iter(values)
    while some := list(islice(rest, PER_SHARD)):
        yield some


def notice(used: list[Pair]) -> str:
    """The text of NOTICE.md: authors and licences of the drawings."""
    rows = []
    for style in STYLES:
        count = sum(pair.style == style for pair in used)
        if count:
            rows.append(f"| {style.name} | {style.author} | {style.licence} | {style.package} | {count} |")
    return "\n".join([
        "# Drawings in this data set", "", "Labels and keywords: emojibase (MIT).", "",
        "| style | author | licence | package | drawings |", "|---|---|---|---|---|", *rows, "",
        "MIT: https://github.com/microsoft/fluentui-emoji/blob/main/LICENSE. Apache-2.0:",
        "https://www.apache.org/licenses/LICENSE-2.0. CC-BY-4.0: https://creativecommons.org/licenses/by/4.0/.",
        "All were rendered at another size on white.", "",
    ])  # fmt: skip


def chosen(everything: list[Pair], styles: list[str], tones: bool) -> list[Pair]:
    """The drawings in the given styles, with or without skin tones.

    Raises:
        LdmError: a style is not known.
    """
    known = [style.name for style in STYLES]
    for name in styles:
        if name not in known:
            raise LdmError(f"style {name!r} is not known; {suggestion(name, known)}")
    return [pair for pair in everything if pair.style.name in styles and (tones or not pair.concept.tone)]


def prepare(
    out: Path, cache: Path, size: int, styles: list[str], tones: bool, limit: int | None, few: Few | None
) -> None:
    """Write all files that do not exist yet.

    Raises:
        LdmError: a style is not known, a package cannot be fetched, or the folder was made with other options.
    """
    used = chosen(pairs(cache), styles, tones)[:limit]
    settings: dict[str, Any] = {"size": size, "styles": sorted(styles), "tones": tones, "limit": limit}
    if few is not None:
        settings["few"] = asdict(few)
        used = [pair for pair in used if re.fullmatch(few.labels, pair.concept.label)]
    path = out / "settings.json"
    if path.exists() and (before := read_json(path)) != settings:
        raise LdmError(f"{out} holds other drawings ({before}); choose another folder, or remove this one")
    out.mkdir(parents=True, exist_ok=True)
    write_json(path, settings)
    (out / "NOTICE.md").write_text(notice(used), encoding="utf-8")
    if few is not None:
        write_folder(out / "train", used[: few.count], size, few.caption)
        write_folder(out / "held-out", used[few.count :], size, few.caption)
        return
    tasks = []
    for split in ("train", "held-out"):
        mine = [pair for pair in used if pair.held_out == (split == "held-out")]
        tasks += [(out / f"{split}-{number:04d}.tar", some) for number, some in enumerate(chunks(mine))]
    todo = [(path, some) for path, some in tasks if not path.exists()]
    print(f"{len(used)} drawings in {len(tasks)} shards, {len(todo)} to make", file=sys.stderr)
    with ProcessPoolExecutor() as pool, (out / "left-out.txt").open("a", encoding="utf-8") as failures:
        made = pool.map(partial(_shard, size), todo)
        for failed in track(made, "rendering", total=len(todo)):
            failures.writelines(f"{line}\n" for line in failed)


def _shard(size: int, task: tuple[Path, list[Pair]]) -> list[str]:
    return write_shard(*task, size)


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="the folder to write")
    parser.add_argument("--size", type=int, default=128, help="pixels of each side")
    parser.add_argument("--cache", type=Path, help="folder for the packages; default: OUT/packages")
    usual = ",".join(style.name for style in STYLES if style.usual)
    parser.add_argument("--styles", default=usual, help="comma-separated names; default: %(default)s")
    parser.add_argument("--no-tones", action="store_true", help="leave out emoji with a skin tone")
    parser.add_argument("--limit", type=int, help="largest number of drawings")
    parser.add_argument("--few", type=int, help="drawings in the folder train; the others lie in held-out")
    parser.add_argument("--labels", default=".*", help="regular expression of the labels of these")
    parser.add_argument("--caption", default="{label}, {style} style", help="caption of these")
    options = parser.parse_args()
    try:
        cache = options.cache or options.out / "packages"
        styles = [name.strip() for name in options.styles.split(",")]
        few = None if options.few is None else Few(options.few, options.labels, options.caption)
        prepare(options.out, cache, options.size, styles, not options.no_tones, options.limit, few)
    except LdmError as error:
        sys.exit(f"prepare_emoji: {error}")


if __name__ == "__main__":
    main()
